"""A draft model for a target, in three stages on the one loop: text, code, alignment with what the target writes.

FastDraft: Zafrir, Margulis, Shteyman, Guskin, Boudoukh 2024 (arXiv:2411.11055). The draft is the target's architecture
scaled down, wide rather than deep, with its tokenizer. It learns to predict general text, then code and text two to
one, then the target's own answers, sampled at several temperatures (`draft_answers.py`), with cross-entropy or a mix
with the target's logits (`draft_loss.py`). After each stage `draft_report.py` says what it is worth. Guarantee: a
different model; decoding with any draft keeps the target's output (`decode/draft_model.py`). State: the loop's, in a
folder a stage.

The paper's budget is 10B tokens of text, 5B of code with 2.5B of text, and the answers to about a million prompts;
gamma 3 and temperature 0.6 in its tables. No code was released.

Departures: Muon in place of the paper's optimiser, as for all our language models; prompts are stretches of the
training text (the paper's are instruction sets); each stage's rate rises and falls anew, so that each ends as a model.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.train import lm, loop
from jaxinfer.train.draft_answers import Asking, ask
from jaxinfer.train.draft_loss import Distill
from jaxinfer.train.draft_report import Measuring, report
from jaxinfer.train.text import Text

STAGES = ("text", "code", "align")
DENSE = {"mixtral": "mistral", "qwen3_moe": "qwen3"}  # a draft has no experts
LOSSES = {  # the paper's five: shares of (ce, kl, tv)
    "ce": (1.0, 0.0, 0.0),
    "ce+kl": (0.5, 0.5, 0.0),
    "ce+tv": (0.5, 0.0, 0.5),
    "kl": (0.0, 1.0, 0.0),
    "tv": (0.0, 0.0, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """`stages`: (name, updates) in order, any of STAGES. An update sees `batch_tokens` in windows of `length`.

    `code_share`: of the rows of the code stage (the others are text); `copies`: share of its windows in which a stretch
    stands twice. `rate` is the peak of the first two stages, `align_rate` of the last, whose `loss` is one of LOSSES on
    the target's `top_k` likeliest tokens (None: all) and whose prompts' own tokens count `prompt_weight`.
    """

    stages: tuple[tuple[str, int], ...] = (("text", 300), ("code", 400), ("align", 200))
    batch_tokens: int = 4096
    length: int = 256
    code_share: float = 2 / 3
    copies: float = 0.0
    rate: float = 5e-3
    align_rate: float = 2e-3
    loss: str = "ce"
    top_k: int | None = None
    prompt_weight: float = 0.0
    asking: Asking = Asking()
    seed: int = 0

    def __post_init__(self):
        names = [name for name, _ in self.stages]
        if not names or names != [name for name in STAGES if name in names]:
            raise ConfigError(
                f"stages: got {', '.join(names) or 'none'}, accepts some of {', '.join(STAGES)}, in order"
            )
        short = [(name, steps) for name, steps in self.stages if steps < 4]
        if short:
            raise ConfigError(f"stages: got {short[0][1]} updates of {short[0][0]}, accepts 4 or more")
        if self.loss not in LOSSES:
            raise ConfigError(f"loss: got {self.loss!r}, accepts {', '.join(LOSSES)}")
        for name in ("code_share", "copies", "prompt_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts 0 to 1")
        for name in ("rate", "align_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts a number above 0")
        if self.length < 8 or self.batch_tokens % self.length:
            raise ConfigError(f"batch_tokens: got {self.batch_tokens}, accepts a multiple of length, {self.length}")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as values: `step` and `params`."""

    step: Any
    params: Any


