"""What pipelines cost, measured: seconds, ticks and bubbles of each schedule on one model, mesh and batch.

Rows for a benchmark; every figure of a row is of the program that was timed. Virtual devices of one host share its
cores, so that an idle stage leaves its core to the others: there the bubble does not show in the seconds.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from jaxinfer.measure.timing import interleaved
from jaxinfer.sharding import pipeline_decode
from jaxinfer.sharding.pipeline_decode import Pipeline
from jaxinfer.sharding.pipeline_schedule import POLICIES, TRAINING, bubble_formula, held_formula
from jaxinfer.sharding.pipeline_train import PipelineLoss


def training_rows(
    loss: PipelineLoss, params: Any, batch: Any, *, schedules: Sequence[str] = TRAINING, rounds: int = 5
) -> list[dict[str, Any]]:
    """One row a schedule: `median_s` and its like of loss and gradients, timed in turns; `ticks`, `bubble` as the run
    counted it and `bubble_formula`; `held` inputs and `held_formula`; `temp_bytes` a device of the compiled program."""
    programs, rows = {}, []
    for name in schedules:
        own = dataclasses.replace(loss, schedule=name)
        programs[name] = jax.jit(own.value_and_grad).lower(params, batch).compile()
    times = interleaved(
        {name: functools.partial(program, params, batch) for name, program in programs.items()}, rounds=rounds
    )
    for name, program in programs.items():
        (_, metrics), _ = program(params, batch)
        sizes = (name, loss.stages.num, loss.microbatches)
        table = dataclasses.replace(loss, schedule=name).table
        rows.append({
            "schedule": name,
            "stages": loss.stages.num,
            "microbatches": loss.microbatches,
            "ticks": int(metrics["ticks"]),
            "bubble": float(metrics["bubble"]),
            "bubble_formula": bubble_formula(*sizes),
            "held": table.held,
            "held_formula": held_formula(*sizes),
            "temp_bytes": program.memory_analysis().temp_size_in_bytes,
            **times[name].row(),
        })  # fmt: skip
    return rows


def decode_rows(
    pipeline: Pipeline,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | Sequence[int],
    *,
    policies: Sequence[str] = POLICIES,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """One row a policy: `median_s` and its like of the whole job, timed in turns; `ticks`, `microbatches`, `bubble` as
    the stages counted it, `idle` stage-ticks, and `tokens_per_second` by the median."""
    own = {policy: dataclasses.replace(pipeline, policy=policy) for policy in policies}
    calls = {
        policy: functools.partial(pipeline_decode.generate, one, params, prompts, max_tokens)
        for policy, one in own.items()
    }
    times = interleaved(calls, rounds=rounds)
    rows = []
    for policy, call in calls.items():
        served = call()
        stages = pipeline.stages.num
        rows.append({
            "policy": policy,
            "stages": stages,
            "ticks": served.table.ticks,
            "microbatches": len(served.table.items),
            "bubble": served.bubble,
            "idle": round(served.bubble * served.table.ticks * stages),
            "tokens_per_second": int(served.lengths.sum()) / times[policy].median,
            **times[policy].row(),
        })  # fmt: skip
    return rows
