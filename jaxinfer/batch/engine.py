"""The engine of slots over `jaxinfer.decode`: a fixed number of rows in one compiled step, refilled as they end.

Every shape is a constant of the job (`Settings`, kept in its manifest): rows, capacity, steps between looks, rows and
widths of a prefill. So there is one executable for decoding and one for each prefill width, a prompt's width follows
from its length alone, and a row's bits do not depend on its slot, its neighbours or when it came in.

Stability: experimental.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.batch.manifest import Survey
from jaxinfer.batch.params import CONSTRAINTS
from jaxinfer.batch.requests import Limits
from jaxinfer.batch.runner import Admission, Event, Look
from jaxinfer.decode import loop
from jaxinfer.decode.aggressive import Source
from jaxinfer.decode.compiler import Program
from jaxinfer.decode.config import Config
from jaxinfer.decode.constrained import Constrained
from jaxinfer.decode.sampling import Features, Sampling
from jaxinfer.decode.types import Reason, Step
from jaxinfer.errors import ConfigError

PENALTIES = {"repetition_penalty", "presence_penalty", "frequency_penalty"}


@dataclass(frozen=True)
class Settings:
    """The constants of a job's executables, as JSON values.

    `capacity`: tokens of prompt and answer that a slot holds; `max_tokens`: of the answer; `steps` between two looks
    of the host; `prefill_rows` at a time, in the smallest of `prefill_widths` that holds the prompt; the rest is the
    room for per-row lists (`top_logprobs` None: no log-probabilities) and what the executable computes (`features`).
    `grammars`: some row has one, so that all steps are run in pieces, with the host's masks in between. `source`:
    tokens of the text that an answer edits. `curves`: what a forward cost when the job began, where its drafter chooses
    by that.
    """

    slots: int
    capacity: int
    max_tokens: int
    steps: int = 8
    prefill_rows: int = 1
    prefill_widths: tuple[int, ...] = ()
    prefill_chunk: int = 256
    bias: int = 0
    forced: int = 0
    stop_ids: int = 1
    top_logprobs: int | None = None
    features: tuple[str, ...] = ()
    grammars: bool = False
    source: int = 0
    curves: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("prefill_widths", "features"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("slots", "capacity", "max_tokens", "steps", "prefill_rows", "prefill_chunk", "stop_ids"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}; accepted: 1 or more")
        if not self.prefill_widths or self.prefill_widths[-1] != self.capacity:
            widths = (1 + 16 * 4**power for power in range(12))
            fit = [width for width in widths if width < self.capacity and width <= self.prefill_chunk + 1]
            object.__setattr__(self, "prefill_widths", (*fit, self.capacity))

    @classmethod
    def of(
        cls,
        survey: Survey,
        *,
        slots: int,
        max_length: int,
        eos_ids: int,
        steps: int = 8,
        prefill_rows: int | None = None,
    ) -> "Settings":
        """What the surveyed rows need, with no more slots than there are sequences. `max_length`: the most that model
        and memory allow a row; `eos_ids`: how many end tokens the model has; `prefill_rows` None: 1 on a CPU, where one
        prompt keeps the machine busy, else 4."""
        slots = max(1, min(slots, survey.sequences))
        length = -(-survey.length // 64) * 64 if survey.length else max_length
        capacity = min(max_length, length)
        used = survey.used
        features = {
            "sample": "temperature" in used,
            "top_k": "top_k" in used,
            "top_p": "top_p" in used,
            "min_p": "min_p" in used,
            "penalties": bool(used & PENALTIES),
            "bias": bool(used & {"logit_bias", "banned_tokens", "bad_words"}),
            "min_tokens": "min_tokens" in used,
            "forced": "forced_tokens" in used,
        }
        return cls(
            slots=slots,
            capacity=capacity,
            max_tokens=max(1, min(survey.max_tokens, capacity)),
            steps=steps,
            prefill_rows=prefill_rows or (1 if jax.default_backend() == "cpu" else min(4, slots)),
            bias=survey.bias,
            forced=survey.forced,
            stop_ids=max(1, survey.stop_ids + eos_ids),
            top_logprobs=survey.top_logprobs if "logprobs" in used else None,
            features=tuple(name for name, on in features.items() if on),
            grammars=bool(used & set(CONSTRAINTS)),
            source=-(-survey.source // 64) * 64 or (max_length if "source" in used else 0),  # 0: nothing counted them
        )

    def to_json(self) -> dict[str, Any]:
        """For the job's manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """From the job's manifest."""
        return cls(**values)

    @property
    def limits(self) -> Limits:
        """What a row may ask for."""
        lists = self.bias, self.forced, self.stop_ids, self.top_logprobs or 0
        return Limits(self.capacity, *lists, self.grammars, self.source)

    def width(self, tokens: int) -> int:
        """The prefill width of a prompt of so many tokens."""
        return next(width for width in self.prefill_widths if tokens <= width)


class DecodeEngine:
    """Runs `step` (any model that meets the decode loop's `Step`) with `params` in slots.

    `config`: the drafter, verifier and processors to decode with; everything about rows comes from the rows and the
    `settings`. `notice` is told in words what is about to be compiled. `admit` and `advance` raise what jax raises.
    """

    def __init__(
        self,
        step: Step,
        params: Any,
        settings: Settings,
        *,
        config: Config | None = None,
        draft_params: Any = None,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.slots = settings.slots
        self._step, self._params, self._draft_params = step, params, draft_params
        self._config = dataclasses.replace(
            config or Config(),
            max_tokens=settings.max_tokens,
            logprobs=settings.top_logprobs,
            features=Features(**dict.fromkeys(settings.features, True)),
            prefill_chunk=settings.prefill_chunk,
            n=1,
        )
        self._notice = notice
        self._noticed: set[str] = set()
        self._filled: set[int] = set()
        self._ended = np.zeros(self.slots, bool)
        self._state: Any = None
        # Without jumps every step has the same shapes, whatever the rows beside it, and so a row's bits are its own.
        self._constrained = Constrained(
            step, params, [None] * self.slots, config=self._config, draft_params=draft_params, jump=False
        )

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Prefills the rows, `prefill_rows` of one width at a time, and puts them into their slots."""
        if self._state is None:
            self.reset()
        groups: dict[int, list[Admission]] = {}
        for admission in admissions:
            groups.setdefault(self.settings.width(len(admission.row.tokens)), []).append(admission)
        rows = self.settings.prefill_rows
        for width, group in groups.items():
            for at in range(0, len(group), rows):
                self._admit(width, group[at : at + rows])

    def advance(self) -> Look:
        """`steps` steps for all slots, and what they brought."""
        s = self.settings
        self._say(f"decoding: {s.slots} rows of {s.capacity} tokens, {s.steps} steps at a time")
        if s.grammars:
            seen = self._advance_constrained()
        else:
            self._state, seen = _advance(
                self._params, self._draft_params, self._state, self._ended,
                step=self._step, config=self._config, steps=s.steps,
            )  # fmt: skip
        self._ended = np.zeros(self.slots, bool)
        seen = _fetch(seen)
        events = [self._event(slot, seen) for slot in sorted(self._filled)]
        self._filled -= {event.slot for event in events if event.finished is not None}
        return Look(events, int(seen.steps))

    def release(self, slot: int) -> None:
        """Ends the slot's row at the next step."""
        if slot in self._filled:
            self._filled.remove(slot)
            self._ended[slot] = True

    def reset(self) -> None:
        """An empty state."""
        self._filled.clear()
        self._ended = np.zeros(self.slots, bool)
        self._constrained.matchers = [None] * self.slots
        self._state = None  # frees the old one's memory first
        sampling, keys = _rows([], self.settings)
        tokens, lengths = np.zeros((self.slots, 1), np.int32), np.ones(self.slots, np.int32)
        sampling = jax.tree.map(lambda leaf: np.repeat(leaf[:1], self.slots, 0), sampling)
        keys = np.repeat(keys[:1], self.slots, 0)
        self._state = _start(
            self._params, self._drafts_of([], self.slots), tokens, lengths, sampling, keys,
            step=self._step, config=self._config, capacity=self.settings.capacity,
        )  # fmt: skip

    def _admit(self, width: int, group: Sequence[Admission]) -> None:
        s = self.settings
        self._say(f"prefill: {s.prefill_rows} x {width} tokens into {s.slots} rows of {s.capacity}")
        tokens = np.zeros((s.prefill_rows, width), np.int32)
        lengths = np.ones(s.prefill_rows, np.int32)
        slots = np.full(s.prefill_rows, s.slots, np.int32)  # out of range: such rows are dropped
        for index, admission in enumerate(group):
            prompt = admission.row.tokens
            tokens[index, : len(prompt)] = prompt
            lengths[index] = len(prompt)
            slots[index] = admission.slot
        sampling, keys = _rows(group, s)
        self._state = _place(
            self._params, self._drafts_of(group, s.prefill_rows), self._state, slots, tokens, lengths, sampling, keys,
            step=self._step, config=self._config, capacity=s.capacity,
        )  # fmt: skip
        for admission in group:
            matcher = admission.row.matcher
            self._constrained.matchers[admission.slot] = None if matcher is None else matcher.fork()
            self._filled.add(admission.slot)
            self._ended[admission.slot] = False

    def _drafts_of(self, group: Sequence[Admission], rows: int) -> Any:
        """The drafter's params for a prefill of so many rows: what the group edits, where the drafter takes that."""
        if not (self.settings.source and getattr(self._config.drafter, "takes_source", False)):
            return self._draft_params
        sources = [admission.row.source for admission in group]
        return Source.of([*sources, *[()] * (rows - len(sources))], self.settings.source)

    def _advance_constrained(self) -> "_Seen":
        state = _finish(self._state, self._ended)
        before, forwards = np.array(state.seq.length), np.array(state.stats.forwards)  # copies: the state is given up
        self._state = self._constrained.advance(state, self.settings.steps)
        return _look(self._state, before, forwards, config=self._config, steps=self.settings.steps)

    def _event(self, slot: int, seen: "_Seen") -> Event:
        n = int(seen.n[slot])
        reason = Reason(int(seen.reason[slot]))
        tokens = seen.tokens[slot, :n].tolist()
        if reason == Reason.ERROR:
            return Event(slot, tokens, finished="error", error="the model's logits are not finite")
        logprobs = top = None
        if seen.chosen is not None and seen.top_ids is not None and seen.top is not None:
            logprobs = seen.chosen[slot, :n].tolist()
            pairs = zip(seen.top_ids[slot, :n].tolist(), seen.top[slot, :n].tolist(), strict=True)
            top = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
        return Event(slot, tokens, logprobs, top, None if reason == Reason.RUNNING else reason.word)

    def _say(self, text: str) -> None:
        if text not in self._noticed:
            self._noticed.add(text)
            self._notice(f"compiling {text}")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "n", "reason", "steps", "chosen", "top_ids", "top"],
    meta_fields=[],
)
@dataclass(frozen=True)
class _Seen:
    """What the host looks at: `tokens i32[B, K]` of which `n i32[B]` are new, `reason i32[B]`, log-probabilities."""

    tokens: Any
    n: Any
    reason: Any
    steps: Any
    chosen: Any
    top_ids: Any
    top: Any


