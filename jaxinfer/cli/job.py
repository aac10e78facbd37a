"""`jaxinfer generate --input --output`: a batch job from files to a file, resumed and shared.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.batch.params import SamplingParams
from jaxinfer.batch.runner import stop_on
from jaxinfer.cli import codes, compiled, identity, memory, options
from jaxinfer.cli.auto import Auto, curves_of
from jaxinfer.cli.machine import available_memory
from jaxinfer.cli.output import note, size
from jaxinfer.errors import InputError, JobError

if TYPE_CHECKING:
    from jaxinfer.batch.engine import DecodeEngine, Settings
    from jaxinfer.batch.job import Job
    from jaxinfer.batch.manifest import Survey
    from jaxinfer.batch.runner import Engine
    from jaxinfer.decode.language_model import LanguageModel, TextCodec
    from jaxinfer.models import Step
    from jaxinfer.models.heads import Head
    from jaxinfer.sharding.watch import Watch


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asks of a job."""

    inputs: Sequence[Path]
    output: Path | None
    model: str
    draft_model: str | None
    drafter: str
    weights: str
    cache: str
    batch_size: str
    max_length: int | None
    seed: int | None
    force_new: bool
    sampling: SamplingParams
    adapter: str | None = None
    mesh: str | None = None

    @property
    def slots(self) -> int | None:
        """Rows in work at a time; None for `auto`."""
        if self.batch_size == "auto":
            return None
        if not (self.batch_size.isascii() and self.batch_size.isdigit() and 0 < int(self.batch_size) < 2**20):
            raise InputError(f"--batch-size: got {self.batch_size!r}; accepted: auto or a number from 1 on")
        return int(self.batch_size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The model as far as its config and tokenizer tell: enough to check rows and to count bytes."""

    directory: Path
    step: Step
    codec: TextCodec
    params: Any
    draft_directory: Path | None
    draft_step: Step | Head | None

    def need(self, settings: Settings, slots: int) -> memory.Need:
        """Bytes of weights, caches and work, the draft model's too."""
        lengths = {
            "batch": settings.slots,
            "max_length": settings.capacity,
            "chunk": settings.prefill_chunk,
            "prefill_rows": settings.prefill_rows,
        }
        found = memory.need(self.step, self.params, slots=slots, **lengths)
        if self.draft_step is not None:
            found += memory.draft_need(self.draft_step, **lengths)
        return found


def plan_of(asked: Asked) -> Plan:
    """Reads configs and the tokenizer; loads no weights."""
    from jaxinfer.checkpoint import hub
    from jaxinfer.checkpoint.chat import ChatTemplate
    from jaxinfer.checkpoint.tokenizer import Tokenizer
    from jaxinfer.decode.language_model import TextCodec

    chosen = options.format_of(asked.weights, asked.cache, asked.adapter)
    directory = hub.resolve(asked.model)
    step = options.step_of(directory, chosen, asked.max_length)
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.load(directory, special_tokens=tokenizer.special_tokens)
    draft_directory = draft_step = None
    if asked.draft_model is not None:
        draft_directory = hub.resolve(asked.draft_model)
        draft_step = options.draft_part(draft_directory, step.config.max_length)
    codec = TextCodec(tokenizer, template, step.vocab_size)
    params = memory.abstract_params(step, chosen.rules)
    return Plan(directory, step, codec, params, draft_directory, draft_step)


def dry_run(asked: Asked) -> int:
    """Checks every row as the job would and says what is wrong with it; the exit code."""
    from jaxinfer.batch.job import check_rows
    from jaxinfer.batch.requests import BadRow, Limits

    plan = plan_of(asked)
    limits = Limits(plan.step.config.max_length, bias=4096, forced=1024, stop_ids=128, top_logprobs=20, grammars=True)
    rows = bad = 0
    for where, row in check_rows(asked.inputs, defaults=asked.sampling, codec=plan.codec, limits=limits):
        rows += 1
        if isinstance(row, BadRow):
            bad += 1
            print(f"{where}: {row.error}")
    note(f"{rows} rows, {bad} of them cannot be answered; no weight was loaded")
    return codes.ROWS_FAILED if bad else codes.OK


@dataclasses.dataclass(frozen=True)
class Worker:
    """What answers a job's rows as it was asked; the weights are loaded by the first use."""

    asked: Asked
    plan: Plan
    drafter: Any
    mesh: Any = None

    @classmethod
    def of(cls, asked: Asked) -> Worker:
        """Reads configs; with the mesh, if one is asked for."""
        if asked.output is None:
            raise InputError("generate: got --input without --output; accepted: both (or --dry-run)")
        compiled.use_cache()
        compiled.announce()
        plan = plan_of(asked)
        drafter = options.drafter_step(asked.drafter, plan.draft_step, plan.step)
        return cls(asked, plan, drafter, options.mesh_of(asked.mesh, plan.step))

    @functools.cached_property
    def model(self) -> LanguageModel:
        """The model with its weights."""
        asked, chosen = self.asked, options.format_of(self.asked.weights, self.asked.cache, self.asked.adapter)
        return options.load(
            asked.model, chosen, max_length=asked.max_length, draft_model=asked.draft_model, mesh=self.mesh
        )  # fmt: skip

    def open(self) -> Job:
        """The job begun, or resumed."""
        from jaxinfer.batch.job import open_job

        asked, plan = self.asked, self.plan
        assert asked.output is not None
        with progress_bar("reading rows") as tell:
            return open_job(
                asked.output, asked.inputs, fingerprint=identity.fingerprint(asked, plan), defaults=asked.sampling,
                settings=lambda survey: self._settings(survey).to_json(), seed=asked.seed,
                codec=plan.codec, max_length=plan.step.config.max_length, force_new=asked.force_new,
                progress=lambda rows: tell(rows, None),
            )  # fmt: skip

    def engine(self, settings: Settings) -> DecodeEngine:
        """The engine of a job with these settings."""
        from jaxinfer.batch.engine import DecodeEngine
        from jaxinfer.decode.config import Config

        _say_need(self.plan.need(settings, self.drafter.width + 1), settings)
        drafter = self.drafter.with_curves(settings.curves) if isinstance(self.drafter, Auto) else self.drafter
        lm = self.model
        draft_params = lm.draft_params_for(drafter)
        if self.mesh is not None and draft_params is not None:  # small, and so whole on every device
            from jaxinfer.train.processes import spread

            draft_params = spread(draft_params, self.mesh)
        return DecodeEngine(
            lm.step, lm.params, settings, config=Config(drafter=drafter), notice=note, draft_params=draft_params
        )

    def _settings(self, survey: Survey) -> Settings:
        """The executable's constants, with what a forward costs where the drafter chooses by it."""
        found = _settings(self.asked, self.plan, survey, self.drafter.width + 1)
        return _measured(self.drafter, found, lambda: self.model)


def run(asked: Asked, watch: Watch | None = None) -> int:
    """Works on the job until it is done or stopped; the exit code. `watch`: of the processes that do it together."""
    from jaxinfer.batch.engine import Settings
    from jaxinfer.sharding import replica

    worker = Worker.of(asked)
    if watch is not None:
        _check_processes(watch, worker)
    opened: list[Job] = []

    def begin() -> dict[str, Any] | int:
        """The settings of the job's executable; the exit code of a job that is finished."""
        opened.append(worker.open())
        return _finished(asked, opened[0]) if opened[0].finished else dict(opened[0].manifest.settings)

    begun = replica.from_process_0(watch, begin)
    if isinstance(begun, int):
        return begun
    engine = worker.engine(Settings.from_json(begun))
    if watch is None:
        return _work(worker, opened[0], engine)
    if not opened:
        with stop_on(signal.SIGTERM) as stop:
            return replica.follow(engine, watch, stop)
    watch.before_exit.append(opened[0].abandon)  # so that other workers need not wait for the leases to expire
    lead = replica.Lead(engine, watch)
    code = _work(worker, opened[0], lead, lambda: watch.stop_asked)
    lead.end(code)
    return code


def run_on_ray(asked: Asked, workers: int) -> int:
    """Works on the job with so many workers on a Ray cluster; the exit code."""
    import jax

    from jaxinfer.batch import ray_job

    ray_job.require_ray()
    worker = Worker.of(asked)
    if isinstance(worker.drafter, Auto):
        raise InputError("--drafter auto: got it with --ray-workers; accepted: a drafter that measures nothing")
    job = worker.open()
    if job.finished:
        return _finished(asked, job)
    gpus = 0 if jax.default_backend() == "cpu" else 1 if worker.mesh is None else worker.mesh.devices.size
    with progress_bar("rows") as tell:
        ray_job.run(functools.partial(_on_ray, asked), job, workers=workers, gpus=gpus, progress=tell)
    if not job.finished:  # another worker is putting the output together
        return codes.RETRY
    note(f"{asked.output}: {job.totals().rows} rows, {job.totals().errors} of them error rows")
    return codes.ROWS_FAILED if job.totals().errors else codes.OK


def _on_ray(asked: Asked) -> tuple[Job, Any, TextCodec]:
    """What an actor works with."""
    from jaxinfer.batch.engine import Settings

    worker = Worker.of(dataclasses.replace(asked, force_new=False))  # the driver has put the old job aside
    job = worker.open()
    return job, worker.engine(Settings.from_json(job.manifest.settings)), worker.plan.codec


def _finished(asked: Asked, job: Job) -> int:
    note(f"{asked.output}: finished before, {job.totals().rows} rows")
    return codes.ROWS_FAILED if job.totals().errors else codes.OK


def _work(worker: Worker, job: Job, engine: Engine, stopped: Callable[[], bool] = lambda: False) -> int:
    """Runs the engine through the job; the exit code. `stopped`: whether another process was asked to stop."""
    from jaxinfer.batch.runner import Runner

    with stop_on(signal.SIGTERM) as stop, progress_bar("rows") as tell:
        runner = Runner(
            job, engine, worker.plan.codec, stop=lambda: stop() or stopped(),
            progress=lambda p: tell(p.rows_done, p.rows_total, f"{p.tokens_per_second:,.0f} tokens/s"),
        )  # fmt: skip
        try:
            outcome = runner.run()
        except JobError as error:  # the engine is broken, not the job's description
            note(str(error))
            return codes.INTERNAL
    _say_outcome(outcome, job.output)
    return outcome.exit_code(max_error_rate=0.0)


def _check_processes(watch: Watch, worker: Worker) -> None:
    """Raises InputError for what several processes cannot do together."""
    import jax

    mesh = worker.mesh
    if mesh is None or mesh.devices.size != jax.device_count():
        got = "no --mesh" if mesh is None else f"--mesh for {mesh.devices.size} devices"
        raise InputError(
            f"--coordinator: got {got}; accepted: a --mesh of all {jax.device_count()} devices of the "
            f"{watch.processes} processes. Workers without --mesh share a job as they are"
        )
    if isinstance(worker.drafter, Auto):
        raise InputError("--drafter auto: got it with --coordinator; accepted: a drafter that measures nothing")


def _settings(asked: Asked, plan: Plan, survey: Survey, width: int) -> Settings:
    """The executable's constants; the first worker's, which the manifest then keeps."""
    from jaxinfer.batch.engine import Settings
    from jaxinfer.sharding.mesh import ROWS, parse

    axes = {} if asked.mesh is None else parse(asked.mesh)
    split = math.prod(axes.get(name, 1) for name in ROWS)

    def with_slots(slots: int) -> Settings:
        length, eos = plan.step.config.max_length, len(plan.codec.eos_ids)
        found = Settings.of(survey, slots=slots, max_length=length, eos_ids=eos)
        # Devices that split the rows need a multiple of their number, of slots and of prompts at a time.
        whole = lambda rows: -(-rows // split) * split  # noqa: E731
        return dataclasses.replace(found, slots=whole(found.slots), prefill_rows=whole(found.prefill_rows))

    if asked.slots is not None:
        return with_slots(asked.slots)
    available, where = available_memory()
    slots = memory.largest(memory.most_slots(), lambda slots: plan.need(with_slots(slots), width), available, where)
    return with_slots(slots)


def _measured(drafter: Any, settings: Settings, load: Callable[[], LanguageModel]) -> Settings:
    """The settings with what a forward costs on this machine, where the drafter chooses by it."""
    if not isinstance(drafter, Auto):
        return settings
    note(f"measuring forwards of {settings.slots} rows, once for the job")
    chooser = drafter.measured(load(), batch=settings.slots, capacity=settings.capacity)
    return dataclasses.replace(settings, curves=curves_of(chooser))


def _say_need(need: memory.Need, settings: Settings) -> None:
    available, where = available_memory()
    note(f"batch size {settings.slots}, {settings.capacity} tokens a row: {need}; {size(available)} free on {where}")
    if need.total > available:
        note("this may not fit: --batch-size, --max-length, --weights and --cache make it smaller")


def _say_outcome(outcome: Any, output: Path) -> None:
    p = outcome.progress
    note(
        f"{p.rows} rows in {p.seconds:.1f} s, {p.errors} of them errors; {p.prompt_tokens} prompt and "
        f"{p.completion_tokens} answer tokens, {p.tokens_per_second:,.1f} tokens/s, {p.useful:.2f} tokens a slot-step"
    )
    if outcome.totals is None:
        note("stopped before the end; the same command goes on from here")
    else:
        note(f"{output}: {outcome.totals.rows} rows, {outcome.totals.errors} of them error rows")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr, if that is a terminal: call it with (done, total or None, words)."""
    if not sys.stderr.isatty():
        yield lambda done, total=None, words="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, words="")
        yield lambda done, total=None, words="": bar.update(task, completed=done, total=total, words=words)
