"""Every cache under every law, planted bugs that the laws must catch, and what the laws leave open.

A new cache adds its name to NAMES and its row to `row`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer import ops
from jaxinfer.cache.int8 import Codes, quantize
from jaxinfer.errors import ConfigError
from tests import cache_laws as laws
from tests.cache_laws import (
    DIM,
    GROUP,
    HEADS,
    LAG,
    PLAIN,
    ROWS,
    SINKS,
    STEPS,
    TOKENS,
    WIDE,
    WINDOW,
    Case,
    chunks,
    data,
    feed,
)

POSITIONS = {
    "rope": ops.Rope(DIM, scaling="yarn", factor=4.0, original_length=64, theta=100.0),
    "alibi": ops.Alibi(HEADS),
    "t5": ops.T5Bias(HEADS, 16, 20),
    "none": None,
}


def sink_rule(p, k):
    seen = (k <= p) & ((k < SINKS) | (p - k < WINDOW))
    return np.where(k < SINKS, np.minimum(p, SINKS + WINDOW - 1) - k, p - k), seen


def read_as_codes(p, k):
    return (k // GROUP + 1) * GROUP <= p - LAG


def row(name: str, position: str) -> Case:
    """The table of caches."""
    layer = dataclasses.replace(PLAIN, position=POSITIONS[position], softcap=3.0 if position == "none" else None)
    local = dataclasses.replace(layer, window=WINDOW)
    dense = kv.Dense(layer, TOKENS)
    match name:
        case "dense":
            return Case(dense, dense)
        case "ring":
            ample = kv.ring(dataclasses.replace(layer, window=TOKENS + 1))
            return Case(kv.ring(local), ample, functools.partial(laws.within, WINDOW))
        case "sink":
            return Case(kv.Sink(layer, SINKS, WINDOW), kv.Sink(layer, SINKS, TOKENS), sink_rule)
        case "int8":
            ample = kv.Int8(layer, 2 * TOKENS + GROUP + 1, GROUP, 2 * TOKENS)
            return Case(kv.Int8(layer, TOKENS, GROUP, LAG), ample, codes=read_as_codes)
        case "retrieval":  # not made from a prompt: its ring; tests/test_cache_retrieval.py has the rest
            ample = kv.Retrieval(layer, 8, 4, TOKENS)
            return Case(kv.Retrieval(layer, 8, 4, WINDOW - 1), ample, functools.partial(laws.within, WINDOW))
    raise KeyError(name)


NAMES = ("dense", "ring", "sink", "int8", "retrieval")
CASES = {f"{name}, {position}": row(name, position) for name in NAMES for position in POSITIONS}
ROTARY = {name: case for name, case in CASES.items() if name.endswith("rope")}


def law_cases():
    """Every law under RoPE; those that positions enter under each encoding, most of them in the slow suite."""
    quick = {"sink, alibi", *ROTARY}
    for name in CASES:
        for law in laws.LAWS if name.endswith("rope") else laws.WHATEVER_THE_POSITIONS:
            yield pytest.param(name, law, marks=[] if name in quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "law"), list(law_cases()))
def test_law(name, law):
    law(CASES[name])


# Negative controls: each planted bug is caught by the law named beside it.


class RingTooSmall(kv.Dense):
    """Forgets a token too early."""

    def __post_init__(self):
        pass


@dataclasses.dataclass(frozen=True)
class WindowTooWide(ops.AttentionSpec):
    """`<=` for `<`."""

    def within_window(self, distance):
        return distance <= self.window


class RingThatClamps(kv.Dense):
    """Writes one slice, which moves back where it would pass the end instead of wrapping around."""

    def commit(self, state, block, path, n, notes=None):
        update = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
        start, right = state.t % self.capacity, super().commit(state, block, path, n)
        kept = jnp.arange(path.shape[1]) < n[:, None]
        old = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, path.shape[1], axis=1))(state.v, start)
        return dataclasses.replace(right, v=update(state.v, jnp.where(kept[:, None, :, None], block.v, old), start))


class PathIsPrefix(kv.Dense):
    """Keeps the Block's first slots, whatever the path."""

    def commit(self, state, block, path, n, notes=None):
        return super().commit(state, block, jnp.broadcast_to(jnp.arange(path.shape[1]), path.shape), n)


