"""The laws that every cache obeys, each one a function of a `Case`; tests/test_cache_laws.py runs them on all caches.

One compiled program a cache (`feed`) takes whole schedules as data: which tokens stand in which slot of each step's
Block, and which of them are kept. So every chunking, every rejected draft and every tree goes through one executable.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import cache as kv
from jaxinfer import ops
from jaxinfer.cache.dense import unrotate

ROWS, HEADS, GROUPS, DIM = 4, 4, 2, 8
TOKENS = STEPS = 40  # committed tokens of the longest row; steps of a feed
DRAFTS = 8  # tokens that are always rejected
LENGTHS = np.array([40, 29, 13, 0])
WIDE, NARROW = 24, 6  # slots of a Block: longer than every ring below, and that of a step with drafts
WINDOW, SINKS, GROUP, LAG = 7, 3, 4, 5
PLAIN = ops.AttentionSpec(HEADS, GROUPS, DIM, DIM**-0.5)


def within(window: int | None, p: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance and visibility under a sliding window."""
    return p - k, (k <= p) & (p - k < (window or TOKENS))


@dataclasses.dataclass(frozen=True)
class Case:
    """A cache under test.

    `rule(p, k) -> (distance, visible)`: what a query at p may see, from the paper, not from the code; None where only
    `dense_view` can say. `codes(p, k)`: whether the query reads the token as codes. `ample`: the same cache with more
    budget than there are tokens.
    """

    spec: Any
    ample: Any
    rule: Callable | None = functools.partial(within, None)
    codes: Callable | None = None


class Data(NamedTuple):
    """Tokens `[B, heads, TOKENS + DRAFTS, d]`; those from TOKENS on are drafts that no row keeps."""

    q: Any
    k: Any
    v: Any


class Schedule(NamedTuple):
    """Steps of a feed: the token in each slot, its position, who sees whom, and what is kept."""

    token: Any  # i32[S, B, R]
    positions: Any  # i32[S, B, R]
    mask: Any  # bool[S, B, R, R] or None
    path: Any  # i32[S, B, R]
    n: Any  # i32[S, B]


@functools.cache
def data() -> Data:
    rng = np.random.default_rng(0)
    shape = (ROWS, HEADS, TOKENS + DRAFTS, DIM)
    q, k, v = (rng.normal(size=(shape[0], h, *shape[2:])).astype(np.float32) for h in (HEADS, GROUPS, GROUPS))
    k[:, :, :, 0] += 5.0  # real keys have channels with a large mean
    return Data(q, k, v)


TABLE = np.random.default_rng(1).normal(size=(16, HEADS)).astype(np.float32)
TRACES: collections.Counter = collections.Counter()


def attend(spec, state, block, q, positions, mask=None):
    table = jnp.asarray(TABLE) if isinstance(spec.attention.position, ops.T5Bias) else None
    return spec.attend(state, block, q, positions, mask, table)


def run(spec, state, x: Data, schedule: Schedule):
    """Every step of a schedule: Block, attend, commit. Returns the last State and `out[S, B, H, R, d]`."""

    def step(state, s: Schedule):
        q, k, v = (jnp.take_along_axis(jnp.asarray(y), s.token[:, None, :, None], 2) for y in x)
        block = kv.write_block(spec.new_block(*s.token.shape), k, v, s.positions, 0)
        part, notes = attend(spec, state, block, q, s.positions, s.mask)
        return spec.commit(state, block, s.path, s.n, notes), part.out

    return jax.lax.scan(step, state, schedule)


@functools.partial(jax.jit, static_argnums=0)
def feed(spec, state, x, schedule):
    TRACES[spec, schedule.token.shape[2], schedule.mask is None] += 1
    return run(spec, state, x, schedule)


def kept_outputs(out, schedule: Schedule) -> np.ndarray:
    """`out[B, TOKENS, H, d]` of the kept tokens, zeros where a row has none."""
    found = np.zeros((ROWS, TOKENS, HEADS, DIM), np.float32)
    out, t = np.asarray(out), np.zeros(ROWS, int)
    for s, b in np.ndindex(*schedule.n.shape):
        for slot in schedule.path[s, b, : schedule.n[s, b]]:
            found[b, t[b]] = out[s, b, :, slot]
            t[b] += 1
    return found


