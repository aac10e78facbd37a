"""CopySpec with a draft model: exact, copying first, and a draft cache that follows what was copied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import decode
from jaxinfer.decode import Config, CopyDraft, Features, Sampling, draft_chain, ngrams
from jaxinfer.decode.prefill import commit_chunk
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, Step
from tests import drafter_checks as checks
from tests import toy

DRAFTER = CopyDraft(checks.MODEL, gamma=2, copies=4, drafts=3)
OTHER = checks.MODEL.params(5, scale=0.5)
ALIKE = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, checks.PARAMS, OTHER)
DRAFT = checks.MARKOV.params(1, scale=1.2)


def test_greedy_output_is_plain_output():
    checks.Greedy(DRAFTER, ALIKE).check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    checks.check_law(CopyDraft(checks.MARKOV, gamma=1, copies=2, drafts=2), DRAFT)


@dataclasses.dataclass(frozen=True)
class ForgetsTheLaw(CopyDraft):
    """Planted: what the model drafted is told as certain, as if it had been copied."""

    def propose(self, *args, **kwargs):
        proposal, state = super().propose(*args, **kwargs)
        certain = jnp.where(jnp.arange(proposal.q_logp.shape[-1]) == proposal.tokens[..., None], 0.0, -jnp.inf)
        swapped = jnp.where(jnp.isfinite(proposal.q_logp), -jnp.log(2.0), -jnp.inf)
        return dataclasses.replace(proposal, q_logp=jnp.where(certain == proposal.q_logp, certain, swapped)), state


@pytest.mark.slow
def test_a_law_that_is_not_the_drafts_is_caught():
    assert checks.law(ForgetsTheLaw(checks.MARKOV, gamma=2, copies=2, drafts=2), DRAFT)[0] > 12


def lag_and_error(drafter, bring_up=draft_chain.catch_up):
    """How far the draft's cache is behind by step; and once brought up, its distance from one that read it all."""
    run = toy.Run(checks.MODEL, Config(max_tokens=checks.ANSWER, drafter=drafter, features=Features()))
    tokens, lengths = checks.repetitive_prompts()
    sampling = Sampling.make(4, eos=[-1])
    state = run.start(checks.PARAMS, tokens, lengths, sampling=sampling, draft_params=OTHER)

    @jax.jit
    def compare(state):
        seq, own = state.seq, state.drafter.cache
        caught = bring_up(checks.MODEL, OTHER, own, seq, jnp.ones(4, bool))
        at = jnp.arange(seq.tokens.shape[1])[None]
        empty = checks.MODEL.new_cache(4, own.states[0].v.shape[2])
        read = jnp.where(at < seq.length[:, None] - 2, at, -1)
        whole, *_ = commit_chunk(checks.MODEL, OTHER, empty, seq.tokens, read)
        off = [jnp.abs(a - b).max() for a, b in zip(jax.tree.leaves(caught), jax.tree.leaves(whole), strict=True)]
        return seq.length - 2 - own.t, jnp.stack([x.astype(jnp.float32) for x in off]).max()

    behind, errors = [], []
    while not bool(state.seq.done.all()):
        state = run.advance(checks.PARAMS, state, steps=1, draft_params=OTHER)
        lag, error = compare(state)
        behind.append(np.asarray(lag))
        errors.append(float(error))
    return np.stack(behind), max(errors)


@pytest.mark.slow
def test_the_draft_cache_follows_what_was_copied(monkeypatch):
    behind, error = lag_and_error(DRAFTER)
    assert error < 1e-5
    assert behind.max() > 3 and (np.diff(behind, axis=0) < 0).any()  # rows fell behind, and caught up
    # Planted: the draft model goes on without the copied tokens.
    monkeypatch.setattr(draft_chain, "catch_up", lambda step, params, cache, seq, rows: cache)
    assert lag_and_error(DRAFTER)[1] > 1e-2


def test_rows_copy_where_they_can_and_draft_elsewhere():
    tokens, lengths = jnp.array([[1, 2, 3, 1, 2], [1, 2, 3, 4, 5]]), jnp.array([5, 5])
    run = toy.Run(checks.MODEL, Config(max_tokens=8, drafter=DRAFTER, features=Features()))
    state = run.start(checks.PARAMS, tokens, lengths, draft_params=OTHER)

    @jax.jit
    def propose(state):
        warp = decode.sampling.Warp(state.sampling, state.features, state.seq)
        return DRAFTER.propose(
            OTHER, state.drafter, state.seq, state.cache, state.seq.key, target_params=None, warp=warp
        )

    proposal, pending = propose(state)
    assert proposal.tokens[0].tolist() == [3, 1, 2, 0] and proposal.valid.tolist() == [[True] * 3 + [False]] * 2
    assert pending.ran.tolist() == [False, True]
    assert ngrams.find(state.seq, 2).tolist() == [0, 13]


@pytest.mark.slow
def test_no_cache_is_copied():
    """Neither the target's nor the draft's, though the draft's is brought up in a loop of its own."""
    size = dict(vocab_size=40, num_layers=1, num_heads=4, num_kv_heads=2, mlp_size=48, max_length=64, eos=(0,))
    model = Step(ModelConfig(hidden_size=32, head_dim=8, tie_embeddings=True, **size))
    small = Step(ModelConfig(hidden_size=24, head_dim=4, tie_embeddings=True, **size))
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    tokens, lengths = toy.prompts(3, 3, 12, 40, lengths=[12, 1, 7])
    program = generate.lower(
        model, model.init(jax.random.key(0)), tokens, lengths, key=jax.random.key(0),
        config=Config(max_tokens=24, drafter=CopyDraft(small)), draft_params=small.init(jax.random.key(1)),
    ).compile()  # fmt: skip
    for step in (model, small):
        assert toy.cache_copies(program, jax.eval_shape(lambda step=step: step.new_cache(3, 36))) == []


def test_impossible_settings_are_refused():
    for name in ("gamma", "copies"):
        with pytest.raises(ConfigError, match=f"{name}: got 0"):
            CopyDraft(checks.MODEL, **{name: 0})
    with pytest.raises(ConfigError, match="gamma: got 0"):
        CopyDraft(checks.MODEL, drafts=0)