class KeepsDrafts(kv.Dense):
    """Writes every slot of the Block, kept or not, and counts the kept ones."""

    def commit(self, state, block, path, n, notes=None):
        everything = super().commit(state, block, path, (block.positions >= 0).sum(1))
        return dataclasses.replace(everything, t=state.t + n)


class OneOffsetForAll(kv.Dense):
    """Writes every row at the first row's length."""

    def commit(self, state, block, path, n, notes=None):
        together = dataclasses.replace(state, t=jnp.broadcast_to(state.t[0], state.t.shape))
        return dataclasses.replace(super().commit(together, block, path, n), t=state.t + n)


class RowsLeak(kv.Dense):
    """Scales values by a maximum over the batch."""

    def attend(self, state, block, q, positions, mask, table=None):
        part, notes = super().attend(state, block, q, positions, mask, table)
        return dataclasses.replace(part, out=part.out + 0 * jnp.abs(block.v).max()), notes


class SinkFromAfar(kv.Sink):
    """Sees the sinks from the true position."""

    def _slot(self, positions):
        return positions


class SinkEvictsLate(kv.Sink):
    """Counts the window without the query, as if it were written first."""

    def _slot(self, positions):
        return jnp.minimum(positions, self.sinks + self.window)


class LagIgnored(kv.Int8):
    """Reads as codes whatever is complete when the call begins: a function of how calls were split."""

    def _as_codes(self, pos, positions):
        complete = self._ends(pos)[:, :, None] <= positions[:, None, :1, None]
        return jnp.broadcast_to(complete, (*complete.shape[:2], positions.shape[1], complete.shape[3]))


class GroupTooLate(kv.Int8):
    """`<` for `<=`: a group is read as codes one token late."""

    def _as_codes(self, pos, positions):
        return self._ends(pos)[:, :, None] < positions[:, None, :, None] - self.lag


class FakeInt8(kv.Int8):
    """Rounds and keeps the result in float32."""

    def init(self, batch):
        state = super().init(batch)

        def fake(codes):
            return Codes(codes.values.astype(jnp.float32), codes.scale, codes.offset)

        return dataclasses.replace(state, keys=fake(state.keys), values=fake(state.values))


def planted():
    rope = CASES["dense, rope"].spec.attention
    local, within_window = dataclasses.replace(rope, window=WINDOW), functools.partial(laws.within, WINDOW)
    wide = dataclasses.replace(rope, window=31)
    sink, int8 = CASES["sink, rope"], CASES["int8, rope"]
    loose = WindowTooWide(*(getattr(local, field.name) for field in dataclasses.fields(local)))
    ring_case = functools.partial(Case, ample=None, rule=within_window)
    dense = functools.partial(Case, ample=None)

    def bug(kind, case):
        return dataclasses.replace(case, spec=kind(**vars(case.spec)))

    yield ring_case(RingTooSmall(local, WINDOW - 2, ring=True)), laws.outputs_follow_the_rule
    yield ring_case(kv.Dense(loose, TOKENS)), laws.outputs_follow_the_rule
    yield Case(RingThatClamps(wide, 30, ring=True), None, functools.partial(laws.within, 31)), laws.splits_do_not_matter
    yield dense(PathIsPrefix(rope, TOKENS)), laws.rejected_drafts_leave_no_trace
    yield dense(KeepsDrafts(rope, TOKENS)), laws.splits_do_not_matter
    yield dense(OneOffsetForAll(rope, TOKENS)), laws.splits_do_not_matter
    yield dense(RowsLeak(rope, TOKENS)), laws.rows_are_independent
    yield bug(SinkFromAfar, sink), laws.outputs_follow_the_rule
    yield bug(SinkEvictsLate, sink), laws.outputs_follow_the_rule
    yield bug(LagIgnored, int8), laws.splits_do_not_matter
    yield bug(GroupTooLate, int8), laws.outputs_follow_the_rule
    yield bug(FakeInt8, int8), laws.memory_is_what_it_says


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "law"), list(planted()), ids=lambda x: getattr(type(getattr(x, "spec", 0)), "__name__", None)
)
def test_planted_bugs_are_caught(case, law):
    with pytest.raises(AssertionError):
        law(case)


