"""FlashAttention-2 on the TPU: the kernels of `block_sparse`, over the blocks that the masks leave.

Dao (2023), arXiv 2307.08691. They serve what jax's own splash attention does not: ragged rows, ALiBi, rows that see
nothing, and gradients through the log-sum-exp.

Stability: experimental.
"""

from __future__ import annotations

from jaxinfer.pallas_kernels._core import tuning
from jaxinfer.pallas_kernels.attention.flash import listed
from jaxinfer.pallas_kernels.attention.flash.call import Call, cdiv

VMEM = 8 << 20  # of the 16 MiB that the compiler gives a kernel, half is left to its own temporaries


def refuses(call: Call) -> str | None:
    """Why the TPU form cannot serve, or None."""
    from jaxinfer.pallas_kernels.attention.block_sparse import tpu

    return tpu.refuses(listed.sparse_call(call, blocks(call)))


def forward(call: Call, *arrays):
    """`(out[B, H, T, e], lse f32[B, H, T])`."""
    from jaxinfer.pallas_kernels.attention.block_sparse import tpu

    return listed.forward(tpu.forward, blocks(call), call, *arrays)


def backward(call: Call, *arrays):
    """`(dq, dk, dv)`."""
    from jaxinfer.pallas_kernels.attention.block_sparse import tpu

    return listed.backward(tpu.backward, blocks(call), call, *arrays)


def blocks(call: Call) -> tuple[int, int]:
    """Rows of queries and of keys of a block: the caller's, the table's, or those that move the fewest bytes."""
    from jaxinfer.pallas_kernels.attention import io

    def rule() -> tuple[int, int]:
        return io.choose_block(call, VMEM, (512, 1024))

    block_q, block_k = call.block or tuning.block("flash", call.dtype, call.sizes, rule, device="TPU")
    return min(block_q, cdiv(call.queries, 128) * 128), min(block_k, cdiv(call.keys, 128) * 128)
