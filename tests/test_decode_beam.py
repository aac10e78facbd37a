"""Beam search against every sequence scored by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import decode
from jaxinfer.decode import BeamConfig
from jaxinfer.errors import ConfigError
from tests import toy

V, L, END = 4, 3, 3
MODEL = toy.Attentive(V)
PARAMS = MODEL.params(3, scale=0.5)
TOKENS, LENGTHS = toy.prompts(1, 2, 4, V, lengths=[4, 2])
search = jax.jit(decode.beam_search, static_argnames=("step", "config"))


@jax.jit
def forward(ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    return MODEL.head(PARAMS, MODEL(PARAMS, ids, positions)[0].hidden)


def logp_of(texts):
    """Log-law f64[n, 12, V] after each token of up to 64 equally long texts, by a forward without a cache."""
    ids = np.zeros((64, 12), np.int32)
    ids[: len(texts), : len(texts[0])] = texts
    logits = np.asarray(forward(jnp.asarray(ids)), np.float64)[: len(texts)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def hypotheses(row, length_penalty, eos):
    """All outputs of at most L tokens that end at an end token or at the limit, best score first."""
    prompt = [int(t) for t in TOKENS[row, : int(LENGTHS[row])]]
    ids = [[*prompt, *tail] for tail in itertools.product(range(V), repeat=L)]
    logp = logp_of(ids)
    found = {}
    for i, sequence in enumerate(ids):
        tail, total = [], 0.0
        for j in range(len(prompt), len(sequence)):
            total += logp[i, j - 1, sequence[j]]
            tail.append(sequence[j])
            if sequence[j] in eos:
                break
        found[tuple(tail)] = total / len(tail) ** length_penalty
    return sorted(((score, tail) for tail, score in found.items()), reverse=True)


@pytest.mark.parametrize("length_penalty, eos", [(1.0, ()), (0.0, (END,)), (2.0, (0, END))])
def test_enough_beams_find_the_best_of_all(length_penalty, eos):
    """With a beam for every prefix the search is exhaustive: the four best, with their scores."""
    config = BeamConfig(max_tokens=L, beams=V**2, n_best=4, length_penalty=length_penalty, eos=eos)
    got = search(MODEL, PARAMS, TOKENS, LENGTHS, config=config)
    for row in range(2):
        best = hypotheses(row, length_penalty, eos)[:4]
        np.testing.assert_allclose(got.scores[row], [score for score, _ in best], atol=1e-5)
        for k, (_, tail) in enumerate(best):
            assert tuple(np.asarray(got.tokens[row, k, : int(got.lengths[row, k])])) == tail


def test_one_beam_is_greedy():
    greedy = toy.Run(MODEL, decode.Config(max_tokens=9, eos=(END,)))(PARAMS, TOKENS, LENGTHS)
    got = search(MODEL, PARAMS, TOKENS, LENGTHS, config=BeamConfig(max_tokens=9, beams=1, eos=(END,)))
    np.testing.assert_array_equal(got.tokens[:, 0], greedy.tokens)
    np.testing.assert_array_equal(got.lengths[:, 0], greedy.lengths)


def naive_beam(row, beams, length, eos, penalty):
    """The textbook loop, with a fresh full forward for each hypothesis."""
    prompt = [int(t) for t in TOKENS[row, : int(LENGTHS[row])]]
    running, finished = [(0.0, [])], []
    for step in range(1, length + 1):
        logp = logp_of([prompt + tail for _, tail in running])[:, len(prompt) + step - 2]
        grown = sorted(
            ((s + logp[i, t], [*tail, t]) for i, (s, tail) in enumerate(running) for t in range(V)), key=lambda x: -x[0]
        )
        ended = [tail[-1] in eos or step == length for _, tail in grown]
        finished += [
            (s / step**penalty, tail) for (s, tail), end in list(zip(grown, ended, strict=True))[:beams] if end
        ]
        running = [x for x, end in zip(grown, ended, strict=True) if not end][:beams]
    return max(finished)


def test_few_beams_follow_the_textbook():
    config = BeamConfig(max_tokens=6, beams=2, eos=(END,), length_penalty=0.7)
    got = search(MODEL, PARAMS, TOKENS, LENGTHS, config=config)
    for row in range(2):
        score, tail = naive_beam(row, 2, 6, (END,), 0.7)
        assert list(np.asarray(got.tokens[row, 0, : int(got.lengths[row, 0])])) == tail
        assert float(got.scores[row, 0]) == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("values", [dict(beams=0), dict(n_best=5), dict(max_tokens=0)], ids=str)
def test_configs_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        BeamConfig(**values)