def chunks(sizes, *, width: int = WIDE, lengths=LENGTHS, drafts: bool = False) -> Schedule:
    """Rows cut into chunks of the given sizes (the last one repeats), row b from the b-th size on. `drafts` fills the
    free slots with a tail that is rejected. Finished rows go on with nothing."""
    shape = (STEPS, ROWS, width)
    token, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    path = np.broadcast_to(np.arange(width, dtype=np.int32), shape).copy()
    n, t = np.zeros(shape[:2], np.int32), np.zeros(ROWS, int)
    for s, b in np.ndindex(*shape[:2]):
        size = min(sizes[min(s + b, len(sizes) - 1)], lengths[b] - t[b], width)
        filled = min(size + DRAFTS, width) if drafts and size else size
        token[s, b, :filled] = [t[b] + i if i < size else TOKENS + i - size for i in range(filled)]
        positions[s, b, :filled] = t[b] + np.arange(filled)
        n[s, b], t[b] = size, t[b] + size
    assert np.all(t == lengths)
    return Schedule(token, positions, None, path, n)


def trees(seed: int) -> Schedule:
    """Each Block a random tree: the kept path in shuffled slots, drafts at its depths in the others. Slots see their
    path; 0 to 4 tokens are kept, so some steps keep nothing."""
    rng = np.random.default_rng(seed)
    shape = (STEPS, ROWS, NARROW)
    token, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    path, n, t = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32), np.zeros(ROWS, int)
    mask = np.zeros((*shape, NARROW), bool)
    for s, b in np.ndindex(*shape[:2]):
        left = LENGTHS[b] - t[b]
        if not left:
            continue
        size = min(int(rng.integers(0, 5)) if s < STEPS - 12 else NARROW - 1, left)
        slots = rng.permutation(NARROW)
        kept, rest = slots[:size], slots[size:]
        token[s, b, kept], positions[s, b, kept] = t[b] + np.arange(size), t[b] + np.arange(size)
        token[s, b, rest] = rng.integers(TOKENS, TOKENS + DRAFTS, len(rest))
        positions[s, b, rest] = t[b] + rng.integers(0, NARROW, len(rest))
        for depth, slot in enumerate(kept):
            mask[s, b, slot, kept[: depth + 1]] = True
        mask[s, b, rest] = rng.random((len(rest), NARROW)) < 0.5
        path[s, b, :size], n[s, b], t[b] = kept, size, t[b] + size
    assert np.all(t == LENGTHS)
    return Schedule(token, positions, mask, path, n)


def one_by_one(width: int) -> Schedule:
    return chunks([1], width=width)


def close(got, want, tolerance: float = 1e-5, message: str = ""):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=tolerance, rtol=tolerance, err_msg=message)


def same(got, want, message: str = ""):
    """Equal bits, leaf by leaf."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{message} {jax.tree_util.keystr(path)}")


@functools.partial(jax.jit, static_argnums=0)
def naive(attention, q, k, v, distance, visible):
    return ops.attend_naive(attention, q, k, v, distance, visible, jnp.asarray(TABLE)).out


def rounded(x: np.ndarray, axis: int) -> np.ndarray:
    """Each group along `axis` on 256 levels from its least to its greatest entry."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    step = (high - low) / 255
    return low + np.round((x - low) / step) * step


@functools.cache
def reference(case: Case) -> np.ndarray:
    """Outputs `[B, TOKENS, H, d]` of whole rows from the rule, over every token as it is and as codes."""
    attention, x = case.spec.attention, data()
    q, k, v = (jnp.asarray(y[:, :, :TOKENS]) for y in x)
    at = jnp.broadcast_to(jnp.arange(TOKENS), (ROWS, TOKENS))
    by_group = np.asarray(attention.rotate(k, at)).reshape(*k.shape[:2], -1, GROUP, DIM)
    coded = unrotate(attention, jnp.asarray(rounded(by_group, 3).reshape(k.shape)), at)
    p, i = np.arange(TOKENS)[:, None], np.arange(TOKENS)[None]
    distance, visible = case.rule(p, i)
    codes = np.zeros_like(visible) if case.codes is None else case.codes(p, i)
    distance = np.concatenate([distance, distance], 1)[None, None].astype(np.int32)
    visible = np.concatenate([visible & ~codes, visible & codes], 1)[None, None]
    out = naive(
        attention,
        q,
        jnp.concatenate([k, coded], 2),
        jnp.concatenate([v, rounded(np.asarray(v), 3)], 2),
        distance,
        visible,
    )
    out = np.moveaxis(np.asarray(out), 2, 1).copy()
    out[np.arange(TOKENS)[None] >= LENGTHS[:, None]] = 0
    return out


def fed(case: Case, schedule: Schedule, x: Data | None = None):
    """The last State and the kept outputs."""
    state, out = feed(case.spec, case.spec.init(ROWS), x or data(), schedule)
    return state, kept_outputs(out, schedule)


# The laws.


