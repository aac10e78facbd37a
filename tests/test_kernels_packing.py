"""Bits and bytes: every code of every width survives packing, lies where the layout says, and decodes to its value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core import packing
from jaxinfer.pallas_kernels._core.errors import ArgumentError
from jaxinfer.pallas_kernels.matmul import elements

pytestmark = pytest.mark.smoke

# bits -> groups and inputs: one group, and several (an even number where there are two planes).
ROWS = {2: [(32, 32), (8, 40)], 3: [(64, 64), (16, 32)], 4: [(16, 16), (6, 18)], 6: [(64, 64), (32, 128)], 8: [(5, 15)]}
CASES = [(bits, *row) for bits, rows in ROWS.items() for row in rows]


def every_code(bits, size):
    """Rows in which every code comes in every column."""
    return ((np.arange(2**bits)[:, None] + np.arange(size)) % 2**bits).astype(np.uint8)


def bits_of(planes, bits, group, k):
    """The code of input `k` of row 0, read bit by bit as the module's docstring tells it."""
    width, low, code = packing.PLANES[bits][0], 0, 0
    n, size = 8 // width, planes[0].shape[1] * 8 // width
    part, column = (k % group) // (group // n), k // group * (group // n) + (k % group) % (group // n)
    for i, (plane, w) in enumerate(zip(planes, packing.PLANES[bits], strict=True)):
        shift, at = w * part, column
        if i == 1:
            half = size // n // 2
            shift, at = 2 * w * part + w * (column >= half), column % half
        code |= (int(plane[0, at]) >> shift & (2**w - 1)) << low
        low += w
    return code


@pytest.mark.parametrize("bits,group,size", CASES)
def test_every_code_comes_back_from_where_the_layout_says(bits, group, size):
    codes = every_code(bits, size)

    @jax.jit
    def round_trip(codes):
        planes = packing.pack(codes, bits, group)
        pieces = [packing.piece(planes, bits, i) for i in range(packing.per_byte(bits))]
        moved = packing.pieces(codes, bits, group)
        return planes, packing.unpack(planes, bits, group), jnp.stack(pieces), moved, packing.join(moved, bits, group)

    planes, back, pieces, moved, joined = round_trip(codes)
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(pieces, moved)
    np.testing.assert_array_equal(joined, codes)
    assert sum(plane.size for plane in planes) * 8 == codes.size * bits  # not a bit more than the codes have
    planes = [np.asarray(plane) for plane in planes]
    assert [bits_of(planes, bits, group, k) for k in range(size)] == codes[0].tolist()


@settings(max_examples=6, derandomize=True, deadline=None, database=None)
@given(bits=st.sampled_from([2, 3, 4, 6]), groups=st.sampled_from([1, 2, 10]), columns=st.sampled_from([1, 2, 7]))
def test_packing_is_inverted_for_every_shape(bits, groups, columns):
    """Groups of one byte and ragged ones, one group and several: whatever `refuses` lets through comes back."""
    two_planes = len(packing.PLANES[bits]) > 1
    group = columns * (8 // packing.PLANES[bits][0]) * (2 if two_planes and groups == 1 else 1)
    assert packing.refuses(bits, group, groups * group) is None
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, groups * group)).astype(np.uint8)
    back = jax.jit(lambda codes: packing.unpack(packing.pack(codes, bits, group), bits, group))(codes)
    np.testing.assert_array_equal(back, codes)


def test_known_bytes():
    """Four bits: the low nibbles are a group's first half. Three bits: 2 + 1 planes."""
    nibbles = packing.pack(jnp.array([[1, 2, 3, 4, 5, 6, 7, 8]], jnp.uint8), 4, 4)[0]
    assert nibbles.tolist() == [[0x31, 0x42, 0x75, 0x86]]
    two, one = packing.pack(jnp.array([[0, 1, 2, 3, 4, 5, 6, 7]], jnp.uint8), 3, 8)
    assert two.tolist() == [[0b10_00_10_00, 0b11_01_11_01]] and one.tolist() == [[0b11110000]]


def test_groups_are_packed_on_their_own():
    """A shard between groups is the packed shard."""
    codes = every_code(4, 32)
    whole = packing.pack(codes, 4, 8)[0]
    np.testing.assert_array_equal(whole[:, 8:], packing.pack(codes[:, 16:], 4, 8)[0])


@pytest.mark.parametrize("bits,group,size", [(5, 8, 8), (4, 3, 9), (4, 8, 12), (3, 4, 4), (3, 8, 24), (6, 0, 8)])
def test_rows_without_a_layout_are_refused(bits, group, size):
    with pytest.raises(ArgumentError, match="packing: group"):
        packing.pack(jnp.zeros((1, size), jnp.uint8), bits, group)


@pytest.mark.parametrize("name", elements.ELEMENTS)
def test_every_code_decodes_to_its_value_and_is_the_nearest_to_it(name):
    element = elements.ELEMENTS[name]
    table, codes = elements.table(element), np.arange(2**element.bits, dtype=np.uint8)
    if element.bits == 8:
        codes = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.dtype(element.stored))

    @jax.jit
    def run(codes, x):
        values = elements.value(codes, element)
        again = elements.nearest(jnp.where(jnp.isfinite(values), values, 0), element)
        return values, elements.value(again, element), elements.value(elements.nearest(x, element), element)

    finite = table[np.isfinite(table)]
    middles = (np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2
    spread = np.random.default_rng(0).normal(size=1000) * element.top / 2
    x = np.float32([*spread, *middles, 2 * element.top, -0.0])
    values, again, rounded = run(codes, x)
    np.testing.assert_array_equal(values, table)
    np.testing.assert_array_equal(again, np.where(np.isfinite(table), table, 0))
    np.testing.assert_array_equal(np.abs(x[:, None] - finite).min(1), np.abs(np.float32(rounded) - x))
    if element.kind != "int":
        assert np.abs(rounded).max() == element.top


@pytest.mark.parametrize("name", ["e2m1", "e4m3", "e5m2"])
def test_values_and_ties_are_those_of_ml_dtypes(name):
    import ml_dtypes

    element = elements.ELEMENTS[name]
    dtype = {"e2m1": ml_dtypes.float4_e2m1fn, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
    table = elements.table(element)
    theirs = np.arange(2**element.bits, dtype=np.uint8).view(dtype).astype(np.float32)
    np.testing.assert_array_equal(theirs, table)
    x = np.random.default_rng(0).normal(size=999).astype(np.float32) * element.top / 4
    ties = np.sort(table[np.isfinite(table)])
    x = np.clip([*x, *((ties[1:] + ties[:-1]) / 2)], -element.top, element.top).astype(np.float32)
    ours = jax.jit(lambda x: elements.value(elements.nearest(x, element), element))(x)
    np.testing.assert_array_equal(ours, x.astype(dtype).astype(np.float32))


def test_small_floats_are_integers_times_their_unit():
    for name in ("e2m1", "e3m2"):
        element = elements.ELEMENTS[name]
        codes = jnp.arange(2**element.bits, dtype=jnp.uint8)
        np.testing.assert_array_equal(elements.integer(codes, element) * element.unit, elements.table(element))
