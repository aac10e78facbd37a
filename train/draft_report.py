"""How good a draft is for its target: acceptance rate, block efficiency, and the speed-up that memory traffic allows.

- Expected acceptance: the mean of sum min(p, q) over positions of held-out text, the chance that a draft sampled there
  is accepted (Leviathan et al. 2022, arXiv:2211.17192), at temperature 1 for both.
- Acceptance rate, measured: drafts accepted, over drafts that the verifier came to (those after a rejection are not).
- Block efficiency: tokens a target forward, its own included, with chains of gamma drafts.
- Memory-bound speed-up: block efficiency / (gamma c + 1), c the bytes of the draft's weights over the target's (as in
  FastDraft, arXiv:2411.11055): what decoding would gain if reading weights were all that takes time. Not a measurement.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import decode, quant
from jaxinfer.decode.draft_model import DraftModel
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.train.draft_loss import logits_of


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What is measured on: `prompts` of `prompt_tokens` from held-out documents, answered with `answer_tokens` each,
    greedily and at `temperature`, `gamma` drafts a forward; and as many windows of `window` tokens of text."""

    prompts: int = 24
    prompt_tokens: int = 96
    answer_tokens: int = 64
    window: int = 256
    gamma: int = 3
    temperature: float = 0.6

    def __post_init__(self):
        for name in ("prompts", "prompt_tokens", "answer_tokens", "window", "gamma"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts 1 or more")
        if self.temperature <= 0:
            raise ConfigError(f"temperature: got {self.temperature}, accepts a number above 0")


def report(
    target: Any,
    target_params: Any,
    draft: Any,
    draft_params: Any,
    documents: Sequence[np.ndarray],
    measuring: Measuring,
) -> dict[str, float]:
    """The figures above of one pair on held-out `documents`, as {name: value}."""
    windows = cut(documents, measuring.prompts, measuring.window)
    prompts = cut(documents, measuring.prompts, measuring.prompt_tokens)
    found = {"expected_acceptance": expected(target, target_params, draft, draft_params, windows)}
    share = weight_bytes(draft, draft_params) / weight_bytes(target, target_params)
    for name, temperature in (("greedy", 0.0), ("sampled", measuring.temperature)):
        config = decode.Config(
            max_tokens=measuring.answer_tokens, temperature=temperature, eos=(),
            drafter=DraftModel(draft, gamma=measuring.gamma),
        )  # fmt: skip
        stats = _stats(target, target_params, jnp.asarray(prompts), config, draft_params)
        rate, efficiency = rates(stats)
        found |= {
            f"{name}_acceptance": rate,
            f"{name}_block_efficiency": efficiency,
            f"{name}_memory_bound_speedup": efficiency / (measuring.gamma * share + 1),
        }
    return {**found, "weight_bytes_ratio": share}


def cut(documents: Sequence[np.ndarray], count: int, size: int) -> np.ndarray:
    """i32[n, size]: one stretch of each of up to `count` documents, from a third of the way in, spread evenly."""
    fit = [document for document in documents if len(document) - len(document) // 3 >= size]
    if not fit:
        raise InputError(f"no held-out document has {size * 3 // 2} tokens to measure on")
    chosen = [fit[i * len(fit) // min(count, len(fit))] for i in range(min(count, len(fit)))]
    return np.stack([d[len(d) // 3 :][:size] for d in chosen]).astype(np.int32)


def expected(target: Any, target_params: Any, draft: Any, draft_params: Any, windows: np.ndarray) -> float:
    """The mean of sum min(p, q) over the positions of `windows i32[n, T]`."""
    rows = [_overlap(target, draft, target_params, draft_params, window[None]) for window in windows]
    return float(np.mean([np.asarray(row) for row in rows]))


def rates(stats: Any) -> tuple[float, float]:
    """(acceptance rate, block efficiency) of a chain drafter's `decode.Stats`."""
    accepted = np.asarray(stats.accepted_by_depth).sum(0)
    proposed = np.asarray(stats.proposed_by_depth).sum(0)
    reached = np.minimum(np.concatenate([proposed[:1], accepted[:-1]]), proposed)
    return float(accepted.sum() / max(reached.sum(), 1)), float(stats.tokens_per_forward)


def weight_bytes(step: Any, params: Any) -> int:
    """Bytes of the weights that a forward reads: all, but of an embedding that is no head only a row a token."""
    tied = step.config.tie_embeddings
    rows = [leaf for path, leaf in quant.leaves(params) if tied or path.partition("/")[0] != "embedding"]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(rows))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _overlap(target, draft, target_params, draft_params, ids) -> jax.Array:
    zeros = jnp.zeros_like(ids)
    batch = {"ids": ids, "segments": zeros, "positions": jnp.arange(ids.shape[1], dtype=jnp.int32)[None] + zeros}
    p = jax.nn.softmax(logits_of(target, target_params, batch), axis=-1)
    q = jax.nn.softmax(logits_of(draft, draft_params, batch), axis=-1)
    return jnp.minimum(p, q).sum(-1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _stats(step, params, prompts, config, draft_params):
    lengths = jnp.full(prompts.shape[0], prompts.shape[1], jnp.int32)
    result = decode.generate(
        step, params, prompts, lengths, config=config, key=jax.random.key(0), draft_params=draft_params
    )
    return result.stats
