"""Fine-tuning by adapters: the next-token objective (or any other), with everything but the adapters frozen.

`quant.adapt` puts fresh adapters (LoRA, PaCA, SoKA, Hydra) over a model's weights, which may be quantized; `recipe`
trains their arrays alone: the bases are the loop's `frozen`, so neither gradients nor optimiser state exist for them.
The optimiser is AdamW without decay, the schedule warm-up, constant, linear decay to zero. `models.adapters` saves what
comes out, LoRA in PEFT's format.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxinfer import quant
from jaxinfer.errors import ConfigError
from jaxinfer.train import lm, loop

# Every projection of attention and MLP (routers stay, as does the embedding).
PROJECTIONS = r".*/(attention/[qkvo]|mlp/(gate|up|down))"


@dataclasses.dataclass(frozen=True)
class Adapted:
    """An objective `(params, batch, key)` as `(trained, batch, key, frozen)`, the two parts of `quant.split`."""

    objective: Any

    def __call__(self, trained, batch, key, frozen) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.objective(quant.join(trained, frozen), batch, key)


def adamw(schedule: optax.Schedule, *, weight_decay: float = 0.0, clip: float = 1.0) -> optax.GradientTransformation:
    """AdamW as PEFT's examples use it, after clipping by the global norm."""
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=weight_decay))


def recipe(
    params: Any,
    data: Callable[[int], Any],
    *,
    steps: int,
    objective: Any,
    rate: float = 1e-3,
    weight_decay: float = 0.0,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> loop.Recipe:
    """The recipe that trains the adapters of `params` (what `quant.adapt` returned) for `steps` updates.

    `objective(params, batch, key)`: `lm.NextToken(step)` or any other over whole params; `evaluate(params)` too. The
    identity holds a fingerprint of all that is frozen: whoever resumes must bring the same model and start.
    """
    if not rate > 0:
        raise ConfigError(f"rate must be positive, got {rate!r}")
    _, frozen = quant.split(params)
    warmup = max(1, min(20, steps // 4))
    schedule = lm.warmup_stable_decay(rate, steps=steps, warmup=warmup) if steps > 2 else optax.constant_schedule(rate)
    return loop.Recipe(
        objective=Adapted(objective),
        data=data,
        optimizer=adamw(schedule, weight_decay=weight_decay),
        schedule=schedule,
        evaluate=None if evaluate is None else lambda trained: evaluate(quant.join(trained, frozen)),
        tokens=lambda batch: batch["ids"].size,
        frozen=frozen,
        identity={**(identity or {}), "rate": rate, "weight_decay": weight_decay, "frozen": loop.fingerprint(frozen)},
    )


def init_state(params: Any, recipe: loop.Recipe, key: jax.Array) -> loop.TrainState:
    """The state before the first update: a copy of the adapters' arrays, since the loop gives its buffers away."""
    trained, _ = quant.split(params)
    return loop.init_state(jax.tree.map(jnp.array, trained), recipe, key)


def finished(state: loop.TrainState, recipe: loop.Recipe) -> dict[str, Any]:
    """Params with the trained adapters over their frozen bases."""
    return quant.join(state.params, recipe.frozen)
