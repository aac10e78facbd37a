"""The engine of slots: a row's tokens and log-probabilities depend on it alone, bit for bit; nothing retraces."""

import json
import re

import jax
import numpy as np
import pytest

from jaxinfer import decode
from jaxinfer.batch import engine as engines
from jaxinfer.batch.engine import DecodeEngine, Settings
from jaxinfer.batch.manifest import Survey
from jaxinfer.batch.params import SamplingParams
from jaxinfer.batch.requests import Limits, Request, prepare
from jaxinfer.batch.runner import Admission, Runner, row_key
from jaxinfer.decode.language_model import load
from jaxinfer.errors import ConfigError
from tests import batch_fakes as fakes

PROMPTS = ["def f(x):", "import os\n" * 6, "é", "class A:\n    pass\n", "x = 1\n" * 12, "return"]
SETTINGS = Settings(
    slots=4, capacity=192, max_tokens=40, steps=3, prefill_rows=2, prefill_chunk=16, bias=4, forced=2, stop_ids=2,
    top_logprobs=3, features=("sample", "top_k", "top_p", "penalties", "bias", "min_tokens", "forced"),
)  # fmt: skip


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load(tiny_model)


@pytest.fixture(scope="module")
def engine(lm):
    return DecodeEngine(lm.step, lm.params, SETTINGS)


def prepared(lm, index, **params):
    row = prepare(
        Request(index, PROMPTS[index % len(PROMPTS)], None, SamplingParams(**params)), lm.codec, SETTINGS.limits
    )
    assert not hasattr(row, "error"), row
    return row


def rows_of(lm):
    """Greedy, sampled, penalised, biased, forced and short rows."""
    return [
        prepared(lm, 0, max_tokens=20, logprobs=3),
        prepared(lm, 1, max_tokens=11, temperature=0.9, logprobs=1),
        prepared(lm, 2, max_tokens=30, temperature=1.3, top_k=20, repetition_penalty=1.5),
        prepared(lm, 3, max_tokens=9, forced_tokens=(5, 6), banned_tokens=(7,), min_tokens=9),
        prepared(lm, 4, max_tokens=17, logit_bias=((9, 3.0),), temperature=0.5, top_p=0.8),
        prepared(lm, 5, max_tokens=40, frequency_penalty=0.5, ignore_eos=True),
    ]


def answers(engine, rows, slots, together=True):
    """Tokens, log-probabilities and reason of each row, put into `slots` at once or one row after every look."""
    engine.reset()
    waiting = list(zip(rows, slots, strict=True))
    out, where = {}, {}
    while waiting or where:
        free = [pair for pair in waiting if pair[1] not in where]
        for row, slot in free if together else free[:1]:
            if slot in where:
                continue
            waiting.remove((row, slot))
            where[slot] = row.request.id
            out[row.request.id] = ([], [], [], None)
            engine.admit([Admission(slot, row, row_key(1, row.request.id, 0))])
        for event in engine.advance().events:
            tokens, logprobs, top, _ = out[where[event.slot]]
            tokens += event.tokens
            logprobs += event.logprobs or []
            top += event.top or []
            out[where[event.slot]] = (tokens, logprobs, top, event.finished)
            if event.finished:
                del where[event.slot]
    return out


@pytest.fixture(scope="module")
def reference(engine, lm):
    return answers(engine, rows_of(lm), [0, 1, 2, 3, 0, 1])


def test_rows_do_not_depend_on_slots_order_or_arrival(engine, lm, reference):
    rows = rows_of(lm)
    assert answers(engine, rows[::-1], [3, 3, 0, 1, 2, 2]) == reference
    assert answers(engine, rows, [2, 2, 2, 2, 2, 2]) == reference  # each alone
    assert answers(engine, rows, [1, 0, 3, 2, 2, 0], together=False) == reference


def test_neighbours_of_nan_do_not_matter(engine, lm, reference):
    """A row whose weights overflow (its embedding is not finite) becomes an error; the others keep their bits."""
    assert not lm.config.tie_embeddings  # a tied table would spread one row's NaN to every row's logits
    used = {t for row in rows_of(lm) for t in row.tokens} | {t for tokens, *_ in reference.values() for t in tokens}
    poison = next(t for t in range(1, lm.step.vocab_size) if t not in used)  # 0 fills prompts up
    table = np.array(lm.params["embedding"])
    table[poison] = np.nan
    rows = rows_of(lm)
    broken = DecodeEngine(lm.step, {**lm.params, "embedding": table}, SETTINGS)
    bad = prepare(Request("bad", [poison, poison, 3], None, SamplingParams()), lm.codec, SETTINGS.limits)
    got = answers(broken, [rows[0], bad, rows[1], rows[2], rows[3], rows[4], rows[5]], [0, 1, 2, 3, 0, 1, 2])
    assert got.pop("bad")[3] == "error"
    assert got == reference


def test_answers_are_generates(lm, engine, reference):
    """The same greedy tokens as `decode.generate` gives without slots."""
    row = rows_of(lm)[0]
    config = decode.Config(max_tokens=20, eos=lm.codec.eos_ids)
    tokens, lengths = lm.encode([PROMPTS[0]])
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    result = generate(lm.step, lm.params, tokens, lengths, config=config, key=jax.random.key(0))
    n = int(result.lengths[0])
    got, logprobs, top, _ = reference[row.request.id]
    assert got == result.tokens[0, :n].tolist() and len(logprobs) == len(top) == n
    assert all(t[0][0] == token and abs(t[0][1] - p) < 1e-6 for t, token, p in zip(top, got, logprobs, strict=True))