def outputs_follow_the_rule(case: Case):
    """Every kept output is naive attention over what the rule says its position sees."""
    close(fed(case, chunks([WIDE]))[1], reference(case), 2e-5)


def splits_do_not_matter(case: Case):
    """Single tokens, uneven chunks, chunks beyond the ring, rejected tails: equal outputs, equal bits of State."""
    state, out = fed(case, chunks([WIDE]))
    for name, schedule in {
        "one by one": one_by_one(WIDE),
        "uneven": chunks([5, 1, 13, 2, 7, 1, 1, 3]),
        "rejected tails": chunks([3, 1, 9, 2, 4], drafts=True),
    }.items():
        other, got = fed(case, schedule)
        close(got, out, 1e-5, name)
        same(other, state, name)


def decoding_equals_prefill(case: Case):
    """The program of single-token steps gives what the program of long chunks gives."""
    state, out = fed(case, chunks([WIDE]))
    other, got = fed(case, one_by_one(1))
    close(got, out)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
        close(a, b, 1 if a.dtype == jnp.int8 else 1e-5)  # another program rounds otherwise: a code may be its neighbour


def rejected_drafts_leave_no_trace(case: Case):
    """Trees whose kept path stands in scattered slots give the outputs and State of plain decoding."""
    state, out = fed(case, one_by_one(NARROW)._replace(mask=causal_mask(one_by_one(NARROW))))
    close(out, reference(case) if case.rule else fed(case, chunks([WIDE]))[1], 2e-5, "one by one under a mask")
    for seed in (0, 1):
        other, got = fed(case, trees(seed))
        close(got, out, 1e-5, f"tree {seed}")
        same(other, state, f"tree {seed}")


def causal_mask(schedule: Schedule) -> np.ndarray:
    p = schedule.positions
    return (p[..., None] >= p[..., None, :]) & (p[..., None, :] >= 0)


def ample_budget_is_dense(case: Case):
    """With more budget than tokens the cache is dense attention."""
    ample = dataclasses.replace(case, spec=case.ample)
    want = reference(Case(kv.Dense(dataclasses.replace(case.spec.attention, window=None), TOKENS), None))
    close(fed(ample, chunks([5, 1, 13, 2]))[1], want, 2e-5)


def attend_is_naive_attention_over_the_view(case: Case):
    """`attend` = the oracle over `dense_view` and the Block's own tokens."""
    state, _ = fed(case, chunks([WIDE]))
    x, spec = data(), case.spec
    q, k, v = (jnp.asarray(y[:, :, TOKENS : TOKENS + NARROW]) for y in x)
    positions = jnp.asarray(LENGTHS[:, None] + np.arange(NARROW), jnp.int32)
    positions = positions.at[1, 4:].set(-1)  # a row with fewer tokens

    @jax.jit
    def both(state, q, k, v):
        block = kv.write_block(spec.new_block(ROWS, NARROW), k, v, positions, 0)
        view = spec.dense_view(state, positions)
        own = positions[:, None, :, None] - positions[:, None, None]
        seen = (own >= 0) & (positions >= 0)[:, None, None]
        heads = view.distance.shape[1]  # heads may keep different tokens
        own, seen = (jnp.broadcast_to(x, (ROWS, heads, NARROW, NARROW)) for x in (own, seen))
        oracle = ops.attend_naive(
            spec.attention,
            q,
            jnp.concatenate([view.k, k], 2),
            jnp.concatenate([view.v, v], 2),
            jnp.concatenate([view.distance, own], -1),
            jnp.concatenate([view.visible, seen], -1),
            jnp.asarray(TABLE),
        )
        return attend(spec, state, block, q, positions)[0], oracle

    part, oracle = both(state, q, k, v)
    real = np.asarray(positions >= 0)
    close(np.moveaxis(np.asarray(part.out), 2, 1)[real], np.moveaxis(np.asarray(oracle.out), 2, 1)[real], 2e-5)
    close(np.moveaxis(np.asarray(part.lse), 2, 1)[real], np.moveaxis(np.asarray(oracle.lse), 2, 1)[real], 2e-5)
    assert np.all(np.asarray(part.out)[1, :, 4:] == 0)


