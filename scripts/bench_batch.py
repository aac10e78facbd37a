"""Batch jobs whose finished rows make room for others, beside batches that wait for their slowest row; in one run.

    python scripts/bench_batch.py                   # tinycode, 256 rows, 32 at a time: a few minutes on 2 cores
    python scripts/bench_batch.py --model tinycode-draft --rows 64 --slots 8 --rounds 1

Refill is what `jaxinfer generate --input` runs: `DecodeEngine` and `Runner` over a job's files, from the first look at
the input to the finished output. Static is `decode.generate` on as many rows at a time, in the order in which they
came, one compiled program a batch until its slowest row is done, in its best form: no host in between, no text, no
files, prompts prefilled together. Both decode greedily with the same step in caches of the same capacity, ignore end
tokens, and stop each row at its own `max_tokens`, log-uniform between two bounds. The tokens are compared row by row.

A slot-step is one step of one slot; it is useful where it yields a token of an answer. At least 85 % of refill's are
expected to be, and a wall-clock ratio of at least 1.5. Compilation and the first run of each side are not counted.

Writes scripts/results/bench_batch-<device>.json and prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxinfer
from jaxinfer import decode, measure
from jaxinfer.batch.engine import DecodeEngine, Settings
from jaxinfer.batch.job import open_job
from jaxinfer.batch.runner import Admission, Look, Runner
from jaxinfer.decode.language_model import LanguageModel
from jaxinfer.train.data import standard_library

COLUMNS = ("side", "seconds", "tok_s", "useful", "steps", "ms_per_step", "ratio", "rows_that_differ")
USEFUL, RATIO = 0.85, 1.5  # what is to be reached


@dataclasses.dataclass(frozen=True)
class Row:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one run of a side brought: each row's tokens, the steps that were made, and the slots that made them."""

    tokens: list[list[int]]
    steps: int
    slots: int

    @property
    def total(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def useful(self) -> float:
        return self.total / (self.steps * self.slots)


def make_rows(
    documents: Sequence[Sequence[int]], count: int, *, seed: int, shortest: int, longest: int, prompt_tokens: int
) -> list[Row]:
    """`count` beginnings at random places of `documents` (token ids), a quarter of `prompt_tokens` long up to all."""
    rng = np.random.default_rng(seed)
    documents = [ids for ids in documents if len(ids) > prompt_tokens]
    rows = []
    for number in range(count):
        ids = documents[number % len(documents)]
        start = int(rng.integers(len(ids) - prompt_tokens))
        length = int(rng.integers(max(1, prompt_tokens // 4), prompt_tokens + 1))
        limit = round(float(np.exp(rng.uniform(np.log(shortest), np.log(longest)))))
        rows.append(Row(tuple(int(i) for i in ids[start : start + length]), limit))
    return rows


class Recorder:
    """An engine that keeps the tokens of each row beside handing them on."""

    def __init__(self, engine: DecodeEngine):
        self.engine, self.slots, self.limits = engine, engine.slots, engine.limits
        self.tokens: dict[str | int, list[int]] = {}
        self._where: dict[int, str | int] = {}

    def admit(self, admissions: Sequence[Admission]) -> None:
        self._where.update({a.slot: a.row.request.id for a in admissions})
        self.engine.admit(admissions)

    def advance(self) -> Look:
        look = self.engine.advance()
        for event in look.events:
            self.tokens.setdefault(self._where[event.slot], []).extend(event.tokens)
        return look

    def release(self, slot: int) -> None:
        self.engine.release(slot)

    def reset(self) -> None:
        self.engine.reset()


def refill_side(lm: LanguageModel, rows: Sequence[Row], folder: Path, *, slots: int) -> tuple[Callable, Settings]:
    """A callable that runs the rows as a new job with one engine (compiled once), and the job's settings."""
    source = folder / "rows.jsonl"
    bodies = [
        {"id": i, "prompt": row.prompt, "max_tokens": row.max_tokens, "temperature": 0, "ignore_eos": True}
        for i, row in enumerate(rows)
    ]
    source.write_text("".join(json.dumps(body) + "\n" for body in bodies))

    def begin(number: int):
        return open_job(
            folder / f"answers-{number}.jsonl", [source], fingerprint={"bench": number}, codec=lm.codec,
            settings=lambda survey: Settings.of(
                survey, slots=slots, max_length=lm.config.max_length, eos_ids=len(lm.codec.eos_ids)
            ).to_json(),
        )  # fmt: skip

    settings = Settings.from_json(begin(0).manifest.settings)
    engine = DecodeEngine(lm.step, lm.params, settings)
    numbers = iter(range(1, 1000))

    def run() -> Answers:
        recorder = Recorder(engine)
        outcome = Runner(begin(next(numbers)), recorder, lm.codec).run()
        if outcome.totals is None or outcome.totals.errors:
            raise SystemExit(f"the job did not answer every row: {outcome.totals}")
        return Answers([recorder.tokens[i] for i in range(len(rows))], outcome.progress.steps, settings.slots)

    return run, settings


def static_side(lm: LanguageModel, rows: Sequence[Row], *, slots: int, capacity: int) -> Callable[[], Answers]:
    """A callable that runs the rows `slots` at a time, each batch to the end of its slowest row."""
    width = max(len(row.prompt) for row in rows)
    # Capacity is width + max_tokens there; the rows' own limits are the Sampling's.
    config = decode.Config(max_tokens=capacity - width, features=decode.Features(), eos=())
    options = decode.compiler_options()
    generate = jax.jit(decode.generate, static_argnames=("step", "config"), compiler_options=options)
    key = jax.random.key(0)
    nothing = Row((0,), 0)  # fills the last batch up and is done before the first step
    batches: list[tuple[Any, ...]] = []
    for at in range(0, len(rows), slots):
        batch = [*rows[at : at + slots], *[nothing] * (at + slots - len(rows))]
        tokens = np.zeros((slots, width), np.int32)
        for i, row in enumerate(batch):
            tokens[i, : len(row.prompt)] = row.prompt
        limits = np.array([row.max_tokens for row in batch], np.int32)
        sampling = dataclasses.replace(decode.Sampling.make(slots), max_tokens=limits)
        batches.append((tokens, np.array([len(row.prompt) for row in batch], np.int32), sampling))

    def run() -> Answers:
        results = [
            generate(lm.step, lm.params, tokens, lengths, config=config, key=key, sampling=sampling)
            for tokens, lengths, sampling in batches
        ]  # all are under way before the first is waited for
        found = jax.device_get([(r.tokens, r.lengths, r.stats.forwards) for r in results])
        answers = [tokens[i, :n].tolist() for tokens, lengths, _ in found for i, n in enumerate(lengths)]
        return Answers(answers[: len(rows)], sum(int(forwards.max()) for *_, forwards in found), slots)

    return run


def both_sides(lm: LanguageModel, rows: Sequence[Row], *, slots: int, rounds: int) -> list[dict[str, Any]]:
    """Both sides on the same rows: a row of results for each."""
    with tempfile.TemporaryDirectory() as folder:
        refill, settings = refill_side(lm, rows, Path(folder), slots=slots)
        static = static_side(lm, rows, slots=settings.slots, capacity=settings.capacity)
        found = compare(refill, static, rounds=rounds)
    prompt_tokens = sum(len(row.prompt) for row in rows)
    return [row | {"prompt_tokens": prompt_tokens, "capacity": settings.capacity} for row in found]


def compare(
    refill: Callable[[], Answers], static: Callable[[], Answers], *, rounds: int, warmup: int = 1
) -> list[dict[str, Any]]:
    """The two in turns; what differs between their answers is counted on every round."""
    answers: dict[str, Answers] = {}
    differ: list[int] = []

    def keeping(side: str, run: Callable[[], Answers]) -> Callable[[], None]:
        def call() -> None:
            answers[side] = run()
            if len(answers) == 2:
                pairs = zip(answers["refill"].tokens, answers["static"].tokens, strict=True)
                differ.append(sum(a != b for a, b in pairs))

        return call

    sides = {"refill": keeping("refill", refill), "static": keeping("static", static)}
    timings = measure.interleaved(sides, rounds=rounds, warmup=warmup)
    ratio = measure.speedup(timings["static"], timings["refill"])
    out = []
    for side in sides:
        found, seconds = answers[side], timings[side].median
        row = {
            "side": side,
            "seconds": seconds,
            "tok_s": found.total / seconds,
            "useful": found.useful,
            "steps": found.steps,
            "ms_per_step": 1000 * seconds / found.steps,
            "answer_tokens": found.total,
            "timing": timings[side].row(),
        }
        if side == "refill":
            row |= {"ratio": ratio.median, "ratio_quartiles": [ratio.low, ratio.high], "rows_that_differ": max(differ)}
        out.append(row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinycode", help="name or directory of the model")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32, help="rows in work at a time, on both sides")
    parser.add_argument("--shortest", type=int, default=8, help="max_tokens is log-uniform from this on")
    parser.add_argument("--longest", type=int, default=512, help="up to this")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="the longest prompt; the shortest is a quarter")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; the median counts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lm = jaxinfer.load(options.model)
    results = measure.Results("bench_batch", settings=vars(options))
    texts = [document.text[:20_000] for document in standard_library().held_out]
    rows = make_rows(
        [lm.codec.encode(text) for text in texts], options.rows, seed=options.seed, shortest=options.shortest,
        longest=options.longest, prompt_tokens=options.prompt_tokens,
    )  # fmt: skip
    for row in both_sides(lm, rows, slots=options.slots, rounds=options.rounds):
        results.add(**row)
    print(measure.text_table(results.rows, COLUMNS))
    refill = results.rows[0]
    reached = refill["useful"] >= USEFUL and refill["ratio"] >= RATIO
    print(f"{'reached' if reached else 'NOT reached'}: {USEFUL:.0%} useful slot-steps and a ratio of {RATIO}")
    print(f"written: {results.save()}")


if __name__ == "__main__":
    main()
