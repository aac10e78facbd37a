"""The one training loop: a pure `train_step(state, batch)`, and around it checkpoints, evaluation and metrics.

A recipe is an objective `(params, batch, key) -> (loss, metrics)`, data as a pure function of the step, and an Optax
transformation; what is read but not trained (the target of a draft head, the base of an adapter) is its `frozen`. Data
that the params themselves make, such as answers to be rewarded, come from a `Source`. A run that is killed at any
moment and started again ends in the same bits as an undisturbed run on the same machine, because everything that a step
reads is in the checkpoint (a Source's state too), in `frozen` or a function of the step. Several processes run
it alike (`sharding/launch.py` joins them): each saves its shards, one writes the metrics, and a SIGTERM at any of them
stops all at one step.

Stability: experimental.
"""

import abc
import dataclasses
import errno
import hashlib
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct

from jaxinfer.errors import CheckpointError, ConfigError, JobError
from jaxinfer.train import metrics as record
from jaxinfer.train import processes

Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the scheduler may start the same command again


class Preempted(JobError):
    """The run saved its state after a SIGTERM and stopped; start the same command again to go on."""

    together = True  # all processes of a run raise it, after the same step


@struct.dataclass
class TrainState:
    """`step` i32 is the number of completed updates; `ema` is None or the running mean of the params."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    key: jax.Array


class Source(abc.ABC):
    """Data that reads the params, or remembers something from step to step: `Recipe.data` where a function of the step
    does not do. What it remembers is saved with every checkpoint and given back to it before a run goes on."""

    @abc.abstractmethod
    def next(self, params: Any, step: int) -> Any:
        """The batch of the update that follows `step` completed ones, a pytree of host arrays. It may not keep the
        `params`, which the update overwrites."""

    @abc.abstractmethod
    def state(self) -> Any:
        """All that the batches to come depend on, besides params and step, as a JSON value."""

    @abc.abstractmethod
    def restore(self, state: Any) -> None:
        """Goes on from a `state()`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained. Only `identity` is compared when a run resumes, so keep the lengths of a run out of it.

    objective: `(params, batch, key) -> (loss, metrics)`, with `frozen` as a fourth argument where there is one;
      `metrics["weight"]`, when given, is the number of targets that the mean `loss` is over: accumulation weighs
      microbatches by it.
    frozen: arrays that the objective reads and no update changes; neither differentiated nor saved, so that whoever
      resumes a run hands over the same ones (say so in `identity`).
    data: completed steps -> batch, a pytree of host arrays, or a `Source` of batches; shapes may change from step to
      step (each compiles once).
    evaluate: params -> {name: value}, on text that is held out.
    tokens: batch -> how many tokens the metrics should count.
    batch_sharding: how a batch's leading axes lie on the mesh that the state lies on; None: as a single device has it.
    local_data: `data` gives each process only its own rows, in the processes' order, instead of the whole batch.
    """

    objective: Objective
    data: Callable[[int], Any] | Source
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any] | None = None
    evaluate: Callable[[Any], Mapping[str, float]] | None = None
    tokens: Callable[[Any], int] = lambda batch: 0
    accumulate: int = 1
    ema_decay: float | None = None
    frozen: Any = None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_sharding: jax.sharding.NamedSharding | None = None
    local_data: bool = False


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long and how often. Steps count completed updates; None turns a thing off."""

    steps: int
    save_every: int | None = None
    save_seconds: float | None = 300.0
    keep: int = 2
    evaluate_every: int | None = None
    log_every: int = 1
    curve: bool = True


def init_state(params: Any, recipe: Recipe, key: jax.Array) -> TrainState:
    """The state before the first update; `key` is folded with the step for each update."""
    ema = jax.tree.map(jnp.array, params) if recipe.ema_decay is not None else None
    return TrainState(jnp.zeros((), jnp.int32), params, recipe.optimizer.init(params), ema, key)


def fingerprint(tree: Any) -> str:
    """A short hash of the names, shapes and first values of a tree's leaves: what to put into `Recipe.identity` for the
    arrays that a run reads and does not save (`frozen`), or starts from."""
    h = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # The first row of each axis but the last: all of a large leaf would have to be fetched.
        first = np.asarray(leaf[(0,) * (leaf.ndim - 1)])
        h.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode() + first.tobytes())
    return h.hexdigest()[:16]


