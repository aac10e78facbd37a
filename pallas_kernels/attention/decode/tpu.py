"""Decode on TPU: a grid over items, heads and live blocks; lengths are prefetched, dead blocks neither read nor run.

The keys and values of a block come in by the pipeline's own copies. Which block a grid step reads is computed from
prefetched scalars; steps beyond an item's last live block name that block again, which costs no copy, and skip their
work. The grid is as long as the longest item. A TPU runs the grid in order on one core (two share the heads on v4 and
v5p), so there is nothing to split: LeanAttention's schedule of one worker.

Stability: experimental.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels.attention.decode.call import FLOOR, Call, Store, finish_scores, visible
from jaxinfer.pallas_kernels.attention.decode.codes import Codes, unpack
from jaxinfer.pallas_kernels.attention.decode.items import Queries, live_blocks, tiles, untiled

BLOCK, TILE = 1024, 256


def refuses(call: Call) -> str | None:
    """Why this form cannot serve, or None."""
    if "float16" in (call.dtype, call.keys.kind, call.values.kind):
        return "TPUs have no float16"
    block = call.block_near(BLOCK)
    if block < call.capacity and block % 128:
        return f"blocks of {block} tokens, which are not a multiple of 128 nor all {call.capacity}"
    return None


def attend(call: Call, q, k, v, lengths, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """As `decode`."""
    return untiled(call, *items(call, tiles(call, q, positions, TILE), k, v, lengths, slopes))


def items(call: Call, queries: Queries, k, v, lengths, slopes) -> tuple[jax.Array, jax.Array]:
    """Attention of items, each over its row of the cache: `(out f32[N, G, M, d], lse f32[N, G, M])`."""
    from jax.experimental.pallas import tpu as pltpu

    count, groups, rows, dim = queries.q.shape
    block = call.block_near(BLOCK)
    begin, end = live_blocks(call, queries, lengths, block)
    scalars = (begin, end, queries.row, lengths[queries.row])
    positions = jnp.tile(queries.positions, (1, call.repeat))[..., None]
    slopes = jnp.zeros(call.heads) if slopes is None else slopes
    slopes = jnp.repeat(slopes.reshape(groups, call.repeat), rows // call.repeat, 1)[..., None]
    keys, key_specs = _operands(call, call.keys, k, block, 3 if call.transposed else 2)
    values, value_specs = _operands(call, call.values, v, block, 2)
    of_item = pl.BlockSpec((None, None, rows, dim), lambda i, g, j, *_: (i, g, 0, 0))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, call, block, len(keys), len(values)),
        out_shape=(
            jax.ShapeDtypeStruct((count, groups, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((count, groups, rows, 1), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(count, groups, jnp.maximum((end - begin).max(), 1)),
            in_specs=[
                of_item,
                pl.BlockSpec((None, rows, 1), lambda i, g, j, *_: (i, 0, 0)),
                pl.BlockSpec((None, rows, 1), lambda i, g, j, *_: (g, 0, 0)),
                *key_specs,
                *value_specs,
            ],
            out_specs=(of_item, pl.BlockSpec((None, None, rows, 1), lambda i, g, j, *_: (i, g, 0, 0))),
            scratch_shapes=[
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, dim), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "parallel", "arbitrary")),
        interpret=call.interpret,
    )(*scalars, queries.q, positions, slopes, *keys, *values)
    return out, lse[..., 0]


def _operands(
    call: Call, store: Store, x: jax.Array | Codes, block: int, axis: int
) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """Keys or values, and their constants, each with the block of it that a grid step reads."""
    blocks = -(-call.capacity // block)

    def block_of(i, g, j, begin, end, row, _):
        return row[i], g, jnp.minimum(begin[i] + j, jnp.maximum(end[i] - 1, 0))

    def values_index(*step):
        row, g, j = block_of(*step)
        return (row, g, j, 0) if axis == 2 else (row, g, 0, j)

    values = x.values if isinstance(x, Codes) else x
    shape = list(values.shape[2:])
    shape[axis - 2] = block
    arrays, specs = [values], [pl.BlockSpec((None, None, *shape), values_index)]
    for constants in (x.scale, x.offset) if isinstance(x, Codes) else ():
        if constants is None:
            continue
        # A block's constants as the last two axes of an array of their own, whole, so that any number of them will do.
        groups = constants.shape[axis]
        if groups == 1:
            parts = 1
        else:
            a_block = max(block * groups // call.capacity, 1)  # a group may span blocks: then they share its constants
            widths = [(0, 0)] * 4
            widths[axis] = (0, -groups % a_block)
            constants = jnp.pad(constants, widths)
            parts = constants.shape[axis] // a_block
        split = (*constants.shape[:axis], parts, constants.shape[axis] // parts, *constants.shape[axis + 1 :])
        constants = jnp.moveaxis(constants.reshape(split), axis, 2)
        if store.per_token(call.dim):
            constants = constants.reshape(*constants.shape[:3], 1, -1)

        def index(*step, parts=parts):
            row, g, j = block_of(*step)
            return row, g, j * parts // blocks, 0, 0

        arrays.append(constants)
        specs.append(pl.BlockSpec((None, None, None, *constants.shape[3:]), index))
    return arrays, specs


def _kernel(
    call: Call, block: int, num_keys: int, num_values: int, begin, end, row, length, q, positions, slopes, *refs
):
    keys, values = refs[:num_keys], refs[num_keys : num_keys + num_values]
    out, lse, peak, total, sums = refs[num_keys + num_values :]
    item, j = pl.program_id(0), pl.program_id(2)

    @pl.when(j == 0)
    def _():
        peak[...] = jnp.full_like(peak, _floor(call))
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(begin[item] + j < end[item])
    def _():
        start, limit = (begin[item] + j) * block, length[item]
        raw = _key_products(call, q[...], keys)
        at = start + lax.broadcasted_iota(jnp.int32, raw.shape, 1)
        mine = positions[...]
        seen = visible(call, at, limit, mine)
        score = finish_scores(call, raw, seen, mine - at, slopes[...] if call.alibi else None)
        old = peak[...]
        new = old if call.unified_max is not None else jnp.maximum(old, score.max(-1, keepdims=True))
        weight, keep = jnp.exp(score - new), jnp.exp(old - new)
        peak[...] = new
        total[...] = total[...] * keep + weight.sum(-1, keepdims=True)
        for here, product in _value_products(call, weight, values, limit - start, q.dtype):
            sums[:, here] = sums[:, here] * keep + product

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        live = total[...] > 0
        divisor = jnp.where(live, total[...], 1.0)
        out[...] = sums[...] / divisor
        lse[...] = jnp.where(live, peak[...] + jnp.log(divisor), -jnp.inf)


def _key_products(call: Call, q: jax.Array, refs) -> jax.Array:
    """Queries `[M, d]` times the keys of a block, float32 `[M, c]`."""
    parts = _halves(call, call.keys, refs, -2 if call.transposed else -1, q.dtype)
    contract = ((1,), (0 if call.transposed else 1,)), ((), ())
    width = call.dim // len(parts)
    products = [
        lax.dot_general(
            q[:, i * width : (i + 1) * width],
            part,
            contract,
            precision=_precision(q.dtype),
            preferred_element_type=jnp.float32,
        )
        for i, part in enumerate(parts)
    ]
    raw = sum(products[1:], products[0])
    if not call.keys.per_token(call.dim):
        return raw
    scale, *offset = (_spread(ref[...], (1, raw.shape[1])) for ref in refs[1:])
    raw = raw * scale
    return raw + q.astype(jnp.float32).sum(-1, keepdims=True) * offset[0] if offset else raw


def _value_products(call: Call, weight: jax.Array, refs, live: jax.Array, dtype) -> Iterator[tuple[slice, jax.Array]]:
    """Weights `[M, c]` times the values of a block, as the channels that each product is for and float32 `[M, ...]`."""
    shift = 0.0
    if call.values.per_token(call.dim):
        scale, *offset = (_spread(ref[...], (1, weight.shape[1])) for ref in refs[1:])
        shift = (weight * offset[0]).sum(-1, keepdims=True) if offset else 0.0
        weight = weight * scale
    start = 0
    for part in _halves(call, call.values, refs, -1, dtype):
        # What lies beyond the last live token may be anything, and nothing times NaN is NaN.
        at = lax.broadcasted_iota(jnp.int32, (part.shape[0], 1), 0)
        part = jnp.where(at < live, part, jnp.zeros_like(part))
        product = jnp.dot(weight.astype(dtype), part, precision=_precision(dtype), preferred_element_type=jnp.float32)
        yield slice(start, start + part.shape[1]), product + shift
        start += part.shape[1]


def _halves(call: Call, store: Store, refs, channel_axis: int, dtype) -> list[jax.Array]:
    """The numbers of a block as they lie, in halves of the channels if two share a byte; constants of tokens aside."""
    values = refs[0][...]
    if not store.coded:
        return [values.astype(dtype)]
    parts = [values.astype(jnp.int32)] if store.kind == "int8" else list(unpack(values))
    numbers = [part.astype(jnp.float32) for part in parts]
    for i, ref in enumerate(() if store.per_token(call.dim) else refs[1:]):
        constants = ref[...]
        halves = len(parts) if constants.shape[channel_axis] > 1 else 1
        pieces = jnp.split(constants, halves, channel_axis) * (len(parts) // halves)
        spread = [_spread(c, part.shape) for c, part in zip(pieces, parts, strict=True)]
        numbers = [x * c if i == 0 else x + c for x, c in zip(numbers, spread, strict=True)]
    return [x.astype(dtype) for x in numbers]


def _spread(constants: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Constants of groups, one for each element: a product with ones and zeros, the way to repeat lanes on a TPU."""
    for axis, size in enumerate(shape):
        groups = constants.shape[axis]
        if groups in (1, size):
            continue
        if axis == 0 and size // groups % 8 == 0:  # whole tiles of eight rows
            constants = jnp.repeat(constants, size // groups, 0)
            continue
        group, other = (lax.broadcasted_iota(jnp.int32, (groups, size), d) for d in (0, 1))
        member = (other // (size // groups) == group).astype(jnp.float32)
        contract = (((0,), (0,)), ((), ())) if axis == 0 else (((1,), (0,)), ((), ()))
        sides = (member, constants) if axis == 0 else (constants, member)
        constants = lax.dot_general(*sides, contract, precision="highest", preferred_element_type=jnp.float32)
    return constants


def _precision(dtype) -> str:
    """All of float32; of bfloat16 its own, whatever precision is in force: Mosaic has no other product of it."""
    return "highest" if dtype == jnp.float32 else "default"


def _floor(call: Call) -> float:
    return FLOOR if call.unified_max is None else call.unified_max
