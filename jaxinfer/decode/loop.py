"""The decoding loop: one step for every method, and `generate`, which runs it to the end in one compiled program.

    propose -> score -> warp -> verify -> emit -> commit -> observe

`start` prefills, `advance` runs some steps, `generate` both; `select`, `place` and `reorder` move rows, so that beams,
particles and a batch job with refilled slots need nothing else. All are pure functions to be run under the caller's
jit, with `step` and `config` static.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from jaxinfer import cache as kv
from jaxinfer.decode import keys as key_streams
from jaxinfer.decode.config import Config, end_tokens
from jaxinfer.decode.emit import emit
from jaxinfer.decode.logprobs import TokenLogprobs
from jaxinfer.decode.prefill import notes_of, prefill
from jaxinfer.decode.sampling import Features, History, Sampling, Warp
from jaxinfer.decode.tree import slots_of, visibility
from jaxinfer.decode.types import Proposal, Reason, Scored, Sequence, Slots, Stats, Step, Verdict
from jaxinfer.errors import ConfigError, InputError


@struct.dataclass
class State:
    """Everything that a run carries; each array leads with the batch axis. `features` is static."""

    seq: Sequence
    cache: kv.Cache
    drafter: Any
    sampling: Sampling
    history: History | None
    logprobs: TokenLogprobs | None
    stats: Stats
    features: Features = struct.field(pytree_node=False, default=Features())


@struct.dataclass
class Result:
    """`tokens i32[B, max_tokens]`: the output without the prompt, the end token included, 0 after `lengths i32[B]`.
    `finish_reason i32[B]` (`Reason`); `logprobs` where asked for. With n samples a prompt, rows run prompt-major."""

    tokens: jax.Array
    lengths: jax.Array
    finish_reason: jax.Array
    logprobs: TokenLogprobs | None
    stats: Stats


def generate(
    step: Step,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: Config,
    key: jax.Array,
    sampling: Sampling | None = None,
    row_ids: jax.Array | None = None,
    draft_params: Any = None,
) -> Result:
    """Continue the prompts `tokens i32[B, P]` (right-padded, `lengths i32[B]`, 1 to P) until every row is done.

    `key`: one `jax.random.key`; a row's draws come from it, `row_ids i32[B]` (its place, when None) and the sample
    index alone. `sampling`: per-row parameters in place of the config's. Raises InputError for shapes and types, and
    outside jit for lengths that do not fit; inside jit a row of impossible length ends with `Reason.ERROR`.
    """
    state = begin(
        step, params, tokens, lengths,
        config=config, key=key, sampling=sampling, row_ids=row_ids, draft_params=draft_params,
    )  # fmt: skip
    return result(_steps(step, params, state, None, config=config, draft_params=draft_params), config)


def begin(
    step: Step,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: Config,
    key: jax.Array,
    sampling: Sampling | None = None,
    row_ids: jax.Array | None = None,
    draft_params: Any = None,
) -> State:
    """What `generate` does before its first step: keys, prefill, and the n samples' rows. Same arguments and errors."""
    own = sampling is None
    if sampling is None:
        sampling = config.sampling(tokens.shape[0], end_tokens(step))
    row_ids = jnp.arange(tokens.shape[0]) if row_ids is None else row_ids
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    state = start(
        step, params, tokens, lengths, sampling, key_streams.row_keys(key, row_ids),
        config=config, capacity=tokens.shape[1] + config.max_tokens, draft_params=draft_params,
        features=config.features_for(own=own),
    )  # fmt: skip
    return state if config.n == 1 else repeat(state, config.n, key, row_ids)


