"""Rows do not touch each other, programs are traced once and copy no cache, and rows can be moved.

The first claim is bitwise and the second about compiled code, so this file compiles with XLA's defaults.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer import decode
from jaxinfer.decode import Chain, Config, DraftModel, Features, Greedy, Reason, Sampling, Tree, Typical, keys
from jaxinfer.decode.config import end_tokens
from jaxinfer.errors import ConfigError, InputError
from tests import toy

V, ROOM, B = 8, 8, 4
MODEL = toy.Attentive(V)
PARAMS, OTHER = MODEL.params(0), MODEL.params(1)
POISON = V - 1  # a token whose embedding is NaN and which no row can generate
PARAMS["embedding"] = PARAMS["embedding"].at[POISON].set(jnp.nan)
PARAMS["head"] = PARAMS["head"].at[:, POISON].set(0)
TOKENS, LENGTHS = toy.prompts(0, B, 5, V - 1, lengths=[5, 3, 1, 4])
CONFIG = Config(max_tokens=ROOM, prefill_chunk=2, logprobs=2, drafter=DraftModel(MODEL, 2))


def sampling(**values):
    defaults = dict(
        temperature=[0.9, 0.0, 1.2, 0.7], top_p=[1.0, 1.0, 0.9, 1.0], eos=np.full((B, 1), -1), max_tokens=ROOM,
        bias_ids=np.full((B, V), POISON), bias_values=np.tile([-np.inf, *[0.0] * (V - 1)], (B, 1)),
    )  # fmt: skip
    return Sampling.make(B, **{**defaults, **values})


def arguments(tokens=TOKENS, lengths=LENGTHS, ids=range(B), rows=None):
    rows = sampling() if rows is None else rows
    return (PARAMS, OTHER, tokens, lengths, rows, jnp.asarray(list(ids)), jax.random.key(0))


@pytest.fixture(scope="module")
def compiled():
    def run(params, draft, tokens, lengths, rows, ids, key):
        return decode.generate(
            MODEL, params, tokens, lengths, config=CONFIG, key=key, sampling=rows, row_ids=ids, draft_params=draft
        )

    return jax.jit(run).lower(*arguments()).compile()


def rows_of(result, keep):
    """The output of rows `keep`: tokens, log-probabilities, reasons and counts, bit for bit."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[np.asarray(keep)], result)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_poisoned_neighbour_changes_nothing(compiled):
    """A NaN from row 1's logits, from its prompt, and from its first or its last token."""
    want = compiled(*arguments())
    nan_bias = sampling(bias_values=np.asarray(sampling().bias_values) + np.array([[0], [np.nan], [0], [0]]))
    poisoned = [arguments(rows=nan_bias)] + [arguments(TOKENS.at[1, at].set(POISON)) for at in (0, 1, 2)]
    for case in poisoned:
        got = compiled(*case)
        assert int(got.finish_reason[1]) == Reason.ERROR and int(got.lengths[1]) == 0
        assert_same(rows_of(got, [0, 2, 3]), rows_of(want, [0, 2, 3]))
    assert np.isfinite(rows_of(want, range(B)).logprobs.chosen).all()


def test_a_penalised_or_short_neighbour_changes_nothing(compiled):
    want = compiled(*arguments())
    ends = np.full((B, 1), -1)
    ends[1] = want.tokens[1, 0]
    for values in (
        dict(repetition_penalty=[1, 2.0, 1, 1], frequency_penalty=[0, 1.5, 0, 0]), dict(eos=ends),
        dict(max_tokens=[ROOM, 0, ROOM, ROOM]), dict(temperature=[0.9, 3.0, 1.2, 0.7]),
    ):  # fmt: skip
        got = compiled(*arguments(rows=sampling(**values)))
        assert_same(rows_of(got, [0, 2, 3]), rows_of(want, [0, 2, 3]))
        assert toy.outputs(got)[1] != toy.outputs(want)[1]
    got = compiled(*arguments(TOKENS.at[1].set(0), LENGTHS.at[1].set(5)))
    assert_same(rows_of(got, [0, 2, 3]), rows_of(want, [0, 2, 3]))
    got = compiled(*arguments(lengths=LENGTHS.at[jnp.array([0, 3])].set(1)))  # fewer chunks to prefill
    assert_same(rows_of(got, [1, 2]), rows_of(want, [1, 2]))


def test_a_greedy_row_among_sampled_ones_is_greedy(compiled):
    logprobs = compiled(*arguments()).logprobs
    chosen_is_best = np.asarray(logprobs.chosen == logprobs.top[..., 0])
    assert chosen_is_best[1].all() and not chosen_is_best.all()


