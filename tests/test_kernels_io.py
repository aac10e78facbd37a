"""The I/O model: it counts what the kernels' own grids and index maps fetch, and follows the paper's two regimes."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels.attention import io
from jaxinfer.pallas_kernels.attention.block_sparse import walk
from jaxinfer.pallas_kernels.attention.block_sparse.call import turn
from jaxinfer.pallas_kernels.attention.flash import gpu, listed, tpu
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
# By the cache that the blocks are chosen for: one that holds d x d numbers, and one that does not.
TPU_REGIMES = {
    "large": (call(queries=128, keys=128, causal=True, dim=16), (8, 16, 32)),
    "small": (call(queries=64, keys=64, causal=True, dim=256), (8, 16)),
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
            results = [np.zeros(x.shape, x.dtype) for x in outs]
            return results if isinstance(out_shape, list) else results[0]

        return run

    monkeypatch.setattr(pl, "pallas_call", replay)
    return moved


def arrays(c: Call):
    shapes = [(c.batch, c.heads, c.queries, c.dim)] + [(c.batch, c.kv_heads, c.keys, c.dim)] * 2
    return [np.zeros(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.smoke
@pytest.mark.parametrize("name", CALLS)
def test_forward_bytes_are_the_kernels_fetches(name, traffic):
    c = CALLS[name]
    tpu.forward(c, *arrays(c), None, None, None)
    model = io.forward_bytes(c, c.block)
    assert traffic == {"read": model.read, "written": model.written}


@pytest.mark.parametrize("regime", TPU_REGIMES)
def test_forward_bytes_in_both_regimes(regime, traffic):
    """Blocks chosen for a cache of more or fewer than d x d numbers move what the model says."""
    c, sizes = TPU_REGIMES[regime]
    cache = 2 * c.dim * c.dim - 2 if regime == "small" else 24 << 10
    assert io.regime(c.dim, cache // 2) == regime
    c = dataclasses.replace(c, block=io.choose_block(c, cache, sizes))
    assert c.block is not None and io.working_set(c, c.block) <= cache
    tpu.forward(c, *arrays(c), None, None, None)
    model = io.forward_bytes(c, c.block)
    assert traffic == {"read": model.read, "written": model.written}


@pytest.mark.parametrize("name", ["causal", "window", "one block of keys"])
def test_backward_bytes_are_the_kernels_fetches(name, traffic):
    c = CALLS[name]
    rows = np.zeros((c.batch, c.heads, c.queries), np.float32)
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


def replay(c: Call, block: tuple[int, int], item: int = 2) -> tuple[io.Traffic, io.Traffic]:
    """Bytes forward and backward of the Hopper kernels, copy by copy, from the arithmetic by which they copy."""
    sparse = listed.sparse_call(c, block)
    lists, counts = listed.runs(c, block)
    turned, turned_counts = turn(lists, counts, c.group, c.group, sparse.k_blocks)
    pair = (c.dim + c.value_dim) * item  # a row of q and dout, or of k and v
    tile = io.choose_tile(block[1], c.dim, c.value_dim)
    forward = walk.Walk(sparse, tile)
    programs, streamed = fetches(forward, lists, counts)
    own = programs * walk.ROWS
    first = io.Traffic(own * c.dim * item + streamed * pair, own * (c.value_dim * item + 4))
    _, of_queries = fetches(walk.Walk(sparse, walk.ROWS), lists, counts)
    key_programs, of_keys = fetches(walk.Walk(sparse, walk.ROWS, turned=True), turned, turned_counts)
    keys = key_programs * walk.ROWS
    read = own * (pair + 8) + of_queries * pair + keys * pair + of_keys * (pair + 8)
    return first, io.Traffic(read, own * c.dim * item + keys * pair)


def fetches(kernel: walk.Walk, lists: np.ndarray, counts: np.ndarray) -> tuple[int, int]:
    """Programs of the grid, and the rows that they stream; every tile lies within the array and comes once."""
    flash, programs, rows = kernel.call.flash, list(itertools.product(*map(range, kernel.grid))), 0
    heads, length = (flash.heads, flash.queries) if kernel.turned else (flash.kv_heads, flash.keys)
    for program in programs:
        tiles = [kernel.streamed(program, lists, j) for j in range(int(kernel.steps(program, counts)))]
        rows += len(tiles) * kernel.tile
        assert len(set(tiles)) == len(tiles) and all(head < heads and 0 <= at < length for _, head, at in tiles)
    assert len({kernel.own(program) for program in programs}) == len(programs)
    return len(programs), rows


HOPPER = {
    "large": call(causal=True, queries=500, keys=640),
    "large, window": call(causal=True, window=200, queries=640, keys=640, dim=128),
    "large, full": call(queries=256, keys=512, batch=1, dim=128),
    "small": call(causal=True, queries=256, keys=256, dim=512),  # shared memory is less than d x d numbers
}


@pytest.mark.parametrize("block", [(64, 64), (64, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("name", HOPPER)
def test_hopper_bytes_are_the_kernels_copies(name, block):
    c = HOPPER[name]
    assert io.regime(c.dim, io.SHARED // 2) == name.split(",")[0]
    assert replay(c, block) == (io.hopper_forward_bytes(c, block), io.hopper_backward_bytes(c, block))


@pytest.mark.parametrize("regime", ["large", "small"])
def test_a_step_too_few_or_too_many_is_caught(regime, monkeypatch):
    """Negative control: kernels whose walk ends one tile early or late do not move the model's bytes."""
    c = HOPPER[regime]
    steps = walk.Walk.steps
    monkeypatch.setattr(walk.Walk, "steps", lambda self, program, counts: steps(self, program, counts) - 1)
    forward, backward = replay(c, (64, 64))
    assert forward != io.hopper_forward_bytes(c, (64, 64)) and backward != io.hopper_backward_bytes(c, (64, 64))
    monkeypatch.setattr(walk.Walk, "steps", lambda self, program, counts: steps(self, program, counts) + 1)
    with pytest.raises((AssertionError, IndexError)):
        forward, backward = replay(c, (64, 64))
        assert forward == io.hopper_forward_bytes(c, (64, 64))


def test_hopper_blocks_are_chosen_by_bytes_and_room():
    """Long lists are halved where that costs next to nothing; where a mask's edge would cost, blocks stay small."""
    assert gpu.blocks(call(causal=True, queries=4096, keys=4096, block=None)) == (64, 128)
    assert gpu.blocks(call(causal=True, block=None)) == (64, 64)
    assert gpu.blocks(call(block=None)) == (64, 128), "no mask: the same bytes"
    assert gpu.blocks(call(block=(128, 64))) == (128, 64), "the caller's"
    assert [io.choose_tile(128, d, d) for d in (64, 128, 256)] == [128, 64, 64]
    assert io.choose_tile(64, 64, 64) == 64
    assert io.hopper_fits(64, 128, 128) and not io.hopper_fits(128, 128, 128)
