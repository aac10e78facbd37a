"""Sampling with drafts follows the target's law: chi-square against every sequence enumerated, and planted bugs.

The target and the draft are Markov tables over five tokens. Sequences of four tokens are longer than a block of two
drafts and their bonus, so what follows a bonus is tested too. Temperatures, filters, weights, draft lengths and the
planted bug are data: one compiled program serves the whole file.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import decode
from jaxinfer.decode import Config, Features, Sampling, keys
from jaxinfer.decode.draw import draw, first_max
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.verify import Chain
from tests import toy

V, L, ROWS, END = 5, 4, 24_000, 4
MODEL = toy.Markov(V)
TARGET, DRAFT = MODEL.params(0), MODEL.params(1)
TARGET, DRAFT = TARGET, {"table": TARGET["table"] + 0.7 * DRAFT["table"]}  # related: about four in five accepted
PROMPT = np.array([2, 0, 3])
MIXED = np.arange(24_000, dtype=np.int32) // 2 % 4  # a draft length for each row
LENGTHS = np.where(np.arange(ROWS) % 2, 3, 1)  # two groups of rows, at different positions of the tables
BUGS = {
    "residual from p": 1, "residual |p - q|": 2, "residual of the next position": 3, "bonus from q": 4,
    "argmax draft reported as its softmax": 5, "the draft's uniform decides acceptance": 6, "accepts one too many": 7,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Planted(Chain):
    """The shipped verifier's verdict where `bug` is 0, and deliberately wrong ones."""

    bug: jax.Array | int = 0

    def verify(self, law, proposal, key):
        good = super().verify(law, proposal, key)
        n, rows = good.n_accepted, jnp.arange(law.shape[0])
        width = proposal.valid.sum(1)
        p, q = jnp.exp(law), jnp.exp(proposal.q_logp)
        p_n, q_n, p_after = p[rows, n], q[rows, jnp.minimum(n, width - 1)], p[rows, jnp.minimum(n + 1, width)]
        residual = jnp.maximum(p_n - q_n, 0)
        wrong = [residual, p_n, jnp.abs(p_n - q_n), jnp.maximum(p_after - q_n, 0)]
        rejected = n < width
        weights = jnp.where(rejected[:, None], jnp.select([self.bug == i for i in range(4)], wrong, residual), p_n)
        bonus = jnp.where(self.bug == 4, q[rows, width], p_n)  # the draft was run one further for this
        weights = jnp.where(rejected[:, None], weights, bonus)
        weights = jnp.where(weights.sum(-1, keepdims=True) > 0, weights, p_n)
        which = jnp.where(rejected, int(Stream.RESIDUAL), int(Stream.BONUS))
        token = draw(weights, keys.slot(keys.stream(key, which), n))
        bad = dataclasses.replace(good, next_token=token)
        # The uniform that drew the draft (its place within its block of the vocabulary) accepts it too.
        u = keys.uniforms(keys.slots(keys.stream(key, Stream.DRAFT), proposal.tokens.shape[1]), 2)[..., 1]
        p_d, q_d = (
            jnp.take_along_axis(x[:, :-1] if x is p else x, proposal.tokens[..., None], 2)[..., 0] for x in (p, q)
        )
        shared = jnp.cumprod(proposal.valid & (u * q_d < p_d), 1).sum(1)
        n_shared = jnp.where(self.bug == 6, shared, jnp.where(self.bug == 7, jnp.minimum(n + 1, width), n))
        index = jnp.arange(p.shape[1])[None]
        bad = dataclasses.replace(
            bad, n_accepted=n_shared, path=jnp.where(index <= n_shared[:, None], index, -1),
            next_token=jnp.where(self.bug == 6, draw(p[rows, shared], keys.slot(keys.stream(key, 3), n)), token),
        )  # fmt: skip
        return jax.tree.map(lambda a, b: jnp.where(self.bug == 0, a, b), good, bad)


@dataclasses.dataclass(frozen=True)
class PlantedDraft(decode.DraftModel):
    """Bug 5: drafts the argmax of the law that it reports."""

    bug: jax.Array | int = 0

    def propose(self, *args, **kwargs):
        proposal, state = super().propose(*args, **kwargs)
        first = proposal.tokens.at[:, 0].set(first_max(proposal.q_logp[:, 0])[1])
        only = proposal.valid & (jnp.arange(self.gamma) < 1)
        wrong = self.bug == 5
        tokens, valid = jnp.where(wrong, first, proposal.tokens), jnp.where(wrong, only, proposal.valid)
        return dataclasses.replace(proposal, tokens=tokens, valid=valid), state


