"""PEARL: the two modes by table, the target's output in both, and the published shared uniform."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Chain, Config, Features, Pearl, Proposal, Sampling, Verdict, keys, pearl_devices
from jaxinfer.decode.draft_chain import Drafts
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.pearl_devices import PearlDevices
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks
from tests import toy

OTHER = checks.MODEL.params(5, scale=0.5)
ALIKE = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, checks.PARAMS, OTHER)
DRAFT = checks.MARKOV.params(1, scale=1.2)
NEAR = {"table": 0.5 * checks.TABLE["table"] + 0.5 * DRAFT["table"]}


def test_greedy_output_is_plain_output():
    checks.Greedy(Pearl(checks.MODEL, 4), ALIKE).check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    checks.check_law(Pearl(checks.MARKOV, 3), NEAR)


@dataclasses.dataclass(frozen=True)
class SharedUniform(Chain):
    """Planted: the uniform that drew the guess (its place within its block of the vocabulary) also tests it."""

    def _uniform_ahead(self, key, n_drafts):
        return keys.uniforms(keys.slot(keys.stream(key, Stream.DRAFT), 0), 2)[:, 1]


@dataclasses.dataclass(frozen=True)
class BonusToo(Chain):
    """Planted: a fresh bonus follows full acceptance, and the pending block goes on as if its guess had been kept."""

    def _ahead(self, proposal, guess, key, p, rejected, q):
        tested, kept, q = super()._ahead(proposal, guess, key, p, rejected, q)
        return tested, tested & ~rejected, q


@pytest.mark.slow
@pytest.mark.parametrize("bug", [SharedUniform(), BonusToo()], ids=["shared uniform", "guesses always stay"])
def test_planted_bugs_are_seen(bug):
    assert checks.law(Pearl(checks.MARKOV, 3), NEAR, verifier=bug)[0] > 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pending", "accepted", "guess_kept", "mode_after"),
    [
        (0, 0, True, 3), (0, 0, False, 0),  # pre-verify: the first draft stays, or not
        (3, 3, True, 3), (3, 3, False, 0), (3, 2, True, 0), (3, 0, False, 0),  # post-verify: all stay, or some fall
    ],
)  # fmt: skip
def test_modes(pending, accepted, guess_kept, mode_after):
    """How many drafts are pending after a step, whatever token follows a rejection."""
    drafter = Pearl(checks.MARKOV, 4)
    run = toy.Run(checks.MARKOV, Config(max_tokens=9, drafter=drafter, features=Features()))
    state = run.start(checks.TABLE, jnp.array([[1, 2, 3]]), jnp.array([3]), draft_params=DRAFT)
    tokens = jnp.array([[3, 2, 1, 0]])
    blocks = jnp.zeros((1, 8), jnp.int32)
    drafts = Drafts(tokens, tokens >= 0, None, (blocks,))
    own = dataclasses.replace(state.drafter, count=jnp.array([pending]), drafts=drafts)
    verdict = Verdict(jnp.zeros((1, 4)), jnp.array([accepted]), jnp.array([3 if guess_kept else 1]), jnp.array([True]))
    n = verdict.n_accepted + 1
    seq = dataclasses.replace(state.seq, length=state.seq.length + n)
    after = drafter.observe(DRAFT, own, seq, drafter.proposal(own, drafts), None, verdict, n, None)
    assert after.count.tolist() == [mode_after]
    assert after.tokens.tolist() == [[2, 1, 0]]
    assert after.cache.t.tolist() == [3 - 2 + accepted + 1]


@pytest.mark.slow
def test_a_perfect_draft_never_leaves_post_verify():
    """The target as its own draft: a token in the first step, gamma in each after it, and never a bonus."""
    run = toy.Run(checks.MODEL, Config(max_tokens=17, drafter=Pearl(checks.MODEL, 4), features=Features()))
    tokens, lengths = checks.repetitive_prompts()
    result = run(
        checks.PARAMS, tokens, lengths, sampling=Sampling.make(4, eos=[-1], max_tokens=17), draft_params=checks.PARAMS
    )
    assert result.stats.forwards.tolist() == [1 + 16 // 4] * 4


def test_a_guess_ahead_is_as_good_as_a_draft():
    """Acceptance of the guess alone: sum of min(p, q), and the token's law is p."""
    rows = 20_000
    law = jax.nn.log_softmax(jnp.array([0.3, 1.0, -0.5, 0.2]))
    q = jax.nn.log_softmax(jnp.array([1.0, 0.0, 0.2, -1.0]))
    key = keys.row_keys(jax.random.key(0), jnp.arange(rows))
    guess = jax.vmap(jax.random.categorical, (0, None))(keys.stream(key, 9), q)
    none = jnp.zeros((rows, 0), jnp.int32)
    proposal = dataclasses.replace(
        Proposal.of_chain(none, none > 0), ahead=guess, ahead_logp=jnp.broadcast_to(q, (rows, 4))
    )
    verify, law_of_rows = jax.jit(Chain().verify), jnp.broadcast_to(law, (rows, 1, 4))
    verdict = verify(law_of_rows, proposal, key)
    shares = np.bincount(np.asarray(verdict.next_token), minlength=4) / rows
    np.testing.assert_allclose(shares, np.exp(law), atol=0.015)
    want = float(jnp.minimum(jnp.exp(law), jnp.exp(q)).sum())
    assert abs(float((verdict.next_token == guess).mean()) - want) < 0.015
    nobody = dataclasses.replace(proposal, ahead=jnp.full(rows, -1))
    shares = np.bincount(np.asarray(verify(law_of_rows, nobody, key).next_token)) / rows
    np.testing.assert_allclose(shares, np.exp(law), atol=0.015)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="gamma: got 1, accepts 2 or more"):
        Pearl(checks.MARKOV, 1)


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True], ids=["greedy", "sampled"])
def test_two_devices_give_the_tokens_of_one(monkeypatch, warm):
    """Ragged rows with penalties: the same tokens and counts; each model's forwards run where it is."""
    here, there = jax.devices()[:2]
    tokens, lengths = checks.repetitive_prompts()
    config = Config(max_tokens=20, drafter=Pearl(checks.MODEL, 3), features=Features(sample=warm, penalties=True))
    sampling = Sampling.make(4, eos=[-1], max_tokens=20, temperature=0.9 * warm, repetition_penalty=1.02)
    want = toy.Run(checks.MODEL, config)(checks.PARAMS, tokens, lengths, sampling=sampling, draft_params=ALIKE)
    places: dict = {}
    for name in ("_draft_program", "_read_program"):
        noted(monkeypatch, name, places)
    got = PearlDevices(Pearl(checks.MODEL, 3), here, there, look=4).generate(
        checks.MODEL, checks.PARAMS, tokens, lengths, config=config, key=jax.random.key(0), draft_params=ALIKE,
        sampling=sampling,
    )  # fmt: skip
    assert toy.outputs(got) == toy.outputs(want)
    np.testing.assert_array_equal(got.stats.accepted_by_depth, want.stats.accepted_by_depth)
    np.testing.assert_array_equal(got.stats.forwards, want.stats.forwards)
    np.testing.assert_array_equal(got.finish_reason, want.finish_reason)
    assert int(got.stats.accepted_by_depth.sum()) > 0
    assert places == {"_draft_program": {there}, "_read_program": {here}}


def noted(monkeypatch, name, places):
    """The program of that name notes the devices of what it gives."""
    program = getattr(pearl_devices, name)

    def run(*args, **kwargs):
        found = program(*args, **kwargs)
        places.setdefault(name, set()).update(*(leaf.devices() for leaf in jax.tree.leaves(found)))
        return found

    monkeypatch.setattr(pearl_devices, name, run)


def test_two_devices_must_be_two():
    here, there = jax.devices()[:2]
    with pytest.raises(ConfigError, match="accepts another device"):
        PearlDevices(Pearl(checks.MODEL, 3), here, here)
    with pytest.raises(ConfigError, match="look: got 0"):
        PearlDevices(Pearl(checks.MODEL, 3), here, there, look=0)
