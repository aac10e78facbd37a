"""Models small enough to enumerate, for the decoding tests.

`Markov`: logits depend on the position and the last token alone, so a law over sequences is a product of table rows and
ten thousand rows decode in a second. `Attentive`: one hand-written attention layer over a real cache, so that a wrong
position, a lost or a stale key changes its output. `Scripted` drafts what it is told. Planted bugs live in the tests
that use them.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import cache as kv
from jaxinfer import decode
from jaxinfer.cache.base import SpecBase
from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.types import Proposal, Sequence
from jaxinfer.ops.attention import AttentionSpec
from jaxinfer.ops.position import Rope

# Compiling dominates these tests and the models are tiny: LLVM's optimisations are left out where speed is no claim.


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
    """params `{"table": f32[P, V, V]}`: logits after token a at position t are `table[t % P, a]`, after an embedding
    (one-hot for a token) their mixture."""

    vocab_size: int
    period: int = 7

    def __call__(
        self, params, inputs, positions, cache=None, block=None, at: jax.Array | int = 0, mask=None, *, taps=()
    ):
        level = jnp.maximum(positions, 0) % self.period
        if inputs.ndim == 2:
            return Output(params["table"][level, inputs]), block
        return Output(jnp.einsum("bta,btav->btv", inputs, params["table"][level])), block

    def embed(self, params, ids):
        return jax.nn.one_hot(ids, self.vocab_size)

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

    def __call__(
        self, params, inputs, positions, cache=None, block=None, at: jax.Array | int = 0, mask=None, *, taps=()
    ):
        batch, length = inputs.shape[:2]
        x = self.embed(params, inputs) if inputs.ndim == 2 else inputs

        def heads(name, n):
            y = x @ params[name]
            return jnp.swapaxes(y.reshape(batch, length, n, self.width // 2), 1, 2)

        cache = self.new_cache(batch, 1) if cache is None else cache
        block = kv.new_blocks(cache, length) if block is None else block
        own = kv.write_block(block[0], heads("k", 1), heads("v", 1), positions, at)
        part, _ = cache.specs[0].attend(cache.states[0], own, heads("q", 2), positions, mask)
        out = jnp.swapaxes(part.out, 1, 2).reshape(batch, length, self.width)
        return Output(jnp.tanh(x + out)), (own,)

    def embed(self, params, ids):
        return params["embedding"][ids]

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


@dataclasses.dataclass(frozen=True)
class Scripted(DrafterBase):
    """Drafts what its params say, `{"script": i32[B, T], "gamma": i32[B]}`, by position; the first gamma are valid.

    An oracle where the script is the target's own output, an adversary where it is wrong everywhere.
    """

    width: int

    @property
    def depth(self):
        return self.width

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        at = seq.length[:, None] + jnp.arange(self.width)
        tokens = jnp.take_along_axis(params["script"], at, 1, mode="clip")
        return Proposal.of_chain(tokens, jnp.arange(self.width) < params["gamma"][:, None]), state


@dataclasses.dataclass(frozen=True)
class Branching(Scripted):
    """A tree of five drafts whose right path is slots 2 and 5; params `{"script": ...}` as for Scripted."""

    width: int = 5
    parent: tuple = (0, 0, 1, 1, 2)
    depth: int = 2

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        at = seq.length[:, None] + jnp.arange(2)
        one, two = jnp.moveaxis(jnp.take_along_axis(params["script"], at, 1, mode="clip"), 1, 0)
        tokens = jnp.stack([one + 1, one, two, two + 1, two], 1) % 7
        parent = jnp.broadcast_to(jnp.asarray(self.parent, jnp.int32), tokens.shape)
        return Proposal(tokens, parent, jnp.ones(tokens.shape, bool), depth=2), state


class Run:
    """`decode.begin` and `decode.advance` of one step and config, each compiled once."""

    def __init__(self, step, config, jit=jax.jit):
        self.config = config
        self.begin = jit(functools.partial(decode.begin, step, config=config))
        self.advance = jit(functools.partial(decode.advance, step, config=config))

    def start(self, params, tokens, lengths, **kwargs):
        """The State after prefill; `key` 0 unless given."""
        return self.begin(params, tokens, lengths, **{"key": jax.random.key(0), **kwargs})

    def finish(self, params, state, draft_params=None):
        """The Result once every row is done."""
        return decode.result(self.advance(params, state, steps=1000, draft_params=draft_params), self.config)

    def __call__(self, params, tokens, lengths, **kwargs):
        state = self.start(params, tokens, lengths, **kwargs)
        return self.finish(params, state, kwargs.get("draft_params"))


def outputs(result):
    """Each row's output tokens as a list."""
    rows, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
    return [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]


