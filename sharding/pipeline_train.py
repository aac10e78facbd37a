"""Pipeline-parallel training of a decoder: loss and gradients in one program that runs a tick table, GPipe's or 1F1B's.

Each device of mesh axis "stage" holds one stage's layers and works on one micro-batch a tick; activations go to the
next stage, and their gradients to the one before, by `ppermute`. GPipe: Huang et al. 2018, arXiv:1811.06965. 1F1B:
Harlap et al. 2018 (PipeDream), arXiv:1806.03377, in its flushing form. Composes with a data axis (micro-batches split
over it, gradients summed once, at the end) and with any axes that the params are split over (left to XLA).

Guarantee: exact; loss and gradients are those of the whole batch on one device, up to the order of sums.
State: none between calls. In a call a stage keeps the inputs of the micro-batches under way (`Table.held`: M for
GPipe, min(M, S) for 1F1B) and gradients of its weights; embedding, norm and head have gradients on every stage, summed
at the end.
Default: "1f1b", as PipeDream; the papers leave the number of micro-batches open.
Departs: a stage's forward is computed again in its backward (GPipe's re-materialization, for both schedules), and the
last stage skips the forward that its backward would repeat. Stages move in lock-step here, so "1f1b-together" (a
forward and a backward a tick) may take less time, and up to twice the memory. Optimizers that look at a leaf's axes
(Muon) see the stage axis of staged params; those that work element by element see no difference.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.decoder import DecoderLayer
from jaxinfer.ops.attention import Segments
from jaxinfer.sharding import stages as cut
from jaxinfer.sharding.pipeline_schedule import IDLE, Table, training_table
from jaxinfer.sharding.stages import AXIS, Stages

TokenLosses = Callable[..., jax.Array]  # (step, params, hidden[B, T, D], batch) -> f32[B, T]


def next_token_losses(step: Any, params: Any, hidden: jax.Array, batch: Any) -> jax.Array:
    """-log p(target), f32[B, T], of `batch["targets"] i32[B, T]`."""
    logits = step.head(params, hidden)
    gold = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - gold


@dataclasses.dataclass(frozen=True)
class PipelineLoss:
    """An objective `(staged params, batch, key) -> (mean loss, metrics)` for `train.loop`, differentiable in params.

    `batch`: ids, positions, segments, targets i32[B, T]; B is `microbatches` times the parts of the data axis times
    a whole number. `stages` lie along mesh axis `axis`; `data` names the axis that rows are split over, None for none;
    the mesh's other axes are for the params (`stages.shardings`). `token_losses` may be another loss that is a mean
    over tokens. `metrics`: `weight` (tokens), `bubble` (share of idle stage-ticks, counted as the program runs) and
    `ticks`. Raises ConfigError for a mesh or a model that does not fit, InputError for a batch or params that do not.
    """

    step: Any
    mesh: Mesh
    stages: Stages
    microbatches: int
    schedule: str = "1f1b"
    axis: str = AXIS
    data: str | None = None
    token_losses: TokenLosses = next_token_losses

    def __post_init__(self):
        self.stages.check(self.step.config.num_layers, self.mesh, self.axis)
        if self.data is not None and self.data not in self.mesh.axis_names:
            raise ConfigError(f"mesh axis {self.data!r} is not there; the mesh has {', '.join(self.mesh.axis_names)}")
        _ = self.table

    @property
    def table(self) -> Table:
        """The table that the program runs."""
        return training_table(self.schedule, self.stages.num, self.microbatches)

    def __call__(self, params: Any, batch: Any, key: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See the class. `key` is not read: the loss draws nothing."""
        return _differentiable(self, params, batch)

    def value_and_grad(self, params: Any, batch: Any) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        """`((loss, metrics), gradients)`, what `jax.value_and_grad(self, has_aux=True)` gives, to be run under jit."""
        batch = self._microbatches(batch)
        _check_floats(params)
        manual = {self.axis} | ({self.data} if self.data else set())
        placed = {name: P(self.axis) if name == "stages" else P() for name in params}
        program = jax.shard_map(
            functools.partial(_run, self),
            mesh=self.mesh,
            in_specs=(placed, P(None, self.data)),
            out_specs=(P(), P(), placed),
            axis_names=manual,
            check_vma=False,
        )
        loss, busy, grads = program(params, batch)
        table, tokens = self.table, batch["ids"].size
        each = sum(table.busy) / (1 - table.bubble)  # forwards and backwards that there is room for
        metrics = {"weight": tokens, "bubble": 1 - busy / each, "ticks": table.ticks}
        return (loss, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}), grads

    def _microbatches(self, batch: Any) -> Any:
        """`[B, T]` -> `[M, B / M, T]`, checked."""
        wanted = ("ids", "positions", "segments", "targets")
        if missing := [name for name in wanted if name not in batch]:
            raise InputError(f"the batch lacks {missing[0]!r}; it needs {', '.join(wanted)}")
        rows, parts = batch["ids"].shape[0], self.mesh.shape[self.data] if self.data else 1
        if rows % (self.microbatches * parts):
            fits = [m for m in range(1, rows // parts + 1) if rows % (m * parts) == 0]
            raise ConfigError(
                f"a batch of {rows} rows cannot be cut into {self.microbatches} micro-batches on {parts} data parts; "
                f"micro-batches that fit: {', '.join(map(str, fits)) or 'none'}"
            )
        shape = (self.microbatches, rows // self.microbatches)
        return jax.tree.map(lambda x: jnp.reshape(x, (*shape, *x.shape[1:])), dict(batch))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(loss: PipelineLoss, params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return loss.value_and_grad(params, batch)[0]


def _forward_rule(loss: PipelineLoss, params: Any, batch: Any):
    return loss.value_and_grad(params, batch)


def _backward_rule(loss: PipelineLoss, grads: Any, cotangent: Any):
    of_loss, _ = cotangent
    return jax.tree.map(lambda g: (of_loss * g).astype(g.dtype), grads), None


_differentiable.defvjp(_forward_rule, _backward_rule)


class _Carry(NamedTuple):
    stash: jax.Array  # [held, mb, T, D]: inputs that wait for their forward or their backward
    arriving: jax.Array  # [mb, T, D] from the stage before
    cotangent: jax.Array  # [mb, T, D] from the stage after
    grads: Any
    loss: jax.Array
    busy: jax.Array


def _run(setting: PipelineLoss, params: Any, batch: Any) -> tuple[jax.Array, jax.Array, Any]:
    """One device's part: its stage over every tick of the table. Returns loss, passes run, gradients."""
    table, last = setting.table, setting.stages.num - 1
    stage = jax.lax.axis_index(setting.axis)
    slots = jax.tree.map(lambda x: x[0], params["stages"])
    rest = {name: tree for name, tree in params.items() if name != "stages"}
    count, shape = batch["ids"].size, (*batch["ids"].shape[1:], setting.step.config.hidden_size)
    dtype = jax.eval_shape(setting.step.embed, rest, batch["ids"][0]).dtype
    held = table.held

    def micro(m):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, 0, keepdims=False), batch)

    def whole(slots, rest, h, part):
        """The stage's output and, on the last stage, the micro-batch's share of the loss."""
        x = jax.lax.cond(stage == 0, lambda h: cut.enter(setting.step, rest, part["ids"], part["positions"]), _same, h)
        y = run_layers(setting.step.config, setting.stages, stage, slots, rest, x, part)

        def of_head(y):
            losses = setting.token_losses(setting.step, rest, cut.leave(setting.step, rest, y), part)
            return (losses.sum() / count).astype(jnp.float32)

        return y, jax.lax.cond(stage == last, of_head, lambda y: jnp.zeros((), jnp.float32), y)

    def forward(h, m):
        return whole(slots, rest, h, micro(m))[0]

    def backward(grads, total, cotangent, h, m):
        part = micro(m)
        (_, loss), pull = jax.vjp(lambda slots, rest, h: whole(slots, rest, h, part), slots, rest, h)
        at_last = stage == last
        own, shared, h = pull((jnp.where(at_last, 0, cotangent), jnp.where(at_last, 1.0, 0.0)))
        return jax.tree.map(jnp.add, grads, (own, shared)), total + loss, h

    def no_backward(grads, total, cotangent, h, m):
        return grads, total, h

    def tick(carry: _Carry, row):
        arrived, f, b = (x[stage] for x in row)
        stash = jnp.where(
            arrived >= 0,
            jax.lax.dynamic_update_index_in_dim(carry.stash, carry.arriving, arrived % held, 0),
            carry.stash,
        )
        # The last stage's forward is part of its backward.
        h = stash[jnp.maximum(f, 0) % held]
        out = jax.lax.cond((f >= 0) & (stage < last), forward, lambda h, m: h, h, f)
        h = stash[jnp.maximum(b, 0) % held]
        grads, loss, back = jax.lax.cond(b >= 0, backward, no_backward, carry.grads, carry.loss, carry.cotangent, h, b)
        arriving = jax.lax.ppermute(out, setting.axis, [(i, i + 1) for i in range(last)])
        cotangent = jax.lax.ppermute(back, setting.axis, [(i + 1, i) for i in range(last)])
        busy = carry.busy + (f >= 0) + (b >= 0)
        return _Carry(stash, arriving, cotangent, grads, loss, busy), None

    zeros = jnp.zeros(shape, dtype)
    start = _Carry(
        jnp.zeros((held, *shape), dtype), zeros, zeros, jax.tree.map(jnp.zeros_like, (slots, rest)),
        jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32),
    )  # fmt: skip
    end, _ = jax.lax.scan(tick, start, tuple(map(jnp.asarray, _columns(table))))
    (own, shared), loss, busy = end.grads, end.loss, jax.lax.psum(end.busy, setting.axis)
    loss, shared = jax.lax.psum((loss, shared), setting.axis)
    if setting.data is not None:
        # `count` is of this device's rows, so sums over the data axis are means.
        own, shared, loss = jax.lax.pmean((own, shared, loss), setting.data)
    return loss, busy, {**shared, "stages": jax.tree.map(lambda g: g[None], own)}


def run_layers(config: Any, stages: Stages, stage: jax.Array, slots: Any, rest: Any, x: jax.Array, part: Any) -> Any:
    """This stage's layers over `x[B, T, D]`, without a cache; `part` has positions and segments i32[B, T]."""
    table = rest.get("position_table")
    for slot in range(stages.slots):

        def layer(i, x, slot=slot):
            module = DecoderLayer(config, layer=i)
            variables, mask = {"params": slots[f"slot_{slot}"]}, Segments(part["segments"])
            found: Any = module.apply(variables, x, part["positions"], None, None, None, 0, mask, table)
            return found[0]

        x = cut.run_slot(stages, stage, slot, layer, _same, lambda i: (config.attention(i), config.is_sparse(i)), x)
    return x


def _columns(table: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What arrives, goes forward and goes backward, i32[ticks, S] each: a tick after it left the stage before."""
    forward, backward = np.asarray(table.forward, np.int32), np.asarray(table.backward, np.int32)
    arrived = np.full_like(forward, IDLE)
    arrived[1:, 1:] = forward[:-1, :-1]
    return arrived, forward, backward


def _check_floats(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(f"{name} is {leaf.dtype}: a pipeline trains float weights only")


def _same(x: jax.Array) -> jax.Array:
    return x
