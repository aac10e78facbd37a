"""`--drafter auto`: how it is written, and a job that measures once: killed and resumed, it goes on as it began."""

import json

import pytest

from jaxinfer.batch.engine import DecodeEngine
from jaxinfer.cli import compiled, main, options, side_by_side
from jaxinfer.cli.auto import Auto, curves_of
from jaxinfer.decode import Chooser, CopySpec, DraftModel, TokenRecycling
from jaxinfer.errors import InputError
from jaxinfer.measure import LatencyCurve

CHEAP = LatencyCurve((1, 2, 3, 5), (1.0, 1.01, 1.1, 1.2))
DEAR = LatencyCurve((1, 5), (1.0, 9.0))


def test_forms():
    parse = options.DRAFTERS.parse
    assert parse("auto", step=None).inner == CopySpec()
    model = object()
    assert parse("auto", step=model).inner == DraftModel(model)  # type: ignore[arg-type] - never run
    assert parse("auto:drafter=token-recycling,gain=1.3").inner == TokenRecycling()
    found = parse("auto:drafter=copyspec:gamma=4+copies=7,probe=100")
    assert found.inner == CopySpec(4, 7) and found.width == 7 and found.probe == 100
    assert side_by_side.split("plain,auto:gain=1.2,drafter=draft:gamma=3,auto:drafter=copyspec") == [
        "plain", "auto:gain=1.2,drafter=draft:gamma=3", "auto:drafter=copyspec",
    ]  # fmt: skip
    for text, said in (
        ("auto:drafter=auto", "drafter=auto"),
        ("auto:drafter=magic", "magic"),
        ("auto:drafter=copyspec:size=3", "size=3"),
        ("auto:size=3", "size=3"),
    ):
        with pytest.raises(InputError, match=said):
            parse(text)


def test_what_it_takes_for_a_draft_model():
    assert options.draft_for("tinycode", None, "auto") == "tinycode-draft"
    assert options.draft_for("elsewhere", None, "auto") is None
    assert options.draft_for("elsewhere", None, "plain,auto:drafter=copyspec") is None
    with pytest.raises(InputError, match="--drafter pearl"):
        options.draft_for("elsewhere", None, "auto:drafter=pearl")


def test_curves_go_through_json_unchanged():
    auto = Auto(drafter="copyspec:copies=4", gain=1.0)
    chooser = Chooser(CopySpec(copies=4), CHEAP, None, gain=1.0)
    assert auto.with_curves(json.loads(json.dumps(curves_of(chooser)))) == chooser
    draft = Chooser(CopySpec(copies=4), CHEAP, LatencyCurve((1, 2), (0.1, 0.3)))
    assert curves_of(draft)["draft"] == {"sizes": [1, 2], "seconds": [0.1, 0.3]}
    with pytest.raises(InputError, match="without curves"):
        auto.with_curves(None)


class Measured:
    """Stands for the measurement: counts, and finds what it is told."""

    def __init__(self, monkeypatch, curve):
        self.count = 0

        def measured(drafter, step, params, *, batch, capacity, draft_params=None, **given):
            self.count += 1
            assert batch == 4 and capacity % 64 == 0
            return Chooser(drafter, curve, **given)

        monkeypatch.setattr(Chooser, "measured", staticmethod(measured))


@pytest.fixture
def job(monkeypatch, tiny_model, tmp_path):
    """A function that runs the job into a file, on a machine of a curve, `until`; to (exit code, measurements)."""
    monkeypatch.setattr(compiled, "use_cache", lambda: None)
    rows = [{"id": i, "prompt": f"{i % 7} ab ab", "max_tokens": 12} for i in range(80)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    advance = DecodeEngine.advance

    def run(name, curve, until=lambda: False):
        def limited(engine):
            if until():
                raise KeyboardInterrupt
            return advance(engine)

        monkeypatch.setattr(DecodeEngine, "advance", limited)
        measured = Measured(monkeypatch, curve)
        command = ["generate", "--model", tiny_model, "--input", path, "--output", tmp_path / name]
        command += ["--batch-size", 4, "--temperature", 1, "--drafter", "auto:drafter=copyspec:gamma=1+copies=4,gain=1"]
        return main([str(word) for word in command]), measured.count

    return run


@pytest.mark.slow
def test_a_job_measures_once_and_goes_on_as_it_began(job, tmp_path):
    """Killed after some shards, it is resumed where forwards cost otherwise: the same bytes, nothing measured."""
    assert job("whole.jsonl", CHEAP) == (0, 1)

    def parts():
        return list((tmp_path / "killed.jsonl.job").glob("work-*/parts/*.jsonl"))

    assert job("killed.jsonl", CHEAP, until=parts) == (130, 1)
    assert len(parts()) == 1  # of two: the rows of the other begin anew, with other neighbours
    assert job("killed.jsonl", DEAR) == (0, 0)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "killed.jsonl").read_bytes() == whole
    manifest = json.loads((tmp_path / "killed.jsonl.job" / "manifest.json").read_text())
    assert manifest["settings"]["curves"]["target"]["seconds"] == list(CHEAP.seconds)
    # And the curve matters: a job that began on the other machine has other draws.
    assert job("other.jsonl", DEAR) == (0, 1)
    assert (tmp_path / "other.jsonl").read_bytes() != whole
