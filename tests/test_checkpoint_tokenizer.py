"""Tokenizers: text to ids as transformers has it, batches, ids that end a text, and broken files."""

import copy
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.checkpoint.tokenizer import Tokenizer
from jaxinfer.errors import CheckpointError, InputError, JaxinferError

TEXTS = ["", "def f(x):\n    return x", "naïve 🙂 café\t\u0301", "<|end|> import os <|end|>", " two  spaces "]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return Tokenizer.load(tiny_model)


def directory_of(source, target, **files):
    """A copy of a tokenizer's directory with JSON files replaced; None removes one."""
    shutil.copytree(source, target)
    for name, content in files.items():
        file = target / f"{name}.json"
        if content is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return target


def test_text_comes_back(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode("a<|end|>b")) == "ab"
    assert tokenizer.decode(np.asarray(tokenizer.encode("ab"), np.int32)) == "ab"
    assert tokenizer.vocab_size == 400 and tokenizer.eos_ids == (0,) and tokenizer.bos_id is None


def test_a_batch_is_padded_on_the_right(tokenizer):
    tokens, lengths = tokenizer.encode_batch(TEXTS)
    assert tokens.dtype == lengths.dtype == np.int32 and tokens.shape == (len(TEXTS), max(lengths))
    for row, n, text in zip(tokens, lengths, TEXTS, strict=True):
        assert row[:n].tolist() == tokenizer.encode(text)
        assert (row[n:] == tokenizer.pad_id).all()
    assert tokenizer.encode_batch(TEXTS, length=64)[0].shape == (len(TEXTS), 64)
    assert tokenizer.encode_batch([])[0].shape == (0, 0)
    with pytest.raises(InputError, match="text 1 has .* tokens, at most 3"):
        tokenizer.encode_batch(["a", "a long text"], length=3)


def with_template(directory, single):
    """tokenizer.json as families that add BOS write it."""
    file = directory / "tokenizer.json"
    record = json.loads(file.read_text())
    text, special = {"Sequence": {"id": "A", "type_id": 0}}, lambda p: {"SpecialToken": {"id": p, "type_id": 0}}
    parts = [text if p == "$A" else special(p) for p in single]
    tokens = {p: {"id": p, "ids": [record["model"]["vocab"][p]], "tokens": [p]} for p in single if p != "$A"}
    record["post_processor"] = {"type": "TemplateProcessing", "single": parts, "pair": [], "special_tokens": tokens}
    file.write_text(json.dumps(record))
    return directory


def test_bos_is_added_where_tokenizer_json_says_so(tiny_model, tmp_path):
    config = {"bos_token": "<|end|>", "eos_token": {"content": "!"}}
    directory = with_template(directory_of(tiny_model, tmp_path / "x", tokenizer_config=config), ["<|end|>", "$A"])
    found = Tokenizer.load(directory)
    plain = found.encode("ab", add_special_tokens=False)
    assert found.encode("ab") == [0, *plain] and found.bos_id == 0
    assert found.special_tokens == {"bos_token": "<|end|>", "eos_token": "!"}


