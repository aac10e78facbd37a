"""Rows that say what they edit: a job under --drafter aggressive drafts from it, and answers as without."""

import json

import pytest

from jaxinfer.cli import compiled, main
from jaxinfer.decode import Aggressive
from jaxinfer.decode.language_model import load

PROMPTS = [f"def f{i}(x):" for i in range(6)]


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load(tiny_model)


@pytest.fixture(scope="module")
def plain(lm):
    """What the model says to each prompt."""
    return lm.generate(PROMPTS, max_tokens=24, ignore_eos=True)


def test_a_job_drafts_from_what_its_rows_edit(monkeypatch, tiny_model, tmp_path, plain):
    """The sources are the answers, but for one row that has none, and one that has another's: the answers are plain."""
    monkeypatch.setattr(compiled, "use_cache", lambda: None)
    rows = [
        {"id": i, "prompt": prompt, "max_tokens": 24, "ignore_eos": True, "source": found.text}
        for i, (prompt, found) in enumerate(zip(PROMPTS, plain, strict=True))
    ]
    del rows[1]["source"]
    rows[2]["source"] = rows[0]["source"]
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", "--model", tiny_model, "--input", path, "--output", output, "--batch-size", 6]
    assert main([str(word) for word in (*command, "--drafter", "aggressive:drafts=6")]) == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["text"] for line in answers] == [found.text for found in plain]
    manifest = json.loads((tmp_path / "out.jsonl.job" / "manifest.json").read_text())
    assert manifest["settings"]["source"] == 64


def test_a_library_call_takes_a_source(lm, plain):
    """The text is encoded anew, as a user's would be: a draft is right where that gives the same tokens."""
    found = lm.generate(PROMPTS[:2], max_tokens=24, ignore_eos=True, source=plain[0].text, drafter=Aggressive(drafts=6))
    assert [f.tokens for f in found] == [f.tokens for f in plain[:2]]
    assert found[0].stats.accepted > 0 and found[0].stats.forwards < 24


def test_a_source_that_does_not_fit_is_told(lm):
    from jaxinfer.batch.params import SamplingParams
    from jaxinfer.batch.requests import BadRow, Limits, parse_row, prepare

    row = parse_row(b'{"id": 1, "prompt": "x", "source": "abcdef"}', where="f:1", defaults=SamplingParams())
    assert not isinstance(row, BadRow)
    bad = prepare(row, lm.codec, Limits(64, 0, 0, 1, 0, source=4))
    assert isinstance(bad, BadRow) and "source: got" in bad.error and "at most 4" in bad.error
