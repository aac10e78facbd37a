"""Recipes for what is trained after, before or beside a flow: straightening, blockwise features, warmed-up layers.

MeanFlow, couplings and blockwise flow matching without an encoder need none of these: they are objectives of
`flow.flow_recipe`. Here are the recipes that read more than a batch: BOSS's straightening its pairs, the feature
residual a frozen model, alignment a frozen encoder and the step. Each is `flow_recipe`'s, with another objective or
data, so the options are its options.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.flow.alignment import Aligned, EncoderObjective
from jaxinfer.flow.bellman import Pairs, Straighten
from jaxinfer.flow.blockwise import FeatureResidual
from jaxinfer.flow.types import Apply, Batch, Condition
from jaxinfer.models.patch_encoder import Encoder
from jaxinfer.train.flow import Epochs, FlowObjective, adam
from jaxinfer.train.loop import Recipe, fingerprint


@dataclasses.dataclass(frozen=True)
class StraightenObjective:
    """`Straighten` for the loop, on rows of `Pairs` as {"x", "velocity", "t", "s", "labels"}."""

    apply: Apply

    def __call__(self, params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
        cond = Condition(labels=batch["labels"]) if "labels" in batch else None
        rows = Pairs(batch["x"], batch["velocity"], batch["t"], batch["s"], cond)
        return Straighten()(self.apply, params, key, rows)


def straighten_recipe(
    network: Any, pairs: Pairs, *, steps: int, batch: int = 128, rate: float = 3e-4, ema: float = 0.999, seed: int = 0
) -> Recipe:
    """Fine-tunes a trained flow's params on `pairs`, of whose condition labels are read."""
    arrays = {name: np.asarray(getattr(pairs, name)) for name in ("x", "velocity", "t", "s")}
    if pairs.cond is not None and pairs.cond.labels is not None:
        arrays["labels"] = np.asarray(pairs.cond.labels)
    optimizer, planned = adam(rate, steps)
    return Recipe(
        objective=StraightenObjective(network),
        data=Epochs(arrays, batch, seed),
        optimizer=optimizer,
        schedule=planned,
        ema_decay=ema,
        identity={"recipe": "straighten", "seed": seed, "rate": rate, "batch": batch, "pairs": fingerprint(arrays)},
    )


@dataclasses.dataclass(frozen=True)
class ResidualObjective:
    """`FeatureResidual` for the loop: `params` are the residual network's, `frozen` the blockwise model's."""

    flow: FlowObjective
    objective: FeatureResidual = FeatureResidual()

    def __call__(self, params: Any, batch: Any, key: jax.Array, frozen: Any) -> tuple[jax.Array, dict]:
        inner = lambda parts, p, k, rows: self.objective(parts, p, k, rows, frozen)  # noqa: E731
        return dataclasses.replace(self.flow, objective=inner)(params, batch, key)


def residual_recipe(flow: Recipe, params: Any, **settings: Any) -> Recipe:
    """The recipe of the residual network of a blockwise model, trained by the recipe `flow` to `params`."""
    return dataclasses.replace(
        flow,
        objective=ResidualObjective(_flow_objective(flow), FeatureResidual(**settings)),
        evaluate=None,
        frozen=params,
        identity={**flow.identity, "recipe": "feature residual", "model": fingerprint(params)},
    )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An objective on `Aligned` batches for the loop: the tokens are those that the frozen encoder, whose params are
    `frozen`, makes of the batch's clean data."""

    flow: Any  # a FlowObjective whose objective takes Aligned batches
    encoder: Encoder

    def __call__(self, params: Any, batch: Any, key: jax.Array, frozen: Any) -> tuple[jax.Array, dict]:
        weight, objective = batch.get("weight"), self.flow.objective

        def inner(apply: Any, p: Any, k: jax.Array, rows: Any):
            return objective(apply, p, k, Aligned(rows, self.encoder(frozen, rows.x1)[0], weight))

        return dataclasses.replace(self.flow, objective=inner)(params, batch, key)


@dataclasses.dataclass(frozen=True)
class Weighed:
    """Batches of `data` with `weight f32[]`, a function of the number of completed updates."""

    data: Callable[[int], Mapping[str, Any]]
    weight: Callable[[int], jax.Array]

    def __call__(self, step: int) -> dict[str, Any]:
        return {**self.data(step), "weight": np.asarray(self.weight(step), np.float32)}


def aligned_recipe(
    flow: Recipe, encoder: Encoder, encoder_params: Any, *, weight: Callable[[int], jax.Array] | None = None
) -> Recipe:
    """`flow`, a recipe whose objective takes `Aligned` batches (`Warmup`, `AlignedFlowMatching`, `Blockwise`), with the
    encoder's tokens in its batches, and with the alignment's weight at each step where `weight` is given."""
    if isinstance(flow.data, Weighed) or isinstance(flow.objective, Encoded):
        raise ConfigError("the recipe has an encoder already")
    data: Any = flow.data
    return dataclasses.replace(
        flow,
        objective=Encoded(_flow_objective(flow), encoder),
        data=data if weight is None else Weighed(data, weight),
        frozen=encoder_params,
        identity={**flow.identity, "encoder": fingerprint(encoder_params)},
    )


def encoder_recipe(flow: Recipe, encoder: Encoder, *, noise: float = 0.5) -> Recipe:
    """The recipe of an encoder on what the recipe `flow` trains on: the labels from the latents, or the pixels."""
    return dataclasses.replace(
        flow,
        objective=_EncoderOnFlow(_flow_objective(flow), EncoderObjective(encoder, noise)),
        evaluate=None,
        ema_decay=None,
        frozen=None,
        identity={**flow.identity, "recipe": "encoder", "encoder": str(encoder.module)},
    )


@dataclasses.dataclass(frozen=True)
class _EncoderOnFlow:
    flow: FlowObjective
    objective: EncoderObjective

    def __call__(self, params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        def inner(apply: Any, p: Any, k: jax.Array, rows: Batch):
            return self.objective(p, rows, k)

        return dataclasses.replace(self.flow, objective=inner)(params, batch, key)


def _flow_objective(recipe: Recipe) -> FlowObjective:
    if not isinstance(recipe.objective, FlowObjective):
        raise ConfigError(f"got a recipe of {type(recipe.objective).__name__}, accepts one that flow_recipe made")
    return recipe.objective
