"""Linear attention beside our own flash attention at the same heads: the issue asks for less time from 2048 tokens on.

Lengths go up to 131072 tokens: the rows also show whether time is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.flash import flash
from jaxinfer.pallas_kernels.linear.gla import gla
from jaxinfer.pallas_kernels.linear.lightning import lightning

from .case import Case, unavailable

HEADS, DIM, CHUNK = 8, 64, 64
LENGTHS = (2048, 8192, 32768, 131072)
# The longest sequences that quadratic attention is timed at: its time grows sixteen times from one length to the next.
FLASH_UP_TO = 8192
# Out, gradients and inputs, in arrays as large as q; the gates of gla are one more each way, in float32.
MOVED = {"forward": 4, "forward+backward": 8}


def cases() -> Iterator[Case]:
    for length in LENGTHS:
        for op in ("lightning", "gla"):
            for dtype in ("float32", "bfloat16"):
                for direction in ("forward", "forward+backward"):
                    yield case(op, length, dtype, direction)


def case(op: str, length: int, dtype: str, direction: str) -> Case:
    """One op over 1 x 8 x length x 64."""
    shape = (1, HEADS, length, DIM)
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, cotangent = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key in keys[:4])
    if op == "lightning":
        run, gate = lightning, -jnp.exp2(-jnp.arange(1.0, HEADS + 1))
    else:
        run, gate = gla, jax.nn.log_sigmoid(jax.random.normal(keys[4], shape)) / 16
    peer = unavailable(f"quadratic, left out above {FLASH_UP_TO} tokens")
    if length <= FLASH_UP_TO:
        peer = bound(lambda q, k, v: flash(q, k, v, causal=True)[0], (q, k, v), cotangent, direction)
    tokens = HEADS * length
    # A chunk's scores and their use, half of each, the state's update and its use; the gradient does each twice.
    products = 2 * CHUNK * DIM / 2 + 2 * DIM * DIM
    passes = 1 if direction == "forward" else 3
    gates = 4 * tokens * DIM * (MOVED[direction] // 4) if op == "gla" else 0
    return Case(
        op=op,
        shape=f"1x{HEADS}x{length}x{DIM}",
        dtype=dtype,
        direction=direction,
        runs={
            "ours": bound(lambda q, k, v, g: run(q, k, v, g)[0], (q, k, v, gate), cotangent, direction),
            "our flash": peer,
        },
        flops=passes * 2 * tokens * products,
        bytes=MOVED[direction] * tokens * DIM * jnp.dtype(dtype).itemsize + gates,
        targets={"our flash": 1.0},
    )


def bound(
    f: Callable[..., jax.Array], primals: tuple[jax.Array, ...], cotangent: jax.Array, direction: str
) -> Callable[[], Any]:
    """`f` of its arrays, compiled, with the gradients of all of them where the direction asks for them."""
    if direction == "forward":
        forward = jax.jit(f)
        return lambda: forward(*primals)

    @jax.jit
    def both(cotangent: jax.Array, *primals: jax.Array) -> Any:
        out, pull = jax.vjp(f, *primals)
        return out, pull(cotangent)

    return lambda: both(cotangent, *primals)