def start(
    step: Step,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    keys: jax.Array,
    *,
    config: Config,
    capacity: int,
    draft_params: Any = None,
    features: Features | None = None,
) -> State:
    """Prefill `tokens i32[B, P]` in chunks, committing `lengths - 1` of them and reading no logits.

    `keys[B]`: row keys (`keys.row_keys`). `capacity`: tokens a row can hold, prompt included. A row's output ends there
    at the latest, and at `config.max_tokens`. `features` None: the config's, or everything. Errors as for `generate`.
    """
    check_prompts(tokens, lengths, capacity)
    vocab = getattr(config.drafter, "vocab_size", step.vocab_size)
    if vocab != step.vocab_size:
        raise ConfigError(f"the drafter's vocabulary has {vocab} tokens, the model's {step.vocab_size}")
    features = config.features_for(own=False) if features is None else features
    batch, width = tokens.shape
    length = jnp.asarray(lengths, jnp.int32)
    fits = (length >= 1) & (length <= width)
    limit = jnp.minimum(length + jnp.minimum(sampling.max_tokens, config.max_tokens), capacity)
    reason = jnp.where(limit <= length, jnp.int32(Reason.LENGTH), jnp.int32(Reason.RUNNING))
    reason = jnp.where(fits, reason, jnp.int32(Reason.ERROR))
    length = jnp.clip(length, 1, width)
    buffer = jnp.pad(jnp.asarray(tokens, jnp.int32), ((0, 0), (0, capacity - width)))
    seq = Sequence(buffer, length, length, limit, reason != 0, reason, keys, step.vocab_size)
    cache = step.new_cache(batch, capacity)
    drafter = config.drafter.init(draft_params, params, seq, cache)
    cache, drafter, finite = prefill(
        step, params, cache, seq, width=width, chunk=config.prefill_chunk,
        drafter=config.drafter, draft_params=draft_params, state=drafter,
    )  # fmt: skip
    drafter = config.drafter.ready(draft_params, drafter, seq, cache, target_params=params)
    reason = jnp.where(finite, reason, jnp.int32(Reason.ERROR))
    counts = jnp.zeros((batch, config.drafter.depth), jnp.int32)
    zeros = jnp.zeros(batch, jnp.int32)
    return State(
        dataclasses.replace(seq, done=reason != 0, reason=reason),
        cache,
        drafter,
        sampling,
        History.of(seq, step.vocab_size) if features.penalties else None,
        None if config.logprobs is None else TokenLogprobs.empty(batch, config.max_tokens, config.logprobs),
        Stats(zeros, zeros, counts, counts),
        features,
    )


def advance(
    step: Step, params: Any, state: State, *, config: Config, steps: int | jax.Array, draft_params: Any = None
) -> State:
    """Up to `steps` steps, fewer once every row is done."""
    return _steps(step, params, state, steps, config=config, draft_params=draft_params)


def _steps(
    step: Step, params: Any, state: State, most: int | jax.Array | None, *, config: Config, draft_params: Any
) -> State:
    """Steps until every row is done, `most` of them where that is given.

    Where the drafter knows that no row will draft, and lets the forward shrink that far (`widths`), a step is a plain
    one. Each kind has a loop of its own inside the loop: a branch would copy the cache, which a loop hands on.
    """
    drafter = config.drafter

    def live(carry):
        going = ~carry[1].seq.done.all()
        return going if most is None else going & (carry[0] < most)

    def idle(carry):
        rows: Any = drafter.idle(draft_params, carry[1].drafter, carry[1].seq)
        return (rows | carry[1].seq.done).all()

    def drafted(carry):
        return carry[0] + 1, advance_once(step, params, carry[1], config=config, draft_params=draft_params)

    def plain(carry):
        return carry[0] + 1, _plain_once(step, params, carry[1], config=config, draft_params=draft_params)

    carry = (jnp.int32(0), state)
    if 0 not in drafter.widths or drafter.idle(draft_params, state.drafter, state.seq) is None:
        return jax.lax.while_loop(live, drafted, carry)[1]

    def both(carry):
        carry = jax.lax.while_loop(lambda carry: live(carry) & idle(carry), plain, carry)
        return jax.lax.while_loop(lambda carry: live(carry) & ~idle(carry), drafted, carry)

    return jax.lax.while_loop(live, both, carry)[1]


def advance_once(step: Step, params: Any, state: State, *, config: Config, draft_params: Any = None) -> State:
    """One step: at most `drafter.depth + 1` tokens for every row that is not done."""
    proposal, state = propose(params, state, config=config, draft_params=draft_params)
    scored, blocks, verdict = _judge(step, params, state, proposal, config)
    return settle(state, proposal, scored, blocks, verdict, config=config, draft_params=draft_params)


