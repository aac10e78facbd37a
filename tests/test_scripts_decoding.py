"""scripts/bench_decoding.py: widening changes no hidden state, what is slow runs once, and answers are validated."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer import measure
from jaxinfer.models import ModelConfig, Step

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    """The script as a module, with the folder that it finds its parts in."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import bench_decode
        import bench_decoding
        from decoding_bench import schema

        yield types.SimpleNamespace(main=bench_decoding, widen=bench_decode.widen, schema=schema)
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.slow
def test_the_wide_model_has_the_hidden_states_of_the_narrow_one(bench):
    """So packaged heads, which read them, draft for both alike."""
    config = ModelConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48,
        max_length=64, tie_embeddings=True,
    )  # fmt: skip
    step = Step(config)
    params = step.init(jax.random.key(0))
    wide, more = bench.widen(step, params, 100_000)
    tokens = np.arange(12)[None] % 40
    one, other = (s(p, tokens, np.arange(12)[None], taps=(0, 1))[0] for s, p in ((step, params), (wide, more)))
    assert wide.config.mlp_size > 48
    for a, b in zip([one.hidden, *one.taps], [other.hidden, *other.taps], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    more["layers_0"]["mlp"]["down"] = more["layers_0"]["mlp"]["down"].at[60].add(1.0)  # a unit that is not idle
    assert not np.allclose(one.hidden, wide(more, tokens, np.arange(12)[None])[0].hidden, atol=1e-3)


def test_what_is_slower_than_plain_is_timed_once(bench):
    now = [0.0]
    calls = {"plain": 0, "fast": 0, "slow": 0}

    def run(name, seconds):
        def call():
            calls[name] += 1
            now[0] += seconds

        return call

    real = measure.interleaved
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "interleaved", lambda runs, **o: real(runs, clock=lambda: now[0], **o))
        timings = bench.main.timed({"plain": run("plain", 1.0), "fast": run("fast", 0.5), "slow": run("slow", 2.0)}, 3)
    assert [len(timings[name].seconds) for name in ("plain", "fast", "slow")] == [3, 3, 1]
    assert calls["slow"] == 2
    assert bench.main.speedup(timings["plain"], timings["slow"]) == 0.5
    assert bench.main.speedup(timings["plain"], timings["fast"]) == 2.0


@dataclasses.dataclass
class Said:
    text: str
    tokens: tuple = (1, 2)
    finish_reason: str = "stop"
    stats: types.SimpleNamespace = dataclasses.field(
        default_factory=lambda: types.SimpleNamespace(emitted=2, forwards=1, accepted=1)
    )


def test_answers_are_held_against_the_schema(bench):
    pytest.importorskip("jsonschema")
    good = {"name": "f", "arguments": ["a"], "statements": 3, "documented": True, "kind": "function"}
    texts = [json.dumps(good), json.dumps(good | {"kind": "lambda"}), json.dumps(good)[:-1]]
    spent = {"masks": 6.0, "mask_seconds": 0.001, "steps": 3.0, "seconds": 0.01}
    runner = types.SimpleNamespace(method="plain", answers=[Said(text) for text in texts], spent=spent)
    found = bench.schema.statistics(runner, runner)
    assert (found["answers"], found["valid"], found["finished"], found["equal"]) == (3, 1, 3, 3)
    assert found["tokens_per_forward"] == 2.0 and found["mask_share"] == pytest.approx(0.1)


def test_the_wide_model_runs_a_part(bench):
    chosen = [(b, t, task) for b in (1, 8) for t in (0, 0.8) for task in ("free", "edit", "repetitive", "json")
              if bench.main._on_the_wide(task, b, t)]  # fmt: skip
    assert len(chosen) == 7 and (1, 0, "json") in chosen and (8, 0.8, "edit") not in chosen


def test_the_readme_shows_what_was_measured():
    import runpy

    effect = runpy.run_path(str(ROOT / "scripts/make_readme.py"))["decoding"]
    row = {"task": "edit", "method": "copyspec", "batch": 1, "temperature": 0.0, "tokens_per_forward": 5.25}
    rows = [row | {"model": "tiny", "speedup": 1.5}, row | {"model": "wide", "speedup": 3.456, "batch": 8}]
    assert effect("edit:copyspec", rows) == "1.50x, 5.25 tokens a forward (edit, 7M)"
    assert effect("edit:copyspec", [*rows, row | {"model": "wide", "speedup": 3.456}]).startswith("3.46x, 5.25")
    assert effect("free:copyspec", rows) == ""
