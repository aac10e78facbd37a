"""Attention over parts: the oracle against float64 loops, `attend` and `combine` against both, masks, gradients."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops

# The claims are about values, not speed: without LLVM's optimisations these tests take half the time.
B, H, G, T, C, D = 2, 4, 2, 5, 12, 8
PLAIN = ops.AttentionSpec(H, G, D, D**-0.5)
SPECS = {
    "none": PLAIN,
    "rope": dataclasses.replace(PLAIN, position=ops.Rope(D)),
    "partial yarn rope": dataclasses.replace(
        PLAIN, position=ops.Rope(D // 2, scaling="yarn", factor=4.0, original_length=64)
    ),
    "alibi": dataclasses.replace(PLAIN, position=ops.Alibi(H)),
    "t5": dataclasses.replace(PLAIN, position=ops.T5Bias(H)),
    "softcap": dataclasses.replace(PLAIN, position=ops.Rope(D), softcap=2.0, scale=0.7),
}
TABLE = np.random.default_rng(9).normal(size=(32, H)).astype(np.float32)
BUCKETS = np.asarray(ops.T5Bias(H).bucket(jnp.arange(200)))


class Inputs(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    q_positions: np.ndarray
    k_positions: np.ndarray
    visible: np.ndarray


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """Keys at their own positions, random visibility for each key head; query 3 of row 1 sees nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in [(B, H, T, D), (B, G, C, D), (B, G, C, D)])
    visible = rng.random((B, G, T, C)) < 0.6
    visible[1, :, 3] = False
    k_positions = np.stack([np.arange(C), np.arange(C) + 100]).astype(np.int32)
    return Inputs(q, k, v, k_positions[:, -T:] + 3, k_positions, visible)


def score(spec: ops.AttentionSpec, q, k, head: int, distance: int) -> float:
    """One score in Python floats, straight from the definitions."""
    q = q.astype(np.float64)
    if isinstance(spec.position, ops.Rope):
        frequency, factor = ops.position.frequencies(spec.position)
        half = len(frequency)
        wave = np.exp(1j * distance * frequency) * factor**2
        turned = (q[:half] + 1j * q[half : 2 * half]) * wave
        q = np.concatenate([turned.real, turned.imag, q[2 * half :]])
    x = float(q @ k) * spec.scale
    if spec.softcap is not None:
        x = spec.softcap * math.tanh(x / spec.softcap)
    if isinstance(spec.position, ops.Alibi):
        x -= 2.0 ** (-8 / H * (head + 1)) * distance
    if isinstance(spec.position, ops.T5Bias):
        x += float(TABLE[BUCKETS[max(distance, 0)], head])
    return x


