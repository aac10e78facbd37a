"""Lexical units: how they are cut, what each PAD sees and is trained on, and that a run resumes to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.quant.adapter import adapt, split
from jaxinfer.quant.lora import Lora
from jaxinfer.train import data, loop, lud
from jaxinfer.train.lm import token_losses

STEP = Step(ModelConfig(
    vocab_size=16, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, max_length=64,
    tie_embeddings=True,
))  # fmt: skip
UNITS = lud.Units(k=3, theta=0.5, examples=4, outside=0.5)
WORDS = np.concatenate([[0], np.tile(np.r_[2:10], 6), [0], np.tile(np.r_[9:1:-1], 6)]).astype(np.uint16)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), jax.jit(STEP.init)(jax.random.key(0))
    )


def packed(width=24, rows=2, at=40):
    """Two windows, the border of two documents in one of them."""
    return data.pack(np.stack([WORDS[at - i * 13 :][: width + 1] for i in range(rows)]))


def test_units_are_the_runs_of_sure_tokens_in_one_document():
    sure = np.array([[1, 1, 0, 1, 1, 1, 1]], bool)
    segments = np.array([[0, 0, 0, 0, 0, 1, 1]])
    assert lud.run_lengths(sure, segments).tolist() == [[2, 1, 0, 2, 1, 2, 1]]


@pytest.mark.parametrize("outside", [0.0, 0.5])
def test_every_pad_stands_for_a_later_token_of_its_text(outside):
    units = dataclasses.replace(UNITS, outside=outside)
    rng = np.random.default_rng(0)
    batch, seen = packed(), 0
    sure = rng.random(batch["ids"].shape) < 0.7
    full = lud.add_examples(batch, sure, units, np.random.default_rng(1))
    runs, length = lud.run_lengths(sure, batch["segments"]), batch["ids"].shape[1]
    for name in batch:
        assert (full[name][:, :length] == batch[name]).all()
    assert (full["weight"][:, :length] == 1).all() and (full["ids"][:, length:] == 1).all()
    for row in range(2):
        for n in range(length, full["ids"].shape[1]):
            if full["positions"][row, n] < 0:
                assert full["weight"][row, n] == 0
                continue
            place = (batch["segments"][row] == full["segments"][row, n]) & (
                batch["positions"][row] == full["limit"][row, n]
            )
            start, ahead = int(np.flatnonzero(place)[0]), int(full["positions"][row, n] - full["limit"][row, n])
            inside = ahead < runs[row, start]
            assert full["weight"][row, n] == (1.0 if inside else outside)
            assert not full["weight"][row, n] or full["targets"][row, n] == batch["targets"][row, start + ahead]
            seen += full["weight"][row, n] > 0
    assert seen > 6


@pytest.mark.slow
def test_examples_in_one_sequence_cost_what_they_cost_alone(params):
    batch = packed()
    full = lud.add_examples(batch, np.ones(batch["ids"].shape, bool), UNITS, np.random.default_rng(2))
    run = jax.jit(losses_of)
    together, length = np.asarray(run(params, full)), batch["ids"].shape[1]
    np.testing.assert_allclose(together[:, :length], token_losses(STEP, params, batch), atol=1e-5)
    wrong = np.asarray(jax.jit(sees_other_examples)(params, full))  # the planted bug
    assert np.abs(wrong - together)[:, length:].max() > 1e-3
    for row in range(2):
        for group in range(1, UNITS.examples + 1):
            where = np.flatnonzero(full["group"][row] == group)
            limit, segment = full["limit"][row, where[0]], full["segments"][row, where[0]]
            text = (batch["segments"][row] == segment) & (batch["positions"][row] <= limit)
            ids = np.concatenate([batch["ids"][row, text], np.full(UNITS.k - 1, UNITS.pad)])
            first = batch["positions"][row, text][0]
            fed = np.pad(ids, (0, 32 - len(ids)))[None].astype(np.int32)
            place = np.arange(32)[None] + first
            logp = np.asarray(laws(params, fed, np.where(np.arange(32)[None] < len(ids), place, -1)))[0]
            alone = -logp[np.arange(len(ids) - UNITS.k + 1, len(ids)), full["targets"][row, where]]
            np.testing.assert_allclose(together[row, where], alone, atol=1e-4)


@jax.jit
def laws(params, ids, positions):
    output, _ = STEP(params, ids, positions)
    return jax.nn.log_softmax(STEP.head(params, output.hidden))


def losses_of(params, full, mask=None):
    output, _ = STEP(params, full["ids"], full["positions"], mask=lud.visibility(full) if mask is None else mask)
    logp = jax.nn.log_softmax(STEP.head(params, output.hidden))
    return -jnp.take_along_axis(logp, full["targets"][..., None], 2)[..., 0]


def sees_other_examples(params, full):
    seen = full["positions"][:, None, :] <= full["positions"][:, :, None]
    return losses_of(params, full, lud.visibility(full) | (seen & (full["group"] > 0)[:, None, :]))


def recipe(params, frozen=None):
    stream = data.Stream(WORDS, WORDS, (data.Stage(0, 2, 24),), seed=0)
    return loop.Recipe(
        objective=lud.PadTokens(STEP), data=lud.LexicalUnits(stream, STEP, params, UNITS, seed=3),
        optimizer=optax.adam(1e-2), frozen=frozen, identity={"name": "lud"},
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_learns_and_resumes_to_the_bit(params, tmp_path):
    start, frozen = split(adapt(params, [(r"layers_.*(attention|mlp).*", Lora(rank=2))], jax.random.key(2)))
    which = recipe(params, frozen)
    begin = lambda: loop.init_state(jax.tree.map(jnp.array, start), which, jax.random.key(1))  # noqa: E731
    config = loop.LoopConfig(steps=24, curve=False)
    whole = loop.train(which, begin(), config, tmp_path / "whole")
    loop.train(which, begin(), loop.LoopConfig(steps=9, curve=False), tmp_path / "cut")
    resumed = loop.train(which, begin(), config, tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    full, objective = which.data(3), jax.jit(lud.PadTokens(STEP))
    before, told = objective(start, full, None, frozen)
    after, learned = objective(whole.params, full, None, frozen)
    assert float(after) < 0.8 * float(before) and float(learned["pads"]) < float(told["pads"])
    assert float(told["weight"]) == pytest.approx(full["weight"].sum())
    assert float(objective(params, full, None)[0]) == pytest.approx(float(before), rel=1e-5)  # a whole model


def test_settings_are_refused():
    for given, message in (({"k": 1}, "k: got 1"), ({"theta": 2.0}, "theta"), ({"outside": -1.0}, "outside")):
        with pytest.raises(ConfigError, match=message):
            lud.Units(**given)
