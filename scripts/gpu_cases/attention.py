"""Flash and block-sparse attention on the GPU: cuDNN's form and ours, forward and backward, with every option once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.attention.block_sparse import block_sparse
from jaxinfer.pallas_kernels.attention.flash import flash

from .case import GpuCase

# (B, H, G, T, S, d), options, forms
FLASH = [
    ((2, 8, 2, 1024, 1024, 64), {"causal": True}, ("gpu", "cudnn")),
    ((1, 8, 8, 1024, 1024, 128), {}, ("gpu", "cudnn")),
    ((1, 4, 2, 1000, 1000, 128), {"causal": True, "window": 300}, ("gpu", "cudnn")),
    ((1, 4, 1, 320, 1500, 64), {"causal": True, "softcap": 20.0}, ("gpu",)),
    ((3, 4, 2, 512, 640, 128), {"causal": True, "ragged": True, "alibi": True}, ("gpu",)),
    ((4, 16, 16, 4096, 4096, 128), {"causal": True}, ("gpu", "cudnn")),
]
# (B, H, G, T, S, d), block, blocks listed
SPARSE = [
    ((1, 4, 2, 1024, 1024, 64), (64, 64), 4),
    ((2, 4, 4, 1024, 1536, 128), (128, 128), 5),
    ((1, 8, 8, 8192, 8192, 128), (128, 128), 8),
]


def cases(seed: int) -> Iterator[GpuCase]:
    for i, (sizes, options, forms) in enumerate(FLASH):
        for form in forms:
            yield from dense(seed + i, sizes, dict(options), form)
    for i, (sizes, block, listed) in enumerate(SPARSE):
        yield from sparse(seed + 100 + i, sizes, block, listed)


def dense(seed: int, sizes: tuple[int, ...], options: dict[str, Any], form: str) -> Iterator[GpuCase]:
    """Forward, and forward and backward, of `flash`."""
    b, h, g, t, s, d = sizes
    word = " ".join([f"{b}x{h}/{g}x{t}/{s}x{d}", *options])
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    lengths, slopes = None, None
    if options.pop("ragged", False):
        lengths = rng.integers(0, t + 1, b), rng.integers(0, s + 1, b)
        arrays = {"q_lengths": jnp.asarray(lengths[0], jnp.int32), "kv_lengths": jnp.asarray(lengths[1], jnp.int32)}
    if options.pop("alibi", False):
        slopes = 2.0 ** -np.arange(1, h + 1)
        arrays["slopes"] = jnp.asarray(slopes, jnp.float32)
    seen, distance = visible(sizes, lengths, options.get("causal", False), options.get("window"))

    def attend(impl):
        return lambda q, k, v: flash(q, k, v, impl=impl, **options, **arrays)

    exact = functools.partial(oracle, seen, distance, options.get("softcap"), slopes)
    # cuDNN has no derivative of the log-sum-exp.
    yield from both(f"flash {form} {word}", rng, sizes, exact, int(seen.sum()), attend, form, lse=form != "cudnn")


def sparse(seed: int, sizes: tuple[int, ...], block: tuple[int, int], listed: int) -> Iterator[GpuCase]:
    """Forward, and forward and backward, of `block_sparse`: random blocks of each head, under a causal mask."""
    b, h, g, t, s, d = sizes
    rng = np.random.default_rng(seed)
    rows, columns = t // block[0], s // block[1]
    order = rng.permuted(np.tile(np.arange(columns), (1, h, rows, 1)), axis=-1)[..., :listed].astype(np.int32)
    counts = rng.integers(0, listed + 1, order.shape[:3]).astype(np.int32)
    blocks = np.zeros((1, h, rows, columns), bool)
    for head, row in np.ndindex(h, rows):
        blocks[0, head, row, order[0, head, row, : counts[0, head, row]]] = True
    causal, distance = visible(sizes, None, True, None)
    seen = np.repeat(np.repeat(blocks, block[0], 2), block[1], 3) & causal
    exact = functools.partial(oracle, seen, distance, None, None)

    def attend(impl):
        return lambda q, k, v: block_sparse(q, k, v, order, counts, block=block, causal=True, impl=impl)

    word = f"{b}x{h}/{g}x{t}/{s}x{d} blocks {block[0]}x{block[1]}"
    yield from both(f"block_sparse {word}", rng, sizes, exact, b * int(seen.sum()), attend, "gpu", lse=True)


def both(
    name: str,
    rng: np.random.Generator,
    sizes: tuple[int, ...],
    exact: Callable[..., Any],
    pairs: int,
    attend: Callable[[str], Callable[..., Any]],
    form: str,
    *,
    lse: bool,
) -> Iterator[GpuCase]:
    """The case of the results, and that of the gradients; `pairs`: scores that are not masked, in all heads."""
    b, h, g, t, s, d = sizes
    shapes = ((b, h, t, d), (b, g, s, d), (b, g, s, d), (b, h, t, d))
    q, k, v, dout = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    dlse = jnp.asarray(rng.normal(size=(b, h, t)) * lse, jnp.float32)

    def gradients(impl):
        def run(q, k, v, dout, dlse):
            if lse:
                return jax.vjp(attend(impl), q, k, v)[1]((dout, dlse))
            return jax.vjp(lambda *x: attend(impl)(*x)[0], q, k, v)[1](dout)

        return run

    numbers = [np.asarray(x, np.float64) for x in (q, k, v, dout, dlse)]
    for direction, products in (("forward", 2), ("forward+backward", 7)):
        backward = direction != "forward"
        yield GpuCase(
            name=f"{name} bfloat16 {direction}",
            dtype="bfloat16",
            arguments=(q, k, v, dout, dlse) if backward else (q, k, v),
            ours=gradients(form) if backward else attend(form),
            xla=gradients("blocked") if backward else attend("blocked"),
            oracle=lambda i=int(backward): exact(*numbers)[i],
            tolerance=2e-2 if backward else 1e-2,
            flops=products * 2.0 * pairs * d,
            bytes=2.0 * (2 if backward else 1) * sum(x.size for x in (q, k, v, dout)),
        )


def visible(sizes: tuple[int, ...], lengths, causal: bool, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Who sees whom, bool[B, H, T, S] (one row where all are alike), and how far apart, i64[B, 1, T, S]."""
    _, heads, _, t, s, _ = sizes
    q_lengths, kv_lengths = (np.array([t]), np.array([s])) if lengths is None else lengths
    rows, columns = np.arange(t)[:, None], np.arange(s)
    q_length, kv_length = q_lengths[:, None, None, None], kv_lengths[:, None, None, None]
    distance = rows + (kv_length - q_length) - columns
    seen = (rows < q_length) & (columns < kv_length)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= np.abs(distance) < window
    return np.broadcast_to(seen, (seen.shape[0], heads, t, s)), distance


