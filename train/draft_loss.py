"""The losses of a draft against its target: cross-entropy, mixed with KL or total variation on the target's logits.

Zafrir et al. 2024, FastDraft (arXiv:2411.11055) compares them: cross-entropy on text that the target wrote
(sequence-level distillation, Kim and Rush 2016, arXiv:1606.07947), half of it with half KL(p || q) or half total
variation, and either alone; p is the target's law and q the draft's. Total variation is what speculative decoding pays
for: a draft is accepted with probability sum min(p, q) = 1 - TV(p, q) (Leviathan et al. 2022, arXiv:2211.17192).

The target runs in the same update (`Recipe.frozen`); nothing is stored. `top_k` keeps its k likeliest tokens, as there.

Departure: the mass outside of the k tokens is one outcome more, for p and for q. Renormalising the k instead would tell
the draft that the rest is impossible. So both are lower bounds of the whole divergence, and equal to it at k = V.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.ops.attention import Segments

TINY = 1e-7  # of the mass outside of the k tokens, so that its logarithm is finite


@dataclasses.dataclass(frozen=True)
class Distill:
    """The objective `(params, batch, key, frozen) -> (mean loss in nats, metrics)` of a draft.

    `step`: the draft; `target`: the model whose params are `frozen`, read only where `kl` or `tv` is above 0. The batch
    holds ids, targets, segments and positions i32[B,T] and `weights f32[B,T]`, how much each target counts. `ce`, `kl`
    and `tv` are the shares of the losses; `top_k` None takes the whole law of the target.
    """

    step: Any
    target: Any = None
    ce: float = 1.0
    kl: float = 0.0
    tv: float = 0.0
    top_k: int | None = None

    def __post_init__(self):
        for name in ("ce", "kl", "tv"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts a share of 0 or more")
        if not self.ce + self.kl + self.tv > 0:
            raise ConfigError("ce, kl, tv: got 0 for each, accepts at least one share above 0")
        if self.reads_target and self.target is None:
            raise ConfigError("target: got None, accepts the target's Step where kl or tv is above 0")
        vocab = self.step.vocab_size
        if self.top_k is not None and not 1 <= self.top_k <= vocab:
            raise ConfigError(f"top_k: got {self.top_k}, accepts None or 1 to {vocab}")
        if self.target is not None and self.target.vocab_size != vocab:
            raise ConfigError(f"target: got {self.target.vocab_size} tokens, accepts the draft's vocabulary, {vocab}")

    @property
    def reads_target(self) -> bool:
        """Whether the target's params must be handed over as `Recipe.frozen`."""
        return self.kl > 0 or self.tv > 0

    def __call__(self, params, batch, key, frozen=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        weights = batch["weights"]
        total = jnp.maximum(weights.sum(), 1e-9)
        q_logp = jax.nn.log_softmax(logits_of(self.step, params, batch), axis=-1)
        ce = -jnp.take_along_axis(q_logp, batch["targets"][..., None], axis=-1)[..., 0]
        found = {"ce": ce}
        if self.reads_target:
            p_logp = jax.nn.log_softmax(jax.lax.stop_gradient(logits_of(self.target, frozen, batch)), axis=-1)
            found["kl"], found["tv"] = divergences(p_logp, q_logp, top_k=self.top_k)
        means = {name: (value * weights).sum() / total for name, value in found.items()}
        loss = sum(getattr(self, name) * mean for name, mean in means.items())
        return jnp.asarray(loss), {**means, "weight": total}


def logits_of(step, params, batch) -> jax.Array:
    """Logits f32[B,T,V] of a packed batch."""
    output, _ = step(params, batch["ids"], batch["positions"], mask=Segments(batch["segments"]))
    return step.head(params, output.hidden)


def divergences(p_logp: jax.Array, q_logp: jax.Array, *, top_k: int | None = None) -> tuple[jax.Array, jax.Array]:
    """(KL(p || q), TV(p, q)), each f32[...], of log-probabilities f32[..., V]; see above for `top_k`."""
    if top_k is not None and top_k < p_logp.shape[-1]:
        p_logp, kept = jax.lax.top_k(p_logp, top_k)
        q_logp = jnp.take_along_axis(q_logp, kept, axis=-1)
        p_logp, q_logp = _with_rest(p_logp), _with_rest(q_logp)
    p, q = jnp.exp(p_logp), jnp.exp(q_logp)
    # A token that the target rules out adds nothing, whatever the logarithm of its zero is.
    kl = jnp.where(p > 0, p * (jnp.maximum(p_logp, -1e30) - q_logp), 0.0).sum(-1)
    return kl, 0.5 * jnp.abs(p - q).sum(-1)


def _with_rest(logp: jax.Array) -> jax.Array:
    rest = jnp.clip(1 - jnp.exp(logp).sum(-1, keepdims=True), TINY, 1.0)
    return jnp.concatenate([logp, jnp.log(rest)], axis=-1)
