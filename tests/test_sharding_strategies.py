"""Strategies on eight virtual devices: the tables, and a sharded model's logits, gradients and tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer import cache as kv
from jaxinfer import decode, quant
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.decoder import Mlp
from jaxinfer.ops.attention import Segments
from jaxinfer.sharding import mesh as meshes
from jaxinfer.sharding.collectives import collectives
from jaxinfer.sharding.ring_attention import zigzag
from jaxinfer.sharding.strategies import Sharded, automatic, product, sharded, strategy_for
from jaxinfer.train.lm import NextToken

DENSE = ModelConfig(
    vocab_size=48, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, mlp_size=48, max_length=64
)
SMALL = dataclasses.replace(DENSE, num_layers=1)
MODELS = {
    "dense": DENSE,
    "gqa": dataclasses.replace(SMALL, num_heads=8, num_kv_heads=4, qk_norm=True, tie_embeddings=True),
    "window": dataclasses.replace(DENSE, windows=(5, None), qkv_bias=True),
    "moe": dataclasses.replace(DENSE, num_experts=8, experts_per_token=2, expert_size=24, dense_layers=(0,)),
}
BATCH, LENGTH, CAPACITY = 8, 16, 33


def step_on(config, text, *, sequence=False, explicit=False):
    mesh = meshes.make_mesh(meshes.parse(text), config, batch=BATCH, explicit=explicit)
    return sharded(Step(config), mesh, sequence=sequence)


@functools.cache
def example(config):
    """Random params, and a batch of two packed documents a row."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(Step(config).init, jax.random.key(0))
    params = jax.tree.map(lambda w: np.float32(random.normal(0, 0.3, w.shape) + (w.ndim == 1)), shapes)
    ids = random.integers(0, config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    segments = np.broadcast_to(np.arange(LENGTH) >= 6, ids.shape).astype(np.int32)
    positions = np.where(segments == 1, np.arange(LENGTH) - 6, np.arange(LENGTH)).astype(np.int32)
    return params, {"ids": ids, "targets": np.roll(ids, -1, 1), "segments": segments, "positions": positions}


def loss_gradients_logits(step):
    def run(params, batch):
        def loss(params):
            mask = Segments(batch["segments"])
            logits = step.head(params, step(params, batch["ids"], batch["positions"], mask=mask)[0].hidden)
            gold = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
            return (jax.nn.logsumexp(logits, -1) - gold).mean(), logits

        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, gradients, logits

    return run


@functools.cache
def expected(config):
    return jax.device_get(jax.jit(loss_gradients_logits(Step(config)))(*example(config)))


def worst(got, want):
    """The largest error of any array, as a share of its largest entry."""
    pairs = zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(want), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-9)) for a, b in pairs)


def placed(step):
    params, batch = example(step.config)
    return step.place(params), batch


def tokens_of(step, params, *, drafter=None):
    prompts = np.random.default_rng(1).integers(0, 48, (BATCH, 9)).astype(np.int32)
    config = decode.Config(max_tokens=12, prefill_chunk=8, **({} if drafter is None else {"drafter": drafter}))
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    lengths = np.array([9, 4, 7, 1, 9, 8, 2, 5], np.int32)
    return np.asarray(generate(step, params, prompts, lengths, config=config, key=jax.random.key(0)).tokens)


def decoding_step(step):
    """One forward of a token a row over a new cache, its greedy token and its commit, compiled: what a loop repeats."""
    params = jax.tree.map(
        lambda w, s: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=s),
        jax.eval_shape(Step(step.config).init, jax.random.key(0)),
        step.shardings(),
    )

    def run(params, tokens, positions):
        cache = step.new_cache(BATCH, CAPACITY)
        output, blocks = step(params, tokens, positions, cache)
        best = step.head(params, output.hidden).argmax(-1)
        return best, kv.commit(cache, blocks, jnp.zeros((BATCH, 1), jnp.int32), (best[:, 0] >= 0).astype(jnp.int32))

    return jax.jit(run).lower(params, jnp.zeros((BATCH, 1), jnp.int32), jnp.zeros((BATCH, 1), jnp.int32)).compile()


def whole_caches(compiled, config):
    """Instructions that make an array of a cache's full shape, as only a replicated cache has."""
    shape = f"[{BATCH},{config.num_kv_heads},{config.head_dim},{CAPACITY}]"
    return [line for line in compiled.as_text().splitlines() if shape in line.split(" = ")[-1][:60]]


