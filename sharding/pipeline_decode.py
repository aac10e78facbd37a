"""Pipelined greedy decoding with SARATHI's micro-batches: a chunk of a waiting prompt and a group's tokens go together.

Groups of rows circulate through the stages of mesh axis "stage": a group's tokens leave the last stage and return to
the first while the other groups are under way. Every micro-batch has a fixed budget of `rows + chunk` token slots that
share each weight's one read; attention is each row's own. SARATHI: Agrawal, Panwar, Mohan, Kwatra, Gulavani, Ramjee
2023, arXiv:2308.16369 (Sarathi-Serve, 2024, arXiv:2403.02310, names the budget).

Guarantee: exact; token for token what greedy `decode.generate` gives, except at near-ties. State: each stage keeps the
caches of its own layers for all rows, the micro-batches that wait before it, and on the first stage each row's last
token. Defaults: as many groups as stages, the fewest that fill the pipeline; the paper's budget is 512 tokens (256 to
2048 by the latency asked for), ours is the caller's.
Departs: the table of micro-batches is made before the run from the lengths asked for (the papers' engines plan step by
step), so a row that meets an end token early is computed to its length and trimmed; a prompt's last token is fed as the
row's first decoding token, so that no chunk needs logits; slots without a token are computed too.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxinfer import cache as kv
from jaxinfer.cache.base import Block
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.decoder import DecoderLayer
from jaxinfer.models.step import AutoCache
from jaxinfer.ops.attention import AttentionSpec, Part
from jaxinfer.sharding import stages as cut
from jaxinfer.sharding.pipeline_schedule import IDLE, DecodeTable, Request, decode_table
from jaxinfer.sharding.stages import AXIS, Stages


@dataclasses.dataclass(frozen=True)
class Served:
    """`tokens i32[Q, max_tokens]` (0 after `lengths i32[Q]`, an end token included), the table that ran and the bubble
    that the stages counted as they ran it."""

    tokens: np.ndarray
    lengths: np.ndarray
    table: DecodeTable
    bubble: float


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a decoder is served: `rows` decoding slots a group, `chunk` prompt tokens a micro-batch, `groups` of rows.

    `axis`: the mesh axis of the stages; `data`: the axis over which requests are split, each part with its own rows
    under one table (made for the longest of the requests side by side: hand them over sorted by length); `heads`: the
    axis that splits the key-value heads of the caches (where the rules split them). Raises ConfigError for a mesh that
    does not fit.
    """

    step: Any
    mesh: Mesh
    stages: Stages
    rows: int = 4
    chunk: int = 32
    groups: int | None = None
    policy: str = "piggyback"
    axis: str = AXIS
    data: str | None = None
    heads: str | None = None

    def __post_init__(self):
        config = self.step.config
        self.stages.check(config.num_layers, self.mesh, self.axis)
        for name in (self.data, self.heads):
            if name is not None and name not in self.mesh.axis_names:
                raise ConfigError(f"mesh axis {name!r} is not there; the mesh has {', '.join(self.mesh.axis_names)}")
        if self.heads is not None and config.num_kv_heads % self.mesh.shape[self.heads]:
            parts = self.mesh.shape[self.heads]
            raise ConfigError(f"num_kv_heads is {config.num_kv_heads}: {parts} parts over {self.heads!r} do not fit")

    @property
    def num_groups(self) -> int:
        """Groups of rows."""
        return self.stages.num if self.groups is None else self.groups

    def table(self, prompts: Sequence[Sequence[int]], new: Sequence[int]) -> DecodeTable:
        """The table for these prompts, of which `new[i]` tokens are to follow; over data parts, for the longest."""
        parts = self.mesh.shape[self.data] if self.data else 1
        sizes = list(zip(map(len, prompts), new, strict=True))
        side = [sizes[i : i + parts] for i in range(0, len(sizes), parts)]
        requests = [Request(max(p for p, _ in one), max(n for _, n in one)) for one in side]
        return decode_table(
            requests, stages=self.stages.num, groups=self.num_groups, rows=self.rows, chunk=self.chunk,
            policy=self.policy,
        )  # fmt: skip

    def specs(self, capacity: int) -> tuple[Any, ...]:
        """The cache Spec of every layer. Layers of one slot have one shape: where a ring would meet a dense cache, all
        of the slot are dense (which gives the same answers); other caches must fit as they are."""
        step = self.step
        found = [step.cache.spec(step.config.attention(i), capacity, step.dtype) for i in range(step.config.num_layers)]
        for slot in range(self.stages.slots):
            own = [i for s in range(self.stages.num) if (i := self.stages.layer(s, slot)) is not None]
            if len({str(jax.eval_shape(functools.partial(found[i].init, 1))) for i in own}) == 1:
                continue
            if not isinstance(step.cache, AutoCache):
                raise ConfigError(f"the caches of layers {', '.join(map(str, own))}, in one slot of the stages, differ")
            for i in own:
                found[i] = kv.Dense(step.config.attention(i), capacity, step.dtype)
        return tuple(found)


