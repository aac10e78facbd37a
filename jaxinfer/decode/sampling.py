"""From logits to the law of the next token: the rows' sampling parameters, and the warp that applies them.

Order: logit bias and bans, repetition penalty, presence and frequency penalties, the ban on end tokens before
`min_tokens`, forced tokens, the caller's processors, a grammar's masks; then temperature, top-k, top-p, min-p, as
Hugging Face does. Temperature 0 is the argmax as a one-hot law, ties to the lowest id. Top-p keeps the token that
crosses p. Tokens tied with the last one that top-k or top-p keeps are kept too, so a filter never depends on an order
of equals.

The repetition penalty (CTRL, Keskar et al. 2019, arXiv:1909.05858) counts prompt and output; the presence and
frequency penalties (OpenAI) the output only; all count the drafts on a slot's own path, so speculation changes nothing.
Top-p: Holtzman et al. 2019, arXiv:1904.09751. Min-p: Nguyen et al. 2024, arXiv:2407.01082.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxinfer.decode.draw import first_max
from jaxinfer.decode.filters import largest_count, nucleus
from jaxinfer.decode.types import Sequence, Slots
from jaxinfer.errors import ConfigError, InputError

Values = ArrayLike | list[int] | list[float] | tuple[int, ...]


@struct.dataclass
class Sampling:
    """Sampling parameters of each row; build one with `Sampling.make`. `f32[B]`: temperature, top_p, min_p and the
    penalties; `i32[B]`: top_k (0: off), min_tokens, max_tokens; lists padded with -1: `bias_ids i32[B, K]` with
    `bias_values f32[B, K]` (-inf bans), `forced i32[B, F]` (the token at each output index), `eos i32[B, E]`."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    min_tokens: jax.Array
    max_tokens: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    forced: jax.Array
    eos: jax.Array

    @classmethod
    def make(
        cls,
        batch: int,
        *,
        temperature: ArrayLike = 0.0,
        top_k: ArrayLike = 0,
        top_p: ArrayLike = 1.0,
        min_p: ArrayLike = 0.0,
        repetition_penalty: ArrayLike = 1.0,
        presence_penalty: ArrayLike = 0.0,
        frequency_penalty: ArrayLike = 0.0,
        min_tokens: ArrayLike = 0,
        max_tokens: ArrayLike = 128,
        bias_ids: Values = (),
        bias_values: Values = (),
        forced: Values = (),
        eos: Values = (),
    ) -> Sampling:
        """Parameters of `batch` rows, each a number for all rows or an array that leads with `batch`.

        Raises InputError, naming the parameter, where a value that can be read is out of range.
        """
        values = dict(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, min_tokens=min_tokens,
            max_tokens=max_tokens,
        )  # fmt: skip
        for name, value in values.items():
            check_range(name, value)
        integer = ("top_k", "min_tokens", "max_tokens")
        arrays = {
            name: jnp.broadcast_to(jnp.asarray(value, jnp.int32 if name in integer else jnp.float32), (batch,))
            for name, value in values.items()
        }
        lists = dict(bias_ids=bias_ids, bias_values=bias_values, forced=forced, eos=eos)
        for name, value in lists.items():
            value = jnp.asarray(value, jnp.float32 if name == "bias_values" else jnp.int32)
            arrays[name] = jnp.broadcast_to(value, (batch, value.shape[-1]))
        if arrays["bias_ids"].shape != arrays["bias_values"].shape:
            raise InputError(f"bias_ids and bias_values differ in shape: {bias_ids!r} and {bias_values!r}")
        return cls(**arrays)


_RANGES = {
    "temperature": (0.0, np.inf, "a number of 0 or more (0 is greedy)"),
    "top_k": (0, np.inf, "0 (off) or a positive count"),
    "top_p": (np.nextafter(0, 1), 1.0, "above 0 and at most 1"),
    "min_p": (0.0, 1.0, "0 to 1"),
    "repetition_penalty": (np.nextafter(0, 1), np.inf, "a number above 0 (1 is off)"),
    "presence_penalty": (-np.inf, np.inf, "a finite number"),
    "frequency_penalty": (-np.inf, np.inf, "a finite number"),
    "min_tokens": (0, np.inf, "0 or more"),
    "max_tokens": (0, np.inf, "0 or more"),
}


