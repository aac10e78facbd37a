"""The driver of slots: answers depend on their rows alone, poison stays alone, and slots are kept busy."""

import json
import math
import random

import pytest

from jaxinfer.batch.runner import row_key
from jaxinfer.errors import JobError
from tests import batch_fakes as fakes
from tests.batch_fakes import FakeEngine


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path, rows, **options):
    """The answers by id, and the outcome."""
    outcome, output = fakes.run(path / "out.jsonl", [write(path / "in.jsonl", rows)], force_new=True, **options)
    return {
        a.get("id") if "custom_id" not in a else a["custom_id"]: a for a in map(json.loads, output.splitlines())
    }, outcome


def mixed(count=50):
    rows = []
    for i in range(count):
        row = {"id": i, "prompt": f"prompt {i}", "max_tokens": 1 + i * 7 % 50, "temperature": i % 2, "n": 1 + (i == 9)}
        rows.append(
            row | ({"stop": ["ab", "cde", "q"]} if i % 3 == 0 else {}) | ({"logprobs": 2} if i % 5 == 0 else {})
        )
    return rows


def test_answers_do_not_depend_on_slots_looks_shards_or_order(tmp_path):
    rows = mixed()
    reference, _ = answers(tmp_path, rows)
    for slots, steps, shard_rows in ((1, 1, 50), (7, 8, 3), (64, 5, 16)):
        engine = FakeEngine(slots=slots, steps=steps)
        assert answers(tmp_path, rows, engine=engine, shard_rows=shard_rows)[0] == reference
    shuffled = random.Random(0).sample(rows, len(rows))
    seed = json.loads((tmp_path / "out.jsonl.job" / "manifest.json").read_bytes())["run_seed"]
    again, _ = answers(tmp_path, shuffled, seed=seed)
    assert again == reference and list(again) == [row["id"] for row in shuffled]


def test_an_engine_that_looks_at_slots_is_caught(tmp_path):
    """Negative control of the test above."""

    class Planted(FakeEngine):
        def token(self, a, index):
            return super().token(a, index + a.slot)

    results = [answers(tmp_path, mixed(), engine=Planted(slots=slots))[0] for slots in (4, 5)]
    assert results[0] != results[1]