def _fetch(tree: Any) -> Any:
    """On the host. What is spread over several processes is gathered first, which all of them ask for together."""

    def one(leaf: Any) -> Any:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(one, tree))


def _rows(group: Sequence[Admission], s: Settings) -> tuple[Sampling, np.ndarray]:
    """The rows' sampling parameters and keys `u32[P, 2]`; rows that are missing answer nothing."""
    rows = s.prefill_rows
    arrays: dict[str, Any] = {name: np.zeros(rows, np.float32) for name in ("temperature", "min_p", *sorted(PENALTIES))}
    arrays |= {name: np.zeros(rows, np.int32) for name in ("top_k", "min_tokens", "max_tokens")}
    arrays |= {"top_p": np.ones(rows, np.float32), "repetition_penalty": np.ones(rows, np.float32)}
    scalars = arrays.keys() - {"max_tokens"}
    arrays["bias_values"] = np.zeros((rows, s.bias), np.float32)
    for name, size in (("bias_ids", s.bias), ("forced", s.forced), ("eos", s.stop_ids)):
        arrays[name] = np.full((rows, size), -1, np.int32)
    keys = np.zeros((rows, 2), np.uint32)
    for index, admission in enumerate(group):
        row = admission.row
        for name in scalars:
            arrays[name][index] = getattr(row.request.params, name)
        arrays["max_tokens"][index] = row.limit
        arrays["bias_ids"][index, : len(row.bias)] = [token for token, _ in row.bias]
        arrays["bias_values"][index, : len(row.bias)] = [value for _, value in row.bias]
        arrays["forced"][index, : len(row.forced)] = row.forced
        arrays["eos"][index, : len(row.stop_ids)] = row.stop_ids
        keys[index] = admission.key
    return Sampling(**arrays), keys