def _plain_once(step: Step, params: Any, state: State, *, config: Config, draft_params: Any) -> State:
    """One step without drafts, which the drafter is not asked for: `observe` is given a proposal of none."""
    none = jnp.zeros((state.seq.length.shape[0], 0), jnp.int32)
    proposal = Proposal.of_chain(none, none.astype(bool))
    scored, blocks = score(step, params, state, proposal, config=config)
    verdict = verify(state, proposal, scored, config=config)
    return settle(state, proposal, scored, blocks, verdict, config=config, draft_params=draft_params)


def propose(
    params: Any, state: State, *, config: Config, draft_params: Any = None, known: jax.Array | None = None
) -> tuple[Proposal, State]:
    """A step's first part: the drafts, and the state with what the drafter remembers of them.

    The parts make a step in one program (`advance_once`), or several where the host has something to say between them:
    it may change the drafts before `score`, and hand a grammar's masks to `verify`. `known u32[B, K, ceil(V / 32)]`:
    the masks of the first K depths, where the way there is known before anything is drafted; for the drafter's law.
    """
    seq = state.seq
    key = key_streams.step_keys(seq.key, seq.length)
    warp = Warp(state.sampling, state.features, seq, state.history, config.processors, known=known)
    proposal, pending = config.drafter.propose(
        draft_params, state.drafter, seq, state.cache, key, target_params=params, warp=warp
    )
    return within_limit(proposal, seq), dataclasses.replace(state, drafter=pending)


def score(
    step: Step, params: Any, state: State, proposal: Proposal, *, config: Config, room: int | None = None
) -> tuple[Scored, Any]:
    """A step's second part: the target over the root and the drafts, in Blocks of `room` slots (None: as many as there
    are). Reads the cache and leaves it as it is."""
    seq, slots = state.seq, slots_of(proposal)
    tokens = jnp.concatenate([seq.root[:, None], proposal.tokens], 1)
    room = room or tokens.shape[1]
    positions = seq.length[:, None] - 1 + slots.depth
    live = jnp.concatenate([~seq.done[:, None], proposal.valid], 1)
    positions = jnp.where(live, positions, -1)
    mask = None if proposal.chain else visibility(slots)
    if mask is not None and mask.shape[2] < room:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, room - mask.shape[2])))
    blocks = kv.new_blocks(state.cache, room)
    inputs = _inputs(step, params, tokens, proposal)
    output, blocks = step(params, inputs, positions, state.cache, blocks, 0, mask, taps=config.drafter.taps)
    return Scored(tokens, step.head(params, output.hidden), output), blocks


def verify(
    state: State, proposal: Proposal, scored: Scored, *, config: Config, masks: jax.Array | None = None
) -> Verdict:
    """A step's third part: warp and verify. `masks u32[B, R, ceil(V / 32)]`: the tokens that a grammar allows after
    each slot, a bit each, lowest first (`sampling.Warp`)."""
    seq, slots = state.seq, slots_of(proposal)
    warp = Warp(state.sampling, state.features, seq, state.history, config.processors, masks)
    verifier = config.verifier_for(state.features, chain=proposal.chain)
    law = warp(scored.logits, slots) if verifier.reads == "logprobs" else warp.scores(scored.logits, slots)
    return verifier.verify(law, proposal, key_streams.step_keys(seq.key, seq.length))


