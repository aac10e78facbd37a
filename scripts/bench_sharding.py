"""Strategies and pipelines on eight virtual CPU devices, measured; and predictions for 8 H200 and a v5p-64.

    python scripts/bench_sharding.py                       # about three minutes on two quiet cores
    python scripts/bench_sharding.py --rounds 3 --parts predictions

Three kinds of rows, told apart by `kind`:
- `step`: a training step (loss and gradients) and a decoding forward of a small decoder under each strategy. Of the
  compiled program: `argument_mib` and `temp_mib` a device (XLA's memory analysis), `sent_kib` a device sends in a step
  (its collectives, by the ring algorithm), beside what the planner predicts (`planned_*`) for XLA's compiler for CPUs,
  which makes no reduce-scatters, and their `ratio`. Experts take as many rounds as the routing is uneven: `sent_kib` is
  of the one round of an even routing, `uneven_kib` and `planned_uneven_kib` of the most uneven. `planned_ideal_kib`: of
  a compiler that scatters, as those for GPUs and TPUs. Most of a mixture's `temp_mib` is this compiler's own: it
  multiplies every row by every expert and masks the rest. `ms`: the median of interleaved rounds. Eight devices here
  are threads of the same few cores, so a time shows what a strategy costs on top of the same arithmetic, and never a
  speed-up.
- `pipeline`: a training step under GPipe and 1F1B with its `bubble` counted by the program as it runs, `formula` beside
  it, the micro-batches that a stage holds, and temporary bytes.
- `prediction`: PREDICTIONS, not measurements: data sheets and the roofline model (`sharding/planner.py`), nothing
  overlapped. A model of the shape of Llama-3-70B in bfloat16, decoding and training, on 8 H200 and on a v5p-64 (named
  by its TensorCores, two a chip: 32 chips): the fastest strategies that fit; where none does (training without
  rematerialisation), the fastest of all, with `fits` false.

Writes scripts/results/bench_sharding-<device>.json and prints the tables. Expected: a `ratio` from 0.99 to 1.01 in
every row that sends more than the loss (tests/test_sharding_planner.py holds it for a smaller model).
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402 - after the number of devices
import numpy as np  # noqa: E402

from jaxinfer import measure  # noqa: E402
from jaxinfer.measure.timing import interleaved  # noqa: E402
from jaxinfer.models import ModelConfig, Step  # noqa: E402
from jaxinfer.sharding import planner, stages  # noqa: E402
from jaxinfer.sharding.collectives import collectives, sent  # noqa: E402
from jaxinfer.sharding.mesh import make_mesh, parse  # noqa: E402
from jaxinfer.sharding.pipeline_schedule import bubble_formula  # noqa: E402
from jaxinfer.sharding.pipeline_train import PipelineLoss  # noqa: E402
from jaxinfer.sharding.rules import REPLICATED  # noqa: E402
from jaxinfer.sharding.strategies import sharded  # noqa: E402
from jaxinfer.train.lm import NextToken  # noqa: E402

CONFIG = ModelConfig(
    vocab_size=512, hidden_size=128, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=16, mlp_size=256,
    max_length=256,
)  # fmt: skip
DEEP = dataclasses.replace(CONFIG, num_layers=4)  # a layer a stage
EXPERTS = dataclasses.replace(CONFIG, num_experts=8, experts_per_token=2, expert_size=128)
LLAMA_70B = ModelConfig(
    vocab_size=128256, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128, mlp_size=28672,
    max_length=8192,
)  # fmt: skip
MESHES = ("", "data=8", "fsdp=8", "data=2,tensor=4", "sequence:data=2,tensor=4", "fsdp=2,tensor=4", "data=2,context=4")
MIXTURES = (
    "", "data=8", "fsdp=8", "expert=8", "data=2,expert=4", "data=2,tensor=4", "sequence:data=2,tensor=4",
)  # fmt: skip
BATCH, LENGTH, CAPACITY = 8, 64, 128
PARTS = ("steps", "pipelines", "predictions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--small", action="store_true", help="one strategy, fewer micro-batches: what the test runs")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}; accepted: {', '.join(PARTS)}")
    settings = {"batch": BATCH, "length": LENGTH, "capacity": CAPACITY, "devices": len(jax.devices())}
    results = measure.Results("bench_sharding", settings=settings)
    for part in parts:
        rows = {"steps": steps, "pipelines": pipelines, "predictions": predictions}[part](arguments)
        for row in rows:
            results.add(**row)
        print(measure.text_table(rows), end="\n\n")
    print(f"wrote {results.save()}")


def steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each strategy's training step and decoding forward."""
    rows, timed = [], {}
    models = [("dense", CONFIG, MESHES), ("mixture", EXPERTS, MIXTURES)]
    if arguments.small:
        models = [("dense", CONFIG, ("data=2,tensor=4",))]
    for model, config, meshes in models:
        for text in meshes:
            for kind in ("train", "decode"):
                row, call = step(model, config, text, kind)
                rows.append(row)
                timed[f"{model} {text} {kind}"] = call
    timings = interleaved(timed, rounds=arguments.rounds)
    for row, timing in zip(rows, timings.values(), strict=True):
        row["ms"] = 1e3 * timing.median
    return rows


