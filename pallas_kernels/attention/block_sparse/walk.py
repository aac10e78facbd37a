"""Which tiles the Hopper kernels fetch: their grids and indices, as plain arithmetic.

The kernels use it on traced numbers; the test of the I/O model replays it on Python's, and so counts what they fetch.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxinfer.pallas_kernels.attention.block_sparse.call import Call

ROWS = 64  # of a warpgroup's wgmma: what one program of the grid holds
STAGES = 2  # tiles in flight
NAMES = ("rows", "head", "batch")  # of the grid's axes, in its order


@dataclasses.dataclass(frozen=True)
class Walk:
    """A kernel whose programs each hold 64 rows of one head and stream a tile of the other side for every step.

    `tile`: rows of a streamed tile, which divide a listed block. `turned`: the rows held are keys, the tiles queries,
    and an entry of a list names the query head too (`call.turn`). A `program` is a point of `grid`; places are
    `(batch, head, first row)`.
    """

    call: Call
    tile: int
    turned: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        flash = self.call.flash
        if self.turned:
            return flash.keys // ROWS, flash.kv_heads, flash.batch
        return flash.queries // ROWS, flash.heads, flash.batch

    @property
    def parts(self) -> int:
        """Tiles of a listed block."""
        return (self.call.block_q if self.turned else self.call.block_k) // self.tile

    def own(self, program: Any) -> tuple[Any, Any, Any]:
        """Where the rows that a program holds begin."""
        rows, head, batch = program
        return batch, head, rows * ROWS

    def steps(self, program: Any, counts: Any) -> Any:
        """Tiles that a program streams."""
        return counts[self._list(program, counts)] * self.parts

    def streamed(self, program: Any, lists: Any, j: Any) -> tuple[Any, Any, Any]:
        """Where the j-th of them begins."""
        _, head, batch = program
        entry = lists[(*self._list(program, lists), j // self.parts)]
        if self.turned:
            head, entry = head * self.call.flash.group + entry // self.call.q_blocks, entry % self.call.q_blocks
        else:
            head = head // self.call.flash.group
        return batch, head, entry * (self.parts * self.tile) + j % self.parts * self.tile

    def _list(self, program: Any, lists: Any) -> tuple[Any, Any, Any]:
        """The indices of a program's list; one list may serve all heads or the whole batch."""
        rows, head, batch = program
        b, h = (index if size > 1 else 0 for index, size in zip((batch, head), lists.shape[:2], strict=True))
        return b, h, rows * ROWS // (self.call.block_k if self.turned else self.call.block_q)