def settle(
    state: State,
    proposal: Proposal,
    scored: Scored,
    blocks: Any,
    verdict: Verdict,
    *,
    config: Config,
    draft_params: Any = None,
) -> State:
    """A step's last part: emit, commit, observe."""
    seq, drafter = state.seq, config.drafter
    new, emission = emit(seq, proposal, verdict, state.sampling.eos)
    # The kept count depends on the logits (they must be finite), so every read of the cache comes before this write
    # and XLA updates the buffers in place.
    path = jnp.maximum(verdict.path, 0)
    cache = kv.commit(state.cache, blocks, path, emission.n, notes_of(scored.output))
    logprobs = state.logprobs
    if logprobs is not None:
        logprobs = logprobs.extend(scored.logits, proposal, verdict, emission, seq.length - seq.prompt_length)
    return State(
        new,
        cache,
        drafter.observe(draft_params, state.drafter, new, proposal, scored, verdict, emission.n, cache),
        state.sampling,
        None if state.history is None else state.history.extend(emission.tokens, emission.n),
        logprobs,
        _count(state.stats, seq, proposal, slots_of(proposal), verdict.n_accepted, emission.n),
        state.features,
    )


def result(state: State, config: Config) -> Result:
    """The output so far, as Result has it."""
    seq = state.seq
    index = jnp.arange(config.max_tokens, dtype=jnp.int32)[None]
    n = seq.length - seq.prompt_length
    tokens = jnp.take_along_axis(seq.tokens, seq.prompt_length[:, None] + index, 1, mode="clip")
    return Result(jnp.where(index < n[:, None], tokens, 0), n, seq.reason, state.logprobs, state.stats)


def select(state: Any, rows: jax.Array) -> Any:
    """The state with row `rows[i]` in row i, keys included: replication, compaction. `rows i32[n]`, any n."""
    return _map_rows(lambda leaf: leaf[rows], lambda cache: kv.select(cache, rows), state)


def place(state: Any, rows: jax.Array, other: Any) -> Any:
    """The state with row i of `other` written over row `rows[i]`; a row number out of range is dropped."""

    def write(leaf, new):
        return leaf.at[rows].set(new, mode="drop")

    return _map_rows(write, lambda cache, new: kv.place(cache, rows, new), state, other)


def reorder(state: State, rows: jax.Array) -> State:
    """`select` with as many rows, that leaves each place its own key: beams and particles."""
    moved = select(state, rows)
    return dataclasses.replace(moved, seq=dataclasses.replace(moved.seq, key=state.seq.key))


def repeat(state: State, n: int, key: jax.Array, row_ids: jax.Array) -> State:
    """Each row n times over, prompt-major, with the keys of sample indices 0 to n - 1."""
    batch = row_ids.shape[0]
    state = select(state, jnp.repeat(jnp.arange(batch), n))
    keys = key_streams.row_keys(key, jnp.repeat(row_ids, n), jnp.tile(jnp.arange(n), batch))
    return dataclasses.replace(state, seq=dataclasses.replace(state.seq, key=keys))


def finish(state: State, rows: jax.Array, reason: Reason = Reason.STOP) -> State:
    """End the rows of `rows bool[B]` that still run: a stop string found by the host, a cancelled request."""
    seq = state.seq
    ends = rows & ~seq.done
    why = jnp.where(ends, jnp.int32(reason), seq.reason)
    return dataclasses.replace(state, seq=dataclasses.replace(seq, done=seq.done | ends, reason=why))


