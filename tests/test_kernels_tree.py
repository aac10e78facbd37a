"""tree: nodes of a tree of drafts see the cache and their ancestors, and nothing else."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core.errors import ArgumentError
from jaxinfer.pallas_kernels.attention.decode import decode, quantize
from jaxinfer.pallas_kernels.attention.tree import pack_ancestors, tree, unpack_ancestors
from tests import kernel_checks as checks

B, H, G, D, C = 2, 4, 2, 16, 48
LENGTHS = jnp.array([48, 5])
SLOPES = jnp.array([0.5, 0.25, 0.125, 0.0625])
OPTIONS = {"plain": {}, "all": {"window": 9, "softcap": 2.0, "alibi": SLOPES, "scale": 0.4, "transposed": True}}
# Compiling dominates these tests and the arrays are tiny: LLVM's optimisations are left out.


def arrays(nodes, seed=0, transposed=False):
    shapes = (B, H, nodes, D), (B, G, C, D), (B, G, C, D), (B, G, nodes, D), (B, G, nodes, D)
    q, k, v, nk, nv = checks.normal(seed, *shapes)
    return q, jnp.swapaxes(k, 2, 3) if transposed else k, v, nk, nv


def ancestors_of(parents):
    """`bool[N, N]` of a tree given by each node's parent, an earlier node or -1; None: padding."""
    visible = np.zeros((len(parents), len(parents)), bool)
    for i, parent in enumerate(parents):
        if parent is not None:
            visible[i] = visible[parent] if parent >= 0 else False
            visible[i, i] = True
    return visible


@functools.cache
def compiled(name, impl=None):
    return jax.jit(lambda x, bits, lengths: tree(*x, bits, lengths, impl=impl, **OPTIONS[name]))


@pytest.mark.smoke
@pytest.mark.parametrize("name", OPTIONS)
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_equals_boolean_mask(name, data):
    """Bits give what the reference gives with the mask written out, over two words, with padding."""
    nodes = 35
    parents = [[data.draw(st.sampled_from([-1, None, *range(i)])) for i in range(nodes)] for _ in range(B)]
    parents = [[None if p not in (-1, None) and row[p] is None else p for p in row] for row in parents]
    visible = jnp.asarray(np.stack([ancestors_of(row) for row in parents]))
    bits = _pack(visible)
    assert bits.shape == (B, nodes, 2) and (_unpack(bits) == visible).all()
    x = arrays(nodes, transposed="transposed" in OPTIONS[name])
    got = compiled(name)(x, bits, LENGTHS)
    checks.assert_close(got, compiled(name, "ref")(x, bits, LENGTHS))
    padding = ~np.asarray(visible).any(-1)[:, None].repeat(H, 1)
    assert not np.asarray(got[0])[padding].any() and np.isneginf(np.asarray(got[1])[padding]).all()


_pack, _unpack = jax.jit(pack_ancestors), jax.jit(unpack_ancestors)


@pytest.mark.slow
def test_invariant_rows():
    """A row's bits are the same whatever the other row's length and tree."""
    x = arrays(4, seed=6)
    attend = jax.jit(lambda *x: tree(*x, invariant=True, block=16, softcap=2.0))
    trees = [_pack(np.stack([ancestors_of([-1, 0, 0, 2]), ancestors_of(row)])) for row in ([-1] * 4, [None] * 4)]
    want, got = (attend(*x, bits, jnp.array([37, n])) for bits, n in zip(trees, (48, 0), strict=True))
    assert all((a[0] == b[0]).all() for a, b in zip(got, want, strict=True))


@pytest.mark.slow
def test_a_path_is_decode():
    """A tree that is one path is plain decode of newest tokens; a row of its branch is decode of that branch."""
    q, k, v, nk, nv = arrays(4, seed=1)
    k, v = (x[:, :, :40] for x in (k, v))
    bits = _pack(ancestors_of([-1, 0, 1, 2])[None])
    lengths = jnp.array([40, 40])
    trees, decoded = jax.jit(tree), jax.jit(decode)
    out = trees(q, k, v, nk, nv, bits, lengths)
    full = [jnp.concatenate([x, y], 2) for x, y in ((k, nk), (v, nv))]
    checks.assert_close(out, decoded(q, *full, jnp.array([44, 44])))
    branch = trees(q, k, v, nk, nv, _pack(ancestors_of([-1, 0, 0, 2])[None]), lengths)
    kept = [jnp.concatenate([x, y[:, :, jnp.array([0, 2, 3])]], 2) for x, y in ((k, nk), (v, nv))]
    want = decoded(q[:, :, jnp.array([0, 2, 3])], *kept, jnp.array([43, 43]))
    checks.assert_close([x[:, :, jnp.array([0, 2, 3])] for x in branch], want)


