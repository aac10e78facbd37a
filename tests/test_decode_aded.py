"""ADED: what the tri-gram table learns, which tree it gives, and that no output changes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import ADED
from jaxinfer.decode.aded import Table, bucket, table_of
from jaxinfer.decode.tree import slots_of
from jaxinfer.decode.types import Verdict
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks
from tests import toy

V = 6
ROOMY = ADED(buckets=2**12)


@dataclasses.dataclass(frozen=True)
class CountsAgain(ADED):
    """Planted: the published update, which adds the last tri-grams anew in every step."""

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache):
        again = jnp.where(n > 0, jnp.minimum(seq.length - 2, self.depth + 1), 0)
        return super().observe(params, state, seq, proposal, scored, verdict, again, cache)


class Plain:
    """The table as a dictionary of dictionaries, in order of insertion, by the rules as written."""

    def __init__(self, drafter):
        self.drafter, self.table = drafter, {}

    def learn(self, gram):
        weights = self.table.setdefault(gram[:2], {})
        d = self.drafter
        if gram[2] in weights:
            weights[gram[2]] = min(weights[gram[2]] + d.gain, d.cap)
            return
        if len(weights) == d.candidates:
            del weights[min(weights, key=weights.get)]
        weights[gram[2]] = d.gain


def contents(table, row=0):
    """The followers of each context of one row's Table."""
    found = {}
    for context, tokens, weights in zip(*(np.asarray(x)[row] for x in jax.tree.leaves(table)), strict=True):
        if context[0] >= 0:
            found[tuple(context.tolist())] = {int(t): float(w) for t, w in zip(tokens, weights, strict=True) if w > 0}
    return found


def learned(drafter, steps, prompt=6, seed=0):
    """The table's contents after a prompt and several steps of 1 to depth + 1 tokens, and the dictionary's."""
    rng = np.random.default_rng(seed)
    row = rng.integers(0, V, prompt).tolist()
    plain = Plain(drafter)
    state = drafter.init(None, None, toy.sequence(row, size=64, prompt=prompt), None)
    observe = jax.jit(drafter.observe)
    for n in steps:
        row += rng.integers(0, V, n).tolist()
        seq = toy.sequence(row, size=64, prompt=prompt)
        zeros = jnp.zeros(1, jnp.int32)
        state = observe(None, state, seq, None, None, Verdict(zeros, zeros, zeros, zeros), jnp.asarray([n]), None)
    for gram in zip(row, row[1:], row[2:], strict=False):
        plain.learn(gram)
    return contents(state), plain.table


def agree(found, want):
    return found.keys() == want.keys() and all(found[c] == pytest.approx(want[c]) for c in want)


STEPS = [1, 5, 2, 3, 4, 5, 5, 1, 2]


@pytest.mark.parametrize("drafter", [ROOMY, ADED(candidates=2, cap=0.5)], ids=["roomy", "pruned and capped"])
def test_each_tri_gram_counts_once(drafter):
    assert agree(*learned(drafter, STEPS))


def test_planted_bugs_are_seen():
    assert not agree(*learned(CountsAgain(), STEPS))


def test_a_prompt_is_learned_only_where_asked():
    seq = toy.sequence([1, 2, 3, 1], [4], prompt=4)
    assert contents(ADED().init(None, None, seq, None)) == {(1, 2): {3: 0.25}, (2, 3): {1: 0.25}}
    assert contents(ADED(prompt=False).init(None, None, seq, None)) == {}


def test_a_context_on_an_occupied_bucket_replaces_it():
    size = 8
    pairs = [(a, b) for a in range(9) for b in range(9)]
    at = np.asarray(bucket(jnp.array([p[0] for p in pairs]), jnp.array([p[1] for p in pairs]), size))
    one, two = (pairs[i] for i in np.flatnonzero(at == at[0])[:2])
    table = Table.empty(size, width=3)
    for gram in ((*one, 5), (*two, 6)):
        table = table.learn(jnp.asarray(gram), jnp.array(True), 0.25, 3.0)
    assert contents(jax.tree.map(lambda x: x[None], table)) == {two: {6: 0.25}}
    tokens, weights = table.followers(*(jnp.asarray([x]) for x in one))
    assert not weights.any()


