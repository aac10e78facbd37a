"""CFIC: prefixes that tell sentences apart, spans that end where the model would, all in the document's own words."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import cfic, loop
from jaxinfer.decode.cfic import Cfic, Span
from jaxinfer.decode.language_model import load
from jaxinfer.errors import ConfigError, InputError
from tests import toy

V, END, PROMPT = 8, 0, [3, 1, 4, 1, 5]
MODEL = toy.Attentive(V)
PARAMS = MODEL.params(2, scale=0.6)
# The first two share five tokens, the third is the beginning of the fourth, the fifth and the last are equal.
SENTENCES = [
    [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7, 1], [2, 2], [2, 2, 5], [6, 1, 3], [7, 4], [4, 4, 1], [6, 1, 3],
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cfic, "_begin", jax.jit(loop.begin, static_argnames=("step", "config")))
        patch.setattr(cfic, "_score", jax.jit(loop.score, static_argnames=("step", "config")))
        yield


def search(finder, sentences=SENTENCES):
    tokens = jnp.asarray([PROMPT + [0] * 3], jnp.int32)
    return finder.search(MODEL, PARAMS, tokens, jnp.asarray([len(PROMPT)]), sentences, ends=[END])


@jax.jit
def _law(row, length):
    index = jnp.arange(row.shape[0])
    output, _ = MODEL(PARAMS, row[None], jnp.where(index < length, index, -1)[None])
    return MODEL.head(PARAMS, output.hidden)[0]


def law(text):
    """log-law f64[len(text) + 1, V] after the prompt and after each token of `text`: one plain forward."""
    row = np.zeros(64, np.int32)
    row[: len(PROMPT) + len(text)] = PROMPT + text
    logits = np.asarray(_law(row, len(PROMPT) + len(text)), np.float64)[len(PROMPT) - 1 : len(PROMPT) + len(text)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def distinct_prefix(sentence, others):
    """The shortest beginning that no other sentence has; the sentence itself where there is none."""
    for n in range(1, len(sentence) + 1):
        if all(other[:n] != sentence[:n] for other in others if other != sentence):
            return sentence[:n]
    return sentence


def by_brute_force(sentences, max_tokens):
    """Every sentence's score and where its span ends, by scoring each one alone."""
    spans = []
    for i, sentence in enumerate(sentences):
        if sentence in sentences[:i]:
            continue
        prefix = distinct_prefix(sentence, sentences)
        score = np.mean([row[t] for row, t in zip(law(prefix), prefix, strict=False)])
        best, last = -np.inf, i
        for j in range(i, len(sentences)):
            text = list(itertools.chain(*sentences[i : j + 1]))
            if j > i and len(text) > max_tokens:
                break
            if (p := law(text)[-1][END]) > best:
                best, last = p, j
        spans.append(Span(i, last, float(score)))
    return spans


def close(got, want):
    assert [(span.first, span.last) for span in got] == [(span.first, span.last) for span in want]
    np.testing.assert_allclose([span.score for span in got], [span.score for span in want], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [1, 9, 40])
def test_as_many_beams_as_sentences_find_what_scoring_each_alone_finds(max_tokens):
    want = cfic._merged(by_brute_force(SENTENCES, max_tokens))
    close(search(Cfic(beams=len(SENTENCES), max_tokens=max_tokens)), want)


@pytest.mark.slow
def test_few_beams_find_distinct_sentences_of_the_document():
    alone = {span.first: span for span in by_brute_force(SENTENCES, 1)}
    for beams in (1, 2, 3):
        spans = search(Cfic(beams, max_tokens=1))
        assert 1 <= len(spans) <= beams and len({span.first for span in spans}) == len(spans)
        close(spans, [alone[span.first] for span in spans])


def test_one_sentence_and_equal_sentences():
    assert [(s.first, s.last) for s in search(Cfic(), [[1, 2, 3]])] == [(0, 0)]
    (span,) = search(Cfic(max_tokens=1), [[2, 5], [2, 5]])
    assert (span.first, span.last) == (0, 0)


def test_overlapping_spans_become_one():
    spans = [Span(4, 6, -1.0), Span(0, 1, -3.0), Span(6, 7, -0.5), Span(2, 2, -2.0)]
    assert cfic._merged(spans) == [Span(4, 7, -0.5), Span(2, 2, -2.0), Span(0, 1, -3.0)]


def test_planted_bug_the_law_of_the_slot_before(monkeypatch):
    right = cfic._log_law
    monkeypatch.setattr(cfic, "_log_law", lambda *arguments: np.roll(right(*arguments), 1, 0))
    with pytest.raises(AssertionError):
        close(search(Cfic(len(SENTENCES), 9)), cfic._merged(by_brute_force(SENTENCES, 9)))


DOCUMENT = """Licensed under the Apache License. "Work" shall mean the work of authorship!

  A second paragraph, without an end

You may obtain a copy (of it). Is it so? It is...  Yes"""


def test_evidence_is_a_verbatim_part_of_the_document(tiny_model):
    lm = load(tiny_model)
    for beams, max_tokens in [(1, 20), (3, 60)]:
        found = Cfic(beams, max_tokens).retrieve(lm, DOCUMENT, "What is a work?")
        assert 1 <= len(found) <= beams
        for evidence in found:
            assert evidence.text == DOCUMENT[evidence.start : evidence.end] and evidence.text.strip() == evidence.text
            assert evidence.text[0] in 'L"AYI' and evidence.text[-1] in ".!?dYs"
        assert [e.score for e in found] == sorted((e.score for e in found), reverse=True)


def test_sentences_of_a_document():
    found = [match.group().strip() for match in cfic._SENTENCE.finditer(DOCUMENT)]
    assert found == [
        "Licensed under the Apache License.", '"Work" shall mean the work of authorship!',
        "A second paragraph, without an end", "You may obtain a copy (of it).", "Is it so?", "It is...", "Yes",
    ]  # fmt: skip


def test_what_cannot_be_searched_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="beams: got 0, accepts 1 or more"):
        Cfic(beams=0)
    with pytest.raises(InputError, match="document: got no sentence"):
        Cfic().retrieve(load(tiny_model), " \n ", "?")
    with pytest.raises(InputError, match="document: got .* tokens with its question; accepted: at most"):
        Cfic().retrieve(load(tiny_model), "A word. " * 200, "?")
    with pytest.raises(InputError, match="an empty one"):
        search(Cfic(), [[1], []])
