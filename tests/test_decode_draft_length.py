"""Draft models that choose their own draft length, and caches that fall behind meanwhile."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Config, DraftModel, Features, Proposal, Sampling, Verdict, draft_chain
from jaxinfer.decode.draft_model import DraftState
from jaxinfer.decode.prefill import commit_chunk
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks
from tests import toy

OTHER = checks.MODEL.params(5, scale=0.5)
ALIKE = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, checks.PARAMS, OTHER)  # a draft model that often agrees
DRAFT = checks.MARKOV.params(1, scale=1.2)
UNSURE = DraftModel(checks.MARKOV, 3, confidence=0.5)


def test_greedy_output_is_plain_output():
    checks.Greedy(DraftModel(checks.MODEL, 4, adaptive=True, confidence=0.3, lazy=True), ALIKE).check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    checks.check_law(dataclasses.replace(UNSURE, adaptive=True), DRAFT)


@dataclasses.dataclass(frozen=True)
class StopsAtTheDraw(DraftModel):
    """Planted: a draft is dropped where the drawn token itself is unlikely, so what stays is not of the law told."""

    def propose(self, *args, **kwargs):
        proposal, state = super().propose(*args, **kwargs)
        own = jnp.take_along_axis(proposal.q_logp, proposal.tokens[..., None], 2)[..., 0]
        return Proposal.of_chain(proposal.tokens, proposal.valid & (own > jnp.log(0.3)), proposal.q_logp), state


@pytest.mark.slow
def test_a_stop_that_sees_the_draw_is_caught():
    assert checks.law(StopsAtTheDraw(checks.MARKOV, 3), DRAFT)[0] > 12


@pytest.mark.parametrize(
    ("gamma", "proposed", "accepted", "want"),
    [(2, 2, 2, 4), (4, 4, 4, 5), (4, 4, 3, 3), (1, 1, 0, 1), (4, 2, 2, 5), (4, 2, 1, 3), (3, 0, 0, 3), (5, 5, 5, 5)],
)
def test_the_length_follows_the_last_step(gamma, proposed, accepted, want):
    """Two more after a step that kept all, one less after one that did not, within 1 and the width."""
    proposal = Proposal.of_chain(jnp.zeros((1, 5), jnp.int32), jnp.arange(5)[None] < proposed)
    verdict = Verdict(jnp.zeros((1, 6), jnp.int32), jnp.array([accepted]), jnp.array([0]), jnp.array([True]))
    state = DraftState(None, jnp.array([gamma]))
    drafter = DraftModel(checks.MARKOV, 5, adaptive=True)
    assert drafter._next_length(state, proposal, verdict).tolist() == [want]
    assert dataclasses.replace(drafter, adaptive=False)._next_length(state, proposal, verdict).tolist() == [gamma]


def proposals(drafter, params, tokens, lengths, gamma):
    """What is drafted after prefill, the rows' lengths set to `gamma`."""

    @jax.jit
    def run(params, tokens, lengths, gamma):
        config = Config(max_tokens=8, drafter=drafter, features=Features())
        state = toy.decode.begin(
            checks.MARKOV, checks.TABLE, tokens, lengths, config=config, key=jax.random.key(0), draft_params=params
        )
        warp = toy.decode.sampling.Warp(state.sampling, state.features, state.seq)
        own = drafter.shortened(state.drafter, gamma)
        return drafter.propose(params, own, state.seq, state.cache, state.seq.key, target_params=None, warp=warp)[0]

    return run(params, tokens, lengths, gamma)


def test_drafting_ends_before_the_first_token_that_the_draft_model_is_unsure_of():
    tokens, lengths = toy.prompts(2, 40, 6, checks.SYMBOLS)
    gamma = np.arange(40) % 4
    got = proposals(UNSURE, DRAFT, tokens, lengths, jnp.asarray(gamma))
    table = np.asarray(jax.nn.softmax(DRAFT["table"]))
    for row in range(40):
        last, want = int(tokens[row, lengths[row] - 1]), []
        for i in range(gamma[row]):
            law = table[(int(lengths[row]) - 1 + i) % checks.MARKOV.period, last]
            if law.max() < UNSURE.confidence:
                break
            want.append(last := int(law.argmax()))
        assert got.tokens[row][got.valid[row]].tolist() == want
    assert 0 < int(got.valid.sum()) < gamma.sum()


def test_a_lazy_cache_catches_up():
    """Steps without drafts leave the draft's cache behind; then it holds what it would, had it always run."""
    drafter = DraftModel(checks.MODEL, 1, lazy=True)
    run = toy.Run(checks.MODEL, Config(max_tokens=checks.ANSWER, drafter=drafter, features=Features()))
    tokens, lengths = checks.repetitive_prompts()
    state = run.start(checks.PARAMS, tokens, lengths, sampling=Sampling.make(4, eos=[-1]), draft_params=OTHER)
    idle = dataclasses.replace(state, drafter=drafter.shortened(state.drafter, jnp.array([0, 0, 1, 0])))
    for steps in (5, 14):
        idle = run.advance(checks.PARAMS, idle, steps=steps, draft_params=OTHER)
    fresh = jnp.pad(idle.seq.tokens, ((0, 0), (0, 3)))
    at = jnp.where(jnp.arange(fresh.shape[1])[None] < idle.seq.length[:, None] - 2, jnp.arange(fresh.shape[1]), -1)

    @jax.jit
    def compare(state):
        own = state.drafter.cache
        caught = draft_chain.catch_up(checks.MODEL, OTHER, own, state.seq, jnp.ones(4, bool))
        whole, *_ = commit_chunk(checks.MODEL, OTHER, checks.MODEL.new_cache(4, own.states[0].v.shape[2]), fresh, at)
        return state.seq.length - 2 - own.t, caught, whole

    behind, caught, whole = compare(idle)
    assert behind.tolist()[1:] == [19, 0, 19]
    for got, want in zip(jax.tree.leaves(caught), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="confidence: got 1.5"):
        DraftModel(checks.MARKOV, confidence=1.5)


def test_law_of_a_draft_counts_the_drafts_before_it():
    """Penalties see the path: the second draft of a penalised row avoids the first."""
    run = toy.Run(checks.MARKOV, Config(max_tokens=6, presence_penalty=9.0, drafter=DraftModel(checks.MARKOV, 3)))
    plain = toy.Run(checks.MARKOV, Config(max_tokens=6, presence_penalty=9.0))
    tokens, lengths = toy.prompts(0, 3, 5, checks.SYMBOLS)
    got, want = run(checks.TABLE, tokens, lengths, draft_params=checks.TABLE), plain(checks.TABLE, tokens, lengths)
    assert toy.outputs(got) == toy.outputs(want)
    assert int(got.stats.accepted_by_depth.sum()) == int(got.stats.proposed_by_depth.sum())
