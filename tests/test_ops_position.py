"""Position encodings against float64 references written from the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops
from jaxinfer.errors import ConfigError
from jaxinfer.ops.position import alibi_slopes, angles, frequencies

DIM = 16
LONG, SHORT = tuple(1.0 + 0.5 * i for i in range(DIM // 2)), tuple(1.0 + 0.1 * i for i in range(DIM // 2))
ROPES = {
    "default": ops.Rope(DIM),
    "partial": ops.Rope(DIM // 2, theta=5e5),
    "linear": ops.Rope(DIM, scaling="linear", factor=4.0),
    "dynamic": ops.Rope(DIM, scaling="dynamic", factor=2.0, original_length=64, length=256),
    "dynamic, short": ops.Rope(DIM, scaling="dynamic", factor=2.0, original_length=64, length=64),
    "llama3": ops.Rope(DIM, theta=5e5, scaling="llama3", factor=8.0, original_length=8192),
    "yarn": ops.Rope(DIM, scaling="yarn", factor=16.0, original_length=4096),
    "yarn, deepseek": ops.Rope(
        DIM, scaling="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.5, truncate=False
    ),
    "longrope": ops.Rope(
        DIM, scaling="longrope", factor=32.0, original_length=4096, length=8192, short_factor=SHORT, long_factor=LONG
    ),
    "longrope, short": ops.Rope(
        DIM, scaling="longrope", factor=32.0, original_length=4096, length=4096, short_factor=SHORT, long_factor=LONG
    ),
}


def reference_frequencies(rope: ops.Rope) -> tuple[list[float], float]:
    """One frequency at a time, in Python floats, and the attention factor."""
    out, scale, dim, theta = [], 1.0, rope.rotary_dim, rope.theta
    if rope.scaling == "dynamic" and rope.length > rope.original_length:
        theta *= (rope.factor * rope.length / rope.original_length - (rope.factor - 1)) ** (dim / (dim - 2))
    for i in range(dim // 2):
        f = theta ** (-2 * i / dim)
        wavelength = 2 * math.pi / f
        if rope.scaling == "linear":
            f /= rope.factor
        elif rope.scaling == "llama3":
            turns = rope.original_length / wavelength
            if turns < rope.low_freq_factor:
                f /= rope.factor
            elif turns < rope.high_freq_factor:
                smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
                f = (1 - smooth) * f / rope.factor + smooth * f
        elif rope.scaling == "yarn":
            # The dimension at which a wave turns `beta` times within the original length.
            fast, slow = (
                dim * math.log(rope.original_length / (beta * 2 * math.pi)) / (2 * math.log(theta))
                for beta in (rope.beta_fast, rope.beta_slow)
            )
            if rope.truncate:
                fast, slow = math.floor(fast), math.ceil(slow)
            fast, slow = max(fast, 0), min(slow, dim - 1)
            interpolate = min(max((i - fast) / (slow - fast), 0.0), 1.0)
            f = f / rope.factor * interpolate + f * (1 - interpolate)
        elif rope.scaling == "longrope":
            f /= (rope.long_factor if rope.length > rope.original_length else rope.short_factor)[i]
        out.append(f)
    if rope.scaling == "longrope":
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length))
    elif rope.scaling == "yarn":
        scale = 0.1 * math.log(rope.factor) + 1
        if rope.mscale and rope.mscale_all_dim:
            scale = (0.1 * rope.mscale * math.log(rope.factor) + 1) / (
                0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1
            )
    return out, scale


@pytest.mark.parametrize("name", ROPES)
def test_frequencies(name):
    got, scale = frequencies(ROPES[name])
    want, factor = reference_frequencies(ROPES[name])
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert scale == pytest.approx(factor)


@pytest.fixture(scope="module")
def rotate():
    return jax.jit(lambda rope, x, positions: rope.rotate(x, positions), static_argnums=0)


@pytest.mark.parametrize("name", ["default", "partial", "yarn", "longrope"])
def test_rotation_is_exact_at_any_position(rotate, name):
    """Complex multiplication in float64: as good at a hundred million, and at negative positions, as at 1."""
    rope = ROPES[name]
    positions = np.array([[0, 1, -1, 4095, -4096, 131_072, 4_000_001, -4_000_001, 100_000_007]], np.int32)
    x = np.random.default_rng(0).normal(size=(1, 3, positions.shape[1], DIM)).astype(np.float32)
    frequency, scale = reference_frequencies(rope)
    half = len(frequency)
    wave = np.exp(1j * positions[0, :, None].astype(np.float64) * np.array(frequency)) * scale
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * wave
    want = np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)
    np.testing.assert_allclose(rotate(rope, x, positions), want, atol=4e-6)


def test_float32_products_would_fail():
    """Negative control of the tolerance above: the usual float32 angle is off by more than 0.001 at four million."""
    position = np.float32(4_000_001)
    f = frequencies(ROPES["default"])[0]
    naive = np.cos(np.float64(position * f.astype(np.float32))) - np.cos(4_000_001 * f)
    exact = np.cos(np.asarray(angles(f, jnp.int32(4_000_001)), np.float64)) - np.cos(4_000_001 * f)
    assert np.abs(naive).max() > 1e-3
    assert np.abs(exact).max() < 1e-6


def test_rotation_is_relative(rotate):
    """q at m and k at n depend on m - n alone, at small positions and at millions; the negative rotation undoes."""
    rope = ROPES["default"]
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 4, DIM)).astype(np.float32)
    products = []
    for base in (0, 17, 1_000_003):
        at = jnp.full((1, 4), base, jnp.int32)
        products.append((rotate(rope, q, at + jnp.array([[9, 5, 300, 7]])) * rotate(rope, k, at)).sum(-1))
    np.testing.assert_allclose(products[1], products[0], atol=1e-5)
    np.testing.assert_allclose(products[2], products[0], atol=1e-5)
    np.testing.assert_allclose(rotate(rope, rotate(rope, q, at), -at), q, atol=1e-5)


def test_interleaved_is_a_permutation(rotate):
    """Interleaved pairs (GPT-J, DeepSeek) are half-split pairs (Llama) under one permutation of the entries."""
    x = np.random.default_rng(2).normal(size=(2, 2, 5, DIM + 4)).astype(np.float32)
    positions = np.arange(10, dtype=np.int32).reshape(2, 5) * 7
    order = np.concatenate([np.arange(0, DIM, 2), np.arange(1, DIM, 2), np.arange(DIM, DIM + 4)])
    interleaved = rotate(ops.Rope(DIM, interleaved=True), x, positions)
    half_split = rotate(ops.Rope(DIM), x[..., order], positions)
    np.testing.assert_allclose(interleaved[..., order], half_split, atol=1e-6)
    assert not np.allclose(interleaved, rotate(ops.Rope(DIM), x, positions), atol=1e-2)


def test_rotation_keeps_the_dtype(rotate):
    x = jnp.ones((1, 1, 2, DIM), jnp.bfloat16)
    assert rotate(ROPES["default"], x, jnp.array([[0, 3]])).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotary_dim": 15}, "even rotary_dim, got 15"),
        ({"rotary_dim": 16, "scaling": "ntk"}, "'ntk' is not known; known: default"),
        ({"rotary_dim": 16, "scaling": "longrope", "original_length": 4}, "needs 8 factors, got 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigError, match=message):
        frequencies(ops.Rope(**arguments))


def test_alibi_slopes():
    """Powers of two: a geometric sequence from 2^(-8/H). 12 heads: those of 8, then every second one of 16."""
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    sixteen = [2.0 ** (-0.5 * i) for i in range(1, 17)]
    np.testing.assert_allclose(alibi_slopes(16), sixteen, rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(12), [2.0**-i for i in range(1, 9)] + sixteen[:8:2], rtol=1e-6)
    bias = ops.Alibi(12).bias(jnp.arange(6, dtype=jnp.int32).reshape(1, 1, 2, 3))
    assert bias.shape == (1, 12, 2, 3)
    np.testing.assert_allclose(bias[0, 9, 1, 2], -5 * sixteen[2], rtol=1e-6)


def t5_bucket(distance: int, buckets: int, longest: int) -> int:
    """The causal bucket by search: the last logarithmic edge that the distance has reached."""
    exact = buckets // 2
    if distance < exact:
        return max(distance, 0)
    edges = [exact * (longest / exact) ** (i / (buckets - exact)) for i in range(buckets - exact)]
    return exact + max(i for i, edge in enumerate(edges) if distance >= edge - 1e-9)


@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (16, 64)])
def test_t5_buckets(buckets, longest):
    t5 = ops.T5Bias(2, buckets, longest)
    distance = np.arange(-3, 300)
    want = [t5_bucket(int(d), buckets, longest) for d in distance]
    np.testing.assert_array_equal(t5.bucket(jnp.asarray(distance)), want)


def test_t5_bias_reads_each_heads_column():
    t5, table = ops.T5Bias(3), jnp.arange(96.0).reshape(32, 3)
    shared = jnp.array([[[[0, 5], [9, 200]]]])
    bias = t5.bias(shared, table)
    assert bias.shape == (1, 3, 2, 2)
    np.testing.assert_array_equal(bias[0, :, 1, 1], table[31])
    per_head = jnp.concatenate([shared, shared + 1, shared + 2], 1)
    np.testing.assert_array_equal(t5.bias(per_head, table)[0, :, 0, 1], [table[5, 0], table[6, 1], table[7, 2]])


def test_sinusoid():
    positions = np.array([[0, 3], [100, 200_000]])
    got = np.asarray(ops.sinusoid(jnp.asarray(positions), 8))
    assert got.shape == (2, 2, 8)
    for row, column in np.ndindex(2, 2):
        angle = [float(positions[row, column]) / 1e4 ** (2 * i / 8) for i in range(4)]
        want = [math.sin(a) for a in angle] + [math.cos(a) for a in angle]
        np.testing.assert_allclose(got[row, column], want, atol=1e-6)
