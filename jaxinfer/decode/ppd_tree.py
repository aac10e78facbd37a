"""PPD's dynamic sparse tree: which guesses, and which prompt slots below them, a step of a given size should score.

Chen et al. 2024 (arXiv:2405.18628). A step of state k knows the guesses of k prompt slots; its tree holds guesses of up
to k levels and, below each, prompt slots that will guess from there. Where the accepted path ends decides the next
state, so trees for all states make a Markov chain; its stationary law weighs their expected tokens: `rate`. As in the
paper a guess's chance is its acceptance by depth and rank, chances multiply along a path, guesses come best first, and
prompt slots go where they are worth most.

Departures. How many of the slots are guesses is tried for every count and every state, and what a prompt slot is worth
is the chain's own relative value (value iteration on the mean tokens a step), where the paper enumerates a few counts
and prunes from three prompt slots everywhere. A node may have no prompt slot, so there is a state 0, as before the
first step. On tiny sizes the result is within 1 % of the best of all trees (tested against every choice).

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Iterable

import numpy as np

from jaxinfer.errors import ConfigError

ROUNDS = 30  # of value iteration; the trees stand still after five to ten
Acceptance = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class SparseTree:
    """A step's slots. Node 0 is the root; node j has `parent[j - 1]`, a node before it, and is guess number
    `rank[j - 1]` of its level; `probes[j]` prompt slots stand below node j (the root's come first)."""

    parent: tuple[int, ...] = ()
    rank: tuple[int, ...] = ()
    probes: tuple[int, ...] = (0,)

    def __post_init__(self):
        n = len(self.parent)
        if len(self.rank) != n or len(self.probes) != n + 1:
            raise ConfigError(f"a tree of {n} guesses: got {len(self.rank)} ranks and {len(self.probes)} probe counts")
        if any(not 0 <= parent <= j for j, parent in enumerate(self.parent)):
            raise ConfigError(f"parent: got {self.parent}, accepts nodes before the guess itself")
        if len(set(zip(self.parent, self.rank, strict=True))) < n or min((0, *self.rank, *self.probes)) < 0:
            raise ConfigError(f"rank: got {self.rank} under {self.parent}, accepts distinct ranks of 0 or more")

    @property
    def level(self) -> tuple[int, ...]:
        """Depth of each node, the root's 0 included."""
        level = [0]
        for parent in self.parent:
            level.append(level[parent] + 1)
        return tuple(level)

    def slots(self, copies: int = 1) -> int:
        """Guesses and prompt slots, each prompt token in `copies`."""
        return len(self.parent) + copies * sum(self.probes)


def outcome(tree: SparseTree, acceptance: Acceptance, states: int) -> tuple[float, np.ndarray]:
    """Expected tokens of a step of `tree`, and the law f64[states] of the state after it."""
    chance = _chances(tree.parent, tree.rank, acceptance)
    law = np.zeros(states)
    np.add.at(law, np.asarray(tree.probes), _ends(chance, tree.parent))
    return float(chance.sum()), law


def rate(trees: tuple[SparseTree, ...], acceptance: Acceptance) -> float:
    """Mean tokens a step in the long run, from state 0 on; `trees[k]` is the tree of state k."""
    tokens, law = zip(*(outcome(tree, acceptance, len(trees)) for tree in trees), strict=True)
    lazy = (np.stack(law) + np.eye(len(trees))) / 2  # the same stationary law, and no period
    return float(np.linalg.matrix_power(lazy, 1 << 20)[0] @ np.asarray(tokens))


@functools.cache
def choose_trees(acceptance: Acceptance, slots: int, copies: int = 1) -> tuple[SparseTree, ...]:
    """Trees of at most `slots` slots for the states 0 to `len(acceptance)`: as many tokens a step as can be found.

    `acceptance[d][r]`: the chance that guess r of depth d + 1 is right. `copies`: slots that a prompt token takes.
    """
    check_acceptance(acceptance)
    if slots < 1 or copies < 1:
        raise ConfigError(f"slots: got {slots} with copies {copies}, accepts 1 or more of each")
    states = len(acceptance) + 1
    guesses = [_best_first(acceptance[:k], slots) for k in range(states)]
    worth, best, found = np.zeros(states), (), 0.0
    for _ in range(ROUNDS):
        # The first round sees tokens of one step alone, so a gain without worth still leaves the prompt slots in.
        trees = tuple(_best_tree(*paths, worth, slots, copies) for paths in guesses)
        if (tokens := rate(trees, acceptance)) > found:
            best, found = trees, tokens
        outcomes = [outcome(tree, acceptance, states) for tree in trees]
        new = np.array([tokens + law @ worth for tokens, law in outcomes])
        worth = (worth + new - new[0]) / 2
    return best


def best_slots(
    acceptance: Acceptance, seconds: Callable[[int], float], sizes: Iterable[int], copies: int = 1
) -> tuple[int, float]:
    """The size of `sizes` with the most tokens a second, and its predicted speed-up over plain decoding; (0, 1.0) where
    none gains. `seconds(n)`: of a forward over n slots, such as `measure.LatencyCurve`."""
    found = 0, 1.0
    for size in sorted(set(sizes)):
        gain = rate(choose_trees(acceptance, size, copies), acceptance) * seconds(1) / seconds(size + 1)
        found = max(found, (size, gain), key=lambda pair: pair[1])
    return found


def check_acceptance(acceptance: Acceptance) -> None:
    """Raise ConfigError for a table that is no table of chances."""
    rows = [np.asarray(row, float) for row in acceptance]
    if not rows or any(row.ndim != 1 or not row.size or (row < 0).any() or row.sum() > 1.001 for row in rows):
        raise ConfigError(f"acceptance: got {acceptance}, accepts a row of chances, of sum 1 at most, for each depth")


def _chances(parent: tuple[int, ...], rank: tuple[int, ...], acceptance: Acceptance) -> np.ndarray:
    """The chance of each node to be accepted: 1 for the root."""
    chance, level = [1.0], [0]
    for above, own in zip(parent, rank, strict=True):
        chance.append(chance[above] * acceptance[level[above]][own])
        level.append(level[above] + 1)
    return np.asarray(chance)


def _ends(chance: np.ndarray, parent: tuple[int, ...]) -> np.ndarray:
    """The chance of each node to be the last one accepted."""
    ends = chance.copy()
    np.subtract.at(ends, np.asarray(parent, int), chance[1:])
    return np.maximum(ends, 0.0)


def _best_first(acceptance: Acceptance, count: int) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray]:
    """The `count` likeliest guesses: their parents, ranks, and the chances of the root and of each."""
    parent, rank, chance, level = [], [], [1.0], [0]
    waiting: list[tuple[float, int, int]] = []  # (-chance, node above, rank)

    def offer(above: int, own: int) -> None:
        if level[above] < len(acceptance) and own < len(acceptance[level[above]]):
            heapq.heappush(waiting, (-chance[above] * ordered[level[above]][own][0], above, own))

    ordered = [sorted(((a, -r) for r, a in enumerate(row)), reverse=True) for row in acceptance]
    offer(0, 0)
    while waiting and len(parent) < count:
        minus, above, own = heapq.heappop(waiting)
        if not minus:
            break
        parent.append(above)
        rank.append(-ordered[level[above]][own][1])
        chance.append(-minus)
        level.append(level[above] + 1)
        offer(above, own + 1)
        offer(len(parent), 0)
    return tuple(parent), tuple(rank), np.asarray(chance)


def _best_tree(parent, rank, chance: np.ndarray, worth: np.ndarray, slots: int, copies: int) -> SparseTree:
    """The first so many guesses and the prompt slots below them with the most tokens, now and by `worth` of states."""
    gain = np.minimum.accumulate(np.diff(worth))  # of one more prompt slot; an order that fills a node from the first
    best, tree = -np.inf, SparseTree()
    for n in range(min(len(parent), slots) + 1):
        ends = _ends(chance[: n + 1], parent[:n])
        gains = ends[:, None] * gain[None]
        order = np.argsort(-gains, axis=None, kind="stable")[: (slots - n) // copies]
        kept = np.zeros(gains.size, bool)
        kept[order] = gains.reshape(-1)[order] >= 0
        probes = kept.reshape(gains.shape).sum(1)
        tokens = chance[: n + 1].sum() + ends @ worth[probes]
        if tokens > best:
            best, tree = tokens, SparseTree(parent[:n], rank[:n], tuple(int(x) for x in probes))
    return tree
