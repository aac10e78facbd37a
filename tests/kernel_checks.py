"""What all kernel tests share: random arrays, tolerances, skips with their reasons, budgets of compiled kernels."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu_refuses

if (
    getattr(jax.config, "jax_platforms", None) is None
    and not any(Path("/dev").glob("nvidia[0-9]*"))
    and not Path("/dev/accel0").exists()
):
    # The deviceless compilers load only if jax does not look for the devices that are not here.
    jax.config.update("jax_platforms", "cpu")

BUDGETS = Path(__file__).parent / "budgets"
# Largest error relative to the largest magnitude of the result, for sums of a few hundred rounded terms.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}

needs_mosaic_gpu = pytest.mark.skipif(mosaic_gpu_refuses() is not None, reason=mosaic_gpu_refuses() or "")


def needs_target(name: str):
    """The mark of a test that compiles for a device that is not here: slow, and skipped without its compiler."""
    reason = targets.missing(name)
    if targets.TARGETS[name].platform == "cuda":
        reason = mosaic_gpu_refuses() or reason
    skip = pytest.mark.skipif(reason is not None, reason=reason or "")
    return lambda test: pytest.mark.slow(skip(test))


def normal(seed: int, *shapes: tuple[int, ...], dtype="float32") -> list[jax.Array]:
    """Standard normal arrays of these shapes."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True)]


def avals(*shapes: tuple[int, ...], dtype="bfloat16") -> list[jax.ShapeDtypeStruct]:
    """Shapes of one dtype, to lower or compile with."""
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]


def error(got, want) -> float:
    """The largest error over the largest finite magnitude wanted; infinite where the non-finite entries differ."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape, (got.shape, want.shape)
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    scale = np.abs(want[finite]).max(initial=0.0)
    return float(np.abs(got[finite] - want[finite]).max(initial=0.0) / max(scale, 1e-6))


def assert_close(got, want, dtype="float32", *, factor: float = 1.0) -> None:
    """Trees of arrays agree to the tolerance of `dtype`, times `factor`; non-finite entries agree exactly."""
    leaves, expected = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(leaves) == len(expected)
    errors = [error(a, b) for a, b in zip(leaves, expected, strict=True)]
    assert max(errors) <= factor * TOLERANCE[str(jnp.dtype(dtype))], f"relative errors {errors}"


def assert_lowers(f, *arguments, platform: str, calls: int = 1) -> None:
    """`f` lowers for "tpu" or "cuda" to at least `calls` Pallas kernels."""
    name = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}[platform]
    found = targets.lower(f, *arguments, platform=platform).as_text().count(f"@{name}")
    assert found >= calls, f"{found} calls of {name}, expected {calls}"


def assert_within_budget(op: str, case: str, build: targets.Build) -> None:
    """No kernel spills, and none uses more than `tests/budgets/<op>.json` allows `case` on the build's target.

    The file holds `{target: {case: {"registers": 168, "shared_bytes": 98304}}}` for a GPU, the most of any kernel of
    the build, and `{"vmem_bytes": 2000000}` for a TPU.
    """
    assert build.kernels, "no Pallas kernel was compiled"
    spilling = [kernel for kernel in build.kernels if kernel.spill_bytes or kernel.stack_bytes]
    assert not spilling, f"kernels that spill: {spilling}"
    fields = ("vmem_bytes",) if build.target.platform == "tpu" else ("registers", "shared_bytes")
    used = {field: max(getattr(kernel, field) or 0 for kernel in build.kernels) for field in fields}
    path = BUDGETS / f"{op}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    budget = table.get(build.target.name, {}).get(case)
    assert budget is not None, f"{path.name} has no budget for {build.target.name} {case!r}; it uses {json.dumps(used)}"
    over = {field: (used[field], budget[field]) for field in fields if used[field] > budget[field]}
    assert not over, f"{op} {case!r} on {build.target.name} uses more than its budget (used, budget): {over}"
