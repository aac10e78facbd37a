"""Every drafter on four task sets, beside plain decoding and transformers' own speculation, in one interleaved run.

    python scripts/bench_decoding.py                       # tinycode and its 100M widening; about 40 minutes on 2 cores
    python scripts/bench_decoding.py --models tiny --methods copyspec,draft:gamma=3 --batches 1 --tasks edit

The target is tinycode with tinycode-draft as its draft model, and the same target widened to 100M parameters (MLP units
whose down-projection rows are zero: the same function, so the same acceptance, at a real ratio of costs). Speed-up is
over our own jitted greedy or sampled decoding with a cache, prefill included. Predicted: from the times of a forward
over one token, of a forward over the method's slots, and of its proposal, measured apart. Greedy answers are compared
with the plain ones. The peers decode one prompt at a time and run at batch 1 only.

Writes scripts/results/bench_decoding-<device>.json and a PNG of the table beside it. The peers need the `peers` extra,
the picture needs `plot`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench_decode import widen
from decoding_bench import figure, ours, peers
from decoding_bench.tasks import tasks

import jaxinfer
from jaxinfer import measure
from jaxinfer.cli.options import DRAFTERS
from jaxinfer.cli.side_by_side import split
from jaxinfer.models.hf import save_directory

ROOT = Path(__file__).parent.parent
COLUMNS = (
    "model", "task", "temperature", "batch", "method", "tokens_per_forward", "forwards_per_100", "draft_cost",
    "predicted", "speedup", "equal",
)  # fmt: skip
WIDE = 100_000_000
KEY = ("model", "task", "temperature", "batch", "method")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,wide", help="which of tiny and wide to run")
    parser.add_argument("--methods", default=",".join(name for name in DRAFTERS.entries), help="as --drafter has them")
    parser.add_argument("--tasks", default="free,edit,repetitive,json", help="task sets")
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    parser.add_argument("--temperatures", default="0,0.8", help="0 is greedy")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each task set")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; medians count")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers out")
    parser.add_argument("--results", default=str(ROOT / "scripts/results"), help="folder of the results file")
    options = parser.parse_args()
    methods = split(options.methods)
    methods = ["plain", *(method for method in methods if method != "plain")]
    results = measure.Results("bench_decoding", options.results, settings=vars(options))
    rows = []
    for subject in subjects(options.models.split(",")):
        for cell in cells(subject, options):
            for row in measure_cell(subject, methods, *cell, options):
                rows.append(row)
                print(measure.text_table([row], COLUMNS).splitlines()[-1], file=sys.stderr)
    for row in kept(results.path, rows) + rows:
        results.add(**row)
    path = results.save()
    print(measure.text_table(rows, COLUMNS))
    print(f"written: {path}")
    if importlib.util.find_spec("matplotlib"):
        print(f"written: {figure.draw(results.rows, path.with_suffix('.png'))}")
    else:
        print("no picture: matplotlib is not installed (the plot extra)")


def subjects(names: list[str]) -> list[ours.Subject]:
    """The packaged pair, and the same with the target widened."""
    lm, draft = jaxinfer.load("tinycode", dtype="float32"), jaxinfer.load("tinycode-draft", dtype="float32")
    made = {"tiny": lambda: (lm.step, lm.params), "wide": lambda: widen(lm.step, lm.params, WIDE)}
    return [ours.Subject(name, *made[name](), draft.step, draft.params) for name in names]


def cells(subject: ours.Subject, options: argparse.Namespace) -> list[tuple[str, ours.Setting]]:
    """(task, setting) for every combination that was asked for."""
    encode = jaxinfer.load("tinycode", dtype="float32").tokenizer.encode
    width = 224
    sets = tasks(encode, count=options.prompts, length=width, answer=options.tokens)
    return [
        (task, ours.Setting(sets[task].prompts, width, int(batch), options.tokens, float(temperature)))
        for batch in options.batches.split(",")
        for temperature in options.temperatures.split(",")
        for task in options.tasks.split(",")
    ]


def measure_cell(
    subject: ours.Subject, methods: list[str], task: str, setting: ours.Setting, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every method and peer on one task set, in turns."""
    runs: dict[str, Any] = {method: ours.runner(subject, method, setting) for method in methods}
    with tempfile.TemporaryDirectory() as folder:
        others = {} if options.no_peers or setting.batch > 1 else peers_of(subject, setting, Path(folder))
    timings = measure.interleaved(runs | {name: peer.run for name, peer in others.items()}, rounds=options.rounds)
    answers = {method: runs[method]() for method in methods}
    head = {"model": subject.name, "task": task, "temperature": setting.temperature, "batch": setting.batch}
    rows = []
    for method in methods:
        found = ours.statistics(answers[method], answers["plain"])
        cost = ours.costs(subject, method, setting, rounds=options.rounds)
        rows.append(
            head
            | {"method": method, "speedup": measure.speedup(timings["plain"], timings[method]).median}
            | found
            | ours.predicted(found["tokens_per_forward"], cost)
            | {"tokens_per_second": found["tokens"] / timings[method].median, "seconds": timings[method].row()}
        )
    plain = np.concatenate([result.tokens for result in answers["plain"]])
    for name, peer in others.items():
        peer.forwards = 0
        tokens = peer.run()
        count = sum(map(len, tokens))
        rows.append(
            head
            | {
                "method": name,
                "speedup": measure.speedup(timings["plain"], timings[name]).median,
                "tokens": count,
                "tokens_per_forward": count / peer.forwards,
                "forwards_per_100": 100 * peer.forwards / count,
                "equal": sum(list(row) == ids for row, ids in zip(plain.tolist(), tokens, strict=True)),
                "tokens_per_second": count / timings[name].median,
                "seconds": timings[name].row(),
            }
        )
    return rows


def peers_of(subject: ours.Subject, setting: ours.Setting, folder: Path) -> dict[str, peers.Peer]:
    """transformers on the subject's own weights; none, and a word about it, where it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        print("transformers is not installed: no peers", file=sys.stderr)
        return {}
    save_directory(subject.step.config, subject.params, folder / "target", dtype="float32")
    save_directory(subject.draft_step.config, subject.draft_params, folder / "draft", dtype="float32")
    return peers.peers(folder / "target", folder / "draft", setting)


def kept(path: Path, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier run that this one did not measure."""
    if not path.exists():
        return []
    measured = {tuple(row[key] for key in KEY) for row in new}
    return [row for row in json.loads(path.read_text())["rows"] if tuple(row[key] for key in KEY) not in measured]


if __name__ == "__main__":
    main()
