"""Decoding under grammars: what is emitted is the masked target's, token for token and in law, drafts or none."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llguidance")

from jaxinfer import decode
from jaxinfer.decode import Config, CopySpec, Features, Reason, Sampling, constrained, loop
from jaxinfer.decode.constrained import Constrained
from jaxinfer.decode.grammar import Matcher
from tests import grammar_toys as toys
from tests import toy

V, BATCH, WIDTH, ANSWER = 8, 4, 9, 14
MODEL = toy.Attentive(V)
PARAMS = MODEL.params(3, scale=0.5)
# Every row has its own; the third holds long forced runs, the fourth none.
PATTERNS = ["((ab|c)*d)+e", "(a|b|c|d)*", "(dabc|eabcd)*abe", "[a-e]{3,9}"]
FEATURES = Features(min_tokens=True, penalties=True, bias=True)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The step's programs without LLVM's optimisations: the models are tiny."""
    patch = pytest.MonkeyPatch()
    for name in ("_propose", "_score", "_settle", "_redraft"):
        program = getattr(constrained, name)
        options = {"static_argnames": ("config",)} if name in ("_propose", "_settle") else {}
        options = {"static_argnames": ("step", "config")} if name == "_score" else options
        options |= {"donate_argnames": ("state",)} if name in ("_propose", "_settle") else {}
        patch.setattr(constrained, name, jax.jit(program.__wrapped__, **options))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def vocabulary():
    return toys.pieces()


_begin = jax.jit(decode.begin, static_argnames=("step", "config"))


def run(vocabulary, drafter=None, *, jump=True, draft_params=None, patterns=PATTERNS, **values):
    """The result of rows under `patterns` (None: a row without a grammar)."""
    config = Config(max_tokens=ANSWER, features=FEATURES, **({} if drafter is None else {"drafter": drafter}))
    defaults = {"eos": [toys.END], "max_tokens": ANSWER, "bias_ids": [-1], "bias_values": [0.0]}
    sampling = Sampling.make(BATCH, **{**defaults, **values})
    tokens, lengths = toys.prompts(BATCH, WIDTH, V)
    state = _begin(
        MODEL, PARAMS, tokens, lengths, config=config, key=jax.random.key(0), sampling=sampling,
        draft_params=draft_params,
    )  # fmt: skip
    matchers = [None if pattern is None else toys.regex(vocabulary, pattern) for pattern in patterns]
    driver = Constrained(MODEL, PARAMS, matchers, config=config, draft_params=draft_params, jump=jump)
    return loop.result(driver.advance(state, 100), config)


@jax.jit
def last_logits(row, length):
    index = jnp.arange(WIDTH + ANSWER)
    output, _ = MODEL(PARAMS, row[None], jnp.where(index < length, index, -1)[None])
    return MODEL.head(PARAMS, output.hidden)[0, length - 1]


def oracle(vocabulary, patterns=PATTERNS):
    """Greedy decoding one token at a time: a forward over the whole row, and the best of what the grammar allows."""
    tokens, lengths = (np.asarray(x) for x in toys.prompts(BATCH, WIDTH, V))
    rows = []
    for prompt, length, pattern in zip(tokens, lengths, patterns, strict=True):
        matcher = None if pattern is None else toys.regex(vocabulary, pattern)
        row, answer = np.zeros(WIDTH + ANSWER, np.int32), []
        row[:length] = prompt[:length]
        while len(answer) < ANSWER and toys.END not in answer:
            scores = np.asarray(last_logits(row, length + len(answer)))
            may = range(V) if matcher is None else toys.mask_of(matcher, V)
            best = max(may, key=lambda i: (scores[i], -i))
            row[length + len(answer)] = best
            answer.append(best)
            if matcher is not None:
                matcher.advance([best])
        rows.append(answer)
    return rows


def script(rows):
    """What `toy.Scripted` and `toy.Branching` draft: the answers themselves, wrong at every third token."""
    _, lengths = toys.prompts(BATCH, WIDTH, V)
    out = np.zeros((BATCH, WIDTH + ANSWER), np.int32)
    for row, length, answer in zip(out, np.asarray(lengths), rows, strict=True):
        row[length : length + len(answer)] = answer
    wrong = np.arange(out.shape[1]) % 3 == 0
    return {"script": jnp.asarray(np.where(wrong, (out + 1) % V, out)), "gamma": jnp.asarray([5, 5, 2, 5])}