def test_lists_and_limits_hold(reference, lm):
    forced = reference[3][0]
    assert forced[:2] == [5, 6] and 7 not in forced and len(forced) == 9
    assert [len(reference[i][0]) <= limit for i, limit in enumerate((20, 11, 30, 9, 17, 40))] == [True] * 6
    assert reference[5][3] == "length" and len(reference[5][0]) == 40


def test_a_released_slot_is_free_and_an_error_is_an_event(engine, lm, reference):
    engine.reset()
    rows = rows_of(lm)
    engine.admit([Admission(slot, rows[5], row_key(1, 5, 0)) for slot in range(3)])
    engine.advance()
    engine.release(1)
    engine.release(1)
    assert [event.slot for event in engine.advance().events] == [0, 2]
    engine.admit([Admission(1, rows[0], row_key(1, 0, 0))])
    got = []
    while len(got) < len(reference[0][0]):
        got += next(event.tokens for event in engine.advance().events if event.slot == 1)
    assert got == reference[0][0]


def test_nothing_is_traced_again(engine, lm, reference):
    """One program to decode, one for each prefill width, however the rows change."""
    programs = [f.jitted._cache_size() for f in (engines._advance, engines._place, engines._start)]
    rows = [prepared(lm, i, max_tokens=3 + i, temperature=i / 7, stop_token_ids=(i,)) for i in range(9)]
    answers(engine, rows, [i % 4 for i in range(9)])
    assert [f.jitted._cache_size() for f in (engines._advance, engines._place, engines._start)] == programs


def test_the_slots_cache_is_updated_in_place(engine, lm, reference):
    """Neither decoding nor a refill copies the cache of all slots."""
    row = Admission(0, rows_of(lm)[0], row_key(1, 0, 0))
    engine.reset()
    engine.admit([row])
    state, s = engine._state, SETTINGS
    constant = dict(step=lm.step, config=engine._config)
    decoding = engines._advance.jitted.lower(lm.params, None, state, engine._ended, **constant, steps=s.steps)
    sampling, keys = engines._rows([row], s)
    tokens, lengths = np.zeros((s.prefill_rows, 192), np.int32), np.ones(s.prefill_rows, np.int32)
    where = np.zeros(s.prefill_rows, np.int32)
    refill = engines._place.jitted.lower(
        lm.params, None, state, where, tokens, lengths, sampling, keys, **constant, capacity=s.capacity
    )
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state.cache.states) if leaf.ndim == 4}
    assert shapes and all(shape.startswith("4,") for shape in shapes)
    copy = re.compile(r"= \w+\[(" + "|".join(shapes) + r")\](?:\{[^}]*\})? copy\(.*")
    for program in (decoding, refill):
        text = program.compile().as_text()
        assert any(f"[{shape}]" in text for shape in shapes)
        assert [m.group(0) for m in copy.finditer(text)] == []


def test_a_whole_job(lm, tmp_path):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": i, "prompt": PROMPTS[i % 6], "max_tokens": 4 + i * 5 % 17, "temperature": i % 3} for i in range(20)]
    rows[3] |= {"stop": ["e", "a"], "n": 2, "logprobs": 2}
    rows[4] = {"id": 4, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    rows[5] |= {"prompt": [399_999]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    surveys = []

    def settings(survey):
        surveys.append(survey)
        return SETTINGS.to_json()

    job = fakes.open_job(output, [path], settings=settings, codec=lm.codec, seed=1, shard_rows=8)
    said = []
    chosen = Settings.from_json(job.manifest.settings)
    outcome = Runner(job, DecodeEngine(lm.step, lm.params, chosen, notice=said.append), lm.codec).run()
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert outcome.totals.errors == 1 and lines[5]["error"].startswith("prompt: got token id 399999")
    assert [line["id"] for line in lines] == list(range(20)) and len(lines[3]["choices"]) == 2
    needed = Settings.of(surveys[0], slots=4, max_length=512, eos_ids=1)
    assert (
        needed.features == ("sample",)
        and needed.top_logprobs == 2
        and needed.capacity % 64 == 0 <= needed.capacity - surveys[0].length < 64
    )
    assert chosen == SETTINGS and said and all(text.startswith("compiling ") for text in said)


def test_settings_follow_the_survey():
    survey = Survey(
        rows=3, sequences=9, prompt_tokens=100, length=130, max_tokens=50, used=frozenset({"max_tokens", "top_k"})
    )
    made = Settings.of(survey, slots=8, max_length=4096, eos_ids=2)
    assert (made.capacity, made.max_tokens, made.stop_ids, made.top_logprobs) == (192, 50, 2, None)
    assert made.features == ("top_k",) and made.limits == Limits(192, 0, 0, 2, 0, source=0)
    assert Settings.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.prefill_widths == (17, 65, 192) and [made.width(n) for n in (1, 17, 18, 66)] == [17, 17, 65, 192]
    assert Settings.of(Survey(length=9999), slots=5, max_length=4096, eos_ids=0).slots == 1
    with pytest.raises(ConfigError, match="slots: got 0"):
        Settings(slots=0, capacity=8, max_tokens=4)
