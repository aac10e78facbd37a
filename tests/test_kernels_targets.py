"""Building for devices that are not here: lowering works with jax alone, reports are read right, absence is said."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from tests.kernel_checks import assert_within_budget, avals, needs_target


def double(x):
    """A kernel of one tile."""

    def kernel(x, out):
        out[...] = 2 * x[...]

    return pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), compiler_params=pltpu.CompilerParams()
    )(x)


@pytest.mark.smoke
def test_lowers_for_a_tpu():
    text = targets.lower(double, *avals((128, 128)), platform="tpu").as_text()
    assert text.count("@tpu_custom_call") == 1


def test_lowering_for_another_platform_is_not_ours_to_choose():
    with pytest.raises(ArgumentError, match="lower: platform: got 'rocm', accepts 'cuda', 'tpu'"):
        targets.lower(double, *avals((128, 128)), platform="rocm")


def test_missing_compilers_are_named(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="cannot compile for v5e here: libtpu is not installed"):
        targets.compile_for(double, *avals((128, 128)), target="v5e")
    with pytest.raises(UnsupportedError, match="cannot compile for h200 here: jax-cuda13-plugin is not installed"):
        targets.compile_for(double, *avals((128, 128)), target="h200")
    with pytest.raises(ArgumentError, match="target: got 'h20', accepts 'h200'"):
        targets.compile_for(double, *avals((128, 128)), target="h20")


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for kernel_mosaic_gpu_kernel
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers, 1 bytes smem
"""
LAUNCH = """ %size = arith.constant 26648 : i32
 %other = arith.constant 4 : index
 %run = gpu.launch async blocks(%a, %b, %c) dynamic_shared_memory_size %size {
"""


def write_reports(folder, **kernels):
    for name, numbers in kernels.items():
        (folder / f"{name}.ptxas").write_text(PTXAS.format(**numbers))
        (folder / f"{name}.mlir-passes.log").write_text(LAUNCH)


def test_reads_ptxas(tmp_path):
    """Registers, spills and shared memory; in the order of compilation, the tenth kernel after the second."""
    write_reports(
        tmp_path,
        kernel_10=dict(stack=8, stores=4, loads=12, registers=255),
        kernel_2=dict(stack=0, stores=0, loads=0, registers=90),
    )
    second, tenth = targets._ptxas(tmp_path)
    assert second == targets.Kernel("kernel", 90, 0, 0, 26648)
    assert tenth == targets.Kernel("kernel", 255, 16, 8, 26648)


def test_a_report_of_another_form_is_not_read_as_zero(tmp_path):
    (tmp_path / "kernel_0.ptxas").write_text("ptxas info : something new")
    with pytest.raises(RuntimeError, match="another form"):
        targets._ptxas(tmp_path)


def test_a_kernel_that_spills_fails_its_budget(tmp_path):
    """Negative control: a spill fails whatever the budget says, and a case without a budget fails too."""
    write_reports(tmp_path, kernel_0=dict(stack=0, stores=4, loads=4, registers=90))
    build = targets.Build(targets.TARGETS["h200"], None, targets._ptxas(tmp_path))
    with pytest.raises(AssertionError, match="kernels that spill"):
        assert_within_budget("flash", "llama3 8B prefill", build)
    write_reports(tmp_path, kernel_0=dict(stack=0, stores=0, loads=0, registers=90))
    build = targets.Build(targets.TARGETS["h200"], None, targets._ptxas(tmp_path))
    with pytest.raises(AssertionError, match="no budget for h200 'no such case'"):
        assert_within_budget("flash", "no such case", build)


@needs_target("v5e")
def test_compiles_for_a_tpu():
    build = targets.compile_for(double, *avals((256, 512)), target="v5e")
    (kernel,) = build.kernels
    assert kernel.vmem_bytes is not None and kernel.registers is None


@needs_target("v5e")
def test_too_much_vmem_is_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        targets.compile_for(double, jax.ShapeDtypeStruct((32768, 4096), jnp.float32), target="v5e")