def prompts(seed, batch, width, vocab, *, lengths=None):
    """Random right-padded prompts `(tokens, lengths)`; the padding is random tokens too."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (batch, width)).astype(np.int32)
    lengths = rng.integers(1, width + 1, batch) if lengths is None else np.asarray(lengths)
    return jnp.asarray(tokens), jnp.asarray(lengths.astype(np.int32))


def sequence(*rows, size=16, prompt=None, vocab_size=0):
    """A Sequence of the given rows of tokens, with rubbish after them; the first `prompt` of each are its prompt."""
    tokens = np.full((len(rows), size), 9, np.int32)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = values
    length = jnp.asarray([len(row) for row in rows], jnp.int32)
    zeros = jnp.zeros(len(rows), jnp.int32)
    prompts = length if prompt is None else zeros + prompt
    return Sequence(jnp.asarray(tokens), length, prompts, zeros + size, zeros > 0, zeros, zeros, vocab_size)


def law_of(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The warped law f64[V] of one slot's `logits f[V]`, by sorting: the oracle of `sampling.Warp`'s second half."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(logits))[int(np.argmax(logits))]
    p = np.exp((logits - logits.max()) / temperature)
    if top_k:
        p[p < np.sort(p)[::-1][min(top_k, len(p)) - 1]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    above = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    if top_p < 1:
        p[p < p[order][above < top_p].min()] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def sequence_law(rows, length):
    """Exact law over all possible sequences of `length` tokens: `rows(prefix) -> [V]` is the next token's."""
    law = {(): 1.0}
    for _ in range(length):
        law = {(*prefix, t): mass * p for prefix, mass in law.items() for t, p in enumerate(rows(prefix)) if p > 0}
    return law


def chi_square(samples, law):
    """z-score of the chi-square of `samples i32[N, L]` against `law` (cells under 5 expected merged), and TV."""
    keys = np.array(list(law))
    place = (1 + max(keys.max(), samples.max())) ** np.arange(keys.shape[1])[::-1]
    code = samples @ place
    index = {int(c): i for i, c in enumerate(keys @ place)}
    observed = np.zeros(len(keys))
    impossible = 0
    for c, count in zip(*np.unique(code, return_counts=True), strict=True):
        if c in index:
            observed[index[c]] += count
        else:
            impossible += count
    expected = np.array(list(law.values())) * len(samples)
    if impossible:
        return np.inf, 1.0
    tv = 0.5 * np.abs(observed - expected).sum() / len(samples)
    big = expected >= 5
    o = np.append(observed[big], observed[~big].sum())
    e = np.append(expected[big], expected[~big].sum())
    o, e = o[e > 0], e[e > 0]
    freedom = max(len(e) - 1, 1)
    return float((((o - e) ** 2 / e).sum() - freedom) / np.sqrt(2 * freedom)), float(tv)


def cache_copies(compiled, cache):
    """Lines of the compiled program that copy a buffer of the cache's shape inside a loop, or in what a loop calls."""
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(cache.states) if leaf.ndim >= 4}
    lines, calls, current = {}, {}, None
    for line in compiled.as_text().splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = head.group(1)
        if current:
            lines.setdefault(current, []).append(line.strip())
            calls.setdefault(current, set()).update(re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", line))
    bodies = set(re.findall(r"body=%?([\w.\-]+)", compiled.as_text()))
    assert bodies, "the compiled text has no loop to look into"
    reached = set()
    while bodies:
        reached |= bodies
        bodies = {callee for name in bodies for callee in calls.get(name, ())} - reached
    copy = re.compile(r"= \w+\[(" + "|".join(shapes) + r")\](?:\{[^}]*\})? copy\(")
    return [line for name in sorted(reached) for line in lines.get(name, ()) if copy.search(line)]
