"""Every drafter on four task sets, beside plain decoding and transformers' own speculation, in one interleaved run.

    python scripts/bench_decoding.py                       # tinycode and its 100M widening; about 25 minutes on 2 cores
    python scripts/bench_decoding.py --resume              # goes on where a run of these weights stopped
    python scripts/bench_decoding.py --models tiny --methods copyspec,draft:gamma=3 --batches 1 --tasks edit
    python scripts/bench_decoding.py --methods auto,auto:drafter=copyspec --rounds 9 --models tiny --no-peers

The target is tinycode with tinycode-draft as its draft model and its packaged heads, and the same target widened to
100M parameters (MLP units whose down-projection rows are zero: the same function, so the same acceptance, at a real
ratio of costs). Speed-up is over our own jitted greedy or sampled decoding with a cache, prefill included. Predicted:
from the times of a forward over one token, of a forward over the method's slots, and of its proposal, measured apart.
Greedy answers are compared with the plain ones. The peers decode one prompt at a time and run at batch 1 only. The task
`json` is decoded under a schema, a step at a time with the host's masks; its answers are validated.

What is slower than plain by a quarter or more is timed once: how much slower is of no interest. The wide model runs
the methods that may pay there, and of the sampled and the larger batches a part; --full runs all.

Rows are written to scripts/results/bench_decoding-<device>.json as they come, and a PNG of the table beside it at the
end. The peers need the `peers` extra, the picture needs `plot`, json needs `grammar` and jsonschema.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bench_decode import widen
from decoding_bench import figure, ours, peers, schema
from decoding_bench.tasks import tasks

import jaxinfer
from jaxinfer import measure
from jaxinfer.checkpoint import hub
from jaxinfer.cli.identity import digest
from jaxinfer.cli.options import DRAFTERS
from jaxinfer.cli.side_by_side import split
from jaxinfer.errors import JaxinferError
from jaxinfer.measure import Timing

ROOT = Path(__file__).parent.parent
COLUMNS = (
    "model", "task", "temperature", "batch", "method", "tokens_per_forward", "forwards_per_100", "draft_cost",
    "predicted", "speedup", "equal", "valid",
)  # fmt: skip
WIDE, WIDTH = 100_000_000, 224
SLOW = 1.25  # times plain's seconds, from which on a method is timed once
KEY = ("model", "task", "temperature", "batch", "method")
# Methods that one device cannot gain by (they want a second one), or that decode another law: of the tiny model alone.
TINY_ONLY = ("jacobi", "bild", "pearl", "triforce", "lud")
ALSO = ("token-recycling:nodes=12",)  # beside every drafter as it is by default: the paper's tree is a GPU's
WITH_SCHEMA = ("plain", "draft", "copyspec", "token-recycling")


def main() -> None:
    options = _options()
    methods = split(options.methods)
    methods = ["plain", *(method for method in methods if method != "plain")]
    weights = digest(hub.resolve("tinycode"))
    settings = {name: value for name, value in vars(options).items() if name != "results"}  # no path of a machine
    results = measure.Results("bench_decoding", options.results, settings=settings)
    earlier = json.loads(results.path.read_text())["rows"] if results.path.exists() else []
    done = {key_of(row) for row in earlier if row.get("weights") == weights} if options.resume else set()
    rows: dict[tuple, dict[str, Any]] = {key_of(row): row for row in earlier}
    begun = time.perf_counter()
    for subject, task, setting in cells(options):
        chosen = [m for m in methods if options.full or subject.name == "tiny" or m.partition(":")[0] not in TINY_ONLY]
        if task == "json":
            chosen = [m for m in chosen if m.partition(":")[0] in WITH_SCHEMA]
        head = {"model": subject.name, "task": task, "temperature": setting.temperature, "batch": setting.batch}
        missing = [method for method in chosen if key_of(head | {"method": method}) not in done]
        left_out = set(missing) - set(missing if task == "json" else usable(subject, missing, setting))
        if left_out.issuperset(missing):
            continue
        chosen = [method for method in chosen if method not in left_out]
        cell = measure_schema if task == "json" else measure_cell
        for row in cell(subject, chosen, setting, options):
            counts = {"prompts": len(setting.prompts), "rounds": options.rounds}  # rows of several runs stand together
            row = head | row | counts | {"weights": weights}
            rows[key_of(row)] = row
            print(measure.text_table([row], COLUMNS).splitlines()[-1], file=sys.stderr)
        print(f"{time.perf_counter() - begun:.0f} s so far", file=sys.stderr)
        results.rows = list(rows.values())
        results.save()
    print(measure.text_table(rows.values(), COLUMNS))
    print(f"written: {results.path}")
    if importlib.util.find_spec("matplotlib"):
        print(f"written: {figure.draw(rows.values(), results.path.with_suffix('.png'))}")
    else:
        print("no picture: matplotlib is not installed (the plot extra)")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,wide", help="which of tiny and wide to run")
    parser.add_argument("--methods", default=",".join((*DRAFTERS.entries, *ALSO)), help="as --drafter has them")
    parser.add_argument("--tasks", default="free,edit,repetitive,json", help="task sets")
    parser.add_argument("--batches", default="1,8", help="batch sizes")
    parser.add_argument("--temperatures", default="0,0.8", help="0 is greedy")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each task set")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; medians count")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers out")
    parser.add_argument("--full", action="store_true", help="every method and cell on the wide model too")
    parser.add_argument("--resume", action="store_true", help="keep the cells that a run of these weights has measured")
    parser.add_argument("--results", default=str(ROOT / "scripts/results"), help="folder of the results file")
    return parser.parse_args()


def key_of(row: Mapping[str, Any]) -> tuple:
    """What tells a row from all others."""
    return tuple(row[key] for key in KEY)


def cells(options: argparse.Namespace) -> Iterator[tuple[ours.Subject, str, ours.Setting]]:
    """(subject, task, setting) for every combination that was asked for."""
    lm, draft = jaxinfer.load("tinycode", dtype="float32"), jaxinfer.load("tinycode-draft", dtype="float32")
    sets = tasks(lm.tokenizer.encode, count=options.prompts, length=WIDTH, answer=options.tokens)
    wanted = options.tasks.split(",")
    prompts = {name: task.prompts for name, task in sets.items() if name in wanted}
    if "json" in wanted:
        prompts["json"] = schema.prompts(options.prompts)
    for name in options.models.split(","):
        step, params = (lm.step, lm.params) if name == "tiny" else widen(lm.step, lm.params, WIDE)
        subject = ours.Subject(name, step, params, draft.step, draft.params)
        for batch in map(int, options.batches.split(",")):
            for temperature in map(float, options.temperatures.split(",")):
                for task in wanted:
                    if name == "wide" and not options.full and not _on_the_wide(task, batch, temperature):
                        continue
                    tokens = schema.TOKENS if task == "json" else options.tokens
                    given = prompts[task][: 4 if name == "wide" and batch == 1 else None]
                    yield subject, task, ours.Setting(given, WIDTH, batch, tokens, temperature)


def _on_the_wide(task: str, batch: int, temperature: float) -> bool:
    """Greedy at batch 1 in full; one task sampled, and two in a batch: acceptance is the tiny model's."""
    if temperature == 0:
        return batch == 1 or task in ("free", "edit")
    return batch == 1 and task == "free"


