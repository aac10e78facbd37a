"""What several commands accept, each said once: a model, its format, its cache, its drafter.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.checkpoint import hub
from jaxinfer.cli.specs import Registry
from jaxinfer.errors import InputError

if TYPE_CHECKING:
    from jaxinfer.decode.language_model import LanguageModel
    from jaxinfer.models import Step
    from jaxinfer.models.heads import Head

MODEL_HELP = "A checkpoint directory, a packaged model, or owner/name in the local Hub cache."
Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
DraftModel = Annotated[
    str | None,
    typer.Option("--draft-model", help="A smaller model of the same vocabulary, or a head trained on this one."),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        help="Format of the weights: auto, f32, bf16, f16, int8[:group=64], int4, fp8, ...: see `jaxinfer methods`. "
        "streamed:budget=600MB reads the layers from the model's files again and again, for what does not fit.",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", help="A folder of `jaxinfer train adapter`, or PEFT's LoRA, trained for the model."),
]
CacheKind = Annotated[
    str, typer.Option("--cache", help="Format of the cache: auto, dense, int8[:group=64], sink[:sinks=4,window=1020].")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=2, help="Most tokens of prompt and answer together; default: the model's."),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="AXIS=N,...",
        help="Split the model over devices: tensor=4 is four, by heads and MLP columns; data=2,tensor=4 is eight.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
InputFiles = Annotated[
    list[Path] | None,
    typer.Option("--input", metavar="FILE", help="Rows: JSON Lines, .gz, .zst or .parquet. Give it again for more."),
]

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
UNITS = {"": 1, "B": 1} | {f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)}
UNITS |= {f"{k}iB": 1024**i for i, k in enumerate("KMGT", 1)}
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
    also=("auto", *DTYPES, "streamed:budget=SIZE"),
)
STREAMED = Registry("--weights", {"streamed": "jaxinfer.cli.options:Streamed"})
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
        "lud": "jaxinfer.decode.lud:LUD",
        "gad": "jaxinfer.decode.gad_model:BlockDraft",
        "medusa": "jaxinfer.decode.medusa:Medusa",
        "eagle": "jaxinfer.decode.eagle:Eagle",
        "chimera": "jaxinfer.decode.chimera:Chimera",
        "ppd": "jaxinfer.decode.ppd:PPD",
        "auto": "jaxinfer.cli.auto:Auto",
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
class Streamed:
    """Weights that are read as they are needed, `budget` of the layers' bytes in memory at a time."""

    budget: str

    @property
    def nbytes(self) -> int:
        """The budget; InputError where it is no size."""
        number = self.budget.rstrip("KMGTiB")
        unit = UNITS.get(self.budget[len(number) :])
        if unit is None or not number.isascii() or not number.replace(".", "", 1).isdigit():
            raise InputError(f"--weights streamed: got budget={self.budget!r}; accepted: a size, as 600MB or 1.5GiB")
        return int(float(number) * unit)


@dataclasses.dataclass(frozen=True)
class Format:
    """`--weights`, `--cache` and `--adapter` as values: `dtype` of what is not quantized, `rules` for `quant.apply`,
    the cache, the adapter's folder, and the bytes of layers in memory where they are streamed."""

    dtype: str
    rules: tuple[tuple[str, Any], ...]
    cache: Any
    adapter: str | None = None
    budget: int | None = None


def format_of(weights: str, cache: str, adapter: str | None = None) -> Format:
    """The options parsed; InputError lists what they accept."""
    if adapter is not None:
        from jaxinfer.models.adapters import CONFIG, holds_adapter

        if not holds_adapter(adapter):
            raise InputError(f"--adapter: got {adapter}; accepted: a folder with {CONFIG}")
    rules: tuple[tuple[str, Any], ...] = ()
    dtype, budget = "auto", None
    if weights in ("auto", *DTYPES):
        dtype = weights
    elif weights.partition(":")[0] in STREAMED.entries:
        budget = STREAMED.parse(weights).nbytes
        if adapter is not None:
            raise InputError("--adapter: got one with --weights streamed; accepted: a model that it is merged into")
    else:
        rules = rules_of(WEIGHTS.parse(weights))
    return Format(dtype_of(dtype), rules, CACHES.parse(cache), adapter, budget)


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


