"""Superposed decoding: against a plain program that keeps texts and counts in dictionaries and no cache at all."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import decode
from jaxinfer.decode import superposed as module
from jaxinfer.decode.superposed import WEIGHTS, NGrams, SuperposedConfig, superpose
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig
from jaxinfer.models.step import Step
from tests import toy

V, ANSWER = 23, 9
STEP = Step(
    ModelConfig(
        vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32,
        max_length=64, embedding_scale=2.0,
    )
)  # fmt: skip


def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(STEP.init, jax.random.key(0))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape) if len(x.shape) > 1 else np.ones(x.shape), jnp.float32),
        shapes,
    )


PARAMS = params()
CORPUS = [np.random.default_rng(i).integers(0, V, 40) for i in range(12)]
TOKENS, LENGTHS = toy.prompts(0, 3, 8, V, lengths=[1, 8, 5])
NGRAMS = NGrams.of(CORPUS)
program = jax.jit(superpose, static_argnames=("step", "config"))


AFTER = [collections.defaultdict(collections.Counter) for _ in WEIGHTS]  # by context length: context to followers
for text in CORPUS:
    for n, after in enumerate(AFTER, 1):
        for i in range(len(text) - n):
            after[tuple(text[i : i + n])][int(text[i + n])] += 1


def interpolated(tail, token):
    """The n-gram probability by counting in the corpus."""
    total = 0.0
    for n, (weight, after) in enumerate(zip(WEIGHTS, AFTER, strict=True), 1):
        context = tuple(tail[-n:])
        if context in after:
            total += weight * after[context][token] / after[context].total()
    return total


@jax.jit
def _logits(params, inputs, n):
    output, _ = STEP(params, inputs, jnp.where(jnp.arange(inputs.shape[1]) < n, jnp.arange(inputs.shape[1]), -1)[None])
    return STEP.head(params, output.hidden[:, n - 1])[0]


def plain(prompt, config, eos=(), grams=True):
    """Drafts and scores of one prompt, by whole forwards over mixed embeddings."""
    embed = np.asarray(STEP.embed(PARAMS, jnp.arange(V)))
    rows, drafts = [embed[t] for t in prompt], [((), 0.0, False)]
    for count in range(config.max_tokens):
        running = [(text, score) for text, score, ended in drafts if not ended]
        if not running:
            break
        if count:
            mass = np.exp(np.array([s for _, s in running]) - max(s for _, s in running))
            rows.append(sum(w * embed[text[-1]] for w, (text, _) in zip(mass / mass.sum(), running, strict=True)))
        inputs = np.zeros((1, 24, embed.shape[1]), np.float32)
        inputs[0, : len(rows)] = rows
        logp = np.asarray(jax.nn.log_softmax(_logits(PARAMS, jnp.asarray(inputs), len(rows)) / config.temperature))
        likely = np.argsort(-logp, kind="stable")[: config.top]
        grown = []
        for text, score, ended in drafts:
            if ended:
                grown.append((text, score, True))
                continue
            for token in likely.tolist():
                gain = float(logp[token])
                if grams and config.alpha and count:
                    support = interpolated([*prompt, *text], token)
                    rest = config.alpha * math.log(support) if support else -200.0
                    gain = (1 - config.alpha) * gain + rest
                grown.append(((*text, token), score + gain, token in eos))
        drafts = sorted(grown, key=lambda d: -d[1])[: config.drafts]
    return [list(text) for text, _, _ in drafts], [score for _, score, _ in drafts]


def texts(result):
    return [
        [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]
        for rows, lengths in zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
    ]


def compare(config, ngrams):
    """The drafts of every prompt and those of the plain program."""
    result = program(STEP, PARAMS, TOKENS, LENGTHS, config=config, ngrams=ngrams)
    want = [
        plain(np.asarray(row)[:n].tolist(), config, config.eos or (), ngrams is not None)
        for row, n in zip(TOKENS, LENGTHS, strict=True)
    ]
    return texts(result), np.asarray(result.scores), [w[0] for w in want], np.array([w[1] for w in want])


CONFIGS = {
    "paper": SuperposedConfig(max_tokens=ANSWER, eos=()),
    "warm": SuperposedConfig(max_tokens=ANSWER, drafts=4, temperature=1.0, alpha=0.3, eos=()),
    "ends": SuperposedConfig(max_tokens=ANSWER, temperature=1.0, eos=tuple(range(8))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_and_scores_are_the_plain_programs(name):
    got, scores, want, want_scores = compare(CONFIGS[name], NGRAMS)
    assert got == want
    np.testing.assert_allclose(scores, want_scores, rtol=1e-4, atol=1e-3)
    assert all(len({tuple(t) for t in rows}) == len(rows) for rows in got), "drafts of a prompt differ"
    if name == "ends":
        lengths = {len(t) for rows in got for t in rows}
        assert min(lengths) < ANSWER, "no draft ended early: the case shows nothing"


def test_without_ngrams_the_model_alone_decides():
    got, scores, want, want_scores = compare(CONFIGS["warm"], None)
    assert got == want
    np.testing.assert_allclose(scores, want_scores, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["equal weights", "texts stay"])
def test_planted_bugs_are_seen(monkeypatch, bug):
    if bug == "equal weights":
        softmax = jax.nn.softmax
        monkeypatch.setattr(jax.nn, "softmax", lambda x, *a, **k: softmax(jnp.where(jnp.isfinite(x), 0.0, x), *a, **k))
    else:
        extend = module._extend

        def wrong(step, params, drafts, *rest):
            new = extend(step, params, drafts, *rest)
            tail = jnp.concatenate([drafts.tail[..., 1:], new.tail[..., -1:]], -1)
            return new.replace(tail=tail)

        monkeypatch.setattr(module, "_extend", wrong)
    config = CONFIGS["warm"]
    run = jax.jit(lambda: module.superpose(STEP, PARAMS, TOKENS, LENGTHS, config=config, ngrams=NGRAMS))
    want = [plain(np.asarray(row)[:n].tolist(), config)[0] for row, n in zip(TOKENS, LENGTHS, strict=True)]
    assert texts(run()) != want


def greedy():
    run = toy.Run(STEP, decode.Config(max_tokens=ANSWER, eos=()))
    return toy.outputs(run(PARAMS, TOKENS, LENGTHS))


def test_one_draft_is_plain_greedy():
    config = SuperposedConfig(max_tokens=ANSWER, drafts=1, top=1, eos=())
    result = program(STEP, PARAMS, TOKENS, LENGTHS, config=config)
    assert texts(result) == [[row] for row in greedy()]


def test_the_best_draft_is_plain_greedy_as_the_model_grows_certain():
    config = SuperposedConfig(max_tokens=ANSWER, temperature=1e-3, eos=())
    result = program(STEP, PARAMS, TOKENS, LENGTHS, config=config)
    assert [rows[0] for rows in texts(result)] == greedy()


@pytest.mark.slow
def test_ngram_probabilities_against_counting():
    rng = np.random.default_rng(5)
    tails = np.stack([CORPUS[i % 12][i % 30 : i % 30 + 5] for i in range(40)])
    tails[::4] = rng.integers(0, V, tails[::4].shape)
    tokens = rng.integers(0, V, (40, 3))
    tokens[:, 0] = [CORPUS[i % 12][i % 30 + 5] for i in range(40)]
    got = np.asarray(jax.jit(lambda a, b: NGRAMS.probability(a, b))(jnp.asarray(tails), jnp.asarray(tokens)))
    want = [[interpolated(tail.tolist(), t) for t in row.tolist()] for tail, row in zip(tails, tokens, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (got > 0).sum() > 40
    assert not np.asarray(NGrams.of([]).probability(jnp.asarray(tails), jnp.asarray(tokens))).any()


def test_a_prompt_alone_gives_the_drafts_of_the_batch():
    config = CONFIGS["paper"]
    whole = texts(program(STEP, PARAMS, TOKENS, LENGTHS, config=config, ngrams=NGRAMS))
    order = jnp.array([2, 0, 1])
    moved = texts(program(STEP, PARAMS, TOKENS[order], LENGTHS[order], config=config, ngrams=NGRAMS))
    assert moved == [whole[i] for i in order.tolist()]


def test_a_row_that_is_not_finite_stops_alone():
    bad = jax.tree.map(lambda x: x, PARAMS)
    bad["embedding"] = bad["embedding"].at[int(TOKENS[0, 0])].set(jnp.nan)
    prompts = TOKENS.at[1:].set(jnp.where(TOKENS[1:] == TOKENS[0, 0], (TOKENS[0, 0] + 1) % V, TOKENS[1:]))
    config = SuperposedConfig(max_tokens=3, temperature=1.0, eos=())
    result = program(STEP, bad, prompts, LENGTHS, config=config)
    assert result.lengths[0].tolist() == [0, 0, 0] and int(result.lengths[1].min()) > 0


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="alpha: got 1, accepts 0 or more, below 1"):
        SuperposedConfig(alpha=1)
    with pytest.raises(ConfigError, match="top: got 2, accepts at least drafts = 3"):
        SuperposedConfig(top=2)
    with pytest.raises(ConfigError, match="temperature: got 0"):
        SuperposedConfig(temperature=0)