def check_prompts(tokens: jax.Array, lengths: jax.Array, capacity: int) -> None:
    """Raise InputError for prompts of the wrong shape or type, or too long; lengths are read where they can be."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InputError(f"tokens: got {tokens.dtype}{list(tokens.shape)}, accepts integers [batch, prompt length]")
    if lengths.shape != tokens.shape[:1]:
        raise InputError(f"lengths: got shape {list(lengths.shape)}, accepts {[tokens.shape[0]]}")
    if tokens.shape[1] < 1:
        raise InputError("tokens: got prompts of length 0; a prompt needs at least one token")
    if tokens.shape[1] > capacity:
        raise InputError(f"prompts of up to {tokens.shape[1]} tokens do not fit a capacity of {capacity}")
    if isinstance(lengths, Tracer):
        return
    found = np.asarray(lengths)
    bad = np.flatnonzero((found < 1) | (found > tokens.shape[1]))
    if bad.size:
        raise InputError(f"lengths[{bad[0]}]: got {found[bad[0]]}, accepts 1 to {tokens.shape[1]}")


def _judge(step, params, state: State, proposal: Proposal, config: Config) -> tuple[Scored, Any, Verdict]:
    """Score, warp, verify; at the smallest of the drafter's widths that holds every row's drafts."""
    whole = proposal.tokens.shape[1]

    def judge(part: Proposal):
        scored, blocks = score(step, params, state, part, config=config, room=whole + 1)
        return scored, blocks, verify(state, part, scored, config=config)

    widths = sorted({n for n in config.drafter.widths if n < whole} | {whole})
    if len(widths) == 1:
        return judge(proposal)

    def at(width: int):
        scored, blocks, verdict = judge(proposal.leading(width))
        tokens, logits = (_lengthened(x, whole + 1) for x in (scored.tokens, scored.logits))
        scored = Scored(tokens, logits, _lengthened_output(scored.output, whole + 1))
        path = _lengthened(verdict.path, proposal.depth + 1, fill=-1)
        return scored, blocks, dataclasses.replace(verdict, path=path)

    used = jnp.where(proposal.valid, jnp.arange(1, whole + 1), 0).max()
    which = (used > jnp.asarray(widths[:-1])).sum()
    return jax.lax.switch(which, [functools.partial(at, width) for width in widths])


def _inputs(step, params, tokens: jax.Array, proposal: Proposal) -> jax.Array:
    """What the model is fed: `tokens i32[B, R]`, or embeddings [B, R, D] where probes have their own."""
    if proposal.embeddings is None or proposal.probe is None:
        return tokens
    if not hasattr(step, "embed"):
        raise ConfigError(f"{type(step).__name__} has no `embed`, which a drafter whose probes are embeddings needs")
    known = step.embed(params, tokens)
    own = jnp.where(proposal.probe[..., None], proposal.embeddings.astype(known.dtype), known[:, 1:])
    return jnp.concatenate([known[:, :1], own], 1)


def _lengthened(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """`x[B, R, ...]` with axis 1 filled up to `size`."""
    pad = [(0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, pad, constant_values=fill)


def _lengthened_output(output: Any, size: int) -> Any:
    if any(note is not None for note in notes_of(output) or ()):
        raise ConfigError("a cache that takes notes needs a drafter without widths")
    taps = tuple(_lengthened(x, size) for x in getattr(output, "taps", ()))
    return dataclasses.replace(output, hidden=_lengthened(output.hidden, size), **({"taps": taps} if taps else {}))


def within_limit(proposal: Proposal, seq: Sequence) -> Proposal:
    """Without the drafts that could not be emitted any more, and without any for rows that are done."""
    if proposal.tokens.shape[1] == 0:
        return proposal
    room = jnp.where(seq.done, 0, seq.limit - seq.length)
    valid = proposal.valid & (slots_of(proposal).depth[:, 1:] <= room[:, None])
    return dataclasses.replace(proposal, valid=valid)


def _count(stats: Stats, seq: Sequence, proposal: Proposal, slots: Slots, accepted: jax.Array, n: jax.Array) -> Stats:
    depths = stats.proposed_by_depth.shape[1]
    stats = dataclasses.replace(stats, forwards=stats.forwards + ~seq.done, emitted=stats.emitted + n)
    if depths == 0 or proposal.tokens.shape[1] == 0:
        return stats
    depth = jnp.arange(1, depths + 1, dtype=jnp.int32)
    usable = proposal.valid if proposal.probe is None else proposal.valid & ~proposal.probe
    offered = (usable[..., None] & (slots.depth[:, 1:, None] == depth)).any(1)
    taken = (accepted[:, None] >= depth) & ~seq.done[:, None]
    return dataclasses.replace(
        stats, proposed_by_depth=stats.proposed_by_depth + offered, accepted_by_depth=stats.accepted_by_depth + taken
    )


def _map_rows(on_leaf, on_cache, tree, *others):
    def apply(leaf, *rest):
        return on_cache(leaf, *rest) if isinstance(leaf, kv.Cache) else on_leaf(leaf, *rest)

    return jax.tree.map(apply, tree, *others, is_leaf=lambda x: isinstance(x, kv.Cache))