def loops(spec: ops.AttentionSpec, x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention one query at a time; query head h reads key head h // (H / G)."""
    out, lse = np.zeros((B, H, T, D)), np.full((B, H, T), -np.inf)
    for b, h, t in np.ndindex(B, H, T):
        g = h // (H // G)
        seen = np.flatnonzero(x.visible[b, g, t])
        if not len(seen):
            continue
        distance = x.q_positions[b, t] - x.k_positions[b]
        scores = np.array([score(spec, x.q[b, h, t], x.k[b, g, c], h, int(distance[c])) for c in seen])
        peak = scores.max()
        weight = np.exp(scores - peak)
        out[b, h, t] = weight @ x.v[b, g, seen] / weight.sum()
        lse[b, h, t] = peak + math.log(weight.sum())
    return out, lse


def segments(spec: ops.AttentionSpec, x: Inputs, cuts: tuple[int, ...]) -> list[ops.Segment]:
    """The keys cut into segments; every second one, from the first, with its keys transposed."""
    made = []
    for i, (start, stop) in enumerate(zip((0, *cuts), (*cuts, C), strict=True)):
        part = slice(start, stop)
        positions = x.k_positions[:, part]
        k = spec.rotate(x.k[:, :, part], positions)
        bias = spec.bias(x.q_positions[:, None, :, None] - positions[:, None, None], jnp.asarray(TABLE))
        flip = i % 2 == 0
        k = jnp.swapaxes(k, 2, 3) if flip else k
        made.append(ops.Segment(k, x.v[:, :, part], x.visible[..., part], bias, transposed=flip))
    return made


def rotated(spec: ops.AttentionSpec, x: Inputs) -> jax.Array:
    return spec.rotate(x.q, x.q_positions)


@pytest.mark.parametrize("name", SPECS)
def test_attend_equals_the_oracle_equals_loops(name, inputs):
    """Oracle = loops; one joint softmax over any cut of the keys = the oracle; so is merging separate parts."""
    spec = SPECS[name]

    @jax.jit
    def every_way(x):
        distance = x.q_positions[:, None, :, None] - x.k_positions[:, None, None]
        pieces = segments(spec, x, (2, 3, 3))  # two keys, one, none and the rest
        return (
            ops.attend_naive(spec, x.q, x.k, x.v, distance, x.visible, jnp.asarray(TABLE)),
            ops.attend(spec, rotated(spec, x), pieces),
            ops.combine([ops.attend(spec, rotated(spec, x), [piece]) for piece in pieces]),
        )

    out, lse = loops(spec, inputs)
    for got in every_way(inputs):
        np.testing.assert_allclose(got.out, out, atol=3e-6)
        np.testing.assert_allclose(got.lse, lse, atol=3e-6)


def test_a_wrong_head_map_would_be_seen(inputs):
    """Negative control: with key heads read in another order the loops disagree."""
    swapped = inputs._replace(k=inputs.k[:, ::-1], v=inputs.v[:, ::-1])
    part = jax.jit(lambda x: ops.attend(PLAIN, x.q, segments(PLAIN, x, ())))(swapped)
    assert np.abs(np.asarray(part.out) - loops(PLAIN, inputs)[0]).max() > 0.1


def test_a_segment_may_bring_its_own_queries(inputs):
    """Sinks are seen from another position: the segment's `q` replaces the call's."""
    spec = SPECS["rope"]

    @jax.jit
    def attended(x):
        (whole,) = segments(spec, x, ())
        return ops.attend(spec, rotated(spec, x), [whole._replace(q=spec.rotate(x.q, x.q_positions - 2))])

    moved = inputs._replace(q_positions=inputs.q_positions - 2)
    np.testing.assert_allclose(attended(inputs).out, loops(spec, moved)[0], atol=3e-6)


def test_empty_rows(inputs):
    """A query that sees nothing gives zeros and -inf, alone, joined and merged, and changes no other part."""

    @jax.jit
    def merged(x):
        part = ops.attend(PLAIN, x.q, segments(PLAIN, x, ()))
        nothing = ops.Part(jnp.zeros_like(part.out), jnp.full_like(part.lse, -jnp.inf))
        pairs = [(part, nothing), (nothing, part), (nothing, nothing)]
        return part, [ops.combine(pair) for pair in pairs]

    part, (right, left, neither) = merged(inputs)
    assert np.all(np.asarray(part.out)[1, :, 3] == 0) and np.all(np.asarray(part.lse)[1, :, 3] == -np.inf)
    for same in (right, left):
        np.testing.assert_allclose(same.out, part.out, rtol=1e-6)
        np.testing.assert_allclose(same.lse, part.lse, rtol=1e-6)
    assert np.all(np.asarray(neither.out) == 0) and np.all(np.asarray(neither.lse) == -np.inf)


@pytest.mark.parametrize("name", ["softcap", "t5"])
def test_gradients(name, inputs):
    """No NaN where a row sees nothing; where rows see something the gradients are those of the oracle."""
    spec, x = SPECS[name], inputs
    distance = jnp.asarray(x.q_positions[:, None, :, None] - x.k_positions[:, None, None])
    live = jnp.isfinite(jnp.asarray(loops(spec, x)[1]))

    def loss(part):
        return (part.out * jnp.cos(jnp.arange(D))).sum() + jnp.where(live, part.lse, 0.0).sum()

    def ours(q, k, v):
        y = x._replace(k=k, v=v)
        halves = segments(spec, y, (6,))
        q = spec.rotate(q, x.q_positions)
        return loss(ops.attend(spec, q, halves)) + loss(ops.combine([ops.attend(spec, q, [h]) for h in halves]))

    def theirs(q, k, v):
        visible = jnp.asarray(x.visible).at[1, :, 3, 0].set(True)  # the oracle has no gradient where nothing is seen
        part = ops.attend_naive(spec, q, k, v, distance, visible, TABLE)
        return 2 * loss(ops.Part(jnp.where(live[..., None], part.out, 0.0), part.lse))

    got, want = jax.jit(lambda *qkv: [jax.grad(f, (0, 1, 2))(*qkv) for f in (ours, theirs)])(x.q, x.k, x.v)
    for g, w in zip(got, want, strict=True):
        assert np.isfinite(np.asarray(g)).all()
        np.testing.assert_allclose(g, w, atol=2e-5)


def test_half_precision_keeps_float32_sums(inputs):
    """bfloat16 keys and values: out in the activations' dtype, lse in float32, within bfloat16's rounding."""

    @jax.jit
    def attended(x):
        wide = segments(PLAIN, x, (5,))
        narrow = [s._replace(k=s.k.astype(jnp.bfloat16), v=s.v.astype(jnp.bfloat16)) for s in wide]
        return ops.attend(PLAIN, x.q.astype(jnp.bfloat16), narrow)

    part = attended(inputs)
    assert part.out.dtype == jnp.bfloat16 and part.lse.dtype == jnp.float32
    np.testing.assert_allclose(part.out.astype(jnp.float32), loops(PLAIN, inputs)[0], atol=0.03)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "segments", "explicit"])
def test_block_visibility(kind, window):
    """Who sees whom, pair by pair: padding never, outside the window never, then what the mask says."""
    spec = dataclasses.replace(PLAIN, window=window)
    positions = np.array([[4, 5, 6, 7, 8, -1], [-1, 0, 1, 1, 2, 2]], np.int32)  # row 1 holds a tree
    ids = np.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], np.int32)
    explicit = np.random.default_rng(3).random((2, 6, 6)) < 0.5
    masks = {"causal": None, "bidirectional": ops.Bidirectional(), "segments": ops.Segments(jnp.asarray(ids))}
    mask = masks.get(kind, jnp.asarray(explicit))
    got = np.asarray(ops.block_visibility(spec, jnp.asarray(positions), jnp.asarray(positions), mask))
    for b, i, j in np.ndindex(2, 6, 6):
        p, k = positions[b, i], positions[b, j]
        allowed = {
            "causal": k <= p,
            "bidirectional": True,
            "segments": k <= p and ids[b, i] == ids[b, j],
            "explicit": explicit[b, i, j],
        }[kind]
        near = window is None or (abs(p - k) if kind == "bidirectional" else p - k) < window
        assert got[b, 0, i, j] == (p >= 0 and k >= 0 and near and allowed), (b, i, j)