def test_golden_tables():
    assert dict(product("data", "tensor").table) == {
        "vocab": "tensor", "embed": None, "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "experts": None,
        "batch": "data", "length": None, "context": None,
    }  # fmt: skip
    every = strategy_for({"data": 2, "fsdp": 2, "expert": 2, "context": 2, "tensor": 2}, MODELS["moe"], sequence=True)
    assert dict(every.table) == {
        "vocab": "tensor", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
        "experts": "expert", "batch": ("data", "fsdp", "expert"), "length": ("context", "tensor"), "context": "context",
    }  # fmt: skip
    found = quant.flatten(step_on(MODELS["moe"], "fsdp=2,expert=2,tensor=2").shardings())[0]
    specs = {name: sharding.spec for name, sharding in found.items() if "layers_0" not in name or "mlp" in name}
    assert specs == {
        "embedding": P("tensor", "fsdp"),
        "head": P("fsdp", "tensor"),
        "final_norm": P("fsdp"),
        "layers_0/mlp/gate": P("fsdp", "tensor"),
        "layers_0/mlp/up": P("fsdp", "tensor"),
        "layers_0/mlp/down": P("tensor", "fsdp"),
        "layers_1/input_norm": P("fsdp"),
        "layers_1/post_attention_norm": P("fsdp"),
        "layers_1/attention/q": P("fsdp", "tensor"),
        "layers_1/attention/k": P("fsdp", "tensor"),
        "layers_1/attention/v": P("fsdp", "tensor"),
        "layers_1/attention/o": P("tensor", "fsdp"),
        "layers_1/mlp/router": P("fsdp", None),
        "layers_1/mlp/gate": P("expert", "fsdp", "tensor"),
        "layers_1/mlp/up": P("expert", "fsdp", "tensor"),
        "layers_1/mlp/down": P("expert", "tensor", "fsdp"),
    }
    odd = dataclasses.replace(DENSE, vocab_size=47)
    assert strategy_for({"tensor": 4}, odd)["vocab"] is None and strategy_for({"tensor": 4}, DENSE)["vocab"] == "tensor"


@pytest.mark.parametrize(
    "text,config,words",
    [
        ("tensor=3", DENSE, "num_heads is 4, which 3 parts of 'tensor' do not divide; would fit: tensor=1|2|4"),
        ("tensor=4", dataclasses.replace(DENSE, num_kv_heads=2), "num_kv_heads is 2.*would fit: tensor=1|2"),
        ("expert=2", DENSE, "the model has no experts; would fit: expert=1"),
        ("expert=3", MODELS["moe"], "num_experts is 8.*would fit: expert=1|2|4|8"),
        ("stage=3", DENSE, "num_layers is 2, too few for 3 stages; would fit: stage=1|2"),
        ("data=4,tensor=4", DENSE, "takes 16 devices, there are 8; would fit: .*data=8"),
        ("data=3", DENSE, "a batch of 8 rows cannot be split 3 ways; would fit: data of 1|2|4|8, or a batch of 9"),
        ("model=2", DENSE, "accepted: NAME=SIZE with NAME of data, fsdp"),
        ("tensor=0", DENSE, "accepted: NAME=SIZE"),
        ("tensor=2,tensor=2", DENSE, "axis 'tensor' is there twice"),
    ],
)
def test_meshes_that_do_not_fit_say_what_would(text, config, words):
    with pytest.raises(ConfigError, match=words.replace("|", r"\|")):
        meshes.make_mesh(meshes.parse(text), config, batch=BATCH)


def test_fitting_meshes_are_made_and_others_refused():
    fits = meshes.fitting(SMALL, 8, batch=4)
    assert {"data": 2, "tensor": 4} in fits and {"tensor": 8} not in fits and {"data": 8} not in fits
    for axes in fits:
        assert meshes.make_mesh(axes, SMALL, batch=4).size == 8
    with pytest.raises(ConfigError, match="strategy 'zero' is unknown; accepted: data, fsdp"):
        product("zero")
    with pytest.raises(ConfigError, match="stage is no row of a table"):
        strategy_for({"stage": 2}, DENSE)
    step = step_on(SMALL, "data=8")
    assert hash(step) == hash(step_on(SMALL, "data=8")) and step == step_on(SMALL, "data=8")
    with pytest.raises(InputError, match="a batch of 6 rows cannot be split 8 ways"):
        step.new_cache(6, 16)


def test_a_small_model_under_data_by_tensor():
    step = step_on(SMALL, "data=2,tensor=4")
    assert worst(jax.jit(loss_gradients_logits(step))(*placed(step)), expected(SMALL)) < 1e-5


def test_tensor_parallel_decoding_gathers_no_weight_and_replicates_no_cache():
    step = step_on(SMALL, "data=2,tensor=4")
    compiled = decoding_step(step)
    weights = {tuple(w.shape) for w in jax.tree.leaves(example(SMALL)[0]) if w.ndim > 1}
    gathered = {shape for one in collectives(compiled) if one.kind == "all-gather" for shape in one.shapes}
    assert not gathered & weights
    assert not whole_caches(compiled, SMALL)
    # Planted bug: a table that keeps the cache's rows and heads whole on every device.
    replicates = Sharded(step.step, step.mesh, step.rules.replace(batch=None, kv_heads=None))
    assert whole_caches(decoding_step(replicates), SMALL)


