"""The law of the next token: keys, draws, filters and the warp, against plain numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Features, Sampling, keys
from jaxinfer.decode.draw import draw, first_max, pick
from jaxinfer.decode.filters import largest_count, nucleus
from jaxinfer.decode.sampling import History, Warp
from jaxinfer.decode.types import Sequence, Slots
from jaxinfer.errors import InputError
from tests import toy

V = 11


def test_keys_are_all_different():
    """Row, sample, length, stream and slot each change the key, and no two combinations share one."""
    rows, samples = np.array(list(itertools.product(range(4), range(3)))).T

    @jax.jit
    def all_keys(key):
        row = keys.row_keys(key, jnp.asarray(rows), jnp.asarray(samples))
        steps = [keys.step_keys(row, jnp.full(12, length)) for length in range(5)]
        streams = [keys.stream(step, which) for step in steps for which in keys.Stream]
        return jnp.stack([jax.random.key_data(x) for s in streams for x in (keys.slots(s, 3).reshape(-1), s)][::2])

    data = np.asarray(all_keys(jax.random.key(0))).reshape(-1, 2)
    assert len(np.unique(data, axis=0)) == len(data) == 12 * 5 * 4 * 3


def test_slot_and_slots_agree():
    key = keys.row_keys(jax.random.key(1), jnp.arange(3))
    many = jax.random.key_data(keys.slots(key, 4))
    for i in range(4):
        np.testing.assert_array_equal(many[:, i], jax.random.key_data(keys.slot(key, i)))


@pytest.mark.parametrize("u", [0.0, 1e-30, 0.5, 1 - 2**-24])
def test_pick_never_takes_a_weight_of_zero(u):
    rng = np.random.default_rng(0)
    weights = rng.random((200, 37)).astype(np.float32) ** 8
    weights[rng.random(weights.shape) < 0.6] = 0
    weights[:, 36] = 0
    weights[0], weights[1] = 0, 0
    weights[0, 5], weights[1, 36] = 1e-30, 1e30
    index = np.asarray(pick(jnp.asarray(weights), jnp.full(200, u)))
    assert (weights[np.arange(200), index] > 0).all()


@pytest.mark.parametrize("vocab", [1, 2, 5, 1000])
def test_draw_follows_its_weights(vocab):
    weights = np.random.default_rng(vocab).random(vocab).astype(np.float32) ** 4
    weights[vocab // 2 :: 7] = 0
    weights[0] = 1
    key = keys.row_keys(jax.random.key(0), jnp.arange(20_000))
    tokens = np.asarray(jax.jit(draw)(jnp.broadcast_to(weights, (20_000, vocab)), key))
    law = {(i,): float(w) for i, w in enumerate(np.float64(weights) / np.float64(weights).sum())}
    assert abs(toy.chi_square(tokens[:, None], law)[0]) < 4


def test_first_max_takes_the_lowest_of_equals():
    x = jnp.array([[1.0, 3, 3, 2], [-jnp.inf, -jnp.inf, -5, -5]])
    np.testing.assert_array_equal(first_max(x)[1], [1, 2])


def test_filters_equal_sorting():
    """Top-k and top-p against a sort, with ties, -inf, and every k and p."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1, V)).astype(np.float32) * 3
    x[20:40] = np.round(x[20:40])
    x[40:, :, ::3] = -np.inf
    x -= x.max(-1, keepdims=True)
    k = rng.integers(0, V + 3, (60, 1)).astype(np.int32)
    p = rng.choice([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], (60, 1)).astype(np.float32)
    by_k = np.asarray(largest_count(jnp.asarray(x), jnp.asarray(k)))
    by_p = np.asarray(nucleus(jnp.asarray(x), jnp.asarray(p)))
    for row in range(60):
        kept = toy.law_of(x[row, 0], top_k=int(k[row, 0])) > 0
        np.testing.assert_array_equal(by_k[row, 0] > -np.inf, kept)
        kept = toy.law_of(x[row, 0], top_p=float(p[row, 0])) > 0
        np.testing.assert_array_equal(by_p[row, 0] > -np.inf, kept & (x[row, 0] > -np.inf))


