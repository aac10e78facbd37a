"""scripts/check_grammar.py: counts what it should, sees what is wrong, and says so where the data is absent."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

from jaxinfer.decode.language_model import load

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "check_grammar.py"))
ONE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load(tiny_model)


def case(schema, *tests):
    return {"name": f"case {len(tests)}", "schema": schema, "tests": [{"data": d, "valid": v} for d, v in tests]}


def test_instances_are_judged_and_refusals_listed(lm):
    bad = []
    cases = [case(ONE, ({"a": 1}, True), ({"a": "x"}, False), ({}, False)), case({"not": {"type": "string"}})]
    found = SCRIPT["check_instances"](lm, cases, bad)
    assert not bad and (found["held"], found["refused"]) == (1, 1)
    assert (found["valid_accepted"], found["invalid_refused"]) == (1, 2)
    assert found["refused_by"] == {'Unimplemented keys: ["not"]': ["case 0"]}


def test_a_wrong_judgement_is_seen(lm):
    bad = []
    SCRIPT["check_instances"](lm, [case(ONE, ({"a": 1}, False)), case(ONE, ({"a": 1.5}, True))], bad)
    assert len(bad) == 2 and "misjudged" in bad[0]


def test_groups_of_the_suite(lm, tmp_path):
    groups = [
        {"description": "exact", **case(ONE, ({"a": 1}, True), ({}, False))},
        {"description": "narrower", **case({"type": "integer"}, (1.0, True), ("1", False))},
        {"description": "refused", **case({"uniqueItems": True}, ([1, 1], False))},
        {"description": "wider", **case({"type": "string", "format": "date"}, ("2021-02-29", False))},
    ]
    (tmp_path / "optional").mkdir()
    (tmp_path / "optional" / "some.json").write_text(json.dumps(groups))
    bad = []
    found = SCRIPT["check_suite"](lm, tmp_path, bad)
    assert {k: found[k] for k in ("groups", "exact", "narrower", "refused", "wider")} == {
        "groups": 4, "exact": 1, "narrower": 1, "refused": 1, "wider": 1,
    }  # fmt: skip
    assert len(bad) == 1 and "some.json, 'wider'" in bad[0]


def test_answers_are_judged_by_the_other_library(lm):
    judged, matcher = SCRIPT["judged"], SCRIPT["matcher_of"](lm, ONE)
    reason = SCRIPT["Reason"]
    tokens = [*SCRIPT["spelled"](lm, {"a": 1}), *lm.tokenizer.eos_ids]
    assert judged(lm, {"schema": ONE}, matcher, tokens, reason.EOS) == "valid"
    assert judged(lm, {"schema": {"type": "array"}}, matcher, tokens, reason.EOS) == "not valid"
    assert judged(lm, {"schema": ONE}, matcher, tokens[1:], reason.EOS) == "no JSON"
    assert judged(lm, {"schema": ONE}, matcher, tokens[:2], reason.LENGTH) == "cut short"
    assert judged(lm, {"schema": ONE}, matcher, tokens[1:2], reason.LENGTH) == "left its grammar"


def test_without_the_data_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["check_grammar.py", "--data", str(tmp_path)])
    assert SCRIPT["main"]() == 0
    assert "skipped" in capsys.readouterr().out
