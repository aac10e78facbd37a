"""Adapters on disk: PEFT's format both ways, our own for what it cannot hold, and clear words for what does not fit."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import quant
from jaxinfer.errors import CheckpointError, ConfigError, InputError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.adapters import ARRAYS, CONFIG, load_adapter, save_adapter
from jaxinfer.models.hf import load_directory

KEY = jax.random.key(0)
IDS = np.array([[1, 17, 300, 4, 5, 6]], np.int32)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_directory(tiny_model, dtype="float32")


def moved(params):
    """Adapters after some training."""
    rng = np.random.default_rng(3)
    trained, frozen = quant.split(params)
    return quant.join(jax.tree.map(lambda a: a + rng.normal(0, 0.2, a.shape).astype(np.float32), trained), frozen)


def adapted(params):
    """LoRA of two ranks and scales, so that both patterns of the format are used."""
    rules = [(".*/attention/[qv]", quant.Lora(4, alpha=8)), (".*/(o|gate|down)", quant.Lora(2, alpha=3, rslora=True))]
    return moved(quant.adapt(params, rules, KEY))


def logits(config, params):
    step = Step(config)
    out, _ = step(params, jnp.asarray(IDS), jnp.arange(IDS.shape[1])[None])
    return np.asarray(step.head(params, out.hidden))


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_lora_comes_back_from_pefts_format(model, tmp_path):
    config, params = model
    ours = adapted(params)
    save_adapter(config, ours, tmp_path, base_name="tiny")
    record = json.loads((tmp_path / CONFIG).read_text())
    assert record["peft_type"] == "LORA" and record["base_model_name_or_path"] == "tiny"
    assert {record["r"], *record["rank_pattern"].values()} == {2, 4}
    back = load_adapter(config, params, tmp_path)
    for (path, one), (_, two) in zip(
        quant.leaves(quant.adapters(ours)), quant.leaves(quant.adapters(back)), strict=True
    ):
        np.testing.assert_array_equal(one.a, two.a, err_msg=path)
        assert one.scale == pytest.approx(two.scale, rel=1e-12)
    quantized = quant.apply(params, [(".*/attention/.*", quant.Int8())])
    over = load_adapter(config, quantized, tmp_path)["layers_0"]["attention"]["q"]
    assert isinstance(over.base, quant.QuantizedArray)


@pytest.mark.parametrize("spec", [quant.Paca(4), quant.Soka(2), quant.Hydra(4), quant.Soka()])
def test_other_kinds_come_back_from_our_own(model, tmp_path, spec):
    config, params = model
    ours = moved(quant.adapt(params, [(".*/attention/[qo]", spec)], KEY))
    save_adapter(config, ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "JAXINFER"
    same(load_adapter(config, params, tmp_path), ours)


def test_a_tied_embedding_is_not_written_as_peft(tmp_path):
    """PEFT would leave the head as it was: another function."""
    config = ModelConfig(
        vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24,
        max_length=64, tie_embeddings=True,
    )  # fmt: skip
    params = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32),
        jax.eval_shape(Step(config).init, KEY),
    )
    ours = moved(quant.adapt(params, [("embedding", quant.Lora(2))], KEY))
    save_adapter(config, ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "JAXINFER"
    same(load_adapter(config, params, tmp_path), ours)


def edited(folder, **changes):
    record = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(record))


def test_what_does_not_fit_is_told(model, tmp_path):
    config, params = model
    with pytest.raises(CheckpointError, match=f"no {CONFIG}"):
        load_adapter(config, params, tmp_path)
    with pytest.raises(InputError, match="without an adapter"):
        save_adapter(config, params, tmp_path)
    save_adapter(config, adapted(params), tmp_path)
    other = {**params, "embedding": params["embedding"] + 1}
    with pytest.raises(ConfigError, match="trained on another model .its embedding differs"):
        load_adapter(config, other, tmp_path)
    layer = params["layers_0"]
    wide = {**layer, "attention": {**layer["attention"], "q": jnp.ones((32, 64))}}
    with pytest.raises(ConfigError, match="another model: layers_0/attention/q: an adapter for"):
        load_adapter(config, {**params, "layers_0": wide}, tmp_path)
    for changes, words in (
        ({"use_dora": True}, "more than LoRA: use_dora=True"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not known; known: LORA, JAXINFER"),
        ({"peft_type": "JAXINFER"}, "no manifest"),
        ({"lora_alpha": "8", "alpha_pattern": {}}, 'lora_alpha of .* must be a number, got "8"'),
    ):
        save_adapter(config, adapted(params), tmp_path)
        edited(tmp_path, **changes)
        with pytest.raises((ConfigError, CheckpointError), match=words):
            load_adapter(config, params, tmp_path)
    save_adapter(config, adapted(params), tmp_path)
    (tmp_path / ARRAYS).write_bytes((tmp_path / ARRAYS).read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated"):
        load_adapter(config, params, tmp_path)


@pytest.mark.parity
def test_peft_computes_the_same_with_our_lora_and_we_with_its(model, tiny_model, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config, params = model
    ids = torch.tensor(IDS, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs are not ours to fix
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        np.testing.assert_allclose(base(ids).logits.detach().numpy(), logits(config, params), atol=1e-4, rtol=1e-4)
        ours = adapted(params)
        save_adapter(config, ours, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
        got, want = theirs(ids).logits.detach().numpy(), logits(config, ours)
        assert np.abs(want - logits(config, params)).max() > 0.1
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
        doubled = quant.map_leaves(  # the planted bug: alpha written where alpha / r was meant
            lambda _, x: x.replace(scale=2 * x.scale) if quant.is_adapter(x) else x, ours
        )
        assert np.abs(got - logits(config, doubled)).max() > 0.1
        settings = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj", "lm_head"], init_lora_weights=False,
            use_rslora=True, rank_pattern={"up_proj": 2}, alpha_pattern={"v_proj": 3}, task_type="CAUSAL_LM",
        )  # fmt: skip
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        made = peft.get_peft_model(plain, settings)
        made.save_pretrained(tmp_path / "theirs")
        made.eval()
        want = made(ids).logits.detach().numpy()
    read = load_adapter(config, params, tmp_path / "theirs")
    assert set(quant.adapters(read)) == {"layers_0", "head"}
    np.testing.assert_allclose(logits(config, read), want, atol=1e-4, rtol=1e-4)