def test_nucleus_keeps_the_token_that_crosses():
    x = jnp.log(jnp.array([[[0.5, 0.3, 0.2]]]))
    x = x - x.max()
    kept = [int((nucleus(x, jnp.full((1, 1), p)) > -jnp.inf).sum()) for p in (0.4, 0.6, 0.79, 0.81, 1.0)]
    assert kept == [1, 2, 2, 3, 3]


def reference(logits, history, prompt, index, s, eos):
    """Bias, penalties, minimum length and forced tokens on one slot's logits, a token at a time."""
    x = np.array(logits, np.float64)
    for i, value in zip(s["bias_ids"], s["bias_values"], strict=True):
        if i >= 0:
            x[i] += value
    for token in set(prompt) | set(history):
        x[token] = x[token] / s["repetition_penalty"] if x[token] > 0 else x[token] * s["repetition_penalty"]
    for token in set(history):
        x[token] -= s["presence_penalty"] + s["frequency_penalty"] * history.count(token)
    if index < s["min_tokens"]:
        x[[e for e in eos if e >= 0]] = -np.inf
    if index < len(s["forced"]) and s["forced"][index] >= 0:
        keep = s["forced"][index]
        x[:] = -np.inf
        x[keep] = 0
    return x


def warp_case(rows=48, drafts=3):
    """Random rows, each with its own parameters, history and drafts."""
    rng = np.random.default_rng(3)
    sampling = dict(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7], rows), top_k=rng.integers(0, 6, rows),
        top_p=rng.choice([0.5, 0.8, 1.0], rows), min_p=rng.choice([0.0, 0.05, 0.3], rows),
        repetition_penalty=rng.choice([0.7, 1.0, 1.6], rows), presence_penalty=rng.choice([-0.5, 0.0, 0.8], rows),
        frequency_penalty=rng.choice([0.0, 0.4], rows), min_tokens=rng.integers(0, 5, rows),
        bias_ids=rng.choice([-1, 0, 3, 9], (rows, 2)), bias_values=rng.choice([-np.inf, 1.5, -2.0], (rows, 2)),
        forced=rng.choice([-1, -1, -1, 2], (rows, 4)), eos=rng.choice([-1, 4, 7], (rows, 2)),
    )  # fmt: skip
    prompt_length = rng.integers(1, 5, rows)
    length = prompt_length + rng.integers(0, 5, rows)
    tokens = rng.integers(0, V, (rows, 12))
    logits = rng.normal(size=(rows, drafts + 1, V)).astype(np.float32) * 2
    return sampling, tokens, prompt_length, length, rng.integers(0, V, (rows, drafts)), logits


def test_warp_equals_plain_numpy():
    """Every feature at once, per row and per slot, drafts on the slot's own path counted and no others."""
    parameters, tokens, prompt_length, length, drafts, logits = warp_case()
    rows, slots = logits.shape[:2]
    sampling = Sampling.make(rows, **parameters)
    i32 = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    zeros = jnp.zeros(rows, jnp.int32)
    seq = Sequence(i32(tokens), i32(length), i32(prompt_length), zeros, zeros > 0, zeros, zeros)
    parent = [0, 0, 1]  # drafts 1 and 2 are siblings, draft 3 a child of draft 1
    paths = [[], [0], [1], [0, 2]]
    depth = jnp.asarray([[len(path) for path in paths]], jnp.int32)
    ancestors = jnp.asarray([[[j in path for j in range(3)] for path in paths]])
    assert [len(paths[p]) + 1 for p in parent] == [len(path) for path in paths[1:]]

    @jax.jit
    def run(logits, sampling, seq, drafts):
        warp = Warp(sampling, Features.everything(), seq, History.of(seq, V))
        places = Slots(depth, drafts, ancestors)
        return warp.scores(logits, places), warp(logits, places)

    scores, law = map(np.asarray, run(jnp.asarray(logits), sampling, seq, i32(drafts)))
    for row in range(rows):
        s = {name: np.asarray(value)[row] for name, value in parameters.items()}
        prompt = list(tokens[row, : prompt_length[row]])
        for slot in range(slots):
            path = [drafts[row, j] for j in paths[slot]]
            history = [*tokens[row, prompt_length[row] : length[row]], *path]
            want = reference(logits[row, slot], history, prompt, len(history), s, s["eos"])
            if not np.isfinite(want.max()):
                assert np.isnan(law[row, slot]).any()
                continue
            np.testing.assert_allclose(scores[row, slot], want, rtol=1e-5, atol=1e-5)
            filters = {name: s[name] for name in ("temperature", "top_k", "top_p", "min_p")}
            np.testing.assert_allclose(np.exp(law[row, slot]), toy.law_of(want, **filters), rtol=2e-4, atol=1e-6)


