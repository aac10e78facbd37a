"""Starts one program in several processes: under SLURM, in a Kubernetes indexed Job, on a TPU slice, or by hand.

Every process runs the same command; `jax.distributed` makes their devices one set. Who they are comes from explicit
arguments or from the variables that the scheduler sets; nothing is joined unless it is asked for, since workers of a
batch job that share a folder need no joining. Process 0 coordinates, and it alone writes what is written once.

Stability: experimental.
"""

import dataclasses
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax

from jaxinfer.errors import ConfigError, JobError
from jaxinfer.sharding.watch import Watch

AUTO = "auto"
KUBERNETES_PORT = 55527  # any that is free in a fresh container will do; all processes must name the same
_FIRST_SLURM_PORT, _SLURM_PORTS = 61440, 4096  # jobs that share a node must not meet, so the port follows the job


class PeerLost(JobError):
    """Another process of this program never came, or is gone: start all of them again with the same command."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Which of how many processes this is, and where process 0 listens: "host:port". `source`: who said so."""

    coordinator: str
    processes: int
    process_id: int
    source: str = "arguments"

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"coordinator: got {self.coordinator!r}; accepted: host:port of process 0, or {AUTO}")
        if self.processes < 1:
            raise ConfigError(f"processes: got {self.processes}; accepted: 1 or more")
        if not 0 <= self.process_id < self.processes:
            raise ConfigError(
                f"process id: got {self.process_id} ({self.source}); accepted: 0 to {self.processes - 1}, "
                f"since there are {self.processes} processes"
            )

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def launch_of(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    environ: Mapping[str, str] = os.environ,
) -> Launch | None:
    """What the three options say; None where none of them is given, and the process works on its own.

    `coordinator` "auto" takes what is not given from the scheduler's variables. Raises `ConfigError` where the options
    contradict themselves or do not say enough.
    """
    if coordinator is None:
        if processes is not None or process_id is not None:
            given = "processes" if processes is not None else "process id"
            raise ConfigError(f"{given}: got it without a coordinator; accepted: with coordinator host:port or {AUTO}")
        return None
    if coordinator != AUTO:
        missing = [n for n, v in (("processes", processes), ("process id", process_id)) if v is None]
        if missing or processes is None or process_id is None:
            raise ConfigError(
                f"coordinator: got {coordinator!r} without {' and '.join(missing)}; accepted: all three, or {AUTO} "
                "under SLURM, in a Kubernetes indexed Job or on a TPU slice"
            )
        return Launch(coordinator, processes, process_id)
    found = detect(environ, processes=processes)
    if processes not in (None, found.processes):
        raise ConfigError(
            f"processes: got {processes}, and {found.source} says {found.processes}; accepted: the latter"
        )
    if process_id not in (None, found.process_id):
        raise ConfigError(f"process id: got {process_id}, and {found.source} says {found.process_id}")
    return found


def detect(environ: Mapping[str, str], *, processes: int | None = None, hostname: str | None = None) -> Launch:
    """The launch that a scheduler's variables describe. Raises `ConfigError` naming what is missing.

    SLURM tells everything (`srun`); a TPU slice too; a Kubernetes indexed Job tells the index, so `processes` must be
    given, and its pods must find each other (a headless service as `subdomain`). `hostname`: this machine's full name.
    """
    if "SLURM_PROCID" in environ and "SLURM_JOB_ID" in environ:
        return _slurm(environ)
    if "TPU_WORKER_HOSTNAMES" in environ:
        hosts = environ["TPU_WORKER_HOSTNAMES"].split(",")
        worker = _number(environ, "TPU_WORKER_ID")
        return Launch(f"{hosts[0].strip()}:{KUBERNETES_PORT}", len(hosts), worker, "TPU_WORKER_HOSTNAMES")
    if "JOB_COMPLETION_INDEX" in environ:
        return _kubernetes(environ, processes, hostname or socket.getfqdn())
    raise ConfigError(
        f"coordinator: got {AUTO}, and no scheduler's variables are set (SLURM_PROCID, TPU_WORKER_HOSTNAMES, "
        "JOB_COMPLETION_INDEX); accepted: host:port with the number of processes and this process's id"
    )


