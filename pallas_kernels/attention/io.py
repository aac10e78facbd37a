"""How many bytes attention must move, and how many our kernels move for a choice of blocks.

Saha and Ye (2024), "The I/O Complexity of Attention, or How Optimal is FlashAttention?", arXiv 2402.07443: with a cache
of M numbers, n queries, m keys and heads of d numbers, every algorithm moves at least about

    n m d^2 / M    numbers where M >= d^2 (large cache: FlashAttention reaches it),
    n m d / sqrt M numbers where M <  d^2 (small cache: no better than writing the scores out between two products).

The rest of this file counts, block by block, what the listed kernels of this package read and write, so that a block
choice can be judged before it runs.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from jaxinfer.pallas_kernels._core.check import positive
from jaxinfer.pallas_kernels.attention.flash.call import Call, cdiv
from jaxinfer.pallas_kernels.attention.flash.listed import runs

# A multiprocessor of an H100 or H200: bytes of shared memory, of which a program takes RESERVED besides its tiles, and
# registers of a thread, of which OVERHEAD hold addresses, masks and row sums. Both are what the compiler's own figures
# (tests/budgets/flash.json) leave when the tiles are taken off.
SHARED, RESERVED, REGISTERS, OVERHEAD = 228 << 10, 5 << 10, 255, 88
PROGRAMS = 2  # on a multiprocessor: one's softmax overlaps the other's products
TILES = (64, 128)  # keys of a tile that the Hopper kernels are written for
NEAR = 1 / 16  # of the bytes: what the model cannot tell apart


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes between memory and the cache."""

    read: int
    written: int

    @property
    def total(self) -> int:
        return self.read + self.written


def regime(dim: int, cache: int) -> str:
    """ "large" or "small": whether a cache of that many numbers holds a d x d block."""
    positive("regime", dim=dim, cache=cache)
    return "large" if cache >= dim * dim else "small"


def least_numbers(queries: int, keys: int, dim: int, cache: int) -> float:
    """The paper's bound on the numbers moved for one head, without its constant factor.

    The inputs and the output themselves, 2 (n + m) d, bound it too.
    """
    positive("least_numbers", queries=queries, keys=keys)
    work = queries * keys * dim
    moved = work * dim / cache if regime(dim, cache) == "large" else work / math.sqrt(cache)
    return max(moved, 2.0 * (queries + keys) * dim)


