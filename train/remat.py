"""Rematerialisation of a decoder's layers by name: what a layer keeps for its backward pass, and what it makes again.

    step = remat(step, "full")        # a Step for every recipe: `lm.NextToken(step)`, `Chunkwise(step)`, ...

| policy | kept of each layer |
|--------|--------------------|
| none   | everything that its gradient reads |
| dots   | its input and the results of its products with weights |
| names  | its input and what is named: `attention` (the heads' outputs) and `mlp` (the hidden layer), both by default |
| full   | its input alone |
| host   | its input alone, in the host's memory (`pinned_host`) until the backward pass asks for it |

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174), by layers; the policies are those
of `jax.checkpoint`. Guarantee: exact; the same gradients. State: none. Default of the paper: the square root of the
depth as the number of pieces; here every layer is one, which is what decoders are trained with. Disk as the place of
what is kept: `train.disk_offload`. On a CPU XLA begins the layers' second computation as early as it can, so that its
temporary memory hardly falls (by 4 % for three layers), whatever the forward pass keeps.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxinfer.errors import ConfigError
from jaxinfer.models import Step
from jaxinfer.models.decoder import Decoder, DecoderLayer

POLICIES = ("none", "dots", "names", "full", "host")
NAMES = ("attention", "mlp")  # the model names these values itself
INPUT = "layer_input"


@dataclasses.dataclass(frozen=True)
class RematStep(Step):
    """A Step whose layers keep for the backward pass what `policy` says; see `remat`."""

    policy: str = "none"
    names: tuple[str, ...] = NAMES

    def __call__(
        self, params, inputs, positions, cache=None, block=None, at: jax.Array | int = 0, mask=None, *, taps=()
    ) -> Any:
        """As `Step.__call__`."""
        policy = _policy(self.policy, self.names)

        def around(i: int, run: Any, x: jax.Array, positions: jax.Array, block: Any) -> Any:
            def apply(weights: Any, x: jax.Array, block: Any) -> Any:
                # All that the layer reads of its input is the named value, so that the name is all that is kept.
                x = checkpoint_name(x, INPUT)
                layer = DecoderLayer(self.config, layer=i, parent=None)
                return layer.apply({"params": weights}, x, positions, block=block, **run.keywords)

            return jax.checkpoint(apply, policy=policy)(params[f"layers_{i}"], x, block)

        variables = {"params": params}
        way = None if self.policy == "none" else around
        return Decoder(self.config).apply(variables, inputs, positions, cache, block, at, mask, taps, way)


def remat(step: Step, policy: str, names: tuple[str, ...] = NAMES) -> Step:
    """`step` with a policy; the same params, outputs and gradients. `step`: a plain `Step`, or one of these.

    Raises ConfigError for a policy or a name that is not known, or a Step of another kind, which runs its layers in a
    way of its own.
    """
    if policy not in POLICIES:
        raise ConfigError(f"remat: got {policy!r}, accepts {', '.join(POLICIES)}")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(f"names: got {unknown[0]!r}, accepts {', '.join(NAMES)}")
    if type(step) not in (Step, RematStep):
        raise ConfigError(f"remat: got a {type(step).__name__}, accepts a Step")
    return RematStep(step.config, step.cache, step.dtype, policy, names)


def _policy(name: str, names: tuple[str, ...]) -> Callable[..., Any] | None:
    policies = jax.checkpoint_policies
    match name:
        case "dots":
            return policies.dots_with_no_batch_dims_saveable
        case "names":
            return policies.save_only_these_names(*names)
        case "host":
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
        case _:
            return policies.nothing_saveable