def make_train_step(recipe: Recipe) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The pure `train_step(state, batch, frozen=None) -> (state, metrics)` of a recipe, to be run under `jax.jit`.

    With `accumulate` A > 1 each leaf of the batch leads with A, and gradients are summed over that axis in one scan.
    `frozen` is an argument, not read from the recipe: under jit the recipe's arrays would become constants of the
    program.
    """
    differentiate = jax.value_and_grad(recipe.objective, has_aux=True)

    def train_step(state: TrainState, batch: Any, frozen: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        more = () if frozen is None else (frozen,)
        value_and_grad = lambda *arguments: differentiate(*arguments, *more)  # noqa: E731
        if recipe.accumulate == 1:
            (loss, metrics), grads = value_and_grad(state.params, batch, key)
        else:
            loss, metrics, grads = _accumulate(value_and_grad, state.params, batch, key, recipe.accumulate)
        updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if recipe.ema_decay is not None:
            # The usual start: a mean over the few updates so far until there are enough of them for the decay.
            decay = jnp.minimum(recipe.ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda mean, new: mean + (1 - decay).astype(mean.dtype) * (new - mean), ema, params)
        metrics = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads)}
        if recipe.schedule is not None:
            metrics["learning_rate"] = jnp.asarray(recipe.schedule(state.step))
        return TrainState(state.step + 1, params, opt_state, ema, state.key), metrics

    return train_step


def _accumulate(value_and_grad, params, batch, key, count):
    """Weighted means of loss, metrics and gradients over the leading axis of the batch."""

    def one(total, inputs):
        index, part = inputs
        (loss, metrics), grads = value_and_grad(params, part, jax.random.fold_in(key, index))
        weight = jnp.asarray(metrics.get("weight", 1.0), jnp.float32)
        scaled = jax.tree.map(lambda x: x * weight.astype(x.dtype), grads)
        return (total[0] + weight, jax.tree.map(jnp.add, total[1], scaled)), (weight, loss, metrics)

    zeros = jax.tree.map(jnp.zeros_like, params)
    start = (jnp.zeros((), jnp.float32), zeros)
    (total, grads), (weights, losses, metrics) = jax.lax.scan(one, start, (jnp.arange(count), batch))
    total = jnp.maximum(total, 1e-9)
    mean = lambda x: jnp.tensordot(weights, x.astype(jnp.float32), 1) / total  # noqa: E731
    means = {name: mean(value) for name, value in metrics.items()}
    if "weight" in metrics:
        means["weight"] = total
    return mean(losses), means, jax.tree.map(lambda g: g / total.astype(g.dtype), grads)


class Checkpoints:
    """Orbax checkpoints of a `TrainState` below a folder, each with the identity of the recipe that wrote it."""

    def __init__(self, folder: str | Path, *, keep: int = 2, identity: Mapping[str, Any] | None = None):
        self.folder, self.identity = Path(folder).absolute(), dict(identity or {})
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None. What a kill cut off in the middle is not counted."""
        return self._manager.latest_step()

    def save(self, state: TrainState, source: Any = None) -> None:
        """Saves under the number of completed updates; saving the same step again does nothing. `source`: the state of
        a `Source`, where there is one.

        Raises `CheckpointError` where the write fails; checkpoints from before are left as they were.
        """
        step = int(state.step)
        if step == self.latest():
            return
        items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "recipe": ocp.args.JsonSave(self.identity)}
        if source is not None:
            items["source"] = ocp.args.JsonSave({"state": source})
        args = ocp.args.Composite(**items)
        try:
            self._manager.save(step, args=args)
            self._manager.wait_until_finished()
        except (
            Exception
        ) as error:  # a full disk reaches us as an OSError, or as whatever the storage library makes of it
            kept = self.latest()
            left = "no checkpoint was saved before" if kept is None else f"the checkpoint of step {kept} is intact"
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC or "No space left on device" in str(error)
            reason = "no space left on device" if full else str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"cannot save step {step} below {self.folder}: {reason}; {left}") from error

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (default: the newest) with the shapes, dtypes and shardings of `like`.

        Raises `CheckpointError` where there is none or it is damaged, `ConfigError` where another recipe wrote it.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"no checkpoint below {self.folder}")
        saved = self._read(step, recipe=ocp.args.JsonRestore())["recipe"]
        differing = sorted(k for k in {*saved, *self.identity} if saved.get(k) != self.identity.get(k))
        if differing:
            told = ", ".join(f"{k}: saved {saved.get(k)!r}, now {self.identity.get(k)!r}" for k in differing)
            raise ConfigError(f"the checkpoint below {self.folder} is of another run ({told}); choose another folder")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), like
        )
        return self._read(step, state=ocp.args.StandardRestore(abstract))["state"]

    def restore_source(self, step: int) -> Any:
        """The state of the run's `Source` at `step`. Raises `CheckpointError` where it is damaged or missing."""
        return self._read(step, source=ocp.args.JsonRestore())["source"]["state"]

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # cut short, or of other shapes: Orbax has no error of its own for either
            others = [str(s) for s in self._manager.all_steps() if s != step]
            left = f"; remove its folder to go on from the one of step {others[-1]}" if others else ""
            reason = str(error).strip().partition("\n")[0][:300]
            raise CheckpointError(
                f"the checkpoint of step {step} below {self.folder} is damaged: {reason}{left}"
            ) from error

    def close(self) -> None:
        """Waits for writes to end and releases Orbax's threads."""
        self._manager.close()


class _Terminate:
    """While entered, SIGTERM sets `asked` instead of ending the process (only the main thread may do this)."""

    def __enter__(self) -> "_Terminate":
        self.asked = False
        self._old: Any = None
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number, frame) -> None:
        self.asked = True

    def __exit__(self, *exc) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)


