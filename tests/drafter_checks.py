"""What every drafter's tests share: one drafter in, its promises out. A drafter's own test file says what is its own.

`Greedy` compiles one program for a drafter and runs it at every draft length, with end tokens and limits at every
offset of a block, beside the plain output. `law` draws many rows and compares them with every sequence enumerated.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode import Config, Features, Sampling
from jaxinfer.decode.drafter import DrafterBase
from jaxinfer.decode.tree import slots_of
from tests import toy

V, BATCH, WIDTH, ANSWER = 7, 4, 24, 20
MODEL = toy.Attentive(V)
PARAMS = MODEL.params(3, scale=0.5)


@dataclasses.dataclass(frozen=True)
class Limited(DrafterBase):
    """The drafter with its drafts cut at a depth a row: `{"own": its params, "limit": i32[B]}`."""

    drafter: object

    @property
    def width(self):
        return self.drafter.width

    @property
    def depth(self):
        return self.drafter.depth

    @property
    def taps(self):
        return self.drafter.taps

    @property
    def verifier(self):
        return self.drafter.verifier

    @property
    def widths(self):
        return self.drafter.widths

    def init(self, params, target_params, seq, cache):
        return self.drafter.init(params["own"], target_params, seq, cache)

    def ready(self, params, state, seq, cache, *, target_params):
        return self.drafter.ready(params["own"], state, seq, cache, target_params=target_params)

    def prefill(self, params, state, chunk, output):
        return self.drafter.prefill(params["own"], state, chunk, output)

    def idle(self, params, state, seq):
        return self.drafter.idle(params["own"], state, seq)

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        proposal, state = self.drafter.propose(
            params["own"], state, seq, cache, key, target_params=target_params, warp=warp
        )
        short = slots_of(proposal).depth[:, 1:] <= params["limit"][:, None]
        return dataclasses.replace(proposal, valid=proposal.valid & short), state

    def observe(self, params, state, *arguments):
        return self.drafter.observe(params["own"], state, *arguments)


def repetitive_prompts(seed=0, batch=BATCH):
    """Ragged prompts of a few repeated phrases, one of a single token: something to copy."""
    rng = np.random.default_rng(seed)
    rows = [np.tile(rng.integers(0, V, rng.integers(2, 6)), WIDTH)[:WIDTH] for _ in range(batch)]
    lengths = np.concatenate([[1], rng.integers(6, WIDTH + 1, batch - 1)]).astype(np.int32)
    return jnp.asarray(np.stack(rows), jnp.int32), jnp.asarray(lengths)


class Greedy:
    """A drafter beside plain greedy decoding, on a model with a real cache."""

    def __init__(self, drafter, draft_params=None, *, model=MODEL, params=PARAMS, verifier=None, seed=0):
        self.model, self.params, self.own = model, params, draft_params
        self.tokens, self.lengths = repetitive_prompts(seed)
        features = Features(min_tokens=False)
        self.config = Config(max_tokens=ANSWER, drafter=Limited(drafter), verifier=verifier, features=features)
        self.run = toy.Run(model, self.config)
        plain = toy.Run(model, Config(max_tokens=ANSWER, features=features))
        self.plain = toy.outputs(plain(params, self.tokens, self.lengths))

    def arguments(self, limit):
        limits = jnp.broadcast_to(jnp.asarray(limit, jnp.int32), BATCH)
        return {"draft_params": {"own": self.own, "limit": limits}}

    def result(self, limit, *, eos=-1, max_tokens=ANSWER, order=None):
        """The result with drafts cut at depth `limit`, rows in `order`."""
        rows = np.arange(BATCH) if order is None else np.asarray(order)
        sampling = Sampling.make(BATCH, eos=[eos], max_tokens=max_tokens)
        return self.run(
            self.params, self.tokens[rows], self.lengths[rows], sampling=sampling, row_ids=jnp.asarray(rows),
            **self.arguments(limit),
        )  # fmt: skip

    def check_lengths(self):
        """Every draft length, and a mix of them, gives plain output. Returns accepted drafts of the longest."""
        depth = self.run.config.drafter.depth
        for limit in [*sorted({0, 1, 2, depth}), np.arange(BATCH) % (depth + 1)]:
            assert toy.outputs(result := self.result(limit)) == self.plain, f"draft length {limit}"
            if np.max(limit) == 0:
                assert int(result.stats.proposed.sum()) == 0
        result = self.result(depth)
        assert int(result.stats.emitted.sum()) == sum(map(len, self.plain))
        return int(result.stats.accepted_by_depth.sum())

    def check_ends(self):
        """An end token, and a limit, at each offset of a block: the output is the plain one, cut there."""
        depth = self.run.config.drafter.depth
        for k in range(1, depth + 3):
            assert toy.outputs(self.result(depth, max_tokens=k)) == [row[:k] for row in self.plain], f"limit {k}"
        for eos in range(V):
            want = [row[: row.index(eos) + 1] if eos in row else row for row in self.plain]
            assert toy.outputs(self.result(depth, eos=eos)) == want, f"end token {eos}"

    def check_rows(self):
        """A row's output does not depend on its place; nor, bit by bit, do its statistics."""
        depth, order = self.run.config.drafter.depth, [2, 0, 3, 1]
        first, second = self.result(depth), self.result(depth, order=order)
        stats = jax.tree.map(lambda leaf: np.asarray(leaf)[np.argsort(order)], second.stats)
        assert toy.outputs(second) == [toy.outputs(first)[i] for i in order]
        jax.tree.map(np.testing.assert_array_equal, stats, jax.tree.map(np.asarray, first.stats))

    def check_commits(self):
        """After every commit the next token's logits equal those of a forward over all tokens anew."""
        model, depth = self.model, self.run.config.drafter.depth

        @jax.jit
        def logits(params, state):
            seq = state.seq
            at = seq.length[:, None] - 1
            cached, _ = model(params, seq.root[:, None], at, state.cache, None)
            index = jnp.arange(seq.tokens.shape[1])[None]
            fresh, _ = model(params, seq.tokens, jnp.where(index < seq.length[:, None], index, -1))
            anew = jnp.take_along_axis(fresh.hidden, at[..., None], 1)
            return model.head(params, cached.hidden)[:, 0], model.head(params, anew)[:, 0]

        state = self.run.start(
            self.params, self.tokens, self.lengths, sampling=Sampling.make(BATCH, eos=[-1]), **self.arguments(depth)
        )
        while not bool(state.seq.done.all()):
            state = self.run.advance(self.params, state, steps=1, **self.arguments(depth))
            cached, anew = logits(self.params, state)
            np.testing.assert_allclose(cached, anew, atol=1e-4)

    def check(self, *, accepts=True):
        """All of the above; `accepts`: whether some draft must have been accepted."""
        accepted = self.check_lengths()
        assert not accepts or accepted > 0
        self.check_ends()
        self.check_rows()
        self.check_commits()


