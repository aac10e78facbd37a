"""Caches whose live blocks alone are read (`blocks=True`, the decode kernel) obey the laws of those read as a whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer import cache as kv
from jaxinfer import ops
from jaxinfer.ops import attention
from jaxinfer.pallas_kernels.attention.decode import Codes, blocked
from tests import cache_laws as laws
from tests import kernel_checks as checks
from tests.cache_laws import GROUP, LAG, PLAIN, TOKENS, Case
from tests.test_cache_laws import cache_copies, decode_loop, read_as_codes

LAYER = dataclasses.replace(PLAIN, position=ops.Rope(laws.DIM), softcap=5.0)
CASES = {
    "dense": Case(kv.Dense(LAYER, TOKENS, blocks=True), kv.Dense(LAYER, TOKENS, blocks=True)),
    "int8": Case(kv.Int8(LAYER, TOKENS, GROUP, LAG, blocks=True), None, codes=read_as_codes),
}
LAWS = (
    laws.outputs_follow_the_rule,
    laws.splits_do_not_matter,
    laws.rows_are_independent,
    pytest.param(laws.attend_is_naive_attention_over_the_view, marks=pytest.mark.slow),
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 slots, so that these few tokens are several."""
    monkeypatch.setattr(blocked, "BLOCK", 8)
    monkeypatch.setattr(blocked, "SMALL", 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(name, law):
    law(CASES[name])


@dataclasses.dataclass(frozen=True)
class SeesItself(kv.Dense):
    """Planted bug: queries that see the State one position too far."""

    def attend(self, state, block, q, positions, mask, table=None):
        return super().attend(state, block, q, jnp.maximum(positions, -1) + 1, mask, table)


def test_a_planted_bug_is_caught():
    with pytest.raises(AssertionError):
        laws.outputs_follow_the_rule(Case(SeesItself(LAYER, TOKENS, blocks=True), None))


@pytest.mark.parametrize("name", CASES)
def test_a_loop_copies_no_cache(name):
    """In a compiled loop the State is read block by block and updated in place; XLA's own options."""
    spec = CASES[name].spec
    loop = decode_loop(spec)
    assert cache_copies(loop, spec) == []
    text = loop.lower(spec.init(laws.ROWS)).compile().as_text()
    assert text.count(" while(") >= 2  # the walk over blocks is there


def attend_of(spec):
    """`q, k, v` of one step at the rows' lengths -> the output."""

    def f(state, q, k, v):
        positions = jnp.asarray(laws.LENGTHS[:, None], jnp.int32)
        block = kv.write_block(spec.new_block(laws.ROWS, 1), k, v, positions, 0)
        return laws.attend(spec, state, block, q, positions)[0].out

    return f


@functools.cache
def filled(name):
    state, _ = laws.fed(CASES[name], laws.chunks([laws.WIDE]))
    return state, *(jnp.asarray(x[:, :, TOKENS : TOKENS + 1]) for x in laws.data())


@pytest.mark.parametrize("name", ["dense", pytest.param("int8", marks=pytest.mark.slow)])
def test_gradient(name):
    """Through the kernel as through the product over everything, to a float cache and to the scales of codes."""
    state, *step = filled(name)
    floats, tree = jax.tree.flatten(state)
    where = [i for i, x in enumerate(floats) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(spec, chosen, step):
        leaves = list(floats)
        for i, x in zip(where, chosen, strict=True):
            leaves[i] = x
        return (attend_of(spec)(jax.tree.unflatten(tree, leaves), *step) ** 2).sum()

    specs = (CASES[name].spec, dataclasses.replace(CASES[name].spec, blocks=False))
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, spec), (0, 1)))([floats[i] for i in where], step) for spec in specs
    )
    checks.assert_close(got, want, factor=10)


def test_a_sharded_batch_is_the_same_rows():
    """Asked for, the walk gives a batch over four devices what it gives on one."""
    state, *step = filled("dense")
    rows = NamedSharding(Mesh(np.asarray(jax.devices()[:4]), "data"), PartitionSpec("data"))
    f = jax.jit(attend_of(CASES["dense"].spec))
    checks.assert_close(f(*jax.device_put((state, *step), rows)), f(state, *step))


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=checks.needs_mosaic_gpu)])
@pytest.mark.parametrize("name", CASES)
def test_lowers(name, platform, monkeypatch):
    """One layer of an 8B model at 8192 tokens: the kernel of the platform reads the cache."""
    monkeypatch.undo()
    layer = ops.AttentionSpec(32, 8, 128, 128**-0.5, ops.Rope(128))
    spec = {"dense": kv.Dense, "int8": kv.Int8}[name](layer, 8192, dtype="bfloat16", blocks=True)
    shapes = jax.eval_shape(lambda: spec.init(8))
    q, k = checks.avals((8, 32, 1, 128), (8, 8, 1, 128))

    def f(state, q, k, v, positions):
        block = kv.write_block(spec.new_block(8, 1), k, v, positions, 0)
        return spec.attend(state, block, q, positions, None)[0]

    checks.assert_lowers(f, shapes, q, k, k, jax.ShapeDtypeStruct((8, 1), jnp.int32), platform=platform)


def test_rule(monkeypatch):
    """Left to itself: large int8 caches of one device, a few queries, full causal attention."""
    spec = ops.AttentionSpec(8, 2, 64, 0.125, ops.Rope(64))
    ask = attention.reads_blocks

    def keys(shape, dtype="int8"):
        return Codes(jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((*shape[:3], 1), "float32"))

    long, short = keys((8, 2, 64, 4096)), keys((64, 8, 64, 512))
    assert jax.local_device_count() > 1 and not ask(spec, 1, long, None) and ask(spec, 1, long, True)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    assert ask(spec, 1, long, None) and not ask(spec, 1, long, False)
    assert not ask(spec, 1, short, None) and not ask(spec, 1, keys((8, 2, 64, 4096), "bfloat16").values, None)
    assert not ask(spec, 17, long, True)
    for other in (dict(window=9), dict(position=ops.Alibi(8))):
        assert not ask(dataclasses.replace(spec, **other), 1, long, True)
