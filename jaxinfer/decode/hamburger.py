"""HAMburger generation: several tokens a forward of the base, and one cache entry for all of them.

Liu and Zhang 2025 (arXiv:2505.20438); paper: at most 4 tokens a group, confidence 0.9 (0.8 in its evaluations). A macro
step feeds the last group as one embedding at the position of its last token, commits one entry, and writes the next
group: its first token from the base's head, others from the micro-step decoder for as long as
`1 - p(this is the last) >= confidence`. Nothing is verified. Guarantee: approximate; with `confidence` 1 nothing is
merged, and the output, greedy or sampled, is that of plain decoding with the base (as fine-tuned).

State: that of the decoding loop, in which the cache holds one entry a macro step and not one a token (`cache.t` counts
them), and the last group. The prompt is one entry a token, as in published generation and in our training.
Departures: published generation places a group one position late and lets an end token inside a group pass; here it
stands where training put it, and an end token ends the output. A cache has room for every token as it comes, since
nothing bounds the groups from below; `room` makes it smaller, and an output ends where it is full.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import cache as kv
from jaxinfer.decode import keys as key_streams
from jaxinfer.decode import loop
from jaxinfer.decode.autoregressive import Autoregressive
from jaxinfer.decode.config import Config
from jaxinfer.decode.draft_chain import Law
from jaxinfer.decode.emit import emit
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.loop import Result, State, check_prompts
from jaxinfer.decode.prefill import notes_of
from jaxinfer.decode.sampling import Sampling, Warp
from jaxinfer.decode.types import Proposal, Reason, Sequence, Verdict
from jaxinfer.errors import ConfigError
from jaxinfer.models.hamburger import Hamburger
from jaxinfer.models.step import Step

# (logits f32[B, 1, V], the group so far i32[B, S], its length) -> (the next token i32[B], what to note of it f32[B])
Choose = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


@struct.dataclass
class Group:
    """Tokens that are fed as one: the first `n i32[B]` of `tokens i32[B, S]`."""

    tokens: jax.Array
    n: jax.Array


@dataclasses.dataclass(frozen=True)
class Smashing:
    """Static part of a run, beside the decoding `Config`. `confidence`: the least probability that a token is not its
    group's last at which the group goes on (1: never). `room`: cache entries a token of output."""

    confidence: float = 0.9
    room: float = 1.0

    def __post_init__(self):
        for name in ("confidence", "room"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, accepts more than 0, at most 1")


@dataclasses.dataclass(frozen=True)
class _Roomy(Step):
    """A Step whose caches hold `entries` whatever capacity is asked for."""

    entries: int = 0

    def new_cache(self, batch: int, capacity: int) -> kv.Cache:
        return super().new_cache(batch, self.entries)


def generate(
    model: Hamburger,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: Config,
    key: jax.Array,
    smashing: Smashing = Smashing(),
    sampling: Sampling | None = None,
    row_ids: jax.Array | None = None,
) -> Result:
    """Continue the prompts `tokens i32[B, P]` (right-padded, `lengths i32[B]`), as `decode.generate` does.

    `stats.forwards` counts macro steps. Raises as that does, and ConfigError for what is not to be had here: another
    drafter, log-probabilities, a cache that is not dense or a ring.
    """
    state = begin(
        model, params, tokens, lengths, config=config, key=key, smashing=smashing, sampling=sampling, row_ids=row_ids
    )
    state = advance(model, params, state, config=config, smashing=smashing, steps=config.max_tokens)
    return loop.result(state, config)


def begin(
    model: Hamburger,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: Config,
    key: jax.Array,
    smashing: Smashing = Smashing(),
    sampling: Sampling | None = None,
    row_ids: jax.Array | None = None,
) -> State:
    """What `generate` does before its first macro step; the state's `drafter` is the last `Group`."""
    if config.drafter != Autoregressive() or config.verifier is not None:
        raise ConfigError(f"drafter: got {config.drafter!r}, accepts none: nothing is drafted or verified here")
    if config.logprobs is not None:
        raise ConfigError(f"logprobs: got {config.logprobs!r}, accepts None here")
    step = model.base
    if smashing.room < 1:
        entries = tokens.shape[1] + math.ceil(config.max_tokens * smashing.room)
        step = _Roomy(step.config, step.cache, step.dtype, entries)
    for spec in jax.eval_shape(lambda: step.new_cache(1, 1)).specs:
        if not isinstance(spec, kv.Dense) or spec.blocks:
            raise ConfigError(
                f"cache: got {spec!r}, accepts Dense without blocks: entries stand at positions with gaps"
            )
    state = loop.begin(
        step, params["base"], tokens, lengths, config=config, key=key, sampling=sampling, row_ids=row_ids
    )
    root = jnp.pad(state.seq.root[:, None], ((0, 0), (0, model.size - 1)))
    return dataclasses.replace(state, drafter=Group(root, jnp.ones_like(state.seq.length)))


def advance(
    model: Hamburger,
    params: Any,
    state: State,
    *,
    config: Config,
    smashing: Smashing = Smashing(),
    steps: int | jax.Array,
) -> State:
    """Up to `steps` macro steps, fewer once every row is done."""

    def body(carry):
        return carry[0] + 1, advance_once(model, params, carry[1], config=config, smashing=smashing)

    return jax.lax.while_loop(lambda carry: (carry[0] < steps) & ~carry[1].seq.done.all(), body, (jnp.int32(0), state))[
        1
    ]


def advance_once(model: Hamburger, params: Any, state: State, *, config: Config, smashing: Smashing) -> State:
    """One macro step: 1 to S tokens for every row that is not done."""
    seq = state.seq
    warp = Warp(state.sampling, state.features, seq, state.history, config.processors)
    # The keys of plain decoding, so that without merging sampled output is plain too.
    key = key_streams.stream(key_streams.step_keys(seq.key, seq.length), Stream.BONUS)
    law = Law.of(model.base, params["base"], warp, key)

    def choose(logits, tokens, i):
        return law.choose(logits, tokens, i)[0], logits.max((1, 2))

    position = jnp.where(seq.done, -1, seq.length - 1)
    group, peaks, cache = _macro_step(model, params, state.cache, state.drafter, position, choose, smashing.confidence)
    used = jnp.arange(model.size) < group.n[:, None]
    finite = (jnp.isfinite(peaks) | ~used).all(1)
    proposal = Proposal.of_chain(group.tokens[:, :-1], jnp.ones_like(used[:, 1:]))
    last = jnp.take_along_axis(group.tokens, group.n[:, None] - 1, 1)[:, 0]
    verdict = Verdict(jnp.full_like(group.tokens, -1), group.n - 1, last, finite)
    new, emission = emit(seq, proposal, verdict, state.sampling.eos)
    return dataclasses.replace(
        state,
        seq=_end_if_full(new, cache),
        cache=cache,
        drafter=Group(group.tokens, jnp.maximum(emission.n, 1)),
        history=None if state.history is None else state.history.extend(emission.tokens, emission.n),
        stats=dataclasses.replace(
            state.stats, forwards=state.stats.forwards + ~seq.done, emitted=state.stats.emitted + emission.n
        ),
    )


def _end_if_full(seq: Sequence, cache: kv.Cache) -> Sequence:
    """Ends the rows whose next entry has no place in a dense cache; rings always have one."""
    capacity = [spec.capacity for spec in cache.specs if not spec.ring]
    if not capacity:
        return seq
    full = (cache.t >= min(capacity)) & ~seq.done
    return dataclasses.replace(seq, done=seq.done | full, reason=jnp.where(full, jnp.int32(Reason.LENGTH), seq.reason))


def score(
    model: Hamburger, params: Any, tokens: jax.Array, lengths: jax.Array, *, smashing: Smashing = Smashing()
) -> tuple[jax.Array, jax.Array]:
    """-log p f32[B, T] of each token of `tokens i32[B, T]` but the first (0 there and after `lengths i32[B]`), and the
    macro steps i32[B] that they took: what generation would have said of a text that it did not choose.

    A group's end depends on the tokens before it alone, so the probabilities of all texts sum to one.
    """
    batch, width = tokens.shape
    check_prompts(tokens, lengths, width)
    zeros = jnp.zeros(batch, jnp.int32)
    group = Group(jnp.pad(tokens[:, :1], ((0, 0), (0, model.size - 1))).astype(jnp.int32), zeros + 1)

    def read(at):
        return jnp.take_along_axis(tokens, jnp.minimum(at, width - 1)[:, None], 1)[:, 0].astype(jnp.int32)

    def body(carry):
        cache, group, at, nll, steps = carry
        live = at < lengths - 1

        def choose(logits, _, i):
            token = read(at + 1 + i)
            gold = jnp.take_along_axis(logits[:, 0], token[:, None], 1)[:, 0]
            return token, jax.nn.logsumexp(logits[:, 0], -1) - gold

        found, losses, cache = _macro_step(
            model, params, cache, group, jnp.where(live, at, -1), choose, smashing.confidence
        )
        n = jnp.where(live, jnp.minimum(found.n, lengths - 1 - at), 0)
        here = jnp.arange(model.size)[None]
        slots = jnp.where(here < n[:, None], at[:, None] + 1 + here, width)
        nll = jax.vmap(lambda row, slot, value: row.at[slot].set(value, mode="drop"))(nll, slots, losses)
        return cache, Group(found.tokens, jnp.maximum(n, 1)), at + n, nll, steps + live

    start = (model.base.new_cache(batch, width), group, zeros, jnp.zeros(tokens.shape), zeros)
    carry = jax.lax.while_loop(lambda carry: (carry[2] < lengths - 1).any(), body, start)
    return carry[3], carry[4]


def _macro_step(
    model: Hamburger, params: Any, cache: kv.Cache, group: Group, position: jax.Array, choose: Choose, confidence: float
) -> tuple[Group, jax.Array, kv.Cache]:
    """Feed a group at `position i32[B]` (-1: the row rests): the next group, its tokens' notes f32[B, S], the cache."""
    blocks = kv.new_blocks(cache, 1)
    output, blocks = model.macro(params, group.tokens[:, None], group.n[:, None], position[:, None], cache, blocks)
    new, notes = _write_group(model, params, output, choose, confidence, position >= 0)
    kept = (jnp.isfinite(output.hidden.astype(jnp.float32).sum((1, 2))) & (position >= 0)).astype(jnp.int32)
    return new, notes, kv.commit(cache, blocks, jnp.zeros_like(position)[:, None], kept, notes_of(output))


def _write_group(
    model: Hamburger, params: Any, output: Any, choose: Choose, confidence: float, live: jax.Array
) -> tuple[Group, jax.Array]:
    """The group after a macro step, and its tokens' notes. The micro decoder runs only while some row goes on."""
    batch, size, first = live.shape[0], model.size, model.num_features
    token, note = choose(model.head(params, output.hidden), jnp.zeros((batch, size), jnp.int32), 0)
    tokens = jnp.zeros((batch, size), jnp.int32).at[:, 0].set(token)
    notes = jnp.zeros((batch, size)).at[:, 0].set(note)
    n = jnp.ones(batch, jnp.int32)
    if confidence >= 1:
        return Group(tokens, n), notes

    def goes_on(hidden):
        return jax.nn.sigmoid(-model.stop(params, hidden[:, -1])) >= confidence

    micro = model.micro
    cache = micro.new_cache(batch, 1)  # stays empty: a group's own entries live in one Block
    features = model.features(params, output)[:, 0]

    def write(i, tokens, notes, n, going, blocks):
        inputs = model.micro_inputs(params, tokens[:, i - 1 : i], features.dtype)
        begin = 0 if i == 1 else first + i - 1
        inputs = jnp.concatenate([features, inputs], 1) if i == 1 else inputs
        at = jnp.broadcast_to(begin + jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape[:2])
        found, blocks = micro(params["micro"], inputs, at, cache, blocks, begin)
        hidden = found.hidden[:, -1:]
        token, note = choose(model.head(params, hidden), tokens, i)
        tokens, notes = tokens.at[:, i].set(token), notes.at[:, i].set(note)
        return tokens, notes, n + going, going & goes_on(hidden), blocks

    carry = (tokens, notes, n, live & goes_on(output.hidden), kv.new_blocks(cache, first + size - 1))
    for i in range(1, size):
        carry = jax.lax.cond(carry[3].any(), lambda *c, i=i: write(i, *c), lambda *c: c, *carry)
    return Group(carry[0], carry[2]), carry[1]
