"""FiRST's two phases: routers learn which layers can be spared, adapters what is lost; runs resume to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.decode.first import First, _apply, open_routers
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.ops.attention import Segments
from jaxinfer.quant.adapter import adapt, split
from jaxinfer.quant.lora import Lora
from jaxinfer.train import data, first, lm, loop

LAYERS = 2
STEP = Step(ModelConfig(
    vocab_size=16, hidden_size=16, num_layers=LAYERS, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24,
    max_length=64, tie_embeddings=True,
))  # fmt: skip
WORDS = np.concatenate([np.tile(np.r_[2:10], 12), np.tile(np.r_[9:1:-1], 12)]).astype(np.uint16)
DATA = first.Prompted(data.Stream(WORDS, WORDS, (data.Stage(0, 4, 16),), seed=0), seed=3)


@pytest.fixture(scope="module")
def params():
    """A model that was not trained: a layer is not worth a nat."""
    rng = np.random.default_rng(1)
    params = jax.jit(STEP.init)(jax.random.key(0))
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), params)


def trained(recipe, start, folder, steps, cut=None):
    """The state after `steps`; with `cut`, of a run stopped there and begun again."""
    begin = lambda: loop.init_state(jax.tree.map(jnp.array, start), recipe, jax.random.key(1))  # noqa: E731
    if cut:
        loop.train(recipe, begin(), loop.LoopConfig(steps=cut, curve=False), folder)
    return loop.train(recipe, begin(), loop.LoopConfig(steps=steps, curve=False), folder)


@pytest.mark.slow
def test_routers_learn_what_can_be_spared_and_resume_to_the_bit(params, tmp_path):
    recipe = loop.Recipe(
        objective=first.Routers(STEP, penalty=1.0), data=DATA, optimizer=optax.adam(0.2), frozen=params,
        identity={"name": "first"},
    )  # fmt: skip
    start = open_routers(STEP.config)
    whole = trained(recipe, start, tmp_path / "whole", 20)
    resumed = trained(recipe, start, tmp_path / "cut", 20, cut=8)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    objective = jax.jit(recipe.objective)
    before, all_layers = objective(start, DATA(7), None, params)
    after, fewer = objective(whole.params, DATA(7), None, params)
    assert float(all_layers["layers"]) == LAYERS and float(fewer["layers"]) < LAYERS
    assert float(after) < float(before)
    # What was trained is what a decoder decides.
    batch = DATA(7)
    rho = jax.jit(First(STEP).route)({**params, "first": whole.params}, batch["ids"], batch["prompt"])
    assert float((rho >= 0.5).sum(1).mean()) == float(fewer["layers"])


@pytest.mark.slow
def test_adapters_make_up_for_a_skipped_layer(params, tmp_path):
    shut = {"router": jnp.zeros((LAYERS, 16)), "bias": jnp.array([1.0, -1.0])}
    start, frozen = split(adapt({**params, "first": shut}, [(r"layers_.*", Lora(rank=2))], jax.random.key(2)))
    recipe = loop.Recipe(
        objective=first.Adapted(STEP), data=DATA, optimizer=optax.adam(1e-2), frozen=frozen, identity={"name": "lora"}
    )
    state = trained(recipe, start, tmp_path, 30)
    before, _ = (objective := jax.jit(recipe.objective))(start, DATA(3), None, frozen)
    after, told = objective(state.params, DATA(3), None, frozen)
    assert float(after) < 0.8 * float(before) and float(told["layers"]) == 1
    skipped, run = state.params["layers_1"], state.params["layers_0"]
    assert not any(np.asarray(leaf["b"]).any() for leaf in jax.tree.leaves(skipped, is_leaf=lambda x: "b" in x))
    assert all(np.asarray(leaf["b"]).any() for leaf in jax.tree.leaves(run, is_leaf=lambda x: "b" in x))


def loss_at(params, rho, *, mixture=False):
    """The loss at soft decisions rho f[L], of the working form or (planted) of the one that the paper prints."""
    batch = {name: jnp.asarray(x) for name, x in DATA(1).items()}

    def around(i, run, x, positions, block):
        y, block, note = run(x, positions, block=block)
        return (rho[i] * y + (1 - rho[i]) * y if mixture else x + rho[i] * (y - x)), block, note

    mask = Segments(batch["segments"])
    output, _ = _apply(STEP, params, batch["ids"], batch["positions"], None, None, 0, mask, (), around)
    losses = lm.next_token_losses(STEP, params, output.hidden, batch["targets"])
    index = jnp.arange(losses.shape[1])[None]
    scored = index >= batch["prompt"][:, None] - 1
    return (losses * scored).sum() / scored.sum()


def test_the_gradient_of_rho_is_that_of_the_working_form(params):
    """Straight through: at open gates the gradient is that of h + rho f(h) at rho = 1."""
    batch = DATA(1)

    def hard(bias):
        routers = {"router": jnp.zeros((LAYERS, 16)), "bias": bias}
        return first.answer_loss(STEP, {**params, "first": routers}, batch)[0]

    bias = jnp.array([0.5, 1.5])
    slope = jax.nn.sigmoid(bias) * (1 - jax.nn.sigmoid(bias))
    got = jax.jit(jax.grad(hard))(bias)
    want = jax.jit(jax.grad(lambda rho: loss_at(params, rho)))(jnp.ones(LAYERS)) * slope
    np.testing.assert_allclose(got, want, rtol=1e-4)
    printed = jax.jit(jax.grad(lambda rho: loss_at(params, rho, mixture=True)))(jnp.ones(LAYERS))
    np.testing.assert_allclose(printed, 0, atol=1e-6)  # the equation as printed trains nothing


def test_only_answers_are_scored_and_prompts_are_functions_of_the_step(params):
    batch = DATA(5)
    assert all((batch[name] == DATA(5)[name]).all() for name in batch)
    assert (batch["prompt"] >= 2).all() and (batch["prompt"] <= 8).all()
    score = jax.jit(lambda batch: first.answer_loss(STEP, params, batch, jnp.ones((4, LAYERS)))[:2])
    loss, count = score(batch)
    assert int(count) == (16 - batch["prompt"] + 1).sum()
    other = {**batch, "targets": np.where(np.arange(16) < batch["prompt"][:, None] - 1, 3, batch["targets"])}
    assert float(score(other)[0]) == float(loss)


def test_settings_are_refused():
    with pytest.raises(ConfigError, match="low, high"):
        first.Prompted(DATA.stream, low=0.6, high=0.5)
    with pytest.raises(ConfigError, match="penalty"):
        first.Routers(STEP, penalty=-1.0)
