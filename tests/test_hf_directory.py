"""Hugging Face directories: what does not fit is named, shards go where the caller says, special leaves come back."""

import copy
import dataclasses
import functools
import json
import math
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxinfer import quant
from jaxinfer.checkpoint.safetensors_io import open_weights
from jaxinfer.checkpoint.safetensors_save import Entry, save
from jaxinfer.errors import CheckpointError, ConfigError, InputError, JaxinferError
from jaxinfer.models import Step, config_from_hf, config_to_hf
from jaxinfer.models.hf import load_config, load_directory, save_directory
from jaxinfer.models.rope_config import read_rope

HERE = Path(__file__).parent
goldens = runpy.run_path(str(HERE / "test_hf_goldens.py"))
CONFIGS = {name: json.loads((HERE / "goldens" / f"{name}.json").read_text()) for name in goldens["CASES"]}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The checkpoint of each golden, written once."""

    @functools.cache
    def get(name):
        directory = tmp_path_factory.mktemp("hf") / name
        goldens["write_checkpoint"](CONFIGS[name], directory)
        return directory

    return get


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rewrite(source, target, change=None, config=None):
    """A copy of a checkpoint with its tensors and its config changed."""
    weights = open_weights(source)
    arrays = {name: weights.read(name) for name in weights}
    arrays = arrays if change is None else change(arrays)
    save(target, [Entry(n, a.shape, a.dtype, functools.partial(np.asarray, a)) for n, a in arrays.items()])
    record = json.loads((source / "config.json").read_text()) | (config or {})
    (target / "config.json").write_text(json.dumps(record))
    return target


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_is_saved_is_loaded_bitwise(name, directories, tmp_path):
    config, params = load_directory(directories(name))
    assert params["embedding"].dtype == jnp.float32  # "auto" on CPU
    save_directory(config, params, tmp_path, max_shard_size=30_000)
    again, loaded = load_directory(tmp_path)
    assert again == config
    equal(params, loaded)
    theirs, ours = open_weights(directories(name)), open_weights(tmp_path)
    assert {n: i.shape for n, i in theirs.tensors.items()} == {n: i.shape for n, i in ours.tensors.items()}
    assert all((theirs.read(n) == ours.read(n)).all() for n in theirs)


def test_types(directories, tmp_path):
    config, params = load_directory(directories("phi3"), dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    save_directory(config, params, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    equal(load_directory(tmp_path / "a", dtype="stored")[1], params)
    assert load_directory(tmp_path / "a")[1]["embedding"].dtype == jnp.float32
    save_directory(config, params, tmp_path / "b", dtype="float16")
    assert load_directory(tmp_path / "b", dtype="stored")[1]["embedding"].dtype == jnp.float16
    for call in (
        lambda: load_directory(tmp_path / "a", dtype="f8"),
        lambda: save_directory(config, params, "x", dtype="no"),
    ):
        with pytest.raises(InputError, match="is not known; known: auto, stored, float32"):
            call()


def drop(name):
    return lambda arrays: {n: a for n, a in arrays.items() if n != name}


NORM = "model.norm.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
UP = "model.layers.1.mlp.up_proj.weight"
Q_NORM = "model.layers.0.self_attn.q_norm.weight"
# what is wrong: (checkpoint, change of its tensors, change of its config, message)
WRONG = {
    "missing": ("llama2", drop(UP), {}, rf"1 missing: '{UP}' \(48, 32\)"),
    "missing head": ("llama2", drop("lm_head.weight"), {}, r"1 missing: 'lm_head.weight' \(96, 32\)"),
    "missing expert": ("mixtral", drop(EXPERT), {}, f"1 missing: '{EXPERT}'"),
    "extra": ("llama2", lambda a: {**a, Q_NORM: a[NORM]}, {}, rf"1 not in this architecture: '{Q_NORM}' \(32,\)"),
    "integers": ("llama2", lambda a: {**a, NORM: np.ones(32, np.int8)}, {}, "is int8, a float type is needed"),
    "fewer layers": ("llama2", None, {"num_hidden_layers": 1}, "9 not in this architecture: 'model.layers.1"),
    "more layers": ("llama2", None, {"num_hidden_layers": 3}, "9 missing: 'model.layers.2"),
    "misshapen": (
        "llama2",
        None,
        {"intermediate_size": 47},
        r"6 misshapen: .* in model.safetensors is \(48, 32\), the config needs \(47, 32\)",
    ),
    "misshapen fused": (
        "phi3",
        None,
        {"num_key_value_heads": 1},
        r"qkv_proj.weight' in model.safetensors is \(64, 32\), the config needs \(48, 32\)",
    ),
    "other family": (
        "qwen2",
        None,
        {"model_type": "qwen3"},
        "missing: .*q_norm.*not in this architecture: .*q_proj.bias",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_contradicts_its_weights(case, directories, tmp_path):
    name, change, config, message = WRONG[case]
    directory = rewrite(directories(name), tmp_path / "x", change, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_directory(directory)
    assert str(directory) in str(caught.value)


def test_directories_that_are_no_models(directories, tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        load_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["llama2"], "model_type": "rwkv"}))
    with pytest.raises(ConfigError, match="config.json: model_type 'rwkv' is not supported; supported: llama"):
        load_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama2"]))
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        load_directory(tmp_path)


def test_what_says_nothing_new_is_passed_over(directories, tmp_path):
    """Old files carry RoPE buffers; tied models sometimes carry their head."""
    name = "llama3.1-llama3rope"
    config, params = load_directory(directories(name))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    directory = rewrite(
        directories(name), tmp_path / "x", lambda a: {**a, **extra, "lm_head.weight": a["model.embed_tokens.weight"]}
    )
    equal(load_directory(directory)[1], params)


def test_the_language_model_of_a_multi_modal_checkpoint(directories, tmp_path):
    config, params = load_directory(directories("gemma3"))
    text = CONFIGS["gemma3"]
    for i, prefix in enumerate(("language_model.model.", "model.language_model.")):

        def change(arrays, prefix=prefix):
            tower = {"vision_tower.x.weight": np.ones(3, np.float32)}
            return {n.replace("model.", prefix, 1): a for n, a in arrays.items()} | tower

        directory = rewrite(directories("gemma3"), tmp_path / str(i), change)
        (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
        again, loaded = load_directory(directory)
        assert again == config
        equal(params, loaded)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"))


RULES = (
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", None),
    ("mlp", "tensor"),
    ("experts", "data"),
    ("embed", None),
)


@pytest.mark.parametrize("name", ["phi3", "mixtral", "gemma3"])
def test_params_go_where_the_shardings_name(name, mesh, directories):
    config, params = load_directory(directories(name))
    axes = nn.get_partition_spec(Step(config).abstract())
    shardings = nn.logical_to_mesh_sharding(axes, mesh, RULES)
    _, sharded = load_directory(directories(name), shardings=shardings)
    equal(params, sharded)
    for found, asked in zip(jax.tree.leaves(sharded), jax.tree.leaves(shardings), strict=True):
        assert found.sharding == asked
    gate = sharded["layers_0"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.size * (8 if name == "mixtral" else 4) == gate.size


def test_one_sharding_for_all_and_shardings_that_do_not_fit(mesh, directories):
    config, params = load_directory(directories("llama2"), shardings=NamedSharding(mesh, P()))
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(params))
    device = jax.devices()[3]
    _, params = load_directory(directories("llama2"), shardings=SingleDeviceSharding(device))
    assert {d for x in jax.tree.leaves(params) for d in x.devices()} == {device}
    with pytest.raises(InputError, match="shardings must be .* tree like params; 'embedding' is not in it"):
        load_directory(directories("llama2"), shardings={"head": NamedSharding(mesh, P())})
    narrow = jax.tree.map(lambda x: NamedSharding(mesh, P(("data", "tensor"))), params)
    with pytest.raises(InputError, match=r"layers_0/attention/.* cannot be placed as"):
        load_directory(
            directories("phi3"), shardings=jax.tree.map(lambda x: x, narrow) | {"layers_0": _odd(mesh, params)}
        )


def _odd(mesh, params):
    return jax.tree.map(lambda x: NamedSharding(Mesh(np.asarray(jax.devices()[:7]), "x"), P("x")), params["layers_0"])


def test_each_param_is_replaced_as_soon_as_it_is_placed(directories):
    def int8(path, array):
        return quant.Int8().quantize(array) if path.endswith(("/gate", "/up", "/down")) else array

    config, params = load_directory(directories("mixtral"), on_leaf=int8)
    _, plain = load_directory(directories("mixtral"))
    equal(params, quant.apply(plain, [(r".*/mlp/(gate|up|down)", quant.Int8())]))


@pytest.fixture(scope="module")
def special(directories):
    """A model whose leaves are int8, LoRA over int8, and arrays."""
    config, params = load_directory(directories("mixtral"))
    params = quant.apply(params, [(r".*/attention/.|.*/mlp/(gate|up|down)|head", quant.Int8())])
    return config, quant.lora(params, [r".*/attention/q"], rank=2, key=jax.random.key(0))


def test_special_leaves_are_refused_by_default(special, tmp_path):
    with pytest.raises(InputError, match='for which Hugging Face has no format; pass leaves="materialize"'):
        save_directory(*special, tmp_path)
    assert not list(tmp_path.iterdir())


def test_special_leaves_are_materialized_on_request(special, tmp_path):
    config, params = special
    save_directory(config, params, tmp_path, leaves="materialize")
    _, loaded = load_directory(tmp_path)
    equal(loaded, quant.materialize(params))


def test_special_leaves_come_back_as_they_were(special, mesh, tmp_path):
    config, params = special
    save_directory(config, params, tmp_path, leaves="native", max_shard_size=20_000)
    again, loaded = load_directory(tmp_path)
    assert again == config and jax.tree.structure(loaded) == jax.tree.structure(params)
    equal(loaded, params)
    replicated = jax.tree.map(lambda x: NamedSharding(mesh, P()), params)
    equal(load_directory(tmp_path, shardings=replicated)[1], params)
    # transformers refuses what it does not know, rather than starting from random weights.
    assert open_weights(tmp_path).metadata == {"format": "jaxinfer"}

    manifest = json.loads((tmp_path / "jaxinfer.json").read_text())
    manifest["leaves"]["head"]["type"] = "os.system"
    (tmp_path / "jaxinfer.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="head: weight type 'os.system' is not known"):
        load_directory(tmp_path)


def test_params_that_do_not_fit_their_config_are_not_saved(directories, tmp_path):
    config, params = load_directory(directories("llama2"))
    bad = {**params, "head": params["head"][:, :3]}
    with pytest.raises(InputError, match=r"head is \(32, 3\), the config needs \(32, 96\)"):
        save_directory(config, bad, tmp_path)
    with pytest.raises(InputError, match="final_norm is nothing"):
        save_directory(config, {k: v for k, v in params.items() if k != "final_norm"}, tmp_path)


@pytest.mark.parametrize("position", ["alibi", "t5", "learned", "sinusoidal", "none"])
def test_models_of_no_family_are_saved_as_our_own(position, directories, tmp_path):
    config = load_config(directories("llama2"))
    config = type(config)(**{**vars(config), "position": position, "ropes": (), "qk_norm": True})
    random, shapes = np.random.RandomState(0), nn.unbox(Step(config).abstract())
    params = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), shapes)
    save_directory(config, params, tmp_path)
    again, loaded = load_directory(tmp_path)
    assert again == config
    equal(loaded, params)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_configs_of_transformers_4_say_the_same(name, directories):
    """`rope_scaling` and `rope_theta` beside, in place of `rope_parameters`; `torch_dtype` in place of `dtype`."""
    new = CONFIGS[name]
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype")} | {"torch_dtype": "float32"}
    rope = new["rope_parameters"]
    if "full_attention" in rope:
        old["rope_local_base_freq"], rope = rope["sliding_attention"]["rope_theta"], rope["full_attention"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.pop("rope_type")
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": {**scaling, "type": kind} if kind != "default" else None}
    assert config_from_hf(old) == config_from_hf(new)


def fuzz_configs(examples):
    """A config with entries replaced is accepted, or refused with an error that is ours."""
    own = config_to_hf(dataclasses.replace(config_from_hf(CONFIGS["qwen3-yarn"]), position="none"))
    configs = {**CONFIGS, "own": json.loads(json.dumps(own)), "own too": json.loads(json.dumps(own))}
    names = sorted(configs)
    keys = sorted(
        {k for c in configs.values() for k in c} | {"quantization_config", "rope_scaling", "sliding_window_pattern"}
    )
    rope_keys = [
        "rope_type",
        "factor",
        "rope_theta",
        "short_factor",
        "full_attention",
        "original_max_position_embeddings",
    ]
    scalars = st.integers(-1, 9) | st.floats() | st.sampled_from(["yarn", "linear"])
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 200),
        st.sampled_from([2**31, 2**70, "llama3", "yarn", "longrope", "dynamic", "sliding_attention"]),
        st.floats(),
        st.text(max_size=4),
        st.lists(st.integers(-1, 9) | st.none() | st.text(max_size=2), max_size=3),
        st.dictionaries(st.sampled_from(rope_keys), scalars, max_size=3),
    )
    outcomes = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(
        st.sampled_from(names),
        st.lists(st.tuples(st.sampled_from(keys), values, st.booleans()), min_size=1, max_size=3),
    )
    def run(name, changes):
        hf = copy.deepcopy(configs[name])
        for key, value, inside in changes:
            ropes = hf["ropes"][0] if hf.get("ropes") and isinstance(hf["ropes"], list) else hf.get("rope_parameters")
            node = ropes if inside and isinstance(ropes, dict) else hf
            node[key] = value
        try:
            config = dataclasses.replace(config_from_hf(hf), position="rope")
            for layer in range(min(config.num_layers, 3)):
                spec = config.attention(layer)
                assert math.isfinite(spec.scale)
                if spec.position is not None:
                    jax.eval_shape(lambda x, spec=spec: spec.rotate(x, jnp.zeros((1, 1), jnp.int32)),
                                   jax.ShapeDtypeStruct((1, 1, 1, config.head_dim), jnp.float32))  # fmt: skip
            outcomes.append(True)
        except JaxinferError:
            outcomes.append(False)

    run()
    assert 0.1 < np.mean(outcomes) < 0.95


@pytest.mark.parametrize(
    "settings",
    [
        {"full_attention": 1},
        {"rope_type": [1]},
        {"rope_type": "longrope", "short_factor": 1, "long_factor": [1]},
        {"rope_type": "longrope", "short_factor": [1], "long_factor": [1], "original_max_position_embeddings": "x"},
        {"rope_type": "longrope", "short_factor": [1], "long_factor": [1], "original_max_position_embeddings": -1},
    ],
)
def test_wrong_rope_settings_give_clear_errors(settings):
    with pytest.raises(ConfigError):
        read_rope({"rope_parameters": settings}, 8)


def test_wrong_configs_give_clear_errors():
    fuzz_configs(150)


@pytest.mark.slow
def test_thousands_of_wrong_configs_give_clear_errors():
    fuzz_configs(3000)
