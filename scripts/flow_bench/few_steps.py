"""Fewer steps from the trained flow: BOSS's grids, BOSS straightened on them, MeanFlow and improved MeanFlow.

All begin from the flow's averaged weights and take `tune_steps` updates: MeanFlow once, with a derivative at each, so
that one of its updates costs about two of the flow's; BOSS once for each number of steps, as the paper does (all at
once, the steps from t = 0 ask for different velocities: a distance of 13.7 at 8 steps of the quick set against 12.5);
its grids take none. MeanFlow's times are `WIDE_PAIRS`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from flow_bench.bench import Bench, Entry, Sampler, fixed
from jaxinfer.flow import bellman, meanflow
from jaxinfer.flow.guide import unguided
from jaxinfer.flow.meanflow import MeanFlow
from jaxinfer.flow.schedule import uniform
from jaxinfer.flow.times import WIDE_PAIRS
from jaxinfer.flow.types import Condition
from jaxinfer.train import loop
from jaxinfer.train.flow_methods import straighten_recipe

FINE = 64  # steps of the grid that BOSS chooses from
TABLE_ROWS, PAIR_ROWS = 128, 1024
COUNTS = (2, 3, 4, 6, 8)
TRAINED = (2, 4, 8)  # a model for each


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
    return [fixed(bench.network, params, "euler, best grid", k, ts=best[k]) for k in COUNTS]


def straightened(bench: Bench, seed: int) -> list[Sampler]:
    """Euler on BOSS's grids, a flow straightened on each."""
    params, best = _best(bench, seed)
    x0, labels = bench.inputs(PAIR_ROWS, seed=600 + seed)
    cond, steps = Condition(labels=jax.numpy.asarray(labels)), bench.settings.tune_steps
    found = []
    for k in TRAINED:
        make = jax.jit(lambda p, x, c, grid=best[k]: bellman.distillation_pairs(
            unguided(bench.network, p, c), x, uniform(FINE), [grid], cond=c))  # fmt: skip
        pairs = make(params, x0, cond)
        recipe = straighten_recipe(bench.network, pairs, steps=steps, batch=bench.settings.batch, seed=seed)
        tuned = run(bench, recipe, params, steps, f"boss-{k}-{seed}").ema
        found.append(fixed(bench.network, tuned, "euler, best grid", k, ts=best[k]))
    return found


def mean(bench: Bench, seed: int, *, variant: str) -> list[Sampler]:
    """Steps by the mean velocity, one evaluation each."""
    objective = MeanFlow(variant=variant, times=WIDE_PAIRS)
    name = "meanflow" if variant == "original" else "improved_meanflow"
    params = bench.train(name, seed, objective=objective, start=bench.flow(seed))
    solve = functools.partial(fixed, solver=meanflow.solve_mean, velocity_of=meanflow.mean_velocity_of)
    return [solve(bench.network, params, "mean velocity", k) for k in (1, 2, 4)]


ENTRIES = [
    Entry("BOSS, grids alone", grids, many=True),
    Entry("BOSS", straightened, many=True),
    Entry("MeanFlow", functools.partial(mean, variant="original"), many=True),
    Entry("improved MeanFlow", functools.partial(mean, variant="improved")),
]
