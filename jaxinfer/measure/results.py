"""Results of a benchmark: every row with the machine, the versions and the commit, in one file; and a table to read.

Stability: experimental.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.errors import InputError
from jaxinfer.measure.host import Load, device_name, load, machine, quiet


class Results:
    """Rows of one benchmark on this machine, saved as `<directory>/<bench>-<device>.json`.

    The load of the machine is read at the start and at each save, and `quiet` in the file says whether it was quiet
    at all of these times.
    """

    def __init__(self, bench: str, directory: str | os.PathLike[str] = "scripts/results", *, settings: Any = None):
        if not bench or not bench.replace("_", "").replace("-", "").isalnum():
            raise InputError(f"bench {bench!r} is not a word of letters, digits, - and _")
        self.path = Path(directory) / f"{bench}-{device_name()}.json"
        self.bench = bench
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self._machine = machine()
        self._loads: list[Load] = []
        self._quiet = self._look()

    def _look(self) -> bool:
        self._loads.append(load())
        return quiet(reading=self._loads[-1])

    def add(self, **row: Any) -> dict[str, Any]:
        """Keep a row; values are numbers, text, booleans, None, lists or dicts of these."""
        _dumps(row)
        self.rows.append(row)
        return row

    def save(self) -> Path:
        """Write the file whole or not at all; a reader never sees half of it."""
        self._quiet = self._look() and self._quiet
        head = {
            "bench": self.bench,
            "quiet": self._quiet,
            "loads": [str(reading) for reading in self._loads],
            "machine": self._machine,
            "settings": self.settings,
        }
        # One row a line: a change of the file is then a change of the rows that changed.
        lines = [f" {json.dumps(key)}: {_dumps(value)}," for key, value in head.items()]
        rows = ",\n".join(f"  {_dumps(row)}" for row in self.rows)
        _write_atomically(self.path, "\n".join(["{", *lines, ' "rows": [', rows, " ]", "}"]) + "\n")
        return self.path


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain)
    except ValueError as error:
        raise InputError(f"a result must be finite and plain, got {value!r}: {error}") from error


def _plain(value: Any) -> Any:
    """numpy and jax scalars and arrays as plain numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise InputError(f"a result cannot hold {value!r} of type {type(value).__name__}")


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner may read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def text_table(
    rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None, *, markdown: bool = False
) -> str:
    """Rows as a table in plain text or Markdown: numbers to four digits and to the right, text to the left."""
    rows = list(rows)
    columns = list(columns or dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    right = [all(_is_number(v) or v is None for v in (row.get(c) for row in rows)) for c in columns]
    if markdown:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max([len(c), *(len(row[i]) for row in cells)]) for i, c in enumerate(columns)]

    def line(values: Sequence[str]) -> str:
        padded = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    else:
        rule = "  ".join("-" * w for w in widths)
    return "\n".join([line(columns), rule, *(line(row) for row in cells)])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