@pytest.mark.parametrize(
    ("generation", "config", "special", "expected"),
    [
        ({"eos_token_id": [3, 4, 3]}, {"eos_token_id": 5}, "<|end|>", (3, 4)),
        ({"eos_token_id": 3}, {}, None, (3,)),
        ({}, {"eos_token_id": 5}, "<|end|>", (5,)),
        (None, {"text_config": {"eos_token_id": [5]}}, "<|end|>", (5,)),
        (None, None, "<|end|>", (0,)),
        (None, None, "not there", ()),
        (None, None, None, ()),
    ],
)
def test_the_ids_that_end_a_text(generation, config, special, expected, tiny_model, tmp_path):
    files = {"generation_config": generation, "config": config, "tokenizer_config": {"eos_token": special}}
    assert Tokenizer.load(directory_of(tiny_model, tmp_path / "x", **files)).eos_ids == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": None}, "no tokenizer.json"),
        ({"tokenizer": "{"}, "tokenizer.json: not a tokenizer"),
        ({"tokenizer": '{"version": "1.0"}'}, "tokenizer.json: not a tokenizer"),
        ({"tokenizer_config": "[]"}, "tokenizer_config.json: a JSON object is expected"),
        ({"tokenizer_config": {"eos_token": 3}}, "tokenizer_config.json: eos_token must be text"),
        ({"generation_config": {"eos_token_id": "x"}}, "generation_config.json: eos_token_id must be ids"),
        ({"generation_config": {"eos_token_id": [True]}}, "generation_config.json: eos_token_id must be ids"),
        ({"config": '{"a": 1, "a": 2}', "generation_config": None}, "config.json: not valid JSON: the name 'a'"),
    ],
)
def test_a_broken_file_is_named(files, message, tiny_model, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(directory_of(tiny_model, tmp_path / "x", **files))


def test_what_is_not_text_is_refused(tokenizer):
    with pytest.raises(InputError, match="text 0 is a int"):
        tokenizer.encode(3)
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode("a\ud800")
    for ids in ([-1], [2**40]):
        with pytest.raises(InputError, match="non-negative"):
            tokenizer.decode(ids)
    assert tokenizer.decode([399_999]) == ""


def fuzz_tokenizers(examples, tiny_model, tmp_path):
    """A tokenizer.json with parts replaced either works or is named as broken: no traceback, no hang."""
    source = json.loads((tiny_model / "tokenizer.json").read_text())
    target = directory_of(tiny_model, tmp_path / "x")
    small = {**source, "model": {**source["model"], "vocab": {"a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]}}
    paths = [(k,) for k in small] + [(k, j) for k, v in small.items() if isinstance(v, dict) for j in v]
    values = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
        st.sampled_from([{"type": "BPE"}, {"type": "Split", "pattern": {"Regex": "("}}, [{"id": -1, "content": "a"}]]),
        st.dictionaries(st.sampled_from(["type", "vocab", "id", "content"]), st.text(max_size=3) | st.integers()),
    )  # fmt: skip
    outcomes = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(
        st.lists(st.tuples(st.sampled_from(paths), values), min_size=1, max_size=2), st.text(max_size=8), st.booleans()
    )
    def run(changes, text, config_too):
        record = json.loads(json.dumps(small))
        for path, value in changes:
            node = record
            for key in path[:-1]:
                node = node[key] if isinstance(node.get(key), dict) else {}
            node[path[-1]] = copy.deepcopy(value)
        (target / "tokenizer.json").write_text(json.dumps(record))
        if config_too:
            (target / "tokenizer_config.json").write_text(json.dumps({"eos_token": changes[0][1]}))
        try:
            found = Tokenizer.load(target)
            found.decode(found.encode(text))
            outcomes.append(True)
        except JaxinferError:
            outcomes.append(False)

    run()
    assert set(outcomes) == {True, False}  # both were met: some damage is harmless


def test_broken_tokenizers_give_clear_errors(tiny_model, tmp_path):
    fuzz_tokenizers(80, tiny_model, tmp_path)


@pytest.mark.slow
def test_thousands_of_broken_tokenizers_give_clear_errors(tiny_model, tmp_path):
    fuzz_tokenizers(2000, tiny_model, tmp_path)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("config", "template"),
    [
        ({}, ["$A"]),
        ({"bos_token": "<|end|>", "add_bos_token": True}, None),
        ({"bos_token": "<|end|>", "add_bos_token": False}, ["<|end|>", "$A"]),
        ({"bos_token": "<|end|>", "eos_token": "!"}, ["<|end|>", "$A", "!"]),
    ],
)
def test_ids_equal_those_of_transformers(config, template, tiny_model, tmp_path):
    import transformers

    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    directory = directory_of(tiny_model, tmp_path / "x", tokenizer_config=config, config=None)
    if template is not None:
        with_template(directory, template)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = Tokenizer.load(directory)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.special_tokens == {k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)}
