"""SpecVLM's objective: the two losses with their weights, its optimiser, and which heads it accepts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.cli import main
from jaxinfer.errors import ConfigError
from jaxinfer.models.heads.eagle import EagleHead
from jaxinfer.models.heads.medusa import MedusaHead
from jaxinfer.train import heads, loop, specvlm
from jaxinfer.train.data import Stage, Stream
from tests import head_checks as small

HEAD = EagleHead(small.SHAPE, num_heads=2, num_kv_heads=1, mlp_size=8)


def stream():
    tokens = np.concatenate([[0], np.tile(np.random.default_rng(0).integers(1, small.V, 40), 30)]).astype(np.uint16)
    return Stream(tokens, tokens, (Stage(0, 2, 16),), seed=0)


@pytest.fixture(scope="module")
def made():
    """A batch's loss and metrics; the head's features and the target's, their logits, and where they count."""
    batch, params = stream()(0), small.random_head(HEAD)

    @jax.jit
    def run(params, batch):
        seen = heads.look(small.STEP, small.PARAMS, batch)
        (mine,) = heads.eagle_rounds(small.STEP, HEAD, params, seen, 1)
        theirs = jnp.roll(seen.hidden, -1, 1)
        logits = [small.STEP.head(small.PARAMS, x)[:, :-1] for x in (mine, theirs)]
        found = heads.HeadObjective(small.STEP, HEAD, specvlm.LOSSES)(params, batch, None, small.PARAMS)
        return *found, mine[:, :-1], theirs[:, :-1], *logits

    return *run(params, batch), batch["segments"][:, 1:] == batch["segments"][:, :-1]


def test_the_loss_is_a_tenth_of_the_laws_divergence_and_smooth_l1_of_features(made):
    loss, told, mine, theirs, logits, teacher, where = made
    p, q = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (teacher, logits))
    divergence = (np.exp(p) * (p - q)).sum(-1)[where].mean()
    distance = np.abs(np.asarray(mine - theirs, np.float64))
    smooth = np.where(distance < 1, distance**2 / 2, distance - 0.5).mean(-1)[where].mean()
    np.testing.assert_allclose(loss, 0.1 * divergence + smooth, rtol=1e-4)
    assert abs(float(loss) - (divergence + smooth)) > 1e-2  # the planted bug: equal weights
    assert set(told) == {"agree_1", "weight"}


def test_the_optimiser_and_the_rate_are_the_papers():
    params = {"w": jnp.ones((2, 2))}
    found, theirs = specvlm.adamw(optax.constant_schedule(8e-5)), optax.adamw(8e-5, b1=0.9, b2=0.95, weight_decay=0.0)
    updates = [o.update(params, o.init(params), params)[0] for o in (found, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *updates)
    which = specvlm.recipe(small.STEP, small.PARAMS, HEAD, stream(), steps=4)
    assert which.schedule is not None and float(which.schedule(0)) == float(which.schedule(3)) == np.float32(8e-5)
    assert which.identity["losses"]["logits"] == 0.1 and which.identity["objective"] == "specvlm"


def test_heads_that_predict_no_last_features_are_refused():
    for head, said in (
        (MedusaHead(small.SHAPE, heads=2), "got a medusa head"),
        (EagleHead(small.SHAPE, num_heads=2, num_kv_heads=1, mlp_size=8, layers=(0,)), "got an EAGLE head of inner"),
    ):
        with pytest.raises(ConfigError, match=said):
            specvlm.recipe(small.STEP, small.PARAMS, head, stream(), steps=4)
    with pytest.raises(ConfigError, match="logits: got -1"):
        heads.Losses(logits=-1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--objective", "vlm"], "--objective: got 'vlm'; accepted: own, specvlm"),
        (["--objective", "specvlm", "--features", "2"], "got weights with --objective specvlm"),
    ],
)
def test_wrong_options_are_told(capsys, tmp_path, more, said):
    assert main(["train", "heads", "--kind", "eagle", "--output", str(tmp_path), *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_training_brings_the_head_nearer(tmp_path):
    data = stream()
    which = specvlm.recipe(small.STEP, small.PARAMS, HEAD, data, steps=30, rate=1e-2, held_out=data(1000))
    begun = heads.init_state(small.STEP, small.PARAMS, HEAD, which, jax.random.key(0))
    assert which.evaluate is not None
    before = which.evaluate(begun.params)
    ended = loop.train(which, begun, loop.LoopConfig(steps=30, curve=False), tmp_path)
    assert which.evaluate(ended.params)["loss"] < 0.7 * before["loss"]