@functools.cache
def program():
    features = dataclasses.replace(Features.everything(), forced=False, bias=False, min_tokens=False, penalties=False)

    @jax.jit
    def run(target, draft, sampling, bug, gamma, seed):
        config = Config(
            max_tokens=L, features=features, verifier=Planted(bug=bug), drafter=PlantedDraft(MODEL, 3, bug=bug)
        )
        tokens = jnp.broadcast_to(jnp.asarray(PROMPT, jnp.int32), (ROWS, 3))
        arguments = dict(config=config, draft_params=draft)
        state = decode.begin(
            MODEL, target, tokens, jnp.asarray(LENGTHS), key=jax.random.key(seed), sampling=sampling, **arguments
        )
        state = dataclasses.replace(state, drafter=dataclasses.replace(state.drafter, gamma=gamma))
        return decode.result(decode.advance(MODEL, target, state, steps=L + 1, **arguments), config)

    return run


def sample(*, target=TARGET, draft=DRAFT, bug=0, gamma=2, seed=0, eos=-1, **filters):
    gamma = np.broadcast_to(np.asarray(gamma, np.int32), ROWS)
    return program()(target, draft, Sampling.make(ROWS, eos=[eos], max_tokens=L, **filters), bug, gamma, seed)


def law_after(length, *, eos=-1, **filters):
    """The exact law of L tokens after a prompt of `length`; an end token is followed by the pad id V."""
    table = np.asarray(TARGET["table"])
    rows = np.stack([[toy.law_of(x, **filters) for x in level] for level in table])

    def next_law(prefix):
        if eos in prefix:
            return np.eye(V + 1)[V]
        last = prefix[-1] if prefix else PROMPT[length - 1]
        return np.append(rows[(length - 1 + len(prefix)) % MODEL.period, last], 0)

    return toy.sequence_law(next_law, L)


def z_scores(result, **law):
    """Chi-square z of the two groups of rows."""
    tokens, n = np.asarray(result.tokens), np.asarray(result.lengths)
    tokens = np.where(np.arange(L) < n[:, None], tokens, V)
    return [toy.chi_square(tokens[length == LENGTHS], law_after(length, **law))[0] for length in (1, 3)]


CASES = [
    dict(), dict(temperature=0.7), dict(temperature=1.5), dict(top_k=3), dict(top_p=0.8), dict(min_p=0.1),
    dict(temperature=1.3, top_k=4, top_p=0.9, min_p=0.05),
]  # fmt: skip


@pytest.mark.parametrize("filters", CASES, ids=str)
def test_output_follows_the_targets_law(filters):
    filters = {"temperature": 1.0, **filters}
    assert max(z_scores(sample(gamma=MIXED, **filters), **filters)) < 5


@pytest.mark.parametrize("gamma", [0, 1, 2, 3])
def test_output_follows_the_law_at_each_draft_length(gamma):
    """With an end token in the vocabulary."""
    result = sample(gamma=gamma, seed=gamma, eos=END, temperature=1.0)
    assert max(z_scores(result, eos=END)) < 5
    assert len(np.unique(np.asarray(result.lengths))) == L


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_seen(name):
    """The same test, on the same number of samples, rejects every one of them."""
    gamma = 1 if "bonus" in name else 2
    assert max(z_scores(sample(bug=BUGS[name], gamma=gamma, temperature=1.0))) > 12


def test_acceptance_is_the_overlap_of_the_laws():
    """With tables of one row the acceptance is sum(min(p, q)) at every depth, and the tokens a forward follow it."""
    flat = {"table": jnp.broadcast_to(TARGET["table"][:1, 2:3], TARGET["table"].shape)}
    other = {"table": jnp.broadcast_to(DRAFT["table"][:1, 2:3], TARGET["table"].shape)}
    p, q = (toy.law_of(np.asarray(x["table"])[0, 0]) for x in (flat, other))
    alpha = np.minimum(p, q).sum()
    result = sample(target=flat, draft=other, gamma=3, temperature=1.0)
    stats = result.stats
    offered = np.asarray(stats.proposed_by_depth).sum(0)
    rate = np.asarray(stats.acceptance_by_depth)
    taken = np.asarray(stats.accepted_by_depth).sum(0)
    for depth in range(3):
        reached = offered[0] if depth == 0 else taken[depth - 1] * offered[depth] / offered[depth - 1]
        sigma = np.sqrt(alpha * (1 - alpha) / reached)
        assert abs(taken[depth] / reached - alpha) < 6 * sigma + 0.02 * (depth > 0)
    assert 0.3 < alpha < 0.9 and abs(rate[0] - alpha) < 6 * np.sqrt(alpha / offered[0])
    assert float(stats.tokens_per_forward) == pytest.approx(int(result.lengths.sum()) / int(stats.forwards.sum()))


def test_twins_accept_everything():
    result = sample(draft=TARGET, gamma=3, temperature=1.0)
    assert float(result.stats.acceptance_by_depth.min()) == 1.0
    assert (result.stats.forwards == 1).all()


@pytest.mark.slow
def test_output_follows_the_targets_law_with_many_samples():
    """A million samples: what a bias of 0.4 % would show."""
    results = [sample(seed=100 + i, temperature=1.0) for i in range(42)]
    tokens = np.concatenate([np.asarray(result.tokens) for result in results])
    lengths = np.tile(LENGTHS, len(results))
    for length in (1, 3):
        assert toy.chi_square(tokens[lengths == length], law_after(length))[0] < 5