def train(
    recipe: Recipe, state: TrainState, config: LoopConfig, folder: str | Path, *, resume: bool = True
) -> TrainState:
    """Runs the recipe to `config.steps` completed updates and returns the final state.

    Below `folder`: `checkpoints/`, `metrics.jsonl` (one object a logged step) and `curve.png`. With `resume` the newest
    checkpoint replaces `state`, and metrics of updates that it does not hold are dropped, since they are made again;
    without, checkpoints that are there are removed.
    A state that lies on a mesh stays as it lies; its leaves that do not are copied to all devices of the mesh.
    Raises `Preempted` after a SIGTERM (state saved), `JobError` when loss or gradient stop being finite (not saved).
    """
    folder, writer = Path(folder), jax.process_index() == 0
    if not resume:  # Orbax saves no step below one that is there already
        if writer:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        processes.wait_for_all("checkpoints removed")
    recipe, state = _on_mesh(recipe, state)
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep, identity=recipe.identity)
    try:
        if resume and checkpoints.latest() is not None:
            state = checkpoints.restore(state)
            if isinstance(recipe.data, Source):
                recipe.data.restore(checkpoints.restore_source(int(state.step)))
        first, last = int(state.step), config.steps
        with record.Metrics(folder / "metrics.jsonl", first_step=first, last_step=last, write=writer) as log:
            state = _run(recipe, state, config, checkpoints, log)
    finally:
        checkpoints.close()
    if config.curve and writer:
        record.draw_curve(folder / "metrics.jsonl", folder / "curve.png")
    return state


def _on_mesh(recipe: Recipe, state: TrainState) -> tuple[Recipe, TrainState]:
    """The recipe's `frozen` and the state on the mesh that some of the state lies on, or that the batch names; without
    one, the state on its device."""
    mesh = processes.mesh_of(state)
    if recipe.batch_sharding is not None:
        asked = processes.mesh_of(recipe.batch_sharding)
        if mesh not in (None, asked):
            raise ConfigError(f"batch_sharding: got the mesh {asked}; accepted: the state's, {mesh}")
        mesh = asked
    if mesh is None:
        if jax.process_count() > 1:
            raise ConfigError(
                f"the state: got arrays of one device, in {jax.process_count()} processes; accepted: arrays on a mesh "
                "of all devices, or a batch_sharding that names one"
            )
        return recipe, processes.committed(state)
    return dataclasses.replace(recipe, frozen=processes.spread(recipe.frozen, mesh)), processes.spread(state, mesh)


def _run(recipe: Recipe, state: TrainState, config: LoopConfig, checkpoints: Checkpoints, log) -> TrainState:
    lie = processes.output_shardings(state)
    train_step = jax.jit(make_train_step(recipe), donate_argnums=0, out_shardings=lie)
    saved_at, waited, tokens = time.monotonic(), 0.0, 0
    started = time.perf_counter()
    step, data = int(state.step), recipe.data
    with _Terminate() as terminate:
        while step < config.steps:
            fetch = time.perf_counter()
            batch = data.next(state.params, step) if isinstance(data, Source) else data(step)
            waited, tokens = waited + time.perf_counter() - fetch, tokens + recipe.tokens(batch)
            batch = processes.place_batch(batch, recipe.batch_sharding, local=recipe.local_data)
            state, metrics = train_step(state, batch, recipe.frozen)
            step += 1
            if step % config.log_every == 0 or step == config.steps:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}  # waits for the device
                _check_finite(values, step, checkpoints)
                log.step(step, values, tokens=tokens, seconds=time.perf_counter() - started, data_wait=waited)
                waited, tokens, started = 0.0, 0, time.perf_counter()
            last = step == config.steps
            if recipe.evaluate is not None and config.evaluate_every and (last or step % config.evaluate_every == 0):
                params = state.params if state.ema is None else state.ema
                log.evaluation(step, recipe.evaluate(params))
                started = time.perf_counter()
            due = config.save_seconds is not None and time.monotonic() - saved_at >= config.save_seconds
            stop = terminate.asked
            if jax.process_count() > 1:  # at steps that wait for the devices anyway, since to agree is to wait for them
                due, stop = processes.agree(due, stop) if step % config.log_every == 0 or last else (False, False)
            due |= bool(config.save_every) and step % (config.save_every or 1) == 0
            if due or last or stop:
                _check_finite(metrics, step, checkpoints)  # of a step that was not logged
                checkpoints.save(state, data.state() if isinstance(data, Source) else None)
                saved_at = time.monotonic()
                started = time.perf_counter()
            if stop and not last:
                raise Preempted(f"stopped by SIGTERM after step {step}; start the same command again to go on")
    return state


def _check_finite(metrics: Mapping[str, Any], step: int, checkpoints: Checkpoints) -> None:
    """JobError where the loss of update `step`, or the gradient that made the params after it, is not finite."""
    for name, words in (("loss", "the loss"), ("grad_norm", "the gradient's norm")):
        if not math.isfinite(value := float(metrics[name])):
            kept = checkpoints.latest()
            which = "none was saved" if kept is None else f"that of step {kept} below {checkpoints.folder}"
            raise JobError(f"{words} is {value} at step {step}; the last checkpoint is before it: {which}")