def test_the_order_of_rows_changes_nothing(compiled):
    """A row's draws follow its id, not its place; another id gives other draws."""
    want, order = compiled(*arguments()), np.array([2, 0, 3, 1])
    moved = jax.tree.map(lambda leaf: leaf[order], sampling())
    got = compiled(*arguments(TOKENS[order], LENGTHS[order], order, moved))
    assert_same(rows_of(got, range(B)), rows_of(want, order))
    other = compiled(*arguments(ids=np.arange(B) + 10))
    assert toy.outputs(other) != toy.outputs(want) and toy.outputs(other)[1] == toy.outputs(want)[1]


def test_padding_changes_nothing(compiled):
    garbage = jnp.where(jnp.arange(5) < LENGTHS[:, None], TOKENS, (TOKENS + 1) % (V - 1))
    assert_same(compiled(*arguments(garbage)), compiled(*arguments()))


def cache_shapes():
    return jax.eval_shape(lambda: MODEL.new_cache(B, TOKENS.shape[1] + ROOM))


def test_the_loop_copies_no_cache(compiled):
    """Neither the target's nor the draft's cache is copied in any loop of the compiled program."""
    assert toy.cache_copies(compiled, cache_shapes()) == []


@dataclasses.dataclass(frozen=True)
class Blind(Greedy):
    """Planted: a verdict whose kept count does not depend on the logits."""

    def verify(self, law, proposal, key):
        verdict = super().verify(law, proposal, key)
        return dataclasses.replace(verdict, finite=jnp.ones_like(verdict.finite))


def test_the_copy_counter_sees_copies():
    """Without the dependence on the step's output XLA writes the cache before it has read it, and must copy."""
    copies = {}
    for verifier in (Greedy(), Blind()):
        config = Config(max_tokens=ROOM, eos=(), verifier=verifier)

        def run(params, tokens, lengths, key, config=config):
            return decode.generate(MODEL, params, tokens, lengths, config=config, key=key)

        program = jax.jit(run).lower(PARAMS, TOKENS, LENGTHS, jax.random.key(0)).compile()
        copies[type(verifier)] = len(toy.cache_copies(program, cache_shapes()))
    assert copies[Greedy] == 0 and copies[Blind] > 0


@dataclasses.dataclass(frozen=True)
class Counted(toy.Attentive):
    """A step that tells when it is traced."""

    seen: tuple = ()

    def __call__(self, *args, **kwargs):
        TRACES.append(args[1].shape)
        return super().__call__(*args, **kwargs)


TRACES: list = []


def test_steady_state_is_traced_once_and_rows_can_be_replaced():
    """A job's life: start, advance, refill two slots, advance; each program is traced once, and a refilled row's output
    is what it would have been alone."""
    model, config = Counted(V), Config(max_tokens=ROOM, drafter=DraftModel(toy.Attentive(V), 1))
    begin = jax.jit(decode.begin, static_argnames=("step", "config"))
    advance = jax.jit(decode.advance, static_argnames=("step", "config"))
    place = jax.jit(decode.place)
    more, lengths = toy.prompts(5, B, 5, V - 1)
    run = dict(config=config, key=jax.random.key(0), draft_params=OTHER)
    step = dict(config=config, draft_params=OTHER)
    state = advance(model, PARAMS, begin(model, PARAMS, TOKENS, LENGTHS, **run), steps=3, **step)
    fresh = begin(model, PARAMS, more, lengths, **run)
    traces = len(TRACES)
    for rows in ([1, 3, B, B], [0, B, B, 2]):
        state = place(state, jnp.asarray(rows), fresh)
        for _ in range(3):
            state = advance(model, PARAMS, state, steps=2, **step)
    state = advance(model, PARAMS, state, steps=100, **step)
    assert len(TRACES) == traces and len({shape for shape in TRACES}) == len(TRACES) == 2
    alone = decode.result(advance(model, PARAMS, fresh, steps=100, **step), config)
    got, want = toy.outputs(decode.result(state, config)), toy.outputs(alone)
    assert [got[1], got[3], got[0], got[2]] == [want[0], want[1], want[0], want[3]]


@pytest.mark.slow
def test_moving_rows_moves_everything_but_the_keys_of_reorder():
    config = Config(max_tokens=ROOM, temperature=1.0, logprobs=1, repetition_penalty=1.2)
    run = toy.Run(MODEL, config)
    state = run.advance(PARAMS, run.start(PARAMS, TOKENS, LENGTHS), steps=2)
    order = jnp.array([2, 2, 0, 1])
    moved, kept = decode.select(state, order), decode.reorder(state, order)
    expected = jax.tree.map(lambda leaf: leaf[order], dataclasses.replace(state, cache=None))
    for got in (moved, dataclasses.replace(kept, seq=dataclasses.replace(kept.seq, key=moved.seq.key))):
        assert_same(raw(dataclasses.replace(got, cache=None)), raw(expected))
        assert_same(got.cache.states, kv.select(state.cache, order).states)
    assert_same(raw(kept.seq.key), raw(state.seq.key))
    wide = decode.select(state, jnp.arange(2))
    assert wide.seq.length.shape == (2,) and wide.cache.t.shape == (2,)
    ended = decode.finish(state, jnp.array([True, False, False, False]))
    assert list(np.asarray(ended.seq.reason)) == [Reason.STOP, 0, 0, 0] and Reason.STOP.word == "stop"


