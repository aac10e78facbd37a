"""Chimera: exact output from trees and chains, hidden states in its cache, and drafting as training sees it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer.decode.chimera import Chimera
from jaxinfer.models.heads.chimera import ChimeraHead
from jaxinfer.train.heads import chimera_rounds
from tests import drafter_checks as checks
from tests import head_checks as heads

HEAD = ChimeraHead(heads.SHAPE, num_heads=2, mlp_size=8)
PARAMS = heads.random_head(HEAD)
TREE = Chimera(HEAD, heads.STEP, depth=3, branches=3, nodes=8)
CHAIN = Chimera(HEAD, heads.STEP, depth=3, branches=1)
LAW_HEAD = ChimeraHead(heads.LAW_SHAPE, num_heads=2, mlp_size=8)
LAW_PARAMS = heads.random_head(LAW_HEAD)


@dataclasses.dataclass(frozen=True)
class FromTheRoot(Chimera):
    """Planted bug: all tokens of one step enter with the hidden state of its first slot."""

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache):
        verdict = dataclasses.replace(verdict, path=jnp.zeros_like(verdict.path))
        return super().observe(params, state, seq, proposal, scored, verdict, n, cache)


GREEDY_WARP = type("GreedyWarp", (), {"sampled": False, "scores": lambda self, logits, slots: logits})()


@jax.jit
def propose(state):
    """The chain that is drafted next."""
    return CHAIN.propose(
        PARAMS, state.drafter, state.seq, None, state.seq.key, target_params=heads.PARAMS, warp=GREEDY_WARP
    )[0]


@jax.jit
def iterate(ids):
    """The token that each of training's iterations chooses after each place of `ids i32[B, T]`."""
    return [x.argmax(-1) for x in chimera_rounds(heads.STEP, HEAD, PARAMS, heads.see(ids), CHAIN.depth)]


@jax.jit
def values(ids):
    """The values [B, G, T, d] of the layer over the true hidden states of `ids i32[B, T]`."""
    seen = heads.see(ids)
    cache = HEAD.new_cache(ids.shape[0], 1, "float32")
    _, blocks = HEAD(PARAMS, seen.hidden, seen.positions, cache, kv.new_blocks(cache, ids.shape[1]))
    return blocks[0].v


def cache_error(run):
    """The largest difference between the cache's values and fresh ones, over rows and steps."""
    worst = 0.0
    for state in run.states:
        rows, got = run.rows(state), np.asarray(state.drafter.cache.states[0].v)
        want = np.asarray(values(heads.padded(rows)))
        for row, tokens in enumerate(rows):
            held = len(tokens) - 1
            assert int(state.drafter.cache.t[row]) == held
            if held:
                worst = max(worst, np.abs(got[row, :, :held] - want[row, :, :held]).max())
    return worst


@pytest.mark.slow
def test_the_cache_holds_the_true_hidden_states_and_drafting_is_what_training_iterates():
    """After prefill in chunks, and after steps that kept several drafts of a tree."""
    run = heads.Stepped(TREE, PARAMS, steps=5)
    assert cache_error(run) < 1e-4
    for state in run.states:
        proposal, rows = propose(state), run.rows(state)
        drafts, valid = np.asarray(proposal.tokens), np.asarray(proposal.valid)
        chosen = iterate(heads.padded([np.concatenate(both) for both in zip(rows, drafts, strict=True)]))
        for row, tokens in enumerate(rows):
            if len(tokens) == 1 or bool(state.seq.done[row]):
                assert not valid[row].any()
            else:
                got = [int(chosen[s][row, len(tokens) - 1 + s]) for s in range(CHAIN.depth)]
                assert got == drafts[row].tolist(), row


@pytest.mark.slow
def test_a_planted_bug_is_seen():
    assert cache_error(heads.Stepped(FromTheRoot(HEAD, heads.STEP, depth=3, branches=3, nodes=8), PARAMS, 5)) > 1e-2


def test_the_output_begins_as_the_targets_twice():
    """`[W; W]` on the concatenation is W on the sum, which is the tied form."""
    own = dataclasses.replace(HEAD, own_output=True)
    hidden, state = jax.random.normal(jax.random.key(0), (2, 3, heads.D))
    matrix = heads.PARAMS["embedding"].T
    want = (hidden + state) @ matrix
    for head in (HEAD, own):
        got = head.logits(head.init(jax.random.key(0), matrix), hidden, state, heads.STEP, heads.PARAMS)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "drafter", [pytest.param(TREE, id="tree", marks=pytest.mark.slow), pytest.param(CHAIN, id="chain")]
)
def test_greedy_output_is_plain_output(drafter):
    run = checks.Greedy(drafter, PARAMS, model=heads.STEP, params=heads.PARAMS)
    if drafter is TREE:
        run.check()
    else:
        assert run.check_lengths() > 0


@pytest.mark.slow
@pytest.mark.parametrize("branches", [1, 2], ids=["chain", "tree"])
def test_sampled_output_follows_the_targets_law(branches):
    checks.check_law(Chimera(LAW_HEAD, heads.Table(), depth=2, branches=branches, nodes=5), LAW_PARAMS)
