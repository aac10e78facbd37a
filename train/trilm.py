"""TriLM: language models whose matrices have three values each from the first update on, packed to 2 bits at the end.

Kaushal et al. 2024, Spectra (arXiv:2407.12327), after Ma et al. 2024 (arXiv:2402.17764). The forward pass multiplies
with gamma * round(clip(W / gamma, -1, 1)), gamma the mean magnitude of the matrix; the backward pass takes the gradient
of that product for the gradient of the latent W (straight-through), which the optimiser keeps in float32. Embedding,
head, norms, biases and routers stay as they are. Guarantee: a different model; the exported one (`export`) computes
what training computed, its matrices in the 2-bit format that the ternary product reads.

The schedule is the paper's: a linear decay to zero with two interventions, a lower peak from the half of the run on and
no weight decay from two thirds on (the fractions are those of the released description, not of the paper's text).
AdamW with betas 0.9 and 0.95, weight decay 0.1, as there.

Departure: one scale a matrix wherever the model runs; the paper has one a matrix and model-parallel shard.

Stability: experimental.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxinfer import quant
from jaxinfer.errors import ConfigError
from jaxinfer.quant.ternary import Ternary, matrix_scale, ternary_codes
from jaxinfer.quant.tree import choose, map_leaves
from jaxinfer.train.lm import NextToken

LOWER_PEAK_AT, NO_DECAY_AT = 1 / 2, 2 / 3
MATRICES = r"layers_\d+/(?!.*router$).*"


def ternarize(weight: jax.Array) -> jax.Array:
    """The three values of each matrix of `weight f[..., K, N]`; its gradient is handed on as it is."""
    scale = matrix_scale(weight)[..., None, None].astype(weight.dtype)
    return weight + jax.lax.stop_gradient(scale * ternary_codes(weight, scale) - weight)


def ternary_params(params: Any) -> Any:
    """`params` as the forward pass of training sees them: `MATRICES` with three values each, the rest untouched."""
    chosen = choose(params, [MATRICES])
    return map_leaves(lambda path, leaf: ternarize(leaf) if path in chosen else leaf, params)


@dataclasses.dataclass(frozen=True)
class TernaryNextToken:
    """The objective `(latent params, batch, key) -> (mean loss in nats, metrics)`, for `loop.Recipe`."""

    step: Any

    def __call__(self, params, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        return NextToken(self.step)(ternary_params(params), batch, key)


def schedule(peak: float, *, steps: int, lower: float | None = None, warmup: int = 50) -> optax.Schedule:
    """Warm-up, then `peak * (1 - step / steps)`, with `lower` (two thirds of `peak`) for `peak` from the half on."""
    lower = peak * 2 / 3 if lower is None else lower
    if not 0 < lower <= peak:
        raise ConfigError(f"lower: got {lower}, accepts above 0 and up to the peak, {peak}")
    if not 0 < warmup < steps * LOWER_PEAK_AT:
        raise ConfigError(f"warmup: got {warmup}, accepts 1 to {int(steps * LOWER_PEAK_AT) - 1} of {steps} steps")

    def rate(count):
        height = jnp.where(count < steps * LOWER_PEAK_AT, peak, lower)
        return height * jnp.clip(jnp.minimum((count + 1) / warmup, 1 - count / steps), 0.0, 1.0)

    return rate


def optimizer(
    rate: optax.Schedule, *, steps: int, weight_decay: float = 0.1, clip: float = 1.0
) -> optax.GradientTransformation:
    """AdamW at `rate`, whose decay of the matrices ends after two thirds of `steps`."""
    matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(
            lambda count: jnp.where(jnp.asarray(count) < steps * NO_DECAY_AT, weight_decay, 0.0), mask=matrices
        ),
        optax.scale_by_learning_rate(rate),
    )


def export(params: Any) -> Any:
    """Latent params -> the model: its matrices packed in `quant.Ternary`'s format, 2 bits a weight and a scale a row.

    Save it with `quant.serialize`, or run it as it is: `ops.dot` multiplies with the codes.
    """
    return quant.apply(params, [(MATRICES, Ternary(rule="matrix"))])