def draft_config(target: ModelConfig, *, layers: int, width: int) -> ModelConfig:
    """The target's architecture with `layers` layers of `width` channels: heads of the target's size, as many fewer as
    the width, its grouping of them kept; an MLP scaled alike; layers take windows and rotations spread over the
    target's. A target with experts gives a draft without."""
    if not 1 <= layers <= target.num_layers:
        raise ConfigError(f"layers: got {layers}, accepts 1 to the target's {target.num_layers}")
    if not 8 <= width <= target.hidden_size:
        raise ConfigError(f"width: got {width}, accepts 8 to the target's {target.hidden_size}")
    scale = width / target.hidden_size
    kv_heads = max(1, round(target.num_kv_heads * scale))
    mlp = target.mlp_size or target.expert_size * target.experts_per_token
    from_layers = [(i + 1) * target.num_layers // layers - 1 for i in range(layers)]
    return dataclasses.replace(
        target,
        hidden_size=width,
        num_layers=layers,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * (target.num_heads // target.num_kv_heads),
        mlp_size=max(8, round(mlp * scale / 8) * 8),
        family=DENSE.get(target.family, target.family),
        embedding_scale=None if target.embedding_scale is None else math.sqrt(width),
        windows=tuple(target.windows[i] for i in from_layers) if target.windows else (),
        ropes=tuple(target.ropes[i] for i in from_layers) if target.ropes else (),
        num_experts=0,
        experts_per_token=0,
        expert_size=0,
        dense_layers=(),
    )


def text_recipe(name: str, steps: int, draft: Any, code: Text, general: Text | None, settings: Settings) -> loop.Recipe:
    """The recipe of the stage `text` (rows of general text alone) or `code` (rows of code and of text)."""
    share, copies = (0.0, 0.0) if name == "text" else (settings.code_share, settings.copies)
    windows = lm.stages([(settings.length, 1.0, share)], steps=steps, tokens=settings.batch_tokens)
    schedule = _schedule(settings.rate, steps)
    return loop.Recipe(
        objective=lm.NextToken(draft),
        data=code.stream(windows, seed=settings.seed, copies=copies, more=general),
        optimizer=lm.muon(schedule),
        schedule=schedule,
        tokens=lambda batch: batch["ids"].size,
        identity={
            **_identity(name, draft, settings),
            "text": [code.digest, "" if general is None else general.digest],
            "share": share,
            "copies": copies,
            "rate": settings.rate,
        },
    )


def align_recipe(
    steps: int,
    draft: Any,
    target: Model,
    code: Text,
    settings: Settings,
    folder: Path,
    told: Callable[[int, int], None],
) -> loop.Recipe:
    """The recipe of the stage `align`; the target writes its answers below `folder` first, where they are not there."""
    asking = settings.asking
    answers = ask(
        target.step, target.params, code.train, folder, asking,
        seed=settings.seed, identity=code.digest + loop.fingerprint(target.params), end=code.end, told=told,
    )  # fmt: skip
    rows = max(1, settings.batch_tokens // (asking.prompt_tokens + asking.answer_tokens))
    answers = dataclasses.replace(answers, rows=rows, prompt_weight=settings.prompt_weight)
    objective = Distill(draft, target.step, *LOSSES[settings.loss], top_k=settings.top_k)
    schedule = _schedule(settings.align_rate, steps)
    return loop.Recipe(
        objective=objective,
        data=answers,
        optimizer=lm.muon(schedule),
        schedule=schedule,
        tokens=lambda batch: int((batch["weights"] > 0).sum()),
        frozen=target.params if objective.reads_target else None,
        identity={
            **_identity("align", draft, settings),
            "target": loop.fingerprint(target.params),
            "answers": answers.digest(),
            "loss": [settings.loss, settings.top_k, settings.prompt_weight],
            "rate": settings.align_rate,
        },
    )


def train_draft(
    target: Model,
    draft: Model,
    code: Text,
    settings: Settings,
    folder: str | Path,
    *,
    general: Text | None = None,
    resume: bool = True,
    measuring: Measuring | None = None,
    loop_config: Mapping[str, Any] | None = None,
    told: Callable[[str, dict[str, float]], None] = lambda stage, found: None,
    answered: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Any, dict[str, dict[str, float]]]:
    """The trained params of `draft` (whose own are used up) and what `report` found before and after each stage.

    `code`: the text that the target will be used on; `general`: the text of the first stage (default: what `code` has
    more, or all of it). Below `folder`: one folder a stage, with the loop's files and `report.json`. Given again after
    a kill, stages that are done are read and the one in progress goes on. `measuring` None leaves the reports out.
    `told(stage, figures)` after each, "start" first; `answered(done, total)` while the target writes.
    Raises the loop's errors, and `ConfigError` where the models do not share a vocabulary.
    """
    if draft.step.vocab_size != target.step.vocab_size:
        raise ConfigError(
            f"draft: got a vocabulary of {draft.step.vocab_size} tokens, accepts the target's, {target.step.vocab_size}"
        )
    folder = Path(folder)
    if not resume:
        for name in ("start", *STAGES):
            shutil.rmtree(folder / name, ignore_errors=True)
    params, reports = draft.params, {}
    after = loop.fingerprint(params)
    check = _Check(target, draft.step, code, measuring, told)
    reports["start"] = check("start", folder / "start", params, after)
    for name, steps in settings.stages:
        if name == "align":
            recipe = align_recipe(steps, draft.step, target, code, settings, folder / name / "answers", answered)
        else:
            recipe = text_recipe(name, steps, draft.step, code, general, settings)
        recipe = dataclasses.replace(recipe, identity={**recipe.identity, "after": after})
        state = loop.init_state(params, recipe, jax.random.key(settings.seed))
        config = loop.LoopConfig(**{**(loop_config or {}), "steps": steps})
        params = loop.train(recipe, state, config, folder / name, resume=resume).params
        after = hashlib.sha256(json.dumps([dict(recipe.identity), steps]).encode()).hexdigest()[:16]
        reports[name] = check(name, folder / name, params, after)
    return params, reports


@dataclasses.dataclass(frozen=True)
class _Check:
    """Reports once: what was found is kept in the stage's folder, with what it was found for."""

    target: Model
    draft: Any
    code: Text
    measuring: Measuring | None
    told: Callable[[str, dict[str, float]], None]

    def __call__(self, name: str, folder: Path, params: Any, after: str) -> dict[str, float]:
        if self.measuring is None:
            return {}
        key = [after, loop.fingerprint(self.target.params), self.code.digest, repr(self.measuring)]
        file = folder / "report.json"
        try:
            kept = json.loads(file.read_text())
            found = kept["figures"] if kept["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found is None:
            bits = self.code.bits_per_byte(self.draft, params, documents=16)
            pair = (self.target.step, self.target.params, self.draft, params)
            found = {"bits_per_byte": bits, **report(*pair, self.code.held_out, self.measuring)}
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps({"key": key, "figures": found}, indent=1) + "\n")
            os.replace(partial, file)
        self.told(name, found)
        return found


def _identity(name: str, draft: Any, settings: Settings) -> dict[str, Any]:
    shape = hashlib.sha256(repr(draft.config).encode()).hexdigest()[:16]
    return {
        "recipe": "draft",
        "stage": name,
        "draft": shape,
        "seed": settings.seed,
        "batch": [settings.batch_tokens, settings.length],
    }


def _schedule(rate: float, steps: int) -> Any:
    return lm.warmup_stable_decay(rate, steps=steps, warmup=max(1, min(50, steps // 10)), decay=0.5)


def init_params(step: Any, seed: int) -> Any:
    """Random params of a draft, as the loop trains them."""
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), lm.init_params(step, jax.random.key(seed)))
