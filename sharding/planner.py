"""The planner: which meshes fit a model and a job, what each device holds and sends, and which to take.

Bytes of weights and caches are exact: the layout that `strategies` gives them. What a device sends in a step is counted
collective by collective, by the ring algorithm; `collectives.py` reads the same off the compiled program: within 1 %
for each strategy alone and for products of two without fsdp. In products with fsdp XLA gathers some weights twice (it
does not see that two spellings of a group name the same devices) or leaves them split: those compared send from 5 %
less (17 where the vocabulary is odd) to 9 % more. Work space is an estimate from the sizes of the largest arrays,
without rematerialisation. The time is the roofline's (`measure.roof`): the larger of arithmetic and memory traffic, and
what is sent after it, as if nothing overlapped: a prediction to rank strategies by. Machinery.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType

from jaxinfer import quant
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.sharding.experts import capacity_of, rounds_of
from jaxinfer.sharding.mesh import AXES, ROWS, check, describe, fitting
from jaxinfer.sharding.ring_attention import ContextCache
from jaxinfer.sharding.rules import AxisRules, names, shardings
from jaxinfer.sharding.strategies import state_axes, strategy_for

KINDS = ("decode", "prefill", "train")
USABLE = 0.9  # of a device's memory; the rest is the allocator's and the program's


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device by its data sheet: bytes of `memory`, bfloat16 operations, bytes read, and bytes sent a second.

    `link` is what one device sends along one mesh axis in one direction. `scatters`: whether XLA's compiler for it
    makes a reduce-scatter of a sum of which a device keeps its share, and adds what ends in the same sum before it is
    sent. The one for GPUs does (ReduceScatterCreator and AllReduceReassociate in xla/service/gpu/gpu_compiler.cc), the
    one for TPUs is taken to; the one for CPUs does neither, and sends all-reduces.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    scatters: bool = True


CHIPS: Mapping[str, Chip] = {
    # NVIDIA's data sheet of the H200 SXM: 141 GB, 1,979 TFLOP/s in bfloat16 with sparsity (dense: half), 4.8 TB/s;
    # NVLink 900 GB/s of both directions together.
    "h200": Chip("h200", 141e9, 989e12, 4.8e12, 450e9),
    # docs.cloud.google.com/tpu/docs/v5p: 95 GB (GiB by newer versions of the page), 459 TFLOP/s in bfloat16, 2,765
    # GB/s; interconnect of a chip 1,200 GB/s of both directions (4,800 Gbit/s of one), over six links of a 3D torus:
    # 100 GB/s a link and direction. One link, since slices under 4x4x4 chips, as a v5p-64 (2x4x4), close no rings.
    "v5p": Chip("v5p", 95e9, 459e12, 2.765e12, 100e9),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A step: `kind`, `batch` rows of `tokens` each, over a cache of `capacity` tokens (none for training).

    decode: tokens scored in one forward (1, or drafts + 1). prefill: a chunk of the prompt. train: the length.
    """

    kind: str
    batch: int
    tokens: int
    capacity: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"job kind {self.kind!r} is unknown; accepted: {', '.join(KINDS)}")
        if min(self.batch, self.tokens) < 1 or (self.kind != "train" and self.capacity < self.tokens):
            raise ConfigError(f"{self}: accepted: rows and tokens from 1 on, and a capacity of at least the tokens")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device holds in bytes (`weights`, `cache`, `optimizer` with gradients, `work`), `sends` in one step
    (bytes by what for), computes (`flops`) and reads, under the mesh `axes`.

    Experts are sent one round of tokens a layer, which an even routing takes; `uneven`: the bytes of the further rounds
    that the most uneven routing takes.
    """

    axes: tuple[tuple[str, int], ...]
    sequence: bool
    weights: int
    cache: int
    optimizer: int
    work: int
    sends: tuple[tuple[str, float], ...]
    uneven: float
    flops: float
    reads: float

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return self.weights + self.cache + self.optimizer + self.work

    @property
    def sent(self) -> float:
        """Bytes sent in one step."""
        return sum(count for _, count in self.sends)

    def seconds(self, chip: Chip) -> float:
        """Predicted time of a step."""
        return max(self.flops / chip.flops, self.reads / chip.bandwidth) + self.sent / chip.link

    def fits(self, memory: float) -> bool:
        """Whether a device of so many bytes holds it."""
        return self.total <= USABLE * memory

    def __str__(self) -> str:
        return describe(dict(self.axes)) or "one device"


def predict(
    step: Any,
    axes: Mapping[str, int],
    job: Job,
    params: Any = None,
    *,
    sequence: bool = False,
    width: int = 4,
    scatters: bool = True,
) -> Plan:
    """The Plan of one mesh. `params`: the weights' shapes, quantized or adapted ones too (None: plain float32);
    `width`: bytes of an activation; `scatters`: of the Chip. Raises ConfigError as `mesh.check` for a mesh that does
    not divide."""
    config = step.config
    check(axes, config, batch=job.batch)
    axes = {name: axes[name] for name in AXES if axes.get(name, 1) > 1}
    mesh: Any = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    rules = strategy_for(axes, config, sequence=sequence)
    if params is None:
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32"), nn.unbox(_declared(step)))
    placed = shardings(_declared(step), mesh, rules, params)
    paths = [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True))
    weights = sum(_local(leaf, sharding) for leaf, sharding in pairs)
    sizes = _Sizes.of(config, rules, mesh, job, width, scatters)
    cache = 0 if job.kind == "train" else _cache(step, rules, mesh, job)
    named = [(path, *pair) for path, pair in zip(paths, pairs, strict=True)]
    gathered = _gathered([pair for path, *pair in named if not sizes.looked_up(path)], rules)
    training = job.kind == "train"
    # Adam's two moments and the gradient, in float32, of what is trained: all that is a float.
    optimizer = (
        sum(3 * _local(leaf, sharding) * 4 // leaf.dtype.itemsize for leaf, sharding in pairs) if training else 0
    )
    sends = _sends(sizes, named, gathered, training=training)
    active = _active(config, params) / sizes.tensor
    tokens = sizes.rows * sizes.tokens
    seen = sizes.layers * sizes.heads * config.head_dim * max(job.capacity, job.tokens)
    flops = (6 if training else 2) * tokens * (active + 2 * seen)
    read = weights + sum(gathered)
    return Plan(
        tuple(axes.items()), sequence, weights, cache, optimizer, _work(sizes, weights, gathered, training=training),
        tuple((what, count) for what, count in sends.items() if count),
        _uneven(sizes, training=training), flops, 3 * read if training else read + cache,
    )  # fmt: skip


def plans(
    step: Any, devices: int, job: Job, chip: Chip, params: Any = None, *, axes: Sequence[str] = AXES, width: int = 4
) -> list[Plan]:
    """The Plan of every mesh of `devices` that divides model and batch: those that fit first, of these the fastest.

    A pipeline's `stage` axis is left out: it is a program of its own. Raises ConfigError where no mesh divides.
    """
    names = [name for name in axes if name != "stage"]
    meshes = fitting(step.config, devices, batch=job.batch, names=names)
    # Tokens of a row are split where there are enough of them to go round a ring, or a cache to lie on all devices.
    found = [predict(step, mesh, job, params, width=width, scatters=chip.scatters) for mesh in meshes]
    if not found:
        accepted = [n for n in range(devices - 1, 0, -1) if fitting(step.config, n, batch=job.batch, names=names)]
        problem = f"{devices} devices: no mesh divides the model and a batch of {job.batch}"
        raise ConfigError(f"{problem}; would fit: {', '.join(map(str, accepted[:6]))} devices")
    return sorted(found, key=lambda plan: (not plan.fits(chip.memory), plan.seconds(chip), len(plan.axes), plan.total))


def pick(found: Sequence[Plan], chip: Chip) -> Plan:
    """The first that fits. Raises InputError, which names the smallest, where none does."""
    fit = [plan for plan in found if plan.fits(chip.memory)]
    if fit:
        return fit[0]
    least = min(found, key=lambda plan: plan.total)
    parts = ", ".join(f"{n} {getattr(least, n) / 2**30:.1f}" for n in ("weights", "cache", "optimizer", "work"))
    raise InputError(
        f"no strategy fits {USABLE * chip.memory / 2**30:.1f} GiB a device; the smallest, {least}, takes "
        f"{least.total / 2**30:.1f} GiB ({parts}); accepted: more devices, fewer rows or tokens, quantized weights"
    )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """A job's lengths on one device."""

    config: Any
    rules: AxisRules
    mesh: Any
    job: Job
    width: int
    scatters: bool
    rows: int
    tokens: int
    ringed: bool

    @classmethod
    def of(cls, config: Any, rules: AxisRules, mesh: Any, job: Job, width: int, scatters: bool) -> _Sizes:
        context = rules.parts("context", mesh)
        ringed = context > 1 and job.tokens % context == 0
        tokens = job.tokens // context if ringed else job.tokens
        rows = job.batch // rules.parts("batch", mesh)
        return cls(config, rules, mesh, job, width, scatters, rows, tokens, ringed)

    @property
    def layers(self) -> int:
        return self.config.num_layers

    @property
    def tensor(self) -> int:
        return self.rules.parts("heads", self.mesh)

    @property
    def context(self) -> int:
        return self.rules.parts("context", self.mesh)

    @property
    def vocab(self) -> int:
        return self.rules.parts("vocab", self.mesh)

    @property
    def heads(self) -> int:
        return self.config.num_heads // self.tensor

    @property
    def groups(self) -> int:
        return self.config.num_kv_heads // self.tensor

    @property
    def stream(self) -> float:
        """Bytes of the residual stream."""
        return self.rows * self.tokens * self.config.hidden_size * self.width

    @property
    def split(self) -> bool:
        """Whether tensor splits the tokens between blocks."""
        return "tensor" in names(self.rules["length"]) and self.job.tokens % self.rules.parts("length", self.mesh) == 0

    def looked_up(self, path: str) -> bool:
        """An embedding whose rows are whole is looked up where it lies, and the tokens' rows are exchanged."""
        return path == "embedding" and self.vocab == 1 and not self.config.tie_embeddings

    @property
    def sparse(self) -> int:
        return sum(self.config.is_sparse(i) for i in range(self.layers))