@pytest.fixture(scope="module")
def want(vocabulary):
    return oracle(vocabulary)


def test_one_token_at_a_time_is_the_best_that_the_grammar_allows(vocabulary, want):
    got = run(vocabulary, jump=False)
    assert toy.outputs(got) == want
    assert (np.asarray(got.stats.forwards) == np.asarray(got.lengths)).all()
    for row, pattern, reason in zip(toy.outputs(got), PATTERNS, got.finish_reason, strict=True):
        text = "".join(toys.PIECES[i] for i in row if i != toys.END)
        assert (int(reason) == Reason.EOS) == (row[-1] == toys.END)
        assert reason == Reason.LENGTH or re.fullmatch(pattern, text), text


@pytest.mark.parametrize("name", ["jump", "copies", "chain", "tree", "draft model"])
def test_drafts_and_jumps_change_nothing(vocabulary, want, name):
    drafter, params = {
        "jump": (None, None),
        "copies": (CopySpec(2, 4), None),
        "chain": (toy.Scripted(5), script(want)),
        "tree": (toy.Branching(), script(want)),
        "draft model": (decode.DraftModel(MODEL, 3), MODEL.params(4)),
    }[name]
    got = run(vocabulary, drafter, draft_params=params)
    assert toy.outputs(got) == want
    forwards, lengths = np.asarray(got.stats.forwards), np.asarray(got.lengths)
    assert forwards.sum() < lengths.sum()
    if name in ("jump", "copies", "draft model"):
        assert forwards[2] < 0.7 * lengths[2], "forced runs need few forwards"


def test_a_row_without_a_grammar_is_its_neighbours_equal(vocabulary):
    patterns = [PATTERNS[2], None, None, PATTERNS[0]]
    want = oracle(vocabulary, patterns)
    assert toy.outputs(run(vocabulary, patterns=patterns)) == want
    assert toy.outputs(run(vocabulary, CopySpec(2, 4), patterns=patterns)) == want


def test_penalties_and_bans_hold_inside_drafts_under_a_grammar(vocabulary):
    values = dict(frequency_penalty=1.5, repetition_penalty=1.3, bias_ids=[3], bias_values=[-np.inf])
    patterns = ["[a-e]{3,9}", "(a|b|c|d)*", "((ab|d)*c?)+e", "(a|b|e)*"]
    one = run(vocabulary, jump=False, patterns=patterns, **values)
    assert not any(3 in row for row in toy.outputs(one))
    assert toy.outputs(one) != toy.outputs(run(vocabulary, jump=False, patterns=patterns))
    params = script(toy.outputs(one))
    for drafter, own in [(None, None), (CopySpec(2, 4), None), (toy.Scripted(5), params), (toy.Branching(), params)]:
        assert toy.outputs(run(vocabulary, drafter, draft_params=own, patterns=patterns, **values)) == toy.outputs(one)


def test_a_limit_at_each_offset_of_a_forced_run(vocabulary):
    patterns = ["dabcdabcd(a|b)"] * BATCH
    whole = toy.outputs(run(vocabulary, patterns=patterns))
    for k in range(1, 9):
        assert toy.outputs(run(vocabulary, patterns=patterns, max_tokens=k)) == [row[:k] for row in whole]


def test_the_least_length_gives_way_where_only_the_end_is_left(vocabulary):
    got = run(vocabulary, patterns=["ab", "ab*", "(a|b)+", "c"], min_tokens=6)
    rows = toy.outputs(got)
    assert [len(row) for row in rows[::3]] == [2, 2] and rows[0][-1] == rows[3][-1] == toys.END
    assert all(len(row) > 6 or row[-1] != toys.END for row in rows[1:3])
    assert (np.asarray(got.finish_reason) != Reason.ERROR).all()


