"""Fewer steps from the trained flow: BOSS's grids, BOSS straightened on them, MeanFlow and improved MeanFlow.

All begin from the flow's averaged weights and take `tune_steps` updates, MeanFlow with a derivative at each, so that
one of its updates costs about two of the flow's; BOSS's grids take none.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from flow_bench.bench import Bench, Entry, Sampler, fixed
from jaxinfer.flow import bellman, meanflow
from jaxinfer.flow.guide import unguided
from jaxinfer.flow.meanflow import MeanFlow
from jaxinfer.flow.schedule import uniform
from jaxinfer.flow.types import Condition
from jaxinfer.train import loop
from jaxinfer.train.flow_methods import straighten_recipe

FINE = 64  # steps of the grid that BOSS chooses from
TABLE_ROWS, PAIR_ROWS = 128, 1024
COUNTS = (1, 2, 3, 4, 6, 8)


def run(bench: Bench, recipe: loop.Recipe, params: Any, steps: int, name: str) -> loop.TrainState:
    """The state after a recipe that is not the benchmark's own; what was killed is gone on with."""
    config = loop.LoopConfig(steps=steps, log_every=50, save_seconds=60.0, keep=1, curve=False)
    state = loop.init_state(jax.tree.map(jax.numpy.array, params), recipe, jax.random.key(3000))
    return loop.train(recipe, state, config, bench.folder / name)


@functools.lru_cache(maxsize=4)
def _best(bench: Bench, seed: int):
    """The trained flow and its best grid for each number of steps."""
    params = bench.flow(seed)
    x0, labels = bench.inputs(TABLE_ROWS, seed=500 + seed)
    velocity = unguided(bench.network, params, Condition(labels=labels))
    return params, bellman.grids(bellman.error_table(velocity, x0, uniform(FINE)), uniform(FINE), max(COUNTS))


def grids(bench: Bench, seed: int) -> list[Sampler]:
    """Euler on BOSS's grids, the flow as it is."""
    params, best = _best(bench, seed)
    return [fixed(bench.network, params, "euler, best grid", k, ts=best[k]) for k in COUNTS[1:]]


def straightened(bench: Bench, seed: int) -> list[Sampler]:
    """Euler on BOSS's grids, the flow straightened on all of them at once."""
    params, best = _best(bench, seed)
    x0, labels = bench.inputs(PAIR_ROWS, seed=600 + seed)
    cond = Condition(labels=jax.numpy.asarray(labels))
    make = jax.jit(lambda p, x, c: bellman.distillation_pairs(
        unguided(bench.network, p, c), x, uniform(FINE), [best[k] for k in COUNTS], cond=c))  # fmt: skip
    recipe = straighten_recipe(
        bench.network, make(params, x0, cond), steps=bench.settings.tune_steps, batch=bench.settings.batch, seed=seed
    )
    tuned = run(bench, recipe, params, bench.settings.tune_steps, f"boss-{seed}").ema
    return [fixed(bench.network, tuned, "euler, best grid", k, ts=best[k]) for k in COUNTS]


def mean(bench: Bench, seed: int, *, variant: str) -> list[Sampler]:
    """Steps by the mean velocity, one evaluation each."""
    objective = MeanFlow(variant=variant)
    name = "meanflow" if variant == "original" else "improved_meanflow"
    params = bench.train(name, seed, objective=objective, start=bench.flow(seed))

    def sampler(steps: int) -> Sampler:
        def solve(p, x, labels):
            velocity: Any = meanflow.mean_velocity_of(bench.network, p, Condition(labels=labels))
            return meanflow.solve_mean(velocity, x, uniform(steps)).x

        program = jax.jit(solve)
        return Sampler("mean velocity", steps, steps, lambda x, labels: program(params, x, np.asarray(labels)))

    return [sampler(k) for k in (1, 2, 4)]


ENTRIES = [
    Entry("BOSS, grids alone", grids, many=True),
    Entry("BOSS", straightened, many=True),
    Entry("MeanFlow", functools.partial(mean, variant="original"), many=True),
    Entry("improved MeanFlow", functools.partial(mean, variant="improved")),
]
