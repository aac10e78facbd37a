"""Token Recycling: the fixed tree, what is learned from scored slots, and that no output changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import quant
from jaxinfer.decode import Autoregressive, Config, TokenRecycling
from jaxinfer.decode.token_recycling import NODES_BY_DEPTH, last_of_each, template
from jaxinfer.decode.types import Proposal, Scored
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, Step
from tests import drafter_checks as checks
from tests import toy

V = 20


@dataclasses.dataclass(frozen=True)
class FirstWins(TokenRecycling):
    """Planted: of several slots with one token the first counts."""

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache):
        flipped = Scored(scored.tokens[:, ::-1], scored.logits[:, ::-1], None)
        valid = jnp.concatenate([proposal.valid, jnp.ones_like(proposal.valid[:, :1])], 1)[:, ::-1]
        # The base takes slot 0 for the root: put the root's turn last.
        proposal = dataclasses.replace(proposal, valid=valid[:, 1:])
        return super().observe(params, state, seq, proposal, flipped, verdict, n, cache)


@dataclasses.dataclass(frozen=True)
class LearnsFromRejects(TokenRecycling):
    """Planted: slots that were not scored teach too."""

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache):
        proposal = dataclasses.replace(proposal, valid=jnp.ones_like(proposal.valid))
        return super().observe(params, state, seq, proposal, scored, verdict, n, cache)


def test_the_tree_is_the_papers():
    tree = template(80)
    assert tuple(np.bincount(tree.level)) == NODES_BY_DEPTH
    slots = [(), *_paths(tree)]
    assert len(set(slots)) == 81
    for depth, count in enumerate(NODES_BY_DEPTH, 1):
        sums = [sum(path) for path in slots if len(path) == depth]
        # No node that was left out has a smaller sum of ranks than one that is in.
        fewer = sum(1 for path in np.ndindex(*[max(sums)] * depth) if sum(path) < max(sums)) if max(sums) else 0
        assert len([s for s in sums if s < max(sums)]) == fewer and len(sums) == count


@pytest.mark.parametrize("nodes", [1, 8, 30, 80])
def test_every_tree_has_its_parents_first(nodes):
    tree = template(nodes)
    assert len(tree.parent) == nodes and (tree.parent <= np.arange(nodes)).all()
    assert set(_paths(tree)) <= set(_paths(template(80)))


def _paths(tree):
    paths = [()]
    for parent, rank in zip(tree.parent, tree.rank, strict=True):
        paths.append((*paths[parent], int(rank)))
    return paths[1:]


def test_drafts_walk_the_matrix():
    rng = np.random.default_rng(0)
    matrix = rng.integers(-1, V, (2, V, 8)).astype(np.int32)
    drafter = TokenRecycling()
    propose = jax.jit(functools.partial(drafter.propose, None, target_params=None, warp=None))
    proposal, _ = jax.tree.map(np.asarray, propose(jnp.asarray(matrix), toy.sequence([3, 4], [5]), None, None))
    for row, root in enumerate((4, 5)):
        for j, path in enumerate(_paths(template(80))):
            token = root
            for rank in path:
                token = -1 if token < 0 else matrix[row, token, rank]
            assert bool(proposal.valid[row, j]) == (token >= 0)
            assert token < 0 or int(proposal.tokens[row, j]) == token


def learned(drafter, seed=0, rows=3):
    """(the matrix after one step of random slots, the matrix by the rule as written)."""
    rng = np.random.default_rng(seed)
    n, slots = drafter.width, drafter.width + 1
    tokens = rng.integers(0, V, (rows, slots)).astype(np.int32)
    logits = rng.normal(size=(rows, slots, V)).astype(np.float32)
    valid = rng.random((rows, n)) < 0.7
    before = rng.integers(-1, V, (rows, V, 8)).astype(np.int32)
    emitted = np.array([2, 0, 1], np.int32)  # the second row is done
    want = before.copy()
    for row in range(rows):
        for slot in range(slots):
            if emitted[row] and (slot == 0 or valid[row, slot - 1]):
                want[row, tokens[row, slot]] = np.argsort(-logits[row, slot])[:8]
    proposal = Proposal(jnp.asarray(tokens[:, 1:]), jnp.zeros((rows, n), jnp.int32), jnp.asarray(valid), depth=1)
    scored = Scored(jnp.asarray(tokens), jnp.asarray(logits), None)
    got = jax.jit(drafter.observe)(
        None, jnp.asarray(before), toy.sequence([1], [1], [1]), proposal, scored, None, jnp.asarray(emitted), None
    )
    return np.asarray(got), want


def test_every_scored_slot_teaches_and_the_last_one_counts():
    np.testing.assert_array_equal(*learned(TokenRecycling(nodes=30)))


@pytest.mark.parametrize("bug", [FirstWins(30), LearnsFromRejects(30)], ids=["first wins", "unscored slots"])
def test_planted_bugs_are_seen(bug):
    got, want = learned(bug)
    assert (got != want).any()


def test_the_last_live_slot_of_each_token():
    tokens = jnp.array([[4, 5, 4, 5, 4]])
    live = jnp.array([[True, True, True, True, False]])
    assert last_of_each(tokens, live).tolist() == [[False, False, True, True, False]]


def test_the_prompts_followers_latest_first():
    seq = toy.sequence([1, 2, 1, 3, 1, 2], [7], [5, 5, 5], vocab_size=V)
    matrix = np.asarray(TokenRecycling(prompt=True).init(None, None, seq, None))
    assert matrix[0, 1].tolist() == [2, 3, *[-1] * 6]
    assert matrix[0, 2].tolist() == [1, *[-1] * 7] and matrix[0, 3].tolist() == [1, *[-1] * 7]
    assert (matrix[1] == -1).all()
    assert matrix[2, 5].tolist() == [5, *[-1] * 7]
    many = toy.sequence([x for i in range(10) for x in (0, i + 1)], size=20, vocab_size=V)
    assert np.asarray(TokenRecycling(prompt=True).init(None, None, many, None))[0, 0].tolist() == [*range(10, 2, -1)]


def test_greedy_output_is_plain_output():
    checks.Greedy(TokenRecycling(prompt=True)).check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    checks.check_law(TokenRecycling(nodes=6, prompt=True))


@pytest.mark.slow
def test_a_tree_over_rings_and_quantized_weights_changes_nothing():
    config = ModelConfig(
        vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=32,
        max_length=64, windows=(6,),
    )  # fmt: skip
    step = Step(config)
    weights = quant.apply(jax.jit(step.init)(jax.random.key(1)), [(r".*(mlp|attention).*", quant.Int8())])
    tokens, lengths = toy.prompts(3, 3, 10, V, lengths=[1, 10, 6])
    plain, tree = (
        toy.outputs(toy.Run(step, Config(max_tokens=16, eos=(), drafter=drafter))(weights, tokens, lengths))
        for drafter in (Autoregressive(), TokenRecycling(nodes=24))
    )
    assert tree == plain


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="nodes: got 81, accepts 1 to 80"):
        TokenRecycling(nodes=81)
    with pytest.raises(ConfigError, match="vocab_size"):
        TokenRecycling().init(None, None, toy.sequence([1]), None)
