"""UloRL: reinforcement on very long answers, whose rolled-out segments are trained on as they end.

Du et al. 2025 (arXiv:2507.19766): answers are sampled a segment at a time, so that an update waits for one segment and
not for the longest answer (`jaxinfer.train.rollout`), and positive tokens that the model is sure of already are left
out of the loss while an answer's entropy is low, which keeps the entropy from collapsing (DMMPT).

Guarantee: a different model. State: the roll-outs' pools; the objective has none. Paper's defaults: temperature 0.85,
8 answers a prompt, POIS, tau 0.99, sigma 0.2, AdamW at a constant rate of 1e-6, no KL to a reference.

The objective is DAPO's (Yu et al. 2025, arXiv:2503.14476): the mean over the tokens of all answers of ratio times
advantage, an answer's advantage being its reward against those of its group in standard deviations. A segment may stem
from an older policy than the one that is trained. POIS takes all of them for the newest one's: the ratio is 1 and
nothing is clipped. SAIS compares with the policy that wrote the segment and clips as DAPO does (the paper saw the
entropy explode).

Departures: the printed entropy lacks its minus sign; the law is that of the temperature that answers are sampled at, in
ratios, entropy and p >= tau alike, since the paper does not say which it means.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxinfer.errors import ConfigError
from jaxinfer.ops.attention import Segments
from jaxinfer.train import loop

RATIOS = ("pois", "sais")
TOLD = ("reward", "answer_tokens", "unfinished", "staleness")  # f32[N] of a batch, the same in all rows: for the log


def group_advantages(rewards: jax.Array) -> jax.Array:
    """`rewards f32[..., G]` of the answers to one prompt, less their mean, in their standard deviations; 0 where all
    are the same."""
    spread = rewards.std(-1, keepdims=True)
    return jnp.where(spread > 0, (rewards - rewards.mean(-1, keepdims=True)) / jnp.where(spread > 0, spread, 1), 0.0)


def worth_training(rewards: jax.Array) -> jax.Array:
    """Dynamic sampling, bool[...] of `rewards f32[..., G]`: whether a group says which answers are better."""
    return rewards.max(-1) > rewards.min(-1)


def pois_ratio(logp: jax.Array, behaviour: jax.Array) -> jax.Array:
    """1 everywhere, with the gradient of `logp`: every token counts as the newest policy's, whoever wrote it."""
    return jnp.exp(logp - jax.lax.stop_gradient(logp))


def sais_ratio(logp: jax.Array, behaviour: jax.Array) -> jax.Array:
    """p / p_old of each token, `behaviour` being its log-probability for the policy that wrote its segment."""
    return jnp.exp(logp - behaviour)


def clipped(ratio: jax.Array, advantage: jax.Array, low: float, high: float) -> jax.Array:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A), what a token is worth under SAIS."""
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def answer_entropy(entropy: jax.Array, counted: jax.Array) -> jax.Array:
    """Mean over the tokens of each answer, f32[N], of `entropy f32[N, T]` where `counted bool[N, T]`."""
    return jnp.sum(jnp.where(counted, entropy, 0.0), -1) / jnp.maximum(counted.sum(-1), 1)


def mastered(
    logp: jax.Array, entropy: jax.Array, counted: jax.Array, correct: jax.Array, tau: float, sigma: float
) -> jax.Array:
    """DMMPT, bool[N, T]: tokens of `correct bool[N]` answers that have a probability of `tau` or more, in answers whose
    mean entropy is below `sigma`. `sigma` infinite: in all (MPT); 0: none."""
    low = answer_entropy(entropy, counted) < sigma
    return counted & (logp >= jnp.log(tau)) & (correct & low)[:, None]


def token_law(step: Any, params: Any, batch: Any, temperature: float) -> tuple[jax.Array, jax.Array]:
    """(log-probability of the targets, entropy of the law in nats), f32[N, T] each, at `temperature`."""
    output, _ = step(params, batch["ids"], batch["positions"], mask=Segments(batch["segments"]))
    law = jax.nn.log_softmax(step.head(params, output.hidden) / temperature)
    logp = jnp.take_along_axis(law, batch["targets"][..., None], -1)[..., 0]
    return logp, -jnp.sum(jnp.exp(law) * law, -1)


@dataclasses.dataclass(frozen=True)
class UloRL:
    """The objective `(params, batch, key) -> (loss, metrics)`, for `loop.Recipe`.

    The batch is that of `rollout.Rollouts`: ids, targets, segments and positions i32[N, T], `counted bool[N, T]` for
    targets that are answers, `behaviour f32[N, T]` (SAIS), `advantage f32[N]`, `correct bool[N]`, and TOLD.
    `clip` is SAIS's (below, above). ConfigError for values out of their range.
    """

    step: Any
    temperature: float = 0.85
    ratio: str = "pois"
    tau: float = 0.99
    sigma: float = 0.2
    clip: tuple[float, float] = (0.2, 0.28)

    def __post_init__(self):
        if not self.temperature > 0:
            raise ConfigError(f"temperature: got {self.temperature}, accepts numbers above 0")
        if self.ratio not in RATIOS:
            raise ConfigError(f"ratio: got {self.ratio!r}, accepts {', '.join(RATIOS)}")
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau: got {self.tau}, accepts above 0 and up to 1")
        if not self.sigma >= 0:
            raise ConfigError(f"sigma: got {self.sigma}, accepts 0 (nothing is masked) or more")
        if not (len(self.clip) == 2 and 0 < self.clip[0] < 1 and self.clip[1] > 0):
            raise ConfigError(f"clip: got {self.clip}, accepts a share of 1 below and a number above 0")

    def __call__(self, params, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        counted = batch["counted"]
        logp, entropy = token_law(self.step, params, batch, self.temperature)
        advantage = jnp.broadcast_to(batch["advantage"][:, None], logp.shape)
        if self.ratio == "pois":
            worth = pois_ratio(logp, batch["behaviour"]) * advantage
        else:
            worth = clipped(sais_ratio(logp, batch["behaviour"]), advantage, *self.clip)
        fixed = jax.lax.stop_gradient(entropy)
        masked = mastered(jax.lax.stop_gradient(logp), fixed, counted, batch["correct"], self.tau, self.sigma)
        total = jnp.maximum(counted.sum(), 1)  # masked tokens stay in the denominator
        loss = -jnp.sum(jnp.where(counted & ~masked, worth, 0.0)) / total
        return loss, {
            "weight": total.astype(jnp.float32),
            "entropy": jnp.sum(jnp.where(counted, fixed, 0.0)) / total,
            "masked": masked.sum() / total,
            **{name: batch[name].mean() for name in TOLD},
        }


def recipe(
    objective: UloRL,
    source: loop.Source,
    *,
    rate: float = 1e-6,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> loop.Recipe:
    """The recipe: AdamW at a constant rate, one update for each round of roll-outs. `source`: a `rollout.Rollouts`."""
    settings = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective) if f.name != "step"}
    return loop.Recipe(
        objective=objective,
        data=source,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)),
        schedule=optax.constant_schedule(rate),
        evaluate=evaluate,
        tokens=lambda batch: int(batch["counted"].sum()),
        identity={
            "recipe": "ulorl", "rate": rate, **settings, "clip": list(objective.clip),
            "roll-outs": getattr(source, "identity", {}), **(identity or {}),
        },
    )  # fmt: skip