def test_a_row_that_its_matcher_gives_up_ends_with_an_error(vocabulary, monkeypatch):
    class Broken(Matcher):
        def _mask(self, words):
            self.error = "too complex"
            super()._mask(words)

    monkeypatch.setattr("jaxinfer.decode.grammar.Matcher", Broken)
    got = run(vocabulary, patterns=["a+b", None, None, None])
    assert got.finish_reason[0] == Reason.ERROR and got.lengths[0] == 0
    assert (np.asarray(got.finish_reason[1:]) != Reason.ERROR).all()


def test_planted_bug_the_roots_mask_for_every_slot(vocabulary, want, monkeypatch):
    fill = Matcher.fill

    def careless(self, words, *drafts):
        fill(self, words, *drafts)
        words[1:] = words[0]
        return len(words)

    monkeypatch.setattr(Matcher, "fill", careless)
    assert toy.outputs(run(vocabulary, toy.Scripted(5), draft_params=script(want))) != want


def test_planted_bug_rollback_forgotten(vocabulary, want, monkeypatch):
    """The matcher left at the end of the drafts in place of the answer's: the next masks are wrong."""

    class Forgetful(Matcher):
        def _walk(self, words, tokens, children, slot):
            matcher = self._matcher
            self._matcher = type("NoRollback", (), {
                "__getattr__": lambda _, name: getattr(matcher, name), "rollback": lambda _, n: True,
            })()  # fmt: skip
            try:
                return super()._walk(words, tokens, children, slot)
            finally:
                self._matcher = matcher

    monkeypatch.setattr("jaxinfer.decode.grammar.Matcher", Forgetful)
    assert toy.outputs(run(vocabulary, toy.Scripted(5), draft_params=script(want))) != want


# The law: five letters with one spelling each, a Markov target, every sequence enumerated.
SYMBOLS, ROWS, LENGTH = 5, 1500, 4
MARKOV = toy.Markov(SYMBOLS)
TABLE = MARKOV.params(0, scale=1.2)
PROMPT = np.array([2, 1, 3, 2, 1, 1, 2, 1])
PATTERN = "(a|bc)*d?b"


def masked_law(language):
    """The law of answers, ended or cut at LENGTH, of the target masked one token at a time; 0 after an end."""
    table = np.asarray(TABLE["table"], np.float64)
    law, out = {(): 1.0}, {}
    for step in range(LENGTH):
        new = {}
        for prefix, mass in law.items():
            last = prefix[-1] if prefix else PROMPT[-1]
            weights = np.exp(table[(len(PROMPT) - 1 + step) % MARKOV.period][last])
            may = toys.allowed(language, "".join(toys.LETTERS[i] for i in prefix), toys.LETTERS)
            for i in may:
                sequence, p = (*prefix, i), mass * weights[i] / sum(weights[j] for j in may)
                (out if i == toys.END else new)[sequence] = p
        law = new
    return {sequence + (0,) * (LENGTH - len(sequence)): p for sequence, p in (out | law).items()}


@pytest.fixture(scope="module")
def law():
    return masked_law(toys.words(PATTERN, 7))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "jump", "copies", "draft model"])
def test_sampled_answers_follow_the_masked_law(law, name):
    samples, stats = sample(name)
    z, _ = toy.chi_square(samples, law)
    assert z < 5, z
    assert name in ("plain", "jump") or int(stats.accepted_by_depth.sum()) > 0


def test_planted_bug_a_mask_after_the_draw(law, monkeypatch):
    """Unmasked draws, where the grammar forbids one the likeliest allowed: in the language, and of another law."""
    from jaxinfer.decode.sampling import Warp, _unpacked

    scores = Warp.scores

    def late(self, logits, slots):
        x = scores(dataclasses.replace(self, masks=None), logits, slots)
        if self.masks is None:
            return x
        may = _unpacked(self.masks, x.shape[-1])
        best = jnp.where(may, x, -jnp.inf).max(-1, keepdims=True)
        lost = jnp.log(jnp.where(may, 0.0, jnp.exp(x)).sum(-1, keepdims=True) + jnp.exp(best))
        return jnp.where(may & (x == best), lost, jnp.where(may, x, -jnp.inf))

    monkeypatch.setattr(Warp, "scores", late)
    z, _ = toy.chi_square(sample("plain", bias=True)[0], law)
    assert z > 12, z


