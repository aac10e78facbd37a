"""Tables from logical to mesh axes: every stored array of a leaf is placed, and a sharded model is the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxinfer import quant
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.sharding.rules import EXPERT, REPLICATED, TENSOR, AxisRules, shardings

CONFIG = ModelConfig(
    vocab_size=48, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8, mlp_size=48, max_length=32
)
EXPERTS = dataclasses.replace(
    CONFIG, num_experts=4, experts_per_token=2, expert_size=24, tie_embeddings=True, qkv_bias=True
)


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def specs(tree):
    return {name: sharding.spec for name, sharding in quant.flatten(tree)[0].items()}


def test_a_plain_model_is_placed_by_its_logical_axes():
    step = Step(EXPERTS)
    found = specs(shardings(step, mesh(data=2, tensor=4), EXPERT))
    assert found["embedding"] == PartitionSpec("tensor", None)
    assert found["final_norm"] == PartitionSpec(None)
    assert found["layers_0/attention/q"] == PartitionSpec(None, "tensor")
    assert found["layers_0/attention/q_bias"] == PartitionSpec("tensor")
    assert found["layers_0/mlp/down"] == PartitionSpec("tensor", None, None)
    both = TENSOR.replace(embed="data")
    assert specs(shardings(step.abstract("bfloat16"), mesh(data=2, tensor=4), both))[
        "layers_0/mlp/gate"
    ] == PartitionSpec(None, "data", "tensor")
    assert both != TENSOR and hash(both) and AxisRules((("a", ("x", "y")),)).spec(("a",)) == PartitionSpec(("x", "y"))


@pytest.mark.slow
def test_a_sharded_model_with_every_leaf_type_is_the_same_model():
    """A dense layer and a layer of experts, tied, with int8, grouped int8, LoRA and added rows, on 2 x 4 devices."""
    config = dataclasses.replace(EXPERTS, num_layers=2, dense_layers=(0,))
    step, random, devices = (
        Step(dataclasses.replace(config, vocab_size=50)),
        np.random.default_rng(0),
        mesh(data=2, tensor=4),
    )
    plain = quant.map_leaves(lambda _, w: np.float32(random.normal(0.1, 0.2, w.value.shape)), Step(config).abstract())
    rules = [(".*/mlp/.*", quant.Int8()), (".*/q", quant.Int8(group=8)), (".*", quant.Int8())]
    params = quant.lora(quant.apply(plain, rules), [".*/(o|down|gate)", "embedding"], 2, jax.random.key(0))
    params = quant.attach(quant.detach(params), jax.tree.map(lambda w: w + 0.1, quant.adapters(params)))
    params["embedding"] = quant.ExtendedRows(params["embedding"], jnp.ones((2, 32)))

    placed = shardings(step, devices, TENSOR.replace(experts="data"), params)
    assert jax.tree.structure(placed) == jax.tree.structure(params)
    found = specs(placed)
    assert found["embedding.extra"] == PartitionSpec(None, None)
    assert found["embedding.base.base.scales"] == found["embedding.base.a"] == PartitionSpec("tensor", None)
    assert found["layers_0/attention/q.scales"] == PartitionSpec("tensor", None)
    assert found["layers_0/mlp/gate.base.scales"] == PartitionSpec("tensor", None)
    assert found["layers_0/mlp/gate.b"] == PartitionSpec(None, "tensor")
    assert found["layers_0/mlp/down.base.scales"] == PartitionSpec(None, None)
    assert found["layers_0/mlp/down.a"] == PartitionSpec("tensor", None)
    assert found["layers_1/mlp/gate.base.codes"] == PartitionSpec("data", "tensor", None)
    assert found["layers_1/mlp/down.base.scales"] == PartitionSpec("data", None, None)
    assert found["layers_1/mlp/down.a"] == PartitionSpec("data", "tensor", None)

    ids = jnp.asarray(random.integers(0, 50, (2, 6)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))

    @jax.jit
    def logits(params, ids):
        return step.head(params, step(params, ids, positions)[0].hidden)

    sharded = jax.device_put(params, placed)
    codes = sharded["layers_1"]["mlp"]["gate"].base.codes
    assert codes.addressable_shards[0].data.size * 8 == codes.size
    expected = logits(params, ids)
    rows = jax.device_put(ids, jax.NamedSharding(devices, PartitionSpec("data")))
    np.testing.assert_allclose(logits(sharded, rows), expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    "config,rules,words",
    [
        (EXPERTS, TENSOR.replace(experts="tensor"), r"layers_0/mlp/\w+: mesh axis 'tensor' would split two axes"),
        (CONFIG, TENSOR.replace(embed=("data", "tensor")), r"mesh axis 'tensor' would split two axes"),
        (dataclasses.replace(CONFIG, mlp_size=46), TENSOR, r"layers_0/mlp/\w+: shape .*46 cannot be split 4 ways"),
        (dataclasses.replace(CONFIG, num_kv_heads=2), TENSOR, "num_kv_heads is 2.*4 parts"),
        (CONFIG, TENSOR.replace(mlp="model"), "mesh axis 'model'; the mesh has data, tensor"),
        (CONFIG, AxisRules((("vocab", None),)), "logical axis 'embed' has no row"),
    ],
)
def test_rules_that_do_not_fit_are_refused(config, rules, words):
    with pytest.raises(ConfigError, match=words):
        shardings(Step(config), mesh(data=2, tensor=4), rules)


def test_params_that_do_not_fit_are_refused():
    step, devices = Step(CONFIG), mesh(tensor=8)
    with pytest.raises(InputError, match="embeding is no weight.*embedding"):
        shardings(step, devices, REPLICATED, {"embeding": jnp.ones((48, 32))})
    with pytest.raises(InputError, match="final_norm: shape"):
        shardings(step, devices, REPLICATED, {"final_norm": jnp.ones((4, 8))})
    with pytest.raises(InputError, match="names no logical axes"):
        shardings({"final_norm": jnp.ones(8)}, devices, REPLICATED)
    with pytest.raises(ConfigError, match="two rows"):
        AxisRules((("mlp", None), ("mlp", "tensor")))
    groups = quant.apply({"head": jnp.ones((32, 48))}, [("head", quant.Int8(group=8))])
    with pytest.raises(ConfigError, match=r"head\.scales: shape \(48, 4\).*4 cannot be split 8 ways"):
        shardings(step, devices, REPLICATED.replace(embed="tensor"), groups)
