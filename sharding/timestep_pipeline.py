"""Timestep-forcing pipeline parallelism: each device keeps to its own denoising steps, and frames pass along them.

Live Avatar (Huang et al. 2025, arXiv 2512.04677): with T steps on T devices, device k always runs step k, with its own
cache of earlier frames at that noise level; it hands its frame to device k + 1 and nothing else. B frames take
B + T - 1 ticks. Here T is any multiple of the number of devices, each of which then runs T / N neighbouring steps as
rows of a batch: a stream batch on one device, the paper's form on T.

Guarantee: exact: equal to `jaxinfer.flow.pipeline` on one device, whose state this shards over a mesh axis, and so to
frame after frame with a cache per noise level. That is not what a model gives that reads clean keys and values of
earlier frames. State: that of the pipeline. Communication: a frame from each device to the next, a tick.

Paper's defaults: 4 steps, a device each. Left to the stage: the ring and the sink frame of the model's own cache.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.errors import ConfigError
from jaxinfer.flow.pipeline import Pipeline, State, Tick, keep, run


@dataclasses.dataclass(frozen=True)
class TimestepPipeline:
    """A `Pipeline` spread over the mesh axis `axis`. `init`, `tick` and `run` are those of the pipeline.

    Raises ConfigError for an axis that the mesh lacks, or a depth that its length does not divide.
    """

    pipeline: Pipeline
    mesh: Mesh
    axis: str = "step"

    def __post_init__(self):
        if self.axis not in self.mesh.axis_names:
            raise ConfigError(f"axis: got {self.axis!r}, the mesh has {', '.join(self.mesh.axis_names)}")
        if self.pipeline.depth % self.devices:
            raise ConfigError(f"depth: {self.pipeline.depth} steps cannot be split over {self.devices} devices evenly")

    @property
    def devices(self) -> int:
        """How many devices the steps are split over."""
        return self.mesh.shape[self.axis]

    def init(self, frame: Any, resident: Any = None) -> State:
        """As `Pipeline.init`, each step's part on its device."""
        return jax.device_put(self.pipeline.init(frame, resident), NamedSharding(self.mesh, PartitionSpec(self.axis)))

    def tick(self, params: Any, state: State, frame: Any, live: Any = True) -> tuple[State, Tick]:
        """As `Pipeline.tick`; params and the new frame are on every device."""
        split, whole = PartitionSpec(self.axis), PartitionSpec()
        own = self.pipeline.depth // self.devices

        def on_device(params, state, frame, live):
            at = jax.lax.axis_index(self.axis)
            first = (at == 0) & (jnp.arange(own) == 0)
            spread = jax.tree.map(lambda x: jnp.broadcast_to(x, (own, *x.shape)), frame)
            rows = keep(first, spread, state.travelling)
            alive = jnp.where(first, live, state.live)
            steps = (at * own + jnp.arange(own)).astype(jnp.int32)
            moved, resident = self.pipeline.stage(params, rows, steps, state.resident)
            resident = keep(alive, resident, state.resident)
            travelling, running = jax.tree.map(self._hand_on, (moved, alive))
            return State(travelling, running, resident), moved, alive

        spread = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(whole, split, whole, whole),
            out_specs=(split, split, split),
            check_vma=False,
        )
        state, moved, alive = spread(params, state, jax.tree.map(jnp.asarray, frame), jnp.asarray(live))
        return state, Tick(jax.tree.map(lambda x: x[-1], moved), alive[-1])

    def _hand_on(self, rows: jax.Array) -> jax.Array:
        """`rows[R, ...]` moved on by one, the last of a device becoming the first of the next; zeros in front."""
        onward = [(i, i + 1) for i in range(self.devices - 1)]
        received = jax.lax.ppermute(rows[-1:], self.axis, onward)
        return jnp.concatenate([received, rows[:-1]])

    def run(self, params: Any, state: State, frames: Any) -> tuple[State, Any]:
        """As `Pipeline.run`."""
        return run(self.tick, self.pipeline.depth, params, state, frames)
