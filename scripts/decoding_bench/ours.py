"""What bench_decoding runs of jaxinfer: a subject (model, draft, heads), a method on it, and what a step of it costs.

A method is written as `jaxinfer generate --drafter` spells it. Batch 1 decodes the prompts one after the other, a
larger batch all at once; every prompt is padded to one width, so a method compiles once a batch size and temperature:
one program to prefill, which the costs are measured with too, and one for all the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import cache as kv
from jaxinfer import decode, measure
from jaxinfer.checkpoint import hub
from jaxinfer.cli.auto import Auto
from jaxinfer.cli.options import DRAFTERS
from jaxinfer.decode import Chooser, Config, Stats, keys
from jaxinfer.decode.sampling import Features, Warp
from jaxinfer.errors import InputError
from jaxinfer.models.heads import load_head

OPTIONS = decode.compiler_options()
EVERY = 1 << 30  # steps: until all rows are done


def _finish(step, params, state, draft_params, *, config: Config) -> decode.Result:
    return decode.result(
        decode.advance(step, params, state, config=config, steps=EVERY, draft_params=draft_params), config
    )


_BEGIN = jax.jit(decode.begin, static_argnames=("step", "config"), compiler_options=OPTIONS)
_FINISH = jax.jit(_finish, static_argnames=("step", "config"), compiler_options=OPTIONS)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cell of the benchmark: which prompts, how many at a time, how warm."""

    prompts: tuple[tuple[int, ...], ...]
    width: int
    batch: int
    tokens: int
    temperature: float

    def groups(self) -> list[tuple[jax.Array, jax.Array]]:
        """`(tokens i32[batch, width], lengths i32[batch])` of each group of prompts."""
        padded = np.zeros((len(self.prompts), self.width), np.int32)
        for row, prompt in zip(padded, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        lengths = np.asarray([len(prompt) for prompt in self.prompts], np.int32)
        starts = range(0, len(self.prompts), self.batch)
        return [(jnp.asarray(padded[i : i + self.batch]), jnp.asarray(lengths[i : i + self.batch])) for i in starts]


@dataclasses.dataclass
class Subject:
    """A target and its draft model, as pure functions and weights; what was made and measured of them is kept."""

    name: str
    step: Any
    params: Any
    draft_step: Any
    draft_params: Any
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def method(self, method: str, setting: Setting) -> tuple[Any, Any]:
        """The drafter that the command line would make of `method`, and its params. Raises JaxinferError."""
        key = ("method", method, setting.batch, setting.width + setting.tokens)
        if key not in self.made:
            self.made[key] = self._make(method, setting)
        return self.made[key]

    def _make(self, method: str, setting: Setting) -> tuple[Any, Any]:
        name = method.rpartition("drafter=")[2].partition(":")[0]
        folder = hub.packaged_head(f"tinycode-{name}")
        loaded = None if folder is None else load_head(folder, dtype="float32")
        if loaded is None and name in DRAFTERS.entries and name != "auto" and "head" in _fields(DRAFTERS.kind(name)):
            raise InputError(f"{name}: got no packaged head; accepted: a method without one, until it is trained")
        part = {"step": self.draft_step, "head": None} if loaded is None else {"step": None, "head": loaded.head}
        drafter: Any = DRAFTERS.parse(method, target=self.step, **part)
        if isinstance(drafter, Auto):
            drafter = Chooser.measured(
                drafter.inner, self.step, self.params, batch=setting.batch, capacity=setting.width + setting.tokens,
                draft_params=self.draft_params, gain=drafter.gain, together=drafter.together, probe=drafter.probe,
            )  # fmt: skip
        if loaded is not None:
            return drafter, drafter.bind(loaded.params, self.params)
        return drafter, self.draft_params if hasattr(drafter, "step") else None


def _fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def begun(subject: Subject, method: str, setting: Setting, group: tuple[jax.Array, jax.Array], key: jax.Array) -> Any:
    """The state after the prompts of a group."""
    config, draft_params = config_of(subject, method, setting)
    tokens, lengths = group
    return _BEGIN(subject.step, subject.params, tokens, lengths, config=config, key=key, draft_params=draft_params)


class Runner:
    """Decodes every group of `setting` with `method` when it is called; `answers`: the Results of the last call."""

    def __init__(self, subject: Subject, method: str, setting: Setting):
        self.subject, self.method, self.setting = subject, method, setting
        self.groups, self.key = setting.groups(), jax.random.key(0)
        self.answers: list[decode.Result] = []

    def __call__(self) -> list[decode.Result]:
        subject = self.subject
        config, draft_params = config_of(subject, self.method, self.setting)
        self.answers = []
        for i, group in enumerate(self.groups):
            state = begun(subject, self.method, self.setting, group, jax.random.fold_in(self.key, i))
            self.answers.append(_FINISH(subject.step, subject.params, state, draft_params, config=config))
        return self.answers


def config_of(subject: Subject, method: str, setting: Setting) -> tuple[Config, Any]:
    """The Config and the drafter's params. End tokens are ignored, so that every method makes as many tokens."""
    drafter, draft_params = subject.method(method, setting)
    return Config(max_tokens=setting.tokens, temperature=setting.temperature, eos=(), drafter=drafter), draft_params


def statistics(results: Sequence[decode.Result], plain: Sequence[decode.Result]) -> dict[str, Any]:
    """Tokens a forward, forwards per 100 tokens, acceptance by depth, and how many answers equal the plain ones."""
    parts: list[Stats] = [result.stats for result in results]
    stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    emitted, forwards = int(stats.emitted.sum()), int(stats.forwards.sum())
    pairs = zip(np.concatenate([r.tokens for r in results]), np.concatenate([r.tokens for r in plain]), strict=True)
    return {
        "tokens": emitted,
        "tokens_per_forward": emitted / max(forwards, 1),
        "forwards_per_100": 100 * forwards / max(emitted, 1),
        "acceptance_by_depth": [round(float(x), 4) for x in stats.acceptance_by_depth],
        "accepted_per_forward": float(stats.accepted_by_depth.sum()) / max(forwards, 1),
        "equal": sum(bool((a == b).all()) for a, b in pairs),
    }


def costs(subject: Subject, method: str, setting: Setting, *, rounds: int) -> dict[str, float]:
    """Seconds of a forward over one token, of the method's forward over all its slots, and of its proposal.

    Measured once a method and batch size, with the first task and temperature that come: they do not depend on these.
    """
    key = ("costs", method, setting.batch)
    if key in subject.made:
        return subject.made[key]
    config, draft_params = config_of(subject, method, setting)
    state = begun(subject, method, setting, setting.groups()[0], jax.random.key(0))
    calls = {"proposal": _proposal(subject, config, draft_params, state)}
    wanted = {1, config.drafter.width + 1} - {n for n in range(1, 200) if ("slots", n, setting.batch) in subject.made}
    calls |= {f"{n}": _forward(subject, state, n) for n in wanted}
    timings = measure.interleaved(calls, rounds=rounds, warmup=1, min_seconds=0.01)
    for n in wanted:
        subject.made["slots", n, setting.batch] = timings[f"{n}"].median
    one, slots = (subject.made["slots", n, setting.batch] for n in (1, config.drafter.width + 1))
    subject.made[key] = {"one": one, "slots": slots, "proposal": timings["proposal"].median}
    return subject.made[key]


def _forward(subject: Subject, state: Any, n: int) -> Callable[[], Any]:
    def run(params, cache, seq):
        positions = seq.length[:, None] - 1 + jnp.arange(n)
        ids = jnp.broadcast_to(seq.root[:, None], positions.shape)
        output, _ = subject.step(params, ids, positions, cache, kv.new_blocks(cache, n), 0)
        return subject.step.head(params, output.hidden)

    compiled = jax.jit(run, compiler_options=OPTIONS)
    return lambda: compiled(subject.params, state.cache, state.seq)


def _proposal(subject: Subject, config: Config, draft_params: Any, state: Any) -> Callable[[], Any]:
    def propose(draft_params, params, state):
        features: Features = state.features
        warp = Warp(state.sampling, features, state.seq, state.history, ())
        step_key = keys.step_keys(state.seq.key, state.seq.length)
        return config.drafter.propose(
            draft_params, state.drafter, state.seq, state.cache, step_key, target_params=params, warp=warp
        )[0]

    compiled = jax.jit(propose, compiler_options=OPTIONS)
    return lambda: compiled(draft_params, subject.params, state)


def predicted(tokens_per_forward: float, cost: dict[str, float]) -> dict[str, float]:
    """The draft's cost as a share of a target forward, and the speed-up that the parts' times promise."""
    step = cost["slots"] + cost["proposal"]
    return {
        "draft_cost": cost["proposal"] / cost["one"],
        "score_cost": cost["slots"] / cost["one"],
        "predicted": tokens_per_forward * cost["one"] / step,
    }