SYMBOLS, LENGTH, ROWS = 4, 4, 16_000
MARKOV = toy.Markov(SYMBOLS)
TABLE = MARKOV.params(0, scale=1.2)
PROMPT = np.array([2, 0, 3, 2, 0, 1, 2, 0])  # "2 0" thrice, so that copying drafters have something to copy


@functools.cache
def _program(drafter, verifier):
    features = Features(sample=True, top_k=True, top_p=True, min_p=True)
    return toy.Run(MARKOV, Config(max_tokens=LENGTH, drafter=drafter, verifier=verifier, features=features), jax.jit)


def law(drafter, draft_params=None, *, verifier=None, seed=0, rows=ROWS, **filters):
    """(z of the chi-square of sampled rows against the target's law over all sequences, accepted drafts).

    A law is followed where z is below 5; the planted bugs of the decoding tests come out above 12.
    """
    filters = {"temperature": 1.0, **filters}
    tokens = jnp.broadcast_to(jnp.asarray(PROMPT, jnp.int32), (rows, len(PROMPT)))
    sampling = Sampling.make(rows, eos=[-1], max_tokens=LENGTH, **filters)
    result = _program(drafter, verifier)(
        TABLE, tokens, jnp.full(rows, len(PROMPT)), key=jax.random.key(seed), sampling=sampling,
        draft_params=draft_params,
    )  # fmt: skip
    table = [[toy.law_of(x, **filters) for x in level] for level in np.asarray(TABLE["table"])]

    def next_law(prefix):
        last = prefix[-1] if prefix else PROMPT[-1]
        return table[(len(PROMPT) - 1 + len(prefix)) % MARKOV.period][last]

    z, _ = toy.chi_square(np.asarray(result.tokens), toy.sequence_law(next_law, LENGTH))
    return z, int(result.stats.accepted_by_depth.sum())


def check_law(drafter, draft_params=None):
    """The output follows the target's law at several temperatures and filters, and some drafts are accepted."""
    for seed, filters in enumerate([{}, {"temperature": 1.5}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8}]):
        z, accepted = law(drafter, draft_params, seed=seed, **filters)
        assert z < 5, (filters, z)
        assert accepted > 0