def load(
    model: str, chosen: Format, *, max_length: int | None, draft_model: str | None = None, mesh: Any = None
) -> LanguageModel:
    """The model with the draft model that goes with it; on a `mesh`, split as its axes say, each process reading only
    the bytes of its own devices."""
    from jaxinfer.decode.language_model import load as load_model

    if chosen.budget is not None:
        from jaxinfer.sharding import layer_stream

        if mesh is not None:
            raise InputError("--mesh: got one with --weights streamed; accepted: one of them")
        return layer_stream.load(
            model, budget=chosen.budget, dtype=chosen.dtype, max_length=max_length, cache=chosen.cache,
            draft=draft_model,
        )  # fmt: skip
    lm = load_model(
        model, dtype=chosen.dtype, max_length=max_length, cache=chosen.cache, weights=chosen.rules,
        adapter=chosen.adapter, draft=draft_model,
        shardings=None if mesh is None else lambda step: _sharded(step, mesh).shardings(),
    )  # fmt: skip
    return lm if mesh is None else dataclasses.replace(lm, step=_sharded(lm.step, mesh))


def mesh_of(text: str | None, step: Step) -> Any:
    """`--mesh` as a Mesh of the devices that there are, checked against the model; None without it."""
    if text is None:
        return None
    from jaxinfer.sharding.mesh import make_mesh, parse

    return make_mesh(parse(text), step.config)


def _sharded(step: Step, mesh: Any) -> Any:
    from jaxinfer.sharding.strategies import sharded

    return sharded(step, mesh)


def draft_for(model: str, draft_model: str | None, drafters: str | None) -> str | None:
    """Which draft model or head to load: the one named; for a drafter that runs one beside the packaged model, the
    packaged one. `auto` alone takes a draft model where there is one."""
    given = [] if drafters is None else drafters.split(",")
    names = [name.rpartition("drafter=")[2].partition(":")[0] for name in given]
    if "auto" in names and model == "tinycode":
        return draft_model or "tinycode-draft"
    names = [name for name in names if name != "auto"]
    wants = next((name for name in names if name in DRAFTERS.entries and _runs(DRAFTERS.kind(name))), None)
    if draft_model is not None or wants is None:
        return draft_model
    part = _runs(DRAFTERS.kind(wants))
    packaged = "tinycode-draft" if part == "step" else f"tinycode-{wants}"
    if model == "tinycode" and (packaged in hub.PACKAGED or hub.packaged_head(packaged) is not None):
        return packaged
    accepted = f"a smaller model of {model}'s vocabulary" if part == "step" else f"a {wants} head trained on {model}"
    raise InputError(f"--drafter {wants}: got no --draft-model; accepted: {accepted}")


def _runs(kind: type) -> str | None:
    """Which of the two a drafter runs, by the name of its field: a draft model's `step`, a `head`, or neither."""
    names = {field.name for field in dataclasses.fields(kind)}
    return next((name for name in ("step", "head") if name in names), None)


def draft_part(directory: Path, max_length: int | None) -> Step | Head:
    """The Step of a draft model, or the head, that a folder holds; no weight is read."""
    from jaxinfer.models.heads import files

    if files.holds_head(directory):
        return files.describe(directory)[0]
    return step_of(directory, format_of("auto", "auto"), max_length)


def default_drafter(draft_model: str | None) -> str:
    """The name of the drafter that runs a draft model or a head; plain without one."""
    if draft_model is None:
        return "plain"
    from jaxinfer.models.heads import files

    found = hub.resolve(draft_model)
    return files.describe(found)[0].kind if files.holds_head(found) else "draft"


def drafter_step(text: str | None, draft: Step | Head | None, target_step: Step | None = None) -> Any:
    """The drafter of `--drafter`, drafting with `draft` for `target_step`; plain without one. `auto` is an `auto.Auto`,
    which has yet to be measured."""
    name, kind = (text or "plain").partition(":")[0], getattr(draft, "kind", None)  # a model has no kind
    runs = _runs(DRAFTERS.kind(name)) if name in DRAFTERS.entries else None
    if (runs == "head" and kind != name) or (runs == "step" and kind is not None):
        got = "no --draft-model" if draft is None else "a model" if kind is None else f"a {kind} head"
        raise InputError(f"--drafter {name}: got {got}; accepted: {f'a {name} head' if runs == 'head' else 'a model'}")
    part = {} if draft is None else {"head" if kind else "step": draft}
    return DRAFTERS.parse(text or "plain", **{"step": None, "head": None, "target": target_step, **part})


def drafter_of(text: str | None, lm: LanguageModel, *, batch: int = 1, capacity: int = 512) -> Any:
    """The same for a loaded model; by default its draft model or head drafts, where it has one. `auto` is measured, for
    `batch` rows of `capacity` tokens."""
    from jaxinfer.cli.auto import Auto

    if text is None:
        return lm.default_drafter()
    draft = None if lm.draft is None else getattr(lm.draft, "head", None) or getattr(lm.draft, "step", None)
    drafter = drafter_step(text, draft, lm.step)
    return drafter.measured(lm, batch=batch, capacity=capacity) if isinstance(drafter, Auto) else drafter
