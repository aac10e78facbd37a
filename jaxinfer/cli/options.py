"""What several commands accept, each said once: a model, its format, its cache, its drafter.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.specs import Registry
from jaxinfer.errors import InputError

if TYPE_CHECKING:
    from jaxinfer.decode.language_model import LanguageModel
    from jaxinfer.models import Step

MODEL_HELP = "A checkpoint directory, a packaged model, or owner/name in the local Hub cache."
Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
DraftModel = Annotated[
    str | None, typer.Option("--draft-model", help="A smaller model of the same vocabulary, for drafters that run one.")
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        help="Format of the weights: auto, f32, bf16, f16, int8[:group=64], int4, fp8, ...: see `jaxinfer methods`.",
    ),
]
CacheKind = Annotated[
    str, typer.Option("--cache", help="Format of the cache: auto, dense, int8[:group=64], sink[:sinks=4,window=1020].")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=2, help="Most tokens of prompt and answer together; default: the model's."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
InputFiles = Annotated[
    list[Path] | None,
    typer.Option("--input", metavar="FILE", help="Rows: JSON Lines, .gz, .zst or .parquet. Give it again for more."),
]

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
WEIGHTS = Registry(
    "--weights",
    {
        "int8": "jaxinfer.quant.integers:Int8",
        "int4": "jaxinfer.quant.integers:Int4",
        "int3": "jaxinfer.quant.integers:Int3",
        "int2": "jaxinfer.quant.integers:Int2",
        "fp8": "jaxinfer.quant.floats:Fp8",
        "fp6": "jaxinfer.quant.floats:Fp6",
        "mxfp4": "jaxinfer.quant.floats:MxFp4",
        "nvfp4": "jaxinfer.quant.floats:NvFp4",
        "ternary": "jaxinfer.quant.ternary:Ternary",
        "trit-planes": "jaxinfer.quant.trit_planes:TritPlanes",
        "mixed": "jaxinfer.quant.mixed_rows:Mixed",
    },
    also=("auto", *DTYPES),
)
CACHES = Registry(
    "--cache",
    {
        "auto": "jaxinfer.models.step:AutoCache",
        "dense": "jaxinfer.cli.options:DenseCache",
        "int8": "jaxinfer.cache.int8:Int8Cache",
        "sink": "jaxinfer.cache.sink:SinkCache",
    },
)
DRAFTERS = Registry(
    "--drafter",
    {
        "plain": "jaxinfer.decode.autoregressive:Autoregressive",
        "draft": "jaxinfer.decode.draft_model:DraftModel",
        "prompt-lookup": "jaxinfer.decode.prompt_lookup:PromptLookup",
        "copyspec": "jaxinfer.decode.copyspec:CopySpec",
        "token-recycling": "jaxinfer.decode.token_recycling:TokenRecycling",
        "aded": "jaxinfer.decode.aded:ADED",
        "aggressive": "jaxinfer.decode.aggressive:Aggressive",
        "jacobi": "jaxinfer.decode.jacobi:Jacobi",
        "bild": "jaxinfer.decode.bild:Bild",
        "copyspec-draft": "jaxinfer.decode.copy_draft:CopyDraft",
        "pearl": "jaxinfer.decode.pearl:Pearl",
        "triforce": "jaxinfer.decode.triforce:TriForce",
    },
)
# Every matrix but the routers: they are tiny, and a wrong expert costs more than their bytes.
QUANTIZED = r"(?!.*/router$).*"


@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Cache policy: every token in every layer, in layers with a sliding window too."""

    def spec(self, attention: Any, capacity: int, dtype: str) -> Any:
        """The Spec of one layer."""
        from jaxinfer import cache

        return cache.Dense(attention, capacity, dtype)


@dataclasses.dataclass(frozen=True)
class Format:
    """`--weights` and `--cache` as values: `dtype` of what is not quantized, `rules` for `quant.apply`, the cache."""

    dtype: str
    rules: tuple[tuple[str, Any], ...]
    cache: Any


def format_of(weights: str, cache: str) -> Format:
    """The two options parsed; InputError lists what they accept."""
    rules: tuple[tuple[str, Any], ...] = ()
    dtype = "auto"
    if weights in ("auto", *DTYPES):
        dtype = weights
    else:
        rules = rules_of(WEIGHTS.parse(weights))
    return Format(dtype_of(dtype), rules, CACHES.parse(cache))


def rules_of(spec: Any) -> tuple[tuple[str, Any], ...]:
    """What `--weights` means as rules for `quant.apply`."""
    return ((QUANTIZED, spec),)


def dtype_of(name: str) -> str:
    """`auto` is float32 on a CPU, where bfloat16 products are ten times slower, and bfloat16 elsewhere."""
    if name == "auto":
        import jax

        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return DTYPES[name]


def step_of(directory: Path, chosen: Format, max_length: int | None) -> Step:
    """The Step of a checkpoint, from its config alone."""
    from jaxinfer.models import Step
    from jaxinfer.models.hf import load_config

    return Step(load_config(directory, max_length=max_length), chosen.cache, chosen.dtype)


def load(model: str, chosen: Format, *, max_length: int | None, draft_model: str | None = None) -> LanguageModel:
    """The model with the draft model that goes with it."""
    from jaxinfer.decode.language_model import load as load_model

    return load_model(
        model, dtype=chosen.dtype, max_length=max_length, cache=chosen.cache, weights=chosen.rules, draft=draft_model
    )


def draft_for(model: str, draft_model: str | None, drafters: str | None) -> str | None:
    """Which draft model to load: the one named; for a drafter that runs one beside the packaged model, its packaged
    draft."""
    names = [] if drafters is None else [name.partition(":")[0] for name in drafters.split(",")]
    wants = next((name for name in names if name in DRAFTERS.entries and _runs_a_model(DRAFTERS.kind(name))), None)
    if draft_model is not None or wants is None:
        return draft_model
    if model == "tinycode":
        return "tinycode-draft"
    raise InputError(f"--drafter {wants}: got no --draft-model; accepted: a smaller model of {model}'s vocabulary")


def _runs_a_model(kind: type) -> bool:
    return any(field.name == "step" for field in dataclasses.fields(kind))


def drafter_step(text: str | None, draft_step: Step | None, target_step: Step | None = None) -> Any:
    """The drafter of `--drafter`, drafting with `draft_step` for `target_step`; plain without one."""
    return DRAFTERS.parse(text or "plain", step=draft_step, target=target_step)


def drafter_of(text: str | None, lm: LanguageModel) -> Any:
    """The same for a loaded model; by default its draft model drafts, where it has one."""
    draft_step = None if lm.draft is None else lm.draft.step
    return drafter_step(text or ("plain" if draft_step is None else "draft"), draft_step, lm.step)
