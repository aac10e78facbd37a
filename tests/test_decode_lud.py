"""Lexical Unit Decoding: the published loop token for token, plain greedy at theta 1, k tokens a step at theta 0."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import quant
from jaxinfer.decode import LUD, Config, Decided, Features, Proposal, Sampling
from jaxinfer.decode.lud import Unit
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, Step
from tests import drafter_checks as checks
from tests import toy

PAD, ROOM = 6, checks.WIDTH + checks.ANSWER + 8


@functools.cache
def _laws(model):
    """Log-laws f32[T, V] after each of `tokens i32[T]`, of which the first n count: without a cache."""

    @jax.jit
    def laws(params, tokens, n):
        index = jnp.arange(tokens.shape[0])
        cache = model.new_cache(1, 1) if isinstance(model, toy.Attentive) else None
        output, _ = model(params, tokens[None], jnp.where(index < n, index, -1)[None], cache)
        return jax.nn.log_softmax(model.head(params, output.hidden)[0].astype(jnp.float32))

    return laws


def published(model, params, prompt, drafter, most, banned=()):
    """The loop as the paper has it: text and PADs in, up to k tokens out, all forgotten but the text."""
    text = list(prompt)
    while len(text) < len(prompt) + most:
        fed = text + [drafter.pad] * (drafter.k - 1)
        row = np.zeros(ROOM, np.int32)
        row[: len(fed)] = fed
        laws = np.asarray(_laws(model)(params, jnp.asarray(row), len(fed)))[len(text) - 1 : len(fed)]
        first, *guesses = laws
        first = first.copy()
        first[list(banned)] = -np.inf
        text.append(int(first.argmax()))
        for law in guesses:
            if drafter.theta == 1 or np.exp(law.max()) < drafter.theta or int(law.argmax()) in banned:
                break
            text.append(int(law.argmax()))
    return text[len(prompt) : len(prompt) + most]


@functools.cache
def _run(model, drafter):
    return toy.Run(model, Config(max_tokens=checks.ANSWER, drafter=drafter, features=Features(bias=True)))


def both(drafter, model: Any = checks.MODEL, params=checks.PARAMS, banned=(), eos=-1):
    """(outputs, those of the published loop, the result)."""
    tokens, lengths = checks.repetitive_prompts()
    sampling = Sampling.make(
        checks.BATCH, eos=[eos], max_tokens=checks.ANSWER, bias_ids=[*banned, *[0] * (1 - len(banned))],
        bias_values=[-jnp.inf if banned else 0.0],
    )  # fmt: skip
    result = _run(model, drafter)(params, tokens, lengths, sampling=sampling)
    rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    want = [published(model, params, row[:n].tolist(), drafter, checks.ANSWER, banned) for row, n in rows]
    return toy.outputs(result), want, result


@pytest.mark.slow
@pytest.mark.parametrize("k, theta", [(2, 0.29), (4, 0.25)])
def test_the_text_is_that_of_the_published_loop(k, theta):
    got, want, result = both(LUD(k=k, theta=theta, pad=PAD))
    assert got == want
    assert 1.1 < float(result.stats.tokens_per_forward) < k - 0.4  # some guesses stayed, some did not


@dataclasses.dataclass(frozen=True)
class ReadsAtTheRoot(LUD):
    """Planted: guesses are read from fixed slots, not after the end of the chain."""

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache):
        at_root = dataclasses.replace(state, n=jnp.zeros_like(state.n))
        verdict = dataclasses.replace(verdict, n_accepted=verdict.n_accepted * 0)
        return super().observe(params, at_root, seq, proposal, scored, verdict, n, cache)


@dataclasses.dataclass(frozen=True)
class SkipsTheUnsure(LUD):
    """Planted: counts the guesses that are sure, also those after one that is not."""

    def observe(self, params, state, *rest):
        new = super().observe(params, state, *rest)
        every = dataclasses.replace(self, theta=0.0)
        last = LUD.observe(every, params, state, *rest)
        return Unit(new.tokens, jnp.where(new.n > 0, last.n, new.n))


@dataclasses.dataclass(frozen=True)
class KeepsPads(LUD):
    """Planted: a PAD is a draft like any other."""

    def propose(self, *args, **kwargs):
        proposal, state = super().propose(*args, **kwargs)
        return dataclasses.replace(proposal, probe=None, depth=proposal.tokens.shape[1]), state


@pytest.mark.slow
@pytest.mark.parametrize("bug", [ReadsAtTheRoot, SkipsTheUnsure, KeepsPads])
def test_planted_bugs_are_seen(bug):
    got, want, _ = both(bug(k=4, theta=0.25, pad=PAD))
    assert got != want


def test_theta_one_is_plain_greedy():
    checks.Greedy(LUD(k=3, theta=1.0, pad=PAD)).check(accepts=False)


def test_theta_zero_keeps_k_tokens_a_step():
    got, want, result = both(LUD(k=4, theta=0.0, pad=PAD))
    assert got == want
    # The first step adds the first token, whose guesses the second step adds, and so on.
    assert np.asarray(result.stats.forwards).tolist() == [1 + -(-(checks.ANSWER - 1) // 4)] * checks.BATCH


@pytest.mark.slow
def test_rows_stand_alone_and_no_pad_enters_a_cache():
    unit = checks.Greedy(LUD(k=4, theta=0.25, pad=PAD))
    unit.check_rows()
    unit.check_commits()


@pytest.mark.slow
def test_rings_grouped_heads_and_quantized_weights():
    config = ModelConfig(
        vocab_size=checks.V, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32,
        max_length=64, windows=(6,),
    )  # fmt: skip
    step = Step(config)
    weights = jax.jit(step.init)(jax.random.key(1))
    weights["head"] = weights["head"] * 40
    weights = quant.apply(weights, [(r".*(mlp|attention).*", quant.Int8())])
    got, want, result = both(LUD(k=3, theta=0.25, pad=PAD), step, weights)
    assert got == want and float(result.stats.tokens_per_forward) > 1.1


def test_what_is_banned_never_stays_and_end_tokens_end():
    free, _, _ = both(drafter := LUD(k=4, theta=0.25, pad=PAD))
    common = int(np.bincount(sum(free, [])).argmax())
    got, want, _ = both(drafter, banned=(common,))
    assert all(common not in row for row in got) and any(common in row for row in free)
    assert [row[0] for row in got] == [row[0] for row in want]
    ended, _, _ = both(drafter, eos=common)
    assert ended == [row[: row.index(common) + 1] if common in row else row for row in free]


def test_settings_trees_and_sampling_are_refused():
    for given, message in (({"k": 1}, "k: got 1"), ({"theta": 1.5}, "theta: got 1.5"), ({"pad": -1}, "pad: got -1")):
        with pytest.raises(ConfigError, match=message):
            LUD(**given)
    with pytest.raises(ConfigError, match="pad: got 9"):
        LUD(pad=9).init(None, None, toy.sequence([1], vocab_size=checks.V), None)
    with pytest.raises(ConfigError, match="greedily"):
        Config(drafter=LUD()).verifier_for(Features(sample=True), chain=True)
    with pytest.raises(ConfigError, match="tree"):
        tokens = jnp.zeros((1, 2), jnp.int32)
        Decided().verify(jnp.zeros((1, 3, 4)), Proposal.of_tree(tokens, jnp.zeros((1, 2)), tokens >= 0, depth=1), None)
