"""Merging attention parts: any split of the keys merges to the whole, empty parts change nothing, gradients agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels._core.errors import ArgumentError
from jaxinfer.pallas_kernels.attention.combine import combine
from tests.kernel_checks import assert_close, error, normal

merge = jax.jit(combine)


@jax.jit
def part(scores, values):
    """Attention of plain scores `[..., C]` over `values[C, d]`; with no keys, the empty part."""
    if not scores.shape[-1]:
        return jnp.zeros((*scores.shape[:-1], values.shape[-1])), jnp.full(scores.shape[:-1], -jnp.inf)
    return jax.nn.softmax(scores, -1) @ values, jax.nn.logsumexp(scores, -1)


@functools.partial(jax.jit, static_argnums=2)
def split(scores, values, cuts):
    edges = [0, *cuts, scores.shape[-1]]
    return [part(scores[..., a:b], values[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.smoke
@pytest.mark.parametrize("cuts", [(), (5,), (0, 9, 9), (1, 2, 16)])
def test_merges_any_split(cuts):
    scores, values = normal(0, (3, 4, 16), (16, 8))
    assert_close(merge(split(30 * scores, values, cuts)), part(30 * scores, values))


def test_is_associative():
    scores, values = normal(1, (6, 12), (12, 4))
    a, b, c = split(scores, values, (3, 7))
    left = jax.jit(lambda a, b, c: combine([combine([a, b]), c]))
    right = jax.jit(lambda a, b, c: combine([a, combine([b, c])]))
    assert_close(left(a, b, c), right(a, b, c))


def test_gradient_through_empty_parts():
    """The gradient of a merge with empty parts is the gradient of the whole; rows without any key give zeros."""
    scores, values = normal(2, (5, 8), (8, 4))
    empty = part(scores[:, :0], values[:0])

    def loss(f):
        def total(s, v):
            out, lse = f(s, v)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        return jax.jit(jax.grad(total, (0, 1)))(scores, values)

    assert_close(loss(lambda s, v: combine([empty, *split(s, v, (2, 5)), empty])), loss(part))
    out, lse = merge([empty, empty])
    assert np.all(np.asarray(lse) == -np.inf) and not np.any(out)
    for a, b in jax.jit(jax.grad(lambda p: combine(p)[0].sum()))([empty, empty]):
        assert not np.any(a) and not np.any(b)


def test_bfloat16_parts_keep_their_dtype():
    parts = [(o.astype(jnp.bfloat16), l) for o, l in split(*normal(3, (4, 6), (6, 8)), (3,))]
    out, lse = merge(parts)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32


def test_forgetting_the_weights_is_caught():
    """Negative control: the plain mean of the parts is not the merge."""
    scores, values = normal(4, (3, 10), (10, 4))
    parts = split(scores, values, (2,))
    assert error((parts[0][0] + parts[1][0]) / 2, part(scores, values)[0]) > 0.05


def test_bad_parts_are_named():
    out, lse = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3))
    for parts, message in [
        ([], "parts: got none"),
        ([(out, lse), (out[:1], lse[:1])], r"parts\[1\].out"),
        ([(out, lse[..., None])], r"parts\[0\].lse"),
        ([(out, lse.astype(jnp.bfloat16))], r"parts\[0\].lse: got bfloat16"),
        ([(out, lse), (out.astype(jnp.bfloat16), lse)], r"parts\[1\].out: got bfloat16"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            combine(parts)
