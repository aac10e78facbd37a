"""Write the README's method table from the catalogue: python scripts/make_readme.py [--check]

The table stands between the two `methods` markers; --check writes nothing, and fails if the table is out of date.
"""

import sys
from pathlib import Path

from jaxinfer import catalogue
from jaxinfer.measure import text_table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: made by scripts/make_readme.py -->", "<!-- end of methods -->"


def with_table(text: str) -> str:
    """The README's text with the catalogue of today between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"README.md needs one line {BEGIN!r} and after it one line {END!r}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    rows: list[dict[str, str]] = [dict(zip(catalogue.COLUMNS, row, strict=True)) for row in catalogue.table()]
    return f"{head}{BEGIN}\n{text_table(rows, catalogue.COLUMNS, markdown=True)}\n{END}{tail}"


def main() -> None:
    text = README.read_text()
    new = with_table(text)
    if "--check" in sys.argv[1:] and new != text:
        raise SystemExit("README.md: the method table is out of date; run python scripts/make_readme.py")
    if new != text:
        README.write_text(new)


if __name__ == "__main__":
    main()