@functools.lru_cache(maxsize=4)
def _declared(step: Any) -> Any:
    """The model's weights and their axes: seconds of tracing for a deep model, the same for every mesh."""
    return step.abstract()


def _sends(s: _Sizes, weights: Any, gathered: Sequence[int], *, training: bool) -> dict[str, float]:
    """Bytes that a device sends, by what for. `weights`: path, leaf and sharding of each."""
    found = {"tensor": _tensor(s, training=training)}
    fsdp = s.rules.parts("embed", s.mesh)
    # What arrives, each sends on. Once: the backward pass takes what the forward pass gathered.
    found["weights"] = sum(gathered) * (fsdp - 1) / fsdp
    if fsdp > 1 and s.vocab == 1:  # the ids, and a share of each token's row; its gradient goes back the same way
        found["embedding"] = (s.stream / fsdp + s.rows * s.tokens * 4) * (fsdp - 1) * (2 if training else 1)
    found["experts"] = s.sparse * _round(s, training=training)
    if s.context > 1:
        found["context"] = s.layers * _context(s, training=training)
    if training:
        found["gradients"] = sum(_gradient(s, path, leaf, sharding) for path, leaf, sharding in weights)
    return found


def _tensor(s: _Sizes, *, training: bool) -> float:
    """A sum after attention and one after the MLP, one of the embedding's rows; backward, of the gradient that each
    product hands back to its input (q, k, v; gate, up, or all experts together; the head)."""
    split_vocab = s.vocab > 1
    sums = 2 * s.layers + split_vocab
    if training:
        products = 2 * s.layers if s.scatters else 5 * s.layers - s.sparse
        sums += products + split_vocab
    share = s.stream * (s.tensor - 1) / s.tensor  # of a gather or a reduce-scatter
    if s.split:
        # Each of the sums leaves a device its tokens. They are gathered before each block and before the head; the
        # gradient, before each block's backward pass and before the embedding's.
        gathers = (2 * s.layers + 1) * (2 if training else 1)
        sent = sums * share * (1 if s.scatters else 2) + gathers * share
    else:
        sent = sums * 2 * share
    if training and split_vocab:  # the peak of the logits, their sum, the target's
        sent += 3 * _all_reduce(s.rows * s.tokens * 4, s.vocab)
    return sent


