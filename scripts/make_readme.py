"""Write the README's method table from the catalogue: python scripts/make_readme.py [--check]

The table stands between the two `methods` markers; --check writes nothing, and fails if the table is out of date. The
column "measured" has the figures of scripts/results that methods name (`Method.effect`, "benchmark:row"):
- decoding: batch 1, greedy, on the 100M-parameter model where the row is there, else on tinycode;
- sharding, pipeline: a training step of a small decoder on eight virtual devices;
- streaming: a 2 GB model under a budget of 600 MB;
- flow: Fréchet distance to held-out glyphs (training images have it too: the floor), means over seeds.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer import catalogue
from jaxinfer.measure import text_table

RESULTS = Path(__file__).parent / "results"
MODELS = {"wide": "100M", "tiny": "7M"}
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: made by scripts/make_readme.py -->", "<!-- end of methods -->"
Rows = Sequence[Mapping[str, Any]]


def decoding(key: str, rows: Rows) -> str:
    """The figure of "task:method", with its setting; empty where it was not measured."""
    task, _, method = key.partition(":")
    found = {
        r["model"]: r for r in rows if (r["task"], r["method"], r["batch"], r["temperature"]) == (task, method, 1, 0)
    }
    for model, parameters in MODELS.items():
        if row := found.get(model):
            if task == "json":
                return f"{row['beside_unconstrained']:.2f}x unconstrained ({parameters})"
            return f"{row['speedup']:.2f}x, {row['tokens_per_forward']:.2f} tokens a forward ({task}, {parameters})"
    return ""


def sharding(mesh: str, rows: Rows) -> str:
    """What a device sends and needs besides its weights in a training step over `mesh`."""
    steps = {(r["model"], r["mesh"]): r for r in rows if r["kind"] == "step" and r["step"] == "train"}
    for model in ("dense", "mixture"):
        if row := steps.get((model, mesh)):
            alone = steps[model, "one device"]["temp_mib"]
            sent = f"{row['sent_kib'] / 1024:.1f} MiB sent a training step ({row['ratio']:.2f} of the plan)"
            return f"{sent}, work space {row['temp_mib'] / alone:.2f} of one device's ({mesh.split(':')[-1]})"
    return ""


def pipeline(schedule: str, rows: Rows) -> str:
    """The bubble of a schedule, counted, and the inputs that a stage holds."""
    found = [r for r in rows if r["kind"] == "pipeline" and r["schedule"] == schedule]
    if not found:
        return ""
    row = max(found, key=lambda r: r["microbatches"])
    return f"bubble {row['bubble']:.2f}, {row['held']} inputs held ({row['mesh']}, {row['microbatches']} micro-batches)"


def streaming(side: str, rows: Rows) -> str:
    """Memory above that of a model without layers, and speed."""
    sides = {r["side"]: r for r in rows}
    if side not in sides or "accelerate" not in sides:
        return ""
    speed, other = sides[side]["tokens_per_s"], sides["accelerate"]["tokens_per_s"]
    return f"2 GB in {sides[side]['above_zero_mb']:.0f} MB, {speed:.2f} tokens/s (accelerate {other:.2f})"


def flow(key: str, rows: Rows) -> str:
    """Quality and cost of "method|sampler|steps", and after " / " of what it is to be compared with."""
    found = []
    for name in key.split(" / "):
        method, sampler, steps = name.split("|")
        seeds = [
            r for r in rows if (r.get("method"), r.get("sampler"), r.get("steps")) == (method, sampler, int(steps))
        ]
        if not seeds:
            return ""
        mean = {k: statistics.fmean(r[k] for r in seeds) for k in ("frechet_distance", "ms_per_sample")}
        figures = f"distance {mean['frechet_distance']:.1f}, {mean['ms_per_sample']:.2f} ms a sample"
        if "change" in seeds[0]:
            figures = f"{seeds[0]['change']:.3f} changed a pixel, {seeds[0]['accuracy']:.0%} of the new class"
        found.append((figures, f"{method}, {sampler}, {steps} step{'s' if steps != '1' else ''}"))
    floor = next(r["frechet_distance"] for r in rows if r.get("floor") == "train-test floor")
    (figures, name), *others = found
    beside = f"{others[0][1]}: {others[0][0]}" if others else f"floor: {floor:.1f}"
    return f"{figures} ({name.split(', ')[-1]}; {beside})"


# Benchmark of a key, and the file that has its rows.
EFFECTS: Mapping[str, tuple[str, Callable[[str, Rows], str]]] = {
    "decoding": ("bench_decoding-cpu.json", decoding),
    "sharding": ("bench_sharding-cpu.json", sharding),
    "pipeline": ("bench_sharding-cpu.json", pipeline),
    "streaming": ("bench_streaming-cpu.json", streaming),
    "flow": ("bench_flow-cpu.json", flow),
}


def effect(key: str, results: Path = RESULTS) -> str:
    """The figure of "benchmark:row"; empty where it was not measured."""
    bench, _, row = key.partition(":")
    name, reader = EFFECTS[bench]
    return reader(row, json.loads((results / name).read_text())["rows"]) if (results / name).exists() else ""


def with_table(text: str) -> str:
    """The README's text with the catalogue of today between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"README.md needs one line {BEGIN!r} and after it one line {END!r}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    columns: list[str] = list(catalogue.COLUMNS)
    rows: list[dict[str, str]] = [dict(zip(columns, row, strict=True)) for row in catalogue.table()]
    for row in rows:
        key = catalogue.by_name(row["method"]).effect
        row["measured"] = effect(key) if key else ""
    return f"{head}{BEGIN}\n{text_table(rows, [*columns, 'measured'], markdown=True)}\n{END}{tail}"


def main() -> None:
    text = README.read_text()
    new = with_table(text)
    if "--check" in sys.argv[1:] and new != text:
        raise SystemExit("README.md: the method table is out of date; run python scripts/make_readme.py")
    if new != text:
        README.write_text(new)


if __name__ == "__main__":
    main()