@pytest.mark.slow
def test_a_mesh_of_explicit_axes():
    """The caller's arrays carry their layout in their types; inside, the model runs on Auto axes."""
    step = step_on(SMALL, "data=2,tensor=4", explicit=True)
    params, batch = placed(step)
    layout = jax.tree.map(lambda s: s.spec, step.shardings())
    run = automatic(loss_gradients_logits(step), step.mesh, (P(), layout, P("data", None, "tensor")))
    with jax.set_mesh(step.mesh):
        rows = {name: jax.device_put(x, NamedSharding(step.mesh, P("data", None))) for name, x in batch.items()}
        loss, gradients, logits = jax.jit(run)(params, rows)
    assert jax.typeof(logits).sharding.spec == P("data", None, "tensor")
    assert gradients["layers_0"]["attention"]["q"].sharding.spec == P(None, "tensor")
    assert worst((loss, gradients, logits), expected(SMALL)) < 1e-5


MATRIX = [
    *(("dense", text) for text in ("data=8", "fsdp=8", "data=2,tensor=4", "data=2,context=4")),
    ("dense", "sequence:data=2,tensor=4"),
    *(("gqa", text) for text in ("fsdp=2,tensor=4", "sequence:tensor=4", "context=2,tensor=4")),
    *(("window", text) for text in ("fsdp=2,tensor=4", "sequence:data=4,tensor=2", "context=8")),
    *(("moe", text) for text in ("data=8", "fsdp=2,tensor=4", "expert=8", "sequence:expert=2,tensor=4")),
    ("moe", "expert=2,context=2,tensor=2"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model,text", MATRIX)
def test_every_strategy_has_the_logits_and_gradients_of_one_device(model, text):
    kind, _, axes = text.rpartition(":")
    step = step_on(MODELS[model], axes, sequence=kind == "sequence")
    assert worst(jax.jit(loss_gradients_logits(step))(*placed(step)), expected(MODELS[model])) < 1e-5


@pytest.mark.slow
def test_tokens_in_zigzag_order_train_alike():
    """The order in which the ring's work is balanced: everything that a token has moves with it."""
    step = step_on(DENSE, "data=2,context=4")
    params, batch = placed(step)
    order = zigzag(LENGTH, 4)
    moved = {name: x[:, order] for name, x in batch.items()}
    run = jax.jit(jax.value_and_grad(NextToken(step), has_aux=True))
    (loss, _), gradients = run(params, moved, None)
    assert worst((loss, gradients), expected(DENSE)[:2]) < 1e-5


class HalvedSum(Sharded):
    """Planted bug: the sum after the MLP counts half of the devices."""

    def _intercept(self, run, args, kwargs, context):
        out = super()._intercept(run, args, kwargs, context)
        return out / 2 if isinstance(context.module, Mlp) and context.method_name == "__call__" else out


@pytest.mark.slow
def test_a_wrong_sum_is_caught():
    step = step_on(SMALL, "tensor=4")
    broken = HalvedSum(step.step, step.mesh, step.rules)
    assert worst(jax.jit(loss_gradients_logits(broken))(*placed(broken)), expected(SMALL)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tensor=4", "data=2,tensor=4", "data=2,context=4"])
def test_greedy_decoding_is_token_for_token_equal(text):
    model = "window" if "context" in text else "gqa"
    step = step_on(MODELS[model], text)
    params = example(MODELS[model])[0]
    np.testing.assert_array_equal(tokens_of(step, step.place(params)), tokens_of(Step(MODELS[model]), params))


@pytest.mark.slow
def test_experts_decode_with_drafts_int8_and_lora():
    """Rows by experts, weights in int8 with LoRA on attention, drafts from a copied context: the same tokens."""
    config = MODELS["moe"]
    plain = quant.apply(example(config)[0], [("(?!.*router).*", quant.Int8())])
    params = quant.lora(plain, [".*/(q|o)"], 2, jax.random.key(0))
    params = quant.attach(quant.detach(params), jax.tree.map(lambda w: w + 0.1, quant.adapters(params)))
    step = step_on(config, "expert=4,tensor=2")
    shards = step.place(params)
    gate = shards["layers_1"]["mlp"]["gate"].codes
    assert gate.addressable_shards[0].data.size * 8 == gate.size
    drafter = decode.CopySpec(gamma=2)
    np.testing.assert_array_equal(
        tokens_of(step, shards, drafter=drafter), tokens_of(Step(config), params, drafter=drafter)
    )
