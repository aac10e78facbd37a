"""`jaxinfer train rl`: a model rewarded by a program for its own long answers, in segments.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli import training
from jaxinfer.errors import InputError

if TYPE_CHECKING:
    from jaxinfer.train.rollout import Task

TOY_RATE, RATE = 1e-4, 1e-6

Name = Annotated[
    str | None, typer.Option("--task", help="A toy: copy, sort or count; it trains a tiny model of its own.")
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="JSON Lines with a prompt field, for one's own reward.")
]
Reward = Annotated[
    str | None,
    typer.Option("--reward", help="Python function module:function of (row, answer) that returns 0 to 1."),
]
Model = Annotated[
    str | None, typer.Option("--target", help="The model to train, with --reward: a directory or a packaged model.")
]


def rl(
    output: training.Output,
    task: Name = None,
    prompts: Prompts = None,
    reward: Reward = None,
    target: Model = None,
    steps: training.Steps = 100,
    rate: Annotated[
        float | None, typer.Option("--rate", min=0, help="Learning rate. Default: 1e-6; of a toy 1e-4.")
    ] = None,
    groups: Annotated[int, typer.Option("--groups", min=1, help="Prompts that are answered at a time.")] = 16,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Answers to a prompt.")] = 8,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer. Default: 256; of a toy 12.")
    ] = None,
    segments: Annotated[int, typer.Option("--segments", min=1, help="Parts that an answer is written in.")] = 4,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the answers.")] = 0.85,
    ratio: Annotated[
        str, typer.Option("--ratio", help="pois, or sais: clipped against the policy that wrote.")
    ] = "pois",
    tau: Annotated[float, typer.Option("--tau", help="Probability from which on a token is mastered.")] = 0.99,
    sigma: Annotated[
        float, typer.Option("--sigma", help="Entropy of an answer below which those are masked; 0: never.")
    ] = 0.2,
    warmup: Annotated[
        int, typer.Option("--warmup", min=1, help="Updates on right answers before a toy's first roll-out.")
    ] = 30,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
) -> None:
    """Train a model on its own answers, which a program rewards: UloRL, with long answers written in segments.

    Answers that have not ended when their segment does go on after the update; they are part of every checkpoint.

    \b
    Example:
      jaxinfer train rl --task sort --output runs/sort
      jaxinfer train rl --target tinycode --prompts p.jsonl --reward my.rewards:parses --output runs/mine
    """
    import jax

    from jaxinfer.cli.output import note, print_json
    from jaxinfer.train import loop, rollout, ulorl

    settings = rollout.Settings(
        groups, samples, max_tokens or (256 if task is None else 12), segments, None, temperature
    )
    run = training.Run(output, steps, resume, save_every)
    if task is not None and not (prompts or reward or target):
        begun = _toy(task, run, warmup, seed)
    elif task is None and prompts is not None and reward is not None:
        begun = _own(target or "tinycode", prompts, reward)
    else:
        raise InputError("--task, --prompts, --reward: accepted: a --task alone, or --prompts with --reward [--target]")
    source = rollout.Rollouts(begun.step, begun.task, settings, seed=seed, behaviour=ratio == "sais")
    objective = ulorl.UloRL(begun.step, temperature, ratio, tau, sigma)

    def evaluate(params: Any) -> dict[str, float]:
        return {"accuracy": rollout.accuracy(begun.step, params, begun.task, settings, seed=seed)}

    recipe = ulorl.recipe(
        objective, source, rate=(RATE if task is None else TOY_RATE) if rate is None else rate, evaluate=evaluate,
        identity={"model": begun.name},
    )  # fmt: skip
    before = evaluate(begun.params)["accuracy"]
    params = jax.tree.map(jax.numpy.array, begun.params)  # a copy: the loop updates in place
    state = run.train(recipe, loop.init_state(params, recipe, jax.random.key(seed)), evaluate_every=20)
    begun.export(state.params, output)
    after = evaluate(state.params)["accuracy"]
    note(f"wrote {output}: reward of answers to held-out prompts {before:.2f} before, {after:.2f} after")
    print_json({"output": str(output), "reward_before": before, "reward": after})


@dataclasses.dataclass(frozen=True)
class Begun:
    """What is trained: a model with its params, the task, and how the result is written."""

    step: Any
    params: Any
    task: Task
    name: str
    export: Callable[[Any, Path], None]


def _toy(name: str, run: training.Run, warmup: int, seed: int) -> Begun:
    """A tiny model that has been shown right answers, enough of them to give some itself."""
    import jax

    from jaxinfer.models.hf import save_directory
    from jaxinfer.train import lm, loop, rl_tasks
    from jaxinfer.train.draft_loss import Distill

    task, step = rl_tasks.Toy(name).task(), rl_tasks.toy_model()
    training.check_writable(run.output)
    recipe = loop.Recipe(
        objective=Distill(step),
        data=rl_tasks.Demonstrations(task, seed=seed),
        optimizer=lm.muon(lm.warmup_stable_decay(1e-2, steps=max(warmup, 4), warmup=2)),
        identity={"recipe": "demonstrations", "task": task.digest, "seed": seed, "steps": warmup},
    )
    first, second = jax.random.split(jax.random.key(seed))
    shown = dataclasses.replace(run, steps=warmup, save_every=None)
    state = shown.train(recipe, loop.init_state(lm.init_params(step, first), recipe, second), "demonstrations")

    def export(params: Any, folder: Path) -> None:
        save_directory(step.config, params, folder)
        rl_tasks.save_tokenizer(folder)

    return Begun(step, state.params, task, f"toy {name}, {warmup} demonstrations", export)


def _own(target: str, prompts: Path, reward: str) -> Begun:
    """A given model, prompts and reward."""
    from jaxinfer.train import loop, rl_tasks

    model = training.load_target(target)
    task = rl_tasks.from_file(prompts, reward, model.tokenizer)
    name = f"{target} {loop.fingerprint(model.params)}"
    return Begun(model.step, model.params, task, name, lambda params, folder: training.export(model, params, folder))