# What the laws leave open.


def decode_loop(spec, *, guarded: bool = True):
    """A `while_loop` of single tokens; the kept count depends on the output, so that every read precedes the write."""
    x = data()

    def body(carry):
        i, state, total = carry
        q, k, v = (jax.lax.dynamic_slice_in_dim(jnp.asarray(y), i, 1, 2) for y in x)
        block = kv.write_block(spec.new_block(ROWS, 1), k, v, state.t[:, None], 0)
        part, notes = laws.attend(spec, state, block, q, state.t[:, None])
        n = jnp.isfinite(part.out).all((1, 2, 3)).astype(jnp.int32) if guarded else jnp.ones(ROWS, jnp.int32)
        return i + 1, spec.commit(state, block, jnp.zeros((ROWS, 1), jnp.int32), n, notes), total + part.out

    def loop(state):
        start = (jnp.int32(0), state, jnp.zeros((ROWS, HEADS, 1, DIM)))
        return jax.lax.while_loop(lambda carry: carry[0] < 30, body, start)[1:]

    return jax.jit(loop, donate_argnums=0)


def cache_copies(loop, spec) -> list[str]:
    """Instructions of the compiled program, those inside fusions left out, that copy a large leaf of the State."""
    state = spec.init(ROWS)
    large = max(leaf.size for leaf in jax.tree.leaves(state)) // 8
    shapes = {f"[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(state) if leaf.size >= large}
    found, fused = [], False
    for line in loop.lower(state).compile().as_text().splitlines():
        if line.endswith("{"):
            fused = "fused" in line.split("(")[0]
        elif " copy(" in line and not fused and any(shape in line.partition(" copy(")[0] for shape in shapes):
            found.append(line)
    return found


@pytest.mark.parametrize("name", ROTARY)
def test_commit_in_a_loop_copies_no_cache(name):
    """In a compiled `while_loop` the State is updated in place."""
    spec = ROTARY[name].spec
    assert cache_copies(decode_loop(spec), spec) == []


def test_an_unguarded_loop_copies():
    """Negative control: where nothing orders the reads before the write, XLA copies the cache and the test sees it."""
    spec = ROTARY["ring, rope"].spec
    assert cache_copies(decode_loop(spec, guarded=False), spec)


@pytest.mark.parametrize(
    "name", ["sink, rope", *(pytest.param(n, marks=pytest.mark.slow) for n in ROTARY if n != "sink, rope")]
)
def test_vmap(name):
    """Caches may be mapped: two stacked States take two schedules and give what each gives alone."""
    case, x = ROTARY[name], data()
    spec, schedules = case.spec, [chunks([3, 2]), chunks([5, 1, 4])]
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), spec.init(ROWS))
    both = jax.tree.map(lambda *a: np.stack(a), *schedules)
    mapped = jax.jit(jax.vmap(lambda s, steps: laws.run(spec, s, x, steps)))
    states, out = mapped(stacked, both)
    for i, schedule in enumerate(schedules):
        laws.close(laws.kept_outputs(out[i], schedule), laws.fed(case, chunks([WIDE]))[1])
        assert states.t[i].tolist() == laws.LENGTHS.tolist()