def test_a_corpus_gives_conditional_shares():
    table = table_of([np.array([1, 2, 3, 1, 2, 3, 1, 2, 4]), np.array([7, 7]), np.array([1, 2, 5])], width=2)
    found = contents(jax.tree.map(lambda x: x[None], table))
    assert found[1, 2] == pytest.approx({3: 0.5, 4: 0.25}) or found[1, 2] == pytest.approx({3: 0.5, 5: 0.25})
    assert found[2, 3] == {1: 1.0} and found[3, 1] == {2: 1.0} and len(found) == 3
    assert contents(jax.tree.map(lambda x: x[None], table_of([]))) == {}


def proposed(drafter, corpus, table, seq):
    propose = jax.jit(functools.partial(drafter.propose, target_params=None, warp=None))
    return jax.tree.map(np.asarray, propose(corpus, table, seq, None, None)[0])


def random_tables(seed, drafter):
    """A row's Table of random tri-grams, a corpus's, and their summed weights as a function."""
    rng = np.random.default_rng(seed)
    seq = toy.sequence(rng.integers(0, V, 60).tolist(), size=64)
    own = drafter.init(None, None, seq, None)
    corpus = table_of([rng.integers(0, V, 80)])
    parts = [contents(own), contents(jax.tree.map(lambda x: x[None], corpus))]
    return seq, own, corpus, lambda context, token: sum(p.get(context, {}).get(token, 0.0) for p in parts)


@pytest.mark.parametrize("seed", range(2))
def test_the_tree_holds_the_likeliest_nodes(seed):
    """Against all paths enumerated, with a beam wide enough to lose none."""
    drafter = ADED(nodes=20, depth=3, beams=V**2, exploration=0.2)
    seq, own, corpus, weight = random_tables(seed, drafter)
    score = {}
    last = np.asarray(seq.tokens)[0, :60][-2:].tolist()
    for depth in (1, 2, 3):
        for path in itertools.product(range(V), repeat=depth):
            context = tuple((last + list(path))[-3:-1])
            share = weight(context, path[-1]) / (sum(weight(context, t) for t in range(V)) + 0.2)
            score[path] = score.get(path[:-1], 1.0) * share if depth > 1 else share
    proposal = proposed(drafter, corpus, own, seq)
    parent, tokens, valid = proposal.parent[0], proposal.tokens[0], proposal.valid[0]
    paths = [()]
    for p, t in zip(parent, tokens, strict=True):
        paths.append((*paths[p], int(t)))
    found = {path for path, ok in zip(paths[1:], valid, strict=True) if ok}
    assert len(found) == valid.sum() == 20, "siblings are distinct"
    want = sorted(score, key=score.get, reverse=True)
    least = min(score[path] for path in found)
    assert least == pytest.approx(score[want[19]], rel=1e-5)
    assert all(path in found for path in want if score[path] > least * (1 + 1e-5))
    assert (parent <= np.arange(20)).all()
    assert np.asarray(slots_of(proposal).depth)[0, 1:].tolist() == [len(path) for path in paths[1:]]


def test_a_row_without_a_context_drafts_nothing():
    seq = toy.sequence([3], [1, 2])
    proposal = proposed(ADED(), None, ADED().init(None, None, seq, None), seq)
    assert not proposal.valid.any() and (proposal.parent == 0).all()


def test_exploration_trades_depth_for_width():
    """A follower seen thrice and one seen once; what comes after the first was seen once: deeper, or wider?"""
    table = Table.empty(64, width=3)
    for gram in [(1, 2, 3)] * 3 + [(1, 2, 4), (2, 3, 5)]:
        table = table.learn(jnp.asarray(gram), jnp.array(True), 0.25, 3.0)
    table = jax.tree.map(lambda x: x[None], table)
    for exploration, second in ((0.0, 5), (1.0, 4)):
        proposal = proposed(ADED(nodes=2, depth=2, exploration=exploration), None, table, toy.sequence([1, 2]))
        assert sorted(proposal.tokens[0].tolist()) == [3, second]


def test_greedy_output_is_plain_output():
    corpus = table_of([np.tile([1, 2, 3, 0, 5, 6], 4)], buckets=64)
    checks.Greedy(ADED(nodes=24, beams=8, buckets=64), corpus).check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    checks.check_law(ADED(nodes=5, depth=2, beams=4, candidates=4, buckets=16))


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="beams: got 0"):
        ADED(beams=0)
    with pytest.raises(ConfigError, match="gain: got 4, accepts more than 0, up to cap = 3.0"):
        ADED(gain=4)
    with pytest.raises(ConfigError, match="exploration: got -1"):
        ADED(exploration=-1)
    with pytest.raises(ConfigError, match="draft_params: got dict, accepts None or an aded.Table"):
        ADED().init({}, None, toy.sequence([1]), None)
