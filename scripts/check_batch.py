"""The proof that a batch job survives kills: one file, byte for byte, however often its workers died and however many.

    python scripts/check_batch.py              # 2,000 rows, ten kills, two workers; a few minutes on 2 cores
    python scripts/check_batch.py --model tinycode-draft --rows 60

Runs the real command line, `python -m jaxinfer generate --input rows.jsonl --output ...`, on prompts from held-out
text whose sampling is mixed: greedy, seeded, without a seed, two answers a row, stop strings, log-probabilities, and a
few rows that cannot be answered. First undisturbed. Then killed with SIGKILL again and again and given again until it
is done: at random moments of the undisturbed run's time, and, for three of ten kills, when the answers of a shard are
written and synced but not committed (a Disk put in by this script kills its process there). Then by two workers at
once. All three files must be identical.

Exits 0 and writes scripts/results/check_batch-<device>.json with the seconds and the number of kills, or exits 1 and
prints the first difference. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxinfer.batch import job as jobs
from jaxinfer.batch.leases import Disk
from jaxinfer.cli import codes
from jaxinfer.cli import main as command_line

MAX_LENGTH = 128  # of prompt and answer; a longer prompt is a row that cannot be answered
DYING = "--dies-at-commit"  # a word of this script's own, for the workers that it starts
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("greedy", {}),
    ("greedy with stops", {"stop": ["\n", "self"]}),
    ("seeded", {"temperature": 0.8, "top_k": 40}),
    ("unseeded", {"temperature": 1.0, "top_p": 0.95}),
    ("unseeded with stops", {"temperature": 1.2, "stop": [")", "return "]}),
    ("two answers", {"temperature": 0.9, "n": 2}),
    ("log-probabilities", {"temperature": 0.7, "logprobs": 2}),
)


class Failed(Exception):
    """What did not hold."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An input line, the id that its answer must have, and whether that must be an error."""

    line: str
    id: str | int
    fails: bool = False


def make_rows(texts: Sequence[str], count: int, *, seed: int, name: str, poison_every: int = 40) -> list[Row]:
    """`count` rows for a file called `name`; one of `poison_every` cannot be answered, each for another reason."""
    rng = random.Random(seed)
    poisons = itertools.cycle(_POISONS)
    rows: list[Row] = []
    for number in range(count):
        if number % poison_every == poison_every // 2:
            rows.append(_poison(next(poisons), number, f"{name}:{number + 1}"))
            continue
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - 120))
        body = {"id": number, "prompt": text[start : start + rng.randrange(10, 100)] or "\n"}
        kind, parameters = rng.choice(KINDS)
        body |= parameters | {"max_tokens": rng.randint(4, 24)}
        if kind == "seeded":
            body["seed"] = rng.randrange(1000)
        rows.append(Row(json.dumps(body), number))
    return rows


_POISONS: tuple[dict[str, Any] | None, ...] = (
    None,  # no JSON at all
    {"prompt": 7},
    {"prompt": "x = 1\n" * MAX_LENGTH},
    {"prompt": "x", "temperature": -1},
    {"prompt": "x", "temprature": 1},
    {"prompt": "x", "id": 0},  # the first row has it
)


def _poison(body: dict[str, Any] | None, number: int, where: str) -> Row:
    if body is None:
        return Row('{"id": 1, "prompt": "', where, fails=True)
    body = {"id": number, **body}
    return Row(json.dumps(body), body["id"], fails=True)


class DiesAtCommit(Disk):
    """Kills its process when the answers of the `count`-th shard are written and synced, and have no name yet."""

    def __init__(self, count: int):
        self.left = count

    def link(self, temporary: Path, path: Path, *, durable: bool = True) -> bool:
        if temporary.name.startswith("part-"):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().link(temporary, path, durable=durable)


def dying_worker(count: int, arguments: Sequence[str]) -> int:
    """The command line in this process, with that Disk under it."""
    with unittest.mock.patch.object(jobs, "Disk", functools.partial(DiesAtCommit, count)):
        return command_line(arguments)


