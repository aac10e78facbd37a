"""The PPD recipe: what the objective compares, that training helps, and acceptance against decoding's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import decode
from jaxinfer.decode.language_model import drafter_class
from jaxinfer.errors import InputError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.heads import TargetShape, load_head, save_head
from jaxinfer.models.heads.ppd import PPDHead
from jaxinfer.train import data, heads, loop, ppd

V, LENGTH = 12, 24
STEP = Step(
    ModelConfig(
        vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32,
        max_length=64, tie_embeddings=True, position="learned",
    )
)  # fmt: skip
HEAD = PPDHead(TargetShape.of(STEP.config), prompts=2, copies=2)
PARAMS = jax.jit(lambda key: jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, STEP.init(key)))(jax.random.key(0))


def batch(seed=0, rows=3):
    """Windows in which documents end here and there (token 0)."""
    windows = np.random.default_rng(seed).integers(0, V, (rows, LENGTH + 1))
    windows[:, 0] = 0
    return data.pack(windows)


def own(seed=1):
    return HEAD.init(jax.random.key(seed), heads.output_matrix(STEP, PARAMS))


@jax.jit
def guesses(params, found, points):
    return HEAD.guesses(params, STEP, PARAMS, found, points)


@jax.jit
def target_logits(found):
    """Of the text alone: hidden states, and the logits after each place."""
    seen = heads.look(STEP, PARAMS, found)
    return seen.hidden, seen.logits


@jax.jit
def one_chain(text, start, point, prompts):
    """Logits f32[copies, 2, V] of the prompt tokens after `text[start : point + 1]`, one copy at a time and alone."""
    index = jnp.arange(text.shape[0])
    positions = jnp.where((index >= start) & (index <= point), index - start, -1)[None]
    ahead = (point - start + 1 + jnp.arange(HEAD.prompts))[None]
    found = []
    for copy in range(HEAD.copies):
        inputs = jnp.concatenate([STEP.embed(PARAMS, text[None]), prompts[None, :, copy]], 1)
        output, _ = STEP(PARAMS, inputs, jnp.concatenate([positions, ahead], 1))
        found.append(STEP.head(PARAMS, output.hidden[0, -HEAD.prompts :]))
    return jnp.stack(found)


def test_many_points_in_one_forward_equal_each_alone():
    found, params = batch(), own()
    points = np.array([[2, 9, 12, 15, 17, 20], [5, 6, 8, 9, 13, 16], [0, 2, 7, 11, 19, 21]], np.int32)
    logits, hidden = guesses(params, found, points)
    np.testing.assert_allclose(hidden, target_logits(found)[0], atol=1e-5)  # no prompt token changes the text
    for row, at in np.ndindex(3, 6):
        point = points[row, at]
        start = point - found["positions"][row, point]  # a document's own text alone is seen
        alone = one_chain(found["ids"][row], start, point, params["prompts"])
        np.testing.assert_allclose(logits[row, at], alone.mean(0), atol=1e-4)
        assert np.abs(alone[0] - alone[1]).max() > 0.01  # copies differ


def test_the_loss_is_the_divergence_from_the_target_one_and_two_tokens_on():
    found, params, key = batch(), own(), jax.random.key(3)
    loss, metrics = jax.jit(heads.HeadObjective(STEP, HEAD))(params, found, key, PARAMS)
    points = np.asarray(ppd.choose_points(found["ids"].shape, HEAD.prompts, key))
    assert all(len(set(row)) == LENGTH // ppd.EVERY for row in points) and points.max() < LENGTH - HEAD.prompts
    law = np.asarray(jax.nn.log_softmax(target_logits(found)[1]))
    guessed = np.asarray(jax.nn.log_softmax(guesses(params, found, points)[0]))
    total = weights = 0.0
    for row, i, d in np.ndindex(*points.shape, HEAD.prompts):
        place = points[row, i] + d + 1
        if found["segments"][row, place] == found["segments"][row, points[row, i]]:
            p, q = law[row, place], guessed[row, i, d]
            total += 0.8**d * (np.exp(p) * (p - q)).sum()
            weights += 0.8**d
    np.testing.assert_allclose(loss, total / weights, rtol=1e-4)
    assert set(metrics) == {"agree_1", "agree_2", "weight"}


@pytest.mark.slow
def test_training_moves_prompt_tokens_alone_and_helps(tmp_path):
    recipe = heads.recipe(STEP, PARAMS, HEAD, batch, steps=60, rate=3e-2, held_out=batch(1000, rows=16))
    state = heads.init_state(STEP, PARAMS, HEAD, recipe, jax.random.key(0))
    assert recipe.evaluate is not None
    before = recipe.evaluate(state.params)["loss"]
    state = loop.train(recipe, state, loop.LoopConfig(steps=60, log_every=60, curve=False), tmp_path)
    assert jax.tree.map(jnp.shape, state.params) == {"prompts": (2, 2, 16)}
    assert recipe.evaluate(state.params)["loss"] < 0.8 * before


@pytest.mark.slow
def test_acceptance_is_that_of_the_targets_own_continuation():
    documents = [np.random.default_rng(i).integers(1, V, 30) for i in range(4)]
    prompts = ppd.prompts_of(documents, count=4, length=8)
    hits = np.asarray(ppd._hits(STEP, PARAMS, HEAD, own(), jnp.asarray(prompts), tokens=20, ranks=5))
    table = ppd.measure_acceptance(STEP, PARAMS, HEAD, own(), prompts, tokens=20, ranks=5, batch=4)
    np.testing.assert_allclose(table, hits.mean((0, 1)), atol=1e-5)
    config = decode.Config(max_tokens=20, eos=())
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    out = generate(STEP, PARAMS, jnp.asarray(prompts), jnp.full(4, 8), config=config, key=jax.random.key(0))
    right = shifted = 0
    for row, at in np.ndindex(4, 18):
        text = np.concatenate([prompts[row], out.tokens[row]])
        likely = np.asarray(jax.lax.top_k(one_chain(text, 0, 7 + at, own()["prompts"]).mean(0), 5)[1])
        right += (hits[row, at] == (likely == text[9 + at : 11 + at, None])).all()
        shifted += (hits[row, at] == (likely == text[8 + at : 10 + at, None])).all()
    assert right == 72
    assert shifted < 66  # planted: guesses held against the token before


def test_a_measured_head_is_saved_and_drafts(tmp_path, monkeypatch):
    table = ((0.5, 0.2, 0.1), (0.3, 0.2, 0.1))
    monkeypatch.setattr(ppd, "measure_acceptance", lambda *arguments: table)
    head: Any = heads.measured(STEP, PARAMS, HEAD, own(), [np.arange(12)])
    assert head == PPDHead(HEAD.target, HEAD.prompts, HEAD.copies, table)
    save_head(tmp_path, head, own(), PARAMS, dtype="float32")
    again: Any = load_head(tmp_path)
    assert again.head == head and hash(again.head) == hash(head)
    drafter = drafter_class(again.head)(head=again.head, target=STEP)
    assert drafter == decode.PPD(head, STEP) and drafter.bind(again.params, PARAMS) is again.params
    np.testing.assert_array_equal(again.params["prompts"], own()["prompts"])


def test_rows_without_room_are_refused():
    with pytest.raises(InputError, match="rows of 2 tokens have no room for 2 prompt tokens"):
        ppd.choose_points((1, 2), 2, jax.random.key(0))
