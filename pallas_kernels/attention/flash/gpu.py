"""FlashAttention-2 on Hopper: the kernels of `block_sparse`, over the blocks that the masks leave.

Dao (2023), arXiv 2307.08691. They serve what cuDNN does not: ALiBi, soft-capping, rows that see nothing, and gradients
through the log-sum-exp.

Stability: experimental.
"""

from __future__ import annotations

from jaxinfer.pallas_kernels._core import tuning
from jaxinfer.pallas_kernels.attention.flash import listed
from jaxinfer.pallas_kernels.attention.flash.call import Call


def refuses(call: Call) -> str | None:
    """Why the GPU form cannot serve, or None."""
    from jaxinfer.pallas_kernels.attention.block_sparse import gpu

    return gpu.refuses(listed.sparse_call(call, blocks(call)))


def forward(call: Call, *arrays):
    """`(out[B, H, T, e], lse f32[B, H, T])`."""
    from jaxinfer.pallas_kernels.attention.block_sparse import gpu

    return listed.forward(gpu.forward, blocks(call), call, *arrays)


def backward(call: Call, *arrays):
    """`(dq, dk, dv)`."""
    from jaxinfer.pallas_kernels.attention.block_sparse import gpu

    return listed.backward(gpu.backward, blocks(call), call, *arrays)


def blocks(call: Call) -> tuple[int, int]:
    """Rows of queries and of keys of a block: the caller's, the table's, or what `io.choose_hopper` chooses."""
    from jaxinfer.pallas_kernels.attention import io
    from jaxinfer.pallas_kernels.attention.block_sparse.walk import ROWS

    def serves(block: tuple[int, ...]) -> bool:
        return len(block) == 2 and not any(size % ROWS for size in block)

    block_q, block_k = call.block or tuning.block(
        "flash", call.dtype, call.sizes, lambda: io.choose_hopper(call), device="NVIDIA H200", serves=serves
    )
    return block_q, block_k