def test_a_sink_cache_streams():
    """Four million tokens in, outputs are those of a thousand tokens in: positions count laws.within the cache."""
    spec, x = ROTARY["sink, rope"].spec, data()
    head, _ = feed(spec, spec.init(ROWS), x, chunks([SINKS], lengths=np.full(ROWS, SINKS)))
    outputs = []
    for t in (1_000, 4_000_000):
        at = jnp.full(ROWS, t, jnp.int32)
        empty = spec.init(ROWS).recent
        state = dataclasses.replace(
            head, recent=dataclasses.replace(empty, t=at), sinks=dataclasses.replace(head.sinks, t=at)
        )
        schedule = chunks([4, 1, 9])
        positions = np.where(schedule.positions >= 0, schedule.positions + t, -1).astype(np.int32)
        outputs.append(laws.kept_outputs(feed(spec, state, x, schedule._replace(positions=positions))[1], schedule))
    laws.close(outputs[1], outputs[0], 1e-5)


def test_quantize():
    """Every entry laws.within half a step, groups of one value exact, all 256 levels used."""
    x = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    x[0, 0] = 2.5
    codes = quantize(jnp.asarray(x), -1)
    assert codes.values.dtype == jnp.int8
    error = np.abs(np.asarray(codes.dequantize(jnp.float32)) - x)
    assert np.all(error <= np.asarray(codes.scale) / 2 + 1e-6)
    assert np.all(error[0, 0] == 0)
    values = np.asarray(codes.values)
    assert np.all(values[1:].min(-1) == -128) and np.all(values[1:].max(-1) == 127)


def test_int8_is_close_to_dense_and_is_not_dense():
    want = laws.reference(CASES["dense, rope"])
    error = np.abs(laws.fed(CASES["int8, rope"], chunks([WIDE]))[1] - want)
    assert 1e-5 < error.max() < 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kv.Sink(PLAIN, 0, 8), "at least one sink, got 0"),
        (lambda: kv.Sink(PLAIN, 4, 1), "window of at least 2"),
        (lambda: kv.Sink(dataclasses.replace(PLAIN, window=10), 4, 8), "sliding window of 10: use a ring"),
        (lambda: kv.SinkCache(sinks=-1), "at least one sink"),
        (lambda: kv.Int8(PLAIN, 40, 1, 5), "at least 2 tokens, got 1"),
        (lambda: kv.Int8(PLAIN, 40, 4, -1), "a count of tokens, got -1"),
        (lambda: kv.Int8(PLAIN, 40, 8, 32), "no group of 8 before its lag of 32"),
        (lambda: kv.Int8Cache(group=0), "at least 2 tokens"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_int8_refuses_a_masked_block_beyond_its_lag():
    spec = ROTARY["int8, rope"].spec
    masked = chunks([WIDE])._replace(mask=np.ones((STEPS, ROWS, WIDE, WIDE), bool))
    with pytest.raises(ConfigError, match="lag of 5 takes a masked Block of up to 6 slots, got 24"):
        feed(spec, spec.init(ROWS), data(), masked)


def test_policies():
    """The cache of each layer: what was asked where it pays, a ring under a short window, dense for short rows."""
    local = dataclasses.replace(PLAIN, window=16)
    sink, int8 = kv.SinkCache(4, 60), kv.Int8Cache(group=16, lag=32)
    assert sink.spec(PLAIN, 100, "bfloat16") == kv.Sink(PLAIN, 4, 60, "bfloat16")
    assert sink.spec(PLAIN, 64, "float32") == kv.Dense(PLAIN, 64)
    assert sink.spec(local, 100, "float32") == kv.ring(local)
    assert sink.spec(dataclasses.replace(PLAIN, window=64), 100, "float32").window == 60
    assert int8.spec(PLAIN, 1000, "bfloat16") == kv.Int8(PLAIN, 1000, 16, 32, "bfloat16")
    assert int8.spec(PLAIN, 40, "float32") == kv.Dense(PLAIN, 40)
    assert int8.spec(local, 1000, "float32") == kv.ring(local)
    assert int8.spec(dataclasses.replace(PLAIN, window=2000), 1000, "float32").attention.window == 2000
