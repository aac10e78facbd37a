"""Write the README's method table from the catalogue: python scripts/make_readme.py [--check]

The table stands between the two `methods` markers; --check writes nothing, and fails if the table is out of date. Where
scripts/results has what bench_decoding measured, methods that name a row of it (`Method.effect`) show its figure: batch
1, greedy, on the 100M-parameter model where the row is there, else on tinycode.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxinfer import catalogue
from jaxinfer.measure import text_table

RESULTS = Path(__file__).parent / "results" / "bench_decoding-cpu.json"
MODELS = {"wide": "100M", "tiny": "7M"}
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: made by scripts/make_readme.py -->", "<!-- end of methods -->"


def effect(key: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """The figure of "task:method", with its setting; empty where it was not measured."""
    task, _, method = key.partition(":")
    found = {
        r["model"]: r for r in rows if (r["task"], r["method"], r["batch"], r["temperature"]) == (task, method, 1, 0)
    }
    for model, parameters in MODELS.items():
        if row := found.get(model):
            if task == "json":
                return f"{row['beside_unconstrained']:.2f}x unconstrained ({parameters})"
            return f"{row['speedup']:.2f}x, {row['tokens_per_forward']:.2f} tokens a forward ({task}, {parameters})"
    return ""


def with_table(text: str, results: Path = RESULTS) -> str:
    """The README's text with the catalogue of today between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"README.md needs one line {BEGIN!r} and after it one line {END!r}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    columns: list[str] = list(catalogue.COLUMNS)
    rows: list[dict[str, str]] = [dict(zip(columns, row, strict=True)) for row in catalogue.table()]
    if results.exists():
        measured = json.loads(results.read_text())["rows"]
        columns.append("measured")
        for row in rows:
            key = catalogue.by_name(row["method"]).effect
            row["measured"] = effect(key, measured) if key else ""
    return f"{head}{BEGIN}\n{text_table(rows, columns, markdown=True)}\n{END}{tail}"


def main() -> None:
    text = README.read_text()
    new = with_table(text)
    if "--check" in sys.argv[1:] and new != text:
        raise SystemExit("README.md: the method table is out of date; run python scripts/make_readme.py")
    if new != text:
        README.write_text(new)


if __name__ == "__main__":
    main()
