"""Machines that are not here: lower and compile a kernel for a GPU or a TPU on any machine, and read what it uses.

Lowering needs jax alone. Compiling down to machine code needs the target's compiler, as pip packages, and no device:
jax-cuda13-plugin, jax-cuda13-pjrt and CUDA's ptxas and libdevice for the GPU; libtpu for the TPU. Neither says
anything about numbers, races or speed on the device; both say what the kernel needs of it.

Stability: internal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.errors import UnsupportedError

# What XLA's GPU compiler asks about the device, as the text of its GpuTargetConfigProto: NVIDIA's figures for the H200
# (SXM): 132 multiprocessors of 128 float32 lanes, 227 KiB of shared memory a block, 65536 registers, compute 9.0a.
_H200 = """
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 }
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to build for. `topology`: libtpu's name of the smallest slice; `config`: the GPU's description."""

    name: str
    platform: str
    device_kind: str
    num_cores: int
    topology: str = ""
    config: str = ""

    def mesh(self) -> AbstractMesh:
        """A mesh of one such device, which rules that depend on the device look at while lowering."""
        abstract = "gpu" if self.platform == "cuda" else self.platform
        device = AbstractDevice(device_kind=self.device_kind, num_cores=self.num_cores, platform=abstract)
        return AbstractMesh((1,), ("_",), (AxisType.Auto,), abstract_device=device)


TARGETS = {
    target.name: target
    for target in (
        Target("h200", "cuda", "NVIDIA H200", 132, config=_H200),
        Target("v5e", "tpu", "TPU v5 lite", 1, topology="v5e:2x2"),
        Target("v5p", "tpu", "TPU v5", 2, topology="v5p:2x2x1"),
        Target("v6e", "tpu", "TPU v6 lite", 1, topology="v6e:2x2"),
    )
}
_LOWERED_FOR = {"cuda": "h200", "tpu": "v5e"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one Pallas kernel of an executable uses: bytes, and registers a thread; None where it does not apply."""

    name: str
    registers: int | None = None
    spill_bytes: int | None = None
    stack_bytes: int | None = None
    shared_bytes: int | None = None
    vmem_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Build:
    """An executable for a device that is not here, and its kernels in the order in which they were compiled."""

    target: Target
    executable: Any
    kernels: tuple[Kernel, ...]


def lower(f: Callable[..., Any], *avals: Any, platform: str = "tpu") -> Any:
    """`jax.stages.Lowered` of `f` for "tpu" or "cuda", without a device; `avals` are arrays or ShapeDtypeStructs.

    `.as_text()` of it names the kernels' custom calls: tpu_custom_call, mosaic_gpu_v2.
    """
    check.choice("lower", "platform", platform, _LOWERED_FOR)
    with jax.sharding.use_abstract_mesh(TARGETS[_LOWERED_FOR[platform]].mesh()):
        return jax.jit(f).trace(*avals).lower(lowering_platforms=(platform,))


def missing(target: str) -> str | None:
    """What this machine lacks to compile for `target`, or None."""
    check.choice("compile_for", "target", target, TARGETS)
    platform = TARGETS[target].platform
    if platform == "tpu" and not importlib.util.find_spec("libtpu"):
        return "libtpu is not installed (pip install libtpu)"
    if platform == "cuda" and not importlib.util.find_spec("jax_cuda13_plugin"):
        return (
            f"jax-cuda13-plugin is not installed (pip install --no-deps jax-cuda13-{{plugin,pjrt}}=={jax.__version__})"
        )
    here = "gpu" if platform == "cuda" else platform
    if getattr(jax.config, "jax_platforms", None) != "cpu" and jax.default_backend() != here:
        return "without such a device the plugins load only under JAX_PLATFORMS=cpu, set before jax starts"
    return None


def compile_for(f: Callable[..., Any], *avals: Any, target: str = "h200") -> Build:
    """Compile `f` down to the machine code of `target` and report what its kernels use.

    Raises UnsupportedError where the compiler is not installed; what the compiler refuses (too much shared memory or
    VMEM, an unsupported type) it raises itself. Nothing can be run: the device is not here.
    """
    if reason := missing(target):
        raise UnsupportedError(f"compile_for: cannot compile for {target} here: {reason}")
    to = TARGETS[target]
    sharding = SingleDeviceSharding(_device(target))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), avals)
    with jax.sharding.use_abstract_mesh(to.mesh()):
        lowered = jax.jit(f).trace(*placed).lower(lowering_platforms=(to.platform,))
        if to.platform == "tpu":
            executable = lowered.compile()
            return Build(to, executable, _vmem(executable.as_text() or ""))
        with tempfile.TemporaryDirectory() as folder:
            with _mosaic_gpu_dumps(folder):
                executable = lowered.compile()
            return Build(to, executable, _ptxas(Path(folder)))


@functools.cache
def _device(target: str) -> Any:
    from jax.experimental import topologies

    to = TARGETS[target]
    if to.platform == "cuda":
        description = topologies.get_topology_desc(platform="cuda", target_config=to.config, topology="1x1x1")
    else:
        # libtpu reads these once, when it starts; away from a TPU host it would wait for a metadata server.
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so processes need not take turns
        }.items():
            os.environ.setdefault(name, value)
        description = topologies.get_topology_desc(to.topology, "tpu")
    return description.devices[0]


@contextlib.contextmanager
def _mosaic_gpu_dumps(folder: str) -> Iterator[None]:
    """Mosaic GPU's only door to ptxas' report: it reads these when it compiles, and writes files into the folder."""
    settings = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _ptxas(folder: Path) -> tuple[Kernel, ...]:
    """Read `<name>_<n>.ptxas` (registers, spills) and the pass log beside it (the launch's shared memory)."""
    kernels = []
    for path in sorted(folder.glob("*.ptxas"), key=lambda p: int(p.stem.rpartition("_")[2])):
        text = path.read_text()
        uses = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        if uses is None or registers is None:
            raise RuntimeError(f"ptxas' report has another form than this reads:\n{text}")
        stack, stores, loads = map(int, uses.groups())
        shared = _launch_shared(path.with_suffix(".mlir-passes.log"))
        kernels.append(Kernel(path.stem.rpartition("_")[0], int(registers[1]), stores + loads, stack, shared))
    return tuple(kernels)


def _launch_shared(log: Path) -> int | None:
    """Bytes of dynamic shared memory of the launch, from the first dump that names them."""
    if not log.exists():
        return None
    text = log.read_text()
    use = re.search(r"dynamic_shared_memory_size (%\w+)", text)
    value = use and re.search(rf"{re.escape(use[1])} = arith\.constant (\d+)", text)
    return int(value[1]) if value else None


def _vmem(hlo: str) -> tuple[Kernel, ...]:
    """The TPU compiler writes into each kernel's custom call how much VMEM (memory space 1) it was given."""
    kernels = []
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) =", line)
        used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
        kernels.append(Kernel(name[1] if name else "?", vmem_bytes=int(used[1]) if used else None))
    return tuple(kernels)
