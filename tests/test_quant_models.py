"""Contract 1 over whole models: each kind of decoder with int8, LoRA and int8 + LoRA weights, against plain arrays."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import quant
from jaxinfer.models import ModelConfig, Step

LLAMA = ModelConfig(
    vocab_size=48, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48, max_length=32
)
KINDS = {
    "llama": LLAMA,
    "qwen": dataclasses.replace(
        LLAMA, tie_embeddings=True, qkv_bias=True, mlp_bias=True, qk_norm=True, position="learned"
    ),
    "experts": dataclasses.replace(
        LLAMA, num_experts=4, experts_per_token=2, expert_size=24, position="t5", tie_embeddings=True
    ),
}
RULES = [("(?!position_table).*", quant.Int8())]
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 9)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9)).at[1, :3].set(-1)


def logits(step, params, ids=IDS):
    output, _ = step(params, ids, POSITIONS)
    return step.head(params, output.hidden)


KEY = jax.random.key(0)
RUN = jax.jit(logits, static_argnums=0)


@dataclasses.dataclass
class Kind:
    """A small model and its formats."""

    name: str
    step: Step
    params: dict
    int8: dict
    lora: dict
    both: dict


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    step, random = Step(KINDS[request.param]), np.random.default_rng(0)

    def fill(w):
        return np.float32(random.normal(0.1 if w.ndim < 2 else 0.0, 0.2, w.shape))

    params = jax.tree.map(fill, nn.unbox(step.abstract()))
    adapted = jax.eval_shape(lambda p: quant.lora(p, [".*/(q|gate|down)", "embedding"], 2, KEY, alpha=4), params)
    adapters = jax.tree.map(fill, quant.adapters(adapted))
    int8 = quant.apply(jax.tree.map(jnp.asarray, params), RULES)
    return Kind(request.param, step, params, int8, quant.attach(params, adapters), quant.attach(int8, adapters))


def dense(leaf):
    """What a leaf stands for, written out in numpy: independent of the rules under test."""
    match leaf:
        case quant.QuantizedArray(codes, scales, axis=axis):
            rows = np.float32(codes) * np.repeat(np.asarray(scales), codes.shape[-1] // scales.shape[-1], -1)
            return rows if axis == -1 else rows.swapaxes(-1, -2)
        case quant.LoraArray(base, a, b, scale):
            return dense(base) + scale * np.asarray(a) @ np.asarray(b)
        case quant.ExtendedRows(base, extra, axis):
            return np.concatenate([dense(base), extra], axis)
    return np.asarray(leaf)


def arrays(params):
    return quant.map_leaves(lambda _, leaf: dense(leaf), params)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("kind", ["qwen", "experts"], indirect=True)
def test_int8_model_equals_the_materialized_one(kind):
    leaves = dict(quant.leaves(kind.int8))
    for path, leaf in quant.leaves(kind.params):
        matrix = leaf.ndim > 1 and path != "position_table"
        assert isinstance(leaves[path], quant.QuantizedArray) == matrix, path
        assert leaves[path].shape == leaf.shape
    got = RUN(kind.step, kind.int8)
    close(got, RUN(kind.step, arrays(kind.int8)))
    with pytest.raises(AssertionError):
        close(got, RUN(kind.step, kind.params))


@pytest.mark.slow
def test_adapted_model_equals_the_merged_one(kind):
    """LoRA over int8 everywhere, over arrays on one kind."""
    for params in (kind.both, kind.lora) if kind.name == "llama" else (kind.both,):
        got = RUN(kind.step, params)
        close(got, RUN(kind.step, arrays(params)))
        with pytest.raises(AssertionError):
            close(got, RUN(kind.step, arrays(quant.detach(params))))


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_scales_on_the_wrong_axis_are_caught(kind):
    """The planted bug: the square output projection with its scales along the input."""
    o = kind.int8["layers_0"]["attention"]["o"]
    planted = quant.map_leaves(
        lambda path, leaf: dataclasses.replace(o, codes=o.codes.T, axis=-1) if path.endswith("/o") else leaf,
        kind.int8,
    )
    with pytest.raises(AssertionError):
        close(RUN(kind.step, planted), RUN(kind.step, arrays(kind.int8)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["experts"], indirect=True)
def test_adapters_train_over_frozen_int8_weights(kind):
    base, adapters = quant.detach(kind.both), quant.adapters(kind.both)
    assert jax.tree.structure(base) == jax.tree.structure(kind.int8)

    @jax.jit
    @jax.value_and_grad
    def loss(adapters, base):
        log_probabilities = jax.nn.log_softmax(logits(kind.step, quant.attach(base, adapters)))
        return -jnp.take_along_axis(log_probabilities[:, :-1], IDS[:, 1:, None], -1).mean()

    before, gradients = loss(adapters, base)
    assert all(np.any(g) for g in jax.tree.leaves(gradients))
    after, _ = loss(jax.tree.map(lambda w, g: w - 0.02 * np.asarray(g), adapters, gradients), base)
    assert after < before


@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_added_vocabulary(kind):
    """New rows of the table (and of an untied head): old ids give the old logits, new ids read the new rows."""
    step = Step(dataclasses.replace(kind.step.config, vocab_size=50))
    table = dense(kind.both["embedding"])
    grown = dict(kind.both, embedding=quant.ExtendedRows(kind.both["embedding"], table[[7, 8]]))
    if "head" in grown:
        grown["head"] = quant.ExtendedRows(grown["head"], dense(grown["head"])[:, [7, 8]], -1)
    expected = RUN(kind.step, kind.both, IDS.at[0, 3].set(8))
    got = RUN(step, grown, IDS.at[0, 3].set(49))  # row 49 is a copy of row 8
    close(got[..., :48], expected)
    close(got[..., 48:], expected[..., 7:9])
