"""`jaxinfer train long`: next-token training on long windows, in the memory of one chunk.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli import training
from jaxinfer.errors import InputError

if TYPE_CHECKING:
    from jaxinfer.models import Step
    from jaxinfer.train.chunkwise_sampling import Sampling

SAMPLINGS = ("bernoulli", "adaptive", "fixed", "all")
Chunk = Annotated[int, typer.Option("--chunk", min=1, help="Tokens of a chunk, whose activations are what is held.")]
Budget = Annotated[int, typer.Option("--budget", min=1, help="Chunks of a window that an update learns from (SpaCO).")]
SamplingKind = Annotated[
    str,
    typer.Option(
        "--sampling",
        help="How they are drawn: bernoulli or adaptive (both without bias), fixed (the paper's, biased); "
        "or all: every chunk, the exact gradient (SeCO).",
    ),
]
Clip = Annotated[
    float | None,
    typer.Option("--max-compensation", min=1, help="Largest factor for chunks left out (biased; the paper: 2)."),
]
LongLength = Annotated[int, typer.Option("--length", min=8, help="Tokens of a window.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Windows of an update.")]
Rank = Annotated[
    int | None, typer.Option("--rank", min=1, help="Train LoRA adapters of this rank instead of all weights.")
]


def long(
    output: training.Output,
    target: training.Target = "tinycode",
    data: training.Data = None,
    chunk: Chunk = 128,
    budget: Budget = 8,
    sampling: SamplingKind = "bernoulli",
    max_compensation: Clip = None,
    length: LongLength = 4096,
    rows: Rows = 1,
    rank: Rank = None,
    steps: training.Steps = 200,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Peak learning rate.")] = 1e-3,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
) -> None:
    """Train a model on long windows chunk by chunk: SeCO and SpaCO. OUTPUT gets the model, or its adapters.

    \b
    Example:
      jaxinfer train long --target DIR --data books.jsonl --length 16384 --chunk 128 --budget 8 --output runs/long
    """
    from jaxinfer.cli.output import note, print_json
    from jaxinfer.train import lm
    from jaxinfer.train.chunkwise import Chunkwise

    run = training.Run(output, steps, resume, save_every)
    chosen = sampling_of(sampling, budget, max_compensation)
    training.check_writable(output)
    model = training.load_target(target)
    step = long_enough(model.step, length)
    text = training.load_text(data, model)
    objective = Chunkwise(step, chunk, chosen)
    stream = text.stream(lm.stages([(length, 1.0, 1.0)], steps=steps, tokens=rows * length), seed=seed)

    def evaluate(params: Any) -> dict[str, float]:
        return {"bits_per_byte": text.bits_per_byte(step, params, documents=16)}

    before = evaluate(model.params)["bits_per_byte"]
    told = {"recipe": "long", "chunk": chunk, "sampling": repr(chosen), "target": target, "text": text.digest}
    told |= {"seed": seed, "rate": rate, "length": length, "rows": rows, "rank": rank}
    train = whole_model if rank is None else functools.partial(adapters_of, rank=rank)
    fields = {"objective": objective, "data": stream, "evaluate": evaluate, "identity": told}
    params = train(run, model, step, fields, target=target, rate=rate, seed=seed)
    after = evaluate(params)["bits_per_byte"]
    note(f"wrote {output}: {before:.3f} bits per byte of held-out text before, {after:.3f} after")
    found = {"output": str(output), "chunks": -(-length // chunk), "budget": None if chosen is None else budget}
    print_json(found | {"bits_per_byte_before": before, "bits_per_byte": after})


def whole_model(run: training.Run, model, step: Step, fields: dict[str, Any], *, target: str, rate, seed: int) -> Any:
    """Trains all weights and writes the model; returns them."""
    import jax

    from jaxinfer.train import lm, loop

    schedule = lm.warmup_stable_decay(rate, steps=run.steps, warmup=max(1, min(50, run.steps // 4)))
    recipe = loop.Recipe(
        optimizer=lm.muon(schedule), schedule=schedule, tokens=lambda batch: batch["ids"].size, **fields
    )
    state = run.train(recipe, loop.init_state(model.params, recipe, jax.random.key(seed)), evaluate_every=100)
    training.export(model, state.params, run.output, step=step)
    return state.params


def adapters_of(
    run: training.Run, model, step: Step, fields: dict[str, Any], *, target: str, rate, seed: int, rank: int
) -> Any:
    """Trains LoRA adapters over all projections and writes them; returns the params with them."""
    import jax

    from jaxinfer import quant
    from jaxinfer.models.adapters import save_adapter
    from jaxinfer.train import adapters

    key = jax.random.key(seed)
    start = quant.adapt(model.params, [(adapters.PROJECTIONS, quant.Lora(rank=rank))], key)
    recipe = adapters.recipe(start, steps=run.steps, rate=rate, **fields)
    # The two parts stay apart by chunks too: what is frozen has no gradient to keep.
    recipe = dataclasses.replace(recipe, objective=fields["objective"])
    state = run.train(recipe, adapters.init_state(start, recipe, key), evaluate_every=100)
    params = adapters.finished(state, recipe)
    save_adapter(step.config, params, run.output, base_name=target)
    return params


def sampling_of(kind: str, budget: int, max_compensation: float | None) -> Sampling | None:
    """`--sampling` and `--budget`; None is all chunks."""
    from jaxinfer.train.chunkwise_sampling import Sampling

    if kind not in SAMPLINGS:
        raise InputError(f"--sampling: got {kind!r}; accepted: {', '.join(SAMPLINGS)}")
    return None if kind == "all" else Sampling(budget, kind, max_compensation=max_compensation)


def long_enough(step: Step, length: int) -> Step:
    """The model with room for positions up to `length`; InputError where its weights set the limit."""
    config = step.config
    if length <= config.max_length:
        return step
    if config.position == "learned":
        raise InputError(f"--length: got {length}; the model has learned positions up to {config.max_length}")
    return dataclasses.replace(step, config=dataclasses.replace(config, max_length=length))
