"""The language-model recipe: next-token cross-entropy on packed documents, measured in bits per byte of held-out text.

Documents are packed into fixed windows; segments keep attention inside a document and positions restart with it. The
optimiser is Muon (Jordan 2024; Liu et al. 2025, arXiv:2502.16982) for the matrices between embedding and head, and
Adam for the rest; the schedule is warm-up, constant, linear decay to zero (Hu et al. 2024, arXiv:2404.06395), so that
the end of a run can be chosen while it is in its constant part.

Stability: experimental.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxinfer.errors import ConfigError
from jaxinfer.ops.attention import Segments
from jaxinfer.train.data import Stage, pack

EMBEDDINGS = frozenset({"embedding", "head", "position_embedding", "position_table", "prompts"})
OUTPUTS = frozenset({"o", "down"})


def token_losses(step, params, batch) -> jax.Array:
    """-log p(target), f32[B,T], of a batch with ids, targets, segments and positions i32[B,T]."""
    output, _ = step(params, batch["ids"], batch["positions"], mask=Segments(batch["segments"]))
    return next_token_losses(step, params, output.hidden, batch["targets"])


def next_token_losses(step, params, hidden, targets) -> jax.Array:
    """-log p(target), f32[B,T], of `hidden[B,T,D]` and `targets i32[B,T]`."""
    logits = step.head(params, hidden)
    gold = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - gold


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The objective `(params, batch, key) -> (mean loss in nats, metrics)`; `step` as in `jaxinfer.models.step`."""

    step: Any

    def __call__(self, params, batch, key) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses = token_losses(self.step, params, batch)
        return losses.mean(), {"weight": jnp.asarray(losses.size, jnp.float32)}


def init_params(step, key: jax.Array) -> Any:
    """Random params for training: matrices with variance 1 / fan-in, zero where they write to the residual stream.

    Zero output projections make each block the identity at first (muP, arXiv:2203.03466, and Muon's records use it).
    """

    def rescale(path, leaf):
        name = path[-1].key
        if name in OUTPUTS:
            return jnp.zeros_like(leaf)
        if not _is_hidden_matrix(name, leaf):
            return leaf
        return leaf * (leaf.shape[-2] ** -0.5 / jnp.std(leaf)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(rescale, step.init(key))


def _is_hidden_matrix(name: str, leaf) -> bool:
    return leaf.ndim >= 2 and name not in EMBEDDINGS


def warmup_stable_decay(peak: float, *, steps: int, warmup: int = 50, decay: float = 0.3) -> optax.Schedule:
    """Linear warm-up over `warmup` updates, constant, then linear to zero over the last `decay` of `steps`."""
    if not 0 < warmup < steps * (1 - decay):
        raise ConfigError(f"warmup must be in 1..{int(steps * (1 - decay)) - 1} for {steps} steps, got {warmup}")
    down = max(1, round(steps * decay))

    def schedule(count):
        return peak * jnp.clip(jnp.minimum((count + 1) / warmup, (steps - count) / down), 0.0, 1.0)

    return schedule


def muon(schedule: optax.Schedule, *, adam_scale: float = 1.0, weight_decay: float = 0.05, clip: float = 1.0):
    """Muon on every hidden matrix (stacks of experts too), Adam at `adam_scale` times the rate on the rest."""

    def dimensions(params):
        def of(path, leaf):
            if not _is_hidden_matrix(path[-1].key, leaf):
                return None
            return contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        contrib.muon(
            schedule,
            weight_decay=weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=dimensions,
            adam_b2=0.95,
            adam_learning_rate=lambda count: adam_scale * schedule(count),
        ),
    )


