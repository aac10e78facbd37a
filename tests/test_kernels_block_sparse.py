"""Block-sparse attention: what is listed is attended to, exactly; what is not is neither read nor multiplied."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core.errors import ArgumentError
from jaxinfer.pallas_kernels.attention.block_sparse import block_sparse, blocked
from jaxinfer.pallas_kernels.attention.block_sparse.call import turn
from jaxinfer.pallas_kernels.attention.flash import flash
from tests.kernel_checks import (
    assert_close,
    assert_lowers,
    assert_within_budget,
    avals,
    error,
    needs_mosaic_gpu,
    needs_target,
    normal,
    targets,
)


def lists(seed, rows, heads, q_blocks, k_blocks, longest):
    """Random lists in random order; block 0 of head 0 lists nothing."""
    rng = np.random.default_rng(seed)
    indices = rng.permuted(np.tile(np.arange(k_blocks), (rows, heads, q_blocks, 1)), axis=-1)[..., :longest]
    counts = rng.integers(1, longest + 1, (rows, heads, q_blocks))
    counts[:, 0, 0] = 0
    return indices.astype(np.int32), counts.astype(np.int32)


# name -> (B, H, G, T, S, d, e), block, (rows, heads) of the lists, options
CASES = {
    "grouped, a list a head": ((2, 4, 2, 48, 64, 16, 24), (16, 8), (1, 4), {}),
    "ragged, alibi, softcap, a list a row": (
        (2, 2, 2, 32, 48, 8, 8),
        (8, 16),
        (2, 2),
        {"causal": True, "window": 20, "softcap": 6.0, "q_lengths": [32, 11], "kv_lengths": [45, 30], "slopes": True},
    ),
}

# The TPU takes blocks of 128 queries, or all of them.
TPU_CASES = {
    "a block of all queries": ((2, 2, 1, 32, 64, 16, 24), (32, 16), (2, 2), {"causal": True}),
    "two blocks, ragged": (
        (1, 2, 1, 256, 64, 8, 8),
        (128, 32),
        (1, 1),
        {"softcap": 6.0, "q_lengths": [200], "kv_lengths": [50], "slopes": True},
    ),
}


@functools.cache
def results(name, dtype="float32", **how):
    """Both results and the three gradients, of one compiled program."""
    (b, h, g, t, s, d, e), block, (rows, heads), options = (CASES | TPU_CASES)[name]
    qkv = normal(1, (b, h, t, d), (b, g, s, d), (b, g, s, e), dtype=dtype)
    cotangents = (normal(2, (b, h, t, e), dtype=dtype)[0], normal(3, (b, h, t))[0])
    options = {key: jnp.asarray(x, jnp.int32) if key.endswith("lengths") else x for key, x in options.items()}
    if options.get("slopes"):
        options["slopes"] = 2.0 ** -jnp.arange(1, h + 1, dtype=jnp.float32)
    indices, counts = lists(4, rows, heads, t // block[0], s // block[1], max(1, s // block[1] - 1))

    @jax.jit
    def run(qkv, cotangents):
        out, pull = jax.vjp(lambda *x: block_sparse(*x, indices, counts, block=block, **options, **how), *qkv)
        return out, pull(cotangents)

    return run(qkv, cotangents)


@pytest.mark.smoke
@pytest.mark.parametrize("name", CASES)
def test_blocked_is_the_masked_softmax(name):
    assert_close(results(name, impl="blocked"), results(name, impl="ref"), factor=3)


@pytest.mark.slow
@settings(max_examples=3, derandomize=True, deadline=None, database=None)
@given(
    heads=st.sampled_from([(2, 2, 2), (4, 2, 1), (4, 1, 4)]),
    blocks=st.sampled_from([(1, 1, 1), (4, 5, 3), (6, 4, 4), (8, 3, 2)]),
    kind=st.sampled_from(["equal", "a block more or less", "unlike", "empty"]),
    causal=st.booleans(),
    traced=st.booleans(),
)
def test_blocked_is_the_masked_softmax_for_any_lists(heads, blocks, kind, causal, traced):
    """Lists of one length, nearly or not at all, or empty; one for all heads or one a head; known or computed."""
    (h, g, lists_of), (rows, columns, longest) = heads, blocks
    q, k, v = normal(11, (1, h, 8 * rows, 8), (1, g, 8 * columns, 8), (1, g, 8 * columns, 4))
    indices, counts = lists(12, 1, lists_of, rows, columns, longest)
    if kind != "unlike":
        counts = np.full_like(counts, 0 if kind == "empty" else longest)
    if kind == "a block more or less":
        counts[..., -1] = max(1, longest - 1)

    def run(impl):
        def attend(q, k, v, indices, counts):
            return block_sparse(q, k, v, indices, counts, block=(8, 8), causal=causal, impl=impl)

        if traced:
            return jax.jit(attend)(q, k, v, indices, counts)
        return jax.jit(lambda *x: attend(*x, indices, counts))(q, k, v)

    assert_close(run("blocked"), run("ref"), factor=3)


def test_blocks_of_rows_take_steps_together(monkeypatch):
    """Lists of about one length share steps, with gradients as before, where they do not cost much padding."""
    q, k, v = normal(13, (1, 4, 64, 8), (1, 2, 64, 8), (1, 2, 64, 8))
    indices, counts = lists(14, 1, 4, 8, 8, 6)
    counts[:] = 6
    counts[0, 2, 3] = 5
    taken = []
    choose = blocked.together
    monkeypatch.setattr(blocked, "together", lambda *x: taken.append(choose(*x)) or taken[-1])

    @jax.jit
    def run(q, k, v):
        def both(impl):
            out, pull = jax.vjp(lambda *x: block_sparse(*x, indices, counts, block=(8, 8), impl=impl), q, k, v)
            return out, pull(out)

        return both("blocked"), both("ref")

    assert_close(*run(q, k, v), factor=3)
    assert set(taken) == {(8, True)}
    counts[0, 0, ::2] = 1
    counts[0, 1, ::2] = 0
    jax.eval_shape(lambda *x: block_sparse(*x, indices, counts, block=(8, 8)), q, k, v)
    assert taken[-1] == (1, False), "padding would be a third of the work"


def test_bfloat16():
    name = "grouped, a list a head"
    assert_close(results(name, "bfloat16"), results(name, "bfloat16", impl="ref"), "bfloat16", factor=2)


@pytest.mark.parametrize("name", TPU_CASES)
def test_tpu_form_interpreted(name):
    assert_close(results(name, interpret=True), results(name, impl="ref"), factor=3)


def production(impl, block):
    """A function whose program holds the forward and the backward kernels, its arguments: 1/8 of 8192 keys listed."""
    heads, length, dim = 8, 8192, 128
    rng = np.random.default_rng(0)
    blocks = length // block[1]
    order = rng.permuted(np.tile(np.arange(blocks), (1, heads, length // block[0], 1)), axis=-1)
    indices = order[..., : blocks // 8].astype(np.int32)
    counts = np.full(indices.shape[:3], blocks // 8, np.int32)

    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: block_sparse(*x, indices, counts, block=block, causal=True, impl=impl), q, k, v)
        return pull(out)

    return run, avals((1, heads, length, dim), *[(1, 2, length, dim)] * 2)


def test_tpu_form_lowers():
    run, arguments = production(None, (128, 128))
    assert_lowers(run, *arguments, platform="tpu", calls=3)


@needs_target("v5e")
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_tpu_form_compiles(target):
    run, arguments = production("tpu", (128, 128))
    build = targets.compile_for(run, *arguments, target=target)
    assert len(build.kernels) == 3
    assert_within_budget("block_sparse", "1/8 of 8192, 128x128", build)


@needs_mosaic_gpu
def test_gpu_form_lowers():
    run, arguments = production("gpu", (64, 64))
    assert_lowers(run, *arguments, platform="cuda", calls=3)


@needs_target("h200")
@pytest.mark.parametrize("block", [(64, 64), (128, 128)])
def test_gpu_form_compiles(block):
    run, arguments = production("gpu", block)
    build = targets.compile_for(run, *arguments, target="h200")
    assert len(build.kernels) == 3
    assert_within_budget("block_sparse", f"1/8 of 8192, {block[0]}x{block[1]}", build)


def test_all_blocks_listed_is_flash():
    q, k, v = normal(5, *[(1, 2, 32, 8)] * 3)
    indices = np.tile(np.arange(4, dtype=np.int32), (1, 1, 4, 1))
    counts = np.full((1, 1, 4), 4, np.int32)

    @jax.jit
    def run(q, k, v):
        return block_sparse(q, k, v, indices, counts, block=(8, 8), causal=True), flash(q, k, v, causal=True)

    assert_close(*run(q, k, v), factor=2)


def test_what_is_not_listed_is_not_read():
    """NaNs in the blocks that no list names change nothing, forward and backward: a mask would let them through."""
    q, k, v = normal(6, *[(1, 1, 32, 8)] * 3)
    indices, counts = np.array([[[[0], [2], [2], [0]]]], np.int32), np.ones((1, 1, 4), np.int32)
    poisoned = [x.at[:, :, 8:16].set(jnp.nan).at[:, :, 24:].set(jnp.nan) for x in (k, v)]

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: block_sparse(*x, indices, counts, block=(8, 8)), q, k, v)
        return out, pull(out)

    clean, dirty = run(q, k, v), run(q, *poisoned)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True))


def test_traced_lists():
    """Lists that the program itself computes give the same results and gradients as lists known beforehand."""
    q, k, v = normal(7, (1, 2, 32, 8), (1, 1, 32, 8), (1, 1, 32, 8))
    indices, counts = lists(8, 1, 2, 4, 4, 3)

    def loss(indices, counts):
        def f(q, k, v):
            return jnp.sum(jnp.sin(block_sparse(q, k, v, indices, counts, block=(8, 8))[0]))

        return jax.value_and_grad(f, (0, 1, 2))(q, k, v)

    known = jax.jit(lambda: loss(indices, counts))()
    assert_close(jax.jit(loss)(indices, counts), known)


def test_lists_turn_round():
    """Each listed pair of blocks is in the turned lists once, traced or not."""
    indices, counts = lists(9, 2, 4, 6, 5, 4)
    pairs = {
        (b, h, i, int(j))
        for b in range(2) for h in range(4) for i in range(6) for j in indices[b, h, i, : counts[b, h, i]]
    }  # fmt: skip
    for give in (lambda x: x, jnp.asarray):
        turned, turned_counts = turn(give(indices), give(counts), 4, 2, 5)
        found = [
            (b, 2 * g + int(e) // 6, int(e) % 6, j)
            for b in range(2) for g in range(2) for j in range(5)
            for e in turned[b, g, j, : int(turned_counts[b, g, j])]
        ]  # fmt: skip
        assert len(found) == len(set(found)) and set(found) == pairs


def test_a_list_read_too_far_is_caught():
    """Negative control: one entry more than the count of a list changes the result by far."""
    q, k, v = normal(10, *[(1, 1, 16, 8)] * 3)
    indices, counts = np.array([[[[0, 1], [1, 0]]]], np.int32), np.ones((1, 1, 2), np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(impl, q, k, v, counts):
        return block_sparse(q, k, v, indices, counts, block=(8, 8), impl=impl)[0]

    assert error(run("blocked", q, k, v, counts + 1), run("ref", q, k, v, counts)) > 0.05


def test_bad_lists_are_named():
    x = jnp.zeros((1, 2, 32, 8))
    indices, counts = np.zeros((1, 2, 4, 2), np.int32), np.ones((1, 2, 4), np.int32)
    for change, message in [
        ({"block": (7, 8)}, r"block: got \(7, 8\), accepts divisors of the 32 queries"),
        ({"block": None}, "block: got None"),
        ({"indices": indices[:, :, :3], "counts": counts[:, :, :3]}, r"indices: got \[1, 2, 3, 2\]"),
        ({"indices": indices + 4}, r"indices\[0, 0, 0, 0\]: got 4, accepts 0 to 3"),
        ({"counts": counts + 2}, r"counts\[0, 0, 0\]: got 3, accepts 0 to 2"),
        ({"counts": counts + 1}, r"indices\[0, 0, 0\]: got a block twice"),
        ({"counts": counts * 1.0}, "counts: got float64"),
        ({"impl": "cudnn"}, "impl: got 'cudnn'"),
        ({"slopes": jnp.zeros(3)}, "block_sparse: slopes"),
    ]:
        arguments = {"indices": indices, "counts": counts, "block": (8, 8)} | change
        with pytest.raises(ArgumentError, match=message):
            block_sparse(x, x, x, arguments.pop("indices"), arguments.pop("counts"), **arguments)