def test_stops_trim_text_usage_and_logprobs_alike(tmp_path):
    rows = [{"id": i, "prompt": f"p{i}", "max_tokens": 60, "ignore_eos": True, "logprobs": 1} for i in range(20)]
    plain, _ = answers(tmp_path, rows)
    stops = ["ab", "q", "xyz"]
    stopped, _ = answers(tmp_path, [{**row, "stop": stops, "min_tokens": 3} for row in rows])
    hits = 0
    for i, answer in stopped.items():
        text = plain[i]["text"]
        ends = [end for end in range(3, 61) if any(text[:end].endswith(s) for s in stops)]
        if not ends:
            assert answer == plain[i]
            continue
        hits += 1
        start = ends[0] - next(len(s) for s in stops if text[: ends[0]].endswith(s))
        assert answer["text"] == text[:start] and answer["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == ends[0] == len(answer["logprobs"])
        assert answer["logprobs"] == plain[i]["logprobs"][: ends[0]]
    assert hits > 10


def test_end_tokens_are_counted_and_not_shown(tmp_path):
    rows = [{"id": i, "prompt": f"p{i}", "max_tokens": 300} for i in range(4)]
    for answer in answers(tmp_path, rows)[0].values():
        assert answer["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == len(answer["text"]) + 1
    row = {"id": 0, "prompt": "p0", "max_tokens": 300, "stop_token_ids": list(range(97, 104)), "echo": True}
    answer = answers(tmp_path, [row])[0][0]
    assert answer["finish_reason"] == "stop" and answer["text"].startswith("p0")
    assert not set(answer["text"].removeprefix("p0")) & set("abcdefg")


def test_several_samples_and_seeds(tmp_path):
    def texts(answer):
        return [choice["text"] for choice in answer["choices"]]

    row = {"prompt": "p", "max_tokens": 30, "n": 3, "temperature": 1, "ignore_eos": True}
    got, _ = answers(tmp_path, [row | {"id": "a"}, row | {"id": "b"}, row | {"id": "c", "seed": 5}])
    assert len({*texts(got["a"]), *texts(got["b"]), *texts(got["c"])}) == 9
    assert got["a"]["text"] == got["a"]["choices"][0]["text"]
    assert got["a"]["usage"] == {"prompt_tokens": 2, "completion_tokens": 90, "total_tokens": 92}
    other, _ = answers(tmp_path, [row | {"id": "a"}, row | {"id": "c", "seed": 5}], seed=77)
    assert texts(other["c"]) == texts(got["c"]) and texts(other["a"]) != texts(got["a"])
    assert row_key(1, "a", 0) != row_key(1, "a", 1) != row_key(1, 1, 0) != row_key(1, "1", 0)


def test_openai_rows_get_openai_answers(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    rows = [
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "m", "messages": messages, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}},
        {"custom_id": "text", "body": {"prompt": "hi", "max_tokens": 4, "logprobs": 1}},
        {"custom_id": "bad", "body": {"prompt": "hi", "max_tokens": 0}},
        {"custom_id": "tool", "body": {"messages": [{"role": "tool", "content": "x"}]}},
    ]  # fmt: skip
    got, outcome = answers(tmp_path, rows)
    body = got["chat"]["response"]["body"]
    assert got["chat"]["error"] is None and got["chat"]["response"]["status_code"] == 200
    assert body["object"] == "chat.completion" and body["model"] == "m"
    assert body["usage"]["completion_tokens"] == 4 and len(body["choices"][0]["logprobs"]["content"]) == 4
    assert len(body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
    choice = got["text"]["response"]["body"]["choices"][0]
    assert list(choice["logprobs"]) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert got["bad"]["response"] is None
    assert got["bad"]["error"]["message"].startswith("body.max_tokens: got 0; accepted: a whole number from 1")
    assert got["tool"]["error"]["message"] == "messages: the template has no tool role"
    assert (outcome.totals.rows, outcome.totals.errors) == (4, 2)
    assert outcome.exit_code() == 0 and outcome.exit_code(max_error_rate=0.4) == 3


@pytest.mark.parametrize("where", ["at admission", "later", "quietly"])
def test_poison_is_isolated(where, tmp_path):
    rows = mixed(30)
    calm, _ = answers(tmp_path, rows, seed=1)
    for i in (4, 5, 17):
        rows[i] |= {"prompt": f"poison {where}", "n": 2, "max_tokens": 30, "ignore_eos": True, "stop": None}
    poisoned, outcome = answers(tmp_path, rows, seed=1, engine=FakeEngine(slots=8))
    errors = {i: a["error"] for i, a in poisoned.items() if "error" in a}
    reason = {
        "at admission": "engine: ValueError: poison in the prompt",
        "later": "engine: RuntimeError: poison in the weights",
        "quietly": "engine: logits that are not finite",
    }[where]
    assert errors == {4: reason, 5: reason, 17: reason}
    assert all(poisoned[i] == calm[i] for i in poisoned if i not in errors)
    assert outcome.totals.errors == 3


def test_a_broken_engine_ends_the_run_and_loses_nothing(tmp_path):
    class Broken(FakeEngine):
        works = 30

        def advance(self):
            if self.made >= self.works:
                raise RuntimeError("the device is gone")
            return super().advance()

    path, output = write(tmp_path / "in.jsonl", mixed(40)), tmp_path / "out.jsonl"
    engine = Broken()
    with pytest.raises(
        JobError, match="failed on 8 rows one after another; the last: engine: RuntimeError: the device"
    ):
        fakes.run(output, [path], engine=engine)
    _, resumed = fakes.run(output, [path])
    assert b'"error"' not in resumed
    with pytest.raises(JobError, match="failed on 3 rows"):  # nothing ever worked
        engine.works = 0
        fakes.run(tmp_path / "other.jsonl", [path], engine=engine)


def test_a_stopped_run_finishes_what_it_can_and_says_75(tmp_path):
    path, output = write(tmp_path / "in.jsonl", mixed(40)), tmp_path / "out.jsonl"
    looks = []
    outcome, _ = fakes.run(output, [path], progress=looks.append, stop=lambda: len(looks) > 5, grace=60)
    assert outcome.exit_code() == 75 and outcome.totals is None
    assert 8 <= outcome.progress.rows_done < 40 and outcome.progress.rows_done % 8 == 0
    assert [look.rows for look in looks] == sorted(look.rows for look in looks)
    outcome, output = fakes.run(output, [path])
    assert outcome.exit_code() == 0 and outcome.progress.rows < 40 == outcome.progress.rows_done
    report = json.loads((tmp_path / "out.jsonl.job" / "report.json").read_bytes())
    assert report["total"]["rows"] == 40 and report["tokens_per_second"] > 0


def test_slots_are_kept_busy(tmp_path):
    """max_tokens log-uniform from 8 to 512 at batch 32: 85 % of slot-steps useful, 1.5 times static batching.

    Of so few rows only the order in which they are taken keeps the end full; in input order it is 0.75.
    """
    chance = random.Random(1)
    lengths = [round(math.exp(chance.uniform(math.log(8), math.log(512)))) for _ in range(200)]
    rows = [{"id": i, "prompt": "p", "max_tokens": n, "ignore_eos": True} for i, n in enumerate(lengths)]
    engine = FakeEngine(slots=32, steps=8, full=True)
    _, outcome = answers(tmp_path, rows, engine=engine, shard_rows=64)
    assert outcome.progress.completion_tokens == sum(lengths)
    static = sum(max(lengths[i : i + 32]) for i in range(0, 200, 32))
    assert outcome.progress.useful >= 0.9
    assert static / engine.made >= 1.5
