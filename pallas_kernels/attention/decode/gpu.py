"""Decode on Hopper: LeanAttention's stream-K over a persistent grid of one block of threads a multiprocessor.

Sanovar et al. 2024, arXiv 2405.10480. Every worker takes an equal run of the (item, head, block) sequence, whatever the
lengths. It walks that run by itself from prefetched item tables; the keys and values of the blocks ahead are on their
way by TMA, across items, while tensor cores multiply the present one. Codes become 16-bit numbers in registers on their
way from one shared buffer to another. The parts of items that two workers share are merged by XLA. For `invariant` the
items are cut into pieces of a fixed number of blocks, and runs end where a piece does.

Written in Mosaic GPU for jax 0.11.2 or newer. Dead tokens in the last live block of a cache must be finite numbers.

Stability: experimental.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.pallas_kernels._core import tuning
from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu, mosaic_gpu_refuses
from jaxinfer.pallas_kernels.attention import io
from jaxinfer.pallas_kernels.attention.decode.call import FLOOR, MASKED, Call, Store, normalize, visible
from jaxinfer.pallas_kernels.attention.decode.codes import Codes, unpack
from jaxinfer.pallas_kernels.attention.decode.items import Queries, State, live_blocks, merge, tiles, untiled

ROWS = TILE = 64  # a warpgroup's product has 64 rows: query heads of a key head times queries, the rest padding
WORKERS = 132  # multiprocessors of an H100 or H200
SHARED = 200 * 1024  # bytes of shared memory for the blocks under way; the rest holds queries and results
PIECE = 8  # blocks that are never parted where a row's bits may not depend on the other rows
GATHERED = 2**23  # up to so many numbers, parts are merged in one gather, more of them in a loop
_BYTES = {"int8": "int8", "int4": "uint8"}


class Walk(NamedTuple):
    """Where a worker is: the item, the block within the cache, the unit within the whole sequence."""

    item: jax.Array
    block: jax.Array
    unit: jax.Array


def refuses(call: Call) -> str | None:
    """Why this form cannot serve, or None."""
    if reason := mosaic_gpu_refuses():
        return reason
    if call.dtype not in ("bfloat16", "float16"):
        return f"queries are {call.dtype}, and tensor cores multiply bfloat16 or float16"
    if call.dim % 64 or call.dim > 256:
        return f"heads of {call.dim} channels, which are not 64, 128, 192 or 256"
    if call.repeat > ROWS:
        return f"{call.repeat} query heads of a key head, more than {ROWS}"
    block = _block(call)
    if block % 64 or block > 256 or block > call.capacity:
        return f"blocks of {block} tokens of {call.capacity}, which are not 64, 128 or 256 of them"
    for name, store in (("keys", call.keys), ("values", call.values)):
        if not store.coded and store.kind != call.dtype:
            return f"{name} are {store.kind}, the queries {call.dtype}"
        if store.kind == "int4" and call.dim % 128:
            return f"{name} are int4 codes of {call.dim} channels, whose halves are not whole tiles"
        a_token = store.tokens == 1 and store.channels == call.dim
        a_channel = store.channels == 1 and store.tokens % block == 0
        if store.coded and not (a_token or a_channel):
            return f"{name} have constants for {store.tokens} tokens by {store.channels} channels"
    return None


def attend(call: Call, q, k, v, lengths, positions, slopes) -> tuple[jax.Array, jax.Array]:
    """As `decode`."""
    return untiled(call, *items(call, tiles(call, q, positions, TILE), k, v, lengths, slopes))


def items(call: Call, queries: Queries, k, v, lengths, slopes) -> tuple[jax.Array, jax.Array]:
    """Attention of items, each over its row of the cache: `(out f32[N, G, M, d], lse f32[N, G, M])`."""
    plgpu = mosaic_gpu()
    count, groups, rows, dim = queries.q.shape
    block = _block(call)
    begin, end = live_blocks(call, queries, lengths, block)
    pieces = -(-call.capacity // (block * PIECE)) if call.invariant else 1
    if call.invariant:
        limits = jnp.arange(pieces, dtype=jnp.int32) * PIECE
        begin, end = jnp.maximum(begin[:, None], limits), jnp.minimum(end[:, None], limits + PIECE)
    begin, end = (jnp.repeat(x.reshape(-1), groups) for x in (begin, end))
    row = jnp.repeat(queries.row, groups * pieces)
    workers = 3 if call.interpret else WORKERS  # the interpreter runs each as threads of the host
    tables, first, last = _plan(begin, end, workers, whole=call.invariant)
    slopes = jnp.zeros(call.heads, jnp.float32) if slopes is None else slopes
    slopes = jnp.repeat(slopes.reshape(groups, call.repeat), rows // call.repeat, 1)
    pad = ROWS - rows
    operands = (
        jnp.pad(queries.q, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(count * groups, ROWS, dim),
        jnp.pad(jnp.tile(queries.positions, (1, call.repeat)), ((0, 0), (0, pad)), constant_values=-1),
        jnp.pad(slopes, ((0, 0), (0, pad))),
    )
    slots = count * pieces * groups + workers - 1
    kept_rows = -(-rows // 8) * 8
    vector = jax.ShapeDtypeStruct((slots, ROWS), jnp.float32)
    parts = plgpu.kernel(
        functools.partial(_kernel, call, block, pieces, kept_rows),
        out_type=(jax.ShapeDtypeStruct((slots, kept_rows, dim), jnp.float32), vector, vector),
        grid=(workers,),
        grid_names=("worker",),
        scratch_types=_scratch(call, block, plgpu),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({"interpret": plgpu.InterpretGPUParams()} if call.interpret else {}),
    )(
        {**tables, "row": row, "length": lengths[row]},
        operands,
        _operands(k, call.keys, call.transposed, block),
        _operands(v, call.values, False, block),
    )
    out, peak, total = (x[:, :rows] for x in parts)
    merged = functools.partial(_merged, workers=workers)
    if call.invariant:
        merged = functools.partial(_merged_pieces, pieces=pieces, groups=groups)
    out, lse = normalize(*merged(State(peak, total, out), first, last))
    return out.reshape(count, groups, rows, dim), lse.reshape(count, groups, rows)


def _block(call: Call) -> int:
    """Tokens of a block: the caller's, the table's, or the most that the cache, its codes and the registers allow."""
    if call.block is not None:
        return call.block
    grouped = [s.tokens for s in (call.keys, call.values) if s.coded and s.tokens > 1]

    def serves(block: tuple[int, ...]) -> bool:
        return len(block) == 1 and block[0] <= call.capacity and not any(tokens % block[0] for tokens in grouped)

    def rule() -> tuple[int]:
        fitting = [t for t in io.TILES if io.hopper_registers(t, call.dim) <= io.REGISTERS and serves((t,))]
        return (max(fitting, default=min(io.TILES)),)

    sizes = (call.capacity, call.dim)
    return tuning.block("decode", call.keys.kind, sizes, rule, device="NVIDIA H200", serves=serves)[0]


def _plan(
    begin: jax.Array, end: jax.Array, workers: int, *, whole: bool = False
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """The tables by which a worker walks its run, and the first and last worker of each item.

    `begin, end i32[N]` of the items; `after[i]`: the next item after i that has blocks; `first[w], unit[w], stop[w]`: a
    worker's first item and its run in units of the whole sequence. `whole`: runs end with items.
    """
    count = begin.shape[0]
    sizes = jnp.maximum(end - begin, 0)
    ends = jnp.cumsum(sizes)
    starts, total = ends - sizes, ends[-1]
    run = jnp.maximum((total + workers - 1) // workers, 1)

    def item_at(unit: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.searchsorted(ends, unit, side="right"), count - 1).astype(jnp.int32)

    unit = jnp.minimum(jnp.arange(workers, dtype=jnp.int32) * run, total)
    if whole:
        inside = unit > starts[item_at(unit)]
        unit = jnp.where(inside, ends[item_at(unit)], unit)
        first_worker = jnp.searchsorted(unit, starts, side="right") - 1
        last_worker = first_worker
    else:
        first_worker, last_worker = starts // run, (ends - 1) // run
    first = item_at(unit)
    later = jnp.where(sizes > 0, jnp.arange(count, dtype=jnp.int32), count - 1)
    after = jnp.append(lax.cummin(later, reverse=True)[1:], count - 1)
    tables = {
        "begin": begin, "end": end, "after": after, "first": first, "unit": unit, "stop": jnp.append(unit[1:], total),
        "block": begin[first] + unit - starts[first],
    }  # fmt: skip
    return tables, first_worker, jnp.where(sizes > 0, last_worker, -1)


def _merged(parts: State, first: jax.Array, last: jax.Array, workers: int) -> State:
    """The parts of each item in one: item i's lie at slots i + first[i] to i + last[i]."""
    count = first.shape[0]
    if count * workers * math.prod(parts.out.shape[1:]) <= GATHERED:
        worker = jnp.arange(workers)
        slots = jnp.arange(count)[:, None] + worker
        return merge(State(*(x[slots] for x in parts)), (worker >= first[:, None]) & (worker <= last[:, None]))
    empty = State(*(jnp.full((count, *x.shape[1:]), v) for x, v in zip(parts, (FLOOR, 0.0, 0.0), strict=True)))

    def add(i: jax.Array, so_far: State) -> State:
        here = first + i
        part = State(*(x.at[jnp.arange(count) + here].get(mode="clip") for x in parts))
        both = State(*(jnp.stack([a, b], 1) for a, b in zip(so_far, part, strict=True)))
        return merge(both, jnp.stack([jnp.full(count, True), here <= last], 1))

    return lax.fori_loop(0, jnp.maximum((last - first).max() + 1, 0), add, empty)