def _begin(params, draft_params, tokens, lengths, sampling, keys, step, config, capacity):
    keys = jax.random.wrap_key_data(keys, impl="threefry2x32")
    return loop.start(
        step, params, tokens, lengths, sampling, keys,
        config=config, capacity=capacity, draft_params=draft_params, features=config.features,
    )  # fmt: skip


@partial(Program, static_argnames=("step", "config", "capacity"))
def _start(params, draft_params, tokens, lengths, sampling, keys, *, step, config, capacity):
    return _begin(params, draft_params, tokens, lengths, sampling, keys, step, config, capacity)


@partial(Program, static_argnames=("step", "config", "capacity"), donate_argnames=("state",))
def _place(params, draft_params, state, slots, tokens, lengths, sampling, keys, *, step, config, capacity):
    new = _begin(params, draft_params, tokens, lengths, sampling, keys, step, config, capacity)
    return loop.place(state, slots, new)


@partial(Program, static_argnames=("step", "config", "steps"), donate_argnames=("state",))
def _advance(params, draft_params, state, ended, *, step, config, steps):
    state = loop.finish(state, ended)
    before, forwards = state.seq.length, state.stats.forwards
    state = loop.advance(step, params, state, config=config, steps=steps, draft_params=draft_params)
    return state, _seen(state, before, forwards, config, steps)


def _seen(state: loop.State, before: jax.Array, forwards: jax.Array, config: Config, steps: int) -> _Seen:
    """What came since the lengths were `before` and the counts `forwards`."""
    seq = state.seq
    index = jnp.arange(steps * (config.drafter.depth + 1), dtype=jnp.int32)[None]
    tokens = jnp.take_along_axis(seq.tokens, before[:, None] + index, 1, mode="clip")
    chosen = top_ids = top = None
    if state.logprobs is not None:
        at = (before - seq.prompt_length)[:, None] + index
        chosen = jnp.take_along_axis(state.logprobs.chosen, at, 1, mode="clip")
        top_ids, top = (
            jnp.take_along_axis(x, at[..., None], 1, mode="clip") for x in (state.logprobs.top_ids, state.logprobs.top)
        )
    made = (state.stats.forwards - forwards).max()
    return _Seen(tokens, seq.length - before, seq.reason, made, chosen, top_ids, top)


_finish = Program(loop.finish, donate_argnames=("state",))
_look = Program(_seen, static_argnames=("config", "steps"))