def test_the_masked_law_is_not_the_conditional_law(law):
    """What local masks cannot do, on an example small enough to see it (Park et al. 2024)."""
    table = np.asarray(TABLE["table"], np.float64)
    conditional = {}
    for sequence in law:
        mass = 1.0
        for step, token in enumerate(sequence):
            last = sequence[step - 1] if step else PROMPT[-1]
            if step and last == toys.END:
                break
            weights = np.exp(table[(len(PROMPT) - 1 + step) % MARKOV.period][last])
            mass *= weights[token] / weights.sum()
        conditional[sequence] = mass
    total = sum(conditional.values())
    assert 0.05 < 0.5 * sum(abs(law[s] - conditional[s] / total) for s in law) < 0.9


def sample(name, **features):
    """ROWS answers `i32[ROWS, LENGTH]` under PATTERN, and the statistics; other features, another program."""
    drafter, params = {
        "plain": (decode.Autoregressive(), None),
        "jump": (decode.Autoregressive(), None),
        "copies": (CopySpec(1, 2), None),
        "draft model": (decode.DraftModel(MARKOV, 2), MARKOV.params(1, scale=1.0)),
    }[name]
    config = Config(max_tokens=LENGTH, drafter=drafter, features=Features(sample=True, **features))
    tokens = jnp.broadcast_to(jnp.asarray(PROMPT, jnp.int32), (ROWS, len(PROMPT)))
    sampling = Sampling.make(ROWS, eos=[toys.END], max_tokens=LENGTH, temperature=1.0)
    state = _begin(
        MARKOV, TABLE, tokens, jnp.full(ROWS, len(PROMPT)), config=config, key=jax.random.key(0), sampling=sampling,
        draft_params=params,
    )  # fmt: skip
    start = toys.regex(toys.letters(), PATTERN)
    matchers = [start.fork() for _ in range(ROWS)]
    driver = Constrained(MARKOV, TABLE, matchers, config=config, draft_params=params, jump=name != "plain")
    result = loop.result(driver.advance(state, 100), config)
    return np.asarray(result.tokens), result.stats


def test_the_cache_is_updated_in_place_and_never_copied(vocabulary):
    """The piece that commits aliases every buffer of the cache; the others hand it on or leave it alone."""
    config = Config(max_tokens=ANSWER, features=FEATURES, drafter=CopySpec(2, 4))
    tokens, lengths = toys.prompts(BATCH, WIDTH, V)
    sampling = Sampling.make(BATCH, eos=[toys.END], max_tokens=ANSWER)
    state = _begin(MODEL, PARAMS, tokens, lengths, config=config, key=jax.random.key(0), sampling=sampling)
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state.cache) if leaf.ndim >= 4}
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.cache)]
    proposal, proposed = constrained._propose(PARAMS, state, config=config, draft_params=None)
    assert pointers == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(proposed.cache)]
    scored, blocks = constrained._score(MODEL, PARAMS, proposed, proposal, config=config)
    masks = np.full((BATCH, 5, 1), 0xFFFFFFFF, np.uint32)
    program = constrained._settle.lower(proposed, proposal, scored, blocks, masks, None, config=config).compile()
    copies = re.compile(r"= \w+\[(" + "|".join(shapes) + r")\](?:\{[^}]*\})? copy\(")
    assert not [line for line in program.as_text().splitlines() if copies.search(line)]
    after, _ = constrained._settle(proposed, proposal, scored, blocks, masks, None, config=config)
    assert pointers == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.cache)]


def test_masks_of_a_wide_vocabulary_unpack_bit_by_bit():
    from jaxinfer.decode.sampling import _unpacked

    words = np.random.default_rng(0).integers(0, 2**32, (2, 3, 3), np.uint32)
    got = np.asarray(_unpacked(jnp.asarray(words), 70))
    want = [[[v in toys.bits(words[b, r], 96) for v in range(70)] for r in range(3)] for b in range(2)]
    np.testing.assert_array_equal(got, want)
    assert len(list(itertools.chain.from_iterable(got.tolist()))) == 6
