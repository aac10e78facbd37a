"""Matchers: which tokens a grammar allows, which it forces, and what it refuses to take for a grammar."""

import json

import numpy as np
import pytest
from tokenizers import pre_tokenizers

pytest.importorskip("llguidance")

from jaxinfer.decode.grammar import Grammar, Vocabulary
from jaxinfer.errors import ConfigError, InputError
from tests import grammar_toys as toys


@pytest.fixture(scope="module")
def letters():
    return toys.letters()


@pytest.fixture(scope="module")
def pieces():
    return toys.pieces()


BYTES = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


@pytest.fixture(scope="module")
def byte_vocabulary():
    """256 bytes and an end token: a text has one spelling."""
    return toys.vocabulary(BYTES)


def spell(text):
    """The ids of a text of plain ASCII in `byte_vocabulary`."""
    return [BYTES.index({" ": "\u0120", "\n": "\u010a"}.get(c, c)) for c in text]


@pytest.mark.parametrize("pattern", ["(ab|c){1,3}", "a*b", "(a|b)c?d", "a|ab|abc", "[abc]{2}"])
def test_masks_are_what_some_word_of_the_language_needs(letters, pattern):
    """Every prefix of every word: the mask is the set of letters that lead to a word, found by trying all words."""
    language = toys.words(pattern, 6)
    prefixes = {word[:n] for word in language if len(word) < 6 for n in range(len(word) + 1)}
    assert len(prefixes) > 3
    for prefix in prefixes:
        matcher = toys.regex(letters, pattern)
        matcher.advance([toys.LETTERS.index(c) for c in prefix])
        assert toys.mask_of(matcher, 5) == toys.allowed(language, prefix, toys.LETTERS), prefix
        assert matcher.complete == (prefix in language)


def test_a_token_of_several_letters_counts_as_its_letters(pieces):
    """Where two texts can follow every spelling is allowed; where one can, the tokenizer's own."""
    matcher = toys.regex(pieces, "(ab|c){1,3}")
    names = {toys.PIECES[i] for i in toys.mask_of(matcher, 8)}
    assert names == {"a", "ab", "c"}
    assert {toys.PIECES[i] for i in toys.mask_of(toys.regex(pieces, "abc(d|e)"), 8)} == {"ab"}


def test_words_of_a_context_free_grammar(letters):
    matcher = letters.matcher(Grammar.lark('start: "a" start "b" | "c"'))
    matcher.advance([1, 1, 3])
    assert toys.mask_of(matcher, 5) == {2}
    matcher.advance([2, 2])
    assert toys.mask_of(matcher, 5) == {toys.END} and matcher.complete


def test_masks_of_drafts_are_those_of_their_paths_and_the_matcher_stays_where_it_is(pieces):
    matcher = toys.regex(pieces, "(ab|c)*d(ab|e)")
    matcher.advance([4])
    tokens, parent, valid = [1, 3, 2, 6, 7, 1, 4], [0, 0, 1, 2, 4, 4, 2], [True] * 6 + [False]
    rows = np.full((8, 1), 0xFFFFFFFF, np.uint32)
    before = toys.mask_of(matcher, 8)
    assert matcher.fill(rows, tokens, parent, valid) == 7
    for slot in range(1, 7):
        path, at = [], slot
        while at:
            path, at = [tokens[at - 1], *path], parent[at - 1]
        fresh = toys.regex(pieces, "(ab|c)*d(ab|e)")
        fresh.advance([4, *path])
        assert toys.bits(rows[slot], 8) == toys.mask_of(fresh, 8), path
    assert rows[7, 0] == 0xFFFFFFFF  # an invalid draft is not walked
    assert toys.mask_of(matcher, 8) == before


def test_what_follows_a_forbidden_draft_or_an_end_is_not_walked(letters):
    rows = np.full((5, 1), 0xFFFFFFFF, np.uint32)
    written = toys.regex(letters, "ab?").fill(rows, [2, 1, 1, toys.END], [0, 1, 0, 3], [True] * 4)
    assert written == 2
    assert [toys.bits(row, 5) for row in rows[[0, 3]]] == [{1}, {toys.END, 2}]
    assert (rows[[1, 2, 4]] == 0xFFFFFFFF).all()


def test_forced_tokens_are_those_of_masks_with_one_bit(pieces):
    for pattern in ["dabc", "(ab|c){1,3}", "abc(d|e)", "da?", "d(abe|abd)"]:
        matcher = toys.regex(pieces, pattern)
        want, walker = [], matcher.fork()
        while len(mask := toys.mask_of(walker, 8)) == 1:
            want += mask
            if toys.END in mask:
                break
            walker.advance(mask)
        assert matcher.forced(8) == want, pattern
        assert matcher.forced(2) == want[:2] and matcher.forced(0) == []


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "count": {"type": "integer", "minimum": 0, "maximum": 12},
        "kind": {"enum": ["x", "y"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}
VALID = [{"name": "a", "count": 12}, {"name": "", "count": 0, "kind": "y"}, {"name": "b", "count": 1, "tags": [True]}]
INVALID = [
    {"name": "abcd", "count": 1}, {"name": "a"}, {"name": "a", "count": 13}, {"name": "a", "count": 1, "other": 1},
    {"name": "a", "count": 1, "kind": "z"}, {"name": "a", "count": 1, "tags": [True, True, True]}, [], {},
]  # fmt: skip


def test_valid_instances_are_accepted_and_others_are_not(byte_vocabulary):
    matcher = byte_vocabulary.matcher(Grammar.json_schema(SCHEMA))
    for instance in VALID:
        for indent in (None, 2):
            assert matcher.accepts(spell(json.dumps(instance, indent=indent))), instance
    for instance in INVALID:
        assert not matcher.accepts(spell(json.dumps(instance))), instance
    assert not matcher.accepts(spell('{"name": "a", "count": 1')), "not whole"
    assert not matcher.accepts(spell('{"name":  "a", "count": 1}')), "two spaces"


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "oneOf"),
        ({"type": "string", "format": "iri"}, "iri"),
        ({"$ref": "http://localhost/other"}, "http://localhost/other"),
        ({"type": "strin"}, "strin"),
        ({"x-guidance": {"lenient": True}, "contains": {}}, "contains"),
        (False, "false"),
        ('{"type":', "no JSON"),
        ("[1]", "an object"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_by_its_keyword(byte_vocabulary, schema, named):
    with pytest.raises(InputError, match=f"json_schema: got .*{named}.*accepted: a schema that can be held"):
        byte_vocabulary.matcher(Grammar.json_schema(schema))


def test_broken_grammars_are_refused(letters):
    with pytest.raises(InputError, match=r"regex: got '\[ab'.*unclosed.*accepted: one that compiles"):
        letters.matcher(Grammar.regex("[ab"))
    with pytest.raises(InputError, match='grammar: got .*unknown name: "x"'):
        letters.matcher(Grammar.lark("start: x"))
    with pytest.raises(ConfigError, match="kind: got 'bnf'"):
        Grammar("bnf", "a")
    with pytest.raises(InputError, match="tokenizer cannot be matched"):
        Vocabulary("{}", 5, (0,))
    with pytest.raises(InputError, match="without an end token"):
        Vocabulary("{}", 5, ())


def test_a_row_that_left_its_grammar_is_given_up(letters, caplog):
    matcher = toys.regex(letters, "ab")
    assert not matcher.begins([2]) and matcher.begins([1, 2])
    matcher.advance([2])
    assert matcher.error is not None and "satisfy the grammar" in matcher.error and "given up" in caplog.text
    assert toys.mask_of(matcher, 5) == set() and matcher.forced(3) == []