def generate(
    pipeline: Pipeline, params: Any, prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int]
) -> Served:
    """Continue each prompt greedily by `max_tokens` (one number, or one a prompt) tokens, or up to an end token.

    `params`: staged and placed (`stages.split`, `stages.shardings`). Raises InputError for an empty prompt or one with
    a token that is none of the vocabulary, ConfigError for lengths below 1.
    """
    new = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
    if len(new) != len(prompts):
        raise InputError(f"max_tokens: got {len(new)} numbers for {len(prompts)} prompts")
    vocab = pipeline.step.vocab_size
    for i, prompt in enumerate(prompts):
        found = np.asarray(prompt)
        if found.ndim != 1 or not found.size or found.min() < 0 or found.max() >= vocab:
            raise InputError(f"prompt {i}: accepts one or more token ids of 0 to {vocab - 1}, got {prompt!r:.80}")
    table = pipeline.table(prompts, new)
    parts = pipeline.mesh.shape[pipeline.data] if pipeline.data else 1
    feeds = [_feed(pipeline, table, prompts[d::parts], new[d::parts]) for d in range(parts)]
    work = np.asarray(table.work(), np.int32)
    length = 1 << (len(work) - 1).bit_length()  # programs are compiled for powers of two, and run as long as asked
    padded = np.pad(work, ((0, length - len(work)), (0, 0)), constant_values=IDLE)
    shape = (-(-len(prompts) // parts), max(new), max(map(len, prompts)) + max(new), table.held)
    tokens, busy = _serve(pipeline, shape, params, padded, len(work), jax.tree.map(lambda *x: np.stack(x), *feeds))
    tokens = np.asarray(tokens).swapaxes(0, 1).reshape(-1, max(new))[: len(prompts)].copy()
    lengths = np.asarray([_length(row[:n], pipeline.step.eos) for row, n in zip(tokens, new, strict=True)], np.int32)
    tokens[np.arange(max(new)) >= lengths[:, None]] = 0
    bubble = 1 - float(np.asarray(busy).sum()) / (parts * table.ticks * pipeline.stages.num)
    return Served(tokens, lengths, table, bubble)


@struct.dataclass
class _Feed:
    """What each item brings, arrays that lead with the item. G rows a group, C chunk slots."""

    first_row: Any  # i32: of the group; 0 where nothing decodes
    request: Any  # i32[G]: whose token comes out, Q for none
    made: Any  # i32[G]: which of its tokens
    positions: Any  # i32[G + C], -1 for an empty slot
    tokens: Any  # i32[G + C]; -1: the row's last token
    chunk_row: Any  # i32
    fresh: Any  # bool: the chunk's row starts anew


def _feed(pipeline: Pipeline, table: DecodeTable, prompts: Sequence[Any], new: Sequence[int]) -> _Feed:
    """The table's items with the tokens of these prompts, which may be shorter than the table allows."""
    rows, width, count = pipeline.rows, pipeline.rows + pipeline.chunk, len(table.items)
    size = 1 << (count - 1).bit_length()
    feed = _Feed(
        np.zeros(size, np.int32), np.full((size, rows), 2**30, np.int32), np.zeros((size, rows), np.int32),
        np.full((size, width), -1, np.int32), np.zeros((size, width), np.int32), np.zeros(size, np.int32),
        np.zeros(size, bool),
    )  # fmt: skip
    for i, item in enumerate(table.items):
        feed.first_row[i] = max(item.group, 0) * rows
        for j, (q, step) in enumerate(zip(item.rows, item.steps, strict=True)):
            if q == IDLE or q >= len(prompts) or step >= new[q]:
                continue
            feed.request[i, j], feed.made[i, j] = q, step
            feed.positions[i, j] = len(prompts[q]) - 1 + step
            feed.tokens[i, j] = prompts[q][-1] if step == 0 else -1
        feed.chunk_row[i], feed.fresh[i] = max(item.row, 0), item.first
        if item.request != IDLE and item.request < len(prompts):
            piece = prompts[item.request][:-1][item.start : item.start + item.count]
            feed.tokens[i, rows : rows + len(piece)] = piece
            feed.positions[i, rows : rows + len(piece)] = item.start + np.arange(len(piece))
    return feed


class _Carry(NamedTuple):
    waiting: jax.Array  # [held, 1, G + C, D]: micro-batches before this stage, item i in slot i % held
    arriving: jax.Array  # [1, G + C, D] from the stage before
    returned: jax.Array  # i32[G] from the last stage to the first
    last: jax.Array  # i32[rows of all groups], read on the first stage
    out: jax.Array  # i32[Q, most new tokens], written on the first stage
    states: tuple[Any, ...]
    busy: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _serve(pipeline: Pipeline, shape: tuple[int, ...], params: Any, work: Any, ticks: Any, feed: Any):
    """All ticks on every stage: `out i32[data parts, Q, most new]` and the ticks with work, i32[data parts, S]."""
    axis, data = pipeline.axis, pipeline.data
    placed = {name: P(axis) if name == "stages" else P() for name in params}
    program = jax.shard_map(
        functools.partial(_run, pipeline, shape),
        mesh=pipeline.mesh,
        in_specs=(placed, P(), P(), P(data)),
        out_specs=(P(axis, data), P(data, axis)),
        axis_names={axis} | ({data} if data else set()),
        check_vma=False,
    )
    out, busy = program(params, work, ticks, feed)
    return out[0], busy


def _run(pipeline: Pipeline, shape: tuple[int, ...], params: Any, work: Any, ticks: Any, feed: Any):
    """One device's part of `_serve`."""
    requests, most, capacity, held = shape
    step, stages, rows = pipeline.step, pipeline.stages, pipeline.rows
    num, last = stages.num, stages.num - 1
    stage = jax.lax.axis_index(pipeline.axis)
    feed = jax.tree.map(lambda x: x[0], feed)
    slots = jax.tree.map(lambda x: x[0], params["stages"])
    rest = {name: tree for name, tree in params.items() if name != "stages"}
    specs = pipeline.specs(capacity)
    ring = [(i, (i + 1) % num) for i in range(num)]

    def tick(t, carry: _Carry) -> _Carry:
        item, before = work[t, stage], jnp.where(t > 0, work[t - 1], IDLE)
        # What the neighbours sent at the end of the last tick.
        arrived = jnp.where(stage > 0, before[stage - 1], IDLE)
        waiting = jnp.where(
            arrived >= 0,
            jax.lax.dynamic_update_index_in_dim(carry.waiting, carry.arriving, arrived % held, 0),
            carry.waiting,
        )
        done = _item(feed, before[last])
        landed = jnp.where(before[last] >= 0, done.request, requests)
        out = carry.out.at[landed, done.made].set(carry.returned, mode="drop")
        places = jnp.where(landed < requests, done.first_row + jnp.arange(rows), carry.last.shape[0])
        last_tokens = carry.last.at[places].set(carry.returned, mode="drop")

        mine = _item(feed, item)
        mine = dataclasses.replace(mine, fresh=mine.fresh & (item >= 0))
        positions = jnp.where(item >= 0, mine.positions, -1)[None]
        ours = jax.lax.dynamic_slice_in_dim(last_tokens, mine.first_row, rows)
        tokens = jnp.where(mine.tokens[:rows] < 0, ours, mine.tokens[:rows])
        tokens = jnp.concatenate([tokens, mine.tokens[rows:]])[None]
        x = jax.lax.cond(
            stage == 0,
            lambda x: cut.enter(step, rest, tokens, positions),
            lambda x: x,
            waiting[jnp.maximum(item, 0) % held],
        )
        x, states = _layers(pipeline, specs, stage, slots, rest, x, positions, carry.states, mine)
        token = jax.lax.cond(stage == last, lambda x: _greedy(step, rest, x[0, :rows]), lambda x: carry.returned, x)
        arriving, returned = jax.lax.ppermute((x, token), pipeline.axis, ring)
        return _Carry(waiting, arriving, returned, last_tokens, out, states, carry.busy + (item >= 0))

    all_rows, width = pipeline.num_groups * rows, rows + pipeline.chunk
    x = jax.eval_shape(lambda: cut.enter(step, rest, *(jnp.zeros((1, width), jnp.int32),) * 2))
    blank, ids = jnp.zeros(x.shape, x.dtype), jnp.zeros(rows, jnp.int32)
    start = _Carry(
        jnp.zeros((held, *x.shape), x.dtype), blank, ids, jnp.zeros(all_rows, jnp.int32),
        jnp.zeros((requests, most), jnp.int32), _states(pipeline, specs, all_rows), jnp.zeros((), jnp.int32),
    )  # fmt: skip
    # One tick more than the table has: the last tokens still travel to the first stage.
    end = jax.lax.fori_loop(0, ticks + 1, lambda t, carry: tick(t, carry), start)
    return end.out[None, None], end.busy[None, None]


def _item(feed: _Feed, i: jax.Array) -> _Feed:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, jnp.maximum(i, 0), 0, keepdims=False), feed)


