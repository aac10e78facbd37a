"""shared_prefix: prefixes kept once give what every row gives with its own copy of its text."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError
from jaxinfer.pallas_kernels.attention.decode import decode
from jaxinfer.pallas_kernels.attention.shared_prefix import packed, shared_prefix
from jaxinfer.pallas_kernels.attention.shared_prefix.members import pack
from tests import kernel_checks as checks

B, H, G, T, D, P, C, N = 6, 4, 2, 2, 16, 40, 24, 5
# A root, two children, and a grandchild of the first; one row has no prefix at all, one only the root.
PATHS = jnp.array([[0, 1, 3], [0, 2, -1], [0, 1, 4], [-1, -1, -1], [0, -1, -1], [0, 1, 3]])
PREFIX_LENGTHS = jnp.array([40, 7, 0, 33, 12])
SUFFIX_LENGTHS = jnp.array([24, 2, 9, 5, 0, 1])
SLOPES = jnp.array([0.5, 0.25, 0.125, 0.0625])
OPTIONS = {
    "plain": {},
    "all": {"window": 30, "softcap": 2.0, "alibi": SLOPES, "scale": 0.4, "block": 16},
    "transposed": {"transposed": True, "block": 16},
}
# Compiling dominates these tests and the arrays are tiny: LLVM's optimisations are left out.


def arrays(seed=0, transposed=False, dtype="float32"):
    shapes = (B, H, T, D), (N, G, P, D), (N, G, P, D), (B, G, C, D), (B, G, C, D)
    q, pk, pv, sk, sv = checks.normal(seed, *shapes, dtype=dtype)
    return (q, jnp.swapaxes(pk, 2, 3), pv, jnp.swapaxes(sk, 2, 3), sv) if transposed else (q, pk, pv, sk, sv)


@functools.cache
def compiled(name, impl=None):
    @jax.jit
    def f(arrays, paths, prefix_lengths, suffix_lengths):
        lengths = {"prefix_lengths": prefix_lengths, "suffix_lengths": suffix_lengths}
        return shared_prefix(*arrays, paths=paths, impl=impl, **lengths, **OPTIONS[name])

    return f


def copied(arrays, paths, prefix_lengths, suffix_lengths, **options):
    """Each row's text written out, and plain decode of it."""
    q, pk, pv, sk, sv = (np.asarray(x) for x in arrays)
    k, v = (np.zeros((B, G, paths.shape[1] * P + C, D), np.float32) for _ in range(2))
    lengths = []
    for b in range(B):
        live = [(n, int(prefix_lengths[n])) for n in np.asarray(paths[b]) if n >= 0]
        own = int(suffix_lengths[b])
        for full, prefix, suffix in ((k, pk, sk), (v, pv, sv)):
            text = np.concatenate([*(prefix[n, :, :size] for n, size in live), suffix[b, :, :own]], 1)
            full[b, :, : text.shape[1]] = text
        lengths.append(sum(size for _, size in live) + own)
    return jax.jit(functools.partial(decode, impl="ref", **options))(q, k, v, jnp.array(lengths))


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("name", ["all"])
def test_equals_copies(name):
    """A tree of prefixes is decode of each row's own text, options, short rows and all."""
    lengths = PATHS, PREFIX_LENGTHS, SUFFIX_LENGTHS
    options = {k: v for k, v in OPTIONS[name].items() if k != "block"}
    want = copied(arrays(), *lengths, **options)
    checks.assert_close(compiled(name)(arrays(), *lengths), want)
    checks.assert_close(compiled(name, "ref")(arrays(), *lengths), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transposed", "all"])
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_paths(name, data):
    """However the rows are spread over the prefixes."""
    paths = jnp.array(
        data.draw(st.lists(st.lists(st.integers(-1, N - 1), min_size=3, max_size=3), min_size=B, max_size=B))
    )
    lengths = jnp.array(data.draw(st.lists(st.integers(0, P), min_size=N, max_size=N)))
    x = arrays(1, transposed=name == "transposed")
    arguments = x, paths, lengths, SUFFIX_LENGTHS
    checks.assert_close(compiled(name)(*arguments), compiled(name, "ref")(*arguments))


def test_one_prefix():
    """Hydragen's own case: one prefix for all rows, no paths."""
    q, pk, pv, sk, sv = arrays(2, dtype="bfloat16")
    got = jax.jit(shared_prefix)(q, pk[:1], pv[:1], sk, sv)
    assert got[0].dtype == jnp.bfloat16

    @jax.jit
    def written_out(q, pk, pv, sk, sv):
        k, v = (jnp.concatenate([jnp.broadcast_to(x[:1], (B, G, P, D)), y], 2) for x, y in ((pk, sk), (pv, sv)))
        return decode(q, k, v, impl="ref")

    checks.assert_close(got, written_out(q, pk, pv, sk, sv), "bfloat16")


@pytest.mark.slow
def test_invariant_rows():
    """A row's bits are the same whoever shares its prefixes, however long they are, wherever in the batch it stands."""
    attend = jax.jit(
        lambda x, paths, prefix, suffix: shared_prefix(
            *x, paths=paths, prefix_lengths=prefix, suffix_lengths=suffix, invariant=True, block=16, window=30
        )
    )
    x = arrays(7)
    out, lse = attend(x, PATHS, PREFIX_LENGTHS, SUFFIX_LENGTHS)
    alone = jnp.full_like(PATHS, -1).at[0].set(PATHS[0])  # nobody else has a prefix
    others = PREFIX_LENGTHS.at[jnp.array([2, 4])].set(jnp.array([29, 1]))  # of prefixes that row 0 does not read
    order = jnp.array([3, 5, 0, 1, 4, 2])
    moved = (x[0][order], *x[1:3], x[3][order], x[4][order])
    for at, arguments in (
        (0, (x, alone, PREFIX_LENGTHS, SUFFIX_LENGTHS.at[1:].set(0))),
        (0, (x, PATHS, others, SUFFIX_LENGTHS)),
        (2, (moved, PATHS[order], PREFIX_LENGTHS, SUFFIX_LENGTHS[order])),
    ):
        got = attend(*arguments)
        assert (got[0][at] == out[0]).all() and (got[1][at] == lse[0]).all()


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(-1, 3), min_size=9, max_size=9))
def test_pack(prefixes):
    """Every pair once, in a tile of its own prefix."""
    members = jax.tree.map(np.asarray, _pack(jnp.array(prefixes)))
    held = members.pair[members.pair >= 0]
    assert sorted(held) == [i for i, n in enumerate(prefixes) if n >= 0]
    for i, n in enumerate(prefixes):
        if n < 0:
            assert members.slot[i] == members.pair.size
        else:
            assert members.pair.ravel()[members.slot[i]] == i
            assert members.prefix[members.slot[i] // 2] == n


_pack = jax.jit(functools.partial(pack, count=4, size=2))


@pytest.mark.slow
def test_gradient():
    """The gradient in every array and in the slopes is that of the written-out reference."""
    cotangents = checks.normal(4, (B, H, T, D), (B, H, T))
    suffix = jnp.maximum(SUFFIX_LENGTHS, 2)  # every query sees a key: jax's own gradient of an empty softmax is NaN

    @jax.jit
    def pull(arrays, slopes):
        def f(arrays, slopes):
            out, lse = shared_prefix(
                *arrays, paths=PATHS, prefix_lengths=PREFIX_LENGTHS, suffix_lengths=suffix, alibi=slopes, window=60,
                softcap=3.0,
            )  # fmt: skip
            return jnp.vdot(out, cotangents[0]) + jnp.vdot(lse, cotangents[1])

        return jax.grad(f, (0, 1))(arrays, slopes)

    def written_out(arrays, slopes):
        q, pk, pv, sk, sv = arrays
        along = jnp.where(PATHS >= 0, PREFIX_LENGTHS[PATHS], 0)
        starts = jnp.cumsum(along, 1) - along
        total = along.sum(1)
        at = jnp.concatenate([(starts[:, :, None] + jnp.arange(P)).reshape(B, -1), total[:, None] + jnp.arange(C)], 1)
        there = (jnp.arange(P) < along[:, :, None]).reshape(B, -1)
        there = jnp.concatenate([there, jnp.arange(C) < suffix[:, None]], 1)
        k, v = (
            jnp.repeat(jnp.concatenate([jnp.moveaxis(x[PATHS], 1, 2).reshape(B, G, -1, D), y], 2), H // G, 1)
            for x, y in ((pk, sk), (pv, sv))
        )
        distance = (total + suffix)[:, None, None] - T + jnp.arange(T)[:, None] - at[:, None]
        score = 3.0 * jnp.tanh(jnp.einsum("bhtd,bhcd->bhtc", q, k) * D**-0.5 / 3.0)
        score -= slopes[:, None, None] * distance[:, None]
        score = jnp.where((there[:, None] & (distance >= 0) & (distance < 60))[:, None], score, -jnp.inf)
        out = jnp.einsum("bhtc,bhcd->bhtd", jax.nn.softmax(score), v)
        return jnp.vdot(out, cotangents[0]) + jnp.vdot(jax.nn.logsumexp(score, -1), cotangents[1])

    want = jax.jit(jax.grad(written_out, (0, 1)))(arrays(3), SLOPES)
    checks.assert_close(pull(arrays(3), SLOPES), want)


def test_planted_bug(monkeypatch):
    """Negative control: packing that gives a tile to its neighbour's prefix is caught."""
    lengths = PATHS, PREFIX_LENGTHS, SUFFIX_LENGTHS
    want = compiled("plain", "ref")(arrays(), *lengths)

    def shifted(*args):
        members = pack(*args)
        return members._replace(prefix=jnp.minimum(members.prefix + 1, N - 1))

    monkeypatch.setattr(packed, "pack", shifted)
    options = {"prefix_lengths": PREFIX_LENGTHS, "suffix_lengths": SUFFIX_LENGTHS}
    got = jax.jit(lambda x: shared_prefix(*x, paths=PATHS, **options))(arrays())
    with pytest.raises(AssertionError, match="relative errors"):
        checks.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": None}, "paths: got None, accepts a path for each row, with 5 prefixes"),
        ({"paths": PATHS[:2]}, "paths: got"),
        ({"paths": PATHS + 1}, r"paths\[2, 2\]: got 5, accepts -1 to 4"),
        ({"prefix_lengths": jnp.full(N, 41)}, r"prefix_lengths\[0\]: got 41, accepts 0 to 40"),
        ({"suffix_lengths": jnp.zeros(B)}, "suffix_lengths: got float32"),
        ({"suffix_v": jnp.zeros((B, G, C, D + 1))}, "suffix_v: got"),
        ({"prefix_k": jnp.zeros((N, G, P, D), jnp.bfloat16)}, "prefix_v: got float32, accepts the dtype of prefix_k"),
        ({"window": 1.5}, "window: got 1.5"),
    ],
)
def test_bad_input(change, message):
    names = ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v")
    arguments = dict(zip(names, arrays(), strict=True)) | {"paths": PATHS} | change
    with pytest.raises(ArgumentError, match=message):
        shared_prefix(**arguments)


