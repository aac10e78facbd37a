"""Models small enough to enumerate, for the decoding tests.

`Markov`: logits depend on the position and the last token alone, so a law over sequences is a product of table rows and
ten thousand rows decode in a second. `Attentive`: one hand-written attention layer over a real cache, so that a wrong
position, a lost or a stale key changes its output. `drafts` and planted bugs live in the tests that use them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.cache.base import SpecBase
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.ops.position import Rope


@struct.dataclass
class Output:
    hidden: jax.Array


@struct.dataclass
class Count:
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class CountSpec(SpecBase):
    """A cache that only counts: enough for a model without memory, and it shows the invariant t = length - 1."""

    def init(self, batch):
        return Count(jnp.zeros(batch, jnp.int32))

    def new_block(self, batch, slots):
        return jnp.zeros((batch, slots), jnp.int32)

    def commit(self, state, block, path, n, notes=None):
        return Count(state.t + n)


@dataclasses.dataclass(frozen=True)
class Markov:
    """params `{"table": f32[P, V, V]}`: logits after token a at position t are `table[t % P, a]`."""

    vocab_size: int
    period: int = 7

    def __call__(self, params, inputs, positions, cache=None, block=None, at=0, mask=None, *, taps=()):
        hidden = params["table"][jnp.maximum(positions, 0) % self.period, inputs]
        return Output(hidden), block

    def head(self, params, hidden):
        return hidden

    def new_cache(self, batch, capacity):
        return kv.init((CountSpec(),), batch)

    def params(self, seed, scale=1.5):
        shape = (self.period, self.vocab_size, self.vocab_size)
        return {"table": scale * jax.random.normal(jax.random.key(seed), shape)}


@dataclasses.dataclass(frozen=True)
class Attentive:
    """A brought model: embedding, one rotary attention layer over a dense cache, a residual, a head."""

    vocab_size: int
    width: int = 16

    @property
    def attention(self):
        return AttentionSpec(2, 1, self.width // 2, 1.0, Rope(self.width // 2))

    def __call__(self, params, inputs, positions, cache=None, block=None, at=0, mask=None, *, taps=()):
        batch, length = inputs.shape
        x = params["embedding"][inputs]

        def heads(name, n):
            y = x @ params[name]
            return jnp.swapaxes(y.reshape(batch, length, n, self.width // 2), 1, 2)

        cache = self.new_cache(batch, 1) if cache is None else cache
        block = kv.new_blocks(cache, length) if block is None else block
        own = kv.write_block(block[0], heads("k", 1), heads("v", 1), positions, at)
        part, _ = cache.specs[0].attend(cache.states[0], own, heads("q", 2), positions, mask)
        out = jnp.swapaxes(part.out, 1, 2).reshape(batch, length, self.width)
        return Output(jnp.tanh(x + out)), (own,)

    def head(self, params, hidden):
        return hidden @ params["head"]

    def new_cache(self, batch, capacity):
        return kv.init((kv.Dense(self.attention, capacity),), batch)

    def params(self, seed, scale=1.0):
        shapes = {
            "embedding": (self.vocab_size, 16),
            "q": (16, 16),
            "k": (16, 8),
            "v": (16, 8),
            "head": (16, self.vocab_size),
        }
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        weights = {n: jax.random.normal(k, s) * s[0] ** -0.5 for (n, s), k in zip(shapes.items(), keys, strict=True)}
        weights["embedding"] *= 4
        weights["head"] *= 3 * scale
        return weights


def prompts(seed, batch, width, vocab, *, lengths=None):
    """Random right-padded prompts `(tokens, lengths)`; the padding is poisoned with a real token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch, width)).astype(np.int32)
    lengths = rng.integers(1, width + 1, batch) if lengths is None else np.asarray(lengths)
    return jnp.asarray(tokens), jnp.asarray(lengths.astype(np.int32))


def sequence_law(rows, length):
    """Exact law over all `V ** length` sequences: `rows(prefix) -> [V]` probabilities of the next token."""
    law = {(): 1.0}
    for _ in range(length):
        law = {(*prefix, token): mass * p for prefix, mass in law.items() for token, p in enumerate(rows(prefix))}
    return law


def chi_square(samples, law):
    """z-score of the chi-square of `samples i32[N, L]` against `law` (cells under 5 expected merged), and TV."""
    vocab = 1 + max(max(sequence) for sequence in law)
    keys = list(law)
    length = len(keys[0])
    code = (samples * vocab ** np.arange(length)[::-1]).sum(1)
    index = {int(np.dot(k, vocab ** np.arange(length)[::-1])): i for i, k in enumerate(keys)}
    observed = np.zeros(len(keys))
    impossible = 0
    for c, count in zip(*np.unique(code, return_counts=True), strict=True):
        if c in index:
            observed[index[c]] += count
        else:
            impossible += count
    expected = np.array([law[k] for k in keys]) * len(samples)
    impossible += observed[expected == 0].sum()
    if impossible:
        return np.inf, 1.0
    tv = 0.5 * np.abs(observed - expected).sum() / len(samples)
    big = expected >= 5
    o = np.append(observed[big], observed[~big].sum())
    e = np.append(expected[big], expected[~big].sum())
    o, e = o[e > 0], e[e > 0]
    freedom = len(e) - 1
    return float((((o - e) ** 2 / e).sum() - freedom) / np.sqrt(2 * freedom)), float(tv)


def all_sequences(vocab, length):
    return np.array(list(itertools.product(range(vocab), repeat=length)), np.int32)


def cache_copies(compiled, cache):
    """Copies of buffers as large as a cache leaf inside the compiled program's loop bodies: a list of HLO lines."""
    shapes = {"f32[" + ",".join(map(str, leaf.shape)) + "]" for leaf in jax.tree.leaves(cache.states) if leaf.ndim == 4}
    text = compiled.as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, current = [], None
    for line in text.splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line.strip())
        if start:
            current = start.group(1)
        if " copy(" in line and any(shape in line for shape in shapes):
            if current in bodies or "wrapped_copy" in line or "fusion" not in (current or ""):
                found.append(f"{current}: {line.strip()}")
    return found