def test_one_rows_nan_stays_its_own():
    rows = 3
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 1, V)), jnp.float32)
    sampling = Sampling.make(rows, temperature=1.0, top_k=3, top_p=0.9, min_p=0.1)
    zeros = jnp.zeros(rows, jnp.int32)
    seq = Sequence(jnp.zeros((rows, 4), jnp.int32), zeros + 1, zeros + 1, zeros, zeros > 0, zeros, zeros)
    features = Features(sample=True, top_k=True, top_p=True, min_p=True)
    root = Slots(jnp.zeros((1, 1), jnp.int32), jnp.zeros((rows, 0), jnp.int32), jnp.zeros((1, 1, 0), bool))
    law = jax.jit(lambda x: Warp(sampling, features, seq)(x, root))
    clean, poisoned = np.asarray(law(logits)), np.asarray(law(logits.at[1].set(jnp.nan)))
    np.testing.assert_array_equal(clean[[0, 2]], poisoned[[0, 2]])
    assert np.isnan(poisoned[1]).all()


@pytest.mark.parametrize(
    "name, value",
    [("temperature", -0.1), ("temperature", np.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 2.0),
     ("repetition_penalty", 0.0), ("presence_penalty", np.inf), ("min_tokens", -1), ("max_tokens", -1)],
)  # fmt: skip
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=name):
        Sampling.make(2, **{name: np.array([1 if name != "min_p" else 0, value])})


def test_features_follow_the_rows():
    sampling = Sampling.make(2, temperature=[0.0, 0.5], top_k=[5, 0], presence_penalty=[0.1, 0])
    assert Features.of(sampling) == Features(sample=True, penalties=True)
    assert Features.of(Sampling.make(2)) == Features()
    assert Features(sample=True) | Features(bias=True) == Features(sample=True, bias=True)


@pytest.mark.parity
@pytest.mark.slow
def test_warp_equals_transformers():
    """The same order and the same kept tokens as `transformers`' processors."""
    import torch
    import transformers.generation.logits_process as hf

    rng = np.random.default_rng(0)
    rows = 40
    tokens, logits = rng.integers(0, V, (rows, 6)), rng.normal(size=(rows, 1, V)).astype(np.float32) * 2
    sampling = Sampling.make(
        rows, temperature=0.7, top_k=7, top_p=0.85, min_p=0.08, repetition_penalty=1.4, eos=[4], min_tokens=4
    )
    n = jnp.full(rows, 6, jnp.int32)
    seq = Sequence(jnp.asarray(tokens, jnp.int32), n, n - 2, n, n > 9, n, n)
    root = Slots(jnp.zeros((1, 1), jnp.int32), jnp.zeros((rows, 0), jnp.int32), jnp.zeros((1, 1, 0), bool))
    law = np.asarray(Warp(sampling, Features.everything(), seq, History.of(seq, V))(jnp.asarray(logits), root))[:, 0]
    ids, x = torch.tensor(tokens), torch.tensor(logits[:, 0])
    for processor in (
        hf.RepetitionPenaltyLogitsProcessor(1.4), hf.MinNewTokensLengthLogitsProcessor(4, 4, 4),
        hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(7), hf.TopPLogitsWarper(0.85), hf.MinPLogitsWarper(0.08),
    ):  # fmt: skip
        x = processor(ids, x)
    np.testing.assert_allclose(np.exp(law), torch.softmax(x, -1).numpy(), rtol=1e-4, atol=1e-6)
