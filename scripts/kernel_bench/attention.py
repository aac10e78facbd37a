"""Attention of many queries beside jax.nn's and torch's: dense causal attention, and lists of key blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.attention.block_sparse import block_sparse
from jaxinfer.pallas_kernels.attention.flash import flash

from .case import Case, unavailable

FLASH_SHAPES = [(1, 8, 2048, 64), (1, 8, 8192, 64)]
SPARSE = [(8192, (256, 128)), (4096, (128, 128)), (4096, (64, 64))]  # length, and rows and columns of a block
# What the issue asks of 1x8x2048x64 on CPU: the peer's time over ours.
FLASH_TARGETS = {
    ("float32", "forward"): {"jax.nn": 2.5, "torch": 1 / 1.2},
    ("bfloat16", "forward"): {"jax.nn": 2.5, "torch": 1.0},
    ("float32", "forward+backward"): {"jax.nn": 3.0, "torch": 1 / 1.4},
    ("bfloat16", "forward+backward"): {"jax.nn": 3.0, "torch": 1 / 1.4},
}


def cases() -> Iterator[Case]:
    for shape in FLASH_SHAPES:
        for dtype in ("float32", "bfloat16"):
            for direction in ("forward", "forward+backward"):
                yield dense(shape, dtype, direction)
    for length, block in SPARSE:
        for denominator in (8, 4, 2):
            for direction in ("forward", "forward+backward"):
                yield sparse((1, 8, length, 64), block, denominator, direction)


def dense(shape: tuple[int, int, int, int], dtype: str, direction: str) -> Case:
    """Causal attention of `shape` (batch, heads, length, head size)."""
    batch, heads, length, dim = shape
    arrays = random(shape, dtype)
    swapped = [x.transpose(0, 2, 1, 3) + 0 for x in arrays]  # jax.nn's layout, ready made: heads after the length
    runs = {
        "ours": bound(lambda q, k, v: flash(q, k, v, causal=True)[0], arrays, direction),
        # Its score matrices of 8192 tokens take 12 GB in the backward pass.
        "jax.nn": bound(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), swapped, direction)
        if length <= 4096 or direction == "forward"
        else unavailable("takes quadratic memory, left out at this length"),
        "torch": torch_sdpa(arrays, direction),
    }
    products = 2 if direction == "forward" else 7  # 2 forward, 5 backward; a causal half of each
    item = jnp.dtype(dtype).itemsize
    moved = 4 if direction == "forward" else 8
    return Case(
        op="flash",
        shape=f"{batch}x{heads}x{length}x{dim} causal",
        dtype=dtype,
        direction=direction,
        runs=runs,
        flops=products * 2 * batch * heads * (length * (length + 1) / 2) * dim,
        bytes=moved * batch * heads * length * dim * item,
        targets=FLASH_TARGETS[dtype, direction] if shape == FLASH_SHAPES[0] else {},
    )


def sparse(shape: tuple[int, int, int, int], block: tuple[int, int], denominator: int, direction: str) -> Case:
    """Every `denominator`-th block of keys listed, at random, beside dense attention: 1.3 x density x its time."""
    batch, heads, length, dim = shape
    arrays = random(shape, "float32")
    rows, blocks = length // block[0], length // block[1]
    count = blocks // denominator
    rng = np.random.default_rng(0)
    indices = np.sort(rng.permuted(np.tile(np.arange(blocks), (1, heads, rows, 1)), axis=-1)[..., :count])
    lists = indices.astype(np.int32), np.full(indices.shape[:3], count, np.int32)
    products = 2 if direction == "forward" else 7
    return Case(
        op="block_sparse",
        shape=f"{batch}x{heads}x{length}x{dim} blocks of {block[0]}x{block[1]}, 1/{denominator} listed",
        dtype="float32",
        direction=direction,
        runs={
            "ours": bound(lambda q, k, v: block_sparse(q, k, v, *lists, block=block)[0], arrays, direction),
            "dense flash": bound(lambda q, k, v: flash(q, k, v)[0], arrays, direction),
        },
        flops=products * 2 * batch * heads * length * (length / denominator) * dim,
        bytes=(4 if direction == "forward" else 8) * batch * heads * length * dim * 4,
        targets={"dense flash": denominator / 1.3},
    )


def random(shape: tuple[int, ...], dtype: str) -> list[jax.Array]:
    """Queries, keys, values and a cotangent."""
    return [jax.random.normal(key, shape).astype(dtype) for key in jax.random.split(jax.random.key(0), 4)]


def bound(f: Callable[..., jax.Array], arrays: list[jax.Array], direction: str) -> Callable[[], Any]:
    """`f` of the first three arrays, compiled; with the gradients of all three where the direction asks for them."""
    q, k, v, cotangent = arrays
    if direction == "forward":
        run = jax.jit(f)
        return lambda: run(q, k, v)

    @jax.jit
    def both(q, k, v, cotangent):
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(cotangent)

    return lambda: both(q, k, v, cotangent)


def torch_sdpa(arrays: list[jax.Array], direction: str) -> Callable[[], Any]:
    """torch's scaled_dot_product_attention on the CPU with every core, on the same numbers."""
    try:
        import torch
    except ImportError:
        return unavailable("torch is not installed")
    from jaxinfer.measure.host import cores

    torch.set_num_threads(cores())
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[str(arrays[0].dtype)]
    q, k, v, cotangent = (torch.from_numpy(np.array(x, np.float32)).to(kind) for x in arrays)
    attend = torch.nn.functional.scaled_dot_product_attention
    if direction == "forward":

        def forward():
            with torch.inference_mode():
                return attend(q, k, v, is_causal=True)

        return forward
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def both():
        return torch.autograd.grad(attend(q, k, v, is_causal=True), leaves, cotangent)

    return both