def step(model: str, config: ModelConfig, text: str, kind: str) -> tuple[dict[str, Any], Any]:
    """One compiled step: its row, and a call of it."""
    order, _, axes = text.rpartition(":")
    job = planner.Job("train", BATCH, LENGTH) if kind == "train" else planner.Job("decode", BATCH, 1, CAPACITY)
    plain = Step(config)
    params = plain.init(jax.random.key(0))
    run, own = plain, None
    if axes:
        run = sharded(plain, make_mesh(parse(axes), config, batch=BATCH), sequence=order == "sequence")
        params, own = run.place(params), run.shardings()
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, job.tokens)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(job.tokens, dtype=jnp.int32), ids.shape)
    if kind == "train":
        batch = {"ids": ids, "targets": ids, "segments": jnp.zeros_like(ids), "positions": positions}
        out = None if own is None else ((None, None), own)
        function = jax.jit(jax.value_and_grad(NextToken(run), has_aux=True), out_shardings=out)
        inputs: tuple[Any, ...] = (params, batch, None)
    else:
        cache = jax.jit(lambda: run.new_cache(BATCH, CAPACITY))()
        function = jax.jit(lambda p, i, q, cache: run.head(p, run(p, i, q, cache)[0].hidden))
        inputs = (params, ids, positions, cache)
    compiled = function.lower(*inputs).compile()
    mesh, sequence = parse(axes) if axes else {}, order == "sequence"
    plan = planner.predict(plain, mesh, job, sequence=sequence, scatters=False)
    ideal = planner.predict(plain, mesh, job, sequence=sequence)
    even = sent(compiled, conditional=False)
    memory: Any = compiled.memory_analysis()
    row = {
        "kind": "step", "model": model, "mesh": text or "one device", "step": kind, "ms": 0.0,
        "argument_mib": memory.argument_size_in_bytes / 2**20,
        "planned_argument_mib": (plan.weights + plan.cache) / 2**20,
        "temp_mib": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20,
        "planned_work_mib": (plan.work + plan.optimizer / 3) / 2**20,
        "sent_kib": even / 2**10, "planned_sent_kib": plan.sent / 2**10,
        "ratio": even / plan.sent if plan.sent else None,
        "uneven_kib": sent(compiled) / 2**10, "planned_uneven_kib": (plan.sent + plan.uneven) / 2**10,
        "planned_ideal_kib": ideal.sent / 2**10,
        "collectives": sum(one.times for one in collectives(compiled)),
    }  # fmt: skip
    return row, lambda: compiled(*inputs)


def pipelines(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """GPipe and 1F1B on four stages."""
    rows, timed = [], {}
    microbatches = (4,) if arguments.small else (4, 8)
    mesh = make_mesh({"stage": 4}, DEEP)
    cut = stages.Stages.even(DEEP.num_layers, 4)
    whole = Step(DEEP)
    params = jax.device_put(
        stages.split(whole.init(jax.random.key(0)), cut), stages.shardings(whole, mesh, REPLICATED, cut)
    )  # fmt: skip
    ids = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (16, LENGTH)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), ids.shape)
    batch = {"ids": ids, "targets": ids, "segments": jnp.zeros_like(ids), "positions": positions}
    for schedule in ("gpipe", "1f1b"):
        for count in microbatches:
            loss = PipelineLoss(whole, mesh, cut, count, schedule)
            compiled = jax.jit(loss.value_and_grad).lower(params, batch).compile()
            (_, metrics), _ = compiled(params, batch)
            memory: Any = compiled.memory_analysis()
            rows.append(
                {
                    "kind": "pipeline", "mesh": "stage=4", "schedule": schedule, "microbatches": count, "ms": 0.0,
                    "bubble": float(metrics["bubble"]), "formula": bubble_formula(schedule, 4, count),
                    "held": loss.table.held, "temp_mib": memory.temp_size_in_bytes / 2**20,
                }
            )  # fmt: skip
            timed[f"{schedule} {count}"] = lambda compiled=compiled: compiled(params, batch)
    for row, timing in zip(rows, interleaved(timed, rounds=arguments.rounds).values(), strict=True):
        row["ms"] = 1e3 * timing.median
    return rows


def predictions(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The three fastest strategies that fit, by data sheets."""
    rows = []
    whole = Step(LLAMA_70B, dtype="bfloat16")
    params = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, "bfloat16"), jax.eval_shape(whole.init, jax.random.key(0))
    )  # fmt: skip
    for machine, chip, devices in (("8 H200", "h200", 8), ("v5p-64", "v5p", 32)):
        jobs = (planner.Job("decode", 64, 1, 8192), planner.Job("train", 32, 4096))
        for job in jobs:
            found = planner.plans(whole, devices, job, planner.CHIPS[chip], params, width=2)
            fit = [plan for plan in found if plan.fits(planner.CHIPS[chip].memory)]
            for plan in fit[:3] or found[:1]:
                seconds = plan.seconds(planner.CHIPS[chip])
                rows.append(
                    {
                        "kind": "prediction", "machine": machine, "step": job.kind, "batch": job.batch,
                        "tokens": job.tokens, "mesh": str(plan), "fits": bool(fit), "gib": plan.total / 2**30,
                        "sent_mib": plan.sent / 2**20, "predicted_ms": 1e3 * seconds,
                        "predicted_tokens_per_second": job.batch * job.tokens / seconds,
                    }
                )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
