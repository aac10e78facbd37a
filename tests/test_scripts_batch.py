"""The scripts about batch jobs do what they say, in small: the benchmark's two sides, the check's rows and verdicts."""

import dataclasses
import importlib.util
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jaxinfer.batch import job as jobs
from jaxinfer.batch.params import SamplingParams
from jaxinfer.batch.requests import BadRow
from jaxinfer.decode.language_model import load

SCRIPTS = Path(__file__).parent.parent / "scripts"
TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\nclass Reader:\n    pass\n" * 3


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return script("bench_batch")


@pytest.fixture(scope="module")
def check():
    return script("check_batch")


@pytest.mark.slow
def test_the_two_sides_of_the_benchmark_answer_alike(bench, tiny_model):
    lm = load(tiny_model)
    rows = bench.make_rows(
        [lm.codec.encode(TEXT)] * 2, 14, seed=0, shortest=2, longest=24, prompt_tokens=16
    )  # 14 is no multiple of 4: the last batch of the static side is filled up
    assert {len(row.prompt) for row in rows} <= set(range(4, 17)) and all(2 <= row.max_tokens <= 24 for row in rows)
    refill, static = bench.both_sides(lm, rows, slots=4, rounds=1)
    assert refill["rows_that_differ"] == 0
    assert refill["answer_tokens"] == static["answer_tokens"] == sum(row.max_tokens for row in rows)
    slowest = [max(row.max_tokens for row in rows[i : i + 4]) for i in range(0, 14, 4)]
    assert static["steps"] == sum(slowest) and refill["steps"] < static["steps"]
    assert static["useful"] == pytest.approx(static["answer_tokens"] / (4 * static["steps"]))
    assert refill["useful"] == pytest.approx(refill["answer_tokens"] / (4 * refill["steps"]))
    assert refill["ratio"] == pytest.approx(static["seconds"] / refill["seconds"])


def test_the_benchmark_sees_a_row_that_differs(bench):
    """Planted: one token of one row, in one round only."""
    good = bench.Answers([[1, 2], [3]], steps=2, slots=2)
    rounds = iter([good, dataclasses.replace(good, tokens=[[1, 2], [4]]), good])
    refill, _ = bench.compare(lambda: next(rounds), lambda: good, rounds=2)
    assert refill["rows_that_differ"] == 1 and refill["useful"] == 0.75
    assert bench.compare(lambda: good, lambda: good, rounds=2)[0]["rows_that_differ"] == 0


def test_the_rows_of_the_check_fail_exactly_where_they_should(check, tiny_model, tmp_path):
    lm = load(tiny_model, max_length=check.MAX_LENGTH)
    source = tmp_path / "rows.jsonl"
    rows = check.make_rows([TEXT], 60, seed=0, name=source.name, poison_every=8)
    source.write_text("".join(row.line + "\n" for row in rows))
    found = [row for _, row in jobs.check_rows([source], defaults=SamplingParams(), codec=lm.codec, limits=lm.limits)]
    assert [isinstance(row, BadRow) for row in found] == [row.fails for row in rows]
    assert [row.id if isinstance(row, BadRow) else row.request.id for row in found] == [row.id for row in rows]
    reasons = {row.error.partition(":")[0] for row in found if isinstance(row, BadRow)}
    assert reasons == {"row", "prompt", "temperature", "temprature", "id"} and sum(row.fails for row in rows) == 7
    params = [row.request.params for row in found if not isinstance(row, BadRow)]
    sampled = [p for p in params if p.temperature]
    assert any(p.n == 2 for p in params) and any(p.stop for p in params) and any(p.logprobs for p in params)
    assert {p.seed is None for p in sampled} == {True, False} and len(sampled) < len(params)


def test_the_check_finds_what_is_wrong(check, tmp_path):
    """Planted: an altered, a lost, a swapped row; an error where an answer belongs."""
    rows = [check.Row("", 0), check.Row("", 1), check.Row("", 2, fails=True)]
    lines = [json.dumps({"id": i, "error" if i == 2 else "text": "x"}).encode() for i in range(3)]
    good = b"\n".join(lines) + b"\n"
    check.check_answers(rows, good)
    for bad in (lines[:2], [lines[1], lines[0], lines[2]], [*lines[:2], lines[2].replace(b"error", b"text")]):
        with pytest.raises(check.Failed):
            check.check_answers(rows, b"\n".join(bad))
    output = tmp_path / "out.jsonl"
    for other, message in ((good.replace(b'1, "text": "x"', b'1, "text": "y"'), "line 2"), (lines[0] + b"\n", "line 2"),
                           (good[:-1], "line ends")):  # fmt: skip
        output.write_bytes(other)
        with pytest.raises(check.Failed, match=message):
            check.compare(good, output, "killed")
    output.write_bytes(good)
    check.compare(good, output, "killed")


def test_kills_are_spread_over_the_job(check):
    waits = check.moments(random.Random(0), 7, 3.0, 100.0)
    assert len(waits) == 7 and 0 <= waits[0] <= 3 and all(wait >= 3 for wait in waits[1:])
    assert sum(wait - 3 for wait in waits[1:]) <= 90


def test_a_worker_dies_between_write_and_commit(check, tmp_path):
    """The second part is on the disk, whole, under a temporary name only."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from pathlib import Path
from check_batch import DiesAtCommit
folder, disk = Path({str(tmp_path)!r}), DiesAtCommit(2)
for name in ("lease-0", "part-0", "part-1", "part-2"):
    disk.write(folder / f"{{name}}.tmp", [b"whole"])
    disk.link(folder / f"{{name}}.tmp", folder / name)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"lease-0", "part-0", "part-1.tmp"}
    assert (tmp_path / "part-1.tmp").read_bytes() == b"whole"


@pytest.mark.slow
def test_the_check_itself(check, tiny_model, tmp_path):
    """Seven processes: the whole proof on a random model, with one of four kills between write and commit."""
    source = tmp_path / "rows.jsonl"
    rows = check.make_rows([TEXT], 90, seed=0, name=source.name)
    row = check.check(tmp_path, rows, source, model=str(tiny_model), batch_size=8, kills=4, seed=0)
    assert row["identical"] and row["kills"] == 4 and row["kills_between_write_and_commit"] == 1
    assert row["error_rows"] == 2 and sum(row["rows_by_two_workers"]) >= 90
