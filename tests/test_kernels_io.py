"""The I/O model: it counts what the kernels' own grids and index maps fetch, and follows the paper's two regimes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels.attention import io
from jaxinfer.pallas_kernels.attention.flash import tpu
from jaxinfer.pallas_kernels.attention.flash.call import Call
from jaxinfer.pallas_kernels.attention.flash.scores import Rules


def call(queries=512, keys=512, heads=4, kv_heads=2, batch=2, dim=64, block=(128, 128), **rules):
    return Call(Rules(0.125, **rules), batch, heads, kv_heads, queries, keys, dim, dim, "bfloat16", block=block)


CALLS = {
    "full": call(),
    "causal": call(causal=True),
    "window": call(causal=True, window=200, queries=640, keys=640),
    "a chunk against its past": call(causal=True, queries=128, keys=512),
    "one block of keys": call(queries=256, keys=128),
    "more queries than keys": call(causal=True, queries=512, keys=256),
}


@pytest.fixture
def traffic(monkeypatch):
    """Replays every pallas_call's grid: bytes of the blocks that come or go, one that is there already left out."""
    moved = {"read": 0, "written": 0}

    def replay(kernel, *, grid_spec, out_shape, **options):
        outs = out_shape if isinstance(out_shape, list) else [out_shape]
        out_specs = grid_spec.out_specs if isinstance(grid_spec.out_specs, (list, tuple)) else [grid_spec.out_specs]

        def run(*operands):
            scalars = [np.asarray(x) for x in operands[: grid_spec.num_scalar_prefetch]]
            arrays = operands[grid_spec.num_scalar_prefetch :]
            for name, specs, ends in (("read", grid_spec.in_specs, arrays), ("written", out_specs, outs)):
                for spec, end in zip(specs, ends, strict=True):
                    before, count = None, 0
                    for step in itertools.product(*map(range, grid_spec.grid)):
                        at = tuple(int(x) for x in spec.index_map(*step, *scalars))
                        count += at != before
                        before = at
                    moved[name] += count * int(np.prod(spec.block_shape)) * jnp.dtype(end.dtype).itemsize
            results = [jnp.zeros(x.shape, x.dtype) for x in outs]
            return results if isinstance(out_shape, list) else results[0]

        return run

    monkeypatch.setattr(pl, "pallas_call", replay)
    return moved


def arrays(c: Call):
    shapes = [(c.batch, c.heads, c.queries, c.dim)] + [(c.batch, c.kv_heads, c.keys, c.dim)] * 2
    return [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.smoke
@pytest.mark.parametrize("name", CALLS)
def test_forward_bytes_are_the_kernels_fetches(name, traffic):
    c = CALLS[name]
    tpu.forward(c, *arrays(c), None, None, None)
    model = io.forward_bytes(c, c.block)
    assert traffic == {"read": model.read, "written": model.written}


@pytest.mark.parametrize("name", ["causal", "window", "one block of keys"])
def test_backward_bytes_are_the_kernels_fetches(name, traffic):
    c = CALLS[name]
    rows = jnp.zeros((c.batch, c.heads, c.queries))
    q, k, v = arrays(c)
    tpu.backward(c, q, k, v, None, None, None, q, rows, q, rows)
    model = io.backward_bytes(c, c.block)
    assert traffic == {"read": model.read, "written": model.written}


def test_a_mask_instead_of_a_skip_is_caught(traffic):
    """Negative control: the bytes of full attention are not those of a causal kernel."""
    c = CALLS["causal"]
    tpu.forward(c, *arrays(c), None, None, None)
    assert traffic["read"] < 0.75 * io.forward_bytes(CALLS["full"], c.block).read


def test_two_regimes():
    """Below d^2 numbers of cache the bound falls with the root of the cache, above with the cache; they meet at d^2."""
    n, d = 1 << 14, 128
    assert io.regime(d, d * d - 1) == "small" and io.regime(d, d * d) == "large"
    assert io.least_numbers(n, n, d, d * d) == pytest.approx(n * n)
    assert io.least_numbers(n, n, d, d * d // 4) == pytest.approx(2 * n * n)
    assert io.least_numbers(n, n, d, d * d * 4) == pytest.approx(n * n / 4)
    assert io.least_numbers(n, n, d, 1 << 40) == 4 * n * d, "no cache avoids reading the inputs and writing the output"


@pytest.mark.parametrize("cache", [1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18])
def test_the_better_algorithm_is_within_a_constant_of_the_bound(cache):
    """FlashAttention above d^2 and tiled products far below it move at most 16 times the bound, as the paper proves."""
    n, d = 1 << 14, 128
    flash, tiled = io.flash_numbers(n, n, d, cache), io.tiled_numbers(n, n, d, cache)
    bound = io.least_numbers(n, n, d, cache)
    assert bound <= min(flash, tiled) <= 16 * bound
    assert (flash < tiled) == (io.regime(d, cache) == "large"), (
        "the algorithms cross between these caches as the bounds do"
    )


def test_blocks_are_chosen_by_bytes():
    """More cache lets more rows of queries share a fetch of keys; the choice fits, and nothing that fits moves less."""
    c = call(queries=8192, keys=8192)
    sizes = (128, 256, 512, 1024, 2048)
    small, large = io.choose_block(c, 1 << 20, sizes), io.choose_block(c, 1 << 24, sizes)
    assert io.working_set(c, small) <= 1 << 20 and small[0] < large[0]
    best = io.forward_bytes(c, large).total
    for pair in itertools.product(sizes, repeat=2):
        assert io.working_set(c, pair) > 1 << 24 or io.forward_bytes(c, pair).total >= best
    assert io.choose_block(c, 1, sizes) == (128, 128)
