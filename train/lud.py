"""Training for Lexical Unit Decoding: units from a model's own confidence, PADs that stand for a unit's later tokens.

Sun et al. 2024, LUD (arXiv:2405.15208). Where a model gives each of several tokens in a row a probability of at least
theta, these are a lexical unit. Beside ordinary next-token examples a model is then trained on the text before a unit
with k - 1 PADs after it: the last token of the text predicts the unit's first token, PAD j its token j + 1.
`jaxinfer.decode.lud` decodes with the result. Guarantee: a different model. State: none beyond the params.

`LexicalUnits` is the data: a stream's batches with many such examples behind each window, on the window's own text:
each PAD sees the text up to its example's end and the PADs of its example before it, and stands where the token would
that it is for; no text token sees a PAD, so the next-token examples are what they were. Probabilities come from the
model as it was before this training (`params` of the data), anew for each batch: the data is a function of the step.

`PadTokens` is the objective. Its params are a whole model, or its adapters' trained part (`quant.adapter.split`).

Departures, because the paper's settings could not be verified: theta, k and the number of examples are ours. A unit may
be entered anywhere, since decoding stops anywhere in it. With `outside` above 0 PADs past the end of a unit, and
examples where no unit begins, count too, with that weight: what the model then says of its certainty is measured
against all text, where the paper's model only ever sees PADs that stand for something certain.

Stability: experimental.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.quant.adapter import join
from jaxinfer.train.lm import next_token_losses, token_losses

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Units:
    """`k`: tokens that one forward guesses; `theta`: the least probability of a unit's tokens; `pad`: the id that
    stands for a token; `examples` behind each window; `outside`: the weight of PADs that no unit covers."""

    k: int = 4
    theta: float = 0.9
    pad: int = 1
    examples: int = 32
    outside: float = 0.0

    def __post_init__(self):
        for name, low in (("k", 2), ("pad", 0), ("examples", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ConfigError(f"{name}: got {value!r}, accepts a whole number of {low} or more")
        for name in ("theta", "outside"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, accepts 0 to 1")


@functools.partial(jax.jit, static_argnames="step")
def probabilities(step, params, batch) -> jax.Array:
    """The model's probability of each target, f32[B, T]."""
    return jnp.exp(-token_losses(step, params, batch))


def run_lengths(sure: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """How many targets in a row are `sure bool[B, T]` from each on, within its document: i32[B, T]."""
    runs = sure.astype(np.int32)
    for t in range(sure.shape[1] - 2, -1, -1):
        goes_on = sure[:, t] & (segments[:, t] == segments[:, t + 1])
        runs[:, t] += goes_on * runs[:, t + 1]
    return runs


def add_examples(batch: Batch, sure: np.ndarray, units: Units, rng: np.random.Generator) -> Batch:
    """A packed batch (ids, targets, segments, positions i32[B, T]) with `units.examples` groups of k - 1 PADs behind
    each window: those arrays and `group i32[B, N]` (0: text), `limit i32[B, N]` (the last position of the text that a
    token sees) and `weight f32[B, N]`, N = T + examples (k - 1). `sure bool[B, T]`: the targets that units are made of.
    """
    rows, length = batch["ids"].shape
    each, runs = units.k - 1, run_lengths(sure, batch["segments"])
    last = np.minimum(length, np.arange(length) + units.k) - 1  # the furthest target of an example, cut at the window
    whole = (np.arange(length) + units.k <= length) & (batch["segments"] == batch["segments"][:, last])
    extra = units.examples * each
    start, target = np.zeros((rows, units.examples), np.int64), np.zeros((rows, extra), np.int32)
    weight = np.zeros((rows, extra), np.float32)
    for row in range(rows):
        found = np.flatnonzero(whole[row] if units.outside > 0 else runs[row] > 1)
        found = np.sort(rng.permutation(found)[: units.examples])
        start[row, : len(found)] = found
        ahead = start[row][:, None] + 1 + np.arange(each)
        inside = np.arange(2, units.k + 1) <= runs[row, start[row]][:, None]
        live = (np.arange(units.examples) < len(found))[:, None] & (ahead < length)
        target[row] = batch["targets"][row, np.minimum(ahead, length - 1)].ravel()
        weight[row] = (live * np.where(inside, 1.0, units.outside)).ravel()
    at = np.repeat(start, each, 1)
    pick = lambda name: np.take_along_axis(batch[name], at, 1)  # noqa: E731
    used = np.repeat(weight.reshape(rows, units.examples, each).any(2), each, 1)
    ahead = np.tile(np.arange(1, units.k, dtype=np.int32), units.examples)
    group = np.repeat(np.arange(1, units.examples + 1, dtype=np.int32), each)
    parts = {
        "ids": np.full((rows, extra), units.pad, np.int32),
        "targets": target,
        "segments": pick("segments"),
        "positions": np.where(used, pick("positions") + ahead, -1),
        "group": np.broadcast_to(group, (rows, extra)),
        "limit": pick("positions"),
        "weight": weight,
    }
    text = {"group": np.zeros_like(batch["ids"]), "limit": batch["positions"], "weight": np.ones((rows, length))}
    whole_batch = {name: np.concatenate([{**batch, **text}[name], part], 1) for name, part in parts.items()}
    return {name: x.astype(np.float32 if name == "weight" else np.int32) for name, x in whole_batch.items()}


def visibility(batch) -> jax.Array:
    """Who sees whom, bool[B, N, N]: text up to a token's limit, and the PADs of its own example so far."""
    segments, group, limit, positions = (batch[name] for name in ("segments", "group", "limit", "positions"))
    text = (group == 0)[:, None, :] & (positions[:, None, :] <= limit[:, :, None])
    own = (group > 0)[:, None, :] & (group[:, :, None] == group[:, None, :])
    own &= positions[:, None, :] <= positions[:, :, None]
    return (segments[:, :, None] == segments[:, None, :]) & (text | own)


@dataclasses.dataclass(frozen=True, eq=False)
class LexicalUnits:
    """Completed steps -> a batch of `stream` with PAD examples, units by the confidence of `params` (see above)."""

    stream: Callable[[int], Batch]
    step: Any
    params: Any
    units: Units
    seed: int = 0

    def __call__(self, step: int) -> Batch:
        """ids, targets, segments, positions, group, limit i32[B, N] and weight f32[B, N]."""
        batch = self.stream(step)
        sure = np.asarray(probabilities(self.step, self.params, batch)) >= self.units.theta
        return add_examples(batch, sure, self.units, np.random.default_rng((self.seed, step)))


@dataclasses.dataclass(frozen=True)
class PadTokens:
    """The objective `(params, batch, key[, frozen]) -> (loss in nats, metrics)`: the weighted mean over text and PADs.

    `frozen`: the other part of `quant.adapter.split`; None: the params are a whole model. Metrics: `weight`, and the
    mean losses of both kinds, `text` and `pads`.
    """

    step: Any

    def __call__(self, params, batch, key, frozen=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        whole = params if frozen is None else join(params, frozen)
        output, _ = self.step(whole, batch["ids"], batch["positions"], mask=visibility(batch))
        losses = next_token_losses(self.step, whole, output.hidden, batch["targets"])
        weight = batch["weight"]
        pads = weight * (batch["group"] > 0)
        mean = lambda w: (losses * w).sum() / jnp.maximum(w.sum(), 1e-9)  # noqa: E731
        return mean(weight), {"weight": weight.sum(), "text": mean(weight - pads), "pads": mean(pads)}
