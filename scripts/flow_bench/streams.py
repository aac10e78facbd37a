"""A stream of frames at four steps each: one frame at a time, the stream batch, the same over two devices; and guidance
for less.

The CPU's cores are two devices there: the rows of a small network are too few for its products to be split over cores.

Guided samples (scale 2): classifier-free guidance runs the model twice a step, onetime residual guidance once more in
all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flow_bench.bench import Bench, Entry, Sampler
from jaxinfer.flow.guide import Guidance, guided, unguided
from jaxinfer.flow.pipeline import Pipeline, sequential
from jaxinfer.flow.schedule import uniform
from jaxinfer.flow.solve import euler
from jaxinfer.flow.streamdiffusion import first_estimate, residual_guide
from jaxinfer.flow.types import Condition, bcast
from jaxinfer.sharding.timestep_pipeline import TimestepPipeline

SCALE, DEVICES = 2.0, 2


def stream(bench: Bench, seed: int) -> list[Sampler]:
    """The frames are the samples, in turn."""
    params, steps = bench.flow(seed), 4
    grid = jnp.asarray(uniform(steps))

    def stage(p, row, k, resident):
        x, labels = row
        t = grid[k]
        v = bench.network(p, x, t, t, Condition(labels=labels)).v
        return (x + bcast(grid[k + 1] - t, x) * v, labels), resident

    pipe = Pipeline(stage, steps)

    def frames(x: jax.Array, labels: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(x), jnp.asarray(labels)

    batched = jax.jit(lambda p, row: pipe.run(p, pipe.init(jax.tree.map(lambda x: x[0], row)), row)[1][0])
    alone = jax.jit(lambda p, row: sequential(pipe, p, row)[0][0])
    found = [
        Sampler("frame after frame", steps, steps, lambda x, labels: alone(params, frames(x, labels))),
        Sampler("stream batch", steps, steps, lambda x, labels: batched(params, frames(x, labels))),
    ]
    if len(jax.devices()) >= DEVICES:
        mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("step",))
        spread = TimestepPipeline(pipe, mesh)
        everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

        @jax.jit
        def over(p, row):
            return spread.run(p, spread.init(jax.tree.map(lambda x: x[0], row)), row)[1][0]

        run = lambda x, labels: jax.device_get(over(everywhere, jax.device_get(frames(x, labels))))  # noqa: E731
        found.append(Sampler(f"stream batch, {DEVICES} devices", steps, steps, run))
    return found


def guidance(bench: Bench, seed: int) -> list[Sampler]:
    """Four and eight steps of Euler, guided by the null's velocity and by a straight line to its first estimate."""
    params = bench.flow(seed)
    found = []
    for steps in (4, 8):
        grid = uniform(steps)

        def full(p, x, y, grid=grid):
            return euler(guided(bench.network, p, Condition(labels=y), Guidance(SCALE)), x, grid).x

        def onetime(p, x, y, grid=grid):
            nothing = unguided(bench.network, p, Condition(labels=jnp.full_like(y, -1)))
            source = first_estimate(nothing, x, jnp.zeros(x.shape[0]))
            velocity = unguided(bench.network, p, Condition(labels=y))
            return euler(residual_guide(velocity, source, scale=SCALE), x, grid).x

        for label, run, evaluations in (("classifier-free", full, 2 * steps), ("onetime residual", onetime, steps + 1)):
            program = jax.jit(run)
            found.append(Sampler(label, steps, evaluations, lambda x, y, f=program: f(params, x, np.asarray(y))))
    return found


ENTRIES = [Entry("stream", stream), Entry("guidance 2", guidance)]
