"""Latent flow matching and the methods that make it fast, trained and measured side by side on data that ships here.

    python scripts/bench_flow.py --quick      # 8x8 digits, flow of pixels, one seed, no peers: five minutes
    python scripts/bench_flow.py              # 32x32 glyphs, flow of latents: an hour on two cores
    python scripts/bench_flow.py --methods "flow matching,meanflow" --no-peers

Every method has the same data, network size, noise and labels; distances are in the features of one small classifier
trained for that alone, against held-out images (of held-out fonts). The train-test floor is what training images score;
samples can fall below it, since those images are of other fonts.
A run that was killed goes on when the same command is given again: trained weights and measured rows are kept in
runs/bench_flow-<set>. With a GPU the networks are larger. The table goes to stdout and, with every row, to
scripts/results/bench_flow-<device>.json (--quick: bench_flow-quick-...), the picture beside it.

A method joins by an `Entry` in `flow_bench`, and by its name in ENTRIES below.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flow_bench import base, cheaper, claims, couplings, edits, few_steps, peer, streams
from flow_bench.bench import FULL, LARGE, QUICK, Bench, Entry, Sampler

from jaxinfer import host_memory
from jaxinfer.cli import compiled
from jaxinfer.cli.output import note, print_table
from jaxinfer.measure import results, timing

ENTRIES: list[Entry] = [
    *base.ENTRIES,
    *couplings.ENTRIES,
    *few_steps.ENTRIES,
    *cheaper.ENTRIES,
    *streams.ENTRIES,
    *edits.ENTRIES,
]
TRAINING = "training_distance"  # of flow matching and of the peer alone
SCORES = ("frechet_distance", "precision", "recall", "accuracy", "variance_ratio")


def measure(bench: Bench, entry: Entry, seed: int, flops: float) -> list[dict[str, Any]]:
    """The rows of a method for one seed, and `samples.npy` of its best sampler with the fewest evaluations."""
    rows = []
    samplers = entry.samplers(bench, seed)
    x, labels = bench.inputs(seed=seed)
    latents: dict[str, Any] = {}

    def run(name: str, sampler: Sampler) -> jax.Array:
        latents[name] = sampler.run(x, labels)
        return latents[name]

    runs = {str(i): functools.partial(run, str(i), sampler) for i, sampler in enumerate(samplers)}
    long = seed or max(sampler.evaluations for sampler in samplers) > 64
    times = timing.interleaved(runs, rounds=1 if long else bench.settings.rounds, warmup=1)
    for i, sampler in enumerate(samplers):
        images = bench.images(latents[str(i)])
        row = {"method": entry.name, "seed": seed, **_about(sampler, flops), **bench.score(images, labels)}
        row |= sampler.more(images, labels) if sampler.more else {}
        row["ms_per_sample"] = 1e3 * times[str(i)].median / len(labels)
        rows.append(row)
        np.save(
            bench.folder / "rows" / f"{_word(entry.name)}-{seed}-{_word(sampler.label)}-{sampler.steps}.npy",
            images[:64],
        )
    return rows


def _about(sampler: Sampler, flops: float) -> dict[str, Any]:
    each = sampler.evaluations * flops if sampler.flops is None else sampler.flops
    return {"sampler": sampler.label, "steps": sampler.steps, "evaluations": sampler.evaluations, "mflops": each / 1e6}


def _word(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def kept(path: Path, make: Any) -> Any:
    """What a JSON file holds, or what `make` gives, written there."""
    if path.is_file():
        return json.loads(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    found = make()
    path.with_suffix(".tmp").write_text(json.dumps(found))
    path.with_suffix(".tmp").replace(path)
    return found


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method, sampler and number of steps: means over seeds, and the distance's deviation."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["sampler"], row["steps"]), []).append(row)
    table = []
    for group in groups.values():
        first = {k: group[0][k] for k in ("method", "sampler", "steps", "evaluations", "mflops")}
        names = [k for k in (*SCORES, "ms_per_sample", "change", TRAINING) if k in group[0]]
        values = {k: statistics.fmean(row[k] for row in group) for k in names}
        distances = [row["frechet_distance"] for row in group]
        deviation = statistics.stdev(distances) if len(group) > 1 else None
        table.append({**first, **values, "deviation": deviation, "seeds": len(group)})
    return table


def show(table: list[dict[str, Any]], floors: dict[str, Any], peers: list[dict[str, Any]]) -> None:
    """The table on stdout."""
    columns = ("method", "sampler", "steps", "FD", "+-", "precision", "recall", "accuracy", "variance", "evaluations")
    lines = [
        [r["method"], r["sampler"], r["steps"], f"{r['frechet_distance']:.2f}",
         "-" if r["deviation"] is None else f"{r['deviation']:.2f}", f"{r['precision']:.3f}", f"{r['recall']:.3f}",
         f"{r['accuracy']:.3f}", f"{r['variance_ratio']:.2f}", f"{r['evaluations']:g}", f"{r['mflops']:.1f}",
         f"{r['ms_per_sample']:.2f}"]
        for r in table
    ]  # fmt: skip
    for name, scores in floors.items():
        values = [f"{scores[k]:.3f}" for k in ("precision", "recall", "accuracy")]
        lines.append([name, "", "", f"{scores['frechet_distance']:.2f}", "-", *values,
                      f"{scores['variance_ratio']:.2f}", "", "", ""])  # fmt: skip
    print_table((*columns, "MFLOP", "ms"), lines, title="A sample: distance to held-out images, cost")
    if peers:
        speeds = [[r["peer"], f"{r['train_ms_per_update']:.1f}"] for r in peers if "train_ms_per_update" in r]
        print_table(("training", "ms an update"), speeds)
        ours = [{**r, "peer": "jaxinfer"} for r in table if TRAINING in r]
        found = [
            [r["peer"], r.get("seed", "mean"), r["steps"], *(f"{r[k]:.2f}" for k in ("frechet_distance", TRAINING))]
            for r in [*ours, *peers]
            if "steps" in r
        ]
        print_table(("trained by", "seed", "euler steps", "FD", "to training images"), found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits, one seed, few updates, no peers")
    parser.add_argument("--methods", help="names, by commas; default: all")
    parser.add_argument("--seeds", type=int, help="of the methods that have several")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--folder", type=Path, help="of weights and rows; default runs/bench_flow-<set>")
    args = parser.parse_args()
    host_memory.keep_freed()  # for ours and for PyTorch
    compiled.use_cache()
    jax.config.update("jax_num_cpu_devices", streams.DEVICES)  # only the stream of frames uses more than one
    size = "quick" if args.quick else "full" if jax.default_backend() == "cpu" else "large"
    settings = {"quick": QUICK, "full": FULL, "large": LARGE}[size]
    settings = dataclasses.replace(settings, seeds=args.seeds or settings.seeds)
    known = {entry.name: entry for entry in ENTRIES}
    names = list(known) if args.methods is None else args.methods.split(",")
    for name in names:
        if name not in known:
            parser.error(f"method {name!r} is none of {', '.join(known)}")
    bench = Bench(settings, args.folder or Path("runs") / f"bench_flow-{size}")
    # Seeds may be added later, and times taken anew; all else makes other weights.
    free = {"seeds": settings.seeds, "rounds": settings.rounds}
    made = kept(bench.folder / "settings.json", lambda: dataclasses.asdict(settings)) | free
    if made != dataclasses.asdict(settings):
        parser.error(f"{bench.folder} was made with other settings ({made}); remove it, or give another --folder")
    started = time.perf_counter()
    bench.prepare()
    note(f"metric and autoencoder ready after {time.perf_counter() - started:.0f} s")
    out = results.Results("bench_flow-quick" if args.quick else "bench_flow", settings=dataclasses.asdict(settings))
    floors = kept(bench.folder / "rows" / "floors.json", bench.floor)
    flops = bench.flops(bench.network, bench.network.init(jax.random.key(0)))
    rows: list[dict[str, Any]] = []
    for name in names:
        for seed in range(settings.seeds if known[name].many else 1):
            file = bench.folder / "rows" / f"{_word(name)}-{seed}.json"
            rows += kept(file, functools.partial(measure, bench, known[name], seed, flops))
            note(f"{name}, seed {seed}: done after {time.perf_counter() - started:.0f} s")
    peers = []
    if not (args.quick or args.no_peers) and peer.available():
        peers = kept(bench.folder / "rows" / "peers.json", functools.partial(peer.speed, bench))
        for seed in range(settings.seeds):
            peers += kept(bench.folder / "rows" / f"torchcfm-{seed}.json", functools.partial(peer.quality, bench, seed))
            note(f"torchcfm, seed {seed}: done after {time.perf_counter() - started:.0f} s")
    table = means(rows)
    for row in [*rows, *({"floor": name, **scores} for name, scores in floors.items()), *peers]:
        out.add(**row)
    out.add(classifier=bench.classifier.digest, autoencoder=bench.autoencoder is not None)
    path = out.save()
    show(table, floors, peers)
    found = claims.lines(table, floors["train-test floor"]["frechet_distance"], peers)
    print_table(("expected", "found"), found)
    images = {
        f"{r['method']}, {r['sampler']}, {r['steps']}": np.load(
            bench.folder / "rows" / f"{_word(r['method'])}-0-{_word(r['sampler'])}-{r['steps']}.npy"
        )
        for r in table
    }
    try:
        from flow_bench import figure

        figure.draw(path.with_suffix(".png"), table, images, floors["train-test floor"]["frechet_distance"])
    except ImportError:
        note("no picture: matplotlib is not installed")
    note(f"{path} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