@dataclasses.dataclass
class Trial:
    """The command under test: `arguments` but for the output; every file of it is in `folder`."""

    folder: Path
    arguments: tuple[str, ...]
    runs: int = 0
    processes: list[subprocess.Popen[bytes]] = dataclasses.field(default_factory=list)

    def start(self, output: Path, *, dies_after: int | None = None) -> subprocess.Popen[bytes]:
        """A worker; with `dies_after` one that dies between writing and committing its so many'th shard."""
        self.runs += 1
        begin = ["-m", "jaxinfer"] if dies_after is None else [str(Path(__file__).resolve()), DYING, str(dies_after)]
        kept = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two workers may share a GPU
        }
        with self.log(self.runs).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *begin, *self.arguments, "--output", str(output)],
                cwd=self.folder, env=os.environ | kept, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def end(self) -> None:
        """Leaves no worker behind."""
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, run: int) -> Path:
        return self.folder / f"log-{run}.txt"

    def finished(self, process: subprocess.Popen[bytes], run: int) -> None:
        """Waits for a worker's own end, which must be a good one."""
        if process.wait() not in (codes.OK, codes.ROWS_FAILED):
            log = self.log(run).read_text(errors="replace")
            raise Failed(f"a worker ended with {process.returncode}:\n{log[-2000:]}")

    def work(self, output: Path) -> list[Path]:
        return sorted(jobs.folder_of(output).glob("work-*"))

    def parts(self, output: Path) -> int:
        """Shards committed so far."""
        return sum(len(list(work.glob("parts/*"))) for work in self.work(output))


def undisturbed(trial: Trial, output: Path) -> tuple[float, float, float]:
    """A run to the end: seconds until its first lease, until its first commit or end, and in all. Compilation lies in
    the second span, and later runs find it done."""
    begun, leased, committed = time.monotonic(), None, None
    process = trial.start(output)
    while process.poll() is None:
        if leased is None and any(any(work.glob("leases/*")) for work in trial.work(output)):
            leased = time.monotonic()
        if committed is None and trial.parts(output):
            committed = time.monotonic()
        time.sleep(0.02)
    trial.finished(process, trial.runs)
    end = time.monotonic()
    return (leased or end) - begun, (committed or end) - begun, end - begun


def moments(rng: random.Random, count: int, start: float, work: float) -> list[float]:
    """Seconds after which to kill each of `count` runs of one job: one while it starts; from the others' times beyond
    the start no more than nine tenths of the job's work would be done."""
    cuts = sorted(rng.uniform(0, 0.9 * work) for _ in range(count - 1))
    return [rng.uniform(0, start)][:count] + [start + b - a for a, b in itertools.pairwise([0.0, *cuts])]


def killed_until_done(trial: Trial, expected: bytes, waits: Sequence[float], at_commit: Sequence[int], rng) -> int:
    """Runs one job with a kill after each of `waits` seconds and after each of `at_commit` shards, in random order, and
    then to its end; the number of jobs, which is more than one if one was done before it could be killed."""
    plan: list[float | int] = [*waits, *at_commit]
    rng.shuffle(plan)
    number = done = early = 0
    while done < len(plan):
        if early > 5 * len(plan):
            raise Failed(f"{early} jobs were done before they could be killed: they are too short")
        output = trial.folder / f"killed-{number}.jsonl"
        before, begun = trial.parts(output), time.monotonic()
        if _kill_one(trial, output, plan[done]):
            done += 1
            after = trial.parts(output)
            tell(f"kill {done} of {len(plan)}: {_words(plan[done - 1])}; shards committed: {before}, then {after}")
        else:
            compare(expected, output, "killed")
            number, early = number + 1, early + 1
            tell("done before it could be killed, the same file; another job is begun")
            plan[done] = 1 if isinstance(plan[done], int) else rng.uniform(0, time.monotonic() - begun)
    output = trial.folder / f"killed-{number}.jsonl"
    trial.finished(trial.start(output), trial.runs)
    compare(expected, output, "killed")
    return number + 1


def _kill_one(trial: Trial, output: Path, when: float | int) -> bool:
    """Whether the run was killed before it was done."""
    if isinstance(when, int):
        process = trial.start(output, dies_after=when)
        process.wait()
    else:
        process = trial.start(output)
        try:
            process.wait(timeout=when)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.returncode != -signal.SIGKILL:
        trial.finished(process, trial.runs)
        return False
    if isinstance(when, int) and not any(any(work.glob("tmp/part-*")) for work in trial.work(output)):
        raise Failed("a worker that died between write and commit left no written part behind")
    return True


def _words(when: float | int) -> str:
    return f"at the commit of shard {when} of the run" if isinstance(when, int) else f"after {when:.1f} s"


def two_workers(trial: Trial, output: Path) -> list[int]:
    """Two workers on one output; the rows that each of them answered."""
    first = trial.runs + 1
    processes = [trial.start(output), trial.start(output)]
    for run, process in enumerate(processes, first):
        trial.finished(process, run)
    found = (re.search(r"(\d+) rows in", trial.log(run).read_text()) for run in (first, first + 1))
    return [int(match[1]) if match else 0 for match in found]


