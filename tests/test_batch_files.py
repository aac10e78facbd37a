"""Input files: every format gives the same rows, damaged ones say so, and shards are found again."""

import gzip
import json
import sys

import pytest

from jaxinfer.batch import files
from jaxinfer.errors import InputError, JobError

ROWS = [{"id": i, "prompt": "text é " * i, "max_tokens": i + 1, "stop": ["a"]} for i in range(20)]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def rows_of(path, **options):
    return [json.loads(record.data) for record in files.read(path, **options)]


def test_lines_keep_their_numbers_and_offsets(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    records = list(files.read(path))
    assert [(r.number, r.data, r.start) for r in records] == [(1, b'{"a": 1}', 0), (4, b'{"a": 2}', 17)]
    assert list(files.read(path, number=4, offset=17)) == records[1:]


def test_a_line_too_long_keeps_only_its_beginning(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"1\n" + b"x" * 10_000 + b"\n" + b"y" * 100 + b"\n2")
    records = list(files.read(path, longest=100))
    assert [r.number for r in records] == [1, 2, 3, 4]
    assert records[1].problem == "row: got a line of more than 100 bytes; accepted: up to that"
    assert len(records[1].data) <= 1000 and records[2].problem is None and records[3].data == b"2"
    assert records[3].start == path.stat().st_size - 1


def test_gzip_reads_the_same_and_notices_a_cut(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(TEXT.encode()))
    assert rows_of(path) == ROWS and rows_of(path, number=11) == ROWS[10:]
    path.write_bytes(gzip.compress(TEXT.encode())[:-20])
    with pytest.raises(InputError, match="in.jsonl.gz: got a damaged or cut-off gzip file"):
        rows_of(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(InputError, match="damaged or cut-off gzip"):
        rows_of(path)


def test_zstandard_reads_the_same_and_notices_a_cut(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "in.jsonl.zst"
    half = len(TEXT) // 2
    data = b"".join(zstandard.ZstdCompressor().compress(part.encode()) for part in (TEXT[:half], TEXT[half:]))
    path.write_bytes(data)
    assert rows_of(path) == ROWS
    path.write_bytes(data[:-5])
    with pytest.raises(InputError, match="damaged or cut-off zstandard"):
        rows_of(path)


def test_parquet_reads_the_same_from_any_row(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    table = arrow.Table.from_pylist([{**row, "seed": None if row["id"] % 2 else 7} for row in ROWS])
    bias = arrow.array([[(3, 1.5)]] * len(ROWS), arrow.map_(arrow.int32(), arrow.float32()))
    parquet.write_table(table.append_column("logit_bias", bias), path, row_group_size=6)
    wanted = [{**row, **({} if row["id"] % 2 else {"seed": 7}), "logit_bias": {"3": 1.5}} for row in ROWS]
    assert rows_of(path) == wanted
    for number in (1, 6, 7, 14, 20):
        assert rows_of(path, number=number) == wanted[number - 1 :]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="in.parquet: got no Parquet file that can be read"):
        rows_of(path)


def test_a_parquet_column_that_is_not_json_is_an_error_of_its_rows(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    parquet.write_table(arrow.table({"prompt": [b"\xff", b"x"]}), path)
    assert [r.problem[:40] for r in files.read(path)] == ["row: got a column that is not JSON (Obje"] * 2


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for suffix, package, command in (
        (".parquet", "pyarrow.parquet", r"jaxinfer\[data\]"),
        (".zst", "zstandard", "zst"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        path = tmp_path / f"in{suffix}"
        path.write_bytes(b"")
        with pytest.raises(InputError, match=f"needs the package {package}; pip install '?{command}"):
            rows_of(path)


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_a_cursor_finds_shards_in_any_order(tmp_path, name):
    path = tmp_path / name
    data = TEXT.replace("\n", "\n\n").encode()  # with blank lines
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    records = list(files.read(path))
    cursor = files.Cursor([path])
    for start in (0, 5, 15, 10, 0, 5):
        shard = records[start : start + 5]
        taken = cursor.take(0, shard[0].number, shard[0].start, 5)
        assert taken == shard
        assert files.digest_records(taken) == files.digest_records(shard)


def test_inputs_are_checked(tmp_path):
    path = tmp_path / "in.jsonl"
    with pytest.raises(InputError, match="got no file"):
        files.check_inputs([])
    with pytest.raises(InputError, match="in.jsonl: got no such file"):
        files.check_inputs([path])
    with pytest.raises(InputError, match="got a folder"):
        files.check_inputs([tmp_path])
    path.write_text("")
    with pytest.raises(JobError, match="the same file twice"):
        files.check_inputs([path, tmp_path / "." / "in.jsonl"])
    assert files.names_of([path, tmp_path / "b.jsonl"]) == ["in.jsonl", "b.jsonl"]
    assert files.names_of([path, tmp_path / "x" / "in.jsonl"]) == [str(path), str(tmp_path / "x" / "in.jsonl")]
