"""Recipes, adapters as a tree of their own, bits per weight, and leaves as named arrays."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops, quant
from jaxinfer.errors import CheckpointError, ConfigError, InputError

KEY = jax.random.key(0)


def params():
    random = np.random.default_rng(0)

    def weight(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    layer = {"attention": {"q": weight(16, 16), "q_bias": weight(16)}, "mlp": {"gate": weight(16, 16)}}
    return {"embedding": weight(16, 16), "layers_0": layer, "final_norm": weight(16)}


def kinds(tree):
    return {path: type(leaf).__name__ for path, leaf in quant.leaves(tree) if hasattr(leaf, "map_axes")}


def test_first_rule_that_matches_the_whole_path_wins():
    tree = params()
    out = quant.apply(tree, [(".*/mlp/.*", quant.Int8(group=4)), (".*/gate|.*/q", None), (".*", quant.Int8())])
    assert kinds(out) == {"layers_0/mlp/gate": "QuantizedArray", "embedding": "QuantizedArray"}
    assert out["layers_0"]["mlp"]["gate"].groups == 4
    assert out["embedding"].axis == -1 and out["layers_0"]["mlp"]["gate"].axis == -2
    assert out["layers_0"]["attention"]["q"] is tree["layers_0"]["attention"]["q"]  # untouched, not copied
    assert kinds(quant.apply(tree, [("embed.*", quant.Int8())])) == {"embedding": "QuantizedArray"}
    assert kinds(quant.apply(tree, [])) == {}
    in_numpy = quant.apply(jax.tree.map(np.asarray, tree), [("embed.*", quant.Int8())])
    assert kinds(in_numpy) == {"embedding": "QuantizedArray"} and kinds(quant.merge(in_numpy)) == kinds(in_numpy)


@pytest.mark.parametrize(
    "rules,error,words",
    [
        ([("mlp", quant.Int8())], InputError, "'mlp'.*layers_0/mlp/gate"),
        ([("layers_0/mlp/gatee", None)], InputError, "nearest paths: layers_0/mlp/gate"),
        ([(".*_bias", quant.Int8())], InputError, "only vectors.*layers_0/attention/q_bias"),
        ([("(", quant.Int8())], ConfigError, "no regular expression"),
        ([("embedding", quant.Int8)], ConfigError, r"did you mean Int8\(\)"),
        ([("embedding", "int8")], ConfigError, "'int8'"),
        (["embedding"], ConfigError, "pair"),
        ([(3, None)], ConfigError, "regular expression"),
        ([("embedding", quant.Int8(group=5))], ConfigError, "embedding: .*group 5"),
    ],
)
def test_bad_rules_are_refused(rules, error, words):
    with pytest.raises(error, match=words):
        quant.apply(params(), rules)


def test_what_is_quantized_already_is_refused_and_a_base_is_reached():
    once = quant.apply(params(), [(".*/q", quant.Int8())])
    with pytest.raises(InputError, match="layers_0/attention/q.*already"):
        quant.apply(once, [(".*/q", quant.Int8())])
    adapted = quant.lora(params(), [".*/q"], 2, KEY)
    q = quant.apply(adapted, [(".*/q", quant.Int8())])["layers_0"]["attention"]["q"]
    assert isinstance(q, quant.LoraArray) and isinstance(q.base, quant.QuantizedArray)


def test_donated_originals_are_freed_unless_used_twice():
    tree = params()
    tree["layers_0"]["mlp"]["up"] = tree["layers_0"]["mlp"]["gate"]
    quant.apply(tree, [(".*/(q|gate)", quant.Int8())], donate=True)
    freed = [path for path, leaf in quant.leaves(tree) if leaf.is_deleted()]
    assert freed == ["layers_0/attention/q"]


def test_recipes_work_on_shapes_alone():
    rules = [(".*", quant.Int8(group=8))]
    abstract = jax.eval_shape(lambda p: quant.apply(p, rules), params())
    real = quant.apply(params(), rules)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(lambda a: (a.shape, a.dtype), real)
    assert quant.bits_per_weight(abstract) == quant.bits_per_weight(real)


@pytest.mark.slow
def test_every_format_of_the_command_line_fits_the_embedded_model():
    """With its default settings, on shapes alone; what it weighs is what its name says, and a bit."""
    from jaxinfer.checkpoint.hub import resolve
    from jaxinfer.cli import options

    step = options.step_of(resolve("tinycode"), options.format_of("f32", "auto"), None)
    abstract = jax.eval_shape(step.init, KEY)
    bits = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "fp8": 8, "fp6": 6, "mxfp4": 4, "nvfp4": 4, "ternary": 2,
            "trit-planes": 4, "mixed": 4.4}  # fmt: skip
    assert set(bits) == set(options.WEIGHTS.entries)
    for name, least in bits.items():
        rules = options.rules_of(options.WEIGHTS.parse(name))
        leaves = jax.eval_shape(lambda p, rules=rules: quant.apply(p, rules), abstract)
        assert least < quant.bits_per_weight(leaves) < least + 1, name


def test_bits_per_weight_counts_everything_stored():
    w = jnp.ones((64, 32))

    def bits(spec):
        return quant.bits_per_weight(jax.eval_shape(spec.quantize, w))

    assert quant.bits_per_weight(w) == 32
    assert bits(quant.Int8()) == 8 + 32 / 64
    assert bits(quant.Int8(group=16, scales="bfloat16")) == 8 + 16 / 16
    assert bits(quant.Int4(group=32)) == 4 + 32 / 32 + 8 / 32  # codes, scales, zeros
    assert bits(quant.Int3(group=32, symmetric=True)) == 3 + 32 / 32
    assert bits(quant.Fp6(scales="float16")) == 6 + 16 / 64
    assert bits(quant.MxFp4()) == 4 + 8 / 32
    assert bits(quant.NvFp4()) == 4 + 8 / 16 + 32 / w.size
    assert bits(quant.Fp8(group=32, rows=16)) == 8 + 32 / (32 * 16)
    assert bits(quant.TritPlanes(group=32, steps=1)) == 2 * (2 + 32 / 32)
    adapted = quant.LoraArray(quant.Int8().quantize(w), jnp.ones((64, 2)), jnp.ones((2, 32)))
    assert quant.bits_per_weight(adapted) == 8 + 32 / 64 + 32 * 2 * (64 + 32) / (64 * 32)
    assert quant.bits_per_weight({"a": w, "b": jnp.ones(32)}) == 32
    with pytest.raises(InputError, match="no weights"):
        quant.bits_per_weight({})


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_path_alone():
    tree = params()
    one = quant.lora(tree, [".*/q", "embedding"], 2, KEY, alpha=8)
    q, table = one["layers_0"]["attention"]["q"], one["embedding"]
    assert (
        q.scale == 4.0 and q.a.shape == (16, 2) and q.a.any() and not q.b.any() and table.b.any() and not table.a.any()
    )
    np.testing.assert_array_equal(ops.materialize(q), tree["layers_0"]["attention"]["q"])
    other = quant.lora(tree, [".*/gate", ".*/q"], 2, KEY)
    np.testing.assert_array_equal(other["layers_0"]["attention"]["q"].a, q.a)
    assert (other["layers_0"]["mlp"]["gate"].a != q.a).any()


@pytest.mark.parametrize(
    "rules,rank,error,words",
    [
        ([".*/q"], 0, ConfigError, "rank"),
        ([".*/q"], 2.0, ConfigError, "rank"),
        ([".*/q"], 17, ConfigError, "rank 17 .* layers_0/attention/q"),
        (".*/q", 2, ConfigError, "sequence"),
        (["q"], 2, InputError, "nearest paths: layers_0/attention/q"),
    ],
)
def test_bad_adapters_are_refused(rules, rank, error, words):
    with pytest.raises(error, match=words):
        quant.lora(params(), rules, rank, KEY)


def test_adapters_come_off_go_back_on_merge_and_unmerge():
    tree = params()
    adapted = quant.lora(tree, [".*/q"], 2, KEY)
    adapters = jax.tree.map(lambda a: jnp.round(a * 4 + 1), quant.adapters(adapted))
    assert kinds(adapters) == {"layers_0/attention/q": "LoraArray"} and len(jax.tree.leaves(adapters)) == 2
    on = quant.attach(tree, adapters)
    assert jax.tree.structure(on) == jax.tree.structure(adapted)
    assert quant.detach(on)["layers_0"]["attention"]["q"] is tree["layers_0"]["attention"]["q"]
    q = on["layers_0"]["attention"]["q"]
    merged = quant.merge(on)
    np.testing.assert_array_equal(merged["layers_0"]["attention"]["q"], np.float32(q.base) + np.float32(q.a @ q.b))
    back = quant.unmerge(merged, adapters)["layers_0"]["attention"]["q"]
    np.testing.assert_allclose(
        back.base, q.base, atol=1e-6 * float(jnp.abs(merged["layers_0"]["attention"]["q"]).max())
    )
    np.testing.assert_array_equal(back.a, q.a)
    with pytest.raises(InputError, match="layers_1/q.*nearest"):
        quant.attach(tree, {"layers_1": {"q": q}})
    with pytest.raises(InputError, match="layers_0/mlp/gate: an adapter"):
        small = quant.LoraArray(None, jnp.ones((8, 2)), jnp.ones((2, 8)))
        quant.attach(tree, {"layers_0": {"mlp": {"gate": small}}})


def mixed():
    rules = [(".*/gate", quant.Int8(group=4, scales="bfloat16")), ("embedding", quant.Int8())]
    tree = quant.apply(params(), rules)
    tree["embedding"] = quant.ExtendedRows(tree["embedding"], jnp.ones((2, 16)))
    return quant.lora(tree, [".*/gate", ".*/q"], 2, KEY, alpha=0.3)


def every_format():
    specs = {
        "int4": quant.Int4(group=8), "int3": quant.Int3(group=8), "int2": quant.Int2(group=8), "fp6": quant.Fp6(),
        "fp8": quant.Fp8(group=16, rows=16), "mxfp4": quant.MxFp4(), "nvfp4": quant.NvFp4(),
        "ternary": quant.Ternary(), "trit": quant.TritPlanes(group=16, steps=2), "mixed": quant.Mixed(group=16),
        "transposed": quant.Transposed(),
    }  # fmt: skip
    w = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)
    return jax.jit(lambda w: {name: spec.quantize(w) for name, spec in specs.items()})(w)


def test_directories_of_version_1_are_read():
    """Int8 alone, in the logical orientation: codes `[K, N]` and scales `[G, N]`, or `[V, D]` and `[V, G]`."""
    tree = quant.apply(params(), [(".*/gate", quant.Int8(group=4)), ("embedding", quant.Int8())])
    arrays, manifest = quant.flatten(quant.lora(tree, [".*/gate"], 2, KEY))
    old = {"axis": -2, "logical_dtype": "float32", "type": "int8"}
    manifest["leaves"]["layers_0/mlp/gate"]["base"] = dict(old)
    manifest["leaves"]["embedding"] = dict(old, axis=-1)
    manifest["version"] = 1
    name = "layers_0/mlp/gate.base"
    before = arrays | {f"{name}.codes": arrays[f"{name}.codes"].T, f"{name}.scales": arrays[f"{name}.scales"].T}
    back = quant.unflatten(before, json.loads(json.dumps(manifest)))
    np.testing.assert_array_equal(
        ops.materialize(quant.detach(back)["layers_0"]["mlp"]["gate"]), ops.materialize(tree["layers_0"]["mlp"]["gate"])
    )
    np.testing.assert_array_equal(ops.materialize(back["embedding"]), ops.materialize(tree["embedding"]))
    turned = quant.detach(quant.unflatten(arrays, manifest))  # arrays that are not as version 1 had them
    assert (
        ops.materialize(turned["layers_0"]["mlp"]["gate"]) != ops.materialize(tree["layers_0"]["mlp"]["gate"])
    ).any()


def test_leaves_as_named_arrays_come_back_bit_for_bit():
    for tree in (mixed(), quant.adapters(mixed()), params(), every_format()):
        arrays, manifest = quant.flatten(tree)
        assert all(re.fullmatch(r"[\w/]+(\.[\w.]+)?", name) for name in arrays)
        back = quant.unflatten(arrays, json.loads(json.dumps(manifest)))
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, back, tree)
    arrays, _ = quant.flatten(mixed())
    assert {"embedding.base.codes", "embedding.extra", "layers_0/mlp/gate.base.scales", "layers_0/mlp/gate.a"} < set(
        arrays
    )


DAMAGE = {
    "version": (lambda a, m: m.update(version=3), "version 3"),
    "no leaves": (lambda a, m: m.pop("leaves"), "'leaves'"),
    "type": (lambda a, m: m["leaves"]["embedding"].update(type="pickle"), "embedding: weight type 'pickle'"),
    "odd type": (lambda a, m: m["leaves"]["embedding"].update(type=["int8"]), "embedding: weight type"),
    "no type": (lambda a, m: m["leaves"]["embedding"].pop("type"), "embedding: .*'type'"),
    "entry": (lambda a, m: m["leaves"].update(embedding=3), "embedding"),
    "spare field": (lambda a, m: m["leaves"]["embedding"].update(zero=1), "embedding: field 'zero'"),
    "axis": (lambda a, m: m["leaves"]["embedding"].update(axis="-1"), "embedding.axis must be a int"),
    "axis value": (lambda a, m: m["leaves"]["embedding"].update(axis=0), "embedding: .*axis 0"),
    "scale": (lambda a, m: m["leaves"]["layers_0/mlp/gate"].update(scale=float("nan")), "gate.scale"),
    "missing": (lambda a, m: a.pop("embedding.base.codes"), "embedding.base.codes is missing"),
    "spare": (lambda a, m: a.update({"final_norm.codes": 1}), "final_norm.codes belongs to no weight"),
    "twice": (lambda a, m: a.update({"embedding": 1}), "embedding: named twice"),
    "inside": (lambda a, m: a.update({"final_norm/x": 1}), "final_norm/x: named twice, inside"),
    "shape": (lambda a, m: a.update({"layers_0/mlp/gate.base.scales": jnp.ones((3, 16))}), "gate.base: scales"),
    "dtype": (
        lambda a, m: a.update({"embedding.base.codes": jnp.ones((16, 16))}),
        "embedding.base: codes must be int8",
    ),
    "rank": (lambda a, m: a.update({"layers_0/mlp/gate.a": jnp.ones((16, 3))}), "gate: factors"),
    "logical": (lambda a, m: m["leaves"]["embedding"]["base"].update(logical_dtype="U7"), "logical_dtype"),
}


@pytest.fixture(scope="module")
def saved():
    return quant.flatten(mixed())


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_manifests_and_arrays_are_refused(name, saved):
    arrays, manifest = dict(saved[0]), json.loads(json.dumps(saved[1]))
    damage, words = DAMAGE[name]
    damage(arrays, manifest)
    with pytest.raises(CheckpointError, match=words):
        quant.unflatten(arrays, manifest)


def test_names_that_paths_cannot_hold_are_refused():
    with pytest.raises(InputError, match="a/b"):
        quant.flatten({"a/b": jnp.ones(2)})
