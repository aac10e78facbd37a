"""PPD's prompt tokens: trained embeddings that, standing after a token, let the target guess tokens further on.

Chen et al. 2024 (arXiv:2405.18628). Prompt token i stands in the place of the token i after the next one; what the
target says there is its guess of the token that follows. Nothing else is trained: `prompts` times D numbers (paper: 3
prompt tokens, 0.0002 % of the target). `copies` are the paper's ensemble: each prompt token in several versions, a
version sees only earlier ones of its own, and their logits are averaged (paper: gains from many copies are small).

`acceptance` is what was measured on the target's own output: the chance of guess r at depth d + 1, a row for each
prompt token. The drafter chooses its trees by it.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxinfer import cache as kv
from jaxinfer.models.heads.base import Head, check_count


@dataclasses.dataclass(frozen=True)
class PPDHead(Head):
    """`prompts`: tokens guessed after the next one; `copies` of each; `acceptance`: see above, () before it is
    measured."""

    prompts: int = 3
    copies: int = 1
    acceptance: tuple[tuple[float, ...], ...] = ()
    kind: ClassVar[str] = "ppd"

    def __post_init__(self):
        check_count("prompts", self.prompts)
        check_count("copies", self.copies)
        rows = tuple(tuple(float(x) for x in row) for row in self.acceptance)
        object.__setattr__(self, "acceptance", rows)

    def init(self, key: jax.Array, output: jax.Array | None = None) -> Any:
        """`prompts f32[prompts, copies, D]`: random, with the mean and the spread of the target's `output f[D, V]`."""
        noise = jax.random.normal(key, (self.prompts, self.copies, self.target.hidden_size))
        if output is None:
            return {"prompts": 0.02 * noise}
        matrix = self.output_or_zeros(output)
        return {"prompts": matrix.mean(1) + matrix.std() * noise}

    def guesses(
        self, params: Any, step: Any, target_params: Any, batch: Mapping[str, jax.Array], points: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What the prompt tokens say after the tokens at `points i32[B, I]` of a batch of text, in one pass.

        `batch`: `ids`, `positions`, `segments i32[B, T]`, as `train.data.pack` makes them. Returns the guesses' logits
        f32[B, I, prompts, V], and the target's hidden states f[B, T, D] of the text, which no prompt token changes.
        """
        ids, positions, segments = batch["ids"], batch["positions"], batch["segments"]
        (rows, length), count = ids.shape, points.shape[1]
        shape = (rows, count, self.prompts, self.copies)
        own = params["prompts"].astype(step.embed(target_params, ids[:1, :1]).dtype)
        own = jnp.broadcast_to(own, (*shape[:2], *own.shape)).reshape(rows, -1, own.shape[-1])
        ahead = jnp.broadcast_to(jnp.arange(1, self.prompts + 1, dtype=jnp.int32)[:, None], shape)
        at = jnp.take_along_axis(positions, points, 1)[:, :, None, None] + ahead
        of_text, of_prompts = self._masks(segments, points)
        # Text and prompt slots in one Block, but two calls: nothing is differentiated through the text.
        cache = step.new_cache(rows, 1)
        blocks = kv.new_blocks(cache, length + own.shape[1])
        text, blocks = step(target_params, ids, positions, cache, blocks, 0, of_text)
        output, _ = step(target_params, own, at.reshape(rows, -1), cache, blocks, length, of_prompts)
        return step.head(target_params, output.hidden.reshape(*shape, -1)).mean(3), text.hidden

    def _masks(self, segments: jax.Array, points: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whom text bool[B, T, T + P] and prompt slots bool[B, P, T + P], point by point, see of both."""
        rows, length = segments.shape
        index = jnp.arange(length)
        causal = (index[:, None] >= index)[None] & (segments[:, :, None] == segments[:, None, :])
        each = self.prompts * self.copies
        before = jnp.take_along_axis(causal, points[..., None], 1)  # a prompt slot sees what its point sees
        before = jnp.repeat(before, each, 1)
        number = jnp.arange(points.shape[1] * each)
        point, order, copy = number // each, number % each // self.copies, number % self.copies
        among = (point[:, None] == point) & (copy[:, None] == copy) & (order[:, None] >= order)
        among = jnp.broadcast_to(among, (rows, *among.shape))
        nothing = jnp.zeros((rows, length, among.shape[1]), bool)
        return jnp.concatenate([causal, nothing], 2), jnp.concatenate([before, among], 2)
