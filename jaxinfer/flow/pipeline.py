"""A pipeline over denoising steps: T frames of a stream under way at once, each a step further than the one behind it.

A tick puts the new frame in front, moves all T frames by one step in one call, and takes the finished one out: a frame
a tick, T ticks late. The T steps are either the rows of one batch, a stream batch (Kodaira et al. 2023,
StreamDiffusion, arXiv 2312.12491), as here; or one to a device, timestep-forcing pipeline parallelism (Huang et al.
2025, Live Avatar, 2512.04677), as in `jaxinfer.sharding.timestep_pipeline`, which has the same state and the same tick.

Guarantee: exact: what comes out is what each frame alone, step after step, gives (`sequential`), where the step treats
rows independently. State: what travels (a frame's latents and whatever goes with them) and what is resident with a step
(its own keys and values of earlier frames, say); resident state is written by live frames only.

A model with convolutions runs slowly inside `lax.scan` on CPU: there, call a jitted `tick` in a Python loop.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.errors import ConfigError, InputError

Stage = Callable[[Any, Any, jax.Array, Any], tuple[Any, Any]]
"""(params, travelling[R, ...], step i32[R], resident[R, ...]) -> (travelling, resident): each row by its own step."""


@struct.dataclass
class State:
    """Every leaf leads with T: what waits in front of a step, whether that is a frame, and what stays with the step."""

    travelling: Any
    live: jax.Array
    resident: Any


@struct.dataclass
class Tick:
    """What left the pipeline: a frame, or rubbish where `live bool[]` is False (it is still filling, or draining)."""

    frame: Any
    live: jax.Array


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """`depth` T steps of `stage`. Raises ConfigError for a depth under 1."""

    stage: Stage
    depth: int

    def __post_init__(self):
        if self.depth < 1:
            raise ConfigError(f"depth: got {self.depth} steps, accepts 1 or more")

    def init(self, frame: Any, resident: Any = None) -> State:
        """The empty pipeline for frames like `frame` (of which only shapes and dtypes count). `resident`: what every
        step starts with, leaves [T, ...]; InputError where one does not lead with T."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(resident):
            if leaf.shape[:1] != (self.depth,):
                name = jax.tree_util.keystr(path)
                raise InputError(f"resident{name}: got shape {leaf.shape}, accepts [{self.depth}, ...], a row a step")
        empty = jax.tree.map(lambda x: jnp.zeros((self.depth, *jnp.shape(x)), jnp.result_type(x)), frame)
        return State(empty, jnp.zeros(self.depth, bool), resident)

    def tick(self, params: Any, state: State, frame: Any, live: Any = True) -> tuple[State, Tick]:
        """All frames one step on. `frame`: the next of the stream; `live=False` with anything of its shape lets the
        pipeline drain."""
        rows = jax.tree.map(lambda buffer, x: buffer.at[0].set(x), state.travelling, frame)
        alive = state.live.at[0].set(live)
        moved, resident = self.stage(params, rows, jnp.arange(self.depth, dtype=jnp.int32), state.resident)
        resident = keep(alive, resident, state.resident)
        out = Tick(jax.tree.map(lambda x: x[-1], moved), alive[-1])
        onward = jax.tree.map(lambda x: jnp.roll(x, 1, 0), moved)
        return State(onward, jnp.roll(alive, 1).at[0].set(False), resident), out

    def run(self, params: Any, state: State, frames: Any) -> tuple[State, Any]:
        """The outputs [F, ...] of all `frames [F, ...]` in F + T - 1 ticks, from a pipeline with no frame in it."""
        return run(self.tick, self.depth, params, state, frames)


def keep(live: jax.Array, new: Any, old: Any) -> Any:
    """`new[R, ...]` where `live bool[R]`, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(live.reshape(live.shape + (1,) * (n.ndim - 1)), n, o), new, old)


def run(tick: Callable[..., tuple[State, Tick]], depth: int, params: Any, state: State, frames: Any):
    """`Pipeline.run` by any tick: a scan over the frames and, to drain, `depth - 1` more."""
    count = jax.tree.leaves(frames)[0].shape[0]
    longer = jax.tree.map(lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], depth - 1, 0)]), frames)

    def step(state, item):
        return tick(params, state, *item)

    state, out = jax.lax.scan(step, state, (longer, jnp.arange(count + depth - 1) < count))
    return state, jax.tree.map(lambda x: x[depth - 1 :], out.frame)


def sequential(pipeline: Pipeline, params: Any, frames: Any, resident: Any = None) -> tuple[Any, Any]:
    """Each of `frames [F, ...]` through all steps before the next begins: outputs [F, ...] and the last resident state.

    What the pipeline must equal, and what it costs without one: T calls a frame, of one row.
    """

    def one(resident, frame):
        row = jax.tree.map(lambda x: x[None], frame)

        def step(row, item):
            k, own = item
            row, own = pipeline.stage(params, row, k[None], jax.tree.map(lambda x: x[None], own))
            return row, jax.tree.map(lambda x: x[0], own)

        row, resident = jax.lax.scan(step, row, (jnp.arange(pipeline.depth, dtype=jnp.int32), resident))
        return resident, jax.tree.map(lambda x: x[0], row)

    resident, out = jax.lax.scan(one, resident, frames)
    return out, resident