def check_answers(rows: Sequence[Row], answers: bytes) -> None:
    """Every row has its answer, in its place, and exactly the rows that must fail did."""
    lines = answers.splitlines()
    if len(lines) != len(rows):
        raise Failed(f"{len(rows)} rows got {len(lines)} answers")
    for row, line in zip(rows, lines, strict=True):
        answer = json.loads(line)
        if answer["id"] != row.id or ("error" in answer) != row.fails:
            raise Failed(f"row {row.line[:200]} got the answer {line[:300].decode()}")


def compare(expected: bytes, output: Path, name: str) -> None:
    """Raises Failed with the first line that differs."""
    got = output.read_bytes()
    if got == expected:
        return
    pairs = itertools.zip_longest(expected.splitlines(), got.splitlines(), fillvalue=b"(nothing)")
    for number, (a, b) in enumerate(pairs, 1):
        if a != b:
            raise Failed(f"{name}: line {number} differs\nundisturbed: {a[:500]!r}\n{name}: {b[:500]!r}")
    raise Failed(f"{name}: the files differ in line ends only")


def check(
    folder: Path, rows: Sequence[Row], source: Path, *, model: str, batch_size: int, kills: int, seed: int
) -> dict[str, Any]:
    """All three runs in `folder`; a row of results, or Failed."""
    source.write_text("".join(row.line + "\n" for row in rows), encoding="utf-8")
    options = ("--model", model, "--batch-size", str(batch_size), "--max-length", str(MAX_LENGTH))
    trial = Trial(folder, ("generate", *options, "--input", str(source)))
    try:
        return _check(trial, rows, random.Random(seed), kills)
    finally:
        trial.end()


def _check(trial: Trial, rows: Sequence[Row], rng: random.Random, kills: int) -> dict[str, Any]:
    calm, shared = trial.folder / "undisturbed.jsonl", trial.folder / "two.jsonl"
    start, first, whole = undisturbed(trial, calm)
    tell(f"undisturbed: {whole:.1f} s, the first lease after {start:.1f} s, the first commit after {first:.1f} s")
    expected = calm.read_bytes()
    check_answers(rows, expected)
    at_commit = [rng.randint(1, max(1, len(rows) // 640)) for _ in range(kills * 3 // 10)]
    begun = time.monotonic()
    waits = moments(rng, kills - len(at_commit), start, whole - first)
    made = killed_until_done(trial, expected, waits, at_commit, rng)
    killed = time.monotonic() - begun
    tell(f"killed {kills} times and done: the same file, {killed:.1f} s")
    begun = time.monotonic()
    shares = two_workers(trial, shared)
    together = time.monotonic() - begun
    compare(expected, shared, "two workers")
    tell(f"two workers, {shares[0]} and {shares[1]} rows: the same file, {together:.1f} s")
    answers = [json.loads(line) for line in expected.splitlines()]
    return {
        "rows": len(rows),
        "error_rows": sum(row.fails for row in rows),
        "answer_tokens": sum(a["usage"]["completion_tokens"] for a in answers if "usage" in a),
        "bytes": len(expected),
        "kills": kills,
        "kills_between_write_and_commit": len(at_commit),
        "jobs_killed": made,
        "rows_by_two_workers": shares,
        "identical": True,
        "seconds": whole + killed + together,
        "seconds_undisturbed": whole,
        "seconds_killed": killed,
        "seconds_two_workers": together,
    }


def tell(text: str) -> None:
    """A line of progress."""
    print(f"check_batch: {text}", file=sys.stderr, flush=True)


def main() -> int:
    if sys.argv[1:2] == [DYING]:
        return dying_worker(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinycode", help="name or directory of the model")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--kills", type=int, default=10, help="three of ten are between write and commit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from jaxinfer.train.data import standard_library

    model = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    texts = [document.text[:20_000] for document in standard_library().held_out]
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "rows.jsonl"
        rows = make_rows(texts, options.rows, seed=options.seed, name=source.name)
        try:
            row = check(
                Path(name), rows, source, model=model, batch_size=options.batch_size, kills=options.kills,
                seed=options.seed,
            )  # fmt: skip
        except Failed as error:
            tell(f"FAILED: {error}")
            return 1
    from jaxinfer.measure import Results  # it looks at the devices: not while workers run on them

    results = Results("check_batch", settings=vars(options))
    print(json.dumps(results.add(**row)))
    tell(f"written: {results.save()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
