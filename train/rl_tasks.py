"""Tasks for reinforcement whose answers a program can verify: toys that a tiny model learns in a minute, and one's own.

A toy asks for a short piece of work on digits: `copy` (`314=314`), `sort` (`314=134`) or `count` (`3=123`). Its prompts
are all there are, in a fixed shuffled order; a character is a token. `toy_model` is a model small enough for a CPU, and
`demonstrations` bring it to where some of its answers are right: reinforcement has nothing to go by before that.

`from_file` makes a task of prompts in JSON Lines and a Python function that judges answers.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.step import Step
from jaxinfer.train import data, text
from jaxinfer.train.rollout import Task

CHARACTERS = "0123456789="
ANSWERS: Mapping[str, Callable[[str], str]] = {
    "copy": lambda digits: digits,
    "sort": lambda digits: "".join(sorted(digits)),
    "count": lambda digits: "".join(map(str, range(1, int(digits) + 1))),
}


@dataclasses.dataclass(frozen=True)
class Toy:
    """One of ANSWERS over `digits` digits; `count` has one digit, from 1 on. ConfigError for another name or size."""

    name: str
    digits: int = 3

    def __post_init__(self):
        if self.name not in ANSWERS:
            raise ConfigError(f"task: got {self.name!r}, accepts {', '.join(ANSWERS)}")
        if type(self.digits) is not int or not 1 <= self.digits <= 4:
            raise ConfigError(f"digits: got {self.digits!r}, accepts 1 to 4")

    @property
    def prompts(self) -> list[dict[str, str]]:
        """Every prompt there is, shuffled, each with its answer."""
        if self.name == "count":
            inputs = [str(n) for n in range(1, 10)]
        else:
            inputs = ["".join(x) for x in itertools.product(CHARACTERS[:10], repeat=self.digits)]
        order = np.random.default_rng(0).permutation(len(inputs))
        return [{"prompt": inputs[i] + "=", "answer": ANSWERS[self.name](inputs[i])} for i in order]

    def task(self) -> Task:
        """The task, its reward 1 for the right answer and 0 for any other."""
        prompts = self.prompts
        tokens = [np.asarray([token_of(c) for c in row["prompt"]], np.int32) for row in prompts]
        digest = f"{self.name} {self.digits}"
        every = 10 if len(prompts) > 20 else 3
        return Task(prompts, tokens, equals_answer, text_of, (0,), digest, every)


def equals_answer(row: Mapping[str, Any], answer: str) -> float:
    """The reward of a row with its `answer`: 1 where it is given exactly, but for white space around it."""
    return float(answer.strip() == str(row["answer"]).strip())


def token_of(character: str) -> int:
    """The id of a character; 0 ends an answer."""
    return 1 + CHARACTERS.index(character)


def text_of(tokens: Sequence[int]) -> str:
    """The text of ids; the end token has none."""
    return "".join(CHARACTERS[t - 1] for t in tokens if t)


def toy_model(*, hidden_size: int = 64, num_layers: int = 2) -> Step:
    """A decoder over CHARACTERS and the end token."""
    return Step(
        ModelConfig(
            vocab_size=1 + len(CHARACTERS), hidden_size=hidden_size, num_layers=num_layers, num_heads=hidden_size // 16,
            num_kv_heads=hidden_size // 16, head_dim=16, mlp_size=2 * hidden_size, max_length=64, bos=0, eos=(0,),
            tie_embeddings=True,
        )
    )  # fmt: skip


def save_tokenizer(folder: str | Path) -> None:
    """The toys' tokenizer, so that `jaxinfer.load` and `transformers` can read what was trained."""
    vocabulary = {data.END_OF_TEXT: 0, **{c: token_of(c) for c in CHARACTERS}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=data.END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([data.END_OF_TEXT])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": data.END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


@dataclasses.dataclass(frozen=True, eq=False)
class Demonstrations:
    """Right answers to the prompts that are trained on, as batches of `draft_loss.Distill`: a function of the step.
    Only the answers count."""

    task: Task
    rows: int = 64
    seed: int = 0

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """ids, targets, segments, positions i32[rows, T] and weights f32[rows, T]."""
        longest = max(len(row["prompt"]) + len(row["answer"]) for row in self.task.prompts)
        batch = {name: np.zeros((self.rows, longest), np.int32) for name in ("ids", "targets", "segments")}
        batch["positions"] = np.full((self.rows, longest), -1, np.int32)
        weights = np.zeros((self.rows, longest), np.float32)
        for row, number in enumerate(np.random.default_rng((self.seed, step)).choice(self.task.train, self.rows)):
            prompt = self.task.tokens[number]
            answer = [token_of(c) for c in self.task.prompts[number]["answer"]]
            whole = np.concatenate([prompt, answer, [0]])
            n = len(whole) - 1
            batch["ids"][row, :n], batch["targets"][row, :n] = whole[:-1], whole[1:]
            batch["positions"][row, :n] = np.arange(n)
            weights[row, len(prompt) - 1 : n] = 1
        return {**batch, "weights": weights}


def from_file(path: str | Path, reward: str, tokenizer: Any, *, max_prompt: int = 512) -> Task:
    """A task of the rows of a JSON Lines file, each with its `prompt`, in a model's tokens.

    `reward`: a Python function `module:function` that takes `(row, answer)` and returns 0 to 1. Raises InputError
    naming file and line, or what the function was looked for as.
    """
    rows, tokens = [], []
    judge = function_of(reward)
    for number, row in text.rows(path, "prompt"):
        ids = np.asarray(tokenizer.encode(row["prompt"]), np.int32)
        if not 1 <= len(ids) <= max_prompt:
            raise InputError(f"{path}, line {number}: got a prompt of {len(ids)} tokens, accepts 1 to {max_prompt}")
        rows.append(row)
        tokens.append(ids)
    digest = hashlib.sha256(json.dumps([reward, rows]).encode()).hexdigest()[:16]
    return Task(rows, tokens, judge, tokenizer.decode, tuple(tokenizer.eos_ids), digest)


def function_of(name: str) -> Callable[..., Any]:
    """The function `module:function`. InputError where there is none."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InputError(f"reward: got {name!r}, accepts module:function")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise InputError(f"reward: got {name!r}, whose module cannot be imported ({error})") from None
    if not callable(found):
        raise InputError(f"reward: got {name!r}, but {module} has no function {attribute}")
    return found