def stages(shares: Sequence[tuple[int, float, float]], *, steps: int, tokens: int) -> tuple[Stage, ...]:
    """`(length, share of the steps, weight of the modules)` in order -> stages of `tokens` a batch each."""
    if abs(sum(share for _, share, _ in shares) - 1) > 1e-6:
        raise ConfigError(f"the shares of the stages must sum to 1, got {[share for _, share, _ in shares]}")
    found, begun = [], 0.0
    for length, share, weight in shares:
        if tokens % length:
            raise ConfigError(f"a batch of {tokens} tokens holds no whole number of windows of {length}")
        found.append(Stage(round(begun * steps), tokens // length, length, weight))
        begun += share
    return tuple(found)


def split_batch(batch: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """[B, ...] -> [count, B / count, ...], for gradient accumulation; the batch itself where count is 1."""
    return batch if count == 1 else {k: v.reshape(count, -1, *v.shape[1:]) for k, v in batch.items()}


def evaluation_windows(length: int, *, window: int, stride: int) -> list[tuple[int, int]]:
    """(start, first scored) of windows that score each of `length` positions exactly once.

    Every window is `window` long (the document's length, if that is less); all but the first score only the positions
    that no window before scored, so each of these has at least `window - stride` tokens of context.
    """
    if not 0 < stride <= window:
        raise ConfigError(f"stride must be in 1..{window}, got {stride}")
    found, scored = [(0, 0)], window
    while scored < length:
        found.append((min(scored + stride, length) - window, scored))
        scored += stride
    return found


def bits_per_byte(
    step,
    params,
    documents: Sequence[np.ndarray],
    *,
    num_bytes: int,
    window: int = 1024,
    stride: int = 512,
    batch: int = 8,
    end: int = 0,
) -> float:
    """Bits that the model spends on the documents' tokens, over `num_bytes`, the length of their text.

    Each document is scored alone, after one `end` token; each of its tokens counts once.
    """
    rows = []
    for tokens in documents:
        inputs = np.concatenate([[end], tokens[:-1]]).astype(np.int32)
        for start, first in evaluation_windows(len(tokens), window=window, stride=stride):
            n = min(window, len(tokens) - start)
            row = np.zeros((4, window), np.int32)
            row[0, :n], row[1, :n] = inputs[start : start + n], tokens[start : start + n]
            row[2] = np.where(np.arange(window) < n, np.arange(window), -1)
            row[3, first - start : n] = 1
            rows.append(row)
    rows += [np.stack([z := np.zeros(window, np.int32), z, z - 1, z])] * (-len(rows) % batch)
    total = 0.0
    for i in range(0, len(rows), batch):
        ids, targets, positions, scored = np.stack(rows[i : i + batch], axis=1)
        part = {"ids": ids, "targets": targets, "positions": positions, "segments": np.zeros_like(ids)}
        total += float(_scored_loss(step, params, part, scored))
    return total / math.log(2) / num_bytes


def losses_of_copies(
    step, params, documents: Sequence[np.ndarray], *, length: int = 192, count: int = 32, batch: int = 8, end: int = 0
) -> tuple[float, float]:
    """Nats a token of stretches of `length` tokens at their first and at their second appearance in one window.

    The stretches begin a third into each of the `count` first documents that are long enough; the two are far apart for
    a model that repeats what it was given.
    """
    found = [d[len(d) // 3 :][:length] for d in documents if len(d) >= 3 * length][:count]
    found = [stretch for stretch in found if not (stretch == end).any()]
    totals = np.zeros(2)
    for i in range(0, len(found), batch):
        twice = np.tile(np.stack(found[i : i + batch]).astype(np.int32), (1, 2))
        part = pack(np.concatenate([np.full_like(twice[:, :1], end), twice], 1), end=end)
        for half in range(2):
            scored = (np.arange(2 * length) // length == half) * np.ones_like(twice)
            totals[half] += float(_scored_loss(step, params, part, scored))
    return tuple(totals / (len(found) * length))


@functools.partial(jax.jit, static_argnames="step")
def _scored_loss(step, params, batch, scored) -> jax.Array:
    return jnp.sum(jnp.where(scored == 1, token_losses(step, params, batch), 0.0))