def _merged_pieces(parts: State, first: jax.Array, last: jax.Array, pieces: int, groups: int) -> State:
    """The pieces of each item in one, always in the same order: `[N * pieces * G]`, each kept by one worker."""
    parts = State(*(x[jnp.arange(first.shape[0]) + first] for x in parts))

    def side_by_side(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(-1, pieces, groups, *x.shape[1:]), 1, 2)
        return x.reshape(-1, pieces, *x.shape[3:])

    return merge(State(*map(side_by_side, parts)), side_by_side(last >= 0))


def _operands(x: jax.Array | Codes, store: Store, transposed: bool, block: int) -> dict[str, jax.Array]:
    """Keys or values, and constants: `[B, G, C]` of tokens, in whole blocks, or `[B, G, groups, d]` of channels."""
    if not isinstance(x, Codes):
        return {"values": x}
    constants = {"scale": x.scale} if x.offset is None else {"scale": x.scale, "offset": x.offset}
    if transposed:
        constants = {name: jnp.swapaxes(c, 2, 3) for name, c in constants.items()}
    if store.tokens == 1:
        size = -x.values.shape[3 if transposed else 2] % block
        constants = {name: jnp.pad(c[..., 0], ((0, 0), (0, 0), (0, size))) for name, c in constants.items()}
    return {"values": x.values, **constants}