def check_range(name: str, value) -> None:
    """Raise InputError where a value of `name` is out of its range; traced values pass unread."""
    if isinstance(value, Tracer):
        return
    low, high, accepts = _RANGES[name]
    found = np.asarray(value, np.float64)
    bad = ~((found >= low) & (found <= high) & np.isfinite(found))
    if bad.any():
        raise InputError(f"{name}: got {found[bad].flat[0]:g}, accepts {accepts}")


class Processor(Protocol):
    """The caller's own rule on logits: frozen and hashable, and row by row."""

    def __call__(self, logits: jax.Array, seq: Sequence, slots: Slots) -> jax.Array:
        """`logits f32[B, R, V]` to the same shape; a slot's own drafts are `slots.tokens` under `slots.ancestors`."""
        ...


@dataclasses.dataclass(frozen=True)
class Features:
    """What an executable pays for. A feature that is off is not computed, whatever the rows' arrays hold."""

    sample: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    min_tokens: bool = False
    forced: bool = False

    @classmethod
    def everything(cls) -> Features:
        """All of them: right for any Sampling, and the slowest."""
        return cls(**{field.name: True for field in dataclasses.fields(cls)})

    @classmethod
    def of(cls, sampling: Sampling) -> Features:
        """The least that concrete `sampling` needs (on the host: it reads the arrays)."""
        s = jax.tree.map(np.asarray, sampling)
        warm = s.temperature > 0
        penalised = (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)
        return cls(
            sample=bool(warm.any()),
            top_k=bool((warm & (s.top_k > 0)).any()),
            top_p=bool((warm & (s.top_p < 1)).any()),
            min_p=bool((warm & (s.min_p > 0)).any()),
            penalties=bool(penalised.any()),
            bias=bool((s.bias_ids >= 0).any()),
            min_tokens=bool((s.min_tokens > 0).any()),
            forced=bool((s.forced >= 0).any()),
        )

    def __or__(self, other: Features) -> Features:
        """What either needs."""
        pairs = ((f.name, getattr(self, f.name) or getattr(other, f.name)) for f in dataclasses.fields(self))
        return Features(**dict(pairs))


@struct.dataclass
class History:
    """What the penalties count: `prompt bool[B, V]` and `output i32[B, V]`."""

    prompt: jax.Array
    output: jax.Array

    @classmethod
    def of(cls, seq: Sequence, vocab: int) -> History:
        """The counts of a sequence as it stands."""
        index = jnp.arange(seq.tokens.shape[1])[None]
        none = jnp.zeros((seq.length.shape[0], vocab), jnp.int32)
        is_prompt = index < seq.prompt_length[:, None]
        prompt = _count(none, seq.tokens, is_prompt)
        output = _count(none, seq.tokens, ~is_prompt & (index < seq.length[:, None]))
        return cls(prompt > 0, output)

    def extend(self, tokens: jax.Array, n: jax.Array) -> History:
        """With the first `n i32[B]` of `tokens i32[B, K]` appended to the output."""
        return dataclasses.replace(
            self, output=_count(self.output, tokens, jnp.arange(tokens.shape[1])[None] < n[:, None])
        )


def _count(counts: jax.Array, tokens: jax.Array, live: jax.Array) -> jax.Array:
    ids = jnp.where(live, tokens, counts.shape[1])
    return jax.vmap(lambda row, i: row.at[i].add(1, mode="drop"))(counts, ids)