def _greedy(step: Any, rest: Any, x: jax.Array) -> jax.Array:
    return jnp.argmax(step.head(rest, cut.leave(step, rest, x)), -1).astype(jnp.int32)


def _states(pipeline: Pipeline, specs: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    """An empty State for each slot of the stages, its heads split where asked."""

    def place(leaf):
        if pipeline.heads is None or leaf.ndim < 4:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, P(None, pipeline.heads))

    firsts = [next(i for s in range(pipeline.stages.num) if (i := pipeline.stages.layer(s, j)) is not None)
              for j in range(pipeline.stages.slots)]  # fmt: skip
    return jax.tree.map(place, tuple(specs[i].init(rows) for i in firsts))


def _layers(pipeline, specs, stage, slots, rest, x, positions, states, mine: _Feed):
    """This stage's layers over one micro-batch `x[1, G + C, D]`, and the caches with its tokens committed."""
    config, stages, rows = pipeline.step.config, pipeline.stages, pipeline.rows
    table, found = rest.get("position_table"), []
    for slot in range(stages.slots):
        state = states[slot]
        group = jax.tree.map(lambda s: jax.lax.dynamic_slice_in_dim(s, mine.first_row, rows), state)
        row = jax.tree.map(lambda s: jax.lax.dynamic_slice_in_dim(s, mine.chunk_row, 1), state)
        here = {s: i for s in range(stages.num) if (i := stages.layer(s, slot)) is not None}
        some = specs[next(iter(here.values()))]
        row = jax.tree.map(lambda s, empty: jnp.where(mine.fresh, empty, s), row, some.init(1))
        blank = some.new_block(1, positions.shape[1])

        def layer(i: int, x: Any, slot: int = slot, group: Any = group, row: Any = row, blank: Any = blank) -> Any:
            module, mixed = DecoderLayer(config, layer=i), _Mixed(specs[i], rows)
            variables = {"params": slots[f"slot_{slot}"]}
            found: Any = module.apply(variables, x, positions, mixed, (group, row), blank, 0, None, table)
            return found[0], found[1]

        def absent(x, blank=blank):
            return x, blank

        x, block = cut.run_slot(stages, stage, slot, layer, absent, lambda i: (specs[i], config.is_sparse(i)), x)
        live = (positions >= 0) & jnp.isfinite(x.sum(-1))  # also keeps every read of the cache before its write
        kinds = {
            spec: [s for s, i in here.items() if specs[i] == spec]
            for spec in dict.fromkeys(specs[i] for i in here.values())
        }
        lives = {spec: live & jnp.isin(stage, jnp.asarray(where)) for spec, where in kinds.items()}
        found.append(_commit(lives, state, row, block, mine, rows))
    return x, tuple(found)


