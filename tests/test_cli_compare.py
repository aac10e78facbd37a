"""`jaxinfer compare`: how methods are named, and the table of a run."""

import json

import pytest

from jaxinfer.cli import compiled, main, side_by_side
from jaxinfer.errors import InputError


def test_methods_are_split_at_their_commas():
    assert side_by_side.split("plain,draft:gamma=2,draft:gamma=4") == ["plain", "draft:gamma=2", "draft:gamma=4"]
    assert side_by_side.split("sink-cache:sinks=2,window=9,plain") == ["sink-cache:sinks=2,window=9", "plain"]


@pytest.mark.parametrize("name", ["", "magic", "draft:window=3", "sink-cache:sinks=none", "int8-weights:step=3"])
def test_unknown_methods_say_what_is_accepted(name):
    with pytest.raises(InputError, match="--methods: got .*accepted: "):
        side_by_side.parse(name)


def test_compare(capsys, monkeypatch, tiny_model, tiny_draft):
    """Exact methods agree with the first to the token; a draft of another random model is seldom accepted."""
    monkeypatch.setattr(compiled, "use_cache", lambda: None)
    command = ["compare", "--model", tiny_model, "--draft-model", tiny_draft, "--methods", "plain,draft"]
    options = ["--prompt", "def f(x):", "--prompt", "import", "--max-tokens", "20", "--rounds", "1", "--json"]
    assert main([str(word) for word in (*command, *options)]) == 0
    report = json.loads(capsys.readouterr().out)
    plain, draft = report["methods"]
    assert (plain["method"], draft["method"]) == ("plain", "draft")
    assert plain["tokens_per_forward"] == 1.0 <= draft["tokens_per_forward"] < 5
    assert plain["equal_answers"] == draft["equal_answers"] == 2
    assert plain["tokens"] == draft["tokens"] == 40
    assert plain["speedup"] == 1.0 and draft["speedup"] > 0
    side_by_side.show({**report, "quiet": False, "methods": [plain, {**draft, "speedup": 0.5}]})
    shown = capsys.readouterr().out
    assert "Slower than plain here: draft." in shown
    assert "Other programs were at work" in shown
