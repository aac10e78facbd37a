"""The collectives of a compiled program: kinds, bytes, groups, and trips of the loops around them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.errors import InputError
from jaxinfer.sharding.collectives import collectives, sent, summary


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_kinds_bytes_and_groups(mesh):
    def f(x):  # [16, 8] a device
        a = jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True)
        b = jax.lax.psum_scatter(a, "tensor", tiled=True)  # [4, 8]
        c = jax.lax.ppermute(b, "tensor", [(i, (i + 1) % 4) for i in range(4)])
        return jax.lax.all_gather(c, "data", tiled=True), jax.lax.psum(a, "data"), jax.lax.pmax(c, ("data", "tensor"))

    out = (P(("tensor", "data")), P("tensor"), P())
    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("tensor"), out_specs=out, check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 8), jnp.float32)).compile()
    assert summary(compiled) == {
        "all-gather": (1, 8 * 8 * 4),
        "all-reduce": (2, 16 * 8 * 4 + 4 * 8 * 4),
        "all-to-all": (1, 16 * 8 * 4),
        "collective-permute": (1, 4 * 8 * 4),
        "reduce-scatter": (1, 4 * 8 * 4),
    }
    parts = {one.kind: one.parts for one in collectives(compiled) if one.kind != "collective-permute"}
    assert parts["all-to-all"] == parts["reduce-scatter"] == 4 and parts["all-gather"] == 2
    assert {one.parts for one in collectives(compiled) if one.kind == "all-reduce"} == {2, 8}
    assert sent(compiled, ["reduce-scatter"]) == 3 * 4 * 8 * 4  # three steps of a ring of four
    assert sent(compiled, ["all-to-all"]) == 16 * 8 * 4 * 3 / 4
    assert sent(compiled, ["collective-permute"]) == 4 * 8 * 4
    assert sent(compiled, ["all-gather"]) == 8 * 8 * 4 / 2


def test_loops_multiply_and_unknown_lengths_are_marked(mesh):
    w = jax.ShapeDtypeStruct((32, 32), jnp.bfloat16, sharding=NamedSharding(mesh, P("tensor", None)))
    x = jax.ShapeDtypeStruct((4, 32), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "tensor")))

    def known(x, w):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x)

    def unknown(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ w), x)

    found = [one for one in collectives(jax.jit(known).lower(x, w).compile()) if one.shapes[0][0] == 4]
    assert {one.times for one in found} == {3} and not any(one.unbounded for one in found)
    loops = [one for one in collectives(jax.jit(unknown).lower(x, w).compile()) if one.shapes[0] and one.unbounded]
    assert loops and {one.times for one in loops} == {1}


def test_branches_count_and_are_marked(mesh):
    def f(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jax.lax.psum(x, "tensor"), lambda x: x, jax.lax.psum(x, "data"))

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = collectives(jax.jit(mapped).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile())
    assert sorted((one.parts, one.conditional) for one in found) == [(2, False), (4, True)]
    assert sent(found) == 32 + 2 * 32 * 3 / 4 and sent(found, conditional=False) == 32


def test_asynchronous_text_and_what_is_no_program():
    text = """HloModule m, num_partitions=4
ENTRY %main (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  %s = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%p), replica_groups=[1,4]<=[4], dimensions={0}
  %d = bf16[8,8]{1,0} all-gather-done(%s)
  %q = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %n = f8e4m3fn[16] all-reduce(%y), replica_groups={}, to_apply=%add
  %o = f32[16] all-reduce(%y), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  %m = f32[4] all-reduce(%y), replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b','c':(1)2}
  ROOT %r = bf16[8,8] copy(%d)
}
"""
    assert summary(text) == {"all-gather": (1, 128), "all-reduce": (2, 32), "collective-permute": (1, 32)}
    with pytest.raises(InputError, match="no compiled program"):
        collectives("module @jit_f {}")
    with pytest.raises(InputError, match="'broadcast' is no collective"):
        sent(text, ["broadcast"])