def _commit(lives: dict[Any, jax.Array], state: Any, row: Any, block: Block, mine: _Feed, rows: int) -> Any:
    """Append the micro-batch's tokens: the chunk to its row, which is written back, then one to each of the group.

    `lives`: for each Spec that the slot has on some stage, the tokens bool[1, G + C] that it is to append here.
    """
    one, many = _split(block, rows)
    path = jnp.arange(many.positions.shape[1], dtype=jnp.int32)[None]
    for spec, live in lives.items():
        row = spec.commit(row, many, path, live[:, rows:].sum(1, dtype=jnp.int32))
    # Before the group's tokens: a micro-batch without a chunk writes row 0 back as it was.
    state = jax.tree.map(lambda s, new: jax.lax.dynamic_update_slice_in_dim(s, new, mine.chunk_row, 0), state, row)
    every = state.t.shape[0]

    def widen(x):  # all rows are given, most with nothing to append: a scatter in place, where a slice would be copied
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros((every, *x.shape[1:]), x.dtype), x, mine.first_row, 0)

    wide, path = jax.tree.map(widen, one), jnp.zeros((every, 1), jnp.int32)
    for spec, live in lives.items():
        state = spec.commit(state, wide, path, widen(live[0, :rows].astype(jnp.int32)))
    return state