def _round(s: _Sizes, *, training: bool) -> float:
    """One round of a layer's experts: rows and their experts' numbers go there, rows come back, and backward the same
    with gradients."""
    parts = s.rules.parts("experts", s.mesh)
    rows = (parts - 1) * capacity_of(s.rows * s.tokens, s.config.experts_per_token, parts)
    return rows * ((4 if training else 2) * s.config.hidden_size * s.width + 4)


def _uneven(s: _Sizes, *, training: bool) -> float:
    parts, k = s.rules.parts("experts", s.mesh), s.config.experts_per_token
    if parts == 1 or not s.sparse:
        return 0.0
    tokens = s.rows * s.tokens
    rounds = rounds_of(tokens, k, s.config.num_experts, parts, capacity_of(tokens, k, parts))
    return s.sparse * (rounds - 1) * _round(s, training=training)


def _context(s: _Sizes, *, training: bool) -> float:
    """One layer's keys and values round the ring, or the parts of each device's attention over its own slots."""
    c = s.config
    if not s.ringed:
        return (s.context - 1) * s.rows * s.heads * s.tokens * (c.head_dim + 1) * 4
    pairs_of_keys = 2 * s.rows * s.groups * c.head_dim
    marks = 2 * s.rows * 4
    piece = s.tokens * (pairs_of_keys * s.width + marks)
    past = 0 if training else -(-s.job.capacity // s.context) * (pairs_of_keys * s.width + marks)
    hops = s.context - 1
    # Backward, keys travel again (not in a ring of two: they have come the whole way), and their gradients one hop
    # further, home.
    back = hops * piece * (hops > 1) + s.context * s.tokens * pairs_of_keys * s.width if training else 0
    return hops * (piece + past) + back


def _all_reduce(count: float, parts: int) -> float:
    return 2 * count * (parts - 1) / parts


def _gradient(s: _Sizes, path: str, leaf: Any, sharding: Any) -> float:
    """A weight's gradient is summed over the axes that split rows or tokens and not the weight, one after the other.

    Over fsdp, which splits both, it is scattered (or summed whole, where the compiler scatters nothing), and the other
    axes sum the share.
    """
    own = [axis for part in sharding.spec for axis in names(part)]
    rows = math.prod(s.mesh.shape[axis] for axis in ROWS if axis in s.mesh.shape and axis not in own)
    count = _local(leaf, sharding) * 4 / leaf.dtype.itemsize
    fsdp = s.mesh.shape["fsdp"] if "fsdp" in own and not s.looked_up(path) else 1
    found = count * (fsdp - 1) * (1 if s.scatters else 2)
    # Lookup and head each make a gradient of a tied embedding; those of a lookup that fsdp exchanged are not summed.
    twice = path == "embedding" and s.config.tie_embeddings and fsdp == 1 and not s.scatters
    found += (2 if twice else 1) * (_all_reduce(count, rows) + _all_reduce(count, s.context))
    # Of what tensor does not split, a device has a part too where it sees its own heads, experts' columns, or tokens.
    name = path.rpartition("/")[2]
    if name in ("q_norm", "k_norm", "router") or (s.split and name.endswith("norm")):
        found += _all_reduce(count, s.tensor)
    return found


def _gathered(pairs: Any, rules: AxisRules) -> list[int]:
    """Bytes, once gathered, of each weight that is gathered where it is used: all that is split over `embed`'s axis."""
    axes = set(names(rules["embed"]))
    found = []
    for leaf, sharding in pairs:
        if any(axes & set(names(part)) for part in sharding.spec):
            found.append(_local(leaf, sharding) * math.prod(sharding.mesh.shape[axis] for axis in axes))
    return found


def _work(s: _Sizes, weights: int, gathered: Sequence[int], *, training: bool) -> int:
    """Work space: activations (of all layers, for the backward pass), scores, logits, gathered weights, gradients."""
    c = s.config
    mlp = max(c.mlp_size, c.experts_per_token * c.expert_size) / s.tensor
    token = 8 * c.hidden_size + 5 * mlp + 5 * s.heads * c.head_dim
    if s.sparse:  # rows sorted by expert
        token += c.experts_per_token * 2 * c.hidden_size
    keys = s.job.capacity // s.context + (s.tokens if s.ringed or s.context == 1 else s.job.tokens)
    scores = (3 if training else 2) * s.rows * s.heads * s.tokens * keys
    logits = (3 if training else 2) * s.rows * s.tokens * c.vocab_size / s.rules.parts("vocab", s.mesh)
    layer = s.rows * s.tokens * token + scores
    whole = sum(gathered) if training else 2 * max(gathered, default=0)  # kept for the backward pass, or two at a time
    return round(s.width * ((s.layers if training else 1) * layer + logits)) + whole


def _cache(step: Any, rules: AxisRules, mesh: Any, job: Job) -> int:
    """Bytes of the caches on one device."""
    config = step.config
    policy = ContextCache(mesh, rules) if rules.parts("context", mesh) > 1 else step.cache
    specs = Counter(policy.spec(config.attention(i), job.capacity, step.dtype) for i in range(config.num_layers))
    total = 0
    for spec, layers in specs.items():
        state = jax.eval_shape(lambda spec=spec: spec.init(job.batch))
        for leaf, axes in zip(jax.tree.leaves(state), _axes_of(spec, state), strict=True):
            parts = math.prod(rules.parts(name, mesh) for name in axes if name is not None)
            total += layers * leaf.size * leaf.dtype.itemsize // parts
    return total


def _axes_of(spec: Any, state: Any) -> list[tuple[str | None, ...]]:
    return jax.tree.leaves(state_axes(spec, state), is_leaf=lambda x: type(x) is tuple)


def _local(leaf: Any, sharding: Any) -> int:
    return math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize


def _active(config: Any, params: Any) -> float:
    """Parameters that a token passes through."""
    total = 0.0
    for path, leaf in quant.leaves(params):
        size = math.prod(leaf.shape)
        if path == "embedding" and not config.tie_embeddings:
            continue
        routed = len(leaf.shape) == 3
        total += size * (config.experts_per_token / config.num_experts if routed else 1)
    return total
