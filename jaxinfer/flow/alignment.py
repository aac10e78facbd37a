"""Embedded representation warm-up: a flow model's first layers learn what images are before it learns to make them.

Liu, Sun, Li, Lin (2025), "Efficient Generative Model Training via Embedded Representation Warmup", arXiv 2504.10188.
Phase one trains the first layers alone, on clean data at t = 1, to agree with a frozen encoder's tokens. Phase two puts
them into the whole model and trains flow matching, with the alignment of a layer at a weight that halves again and
again (REPA, Yu et al. 2024, 2410.06940, has the alignment without the warm-up).

Guarantee: a different model: the loss has the same minimum in velocities as its alignment fades. State: none beyond the
weight, a function of the step, which the batch carries.

Paper's defaults: 4 layers warmed up under weight 0.5; then a weight of 1 (small models) to 6 that halves every 50,000
steps, at a layer further in. Departures: every image of a batch counts (the released warm-up sums what its last image
left); the encoder is one of our own, `EncoderObjective`, trained on the labels of the training data, since no download
is at hand. It must not be the network whose features the results are judged by.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.objective import FlowMatching, source_like, weighted_mean
from jaxinfer.flow.paths import interpolate
from jaxinfer.flow.types import Apply, Batch, Out, drop, per_example
from jaxinfer.models.blockwise import Projector


class Project(Protocol):
    """`(params, h[B, N, D]) -> [B, N, E]`, by `params["project"]`."""

    def __call__(self, params: Any, h: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Projection:
    """A `Project` of two hidden layers of `hidden`, to `size` numbers a token."""

    hidden: int
    size: int

    @property
    def _module(self) -> Projector:
        return Projector(self.hidden, self.size)

    def init(self, key: jax.Array, width: int) -> Any:
        """Random `params["project"]` for tokens of `width`."""
        return jax.jit(lambda key: nn.unbox(self._module.init(key, jnp.zeros((1, 1, width)))["params"]))(key)

    def __call__(self, params: Any, h: jax.Array) -> jax.Array:
        return jnp.asarray(self._module.apply({"params": params["project"]}, h))


@struct.dataclass
class Aligned:
    """A batch with the frozen encoder's tokens of its clean data, [B, N, E], and how much their alignment counts,
    f32[]: what a method has by default where it is None."""

    batch: Batch
    targets: jax.Array
    weight: jax.Array | None = None


def alignment_losses(projected: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over tokens of minus the cosine of projected and targets [B, N, E]: f32[B], from -1 to 1.

    InputError where the shapes differ.
    """
    if projected.shape != targets.shape:
        raise InputError(f"targets: shape {targets.shape}, the projected tokens have {projected.shape}")
    a, b = projected.astype(jnp.float32), targets.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return -((a * b).sum(-1) / jnp.maximum(norms, 1e-8)).mean(-1)


def decaying(initial: float, half_life: float = 50_000.0):
    """The alignment's weight as a function of the steps since the warm-up: initial 2^(-step / half_life)."""
    if not (initial >= 0 and half_life > 0):
        raise ConfigError(f"decaying: got {initial} halving every {half_life} steps, accepts 0 or more, and above 0")
    return lambda step: jnp.asarray(initial * 2.0 ** (-step / half_life), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Warmup:
    """The objective of phase one, `(apply, params, key, aligned) -> (loss, metrics)`: `apply` is the model of the first
    layers alone, whose `aux["taps"][0]` are its tokens [B, N, D]; it reads `params["network"]`."""

    project: Project
    weight: float = 0.5

    def __call__(self, apply: Apply, params: Any, key: jax.Array, aligned: Aligned) -> tuple[jax.Array, dict]:
        clean = jnp.ones(aligned.batch.x1.shape[0])
        found = apply(params["network"], aligned.batch.x1, clean, clean, aligned.batch.cond)
        loss = alignment_losses(self.project(params, tokens_of(found)), aligned.targets).mean()
        return self.weight * loss, {"alignment": loss}


@dataclasses.dataclass(frozen=True)
class AlignedFlowMatching:
    """The objective of phase two, `(apply, params, key, aligned) -> (loss, metrics)`: flow matching as `flow` has it,
    and the alignment of `aux["taps"][0]`, whose weight is the batch's, or `weight`. `apply` reads `params["network"]`.
    """

    project: Project
    flow: FlowMatching = dataclasses.field(default_factory=FlowMatching)
    weight: float = 1.0

    def __call__(self, apply: Apply, params: Any, key: jax.Array, aligned: Aligned) -> tuple[jax.Array, dict]:
        # Split as flow matching splits its key: at weight 0 the two are equal.
        source_key, couple_key, time_key, drop_key = jax.random.split(key, 4)
        batch, log_w = aligned.batch, None
        x0, x1, cond = source_like(source_key, batch), batch.x1, batch.cond
        if self.flow.couple is not None:
            x0, x1, cond, log_w = self.flow.couple(couple_key, x0, x1, cond)
        cond = drop(drop_key, cond, self.flow.drop_rate, self.flow.null)
        times = self.flow.times(time_key, x1.shape[0])
        x, v = interpolate(self.flow.path, x0, x1, times.t)
        found = apply(params["network"], x, times.t, times.s, cond, seg=times.seg)
        losses = per_example(jnp.square(found.v - v))
        align = alignment_losses(self.project(params, tokens_of(found)), aligned.targets).mean()
        weight = self.weight if aligned.weight is None else aligned.weight
        return weighted_mean(losses, log_w) + weight * align, {"velocity_loss": losses.mean(), "alignment": align}


def tokens_of(out: Out) -> jax.Array:
    """The first of the layers that a model was asked for. InputError where it was asked for none."""
    if not out.aux.get("taps"):
        raise InputError('alignment needs a model that gives its tokens: aux["taps"] is empty; ask it for a layer')
    return out.aux["taps"][0]


def graft(params: dict[str, Any], warmed: dict[str, Any], except_for: tuple[str, ...] = ("final",)) -> dict[str, Any]:
    """The whole model's params with the parts that the warmed-up first layers have, but those named in `except_for`
    (the last layer, which the warm-up does not train). Raises InputError for a part that the model does not have, or of
    another shape."""
    taken = {name: part for name, part in warmed.items() if name not in except_for}
    missing = sorted(set(taken) - set(params))
    if missing:
        raise InputError(f"the model has no {', '.join(missing)}; it has {', '.join(sorted(params))}")
    for name, part in taken.items():
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (part, params[name])]
        if shapes[0] != shapes[1]:
            raise InputError(f"{name}: shapes {shapes[0]}, the model's are {shapes[1]}")
    return {**params, **taken}


@dataclasses.dataclass(frozen=True)
class EncoderObjective:
    """The objective of the encoder, `(params, batch, key) -> (loss, metrics)`, for the training loop: labels from the
    mean of its tokens. `encoder(params, x[B, ...]) -> (tokens[B, N, E], logits[B, classes])`; the batch's x is given
    noise of a size up to `noise`, so that tokens say what is there and not each number of it."""

    encoder: Any
    noise: float = 0.5

    def __call__(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
        size_key, noise_key = jax.random.split(key)
        sizes = self.noise * jax.random.uniform(size_key, (batch.x1.shape[0],) + (1,) * (batch.x1.ndim - 1))
        noisy = batch.x1 + sizes * jax.random.normal(noise_key, batch.x1.shape)
        _, logits = self.encoder(params, noisy)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.cond.labels)
        right = (logits.argmax(-1) == batch.cond.labels).astype(jnp.float32)
        return losses.mean(), {"accuracy": right.mean()}