def test_codes():
    """The cache may be codes, and the nodes are not."""
    q, k, v, nk, nv = arrays(4, seed=2, transposed=True)
    keys = jax.jit(functools.partial(quantize, bits=4, tokens=16, channels=1, transposed=True))(k)
    values = jax.jit(quantize)(v)
    bits = _pack(ancestors_of([-1, 0, 0, 2])[None])
    forms = (jax.jit(functools.partial(tree, transposed=True, impl=impl)) for impl in (None, "ref"))
    got, want = (form(q, keys, values, nk, nv, bits, LENGTHS) for form in forms)
    checks.assert_close(got, want)


@pytest.mark.slow
def test_gradient():
    """Finite, with padding and empty rows, and that of the reference."""
    x = arrays(5, seed=3)
    bits = _pack(ancestors_of([-1, 0, 0, 1, None])[None])
    cotangent = checks.normal(4, (B, H, 5, D))[0]

    def f(x, impl):
        return jnp.vdot(tree(*x, bits, jnp.array([48, 0]), impl=impl)[0], cotangent)

    got, want = (jax.jit(jax.grad(f), static_argnums=1)(x, impl) for impl in (None, "ref"))
    checks.assert_close(got, want)


def test_planted_bug(monkeypatch):
    """Negative control: bits read from the wrong end are caught."""
    x = arrays(5, seed=3)
    bits = _pack(ancestors_of([-1, 0, 0, 1, 3])[None])
    want = jax.jit(functools.partial(tree, impl="ref"))(*x, bits, LENGTHS)
    checks.assert_close(jax.jit(tree)(*x, bits, LENGTHS), want)
    mirrored = _unpack(bits)[..., ::-1]
    monkeypatch.setattr("jaxinfer.pallas_kernels.attention.tree.api.unpack_ancestors", lambda _: mirrored)
    got = jax.jit(lambda *x: tree(*x))(*x, bits, LENGTHS)
    with pytest.raises(AssertionError, match="relative errors"):
        checks.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ancestors": jnp.zeros((1, 4, 2), jnp.uint32)}, r"ancestors: got \[1, 4, 2\]"),
        ({"ancestors": jnp.zeros((1, 4, 1), jnp.int32)}, "ancestors: got int32, accepts uint32"),
        ({"node_k": jnp.zeros((B, G, 5, D))}, "node_k: got"),
        ({"node_v": jnp.zeros((B, G, 4, D), jnp.bfloat16)}, "node_v: got bfloat16"),
        ({"lengths": jnp.array([1, 49])}, r"lengths\[1\]: got 49, accepts 0 to 48"),
        ({"q": jnp.zeros((B, H, 65, D))}, "q: got 65 nodes, accepts at most 64"),
    ],
)
def test_bad_input(change, message):
    names = ("q", "k", "v", "node_k", "node_v")
    arguments = dict(zip(names, arrays(4), strict=True))
    arguments |= {"ancestors": jnp.zeros((1, 4, 1), jnp.uint32), "lengths": LENGTHS} | change
    if arguments["q"].shape[2] > 64:
        arguments |= {name: jnp.zeros((B, G, 65, D)) for name in ("node_k", "node_v")}
    with pytest.raises(ArgumentError, match=message):
        tree(**arguments)


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=checks.needs_mosaic_gpu)])
def test_lowers(platform):
    """64 nodes of 32 heads over a cache of 8K: one kernel, and the nodes among themselves in XLA."""
    shapes = (4, 32, 64, 128), *[(4, 8, 8192, 128)] * 2, *[(4, 8, 64, 128)] * 2
    bits, lengths = jax.ShapeDtypeStruct((1, 64, 2), jnp.uint32), jax.ShapeDtypeStruct((4,), jnp.int32)
    checks.assert_lowers(tree, *checks.avals(*shapes), bits, lengths, platform=platform)


def test_tpu_interpreted():
    x = arrays(35, seed=5)
    bits = _pack(ancestors_of([-1, *range(34)])[None])
    got = jax.jit(functools.partial(tree, impl="tpu", interpret=True))(*x, bits, LENGTHS)
    checks.assert_close(got, compiled("plain", "ref")(x, bits, LENGTHS))
