"""Linear attention beside our own flash attention at the same heads: the issue asks for less time from 2048 tokens on.

Lengths go up to 131072 tokens. From 8192 on a row also has our own time for a quarter of its tokens, whose ratio is
0.25 where time is linear; the target allows 4.4 times the time for 4 times the tokens. On 2 cores `--rounds 5` takes
about 4 minutes.
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
QUARTER, MOST_FOR_FOUR_TIMES = "a quarter of the tokens", 4.4
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
    runs = {"ours": ours(op, length, dtype, direction)}
    targets = {"our flash": 1.0}
    if length > LENGTHS[0]:
        runs[QUARTER] = ours(op, length // 4, dtype, direction)
        targets[QUARTER] = 1 / MOST_FOR_FOUR_TIMES
    if length <= FLASH_UP_TO:
        q, k, v, cotangent, _ = inputs(length, dtype)
        runs["our flash"] = bound(lambda q, k, v: flash(q, k, v, causal=True)[0], (q, k, v), cotangent, direction)
    else:
        runs["our flash"] = unavailable(f"quadratic, left out above {FLASH_UP_TO} tokens")
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
        runs=runs,
        flops=passes * 2 * tokens * products,
        bytes=MOVED[direction] * tokens * DIM * jnp.dtype(dtype).itemsize + gates,
        targets=targets,
    )


def inputs(length: int, dtype: str) -> list[jax.Array]:
    """q, k, v, the cotangent of out, and normal numbers in float32 for the gates."""
    keys = jax.random.split(jax.random.key(0), 5)
    dtypes = (*[dtype] * 4, "float32")
    return [jax.random.normal(k, (1, HEADS, length, DIM), jnp.dtype(d)) for k, d in zip(keys, dtypes, strict=True)]


def ours(op: str, length: int, dtype: str, direction: str) -> Callable[[], Any]:
    q, k, v, cotangent, x = inputs(length, dtype)
    if op == "lightning":
        run, gate = lightning, -jnp.exp2(-jnp.arange(1.0, HEADS + 1))
    else:
        run, gate = gla, jax.nn.log_sigmoid(x) / 16
    return bound(lambda q, k, v, g: run(q, k, v, g)[0], (q, k, v, gate), cotangent, direction)


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
