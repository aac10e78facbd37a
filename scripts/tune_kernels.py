"""Measure block sizes on the device at hand and keep those that beat the ops' own rules, as the kernels read them.

    python scripts/tune_kernels.py --ops flash             # a few minutes
    python scripts/tune_kernels.py --filter 4096 --rounds 15
    python scripts/tune_kernels.py --dry                   # measure and print, write nothing

Each task is one call at one shape. It is timed as the rule would run it and with every candidate block, in interleaved
rounds of one process; a candidate's gain is the median over rounds of the rule's time over its own, less 1. A block is
written only if its gain is above --noise (0.05) and so is the lower quartile's above 0: within that the rule stands,
and an entry that an earlier run wrote for the same sizes is taken out.

Writes pallas_kernels/tuned/<device>.json, which ships with the package: {op: {dtype: {sizes, rounded up to powers of
two: block}}}; the next process reads it. Only ops that look their blocks up are tuned; TASKS lists them. Only what
was measured on the device itself belongs in its table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import measure
from jaxinfer.pallas_kernels._core import tuning
from jaxinfer.pallas_kernels.attention.decode import decode
from jaxinfer.pallas_kernels.attention.flash import flash

Block = tuple[int, ...]
Timer = Callable[[Mapping[Any, Callable[[], Any]]], Mapping[Any, measure.Timing]]
COLUMNS = ("task", "block", "ms", "gain", "gain_q25")


@dataclasses.dataclass(frozen=True)
class Task:
    """A call to tune: `run(block)` is a compiled call with its inputs bound, None for the blocks of the rule."""

    op: str
    dtype: str
    sizes: tuple[int, ...]  # what the op looks its blocks up by
    blocks: tuple[Block, ...]
    run: Callable[[Block | None], Callable[[], Any]]

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype} {'x'.join(map(str, self.sizes))}"


def normal(*shapes: tuple[int, ...], dtype: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True)]


def flash_tasks() -> Iterator[Task]:
    """Causal attention, by our own form of the platform."""
    platform = jax.default_backend()
    impl = {"tpu": "tpu", "gpu": "gpu"}.get(platform, "blocked")
    sides = {"tpu": ((256, 512, 1024),) * 2, "gpu": ((64, 128), (64, 128))}.get(platform, ((256, 512), (128, 256, 512)))
    blocks = tuple((rows, keys) for rows in sides[0] for keys in sides[1])
    for dtype in ("bfloat16",) if platform == "gpu" else ("float32", "bfloat16"):
        for length, dim in ((1024, 64), (2048, 64), (4096, 128)):

            def run(block: Block | None, length: int = length, dim: int = dim, dtype: str = dtype):
                arrays = normal(*[(1, 4, length, dim)] * 3, dtype=dtype)
                call = jax.jit(
                    functools.partial(
                        flash, causal=True, impl=impl, block=None if block is None else (block[0], block[1])
                    )
                )
                return lambda: call(*arrays)

            yield Task("flash", dtype, (length, length, dim), blocks, run)


def decode_tasks() -> Iterator[Task]:
    """One query a row against a long cache, on Hopper, the only form that looks its blocks up."""
    if jax.default_backend() != "gpu":
        return
    for capacity in (8192, 32768):

        def run(block: Block | None, capacity: int = capacity):
            q, k, v = normal((8, 32, 1, 128), *[(8, 8, capacity, 128)] * 2, dtype="bfloat16")
            lengths = jnp.full(8, capacity, jnp.int32)
            call = jax.jit(functools.partial(decode, impl="gpu", block=None if block is None else block[0]))
            return lambda: call(q, k, v, lengths)

        yield Task("decode", "bfloat16", (capacity, 128), ((64,), (128,), (256,)), run)


TASKS = {"flash": flash_tasks, "decode": decode_tasks}


def winner(timings: Mapping[Block | None, measure.Timing], noise: float) -> tuple[Block | None, list[dict[str, Any]]]:
    """The block to keep, or None for the rule's; and a line for each, the rule's (None) included."""
    lines, best, most = [], None, noise
    for block, timing in timings.items():
        ratio = measure.speedup(timings[None], timing)
        gain, low = ratio.median - 1, ratio.low - 1
        name = "rule" if block is None else "x".join(map(str, block))
        lines.append({"block": name, "ms": 1e3 * timing.median, "gain": gain, "gain_q25": low})
        if block is not None and gain > most and low > 0:
            best, most = block, gain
    return best, lines


def tune(task: Task, timer: Timer, noise: float) -> tuple[Block | None, list[dict[str, Any]]]:
    """`winner` of the task's blocks; one that cannot run is said and left out."""
    runs: dict[Block | None, Callable[[], Any]] = {None: task.run(None)}
    for block in task.blocks:
        try:
            call = task.run(block)
            jax.block_until_ready(call())
            runs[block] = call
        except Exception as error:  # a block that does not fit the device must not end the run
            print(f"  {block}: {type(error).__name__}: {str(error).splitlines()[0][:160]}", file=sys.stderr)
    best, lines = winner(timer(runs), noise)
    return best, [{"task": task.name} | line for line in lines]


def changed(table: dict[str, Any], task: Task, best: Block | None) -> dict[str, Any]:
    """The table with the task's entry set, or taken out where the rule stands; ops and dtypes that are empty go."""
    entries = {(op, dtype, b): block for op, ds in table.items() for dtype, bs in ds.items() for b, block in bs.items()}
    key = task.op, task.dtype, tuning.bucket(task.sizes)
    entries.pop(key, None)
    if best is not None:
        entries[key] = list(best)
    new: dict[str, Any] = {}
    for (op, dtype, bucket), block in sorted(entries.items()):
        new.setdefault(op, {}).setdefault(dtype, {})[bucket] = block
    return new


def save(path: Path, table: dict[str, Any]) -> None:
    """Write the table; none is kept where no block beats its rule."""
    if table:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(table, indent=1) + "\n")
    else:
        path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None, timer: Timer | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(TASKS), help=f"comma-separated, of {', '.join(TASKS)}")
    parser.add_argument("--filter", default="", help="regular expression that a task's name must contain")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds")
    parser.add_argument("--noise", type=float, default=0.05, help="the gain that a block must exceed to be kept")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops.split(",")) - set(TASKS):
        parser.error(f"--ops: got {', '.join(sorted(unknown))}; accepts {', '.join(TASKS)}")
    path = tuning.table_path(tuning.device_kind())
    table = json.loads(path.read_text()) if path.exists() else {}
    rules, tuning.TABLES = tuning.TABLES, Path("/nonexistent")  # what is measured against is the rule, not the table
    tuning._table.cache_clear()
    lines = []
    for task in (task for op in options.ops.split(",") for task in TASKS[op]() if re.search(options.filter, task.name)):
        print(task.name, file=sys.stderr)
        best, found = tune(task, timer or functools.partial(measure.interleaved, rounds=options.rounds), options.noise)
        lines += found
        table = changed(table, task, best)
    tuning.TABLES = rules
    tuning._table.cache_clear()
    if not lines:
        raise SystemExit(f"nothing to tune here: no task of {options.ops} matches --filter {options.filter!r}")
    print(measure.text_table(lines, COLUMNS))
    if not options.dry:
        save(path, table)
        print(f"written: {path}" if table else f"no block beats its rule by more than {options.noise:.0%}: no table")


if __name__ == "__main__":
    main()
