"""Lightning attention and GLA on the GPU, forward and backward: whole sequences and pieces, states, ragged lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.linear.gla import gla
from jaxinfer.pallas_kernels.linear.lightning import lightning

from .case import GpuCase

OPS = {"lightning": lightning, "gla": gla}
CHUNK = 64
# (B, H, T, K, V), ragged: few heads cut in pieces, many that are not, lengths that no chunk divides.
CASES = [
    ((1, 8, 8192, 128, 128), False),
    ((1, 8, 2048, 64, 64), False),
    ((4, 16, 2048, 128, 128), False),
    ((3, 4, 1000, 64, 128), True),
    ((8, 32, 512, 128, 64), True),
]


def cases(seed: int) -> Iterator[GpuCase]:
    for i, (sizes, ragged) in enumerate(CASES):
        for j, name in enumerate(OPS):
            yield from both(name, sizes, ragged, np.random.default_rng((seed, i, j)))


def both(name: str, sizes: tuple[int, ...], ragged: bool, rng: np.random.Generator) -> Iterator[GpuCase]:
    """The case of the results, and that of the gradients."""
    b, h, t, k, v = sizes
    shapes = ((b, h, t, k), (b, h, t, k), (b, h, t, v), (b, h, t, v))
    q, key, value, d_out = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    state, d_state = (jnp.asarray(rng.normal(size=(b, h, k, v)), jnp.float32) for _ in range(2))
    gate = gates(name, sizes, rng)
    lengths = rng.integers(0, t + 1, b) if ragged else np.full(b, t)
    options: dict[str, Any] = {"scale": k**-0.5}
    if ragged:
        options["lengths"] = jnp.asarray(lengths, jnp.int32)

    def forward(impl):
        return lambda q, k, v, gate, state: OPS[name](q, k, v, gate, state=state, impl=impl, **options)

    def gradients(impl):
        return lambda *x: jax.vjp(forward(impl), *x[:5])[1](x[5:])

    primals, cotangents = (q, key, value, gate, state), (d_out, d_state)
    numbers = [np.asarray(x, np.float64) for x in (*primals, *cotangents)]
    # A chunk's scores and their use, half of each, the state's update and its use.
    products = 2.0 * b * h * t * (CHUNK * (k + v) / 2 + 2 * k * v)
    moved = sum(x.size * x.dtype.itemsize for x in (*primals, d_out))
    for backward in (False, True):
        yield GpuCase(
            name=f"{name} {'x'.join(map(str, sizes))}{' ragged' * ragged} bfloat16 "
            + ("forward+backward" if backward else "forward"),
            dtype="bfloat16",
            arguments=(*primals, *cotangents) if backward else primals,
            ours=gradients("gpu") if backward else forward("gpu"),
            xla=gradients("blocked") if backward else forward("blocked"),
            oracle=lambda i=int(backward): oracle(*numbers, lengths=lengths, scale=k**-0.5)[i],
            tolerance=2e-2 if backward else 1e-2,
            flops=products * (3 if backward else 1),
            bytes=float(moved * (2 if backward else 1)),
        )


def gates(name: str, sizes: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    """The decays of the paper's heads, or gates most of which are near 1 and some of which shut a channel."""
    b, h, t, k, _ = sizes
    if name == "lightning":
        return jnp.asarray(-(2.0 ** -np.linspace(1, 8, h)), jnp.float32)
    x = rng.normal(size=(b, h, t, k))
    return jnp.asarray(np.where(x > 3, -50.0, -np.logaddexp(0, -x) / 16), jnp.float32)


def oracle(q, k, v, gate, state, d_out, d_state, *, lengths: np.ndarray, scale: float):
    """`(out, state)` and the gradients of q, k, v, gate and state: the recurrence in float64, token by token."""
    per_head = gate.ndim == 1
    live = np.arange(q.shape[2]) < lengths[:, None, None]
    log_gate = np.where(live[..., None], gate[:, None, None] if per_head else gate, 0.0)
    k, d_out = (np.where(live[..., None], x, 0.0) for x in (k, d_out))
    decay = np.broadcast_to(np.exp(log_gate), k.shape)
    out, dq, dk, dv = (np.zeros(x.shape) for x in (v, q, k, v))
    last = state
    for t in range(q.shape[2]):
        last = decay[:, :, t, :, None] * last + k[:, :, t, :, None] * v[:, :, t, None]
        out[:, :, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, :, t], last)
        dq[:, :, t] = scale * np.einsum("bhv,bhkv->bhk", d_out[:, :, t], last)
    d_last = d_state
    for t in reversed(range(q.shape[2])):
        d_last = d_last + scale * q[:, :, t, :, None] * d_out[:, :, t, None]
        dk[:, :, t] = np.einsum("bhv,bhkv->bhk", v[:, :, t], d_last)
        dv[:, :, t] = np.einsum("bhk,bhkv->bhv", k[:, :, t], d_last)
        d_last = decay[:, :, t, :, None] * d_last
    # A gate scales what crosses it: all that later tokens read and earlier ones did not write, and the last state.
    crossing = np.cumsum((q * dq - k * dk)[:, :, ::-1], 2)[:, :, ::-1]
    d_gate = np.where(live[..., None], crossing + (d_state * last).sum(-1)[:, :, None], 0.0)
    if per_head:
        d_gate = d_gate.sum((0, 2, 3))
    return (np.where(live[..., None], out, 0.0), last), (dq, np.where(live[..., None], dk, 0.0), dv, d_gate, d_last)
