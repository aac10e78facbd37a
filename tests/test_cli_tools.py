"""The commands that load no weights: help, version, methods, info, doctor; what `name:key=value` options accept."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.cli import main
from jaxinfer.cli.forms import KERNELS
from jaxinfer.cli.specs import Registry
from jaxinfer.errors import InputError

KERNEL_FOLDER = Path(__file__).parent.parent / "pallas_kernels"
COMMANDS = ("generate", "compare", "info", "plan", "methods", "doctor")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_version_and_help_import_nothing_heavy():
    """`--help` must be quick: no jax, no flax, no rich."""
    code = (
        "import sys\nfrom jaxinfer.cli import main\n"
        "assert main(['--version']) == 0 and main(['generate', '--help']) == 0\n"
        "heavy = {'jax', 'flax', 'numpy', 'rich', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("jaxinfer ")
    assert "--max-tokens" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys, command):
    """Every command's help has an example that begins with the command, and the exit codes."""
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"\n    jaxinfer {command} " in out
    assert "Exit codes: 0 done; 1 internal error; 2 wrong usage" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["info"], "Missing argument"),
        (["generate", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["generate", "--top-p", "1.5", "--prompt", "x"], "top_p: got 1.5; accepted: a number above 0 up to 1"),
        (["info", "/nosuch/model"], "/nosuch/model: no such directory"),
        (["info", "tinycode", "--weights", "int5"], "--weights: got 'int5'; accepted: auto, f32, bf16, f16, streamed"),
        (
            ["generate", "--prompt", "x", "--cache", "sink:sink=3"],
            "got 'sink=3' in 'sink:sink=3'; accepted: sink:sinks=4",
        ),
        (["generate", "--prompt", "x", "--drafter", "magic"], "--drafter: got 'magic'; accepted: plain, draft"),
        (["generate"], "generate: accepted: either --prompt or --input"),
        (["compare", "--methods", "plain,plain"], "--methods: got 'plain' twice"),
        (["compare", "--methods", "plain,draft:gama=3"], "got 'gama=3' in 'draft:gama=3'; accepted: draft:gamma=4"),
        (["methods", "--family", "magic"], "--family: got 'magic'; accepted: "),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert said in err
    assert "Traceback" not in err and not out


def test_traceback_on_request():
    with pytest.raises(InputError):
        main(["methods", "--family", "magic", "--traceback"])


def test_methods(capsys):
    from jaxinfer import catalogue

    code, out, _ = run(capsys, "methods", "--json")
    listed = json.loads(out)
    assert code == 0
    assert [m["name"] for m in listed] == [m.name for m in catalogue.METHODS]
    code, out, _ = run(capsys, "methods", "--family", "cache")
    assert code == 0
    assert "every key and value kept" in out


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["versions"]["jax"]["version"]
    assert report["host"]["cores"] >= 1
    assert report["memory"]["total"] >= report["memory"]["available"] > 0
    forms = {f["op"]: f for f in report["forms"]}
    assert forms["flash attention"]["form"] == "blocked"
    assert "code for tpu" in forms["flash attention"]["others"]["tpu"]
    assert forms["dense product"]["form"] == "halves, else wide, else plain"
    assert {m["name"] for m in report["models"]} == {"tinycode", "tinycode-draft"}
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "attend" in out


def test_doctor_knows_every_kernel():
    tables = {
        f"{path.parent.relative_to(KERNEL_FOLDER).as_posix().replace('/', '.')}.api:{name}"
        for path in KERNEL_FOLDER.rglob("api.py")
        for name in ("FORMS", "FORWARD")
        if re.search(rf"^{name} = ", path.read_text(), re.MULTILINE)
    }
    assert set(KERNELS.values()) == tables


def test_info(capsys, tiny_model):
    """Parameters and bytes are those of the file; the cache's follow from its shape and the batch."""
    arguments = ["info", str(tiny_model), "--max-length", "100", "--weights", "f32", "--json"]
    one = json.loads(run(capsys, *arguments)[1])
    two = json.loads(run(capsys, *arguments, "--batch-size", "2")[1])
    stored = one["tensors"]["float32"]["bytes"]
    assert one["family"] == "llama"
    assert one["parameters"] * 4 == stored == one["needs"]["by_cache"]["auto"]["weights"]
    keys_and_values = 2 * 2 * 100 * 8 * 4  # k and v, groups, tokens, head_dim, bytes
    assert keys_and_values < one["needs"]["by_cache"]["auto"]["cache"] < 1.1 * keys_and_values
    assert two["needs"]["by_cache"]["auto"]["cache"] == 2 * one["needs"]["by_cache"]["auto"]["cache"]
    assert one["chat_template"] is True
    code, out, _ = run(capsys, "info", str(tiny_model))
    assert code == 0
    assert "full attention (1 layers)" in out


@dataclasses.dataclass(frozen=True)
class Spec:
    """A method with settings of every kind that a command line can give."""

    width: int
    share: float = 0.5
    fast: bool = False
    window: int | None = None
    model: object = None


REGISTRY = Registry("--thing", {"spec": f"{__name__}:Spec"})


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Spec.__module__])


def test_spec_parses():
    assert REGISTRY.parse("spec:width=4") == Spec(4)
    assert REGISTRY.parse("spec:width=4,share=0.25,fast=true,window=16") == Spec(4, 0.25, True, 16)
    assert REGISTRY.parse("spec:width=4,window=none").window is None
    assert REGISTRY.usage("spec") == "spec:width=A-WHOLE-NUMBER,share=0.5,fast=false,window=none"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("magic", "--thing: got 'magic'; accepted: spec"),
        ("spec", "without width; accepted: spec:width="),
        ("spec:", "got '' in 'spec:'"),
        ("spec:width", "got 'width' in"),
        ("spec:depth=3", "got 'depth=3' in 'spec:depth=3'; accepted: spec:width="),
        ("spec:model=x", "got 'model=x'"),
        ("spec:width=1,width=2", "got 'width=2'"),
        ("spec:width=1.5", "got width='1.5'; accepted: a whole number"),
        ("spec:width=1,fast=yes", "got fast='yes'; accepted: true or false"),
        ("spec:width=1,window=", "got window=''; accepted: a whole number or none"),
    ],
)
def test_spec_errors_say_what_is_accepted(text, said):
    with pytest.raises(InputError) as error:
        REGISTRY.parse(text)
    assert said in str(error.value)
