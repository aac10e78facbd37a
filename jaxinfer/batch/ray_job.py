"""A batch job on a Ray cluster: Ray Data places the workers and starts them again, the job's folder keeps the answers.

A data set of tickets goes through `map_batches` with one model actor a worker; a ticket lets its actor claim one shard,
which it answers and commits as any worker does. So answers, resume and exactly-once are those of a job without Ray,
workers of both kinds can share one, and an actor that is lost costs the shards that it held. Needs `jaxinfer[ray]` and,
over several machines, an output on a file system that all of them see.

Stability: experimental.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from jaxinfer.batch.job import Claim, Job, Totals
from jaxinfer.batch.requests import Codec
from jaxinfer.batch.runner import Engine, Runner
from jaxinfer.errors import ConfigError

Parts = tuple[Job, Engine, Codec]


class Remote(Protocol):
    """What makes a worker's parts in its actor: picklable, and called once there."""

    def __call__(self) -> Parts: ...


class Share:
    """A job of which so many shards may be claimed: a Job in all else."""

    def __init__(self, job: Job, shards: int):
        self._job, self._left = job, shards

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    def claim(self) -> Claim | None:
        """The next shard; None where the share is spent, or no shard is free."""
        claim = self._job.claim() if self._left else None
        self._left = self._left - 1 if claim is not None else 0
        return claim

    @property
    def spent(self) -> bool:
        """Whether no shard will be claimed any more."""
        return self._left == 0


class Model:
    """The actor: a model that is loaded once and answers a shard for every ticket of a batch."""

    def __init__(self, make: Remote):
        self._job, self._engine, self._codec = make()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`{"id": tickets}` -> `{"rows", "errors", "completion_tokens": [one sum]}` of what it answered."""
        share: Any = Share(self._job, len(batch["id"]))
        runner = Runner(share, self._engine, self._codec, stop=lambda: share.spent, grace=math.inf, poll=0.1)
        done = runner.run().progress
        return {name: np.array([getattr(done, name)]) for name in ("rows", "errors", "completion_tokens")}


def run(
    make: Remote,
    job: Job,
    *,
    workers: int,
    gpus: float = 0.0,
    ticket_shards: int = 8,
    poll: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Totals | None:
    """Works on the job until its output is complete; None where another worker is putting that together.

    `workers` actors, each with `gpus` GPUs; `ticket_shards` are claimed at a time, which is how far an actor's slots
    can be kept full. `progress` is told (rows committed, rows in all). Joins a running Ray, or starts one here.
    Raises `ConfigError` without Ray; what an actor raises is raised here, and the answers committed before stay.
    """
    ray = require_ray()
    mine = not ray.is_initialized()
    if mine:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        while not job.all_committed:
            before = job.rows_committed()
            for _ in _tickets(ray, make, job, workers, gpus, ticket_shards).iter_rows():
                progress(job.rows_committed(), job.manifest.rows)
            if job.rows_committed() == before:
                time.sleep(poll)  # other workers hold the rest: wait, in case one dies
        progress(job.manifest.rows, job.manifest.rows)
        return job.assemble()
    finally:
        if mine:
            ray.shutdown()


def _tickets(ray: Any, make: Remote, job: Job, workers: int, gpus: float, ticket_shards: int) -> Any:
    """The data set whose rows say what each batch of tickets brought."""
    left = sum(not job.part(shard.index).exists() for shard in job.manifest.shards)
    each = max(1, min(ticket_shards, -(-left // workers)))
    # Made here: one that Ray reads takes a processor, and waits for ever where the actors have them all.
    tickets = ray.data.from_items([{"id": i} for i in range(left)], override_num_blocks=-(-left // each))
    return tickets.map_batches(
        Model, fn_constructor_args=(make,), batch_size=each, concurrency=workers, num_cpus=1, num_gpus=gpus
    )


def require_ray() -> Any:
    """The module `ray`. Raises `ConfigError` without it."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError('ray: got a Python without it; accepted: pip install "jaxinfer[ray]"') from None
    return ray
