"""The scripts about kernels, in small: cases are what they say, a wrong or missing number is seen, results are kept."""

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(SCRIPTS))  # as for a script that is run: the cases are found beside it
bench, check_gpu = script("bench_kernels"), script("check_gpu")
tuner = importlib.import_module("tune_kernels")
gpu_attention = importlib.import_module("gpu_cases.attention")
kernel_case = importlib.import_module("kernel_bench.case")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"causal": True, "window": 9}, {"softcap": 3.0, "ragged": True, "alibi": True}], ids=str
)
def test_the_gpu_checks_oracle_agrees_with_the_xla_form(options):
    """The float64 oracle and the XLA form are written apart and agree, forward and backward."""
    for case in gpu_attention.dense(3, (2, 4, 2, 24, 32, 8), dict(options), "blocked"):
        row = check_gpu.check(case, False, 1, None)
        assert row["passed"], row


@pytest.mark.slow
def test_the_gpu_checks_lists_agree_with_the_xla_form():
    for case in gpu_attention.sparse(4, (1, 2, 1, 32, 32, 8), (8, 8), 3):
        assert check_gpu.worst_error(case.xla(*case.arguments), case.oracle()) < case.tolerance


def gpu_case(ours):
    x = jnp.ones((8, 8))
    return check_gpu.GpuCase("case", "float32", (x,), ours, lambda x: x, lambda: np.ones((8, 8)), 1e-3, 1.0, 1.0)


@pytest.mark.parametrize(
    "ours",
    [lambda x: 1.01 * x, lambda x: x.at[3].set(jnp.nan), lambda x: x[:4], lambda x: x.nope],
    ids=["off by 1 %", "NaN", "wrong shape", "exception"],
)
def test_a_wrong_kernel_fails(ours):
    """Negative controls: an error over the tolerance, NaNs left in the output, a wrong shape, an exception."""
    assert not check_gpu.check(gpu_case(ours), False, 1, None)["passed"]
    assert check_gpu.check(gpu_case(lambda x: x), False, 1, None)["passed"]


def test_a_benchmark_row():
    """Ratio and target of each peer; a peer that fails is left out, and its target is said to be unmeasured."""
    x = jnp.ones((64, 64))
    runs = {
        "ours": lambda: x + 1,
        "slow": lambda: time.sleep(0.05),
        "torch": kernel_case.unavailable("not installed"),
    }
    case = bench.Case("add", "64x64", "float32", "forward", runs, 4096.0, 32768.0, {"slow": 1.5, "torch": 1.0})
    row = bench.run(case, 3, 1e9)
    assert list(row["peers"]) == ["slow"] and row["targets_not_measured"] == ["torch"]
    assert row["peers"]["slow"]["ratio"] > 1.5 and row["peers"]["slow"]["met"]
    (line,) = bench.table_rows(row)
    assert line["case"] == "add 64x64 float32 forward" and line["met"] == "met"


def test_rows_of_an_earlier_run_are_kept(tmp_path):
    path = tmp_path / "bench.json"
    old = [dict(op=op, shape="s", dtype="d", direction="f", time=1) for op in ("a", "b")]
    path.write_text(json.dumps({"rows": old}))
    assert bench.kept(path, [old[1] | {"time": 2}]) == old[:1]
    assert bench.kept(tmp_path / "none.json", []) == []


@pytest.mark.parametrize(("seconds", "kept"), [(0.8, True), (0.97, False)], ids=["a fifth faster", "within noise"])
def test_a_tuned_block_is_kept_only_beyond_noise(seconds, kept, tmp_path, monkeypatch):
    """By a fake timer: one block takes `seconds`, the rule 1; an earlier entry goes where the rule stands."""
    task = tuner.Task(
        "flash", "float32", (100, 100, 64), ((8, 8), (16, 8), (0, 0)), lambda block: lambda: 1 / sum(block or (1,))
    )
    monkeypatch.setattr(tuner, "TASKS", {"flash": lambda: iter([task])})
    monkeypatch.setattr(tuner.tuning, "TABLES", tmp_path)
    path = tuner.tuning.table_path(tuner.tuning.device_kind())
    path.write_text(json.dumps({"flash": {"float32": {"128x128x64": [64, 64]}}}))

    def timer(runs):
        assert (0, 0) not in runs, "a block that fails is left out"
        return {b: tuner.measure.Timing((seconds if b == (16, 8) else 1.0,) * 3, first=1.0, repeats=1) for b in runs}

    tuner.main(["--ops", "flash"], timer)
    assert path.exists() == kept
    assert not kept or json.loads(path.read_text()) == {"flash": {"float32": {"128x128x64": [16, 8]}}}