def rows_are_independent(case: Case):
    """Permuting rows commutes with everything; NaN in a row stays there; an idle row never changes."""
    schedule, x, spec = chunks([5, 1, 13, 2, 7]), data(), case.spec
    state, out = fed(case, schedule)
    order = np.array([2, 0, 3, 1])
    permuted = Schedule(*(None if a is None else a[:, order] for a in schedule))
    moved, other = feed(spec, spec.init(ROWS), Data(*(y[order] for y in x)), permuted)
    selected = jax.jit(spec.select)(state, order)
    same(moved, selected, "select")
    same(kept_outputs(other, permuted), out[order], "permuted outputs")
    place = jax.jit(spec.place)
    back = place(spec.init(ROWS), order, selected)
    same(back, state, "place")
    away = place(spec.init(ROWS), np.array([ROWS, -1, ROWS + 3, 2]), selected)
    one = place(spec.init(ROWS), np.array([ROWS, ROWS, ROWS, 2]), selected)
    same(away, one, "rows out of range are dropped")
    assert one.t.tolist() == [0, 0, LENGTHS[order[3]], 0]

    idle = jax.tree.map(lambda a: a[3], state)
    same(idle, jax.tree.map(lambda a: a[3], spec.init(ROWS)), "an idle row")
    poisoned = Data(x.q, x.k.copy(), x.v.copy())
    poisoned.k[0, :, 3] = np.nan
    poisoned.v[0, :, 5] = np.inf
    sick, ill = fed(case, schedule, poisoned)
    assert not np.isfinite(ill[0]).all()
    same(ill[1:], out[1:], "outputs of other rows")
    same(jax.tree.map(lambda a: a[1:], sick), jax.tree.map(lambda a: a[1:], state), "States of other rows")


def shapes_are_static(case: Case):
    """Tree, shapes and dtypes never change, every leaf leads with batch, and one program serves every length."""
    empty = case.spec.init(ROWS)
    state, _ = fed(case, chunks([3]))
    fed(case, chunks([WIDE]))
    assert jax.tree.structure(state) == jax.tree.structure(empty)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(empty), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.shape[0] == ROWS
    assert TRACES[case.spec, WIDE, True] == 1
    assert state.t.tolist() == LENGTHS.tolist()
    assert state.pos.shape[0] == ROWS and state.pos.shape[1] in (1, GROUPS)
    assert hash(case.spec) == hash(dataclasses.replace(case.spec)) and case.spec == dataclasses.replace(case.spec)


def memory_is_what_it_says(case: Case):
    """`footprint` is the sum of the bytes on the device; what is called int8 is stored as int8."""
    state = case.spec.init(ROWS)
    cache = kv.Cache((state,), (case.spec,))
    held = {jax.tree_util.keystr(p, simple=True): a.nbytes for p, a in jax.tree_util.tree_leaves_with_path(state)}
    assert case.spec.footprint(ROWS) == held
    assert kv.footprint(cache) == sum(held.values())
    if case.codes is not None:
        tokens = 4096
        long = dataclasses.replace(case.spec, capacity=tokens, group=64, lag=128)
        dense = sum(kv.Dense(case.spec.attention, tokens).footprint(1).values())
        leaves = jax.tree.leaves(jax.eval_shape(lambda: long.init(1)))
        by_type = collections.Counter()
        for leaf in leaves:
            by_type[str(leaf.dtype)] += leaf.size
        stored = 2 * GROUPS * DIM * (tokens - 128 - 64)
        assert by_type["int8"] >= stored, "codes are not int8"
        assert by_type["float32"] < stored / 2, "a float copy is kept"
        assert sum(long.footprint(1).values()) < 0.5 * dense


def truncation_forgets(case: Case):
    """`truncate(t)` of a State is the State before token t, where the cache says that it can."""
    spec = case.spec
    if "truncate" not in spec.supports:
        return
    state, _ = fed(case, chunks([WIDE]))
    shorter = np.array([17, 29, 0, 5])
    cut = jax.jit(spec.truncate)(state, shorter)
    t = np.minimum(shorter, LENGTHS)
    assert cut.t.tolist() == t.tolist()
    again, out = feed(spec, cut, data(), shifted(t))
    same(again, state, "cut and fed again")
    found = kept_outputs(out, shifted(t))
    for b in range(ROWS):
        close(found[b, : LENGTHS[b] - t[b]], reference(case)[b, t[b] : LENGTHS[b]], 2e-5)


def shifted(t: np.ndarray) -> Schedule:
    """The rest of each row from `t` on."""
    rest = chunks([WIDE], lengths=LENGTHS - t)
    positions = np.where(rest.positions >= 0, rest.positions + t[None, :, None], -1).astype(np.int32)
    return rest._replace(token=rest.token + t[None, :, None].astype(np.int32), positions=positions)


LAWS = (
    outputs_follow_the_rule,
    splits_do_not_matter,
    attend_is_naive_attention_over_the_view,
    decoding_equals_prefill,
    rejected_drafts_leave_no_trace,
    ample_budget_is_dense,
    rows_are_independent,
    shapes_are_static,
    memory_is_what_it_says,
    truncation_forgets,
)
WHATEVER_THE_POSITIONS = LAWS[:3]
