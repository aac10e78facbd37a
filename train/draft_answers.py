"""What a target writes, as training text for its draft: sequence-level distillation data made with our own decoder.

FastDraft (arXiv:2411.11055) fine-tunes drafts on answers that the target gave at temperatures 0.6, 0.8 and 1.0, and
greedily. Prompts here are stretches of the training text, since a target that only continues text has no questions.

Parts of `batch` answers each are functions of (settings, seed, part) and are written whole or not at all, so that a run
that is killed here goes on with the part that it was at, and comes to the same answers.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import decode
from jaxinfer.decode.config import end_tokens
from jaxinfer.decode.sampling import Features, Sampling
from jaxinfer.errors import ConfigError, InputError


@dataclasses.dataclass(frozen=True)
class Asking:
    """How many answers of which length: prompts of up to `prompt_tokens`, answers of up to `answer_tokens` at the
    `temperatures` in turn; `batch` rows are decoded at a time."""

    count: int = 512
    prompt_tokens: int = 96
    answer_tokens: int = 160
    temperatures: tuple[float, ...] = (0.0, 0.6, 0.8, 1.0)
    batch: int = 32

    def __post_init__(self):
        for name in ("count", "prompt_tokens", "answer_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts 1 or more")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ConfigError(f"temperatures: got {self.temperatures}, accepts numbers of 0 (greedy) or more")

    @property
    def parts(self) -> int:
        """Files of answers; the last one is as full as the others."""
        return -(-self.count // self.batch)


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """`tokens i32[N, L]` (prompt, answer, padding), `prompt_length` and `length i32[N]`.

    Called with a step, the batch of that update: every row once in each pass, in an order that is new each time.
    `prompt_weight`: how much a prompt's own tokens count; those after the answer never do.
    """

    tokens: np.ndarray
    prompt_length: np.ndarray
    length: np.ndarray
    rows: int
    seed: int
    prompt_weight: float = 0.0

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """ids, targets, segments, positions i32[rows, L-1] and weights f32[rows, L-1]."""
        count = len(self.tokens)
        chosen = []
        for index in range(step * self.rows, (step + 1) * self.rows):
            epoch, place = divmod(index, count)
            chosen.append(np.random.default_rng((self.seed, epoch)).permutation(count)[place])
        tokens, prompt, length = self.tokens[chosen], self.prompt_length[chosen], self.length[chosen]
        at = np.broadcast_to(np.arange(1, tokens.shape[1], dtype=np.int32), (self.rows, tokens.shape[1] - 1))
        weights = np.where(at < prompt[:, None], np.float32(self.prompt_weight), np.float32(1))
        return {
            "ids": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": np.zeros_like(at),
            "positions": np.ascontiguousarray(at - 1),
            "weights": np.where(at < length[:, None], weights, np.float32(0)),
        }

    def digest(self) -> str:
        """A short hash of all answers."""
        h = hashlib.sha256()
        for array in (self.tokens, self.prompt_length, self.length):
            h.update(np.ascontiguousarray(array, np.int32).tobytes())
        return h.hexdigest()[:16]


def ask(
    step: Any,
    params: Any,
    documents: Sequence[np.ndarray],
    folder: str | Path,
    asking: Asking,
    *,
    seed: int,
    identity: str,
    end: int = 0,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """The target's answers to stretches of `documents`, made now or read from `folder` as far as they are there.

    `identity` names the target and the text: answers of another are not read. `told(done, total)` after each part.
    """
    name = hashlib.sha256(repr((asking, seed, identity)).encode()).hexdigest()[:16]
    folder = Path(folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    documents = [document for document in documents if len(document) >= 2]
    if not documents:
        raise InputError("the training text has no document of two tokens or more to take prompts from")
    parts = []
    for part in range(asking.parts):
        file = folder / f"part-{part:05d}.npz"
        found = _read(file)
        if found is None:
            prompts, lengths = _prompts(documents, asking, seed=seed, part=part, end=end)
            found = _answer(step, params, prompts, lengths, asking, seed=seed, part=part, end=end)
            _write(file, found)
        parts.append(found)
        told(part + 1, asking.parts)
    merged = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return Answers(merged["tokens"], merged["prompt_length"], merged["length"], rows=1, seed=seed)


def _prompts(
    documents: Sequence[np.ndarray], asking: Asking, *, seed: int, part: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens i32[batch, P] padded with `end`, lengths): stretches that begin anywhere; long documents give more."""
    rng = np.random.default_rng((seed, 7, part))
    sizes = np.asarray([len(document) for document in documents], np.float64)
    tokens = np.full((asking.batch, asking.prompt_tokens), end, np.int32)
    lengths = np.zeros(asking.batch, np.int32)
    for row, which in enumerate(rng.choice(len(documents), asking.batch, p=sizes / sizes.sum())):
        document = documents[which]
        length = min(asking.prompt_tokens, len(document) - 1)
        start = int(rng.integers(len(document) - length))
        tokens[row, :length], lengths[row] = document[start : start + length], length
    return tokens, lengths


def _answer(
    step: Any, params: Any, prompts: np.ndarray, lengths: np.ndarray, asking: Asking, *, seed: int, part: int, end: int
) -> dict[str, np.ndarray]:
    turn = part * asking.batch + np.arange(asking.batch)
    warm = np.asarray(asking.temperatures, np.float32)[turn % len(asking.temperatures)]
    sampling = Sampling.make(asking.batch, temperature=warm, max_tokens=asking.answer_tokens, eos=end_tokens(step))
    features = Features(sample=max(asking.temperatures) > 0)
    config = decode.Config(max_tokens=asking.answer_tokens, features=features)
    result = _generate(
        step,
        params,
        jnp.asarray(prompts),
        jnp.asarray(lengths),
        config,
        sampling,
        jax.random.key(seed),
        jnp.asarray(turn),
    )
    answers, answered = np.asarray(result.tokens), np.asarray(result.lengths)
    rows = np.full((asking.batch, asking.prompt_tokens + asking.answer_tokens), end, np.int32)
    for row, prompt, size, answer, more in zip(rows, prompts, lengths, answers, answered, strict=True):
        row[:size], row[size : size + more] = prompt[:size], answer[:more]
    return {"tokens": rows, "prompt_length": lengths, "length": lengths + answered}


@functools.partial(jax.jit, static_argnums=(0, 4))
def _generate(step, params, prompts, lengths, config, sampling, key, row_ids):
    return decode.generate(step, params, prompts, lengths, config=config, key=key, sampling=sampling, row_ids=row_ids)


def _read(file: Path) -> dict[str, np.ndarray] | None:
    """A part; None where it is missing or damaged, since it can be made again."""
    try:
        with file.open("rb") as opened, np.load(opened) as found:
            return {key: found[key] for key in ("tokens", "prompt_length", "length")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(file: Path, part: dict[str, np.ndarray]) -> None:
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        np.savez(out, tokens=part["tokens"], prompt_length=part["prompt_length"], length=part["length"])
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, file)
