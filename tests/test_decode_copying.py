"""Drafters that copy from the row itself: what they find, and that they change no output."""

import jax
import numpy as np
import pytest

from jaxinfer.decode import CopySpec, PromptLookup, ngrams
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks
from tests import toy

DRAFTERS = {"copyspec": CopySpec(gamma=2, copies=4), "prompt-lookup": PromptLookup(ngram=3, drafts=4)}


def drafts(drafter, *rows):
    """What the drafter proposes for each row, as lists."""
    proposal, _ = drafter.propose(None, (), toy.sequence(*rows), None, None, target_params=None, warp=None)
    return [t[v].tolist() for t, v in zip(np.asarray(proposal.tokens), np.asarray(proposal.valid), strict=True)]


def test_the_first_earlier_occurrence_is_found_and_never_the_suffix_itself():
    seq = toy.sequence([1, 2, 3, 1, 2, 4, 1, 2], [1, 1, 1, 1], [5, 6, 7], [1, 2], [9, 9])
    np.testing.assert_array_equal(ngrams.find(seq, 2), [0, 0, 16, 16, 16])
    np.testing.assert_array_equal(ngrams.find(seq, 1), [1, 0, 16, 16, 0])
    np.testing.assert_array_equal(ngrams.find(toy.sequence([1, 2], [3]), 5), [16, 16])


def test_find_against_a_plain_search():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, rng.integers(1, 17)).tolist() for _ in range(200)]
    for n in (1, 2, 3):
        found = np.asarray(jax.jit(ngrams.find, static_argnums=1)(toy.sequence(*rows), n))
        for row, got in zip(rows, found, strict=True):
            want = next((i for i in range(len(row) - n) if row[i : i + n] == row[-n:]), 16) if len(row) > n else 16
            assert got == want, (row, n)


def test_copies_stop_where_the_row_stops():
    assert drafts(CopySpec(2, 3), [1, 2, 3, 4, 5, 1, 2], [1, 2, 3, 1, 2], [4, 4, 4], [1, 2, 3]) == [
        [3, 4, 5], [3, 1, 2], [4], [],
    ]  # fmt: skip


def test_prompt_lookup_prefers_the_longest_match():
    row = [7, 2, 5, 1, 2, 3, 6, 1, 2, 3]
    assert drafts(PromptLookup(3, 2), row) == [[6, 1]]
    assert drafts(PromptLookup(1, 2), [3, 8, *row]) == [[8, 7]]
    assert drafts(PromptLookup(3, 2), [3, 8, 2, 3]) == [[8, 2]]


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_output_is_plain_output(name):
    checks.Greedy(DRAFTERS[name]).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_sampled_output_follows_the_targets_law(name):
    checks.check_law(DRAFTERS[name])


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="gamma: got 0, accepts 1 or more"):
        CopySpec(gamma=0)
    with pytest.raises(ConfigError, match="drafts: got 0, accepts 1 or more"):
        PromptLookup(drafts=0)


def test_a_search_runs_under_jit_with_a_traced_length():
    assert jax.jit(lambda s: ngrams.find(s, 2))(toy.sequence([1, 2, 1, 2])).tolist() == [0]