def usable(subject: ours.Subject, methods: list[str], setting: ours.Setting) -> list[str]:
    """The methods that can be had for the subject; what is left out, as a head that is not trained, is said."""
    found = []
    for method in methods:
        try:
            ours.config_of(subject, method, setting)
        except JaxinferError as error:
            print(f"{method}: left out: {error}", file=sys.stderr)
        else:
            found.append(method)
    return found


def measure_cell(
    subject: ours.Subject, methods: list[str], setting: ours.Setting, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Every method and peer on one task set, in turns."""
    runs: dict[str, Any] = {method: ours.Runner(subject, method, setting) for method in methods}
    with tempfile.TemporaryDirectory() as folder:
        asked = not (options.no_peers or setting.batch > 1 or (subject.name == "wide" and setting.temperature > 0))
        others = peers_of(subject, setting, Path(folder)) if asked else {}
    timings = timed(runs | {name: peer.run for name, peer in others.items()}, options.rounds)
    plain = runs["plain"].answers
    for method, timing in timings.items():
        row = {"method": method, "speedup": speedup(timings["plain"], timing), "seconds": timing.row()}
        if method in runs:
            found = ours.statistics(runs[method].answers, plain)
            cost = ours.costs(subject, method, setting, rounds=options.rounds)
            yield row | found | ours.predicted(found["tokens_per_forward"], cost)
        else:
            yield row | _of_peer(others[method], np.concatenate([result.tokens for result in plain]))


def _of_peer(peer: peers.Peer, plain: np.ndarray) -> dict[str, Any]:
    peer.forwards = 0
    tokens = peer.run()
    count = sum(map(len, tokens))
    return {
        "tokens": count,
        "tokens_per_forward": count / peer.forwards,
        "forwards_per_100": 100 * peer.forwards / count,
        "equal": sum(list(row) == ids for row, ids in zip(plain.tolist(), tokens, strict=True)),
    }


def measure_schema(
    subject: ours.Subject, methods: list[str], setting: ours.Setting, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The methods under the schema, in turns; speed-ups are of tokens a second, over plain decoding under it."""
    runs = {method: schema.Runner(subject, method, setting) for method in methods}
    runs[schema.UNCONSTRAINED] = schema.Runner(subject, None, dataclasses.replace(setting, tokens=64))
    timings = timed(runs, options.rounds)
    pace = {name: sum(c.stats.emitted for c in run.answers) / timings[name].median for name, run in runs.items()}
    for name, runner in runs.items():
        found = schema.statistics(runner, runs["plain"] if runner.method is not None else runner)
        yield found | {
            "method": name,
            "speedup": pace[name] / pace["plain"],
            "tokens_per_second": pace[name],
            "beside_unconstrained": pace[name] / pace[schema.UNCONSTRAINED],
            "seconds": timings[name].row(),
        }


def timed(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Each callable once to compile and once in turns; those that are not slow go on for the other rounds."""
    first = measure.interleaved(runs, rounds=1, warmup=1)
    limit = SLOW * first["plain"].median
    going = {name: call for name, call in runs.items() if first[name].median <= limit}
    if rounds < 2:
        return first
    more = measure.interleaved(going, rounds=rounds - 1, warmup=1)
    return {
        name: dataclasses.replace(timing, seconds=timing.seconds + more[name].seconds) if name in more else timing
        for name, timing in first.items()
    }


def speedup(plain: Timing, other: Timing) -> float:
    """Round by round, in the rounds that both ran."""
    rounds = len(other.seconds)
    return measure.speedup(dataclasses.replace(plain, seconds=plain.seconds[:rounds]), other).median


def peers_of(subject: ours.Subject, setting: ours.Setting, folder: Path) -> dict[str, peers.Peer]:
    """transformers on the subject's own weights; none, and a word about it, where it is not installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        print("transformers is not installed: no peers", file=sys.stderr)
        return {}
    from jaxinfer.models.hf import save_directory

    save_directory(subject.step.config, subject.params, folder / "target", dtype="float32")
    save_directory(subject.draft_step.config, subject.draft_params, folder / "draft", dtype="float32")
    return peers.peers(folder / "target", folder / "draft", setting)


if __name__ == "__main__":
    main()