def oracle(seen, distance, softcap, slopes, q, k, v, dout, dlse):
    """`(out, lse)` and `(dq, dk, dv)` in float64, one head at a time."""
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, h in np.ndindex(*q.shape[:2]):
        row, g = b % len(seen), h // group
        capped = q[b, h] @ k[b, g].T * scale
        if softcap is not None:
            capped = softcap * np.tanh(capped / softcap)
        score = capped if slopes is None else capped - slopes[h] * np.abs(distance[row, 0])
        score = np.where(seen[row, h], score, -np.inf)
        peak = score.max(-1, keepdims=True)
        peak = np.where(np.isfinite(peak), peak, 0.0)
        weight = np.exp(score - peak)
        total = weight.sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse[b, h] = (peak + np.log(total))[:, 0]
        weight = weight / np.where(total == 0, 1.0, total)
        out[b, h] = weight @ v[b, g]
        delta = (dout[b, h] * out[b, h]).sum(-1) - dlse[b, h]
        dscore = weight * (dout[b, h] @ v[b, g].T - delta[:, None])
        if softcap is not None:
            dscore = dscore * (1 - (capped / softcap) ** 2)
        dq[b, h] = dscore @ k[b, g] * scale
        dk[b, g] += dscore.T @ q[b, h] * scale
        dv[b, g] += weight.T @ dout[b, h]
    return (out, lse), (dq, dk, dv)