def _unpacked(words: jax.Array, vocab: int) -> jax.Array:
    """`words u32[B, R, W]` as bool[B, R, V], a bit a token, lowest first."""
    bits = words[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return bits.reshape(*words.shape[:2], -1)[..., :vocab] > 0


@dataclasses.dataclass(frozen=True)
class Warp:
    """The target's rule from logits to the next token's law, for the rows of one step. Built anew inside each step.

    `masks u32[B, R, ceil(V / 32)]`: tokens that a grammar allows after each slot, a bit each, lowest first. `known
    u32[B, K, ceil(V / 32)]` are those of the first K depths, for a drafter whose slots the host has not seen.
    """

    sampling: Sampling
    features: Features
    seq: Sequence
    history: History | None = None
    processors: tuple[Processor, ...] = ()
    masks: jax.Array | None = None
    known: jax.Array | None = None

    @property
    def sampled(self) -> bool:
        """Whether any row may sample; static."""
        return self.features.sample

    def scores(self, logits: jax.Array, slots: Slots) -> jax.Array:
        """Bias, bans, penalties and forced tokens on `logits f32[B, R, V]`: what greedy decoding maximises."""
        f, s, x = self.features, self.sampling, logits
        ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, x.shape[-1]), 2)
        index = (self.seq.length - self.seq.prompt_length)[:, None] + slots.depth
        if f.bias and s.bias_ids.shape[1]:
            x = x + self._bias(x.shape[-1])[:, None]
        if f.penalties:
            x = self._penalise(x, slots, ids)
        if f.min_tokens:
            early = index < s.min_tokens[:, None]
            if self.masks is not None:
                early &= self._may_go_on(_unpacked(self.masks, x.shape[-1]), ids)
            for i in range(s.eos.shape[1]):
                x = jnp.where(early[..., None] & (ids == s.eos[:, i, None, None]), -jnp.inf, x)
        if f.forced and s.forced.shape[1]:
            last = s.forced.shape[1] - 1
            wanted = jnp.take_along_axis(s.forced, jnp.minimum(index, last), 1)
            wanted = jnp.where(index <= last, wanted, -1)[..., None]
            x = jnp.where(wanted < 0, x, jnp.where(ids == wanted, 0.0, -jnp.inf))
        for processor in self.processors:
            x = processor(x, self.seq, slots)
        if self.known is not None:
            last = self.known.shape[1] - 1
            depth = jnp.broadcast_to(slots.depth, x.shape[:2])[..., None]
            words = jnp.take_along_axis(self.known, jnp.minimum(depth, last), 1)
            x = jnp.where((depth > last) | _unpacked(words, x.shape[-1]), x, -jnp.inf)
        return x if self.masks is None else jnp.where(_unpacked(self.masks, x.shape[-1]), x, -jnp.inf)

    def __call__(self, logits: jax.Array, slots: Slots) -> jax.Array:
        """The normalised log-law f32[B, R, V] of each slot's next token."""
        x = self.scores(logits, slots)
        f, s = self.features, self.sampling
        peak, best = first_max(x)
        greedy = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 2) == best[..., None], 0.0, -jnp.inf)
        greedy = jnp.where(jnp.isfinite(peak)[..., None], greedy, jnp.nan)
        if not f.sample:
            return greedy
        cold = (s.temperature <= 0)[:, None, None]
        x = (x - peak[..., None]) / jnp.where(cold, 1.0, s.temperature[:, None, None])
        if f.top_k:
            x = largest_count(x, s.top_k[:, None])
        if f.top_p:
            x = nucleus(x, s.top_p[:, None])
        if f.min_p:
            x = jnp.where(x >= jnp.log(s.min_p)[:, None, None], x, -jnp.inf)
        return jnp.where(cold, greedy, x - jnp.log(jnp.exp(x).sum(-1, keepdims=True)))

    def _may_go_on(self, allowed: jax.Array, ids: jax.Array) -> jax.Array:
        """Where the grammar allows a token that is no end token, bool[B, R]: elsewhere the answer has to end."""
        for i in range(self.sampling.eos.shape[1]):
            allowed &= ids != self.sampling.eos[:, i, None, None]
        return allowed.any(-1)

    def _bias(self, vocab: int) -> jax.Array:
        s = self.sampling
        ids = jnp.where(s.bias_ids < 0, vocab, s.bias_ids)
        zeros = jnp.zeros((ids.shape[0], vocab))
        return jax.vmap(lambda row, i, value: row.at[i].add(value, mode="drop"))(zeros, ids, s.bias_values)

    def _penalise(self, x: jax.Array, slots: Slots, ids: jax.Array) -> jax.Array:
        s, history = self.sampling, self.history
        if history is None:
            raise ConfigError("penalties are on, but the State was started without them and counted no history")
        count = history.output[:, None].astype(jnp.float32)
        if slots.tokens.shape[1]:
            drafts = (slots.tokens[..., None] == ids).astype(jnp.float32)
            path = jnp.broadcast_to(slots.ancestors, (x.shape[0], *slots.ancestors.shape[1:])).astype(jnp.float32)
            count = count + jnp.einsum("brn,bnv->brv", path, drafts)
        seen = (count > 0) | history.prompt[:, None]
        repetition = s.repetition_penalty[:, None, None]
        x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
        x = x - s.frequency_penalty[:, None, None] * count
        return x - s.presence_penalty[:, None, None] * (count > 0)