@pytest.mark.smoke
def test_tpu_interpreted():
    lengths = PATHS, PREFIX_LENGTHS, SUFFIX_LENGTHS
    options = {"prefix_lengths": PREFIX_LENGTHS, "suffix_lengths": SUFFIX_LENGTHS, "window": 30}
    got = jax.jit(functools.partial(shared_prefix, paths=PATHS, impl="tpu", interpret=True, **options))(*arrays(5))
    checks.assert_close(got, copied(arrays(5), *lengths, window=30))


@checks.needs_mosaic_gpu
@pytest.mark.slow
def test_gpu_interpreted():
    shapes = (4, 4, 1, 64), (3, 2, 128, 64), (3, 2, 128, 64), (4, 2, 64, 64), (4, 2, 64, 64)
    x = checks.normal(6, *shapes, dtype="bfloat16")
    options = {
        "paths": jnp.array([[0, 1], [0, 2], [0, 1], [-1, -1]]), "prefix_lengths": jnp.array([128, 50, 7]),
        "suffix_lengths": jnp.array([64, 3, 1, 9]),
    }  # fmt: skip
    got = shared_prefix(*x, impl="gpu", interpret=True, block=64, **options)
    checks.assert_close(got, shared_prefix(*x, impl="ref", **options), "bfloat16")


@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=checks.needs_mosaic_gpu)])
def test_lowers(platform):
    """Batch 256 over a tree of 16 prefixes of 16K: the prefixes' kernel and the suffixes'."""
    shapes = (256, 32, 1, 128), *[(16, 8, 16384, 128)] * 2, *[(256, 8, 1024, 128)] * 2
    paths = jax.ShapeDtypeStruct((256, 3), jnp.int32)
    checks.assert_lowers(
        lambda paths, *x: shared_prefix(*x, paths=paths), paths, *checks.avals(*shapes), platform=platform, calls=2
    )


@checks.needs_target("h200")
def test_compiles_for_gpu():
    shapes = (256, 32, 1, 128), *[(1, 8, 16384, 128)] * 2, *[(256, 8, 1024, 128)] * 2
    build = targets.compile_for(shared_prefix, *checks.avals(*shapes), target="h200")
    checks.assert_within_budget("decode", "8b 32k", build)
