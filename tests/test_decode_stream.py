"""Streaming is `generate` in pieces; log-probabilities are the model's own; no key is used twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import decode
from jaxinfer.decode import Config, DraftModel, keys
from jaxinfer.errors import InputError
from tests import toy

pytestmark = pytest.mark.smoke

V, ROOM = 7, 9
MODEL = toy.Attentive(V)
PARAMS, OTHER = MODEL.params(0), MODEL.params(1)
TOKENS, LENGTHS = toy.prompts(0, 3, 6, V, lengths=[6, 1, 4])
RUN = dict(config=Config(max_tokens=ROOM, temperature=0.8, eos=(5,), n=2), key=jax.random.key(3))
generate = jax.jit(decode.generate, static_argnames=("step", "config"))


@pytest.fixture(scope="module")
def whole():
    return generate(MODEL, PARAMS, TOKENS, LENGTHS, **RUN)


@pytest.mark.parametrize("every", [1, 3])
def test_pieces_add_up_to_the_whole(whole, every):
    pieces = [[] for _ in range(6)]
    for update in decode.stream(MODEL, PARAMS, TOKENS, LENGTHS, every=every, **RUN):
        for row, new in enumerate(update.tokens):
            pieces[row] += new.tolist()
        assert (update.result is not None) == update.done.all()
    assert pieces == toy.outputs(whole) == toy.outputs(update.result)
    np.testing.assert_array_equal(update.result.finish_reason, whole.finish_reason)
    assert {len(piece) for piece in pieces} != {ROOM}


def test_streaming_nothing():
    config = Config(max_tokens=0)
    updates = list(decode.stream(MODEL, PARAMS, TOKENS, LENGTHS, config=config, key=jax.random.key(0)))
    assert len(updates) == 1 and updates[0].done.all() and updates[0].result.tokens.shape == (3, 0)
    with pytest.raises(InputError, match="every"):
        next(decode.stream(MODEL, PARAMS, TOKENS, LENGTHS, every=0, **RUN))


def test_prompts_of_one_token():
    """Nothing to prefill: the same output as from a padded prompt."""
    run = dict(config=Config(max_tokens=3), key=jax.random.key(0))
    one = generate(MODEL, PARAMS, TOKENS[:, :1], jnp.ones(3, jnp.int32), **run)
    padded = generate(MODEL, PARAMS, TOKENS[:, :2], jnp.ones(3, jnp.int32), **run)
    assert toy.outputs(one) == toy.outputs(padded)


@pytest.mark.slow
def test_logprobs_are_the_models_own():
    """Of the chosen token and the likeliest three, under the raw logits of a fresh forward: no warp, no residual."""
    config = Config(
        max_tokens=ROOM, temperature=0.8, repetition_penalty=1.3, n=2, logprobs=3, drafter=DraftModel(MODEL, 2)
    )
    whole = generate(MODEL, PARAMS, TOKENS, LENGTHS, config=config, key=jax.random.key(3), draft_params=OTHER)
    chosen, ids, top = (np.asarray(x) for x in (whole.logprobs.chosen, whole.logprobs.top_ids, whole.logprobs.top))
    width = TOKENS.shape[1] + ROOM
    buffer, n = np.zeros((6, width), np.int32), np.repeat(np.asarray(LENGTHS), 2)
    for row, output in enumerate(toy.outputs(whole)):
        buffer[row, : n[row]] = TOKENS[row // 2, : n[row]]
        buffer[row, n[row] : n[row] + len(output)] = output
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), buffer.shape)
    law = jax.jit(lambda ids: MODEL.head(PARAMS, MODEL(PARAMS, ids, positions)[0].hidden))(jnp.asarray(buffer))
    law = np.asarray(jax.nn.log_softmax(law))
    for row, output in enumerate(toy.outputs(whole)):
        for i, token in enumerate(output):
            want = law[row, n[row] + i - 1]
            assert chosen[row, i] == pytest.approx(want[token], abs=1e-4)
            np.testing.assert_allclose(top[row, i], np.sort(want)[::-1][:3], atol=1e-4)
            np.testing.assert_allclose(want[ids[row, i]], top[row, i], atol=1e-4)


def test_no_key_is_used_twice(monkeypatch):
    """Every key that a uniform is drawn from, over all rows, steps, streams and slots, is a new one."""
    used, uniforms = [], keys.uniforms

    def record(key, n=None):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda data: used.extend(map(tuple, np.asarray(data).reshape(-1, 2).tolist())), data)
        return uniforms(key, n)

    monkeypatch.setattr(keys, "uniforms", record)
    model = toy.Markov(V)
    params, draft = model.params(0), model.params(1)
    run = toy.Run(model, Config(max_tokens=40, temperature=1.0, drafter=DraftModel(model, 2)))
    start = run.start(params, TOKENS, LENGTHS, draft_params=draft)
    state = run.advance(params, start, steps=6, draft_params=draft)
    jax.effects_barrier()
    assert len(used) == 6 * 3 * (2 + 2 + 1) == len(set(used))  # steps, rows, and draft, accept, next
    run.advance(params, state, steps=1, draft_params=draft)
    jax.effects_barrier()
    assert len(set(used)) == len(used)
    run.advance(params, start, steps=1, draft_params=draft)  # the same step again: the record sees a reuse
    jax.effects_barrier()
    assert len(used) - len(set(used)) == 3 * 5
