"""PPD's dynamic sparse tree: what a tree is worth, and that the chosen ones are the best there are."""

import itertools

import numpy as np
import pytest

from jaxinfer.decode.ppd_tree import SparseTree, best_slots, choose_trees, outcome, rate
from jaxinfer.errors import ConfigError
from jaxinfer.measure import LatencyCurve

ACCEPTANCE = ((0.5, 0.2), (0.4, 0.1))


def guess_sets(levels, ranks, most):
    """Every set of at most `most` guesses that holds each guess's parent, once."""

    def grow(parent, rank, level):
        yield parent, rank
        last = (parent[-1], rank[-1]) if parent else (-1, -1)
        for above, own in itertools.product(range(len(level)), range(ranks)):
            if len(parent) < most and level[above] < levels and (above, own) > last:
                yield from grow((*parent, above), (*rank, own), (*level, level[above] + 1))

    return list(grow((), (), (0,)))


def every_tree(levels, ranks, slots, prompts):
    for parent, rank in guess_sets(levels, ranks, slots):
        for probes in itertools.product(range(prompts + 1), repeat=len(parent) + 1):
            if len(parent) + sum(probes) <= slots:
                yield SparseTree(parent, rank, probes)


def best_rate(acceptance, slots):
    """The most tokens a step of all choices of trees for two prompt tokens."""
    trees = [every_tree(known, 2, slots, 2) for known in range(3)]
    tokens, laws = [], []
    for choice in itertools.product(*([outcome(tree, acceptance, 3) for tree in each] for each in trees)):
        tokens.append([t for t, _ in choice])
        laws.append([law for _, law in choice])
    lazy = (np.asarray(laws) + np.eye(3)) / 2
    for _ in range(12):
        lazy = lazy @ lazy
    return float((lazy[:, 0] * np.asarray(tokens)).sum(1).max())


@pytest.fixture(scope="module")
def tables():
    """Tables of two guesses at two depths, the better one in front, and the best rate for 2 and 3 slots."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(5):
        rows = -np.sort(-rng.dirichlet([1.0, 0.6, 0.5], 2)[:, :2])
        table = tuple(tuple(map(float, row)) for row in rows)
        found += [(table, slots, best_rate(table, slots)) for slots in (2, 3)]
    return found


def test_a_tree_by_hand():
    tree = SparseTree(parent=(0, 0, 1), rank=(0, 1, 0), probes=(1, 2, 0, 0))
    tokens, law = outcome(tree, ACCEPTANCE, 3)
    assert tree.level == (0, 1, 1, 2) and tree.slots() == 6 and tree.slots(copies=2) == 9
    assert tokens == pytest.approx(1 + 0.5 + 0.2 + 0.5 * 0.4)
    np.testing.assert_allclose(law, [0.2 + 0.2, 0.3, 0.3])  # ends: root 0.3, guesses 0.3, 0.2 and 0.2


def test_the_rate_of_a_chain_by_hand():
    one = SparseTree(parent=(0,), rank=(0,), probes=(1, 0))  # from state 1: stays with 0.5, else without guesses
    trees = (SparseTree(probes=(1,)), one, one)
    assert rate(trees, ACCEPTANCE) == pytest.approx(2 / 3 * 1.5 + 1 / 3 * 1.0)
    assert rate((SparseTree(), one, one), ACCEPTANCE) == pytest.approx(1.0)  # never a guess


def test_chosen_trees_are_the_best_of_all(tables):
    for acceptance, slots, best in tables:
        trees = choose_trees(acceptance, slots)
        assert max(tree.slots() for tree in trees) <= slots
        assert rate(trees, acceptance) == pytest.approx(best, rel=1e-6)


def test_a_choice_for_one_step_alone_is_seen(tables):
    """Planted: the trees with the most tokens in the next step, which leave few prompt slots."""
    short = []
    for acceptance, slots, best in tables:
        trees = [max(every_tree(k, 2, slots, 2), key=lambda tree: outcome(tree, acceptance, 3)[0]) for k in range(3)]
        short.append(rate(tuple(trees), acceptance) / best)
    assert min(short) < 0.9


def test_more_slots_are_worth_more_and_copies_cost():
    rates = [rate(choose_trees(ACCEPTANCE, slots), ACCEPTANCE) for slots in (1, 2, 4, 8, 12)]
    assert rates[0] == pytest.approx(1.25)  # a prompt slot and a guess by turns: 1 and 1.5 tokens
    assert all(a < b for a, b in itertools.pairwise(rates))
    twice = choose_trees(ACCEPTANCE, 8, copies=2)
    assert max(tree.slots(2) for tree in twice) <= 8
    assert rate(twice, ACCEPTANCE) < rates[3]


def test_the_size_follows_the_machine():
    free = LatencyCurve((1, 64), (1.0, 1.0))
    assert best_slots(ACCEPTANCE, free, (2, 4, 12))[0] == 12
    half = LatencyCurve((1, 4, 64), (1.0, 1.0, 30.0))
    size, gain = best_slots(ACCEPTANCE, half, (2, 3, 4, 12))
    assert size == 3 and gain == pytest.approx(rate(choose_trees(ACCEPTANCE, 3), ACCEPTANCE))
    costly = LatencyCurve((1, 2), (1.0, 2.0))
    assert best_slots(ACCEPTANCE, costly, (2, 4, 12)) == (0, 1.0)


def test_impossible_tables_and_trees_are_refused():
    with pytest.raises(ConfigError, match="acceptance: got .* sum 1 at most"):
        choose_trees(((0.9, 0.2),), 4)
    with pytest.raises(ConfigError, match="slots: got 0"):
        choose_trees(ACCEPTANCE, 0)
    with pytest.raises(ConfigError, match="distinct ranks"):
        SparseTree((0, 0), (1, 1), (0, 0, 0))
    with pytest.raises(ConfigError, match="before the guess itself"):
        SparseTree((2, 0), (0, 0), (0, 0, 0))
