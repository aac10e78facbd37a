"""Grammars where users meet them: `generate`, rows of a job, options of the command line, and what each refuses."""

import json
import re

import pytest

from jaxinfer.batch.params import SamplingParams, from_options, options
from jaxinfer.errors import InputError

pytest.importorskip("llguidance")
import jsonschema

from jaxinfer.cli import compiled, main
from jaxinfer.decode import CopySpec
from jaxinfer.decode.language_model import load

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["integer", "string"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 9},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["kind", "size", "flags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}


@pytest.fixture(scope="module", autouse=True)
def no_cache_of_the_users():
    """The command line keeps compiled programs in the user's cache directory; the tests leave it alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "use_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load(tiny_model)


@pytest.fixture(scope="module")
def greedy(lm):
    return lm.generate("def f(x):", json_schema=SCHEMA, max_tokens=200)


@pytest.mark.slow
def test_answers_are_documents_of_the_schema(lm, greedy):
    sampled = lm.generate("def f(x):", json_schema=SCHEMA, max_tokens=200, temperature=1.5, n=4)
    for answer in [greedy, *sampled]:
        assert answer.finish_reason == "stop", answer.text
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert len({answer.text for answer in sampled}) > 1
    assert greedy.stats.forwards < greedy.stats.emitted, "forced tokens need no forward"


def test_every_way_of_asking_gives_the_same(lm, greedy):
    assert "".join(lm.stream("def f(x):", response_format=FORMAT, max_tokens=200)) == greedy.text
    copied = lm.generate(["def f(x):"], drafter=CopySpec(2, 2), json_schema=json.dumps(SCHEMA), max_tokens=200)
    assert copied[0].text == greedy.text and copied[0].stats.accepted > 0


def test_expressions_and_grammars(lm):
    date = lm.generate("on ", regex=r"\d{4}-\d{2}", max_tokens=200)
    assert re.fullmatch(r"\d{4}-\d{2}", date.text) and date.finish_reason == "stop"
    answer = lm.generate("?", grammar='start: "yes" | "no" (" way")?', max_tokens=200)
    assert answer.text in ("yes", "no", "no way")
    cut = lm.generate("?", regex="(ab)+c", max_tokens=200, stop=["ba"])
    assert cut.text == "a" and cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"json_schema": {"type": "object", "minProperties": 1, "not": {}}}, 'json_schema: got .*"not"'),
        ({"json_schema": "{"}, "json_schema: got .*accepted: a JSON Schema"),
        ({"json_schema": {}, "regex": "a"}, "regex: got it beside json_schema; accepted: one of the two"),
        ({"json_schema": {}, "ignore_eos": True}, "ignore_eos: got it with json_schema"),
        ({"regex": "ab", "forced_tokens": [5]}, "forced_tokens: got tokens that the regex forbids"),
        ({"regex": ""}, "regex: got ''; accepted: a regular expression"),
        ({"response_format": {"type": "xml"}}, 'response_format: got .*accepted: an object of type "text"'),
        ({"response_format": FORMAT, "json_schema": {}}, "response_format: got it beside another json_schema"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_runs(lm, asked, said):
    with pytest.raises(InputError, match=said):
        lm.generate("x", **asked)


def test_without_the_library_the_extra_is_named(tiny_model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'jaxinfer\[grammar\]'"):
        load(tiny_model).generate("x", regex="a")


def test_the_forms_of_response_format():
    empty = SamplingParams()
    text = json.dumps(SCHEMA)
    assert empty.from_json({"response_format": FORMAT}) == empty.from_json({"json_schema": SCHEMA})
    assert empty.from_json({"guided_json": SCHEMA}).constraint == ("json_schema", text)
    assert empty.from_json({"response_format": {"type": "text"}}) == empty
    anything = empty.from_json({"response_format": {"type": "json_object"}})
    assert anything.constraint == ("json_schema", '{"type": "object"}')
    assert anything.changed() == {"json_schema": '{"type": "object"}'}
    assert from_options({"json_schema": SCHEMA}).json_schema == text and hash(anything)
    files = {option.name for option in options() if option.file}
    assert files == {"json_schema", "grammar", "source"} and "response_format" not in {
        option.name for option in options()
    }


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_command_line(capsys, tiny_model, tmp_path, greedy):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    command = ["generate", "--model", tiny_model, "--prompt", "def f(x):", "--max-tokens", 200]
    assert run(capsys, *command, "--json-schema", file)[:2] == (0, greedy.text + "\n")
    code, _, err = run(capsys, *command, "--json-schema", tmp_path / "none.json")
    assert code == 2 and "--json-schema: got" in err and "accepted: a readable text file" in err
    code, _, err = run(capsys, *command, "--regex", "[a")
    assert code == 2 and "regex: got '[a'" in err


def test_rows_of_a_job_have_grammars_of_their_own(capsys, tiny_model, tmp_path, greedy):
    rows = [
        {"id": 1, "prompt": "def f(x):", "json_schema": SCHEMA},
        {"id": 2, "prompt": "def f(x):", "response_format": FORMAT},
        {"id": 3, "prompt": "x", "regex": "(foo|bar){2}"},
        {"id": 4, "prompt": "x", "json_schema": {"uniqueItems": True}},
        {"id": 5, "prompt": "x", "max_tokens": 5},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", "--model", tiny_model, "--input", source, "--output", output, "--max-tokens", 200]
    code, _, err = run(capsys, *command, "--batch-size", 2)
    assert code == 3, err
    answers = {answer["id"]: answer for answer in map(json.loads, output.read_text().splitlines())}
    assert answers[1]["text"] == answers[2]["text"] == greedy.text
    assert re.fullmatch("(foo|bar){2}", answers[3]["text"])
    assert "uniqueItems" in json.dumps(answers[4]["error"])
    assert answers[5]["usage"]["completion_tokens"] == 5
    code, out, _ = run(capsys, *command[:7], "--dry-run")
    assert code == 3 and out.count("\n") == 1 and "uniqueItems" in out
