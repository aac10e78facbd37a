"""Weights in host memory, moved to the device layer by layer, each move begun while the layers before it compute.

Aminabadi et al. 2022, "DeepSpeed Inference: Enabling Efficient Inference of Transformer Models at Unprecedented Scale"
(arXiv:2207.00032), its heterogeneous mode: weights stay in the host's memory and the device's is left to activations
and caches, so that the batch can grow until it hides the transfers. Here they are arrays of the memory kind
`pinned_host`, and the scheduler of `sharding.layer_stream` runs: a window of layers slides over them, as part of the
program, where the compiler overlaps copies with computation.

    params = to_host(params)                                # or load with shardings=in_host(...)
    step = HostWeights(ahead=1).step(step)                  # for every loop, with these params

Guarantee: exact; the same products. State: none; at most `ahead` + 1 layers on the device at a time. Paper's default:
prefetch of one or a few layers; ours is 1. Sharded weights are sharded in the host's memory too, so that N devices
fetch 1/N of a layer each over their own link, as the paper has it.
Departures: the paper's other tier, NVMe, is `sharding.layer_stream`; offload of the cache is not done here.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxinfer.errors import ConfigError
from jaxinfer.models import Step
from jaxinfer.sharding.layer_stream import StreamedStep

HOST = "pinned_host"


@dataclasses.dataclass(frozen=True)
class HostWeights:
    """A `LayerSource`: `ahead` is how many layers beyond the one that computes are on their way or there already.

    Raises ConfigError for one below 0.
    """

    ahead: int = 1

    def __post_init__(self):
        if type(self.ahead) is not int or self.ahead < 0:
            raise ConfigError(f"ahead: got {self.ahead!r}, accepts a number of layers, 0 or more")

    def step(self, step: Step) -> StreamedStep:
        """`step` for params that `to_host` gave."""
        return StreamedStep(step.config, step.cache, step.dtype, self)

    def kind(self, i: int) -> int:
        """Each layer is an array of its own, with its place in the program."""
        return i

    def fetcher(self, params: Any) -> Callable[[int, jax.Array, int], Any]:
        """`fetch(i, x, i)`: layer i on the device, and the move of layer i + ahead begun."""
        moved: dict[int, Any] = {}

        def fetch(i: int, x: jax.Array, like: int) -> Any:
            del like
            for j in range(i, i + self.ahead + 1):
                layer = params.get(f"layers_{j}")
                if layer is not None and j not in moved:
                    # Without the barrier all moves could be made at once, before the first layer.
                    layer, _ = jax.lax.optimization_barrier((layer, x))
                    moved[j] = jax.device_put(layer, jax.memory.Space.Device)
            return moved.pop(i)

        return fetch


def in_host(shardings: Any, kind: str = HOST) -> Any:
    """A tree of shardings as `sharding.shardings` gives, with the layers' in host memory: for a checkpoint's loader.

    Raises ConfigError where the devices have no memory of that kind, naming those that they have.
    """
    return {
        name: jax.tree.map(lambda s: _with_kind(s, kind), part) if name.startswith("layers_") else part
        for name, part in shardings.items()
    }


def to_host(params: Any, kind: str = HOST) -> Any:
    """The params with the layers' arrays in host memory; the same error."""
    return jax.device_put(params, in_host(jax.tree.map(lambda x: x.sharding, params), kind))


def _with_kind(sharding: jax.sharding.Sharding, kind: str) -> jax.sharding.Sharding:
    for device in sharding.device_set:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if kind not in kinds:
            raise ConfigError(f"memory kind {kind!r}: {device} has none; accepted: {', '.join(kinds)}")
    return sharding.with_memory_kind(kind)