def _transforms(shape: tuple[int, ...], dtype, plgpu) -> tuple:
    """The layout in shared memory that TMA writes and tensor cores read."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def _scratch(call: Call, block: int, plgpu) -> dict[str, Any]:
    dtype = jnp.dtype(call.dtype)
    shapes = {"k": (call.dim, block) if call.transposed else (block, call.dim), "v": (block, call.dim)}
    stores = {"k": call.keys, "v": call.values}
    kinds = {name: jnp.dtype(_BYTES.get(store.kind, dtype)) for name, store in stores.items()}
    kept = {name: list(shape) for name, shape in shapes.items()}
    for name, store in stores.items():
        if store.kind == "int4":
            kept[name][0 if name == "k" and call.transposed else 1] //= 2
    a_stage = sum(math.prod(kept[name]) * kinds[name].itemsize for name in shapes)
    wide = sum(math.prod(shapes[name]) * dtype.itemsize for name in shapes if stores[name].coded)
    fixed = ROWS * call.dim * (dtype.itemsize + 4) + wide
    stages = max(2, min((SHARED - fixed) // a_stage, 8))

    def shared(shape, kind):
        return plgpu.SMEM(shape, kind, transforms=_transforms(shape, kind, plgpu))

    scratch = {
        "q": shared((ROWS, call.dim), dtype),
        "own_out": plgpu.SMEM((ROWS, call.dim), jnp.float32),
        "own_peak": plgpu.SMEM((ROWS,), jnp.float32),
        "own_total": plgpu.SMEM((ROWS,), jnp.float32),
        "k": shared((stages, *kept["k"]), kinds["k"]),
        "v": shared((stages, *kept["v"]), kinds["v"]),
        "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "q_arrived": plgpu.Barrier(),
    }
    for name in shapes:
        if stores[name].coded:
            scratch[f"{name}_wide"] = shared(shapes[name], dtype)
    if call.interpret:  # the interpreter multiplies shared memory only
        scratch["weight"] = shared((ROWS, block), dtype)
    return scratch


def _kernel(call: Call, block: int, pieces: int, kept_rows: int, tables, operands, keys, values, out, peak, total, **s):
    plgpu = mosaic_gpu()
    q_of, positions_of, slopes_of = operands
    stages = s["k"].shape[0]
    worker = lax.axis_index("worker")
    stop = tables["stop"][worker]
    first_unit = tables["unit"][worker]

    def stage_of(unit):
        return lax.rem(unit - first_unit, jnp.int32(stages))

    def fetch(at: Walk) -> Walk:
        """Send for the block at `at`, and step on."""

        @pl.when(at.unit < stop)
        def _():
            stage, row, group = stage_of(at.unit), tables["row"][at.item], lax.rem(at.item, jnp.int32(call.groups))
            tokens = pl.ds(at.block * block, block)
            k_index = (row, group, slice(None), tokens) if call.transposed else (row, group, tokens)
            plgpu.copy_gmem_to_smem(keys["values"].at[k_index], s["k"].at[stage], s["arrived"].at[stage])
            plgpu.copy_gmem_to_smem(values["values"].at[row, group, tokens], s["v"].at[stage], s["arrived"].at[stage])

        inside = at.block + 1 < tables["end"][at.item]
        item = jnp.where(inside, at.item, tables["after"][at.item])
        return Walk(item, jnp.where(inside, at.block + 1, tables["begin"][item]), at.unit + 1)

    def an_item(carry: tuple[Walk, Walk]) -> tuple[Walk, Walk]:
        at, ahead = carry
        item, row, group = at.item, tables["row"][at.item], lax.rem(at.item, jnp.int32(call.groups))
        tile = lax.div(item, jnp.int32(call.groups * pieces))
        mine_of = item if pieces == 1 else tile * call.groups + group
        plgpu.copy_gmem_to_smem(q_of.at[mine_of], s["q"], s["q_arrived"])
        plgpu.barrier_wait(s["q_arrived"])
        L = plgpu.Layout.WGMMA
        mine = plgpu.load(positions_of.at[tile], layout=L.reduce(1), optimized=False)
        slopes = plgpu.load(slopes_of.at[group], layout=L.reduce(1), optimized=False) if call.alibi else None
        blocks = jnp.minimum(tables["end"][item] - at.block, stop - at.unit)
        length = tables["length"][item]

        def a_block(i, carry):
            state, ahead = carry
            stage = stage_of(at.unit + i)
            # All four warps are done with the block before: its place is free.
            plgpu.commit_smem()
            ahead = fetch(ahead)
            plgpu.barrier_wait(s["arrived"].at[stage])
            number = at.block + i
            k = _wide(
                call.keys, call.transposed, keys, s["k"].at[stage], s.get("k_wide"), row, group, number, block, plgpu
            )
            raw = _product(s["q"], k if call.transposed else k.transpose((1, 0)), (ROWS, block), plgpu)
            score = _scores(call, raw, mine, slopes, number * block, length, plgpu)
            old = state.peak
            new = old if call.unified_max is not None else jnp.maximum(old, score.max(axis=1))
            keep = jnp.exp(old - new)
            weight = jnp.exp(score - lax.broadcast_in_dim(new, score.shape, [0]))
            sums = state.out * lax.broadcast_in_dim(keep, state.out.shape, [0])
            total = state.total * keep + weight.sum(axis=1)
            v = _wide(call.values, False, values, s["v"].at[stage], s.get("v_wide"), row, group, number, block, plgpu)
            weight = weight.astype(s["q"].dtype)
            if call.interpret:
                s["weight"][...] = weight
                plgpu.commit_smem()
                sums += _product(s["weight"], v, sums.shape, plgpu)
            else:
                sums = pl.run_state(lambda acc: plgpu.wgmma(acc, weight, v))(plgpu.ACC.init(sums))
            return State(new, total, sums), ahead

        full = functools.partial(jnp.full, dtype=jnp.float32)
        floor = FLOOR if call.unified_max is None else call.unified_max
        state = State(
            plgpu.layout_cast(full((ROWS,), floor), L.reduce(1)),
            plgpu.layout_cast(full((ROWS,), 0.0), L.reduce(1)),
            plgpu.layout_cast(full((ROWS, call.dim), 0.0), L),
        )
        state, ahead = lax.fori_loop(0, blocks, a_block, (state, ahead))
        s["own_peak"][...], s["own_total"][...], s["own_out"][...] = state
        plgpu.commit_smem()
        slot = item + worker
        plgpu.copy_smem_to_gmem(s["own_out"].at[pl.ds(0, kept_rows)], out.at[slot])
        plgpu.copy_smem_to_gmem(s["own_peak"], peak.at[slot])
        plgpu.copy_smem_to_gmem(s["own_total"], total.at[slot])
        plgpu.wait_smem_to_gmem(0)
        following = tables["after"][item]
        return Walk(following, tables["begin"][following], at.unit + blocks), ahead

    here = Walk(tables["first"][worker], tables["block"][worker], first_unit)
    ahead = here
    for _ in range(stages - 1):
        ahead = fetch(ahead)
    lax.while_loop(lambda carry: carry[0].unit < stop, an_item, (here, ahead))


def _wide(store: Store, transposed: bool, operands, codes, wide, row, group, number, block: int, plgpu):
    """A block of keys or values as 16-bit numbers in shared memory, which it is already unless it is codes."""
    if not store.coded:
        return codes
    L = plgpu.Layout.WGMMA
    tokens_axis = 1 if transposed else 0
    parts = [codes[...]] if store.kind == "int8" else list(unpack(codes[...]))
    channels = parts[0].shape[1 - tokens_axis]
    for i, part in enumerate(parts):
        x = plgpu.layout_cast(part.astype(jnp.float32), L)
        mine = pl.ds(i * channels, channels)
        for name in ("scale", "offset"):
            if name not in operands:
                continue
            if store.tokens == 1:
                constants, axis = operands[name].at[row, group, pl.ds(number * block, block)], tokens_axis
            else:
                number_of_group = lax.div(number * block, jnp.int32(store.tokens))
                constants, axis = operands[name].at[row, group, number_of_group, mine], 1 - tokens_axis
            c = plgpu.load(constants, layout=L.reduce(1 - axis), optimized=False)
            c = lax.broadcast_in_dim(c, x.shape, [axis])
            x = x * c if name == "scale" else x + c
        here = wide if len(parts) == 1 else wide.at[mine] if transposed else wide.at[:, mine]
        here[...] = x.astype(wide.dtype)
    plgpu.commit_smem()
    return wide


def _product(a, b, shape: tuple[int, int], plgpu):
    """A product of two shared arrays, in registers."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        plgpu.wgmma_wait(0)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _scores(call: Call, raw, mine, slopes, start, length, plgpu):
    """Masked scores; tanh by exp, since the fast tanh of the hardware has eleven bits."""
    L = plgpu.Layout.WGMMA
    score = raw * call.scale
    if call.softcap is not None:
        score = call.softcap - 2 * call.softcap / (jnp.exp(score * (2 / call.softcap)) + 1)
    at = plgpu.broadcasted_iota(jnp.int32, raw.shape, 1, layout=L) + start
    mine = lax.broadcast_in_dim(mine, raw.shape, [0])
    if slopes is not None:
        score -= lax.broadcast_in_dim(slopes, raw.shape, [0]) * (mine - at).astype(jnp.float32)
    return jnp.where(visible(call, at, length, mine), score, MASKED)
