"""`jaxinfer train adapter`: fine-tunes a model by adapters on one's own text.

Stability: experimental.
"""

import dataclasses
from typing import Annotated, Any

import typer

from jaxinfer.cli import options, training
from jaxinfer.cli.specs import Registry
from jaxinfer.errors import InputError

KINDS = Registry(
    "--kind",
    {
        "lora": "jaxinfer.quant.lora:Lora",
        "paca": "jaxinfer.quant.paca:Paca",
        "soka": "jaxinfer.quant.soka:Soka",
        "hydra": "jaxinfer.quant.hydra:Hydra",
    },
)
Weights = Annotated[str, typer.Option("--weights", help="Format of the frozen weights: f32, int8, int4:group=64, ...")]
Match = Annotated[
    str | None,
    typer.Option("--match", help="Regular expression of the weights to adapt. Default: all of attention and MLP."),
]
Kind = Annotated[str, typer.Option("--kind", help=f"{', '.join(KINDS.entries)}, with settings: lora:alpha=16.")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Of each adapter; the same as rank= in --kind.")]


def adapter(
    output: training.Output,
    kind: Kind = "lora",
    rank: Rank = None,
    target: training.Target = "tinycode",
    data: training.Data = None,
    match: Match = None,
    weights: Weights = "f32",
    steps: training.Steps = 200,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Peak learning rate.")] = 1e-3,
    batch_tokens: training.BatchTokens = 4096,
    length: training.Length = 512,
    seed: training.Seed = 0,
    resume: training.Resume = True,
    save_every: training.SaveEvery = None,
) -> None:
    """Fine-tune a model by adapters: small arrays beside frozen weights, in OUTPUT in PEFT's format where it has one.

    \b
    Example:
      jaxinfer train adapter --kind lora --rank 8 --target DIR --data code.jsonl --output runs/adapter
    """
    import jax

    import jaxinfer
    from jaxinfer import quant
    from jaxinfer.cli.output import note, print_json
    from jaxinfer.models.adapters import save_adapter
    from jaxinfer.train import adapters as recipes
    from jaxinfer.train import lm

    spec = spec_of(kind, rank)
    run = training.Run(output, steps, resume, save_every)
    training.check_writable(output)
    chosen = options.format_of(weights, "auto")
    model = jaxinfer.load(target, dtype="float32", weights=chosen.rules)
    params = quant.adapt(model.params, [(match or recipes.PROJECTIONS, spec)], jax.random.key(seed))
    text = training.load_text(data, model)
    recipe = recipes.recipe(
        params,
        text.stream(lm.stages([(length, 1.0, 1.0)], steps=steps, tokens=batch_tokens), seed=seed),
        steps=steps,
        objective=lm.NextToken(model.step),
        rate=rate,
        evaluate=lambda params: {"bits_per_byte": text.bits_per_byte(model.step, params, documents=16)},
        identity={"recipe": "adapter", "adapter": repr(spec), "text": text.digest, "seed": seed},
    )
    state = run.train(recipe, recipes.init_state(params, recipe, jax.random.key(seed)), evaluate_every=100)
    params = recipes.finished(state, recipe)
    save_adapter(model.config, params, output, base_name=target)
    before, after = (text.bits_per_byte(model.step, p, documents=16) for p in (model.params, params))
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    told = f"{before:.3f} bits per byte of held-out text before, {after:.3f} after"
    note(f"wrote {output}: {trained} trained numbers, {told}")
    found = {"output": str(output), "kind": repr(spec), "trained": trained}
    print_json(found | {"bits_per_byte_before": before, "bits_per_byte": after})


def spec_of(kind: str, rank: int | None) -> Any:
    """`--kind` and `--rank` as one spec; a rank in both is refused."""
    spec = KINDS.parse(kind)
    if rank is None:
        return spec
    if "rank=" in kind:
        raise InputError(f"--rank: got {rank} and --kind {kind}; accepted: the rank once")
    return dataclasses.replace(spec, rank=rank)