def flash_numbers(queries: int, keys: int, dim: int, cache: int) -> float:
    """Numbers that FlashAttention moves for one head with the largest blocks that fit: of n queries and of M / 4d keys.

    A quarter of the cache each for a block of keys, of values, of queries and of output (FlashAttention, theorem 2).
    """
    rows = max(1, min(queries, cache // (4 * dim)))
    return 2.0 * queries * dim + cdiv(queries, rows) * 2.0 * keys * dim


def tiled_numbers(queries: int, keys: int, dim: int, cache: int) -> float:
    """Numbers that two tiled products move for one head, the scores written out and read back between them.

    Tiles are squares of a third of the cache. The better algorithm where the cache is small.
    """
    side = max(1, math.isqrt(cache // 3))
    products = 2 * 2.0 * queries * keys * dim / side
    return products + 4.0 * queries * keys + queries * dim


def forward_bytes(call: Call, block: tuple[int, int], *, item: int = 2) -> Traffic:
    """Bytes of the forward kernels of `flash` in these blocks; `item` bytes a number of q, k, v and out.

    Ragged rows count as whole ones.
    """
    rows = cdiv(call.queries, block[0])
    fetched = _fetches(call, block)
    own = call.batch * call.heads * rows * block[0]
    read = own * call.dim * item + fetched * block[1] * (call.dim + call.value_dim) * item
    return Traffic(read, own * (call.value_dim * item + 4))


def backward_bytes(call: Call, block: tuple[int, int], *, item: int = 2) -> Traffic:
    """Bytes of the two backward kernels of `flash` in these blocks, fetched as the TPU's pipeline fetches them."""
    rows, columns = cdiv(call.queries, block[0]), cdiv(call.keys, block[1])
    own = call.batch * call.heads * rows * block[0]
    size = (call.dim + call.value_dim) * item
    read = own * (size + 8) + _fetches(call, block) * block[1] * size
    keys = call.batch * call.kv_heads * columns * block[1]
    read += keys * size + _turned_fetches(call, block) * block[0] * (size + 8)
    return Traffic(read, own * call.dim * item + keys * size)


def working_set(call: Call, block: tuple[int, int], *, item: int = 2) -> int:
    """Bytes that a forward kernel keeps close: two of each block in flight, float32 scores, weights and sums."""
    block_q, block_k = block
    blocks = block_q * (call.dim + call.value_dim) + block_k * (call.dim + call.value_dim)
    return 2 * item * blocks + 4 * (2 * block_q * block_k + block_q * (call.value_dim + 256))


def choose_block(call: Call, cache: int, sizes: Sequence[int], *, item: int = 2) -> tuple[int, int]:
    """The pair of `sizes` that moves the fewest bytes forward and fits `cache` bytes; of equals the smallest.

    The smallest pair where none fits.
    """
    pairs = [(rows, keys) for rows in sorted(sizes) for keys in sorted(sizes)]
    fitting = [pair for pair in pairs if working_set(call, pair, item=item) <= cache] or pairs[:1]
    return min(fitting, key=lambda pair: (forward_bytes(call, pair, item=item).total, pair[0] * pair[1]))


def hopper_forward_bytes(call: Call, block: tuple[int, int], *, item: int = 2) -> Traffic:
    """Bytes between memory and shared memory of `flash`'s forward kernel on Hopper in these blocks, lists left out.

    A program holds 64 rows of one head and fetches all that its block lists; programs share nothing but the L2 cache.
    """
    own = call.batch * call.heads * cdiv(call.queries, block[0]) * block[0]
    numbers = own * call.dim + _hopper_keys(call, block) * (call.dim + call.value_dim)
    return Traffic(numbers * item, own * (call.value_dim * item + 4))


def hopper_backward_bytes(call: Call, block: tuple[int, int], *, item: int = 2) -> Traffic:
    """Bytes of `flash`'s two backward kernels on Hopper, counted like those of `hopper_forward_bytes`."""
    size = (call.dim + call.value_dim) * item
    own = call.batch * call.heads * cdiv(call.queries, block[0]) * block[0]
    keys = call.batch * call.kv_heads * cdiv(call.keys, block[1]) * block[1]
    # A listed pair of blocks: each 64 of its queries fetch all its keys, and turned round each 64 keys all its queries.
    streamed = _hopper_keys(call, block)
    read = own * (size + 8) + streamed * size + keys * size + streamed * (size + 8)
    return Traffic(read, own * call.dim * item + keys * size)


@functools.lru_cache(maxsize=256)
def choose_hopper(call: Call) -> tuple[int, int]:
    """The blocks of `flash` on Hopper: the shortest lists whose bytes forward are within a sixteenth of the fewest.

    A block has the 64 queries of a program: of a longer one each program would fetch what only others' rows see. More
    keys a block save entries, which the backward pass turns round, and fetch more beyond a mask's edge.
    """
    from jaxinfer.pallas_kernels.attention.block_sparse.walk import ROWS

    pairs = [(ROWS, keys) for keys in TILES]
    total = {pair: hopper_forward_bytes(call, pair).total for pair in pairs}
    near = [pair for pair in pairs if total[pair] <= (1 + NEAR) * min(total.values())]
    return min(near, key=lambda pair: (int(runs(_whole(call), pair)[1].sum()), total[pair]))


def choose_tile(block_k: int, dim: int, value_dim: int) -> int:
    """Keys of a forward tile: the most that divide `block_k` and leave room for two programs, or 64."""
    fitting = [tile for tile in TILES if block_k % tile == 0 and hopper_fits(tile, dim, value_dim)]
    return max(fitting, default=min(TILES))


def hopper_fits(tile: int, dim: int, value_dim: int, *, item: int = 2) -> bool:
    """Whether a multiprocessor of an H100 or H200 has room for two forward programs with tiles of so many keys."""
    from jaxinfer.pallas_kernels.attention.block_sparse.walk import ROWS, STAGES

    shared = item * (ROWS * dim + STAGES * tile * (dim + value_dim)) + 4 * ROWS + RESERVED
    return PROGRAMS * shared <= SHARED and hopper_registers(tile, value_dim) <= REGISTERS


def hopper_registers(tile: int, value_dim: int) -> int:
    """Registers of a thread: its share of 64 rows of float32 scores and sums and 16-bit weights, and the overhead."""
    return tile // 2 + tile // 4 + value_dim // 2 + OVERHEAD


def _hopper_keys(call: Call, block: tuple[int, int]) -> int:
    """Rows of keys that the programs of the Hopper kernels fetch, each the lists of its 64 queries."""
    from jaxinfer.pallas_kernels.attention.block_sparse.walk import ROWS

    entries = int(runs(_whole(call), block)[1].sum())
    return call.batch * call.heads * entries * (block[0] // ROWS) * block[1]


def _whole(call: Call) -> Call:
    return dataclasses.replace(call, ragged=False)


def _fetches(call: Call, block: tuple[int, int]) -> int:
    """Blocks of keys that the grid's walk over all lists fetches: a block that is there already is not fetched."""
    indices, counts = runs(_whole(call), block)
    firsts, lasts = indices[0, 0, :, 0], _last(indices[0, 0], counts[0, 0])
    moves = np.maximum(counts[0, 0], 1).sum()  # an empty list names a block too
    kept_rows = int((firsts[1:] == lasts[:-1]).sum())
    # From one head to the next the block is there still if both read the same key head and it lies the same.
    within = call.group - 1 if firsts[0] == lasts[-1] else 0
    return call.batch * (call.heads * (int(moves) - kept_rows) - call.kv_heads * within)


def _turned_fetches(call: Call, block: tuple[int, int]) -> int:
    """Blocks of queries that the walk over the turned lists fetches; every list starts at another block or head."""
    from jaxinfer.pallas_kernels.attention.block_sparse.call import turn

    indices, counts = runs(_whole(call), block)
    order, count = turn(indices, counts, call.group, call.group, cdiv(call.keys, block[1]))
    firsts, lasts = order[0, 0, :, 0], _last(order[0, 0], count[0, 0])
    moves = int(np.maximum(count[0, 0], 1).sum()) - int((firsts[1:] == lasts[:-1]).sum())
    return call.batch * call.kv_heads * moves


def _last(lists: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.take_along_axis(lists, np.maximum(counts - 1, 0)[:, None], 1)[:, 0]
