"""Input files of a batch job, read as a stream of JSON rows: JSON Lines, gzip, zstandard and Parquet.

A reader yields `Record`s. Only lines of plain JSON Lines can be found by byte offset; the other formats are read
forward, and `Cursor` keeps its place so that shards taken in order cost one pass. A Parquet row becomes the JSON
object of its columns, nulls left out, so that every format is checked by the same code.

Stability: experimental.
"""

import gzip
import hashlib
import importlib
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxinfer.errors import InputError, JobError

Kind = Literal["jsonl", "gzip", "zstandard", "parquet"]
LONGEST_LINE = 8 * 2**20
_KEPT = 1000  # bytes of a line too long that stay in memory


@dataclass(frozen=True)
class Record:
    """One row: its number in the file from 1 (blank lines are numbered and skipped), its JSON, what is wrong with it.

    `start` is the byte offset of the row in a plain file, else 0.
    """

    number: int
    data: bytes
    start: int
    problem: str | None = None


def kind_of(path: Path) -> Kind:
    """The format of a file, by its name."""
    suffixes: dict[str, Kind] = {".gz": "gzip", ".zst": "zstandard", ".parquet": "parquet", ".pq": "parquet"}
    return suffixes.get(path.suffix.lower(), "jsonl")


def read(path: Path, *, number: int = 1, offset: int = 0, longest: int = LONGEST_LINE) -> Iterator[Record]:
    """Records of `path` from row `number` on, which begins at byte `offset` of a plain file.

    Raises InputError when the file cannot be opened, is damaged or ends early, or needs a package that is missing.
    """
    kind = kind_of(path)
    try:
        if kind == "parquet":
            yield from _parquet(path, number)
            return
        with _open(path, kind) as file:
            if kind == "jsonl":
                file.seek(offset)
                yield from _lines(file, number, offset, longest)
            else:
                for record in _lines(file, 1, 0, longest):
                    if record.number >= number:
                        yield Record(record.number, record.data, 0, record.problem)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: got a damaged or cut-off {kind} file ({error}); accepted: a whole one") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def digest(path: Path) -> str:
    """BLAKE2b of the file's bytes, as 32 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_records(records: Sequence[Record]) -> str:
    """BLAKE2b of a shard's records: whether the input is still what the manifest was made from."""
    state = hashlib.blake2b(digest_size=16)
    for record in records:
        state.update(b"%d %d\n" % (record.number, len(record.data)))
        state.update(record.data)
    return state.hexdigest()


class Cursor:
    """Reads runs of records; going forward in a file that has no offsets does not start it again."""

    def __init__(self, paths: Sequence[Path], *, longest: int = LONGEST_LINE) -> None:
        self._paths = paths
        self._longest = longest
        self._file = -1
        self._next = 1
        self._records: Iterator[Record] = iter(())

    def take(self, file: int, first: int, offset: int, rows: int) -> list[Record]:
        """`rows` records of file number `file` from row `first` on; fewer only where the file has changed."""
        path = self._paths[file]
        if kind_of(path) == "jsonl":
            self._file = -1
            return list(itertools.islice(read(path, number=first, offset=offset, longest=self._longest), rows))
        if file != self._file or first < self._next:
            self._records = read(path, number=first, longest=self._longest)
            self._file = file
        out = []
        for record in self._records:
            self._next = record.number + 1
            if record.number >= first:
                out.append(record)
            if len(out) == rows:
                break
        return out


def _open(path: Path, kind: Kind) -> io.BufferedIOBase:
    if kind == "gzip":
        return gzip.open(path, "rb")
    if kind == "zstandard":
        zstandard = _module("zstandard", path, "pip install zstandard")
        return io.BufferedReader(_Zstandard(path.open("rb"), zstandard), 2**20)
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """Decompresses a file of zstandard frames and, unlike the package's own reader, notices a cut-off one."""

    def __init__(self, file: io.BufferedReader, zstandard: Any) -> None:
        self._file, self._zstandard = file, zstandard
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._file.read(2**16)
            if not data and self._frame is not None:
                raise EOFError("it ends within a frame")
            if not data:
                return 0
            while data:
                self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
                try:
                    self._ready += self._frame.decompress(data)
                except self._zstandard.ZstdError as error:
                    raise EOFError(str(error)) from None
                data = self._frame.unused_data
                self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _module(name: str, path: Path, command: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"{path}: reading it needs the package {name}; {command}") from None


def _lines(file: io.BufferedIOBase, number: int, offset: int, longest: int) -> Iterator[Record]:
    """Lines that are not blank; of one longer than `longest` only its beginning is kept."""
    number -= 1
    while line := file.readline(longest + 2):
        number += 1
        start = offset
        offset += len(line)
        problem = None
        if len(line.rstrip(b"\r\n")) > longest:
            problem = f"row: got a line of more than {longest} bytes; accepted: up to that"
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(2**20)
                offset += len(rest)
            line = line[:_KEPT]
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        line = line.strip(b" \t\r\n")
        if line:
            yield Record(number, line, start, problem)


def _parquet(path: Path, number: int) -> Iterator[Record]:
    parquet = _module("pyarrow.parquet", path, "pip install 'jaxinfer[data]'")
    arrow = importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            first, at = 0, 1
            while first < len(groups) and at + groups[first] <= number:
                at += groups[first]
                first += 1
            for batch in file.iter_batches(batch_size=256, row_groups=range(first, len(groups))):
                for row in batch.to_pylist():
                    if at >= number:
                        yield _parquet_record(at, row)
                    at += 1
    except arrow.ArrowException as error:
        raise InputError(f"{path}: got no Parquet file that can be read ({error}); accepted: a whole one") from None


def _parquet_record(number: int, row: dict[str, Any]) -> Record:
    try:
        return Record(number, json.dumps(_without_nulls(row), ensure_ascii=False).encode(), 0)
    except (TypeError, ValueError) as error:
        return Record(number, b"", 0, f"row: got a column that is not JSON ({error}); accepted: text, numbers, lists")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):  # a column of maps
        return _without_nulls(dict(value))
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def check_inputs(paths: Sequence[Path]) -> None:
    """InputError for a missing input, a folder, or none at all; JobError for one given twice."""
    if not paths:
        raise InputError("input: got no file; accepted: at least one")
    for path in paths:
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no such file" if not path.exists() else "no regular file"
            raise InputError(f"input {path}: got {what}; accepted: a file of rows")
    if len({path.resolve() for path in paths}) != len(paths):
        raise JobError("input: got the same file twice; accepted: each file once")


def names_of(paths: Sequence[Path]) -> list[str]:
    """What rows without an id are named after: the file's name, with its folders where names repeat."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
