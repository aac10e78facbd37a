"""Draft heads: their folders, and training them on a frozen target through the one loop."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import CheckpointError, ConfigError, InputError
from jaxinfer.models.heads import HEADS, TargetShape, head_class, load_head, save_head
from jaxinfer.models.heads.chimera import ChimeraHead
from jaxinfer.models.heads.eagle import EagleHead
from jaxinfer.models.heads.medusa import MedusaHead
from jaxinfer.train import heads as recipes
from jaxinfer.train import loop, metrics
from jaxinfer.train.data import Stage, Stream
from tests import head_checks as small

KINDS = {
    "medusa": MedusaHead(small.SHAPE, heads=2),
    "eagle": EagleHead(small.SHAPE, num_heads=2, num_kv_heads=1, mlp_size=8),
    "chimera": ChimeraHead(small.SHAPE, num_heads=2, mlp_size=8),
}
RATES = {"medusa": 0.2, "eagle": 1e-2, "chimera": 1e-2}
LOSSES = recipes.Losses(distill=0.5, rounds=2)


def stream():
    rng = np.random.default_rng(0)
    tokens = np.concatenate([[0], np.tile(rng.integers(1, small.V, 40), 30)]).astype(np.uint16)
    return Stream(tokens, tokens, (Stage(0, 4, 32),), seed=0)


def recipe(kind, steps=24):
    data = stream()
    return recipes.recipe(
        small.STEP, small.PARAMS, KINDS[kind], data, steps=steps, rate=RATES[kind], losses=LOSSES, held_out=data(1000)
    )


def run(kind, folder, steps, total=24):
    which = recipe(kind, total)
    state = recipes.init_state(small.STEP, small.PARAMS, KINDS[kind], which, jax.random.key(0))
    return loop.train(which, state, loop.LoopConfig(steps=steps, save_every=10, curve=False), folder)


def losses_of(folder):
    return {row["step"]: row["loss"] for row in metrics.read(folder / "metrics.jsonl") if "loss" in row}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_a_resumed_run_has_the_same_losses(kind, tmp_path):
    whole = run(kind, tmp_path / "whole", 24)
    first = losses_of(tmp_path / "whole")
    assert np.mean([first[i] for i in range(20, 25)]) < 0.9 * first[1]
    run(kind, tmp_path / "parts", 10)
    parts = run(kind, tmp_path / "parts", 24)
    assert losses_of(tmp_path / "parts") == first
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)


def test_a_resumed_run_of_other_settings_is_refused(tmp_path):
    run("medusa", tmp_path, 10)
    wider = dataclasses.replace(KINDS["medusa"], heads=3)
    which = recipes.recipe(small.STEP, small.PARAMS, wider, stream(), steps=24, losses=LOSSES)
    state = recipes.init_state(small.STEP, small.PARAMS, wider, which, jax.random.key(0))
    with pytest.raises(ConfigError, match="settings"):
        loop.train(which, state, loop.LoopConfig(steps=24, curve=False), tmp_path)


@pytest.mark.slow
def test_a_guess_is_compared_with_the_place_it_is_about():
    """The target's own logits, moved, are a perfect guess one further ahead; unmoved they are not (planted bug)."""
    batch = stream()(0)
    seen = recipes.look(small.STEP, small.PARAMS, batch)
    perfect, metrics_ = recipes.guesses([(recipes.shifted(seen.logits, 1), 1)], seen, recipes.Losses(distill=1.0))
    assert float(perfect) < 1e-5 and float(metrics_["agree_1"]) == 1
    unmoved, _ = recipes.guesses([(seen.logits, 1)], seen, recipes.Losses(distill=1.0))
    assert float(unmoved) > 0.1


def test_smooth_l1_and_kl():
    np.testing.assert_allclose(recipes.smooth_l1(jnp.array([0.0, 3.0]), jnp.array([0.5, 0.0])), (0.125 + 2.5) / 2)
    teacher, mine = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    want = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    np.testing.assert_allclose(recipes.token_loss(mine, jnp.array(0), teacher, 1.0), want, rtol=1e-5)
    np.testing.assert_allclose(recipes.token_loss(mine, jnp.array(0), teacher, 0.0), -np.log(0.9), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_head_back(kind, tmp_path):
    head = KINDS[kind]
    params = small.random_head(head)
    save_head(tmp_path, head, params, small.PARAMS, dtype="float32")
    found = load_head(tmp_path)
    assert found.head == head
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    found.check(small.STEP.config, small.PARAMS)
    save_head(tmp_path, head, params, small.PARAMS)
    np.testing.assert_allclose(
        *map(lambda tree: jax.tree.leaves(tree)[0], (load_head(tmp_path).params, params)), rtol=1e-2
    )


def test_a_head_of_another_target_is_refused(tmp_path):
    head = KINDS["medusa"]
    save_head(tmp_path, head, head.init(jax.random.key(0)), small.PARAMS)
    found, config = load_head(tmp_path), small.STEP.config
    with pytest.raises(ConfigError, match="vocab_size 7, this one has 9"):
        found.check(dataclasses.replace(config, vocab_size=9))
    with pytest.raises(ConfigError, match="hidden_size 16, this one has 32"):
        found.check(dataclasses.replace(config, hidden_size=32))
    other = {**small.PARAMS, "embedding": small.PARAMS["embedding"] + 1}
    with pytest.raises(ConfigError, match="trained on another target"):
        found.check(config, other)
    deep = dataclasses.replace(KINDS["eagle"], layers=(0, 5))
    with pytest.raises(ConfigError, match="reads layers"):
        dataclasses.replace(found, head=deep).check(config)


def test_a_damaged_folder_is_told(tmp_path):
    head = KINDS["medusa"]
    save_head(tmp_path, head, head.init(jax.random.key(0)), small.PARAMS)
    record = json.loads((tmp_path / "heads.json").read_text())
    for change, error, text in (
        ({"kind": "hydra"}, ConfigError, "kind of head: got 'hydra'"),
        ({"settings": {"heads": 3}}, CheckpointError, "head_2"),
        ({"settings": {"tails": 3}}, CheckpointError, "settings do not fit"),
        ({"target": {}}, CheckpointError, "not the description"),
    ):
        (tmp_path / "heads.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(error, match=text):
            load_head(tmp_path)
    with pytest.raises(InputError, match="head_1"):
        save_head(tmp_path, head, {"head_0": head.init(jax.random.key(0))["head_0"]}, small.PARAMS)


def test_the_registry_holds_heads():
    for kind in HEADS:
        assert head_class(kind).kind == kind
    with pytest.raises(ConfigError, match="is for a target of"):
        recipes.recipe(small.STEP, small.PARAMS, MedusaHead(TargetShape(8, 7)), stream(), steps=24)
