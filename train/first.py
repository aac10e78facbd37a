"""Training for FiRST: routers that spare layers, then adapters that make up for the layers spared.

Jain et al. 2024 (arXiv:2410.12513), in two phases on a frozen model. First the routers alone: cross-entropy of the
answer plus `penalty` (0.01) times the sum of rho over the layers, so that a layer is skipped where its help is worth
less than that. Then LoRA adapters on the layers with the routers as they are, by cross-entropy alone.
`jaxinfer.decode.first` decodes with the result. Guarantee: a different model. State: none beyond the params.

`Prompted` is the data: windows of a stream of which a first part, of random length, is the prompt that the routers
read, and the rest the answer that is scored. `Routers` and `Adapted` are the objectives; both see the rounded decisions
of inference (rho passes its gradient straight through), so what is trained is what is decoded with.

Departures: the stream's windows stand for the paper's prompts and answers; a window that crosses into another document
counts as one prompt and one answer, with attention kept inside each document. Controls for measurements (`gates`): with
fixed decisions `Adapted` trains adapters for given layers, with all of them plain LoRA.

Stability: experimental.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode.first import routed
from jaxinfer.errors import ConfigError
from jaxinfer.ops.attention import Segments
from jaxinfer.quant.adapter import join
from jaxinfer.train.lm import next_token_losses

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompted:
    """Completed steps -> a batch of `stream` and `prompt i32[B]`: how many first tokens of each row are its prompt,
    from the share `low` of the window to `high`, drawn by (seed, step)."""

    stream: Callable[[int], Batch]
    seed: int = 0
    low: float = 0.125
    high: float = 0.5

    def __post_init__(self):
        if not 0 < self.low <= self.high < 1:
            raise ConfigError(f"low, high: got {self.low}, {self.high}, accepts 0 < low <= high < 1")

    def __call__(self, step: int) -> Batch:
        """ids, targets, segments, positions i32[B, T] and prompt i32[B]."""
        batch = self.stream(step)
        rows, length = batch["ids"].shape
        rng = np.random.default_rng((self.seed, step))
        low, high = max(1, round(self.low * length)), max(1, round(self.high * length))
        return {**batch, "prompt": rng.integers(low, high + 1, rows).astype(np.int32)}


def answer_loss(step, params, batch, gates: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean -log p of the answers' tokens, their number, and rho f32[B, L]; `gates f[B, L]` in place of routers."""
    index = jnp.arange(batch["ids"].shape[1])[None]
    prompt = index < batch["prompt"][:, None]
    output, rho = routed(
        step, params, batch["ids"], batch["positions"], prompt=prompt, mask=Segments(batch["segments"]), gates=gates
    )
    losses = next_token_losses(step, params, output.hidden, batch["targets"])
    scored = (index >= batch["prompt"][:, None] - 1) & (batch["positions"] >= 0)
    count = scored.sum().astype(jnp.float32)
    return jnp.where(scored, losses, 0.0).sum() / jnp.maximum(count, 1.0), count, rho


@dataclasses.dataclass(frozen=True)
class Routers:
    """Phase 1's objective `(routers, batch, key, frozen base params) -> (loss, metrics)`."""

    step: Any
    penalty: float = 0.01

    def __post_init__(self):
        if not self.penalty >= 0:
            raise ConfigError(f"penalty: got {self.penalty}, accepts 0 or more")

    def __call__(self, params, batch, key, frozen) -> tuple[jax.Array, dict[str, jax.Array]]:
        answer, count, rho = answer_loss(self.step, {**frozen, "first": params}, batch)
        loss = answer + self.penalty * rho.sum(1).mean()
        return loss, {"weight": count, "answer": answer, "layers": (rho >= 0.5).sum(1).mean()}


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Phase 2's objective; params and `frozen` are the parts of `quant.adapter.split`, the routers among the frozen.

    `gates`: decisions for all rows in place of the routers', a tuple of one 0 or 1 a layer, for comparison.
    """

    step: Any
    gates: tuple[int, ...] | None = None

    def __call__(self, params, batch, key, frozen) -> tuple[jax.Array, dict[str, jax.Array]]:
        given = None
        if self.gates is not None:
            given = jnp.broadcast_to(jnp.asarray(self.gates), (batch["ids"].shape[0], len(self.gates)))
        answer, count, rho = answer_loss(self.step, join(params, frozen), batch, given)
        return answer, {"weight": count, "layers": (rho >= 0.5).sum(1).mean()}