def raw(tree):
    """Keys as plain numbers, so that they can be compared."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


@pytest.mark.slow
def test_samples_share_a_prefill_and_nothing_else():
    """n samples a prompt: prompt-major, each equal to the row that has its key."""
    config = Config(max_tokens=ROOM, temperature=1.0)
    run = toy.Run(MODEL, dataclasses.replace(config, n=3))
    got = toy.outputs(run(PARAMS, TOKENS, LENGTHS, key=jax.random.key(7)))
    assert len(got) == 3 * B and len({tuple(x) for x in got}) > 2 * B
    states = run.start(PARAMS, TOKENS, LENGTHS, key=jax.random.key(7))
    want = keys.row_keys(jax.random.key(7), jnp.repeat(jnp.arange(B), 3), jnp.tile(jnp.arange(3), B))
    assert_same(raw(states.seq.key), raw(want))
    single = toy.Run(MODEL, config)(PARAMS, TOKENS, LENGTHS, key=jax.random.key(7))
    assert toy.outputs(single) == got[::3]


@pytest.mark.parametrize(
    "case, message",
    [(dict(tokens=jnp.zeros((2, 0), jnp.int32)), "at least one token"), (dict(tokens=jnp.zeros((2, 3))), "integers"),
     (dict(lengths=jnp.array([1, 2, 3])), "lengths"), (dict(lengths=jnp.array([0, 2])), r"lengths\[0\]"),
     (dict(lengths=jnp.array([1, 4])), r"lengths\[1\]"), (dict(capacity=2), "capacity of 2")],
)  # fmt: skip
def test_prompts_that_do_not_fit_are_refused_before_any_work(case, message):
    tokens, lengths = case.get("tokens", jnp.zeros((2, 3), jnp.int32)), case.get("lengths", jnp.array([1, 3]))
    with pytest.raises(InputError, match=message):
        decode.start(
            None, None, tokens, lengths, None, None, config=Config(), capacity=case.get("capacity", 8)
        )  # fmt: skip


def test_impossible_lengths_inside_jit_end_their_rows_only(compiled):
    got = compiled(*arguments(lengths=jnp.array([5, 0, 6, 4])))
    np.testing.assert_array_equal(got.finish_reason, [Reason.LENGTH, Reason.ERROR, Reason.ERROR, Reason.LENGTH])
    assert_same(rows_of(got, [0, 3]), rows_of(compiled(*arguments()), [0, 3]))


@pytest.mark.parametrize(
    "values",
    [dict(n=0), dict(logprobs=-1), dict(max_tokens=-1), dict(temperature=-1.0), dict(prefill_chunk=0)],
    ids=str,
)
def test_configs_out_of_range_are_refused(values):
    with pytest.raises((ConfigError, InputError), match=next(iter(values))):
        Config(**values)
    with pytest.raises(ConfigError, match="gamma"):
        DraftModel(MODEL, 0)


def test_a_draft_of_another_vocabulary_is_refused():
    config = Config(drafter=DraftModel(toy.Attentive(V + 1), 2))
    with pytest.raises(ConfigError, match="vocabulary has 9 tokens, the model's 8"):
        decode.begin(MODEL, PARAMS, TOKENS, LENGTHS, config=config, key=jax.random.key(0), draft_params=OTHER)
    with pytest.raises(ConfigError, match="draft_params"):
        decode.begin(MODEL, PARAMS, TOKENS, LENGTHS, config=CONFIG, key=jax.random.key(0))


def test_end_tokens_come_from_the_model_where_the_config_names_none():
    own = types.SimpleNamespace(eos=(3, 5))
    assert end_tokens(own) == (3, 5) and end_tokens(MODEL) == ()
    np.testing.assert_array_equal(Config().sampling(2, end_tokens(own)).eos, [[3, 5], [3, 5]])
    assert Config(eos=()).sampling(2, end_tokens(own)).eos.shape == (2, 0)


def test_verifiers_follow_the_features():
    for chain in (True, False):
        assert isinstance(Config().verifier_for(Features(), chain=chain), Greedy)
    assert isinstance(Config().verifier_for(Features(sample=True), chain=True), Chain)
    assert isinstance(Config().verifier_for(Features(sample=True), chain=False), Tree)
    assert Config(verifier=Typical()).verifier_for(Features(), chain=True) == Typical()
    assert Config(temperature=0.5, top_k=3).features_for(own=True) == Features(sample=True, top_k=True)
    assert Config(top_k=3).features_for(own=True) == Features()
    assert Config().features_for(own=False) == Features.everything()
