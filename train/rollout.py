"""Roll-outs in segments: the answers that a model is rewarded for, written by our own decoder as the model learns.

The data source of `jaxinfer.train.ulorl` (Du et al. 2025, arXiv:2507.19766). Each round continues every unfinished
answer, and begins new ones in the free rows, by at most a segment. What ends goes to the experience pool; what fills
its segment stays in the unfinished pool and goes on from its prefix under the next params; what reaches the longest
length allowed is over-long and has reward 0. An update takes whole groups whose rewards differ.

State: both pools, how many groups were begun, and the last rewards: small enough for JSON, saved with the run. A draw
comes from (seed, answer, length), so an answer is the same in segments as in one piece while the params stay, and a run
that is killed goes on to the same bits.

Departures: a round without a group to train on is followed by another one, at most `rounds` of them, and then by an
update of nothing; groups that end together and do not fit an update wait for the next.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import decode
from jaxinfer.decode.sampling import Features, Sampling
from jaxinfer.decode.types import Reason
from jaxinfer.errors import CheckpointError, ConfigError, InputError, JobError
from jaxinfer.train import loop, ulorl


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is asked, and how an answer is judged by a program.

    `prompts`: rows with their text, `{"prompt": ..., ...}`; `tokens`: each of them as ids; `reward(row, answer) -> 0 to
    1`, of the text without its end token; `decode`: ids -> text; `end`: tokens that end an answer. Rows 0, `every`,
    2 * `every`, ... are held out. `digest` tells one task from another.
    Raises InputError for no prompts to train on, for an empty one, or a task without an end token.
    """

    prompts: Sequence[Mapping[str, Any]]
    tokens: Sequence[np.ndarray]
    reward: Callable[[Mapping[str, Any], str], float]
    decode: Callable[[Sequence[int]], str]
    end: tuple[int, ...]
    digest: str
    every: int = 10

    def __post_init__(self):
        if len(self.prompts) < 2:
            raise InputError(f"prompts: got {len(self.prompts)}, accepts 2 or more: one to train on and one held out")
        if not self.end:
            raise InputError("the model names no end token, without which no answer ends")
        empty = next((i for i, row in enumerate(self.tokens) if not len(row)), None)
        if empty is not None:
            raise InputError(f"prompt {empty}: got no tokens, accepts one or more")

    @property
    def train(self) -> np.ndarray:
        """Numbers of the prompts that are trained on."""
        return np.asarray([i for i in range(len(self.prompts)) if i % self.every])

    @property
    def held_out(self) -> np.ndarray:
        """Numbers of the prompts that are not."""
        return np.arange(0, len(self.prompts), self.every)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(row) for row in self.tokens)

    def score(self, number: int, answer: Sequence[int]) -> float:
        """The reward of an answer to prompt `number`. JobError for what is no reward."""
        found = self.reward(self.prompts[number], self.decode(answer))
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:
            raise JobError(f"the reward of an answer to prompt {number}: got {found!r}, accepts a number from 0 to 1")
        return value


