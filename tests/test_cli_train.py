"""`jaxinfer train`: help, options, exit codes, and the text that people bring."""

import json
import os
import signal

import numpy as np
import pytest

from jaxinfer.checkpoint.tokenizer import Tokenizer
from jaxinfer.cli import compiled, main, train_draft, training
from jaxinfer.cli.train import COMMANDS
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.hf import load_config
from jaxinfer.train import data, loop, text


@pytest.fixture(autouse=True)
def no_cache_in_the_home(monkeypatch):
    """Compiled programs stay in this process: the setting outlives a test."""
    monkeypatch.setattr(compiled, "use_cache", lambda: None)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a `train` command."""
    code = main(["train", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"\n    jaxinfer train {command} " in out
    assert "75 stopped by SIGTERM" in out and "--output" in out and "--resume" in out


@pytest.fixture
def source(tmp_path):
    """A folder of twelve small sources, and of what is no text."""
    folder = tmp_path / "source"
    (folder / ".git").mkdir(parents=True)
    for i in range(12):
        (folder / f"file{i:02}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    (folder / "image.png").write_bytes(b"\x89PNG\xff\x00")
    (folder / "zero.bin").write_bytes(b"abc\0def")
    (folder / ".git/config").write_text("hidden")
    (folder / "empty.py").write_text("\n")
    return folder


def test_a_folder_lines_and_a_file_are_read_and_split(source, tiny_model, tmp_path):
    tokenizer = Tokenizer.load(tiny_model)
    found = text.load(source, tokenizer, vocab_size=400)
    assert (len(found.train), len(found.held_out), len(found.more)) == (10, 2, ())[:2] + (0,)
    assert tokenizer.decode(found.held_out[1]) == (source / "file10.py").read_text()
    assert found.num_bytes == sum(len((source / f"file{i}.py").read_bytes()) for i in ("00", "10"))
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps({"text": d.text, "more": 1}) + "\n" for d in text.read(source)))
    again = text.load(lines, tokenizer, vocab_size=400)
    assert [row.tolist() for row in again.train] == [row.tolist() for row in found.train]
    assert again.digest != found.digest  # names count
    one = tmp_path / "one.txt"
    one.write_text((source / "file01.py").read_text())
    single = text.load(one, tokenizer, vocab_size=400)
    whole = "".join(tokenizer.decode(part) for part in (single.train[0], single.held_out[0]))
    assert whole == one.read_text() and single.num_bytes == len(one.read_bytes()) // 10
    batch = single.stream([data.Stage(0, 2, 16)], seed=0)(3)
    assert batch["ids"].shape == (2, 16) and np.isin(batch["ids"], np.append(single.train[0], single.end)).all()


def test_large_vocabularies_keep_their_ids():
    rows = [np.asarray([70_000, 5], np.int32)]
    assert data.concatenate(rows, end=100_000).tolist() == [100_000, 70_000, 5, 100_000]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "a.jsonl, line 2: accepted: an object whose 'text' is a string"),
        ("a.jsonl", '{"text": "x"}\nnot json\n', "line 2: not JSON"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "line 1: a lone surrogate"),
        ("a.jsonl", "\n", "no text in it"),
        ("a.txt", "  \n", "no text in it"),
        ("a.txt", "x", "too few to train on"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("nosuch", None, "no such file or folder"),
    ],
)
def test_text_that_cannot_be_read_is_named(tmp_path, tiny_model, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=said):
        text.load(path, Tokenizer.load(tiny_model), vocab_size=400)


def test_vocabularies_are_compared_token_by_token(tiny_model, tmp_path, source):
    tokenizer = Tokenizer.load(tiny_model)
    text.check_vocabulary(tokenizer, tokenizer, name="a", other_name="b")
    with pytest.raises(ConfigError, match="b and a have different vocabularies"):
        text.check_vocabulary(tokenizer, Tokenizer.load("jaxinfer/assets/tinycode"), name="a", other_name="b")
    with pytest.raises(InputError, match="the model's vocabulary has 90 tokens"):
        text.load(source, tokenizer, vocab_size=90)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["draft"], "Missing option '--output'"),
        (["draft", "--output", "x", "--stages", "text"], "--stages: got 'text'; accepted: name=updates"),
        (["draft", "--output", "x", "--stages", "code=9,text=9"], "stages: got code, text, accepts some of text, code"),
        (["draft", "--output", "x", "--temperatures", "hot"], "--temperatures: got 'hot'"),
        (["draft", "--output", "x", "--loss", "mse"], "loss: got 'mse', accepts ce, ce+kl"),
        (["lm", "--output", "x", "--target", "/nosuch"], "/nosuch: no such directory"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and said in err and "Traceback" not in err and not out


def test_a_folder_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "draft", "--output", tmp_path / "file/below")
    assert code == 1 and "file" in err and "Not a directory" in err and err.count("\n") == 1


def test_a_full_disk_is_one_line(capsys, tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(training, "check_writable", full)
    code, _, err = run(capsys, "draft", "--output", tmp_path)
    assert code == 1 and err == f"jaxinfer: {tmp_path}: No space left on device\n"


@pytest.mark.slow
def test_sigterm_is_exit_75_and_the_same_command_ends_in_the_same_weights(
    capsys, tmp_path, tiny_model, source, monkeypatch
):
    arguments = ["lm", "--target", tiny_model, "--data", source, "--steps", 8, "--batch-tokens", 64, "--length", 32]
    assert run(capsys, *arguments, "--output", tmp_path / "whole")[0] == 0
    stream = data.Stream.__call__

    def interrupted(self, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return stream(self, step)

    monkeypatch.setattr(data.Stream, "__call__", interrupted)
    code, _, err = run(capsys, *arguments, "--output", tmp_path / "cut")
    assert code == 75 and "stopped by SIGTERM after step 5" in err
    monkeypatch.undo()
    code, out, _ = run(capsys, *arguments, "--output", tmp_path / "cut")
    assert code == 0 and json.loads(out)["output"] == str(tmp_path / "cut")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    losses = [
        [row["loss"] for row in loop.record.read(tmp_path / name / "train/metrics.jsonl") if "loss" in row]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8


@pytest.mark.slow
def test_a_draft_is_trained_reported_and_used(capsys, tmp_path, tiny_model, source):
    out = tmp_path / "draft"
    code, printed, err = run(
        capsys, "draft", "--target", tiny_model, "--data", source, "--output", out, "--stages", "text=4,code=4,align=4",
        "--batch-tokens", 128, "--length", 32, "--answers", 32, "--prompt-tokens", 8, "--answer-tokens", 8,
        "--layers", 1, "--width", 16, "--loss", "ce+tv", "--top-k", 16,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(printed)
    assert (
        list(found["stages"])
        == ["start", "text", "code", "align"]
        == [line.split(": ")[1] for line in err.splitlines() if "greedy;" in line]
    )
    assert json.loads((out / "report.json").read_text()) == found
    assert (load_config(out).hidden_size, load_config(out).num_layers) == (16, 1)
    prompt = ["generate", "--model", tiny_model, "--prompt", "def f", "--max-tokens", 8, "--temperature", 0]
    assert main([*map(str, prompt), "--draft-model", str(out), "--drafter", "draft"]) == 0
    drafted = capsys.readouterr().out
    assert main([*map(str, prompt), "--drafter", "plain"]) == 0
    assert capsys.readouterr().out == drafted


def test_a_draft_of_another_vocabulary_is_refused(capsys, tmp_path, tiny_model):
    code, _, err = run(capsys, "draft", "--target", tiny_model, "--draft", "tinycode-draft", "--output", tmp_path / "x")
    assert code == 2 and "different vocabularies" in err


def test_stages_and_temperatures_are_parsed():
    assert train_draft.stages_of("text=3, align=10") == (("text", 3), ("align", 10))
    assert train_draft.temperatures_of("0,0.6,1") == (0.0, 0.6, 1.0)
