"""Rows of a batch job: what is accepted under which name, and an error that names the field for everything else."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.batch.params import NAMES, TABLE, SamplingParams, from_options, options
from jaxinfer.batch.requests import BadRow, Limits, Request, parse_row, prepare
from jaxinfer.errors import InputError

LIMITS = Limits(max_length=64, bias=4, forced=2, stop_ids=3, top_logprobs=5)


class Codec:
    """One token a byte of UTF-8, 256 before a text."""

    vocab_size = 260
    eos_ids = (257,)

    def encode(self, text, *, special=True):
        return [256] * special + list(text.encode())

    def encode_messages(self, messages):
        return self.encode("".join(m["content"] for m in messages))

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def parse(row, **options):
    data = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(data, where="in.jsonl:7", defaults=SamplingParams(), **options)


def prepared(**row):
    request = parse({"id": 1, **row})
    assert isinstance(request, Request), request
    return prepare(request, Codec(), LIMITS)


def test_a_row_of_every_parameter():
    row = {
        "id": "a", "prompt": "text", "max_tokens": 5, "min_tokens": 2, "temperature": 1, "top_k": -1, "top_p": 0.5,
        "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 0.5,
        "logit_bias": {"7": -5, "3": 1.5}, "banned_tokens": [1], "bad_words": "x", "forced_tokens": [4], "seed": 3,
        "stop": ["\n", "END"], "stop_token_ids": [9], "ignore_eos": True, "n": 2, "logprobs": True, "top_logprobs": 3,
        "source": "what is edited",
    }  # fmt: skip
    request = parse(row)
    assert isinstance(request, Request)
    p = request.params
    assert (p.top_k, p.logprobs, p.temperature, p.logit_bias) == (0, 3, 1.0, ((3, 1.5), (7, -5.0)))
    assert p.stop == ("\n", "END") and p.bad_words == ("x",) and p.seed == 3 and p.n == 2
    grammars = {"json_schema", "regex", "grammar", "response_format", "guided_json", "guided_regex", "guided_grammar"}
    assert {name for name in NAMES if name not in row} == {"max_completion_tokens", "echo", *grammars}


def test_an_openai_row():
    body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "user": "u"}
    row = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    request = parse({**row, "body": {**body, "max_completion_tokens": 9, "stream": False, "stop": None}})
    assert isinstance(request, Request), request
    assert (request.id, request.form, request.model, request.params.max_tokens) == ("c", "chat", "m", 9)
    assert request.messages == ({"role": "user", "content": "hi"},)
    assert parse({**row, "body": {**body, "temperature": 101}}).error == (
        "body.temperature: got 101; accepted: a number from 0 to 100"
    )
    assert parse({"custom_id": "c", "body": {"prompt": "p"}}).form == "completion"


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "p", "temprature": 1}, "temprature: unknown key; accepted: prompt, messages, max_tokens"),
        ({"prompt": "p", "temperature": -1}, "temperature: got -1; accepted: a number from 0 to 100"),
        ({"prompt": "p", "temperature": math.nan}, "temperature: got nan; accepted"),
        ({"prompt": "p", "temperature": "hot"}, "temperature: got 'hot'; accepted"),
        ({"prompt": "p", "max_tokens": True}, "max_tokens: got true; accepted: a whole number from 1"),
        ({"prompt": "p", "max_tokens": 1.5}, "max_tokens: got 1.5; accepted"),
        ({"prompt": "p", "max_tokens": 10**30}, "max_tokens: got a whole number of about 30 digits; accepted"),
        ({"prompt": "p", "top_p": 0}, "top_p: got 0; accepted: a number above 0 up to 1"),
        ({"prompt": "p", "top_p": 10**400}, "top_p: got a whole number of about 400 digits"),
        ({"prompt": "p", "seed": -1}, "seed: got -1; accepted"),
        ({"prompt": "p", "stop": ["a", ""]}, "stop: got a list of 2; accepted: a string or a list"),
        ({"prompt": "p", "stop": "\ud800"}, "stop: got '\\ud800'; accepted"),
        ({"prompt": "p", "logit_bias": {"x": 1}}, "logit_bias: got an object of 1; accepted"),
        ({"prompt": "p", "logit_bias": {"1": 101}}, "logit_bias: got an object of 1; accepted"),
        ({"prompt": "p", "logprobs": 21}, "logprobs: got 21; accepted: true, false or a whole number from 0 to 20"),
        ({"prompt": "p", "top_logprobs": 2}, "top_logprobs: got it without logprobs"),
        ({"prompt": "p", "min_tokens": 9, "max_tokens": 3}, "min_tokens: got 9; accepted: at most max_tokens (3)"),
        ({"prompt": "p", "max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens: got 4 beside another"),
        ({"prompt": "p", "echo": True, "logprobs": 1}, "echo: got it with logprobs"),
        ({}, "prompt: got nothing; accepted: prompt or messages"),
        ({"prompt": "p", "messages": []}, "messages: got them beside prompt"),
        ({"prompt": 5}, "prompt: got 5; accepted: a string or a list of token ids"),
        ({"prompt": [1, True]}, "prompt: got a list with true"),
        ({"prompt": ["a", "b"]}, "prompt: got a list with 'a'"),
        ({"prompt": "\udc00"}, "prompt: got half of a surrogate pair"),
        ({"messages": "hi"}, "messages: got 'hi'; accepted: a list of at least one message"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role: got 'king'; accepted: system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: got nothing; accepted"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content: got [an object"),
    ],
)
def test_errors_name_the_field(row, error):
    bad = parse({"id": "a", **row})
    assert isinstance(bad, BadRow) and bad.id == "a"
    assert bad.error.startswith(error), bad.error


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'{"id": 1', "row: got no JSON (Expecting ',' delimiter at character 8)"),
        (b"[1]", "row: got [1]; accepted: one JSON object"),
        (b"\xff\xfe", "row: got bytes that are not UTF-8 (at byte 0)"),
        (b"[" * 100_000, "row: got JSON that is nested too deeply"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "row: got a number of too many digits"),
        (b'{"id": 1, "id": 2}', "row: got the key 'id' twice"),
        (b'{"id": [1], "prompt": "p"}', "id: got [1]; accepted: a string"),
        (b'{"id": true, "prompt": "p"}', "id: got true; accepted: a string"),
        (b'{"custom_id": 3, "body": {}}', "custom_id: got 3; accepted: a string of 1 to 512 characters"),
        (b'{"id": 1, "custom_id": "a"}', "id: got it beside custom_id"),
    ],
)
def test_rows_that_cannot_be_read_are_named_by_their_place(data, error):
    bad = parse(data)
    assert isinstance(bad, BadRow) and bad.id == "in.jsonl:7"
    assert bad.error.startswith(error), bad.error


def test_a_problem_of_the_reader_is_the_rows_error():
    assert parse(b"", problem="row: too long") == BadRow("in.jsonl:7", "row: too long")


def test_preparing_checks_vocabulary_and_room():
    row = prepared(prompt="abc", banned_tokens=[5], bad_words=["x"], logit_bias={"5": 2, "6": 3}, max_tokens=500)
    assert row.tokens == (256, 97, 98, 99) and row.stop_ids == (257,) and row.limit == 60
    assert dict(row.bias) == {5: -math.inf, 6: 3.0, ord("x"): -math.inf}
    assert prepared(prompt=[1, 2], ignore_eos=True, stop_token_ids=[4]).stop_ids == (4,)
    assert prepared(prompt="x" * 64).error == (
        "prompt: got 65 tokens; accepted: at most 63, so that one answer token fits into the job's length of 64"
    )
    assert prepared(prompt=[]).error == "prompt: got no tokens; accepted: at least one"
    assert prepared(prompt=[260]).error == "prompt: got token id 260; accepted: 0 to 259"
    assert prepared(prompt="p", bad_words=["two"]).error.startswith("bad_words: got 'two', which is 3 tokens")
    assert prepared(prompt="p", banned_tokens=[0, 1, 2, 3, 4]).error.startswith("logit_bias, banned_tokens and")


def test_options_and_rows_come_from_one_table():
    listed = options()
    assert [o.name for o in listed] == [p.name for p in TABLE if p.name != "response_format"]
    assert {o.flag for o in listed} >= {"--max-tokens", "--top-p", "--logit-bias", "--stop"}
    assert all(o.help for o in listed)
    assert from_options({"temperature": 0.5, "stop": ["a", "b"], "logit_bias": '{"3": 1}', "seed": None}) == (
        SamplingParams(temperature=0.5, stop=("a", "b"), logit_bias=((3, 1.0),))
    )
    with pytest.raises(InputError, match="top_k: got -2; accepted: a whole number from -1"):
        from_options({"top_k": -2})
    with pytest.raises(InputError, match="logit_bias: got '{'; accepted: an object"):
        from_options({"logit_bias": "{"})
    defaults = SamplingParams(min_tokens=50, max_tokens=100)
    assert defaults.from_json({"max_tokens": 5}).min_tokens == 5


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["id", "prompt", "messages", "custom_id", "method", "url", "body", "stream", *NAMES])
rows = st.dictionaries(names | st.text(max_size=4), values, max_size=6)
bodies = st.builds(lambda row, body: {**row, "custom_id": "c", "body": body}, rows, rows)
lines = st.binary(max_size=40) | (rows | bodies | values).map(lambda row: json.dumps(row).encode())


def holds(data):
    """Whatever a line holds, it becomes a request or a row with a one-line error that can be written down."""
    row = parse(data)
    if isinstance(row, Request):
        row = prepare(row, Codec(), LIMITS)
    if isinstance(row, BadRow):
        assert row.error and "\n" not in row.error and len(row.error) < 600
        assert "; accepted: " in row.error
        json.dumps(row.error).encode()


@settings(max_examples=100, deadline=None)
@given(data=lines)
def test_malformed_rows_never_raise(data):
    holds(data)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(data=lines)
def test_ten_thousand_malformed_rows_never_raise(data):
    holds(data)