@dataclasses.dataclass(frozen=True)
class Settings:
    """`groups` prompts by `samples` answers are written at a time and trained on at most; an answer has up to
    `max_tokens` in `segments` parts. `rounds`: most segments that an update waits for (None: `segments`)."""

    groups: int = 128
    samples: int = 8
    max_tokens: int = 1024
    segments: int = 8
    rounds: int | None = None
    temperature: float = 0.85
    top_p: float = 1.0

    def __post_init__(self):
        for name, least in (("groups", 1), ("samples", 2), ("max_tokens", 1), ("segments", 1), ("rounds", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{name}: got {value!r}, accepts an integer of {least} or more")
        if self.segments > self.max_tokens:
            raise ConfigError(f"segments: got {self.segments}, accepts at most max_tokens, {self.max_tokens}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature: got {self.temperature}, accepts numbers above 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p}, accepts above 0 and up to 1")

    @property
    def segment(self) -> int:
        """Tokens of a segment."""
        return -(-self.max_tokens // self.segments)


@dataclasses.dataclass
class Answer:
    """One answer to prompt `prompt`: its `tokens` so far with the end token, where its segments end and which update's
    policy wrote each, its log-probability a token (SAIS), and its reward once it has ended. `number // samples` is its
    group."""

    number: int
    prompt: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    ends: list[int] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    behaviour: list[float] = dataclasses.field(default_factory=list)
    reward: float | None = None


class Rollouts(loop.Source):
    """Batches for `ulorl.UloRL` (its docstring says what is in them), made by the params that it is given.

    `behaviour`: also keep what SAIS compares with. Raises InputError for prompts with tokens that the model lacks,
    JobError where the model's logits are not finite or a reward is none.
    """

    def __init__(self, step: Any, task: Task, settings: Settings, *, seed: int = 0, behaviour: bool = False):
        most = max(int(row.max()) for row in task.tokens)
        if most >= step.vocab_size:
            raise InputError(f"prompts: got token {most}, but the model's vocabulary has {step.vocab_size} tokens")
        self.step, self.task, self.settings, self.seed, self.behaviour = step, task, settings, seed, behaviour
        self.unfinished: list[Answer] = []
        self.experience: list[Answer] = []
        self.begun = 0
        self.reward = 0.0

    @property
    def identity(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one before it."""
        return {**dataclasses.asdict(self.settings), "task": self.task.digest, "seed": self.seed}

    def state(self) -> dict[str, Any]:
        """The pools and counters."""
        pools = {name: [dataclasses.asdict(a) for a in getattr(self, name)] for name in ("unfinished", "experience")}
        return {**pools, "begun": self.begun, "reward": self.reward}

    def restore(self, state: Any) -> None:
        """Goes on from a `state()`; CheckpointError where it is none."""
        try:
            self.unfinished, self.experience = (
                [Answer(**fields) for fields in state[name]] for name in ("unfinished", "experience")
            )
            self.begun, self.reward = int(state["begun"]), float(state["reward"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the saved roll-outs are damaged: {error!r}") from error

    def next(self, params: Any, step: int) -> dict[str, np.ndarray]:
        """Rolls segments until there is a group to train on; the batch of the groups that end first."""
        groups: list[list[Answer]] = []
        rounds = self.settings.rounds or self.settings.segments
        while not groups and rounds:
            self._admit()
            self._roll(params, step)
            groups, rounds = self._groups(), rounds - 1
        chosen = groups[: self.settings.groups]
        taken = {answer.number for group in chosen for answer in group}
        self.experience = [answer for answer in self.experience if answer.number not in taken]
        return self._batch(chosen, step)

    def _admit(self) -> None:
        """New groups as far as rows are free: each prompt once in each pass, in an order that is new each time."""
        rows, samples, numbers = self.settings.groups * self.settings.samples, self.settings.samples, self.task.train
        while len(self.unfinished) + samples <= rows:
            epoch, place = divmod(self.begun, len(numbers))
            prompt = int(np.random.default_rng((self.seed, epoch)).permutation(numbers)[place])
            self.unfinished += [Answer(self.begun * samples + i, prompt) for i in range(samples)]
            self.begun += 1

    def _roll(self, params: Any, version: int) -> None:
        """One segment more of every unfinished answer."""
        running, s = self.unfinished, self.settings
        answers, reasons = segment(self.step, params, self.task, running, s, seed=self.seed)
        scored = []
        for answer, new, reason in zip(running, answers, reasons, strict=True):
            answer.tokens += new
            answer.ends.append(len(answer.tokens))
            answer.versions.append(version)
            if reason == Reason.EOS:
                answer.reward = self.task.score(answer.prompt, answer.tokens[:-1])
            elif len(answer.tokens) >= s.max_tokens:
                answer.reward = 0.0
            scored += [] if answer.reward is None else [answer.reward]
        if self.behaviour:
            self._remember(params, running)
        self.unfinished = [answer for answer in running if answer.reward is None]
        self.experience += [answer for answer in running if answer.reward is not None]
        self.reward = float(np.mean(scored)) if scored else self.reward

    def _remember(self, params: Any, answers: Sequence[Answer]) -> None:
        """The log-probability of each new token for the params that wrote it."""
        rows = self.settings.groups * self.settings.samples
        batch = self._rows(answers, rows)
        keep = ("ids", "targets", "positions", "segments")
        logp = np.asarray(
            _logp(self.step, params, {name: batch[name] for name in keep}, self.settings.temperature), np.float32
        )
        for row, answer in zip(logp, answers, strict=False):  # rows beyond the answers are empty
            first = len(self.task.tokens[answer.prompt]) - 1
            known = len(answer.behaviour)
            answer.behaviour += row[first + known : first + len(answer.tokens)].tolist()

    def _groups(self) -> list[list[Answer]]:
        """Whole groups that are worth training on, the oldest first; whole ones that are not are dropped."""
        found: dict[int, list[Answer]] = {}
        for answer in sorted(self.experience, key=lambda a: a.number):
            found.setdefault(answer.number // self.settings.samples, []).append(answer)
        whole = {number: group for number, group in found.items() if len(group) == self.settings.samples}
        dull = {number for number, group in whole.items() if not ulorl.worth_training(_rewards([group]))[0]}
        self.experience = [a for a in self.experience if a.number // self.settings.samples not in dull]
        return [group for number, group in sorted(whole.items()) if number not in dull]

    def _batch(self, groups: Sequence[Sequence[Answer]], step: int) -> dict[str, np.ndarray]:
        rows = self.settings.groups * self.settings.samples
        answers = [answer for group in groups for answer in group]
        batch = self._rows(answers, rows)
        advantage, correct = np.zeros(rows, np.float32), np.zeros(rows, bool)
        if groups:
            rewards = _rewards(groups)
            advantage[: len(answers)] = np.ravel(ulorl.group_advantages(rewards))
            correct[: len(answers)] = np.ravel(rewards == 1)
        told = {
            "reward": self.reward,
            "answer_tokens": float(np.mean([len(a.tokens) for a in answers])) if answers else 0.0,
            "unfinished": float(len(self.unfinished)),
            "staleness": float(np.mean([step - a.versions[0] for a in answers])) if answers else 0.0,
        }
        return {
            **batch, "advantage": advantage, "correct": correct,
            **{name: np.full(rows, value, np.float32) for name, value in told.items()},
        }  # fmt: skip

    def _rows(self, answers: Sequence[Answer], rows: int) -> dict[str, np.ndarray]:
        """The answers after their prompts, [rows, T], T a number of segments beyond the longest prompt."""
        most = max((len(a.tokens) for a in answers), default=1)
        length = self.task.longest - 1 + -(-most // self.settings.segment) * self.settings.segment
        batch: dict[str, Any] = {n: np.zeros((rows, length), np.int32) for n in ("ids", "targets", "segments")}
        batch["positions"] = np.full((rows, length), -1, np.int32)
        batch["counted"] = np.zeros((rows, length), bool)
        batch["behaviour"] = np.zeros((rows, length), np.float32)
        for row, answer in enumerate(answers):
            prompt = self.task.tokens[answer.prompt]
            whole = np.concatenate([prompt, answer.tokens]).astype(np.int32)
            n, first = len(whole) - 1, len(prompt) - 1
            batch["ids"][row, :n], batch["targets"][row, :n] = whole[:-1], whole[1:]
            batch["positions"][row, :n] = np.arange(n)
            batch["counted"][row, first:n] = True
            batch["behaviour"][row, first : first + len(answer.behaviour)] = answer.behaviour
        return batch


def _rewards(groups: Sequence[Sequence[Answer]]) -> jax.Array:
    """f32[groups, G]."""
    return jnp.asarray([[answer.reward for answer in group] for group in groups], jnp.float32)


def segment(
    step: Any, params: Any, task: Task, answers: Sequence[Answer], settings: Settings, *, seed: int
) -> tuple[list[list[int]], list[Reason]]:
    """What `answers` go on with, up to a segment each, and why they stopped. Programs are compiled for as many rows as
    the settings have, and for prefixes of whole segments."""
    rows, size = settings.groups * settings.samples, settings.segment
    most = max(len(a.tokens) for a in answers)
    tokens = np.zeros((rows, task.longest + -(-most // size) * size), np.int32)
    lengths, limits, numbers = np.ones(rows, np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for row, answer in enumerate(answers):
        prefix = np.concatenate([task.tokens[answer.prompt], answer.tokens])
        tokens[row, : len(prefix)], lengths[row] = prefix, len(prefix)
        limits[row] = min(size, settings.max_tokens - len(answer.tokens))
        numbers[row] = answer.number
    sampling = Sampling.make(rows, temperature=settings.temperature, top_p=settings.top_p, eos=task.end)
    sampling = dataclasses.replace(sampling, max_tokens=jnp.asarray(limits))
    config = decode.Config(max_tokens=size, features=Features(sample=True, top_p=settings.top_p < 1))
    found = _generate(step, params, tokens, lengths, config, sampling, jax.random.key(seed), numbers)
    made, counts, reasons = jax.device_get((found.tokens, found.lengths, found.finish_reason))
    if (reasons[: len(answers)] == Reason.ERROR).any():
        raise JobError("the model's logits are not finite: no answers can be drawn from them")
    count = len(answers)
    return [made[i, : counts[i]].tolist() for i in range(count)], [Reason(int(r)) for r in reasons[:count]]


def accuracy(step: Any, params: Any, task: Task, settings: Settings, *, count: int = 64, seed: int = 0) -> float:
    """The mean reward of one answer, in one piece, to each of `count` held-out prompts (all where there are fewer)."""
    chosen = task.held_out[:: max(1, len(task.held_out) // count)][:count]
    whole = dataclasses.replace(settings, segments=1, rounds=None)
    rows, total = settings.groups * settings.samples, 0.0
    for at in range(0, len(chosen), rows):
        answers = [Answer(at + i, int(prompt)) for i, prompt in enumerate(chosen[at : at + rows])]
        made, reasons = segment(step, params, task, answers, whole, seed=seed)
        for answer, tokens, reason in zip(answers, made, reasons, strict=True):
            total += task.score(answer.prompt, tokens[:-1]) if reason == Reason.EOS else 0.0
    return total / len(chosen)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(step, params, tokens, lengths, config, sampling, key, row_ids):
    return decode.generate(step, params, tokens, lengths, config=config, key=key, sampling=sampling, row_ids=row_ids)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _logp(step, params, batch, temperature):
    return ulorl.token_law(step, params, batch, temperature)[0]