def _split(block: Block, rows: int) -> tuple[Block, Block]:
    """`[1, heads, G + C, d]` as one token of G rows and C tokens of one row."""
    k, v = (jnp.moveaxis(x[:, :, :rows], 2, 0)[:, 0, :, None] for x in (block.k, block.v))
    one = Block(k, v, block.positions[0, :rows, None])
    many = Block(block.k[:, :, rows:], block.v[:, :, rows:], block.positions[:, rows:])
    return one, many


@dataclasses.dataclass(frozen=True)
class _Mixed:
    """A Spec for one micro-batch: the first `rows` tokens are one each of a group's rows, the others of one row.

    What the layer computes token by token it computes for all of them at once.
    """

    spec: Any
    rows: int

    @property
    def attention(self) -> AttentionSpec:
        return self.spec.attention

    def attend(self, state, block, q, positions, mask, table=None):
        """As `cache.Spec.attend`, with a pair of States: the group's, and the row's of the chunk."""
        group, row = state
        one, many = _split(block, self.rows)
        n = self.rows
        first, _ = self.spec.attend(
            group, one, jnp.moveaxis(q[:, :, :n], 2, 0)[:, 0, :, None], positions[0, :n, None], None, table
        )
        later, _ = self.spec.attend(row, many, q[:, :, n:], positions[:, n:], None, table)
        out = jnp.concatenate([jnp.moveaxis(first.out[:, :, 0], 0, 1)[None], later.out], 2)
        lse = jnp.concatenate([jnp.moveaxis(first.lse[:, :, 0], 0, 1)[None], later.lse], 2)
        return Part(out, lse), None


def _length(row: np.ndarray, eos: tuple[int, ...]) -> int:
    """Tokens up to the first end token, it included."""
    ends = np.flatnonzero(np.isin(row, eos))
    return int(ends[0]) + 1 if ends.size else len(row)
