"""`jaxinfer generate` end to end: one prompt, a batch job with poison rows, resumption, dry runs, a killed process."""

import json
import os
import pty
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxinfer import decode, quant
from jaxinfer.cache.sink import SinkCache
from jaxinfer.cli import compiled, main, memory, options
from jaxinfer.decode.language_model import load


@pytest.fixture(scope="module", autouse=True)
def no_cache_of_the_users(tmp_path_factory):
    """The command line keeps compiled programs in the user's cache directory; the tests leave it alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "use_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def answer(tiny_model):
    return load(tiny_model).generate("def f(x):", max_tokens=20)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prompt_is_the_library_call(capsys, tiny_model, answer):
    code, out, err = run(capsys, "generate", "--model", tiny_model, "--prompt", "def f(x):", "--max-tokens", 20)
    assert (code, out) == (0, answer.text + "\n")
    assert "Traceback" not in err


def test_prompt_as_json(capsys, tiny_model, answer):
    command = ["generate", "--model", tiny_model, "--prompt", "def f(x):", "--max-tokens", 20, "--json"]
    code, out, _ = run(capsys, *command)
    line = json.loads(out)
    assert code == 0
    assert line["text"] == answer.text
    assert line["usage"] == answer.usage
    assert line["stats"][0]["tokens_per_forward"] == 1.0


def test_terminal_streams_the_same_text(monkeypatch, tiny_model, answer):
    """On a terminal the text comes in pieces, and is the same."""
    theirs, ours = pty.openpty()
    with os.fdopen(ours, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["generate", "--model", str(tiny_model), "--prompt", "def f(x):", "--max-tokens", "20"]) == 0
        terminal.flush()
        shown = ""
        while not shown.endswith("\n"):  # what a terminal has ready may be less than all
            shown += os.read(theirs, 65536).decode()
    os.close(theirs)
    assert shown.replace("\r\n", "\n") == answer.text + "\n"


@pytest.mark.slow
def test_formats_by_name(capsys, tiny_model):
    """The options build what the library is given: int8 weights, a sink cache."""
    formats = ["--weights", "int8:group=16", "--cache", "sink:sinks=2,window=8"]
    command = ["generate", "--model", tiny_model, "--prompt", "class Stack:", "--max-tokens", 24]
    code, out, _ = run(capsys, *command, *formats)
    lm = load(tiny_model, weights=[(r"(?!.*/router$).*", quant.Int8(group=16))], cache=SinkCache(sinks=2, window=8))
    assert (code, out) == (0, lm.generate("class Stack:", max_tokens=24).text + "\n")


def test_sampling_options_are_the_librarys(capsys, tiny_model):
    options = ["--max-tokens", 12, "--temperature", 1, "--n", 2, "--seed", 3]
    code, out, _ = run(capsys, "generate", "--model", tiny_model, "--prompt", "a", *options)
    answers = load(tiny_model).generate("a", seed=3, max_tokens=12, temperature=1.0, n=2)
    assert (code, out) == (0, "\n----\n".join(a.text for a in answers) + "\n")


ROWS = [
    {"id": 1, "prompt": "def f(x):", "max_tokens": 12},
    {"id": "two", "prompt": "import os", "max_tokens": 30},
    "{not json",
    {"id": 4, "prompt": "class A:", "max_tokens": 5},
    {"id": 5, "prompt": "x" * 4000},
    {"id": 6, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
    {"id": 7, "prompt": "a", "top_p": 2},
    {"id": 1, "prompt": "the first id again"},
    {"id": 9, "prompt": "y", "max_tokens": 7, "n": 2, "temperature": 1.0},
    {"custom_id": "ten", "method": "POST", "url": "/v1/completions", "body": {"prompt": "def", "max_tokens": 4}},
]
BAD = {2: "row: got no JSON", 4: "prompt: got ", 6: "top_p: got 2", 7: "id: got 1, which in.jsonl:1 has"}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in ROWS))
    return path


def test_job_with_poison_rows(capsys, tiny_model, rows, tmp_path):
    """Ten rows, four of them bad: all answered in order, exit code 3, and greedy text as one prompt alone has it."""
    output = tmp_path / "out.jsonl"
    command = ["generate", "--model", tiny_model, "--input", rows, "--output", output, "--batch-size", 4]
    code, _, err = run(capsys, *command)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert code == 3
    assert len(answers) == len(ROWS)
    for i, (row, line) in enumerate(zip(ROWS, answers, strict=True)):
        if i in BAD:
            assert BAD[i] in line["error"]
            continue
        assert line.get("error") is None
        assert line["custom_id" if "custom_id" in row else "id"] == row.get("custom_id", row.get("id"))
    lm = load(tiny_model)
    assert answers[0]["text"] == lm.generate("def f(x):", max_tokens=20).text[: len(answers[0]["text"])]
    assert len(answers[8]["choices"]) == 2
    assert "batch size 4" in err and "free on" in err and "tokens/s" in err
    before = output.read_bytes()
    code, _, err = run(capsys, *command)
    assert (code, output.read_bytes()) == (3, before)
    assert "finished before" in err
    code, _, err = run(capsys, *command, "--temperature", 1)
    assert code == 2
    assert "sampling.temperature: begun with null, now 1.0" in err


def test_dry_run_names_the_bad_rows(capsys, tiny_model, rows):
    """No weights are needed, so none may be there."""
    weights = tiny_model / "model.safetensors"
    aside = weights.rename(tiny_model / "aside")
    try:
        code, out, err = run(capsys, "generate", "--model", tiny_model, "--input", rows, "--dry-run")
    finally:
        aside.rename(weights)
    assert code == 3
    assert [line.split(":")[1] for line in out.splitlines()] == [str(i + 1) for i in BAD]
    assert "10 rows, 4 of them cannot be answered" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "out.jsonl"], "--input"),
        (["--input", "nothing.jsonl", "--output", "out.jsonl"], "input nothing.jsonl: got no such file"),
        (["--input", "{rows}"], "without --output"),
        (["--input", "{rows}", "--output", "{rows}"], "got a file that is there already"),
        (["--input", "{rows}", "--output", "nowhere/out.jsonl"], "got no folder nowhere"),
        (["--input", "{rows}", "--output", "o.jsonl", "--batch-size", "many"], "--batch-size: got 'many'"),
        (["--prompt", "x", "--dry-run"], "got a job's option with --prompt"),
        (["--prompt", "x", "--drafter", "draft"], "--drafter draft: got no --draft-model"),
        (["--prompt", ""], "prompt: got no tokens"),
        (["--prompt", "x", "--banned-tokens", "400"], "banned_tokens: got token id 400; accepted: 0 to 399"),
    ],
)
def test_wrong_use_is_exit_2(capsys, tiny_model, rows, arguments, said):
    code, out, err = run(capsys, "generate", "--model", tiny_model, *(a.format(rows=rows) for a in arguments))
    assert code == 2
    assert said in err
    assert not out and "Traceback" not in err


def test_auto_batch_size_is_what_fits(capsys, monkeypatch, tiny_model, rows, tmp_path):
    """With memory for little, the batch is small; with memory for nothing, the error says what would help."""
    from jaxinfer.cli import job

    command = ["generate", "--model", tiny_model, "--input", rows, "--output", tmp_path / "out.jsonl"]
    monkeypatch.setattr(job, "available_memory", lambda: (1000, "a small machine"))
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "--batch-size auto: one row takes weights" in err and "on a small machine" in err
    plan = job.plan_of(asked(tiny_model))
    one = job._settings(asked(tiny_model, batch_size="1"), plan, survey(100), 1)
    room = plan.need(one, 1).total + 6 * plan.need(one, 1).cache
    monkeypatch.setattr(job, "available_memory", lambda: (int(room / memory.SHARE), "a machine"))
    assert job._settings(asked(tiny_model), plan, survey(100), 1).slots == 4
    assert job._settings(asked(tiny_model), plan, survey(2), 1).slots == 2


def test_memory_estimate_covers_what_xla_needs(tiny_model):
    """The temporaries of a compiled prefill are less than the estimate, and not by an order of magnitude."""
    step = options.step_of(tiny_model, options.format_of("f32", "auto"), None)
    params = memory.abstract_params(step)
    start = jax.jit(decode.start, static_argnames=("step", "config", "capacity"))
    program = start.lower(
        step, params, np.zeros((1, 512), np.int32), np.ones(1, np.int32), decode.Sampling.make(1),
        jax.random.split(jax.random.key(0), 1), config=decode.Config(), capacity=512,
    ).compile()  # fmt: skip
    estimate = memory.need(step, params, batch=1, max_length=512).work
    assert estimate / 10 < program.memory_analysis().temp_size_in_bytes < estimate


def asked(model, **changes):
    from jaxinfer.batch.params import SamplingParams
    from jaxinfer.cli.job import Asked

    values = dict(
        inputs=[], output=None, model=str(model), draft_model=None, drafter="plain", weights="auto", cache="auto",
        batch_size="auto", max_length=None, seed=None, force_new=False, sampling=SamplingParams(),
    )  # fmt: skip
    return Asked(**{**values, **changes})


def survey(sequences: int):
    from jaxinfer.batch.manifest import Survey

    return Survey(sequences, sequences=sequences, prompt_tokens=100, length=300, max_tokens=200)


def test_ctrl_c_is_130(capsys, monkeypatch, tiny_model):
    from jaxinfer.cli import one

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(one, "answer", interrupted)
    code, _, err = run(capsys, "generate", "--model", tiny_model, "--prompt", "x")
    assert code == 130
    assert err.endswith("jaxinfer: interrupted\n")


@pytest.mark.slow
def test_killed_by_sigterm_asks_to_be_run_again(tiny_model, tmp_path):
    """SIGTERM: exit 75, and the same command gives the file of a run that nothing disturbed."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": i, "prompt": f"x{i}", "max_tokens": 250}) + "\n" for i in range(200)))

    def start(output):
        command = ["generate", "--model", tiny_model, "--input", rows, "--output", output, "--batch-size", "2"]
        return subprocess.Popen(
            [sys.executable, "-c", "import sys; from jaxinfer.cli import main; sys.exit(main())", *map(str, command)],
            stderr=subprocess.PIPE, text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""},
        )  # fmt: skip

    first = start(tmp_path / "a.jsonl")
    lines = []
    while not any("compiling decoding" in line for line in lines):
        lines.append(first.stderr.readline())
        assert lines[-1], lines
    first.send_signal(signal.SIGTERM)
    err = first.communicate(timeout=100)[1]
    assert first.returncode == 75, err
    assert "the same command goes on from here" in err
    for output in ("a.jsonl", "b.jsonl"):
        again = start(tmp_path / output)
        again.communicate(timeout=250)
        assert again.returncode == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert list((tmp_path / "jaxinfer" / "compiled").iterdir())  # programs are kept for the next run