def _slurm(environ: Mapping[str, str]) -> Launch:
    names = [n for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if environ.get(n)]
    counts = [n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if environ.get(n)]
    if not names or not counts:
        lacking = "SLURM_STEP_NODELIST" if not names else "SLURM_NTASKS"
        raise ConfigError(f"coordinator: got {AUTO} under SLURM without {lacking}; accepted: a start with srun")
    port = _FIRST_SLURM_PORT + _number(environ, "SLURM_JOB_ID") % _SLURM_PORTS
    host = first_node(environ[names[0]])
    return Launch(f"{host}:{port}", _number(environ, counts[0]), _number(environ, "SLURM_PROCID"), "SLURM_PROCID")


def _kubernetes(environ: Mapping[str, str], processes: int | None, hostname: str) -> Launch:
    index = _number(environ, "JOB_COMPLETION_INDEX")
    if processes is None:
        raise ConfigError(
            f"coordinator: got {AUTO} in a Kubernetes indexed Job without the number of processes, which no variable "
            "tells; accepted: with it (the Job's completions)"
        )
    name, dot, domain = hostname.partition(".")
    base = name.removesuffix(f"-{index}")
    if base == name:
        raise ConfigError(
            f"host name: got {hostname!r}; accepted: one that ends in -{index}, the pod's index, as an indexed Job "
            "names its pods; give the coordinator as host:port otherwise"
        )
    return Launch(f"{base}-0{dot}{domain}:{KUBERNETES_PORT}", processes, index, "JOB_COMPLETION_INDEX")


def first_node(nodes: str) -> str:
    """The first host of a SLURM node list: "a[03-05,9],b" -> "a03"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM node list: got {nodes!r}; accepted: one such as node[001-004]")
    return "".join(part or "" for part in match.groups())


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name}: got {value!r}; accepted: a number, which the scheduler sets")
    return int(value)


def is_writer() -> bool:
    """Whether this is the one process that writes what is written once: metrics, results, a job's files."""
    return jax.process_index() == 0


@contextmanager
def joined(launch: Launch | None, *, timeout: float = 300.0, silence: float = 30.0) -> Iterator[Watch | None]:
    """Joins the processes for a `with` block, and watches them: a peer that dies ends this process (watch.py).

    An exception that leaves the block ends the others too, and this process with code 2 (jaxinfer's own errors) or 1;
    one whose class says `together = True` is one that all processes raise, and does not. Nothing is done for None or a
    single process. `timeout`: seconds to wait for the others. `silence`: as `Watch.start`. Raises `ConfigError` where
    the port is taken or JAX ran already, `PeerLost` where the others do not come. The block is meant to be the rest of
    the program: JAX cannot leave and join again.
    """
    if launch is None or launch.processes == 1:
        yield None
        return
    _connect(launch, timeout)
    watch = Watch.start(launch.host, launch.process_id, launch.processes, silence=silence, timeout=timeout)
    try:
        yield watch
    except (Exception, KeyboardInterrupt) as error:
        if not getattr(error, "together", False):
            watch.failed(error)
        raise
    finally:
        watch.close()


def _connect(launch: Launch, timeout: float) -> None:
    who = f"process {launch.process_id} of {launch.processes}"
    if launch.process_id == 0:
        _check_port(launch)
    elif not _answers(launch, timeout):  # asked by ourselves, since the runtime's own wait ends in an abort
        raise PeerLost(
            f"{who}: nobody listens at {launch.coordinator} after {timeout:.0f} s; is process 0 running there?"
        )
    # Our loops agree on when to stop; the runtime's own handler would swallow a SIGTERM that comes at other times.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            launch.coordinator, launch.processes, launch.process_id,
            initialization_timeout=max(1, int(timeout)),
            cluster_detection_method=None if launch.source.startswith("SLURM") else "deactivate",
        )  # fmt: skip
    except RuntimeError as error:
        if "before" in str(error) and "JAX" in str(error):
            raise ConfigError(f"{who}: JAX has computed already; join the processes before anything else") from None
        raise PeerLost(f"{who}: the others did not come to {launch.coordinator}: {str(error)[:300]}") from None


def _check_port(launch: Launch) -> None:
    family = socket.AF_INET6 if ":" in launch.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", launch.port))
        except OSError as error:
            raise ConfigError(
                f"coordinator: got port {launch.port}, which process 0 cannot listen on ({error.strerror}); accepted: "
                "a free one, the same for all processes"
            ) from None


def _answers(launch: Launch, timeout: float) -> bool:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        try:
            socket.create_connection((launch.host, launch.port), timeout=5).close()
            return True
        except OSError:
            time.sleep(0.2)
    return False
