"""`jaxinfer info DIR`: what a checkpoint is and what it needs, from its config and file headers alone.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli import options

if TYPE_CHECKING:
    from jaxinfer.models import ModelConfig


def info(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded at a time.")] = 1,
    max_length: options.MaxLength = None,
    weights: options.Weights = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Show what a checkpoint is, and what it needs in memory at a batch size and a length. Loads no weights.

    \b
    Example:
      jaxinfer info tinycode --batch-size 64 --max-length 1024
    """
    from jaxinfer.cli.output import print_json

    report = describe(model, batch_size=batch_size, max_length=max_length, weights=weights)
    if as_json:
        print_json(report)
    else:
        _print(report)


def describe(model: str, *, batch_size: int, max_length: int | None, weights: str) -> dict[str, Any]:
    """Everything that `jaxinfer info` shows, as JSON values."""
    from jaxinfer.checkpoint import hub
    from jaxinfer.checkpoint.chat import ChatTemplate
    from jaxinfer.checkpoint.safetensors_io import open_weights
    from jaxinfer.checkpoint.tokenizer import Tokenizer
    from jaxinfer.cli import memory

    chosen = options.format_of(weights, "auto")
    directory = hub.resolve(model)
    step = options.step_of(directory, chosen, max_length)
    config = step.config
    params = memory.abstract_params(step, chosen.rules)
    tensors = open_weights(directory).tensors.values()
    stored, held = Counter(), Counter()
    for tensor in tensors:
        stored[str(tensor.dtype)] += tensor.end - tensor.begin
        held[str(tensor.dtype)] += 1
    needs = {}
    for kind in options.CACHES.entries:
        with_cache = dataclasses.replace(step, cache=options.CACHES.parse(kind))
        needed = memory.need(with_cache, params, batch=batch_size, max_length=config.max_length)
        needs[kind] = {"weights": needed.weights, "cache": needed.cache, "work": needed.work, "total": needed.total}
    has_tokenizer = (directory / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(directory) if has_tokenizer else None
    return {
        "directory": str(directory),
        "family": config.family,
        "parameters": memory.count(params),
        "active_parameters": memory.count(params) - _idle(config, params),
        "architecture": _architecture(config),
        "positions": _positions(config),
        "windows": _windows(config),
        "tensors": {name: {"count": held[name], "bytes": stored[name]} for name in sorted(stored)},
        "tokenizer": None if tokenizer is None else {"tokens": tokenizer.vocab_size, "eos": list(tokenizer.eos_ids)},
        "chat_template": ChatTemplate.load(directory) is not None,
        "needs": {
            "weights": weights,
            "dtype": step.dtype,
            "batch_size": batch_size,
            "max_length": config.max_length,
            "by_cache": needs,
        },
    }


def _architecture(c: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "layers": c.num_layers,
        "hidden": c.hidden_size,
        "heads": c.num_heads,
        "kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "mlp": c.mlp_size,
        "vocabulary": c.vocab_size,
        "tied_embeddings": c.tie_embeddings,
        "max_length": c.max_length,
    }
    if c.num_experts:
        found |= {"experts": c.num_experts, "experts_per_token": c.experts_per_token, "expert_mlp": c.expert_size}
    return found


def _idle(c: ModelConfig, params: Any) -> int:
    """Parameters that one token does not pass through: the experts that it is not sent to."""
    if not c.num_experts:
        return 0
    routed = sum(
        leaf.size for layer in params.values() if isinstance(layer, dict) and "experts" in layer
        for name, leaf in layer["experts"].items() if name != "router"
    )  # fmt: skip
    return routed - routed * c.experts_per_token // c.num_experts


def _positions(c: ModelConfig) -> list[str]:
    """Each distinct position encoding with the number of layers that have it."""
    layers = range(c.num_layers)
    kinds = Counter(_rope(c.attention(layer).position) if c.position == "rope" else c.position for layer in layers)
    return [f"{what} ({n} layers)" for what, n in kinds.items()]


def _rope(rope: Any) -> str:
    if rope is None:
        return "none"
    changed = {name: getattr(rope, name) for name in ("theta", "scaling", "factor") if hasattr(rope, name)}
    return "rope " + ", ".join(f"{name} {value}" for name, value in changed.items() if value is not None)


def _windows(c: ModelConfig) -> list[str]:
    kinds = Counter(c.windows or (None,) * c.num_layers)
    return [f"{'full attention' if w is None else f'window {w}'} ({n} layers)" for w, n in kinds.items()]


def _print(report: dict[str, Any]) -> None:
    from jaxinfer.cli.output import number, print_table, size

    active, total = report["active_parameters"], report["parameters"]
    facts = [
        ("directory", report["directory"]),
        ("family", report["family"]),
        ("parameters", number(total) + (f", {number(active)} of them for one token" if active != total else "")),
        *((name.replace("_", " "), value) for name, value in report["architecture"].items()),
        ("positions", "; ".join(report["positions"])),
        ("attention", "; ".join(report["windows"])),
        *((f"stored {name}", f"{t['count']} tensors, {size(t['bytes'])}") for name, t in report["tensors"].items()),
        ("tokenizer", "none" if report["tokenizer"] is None else f"{report['tokenizer']['tokens']} tokens"),
        ("chat template", "yes" if report["chat_template"] else "no"),
    ]
    print_table(("what", "value"), facts)
    needs = report["needs"]
    parts = ("weights", "cache", "work", "total")
    title = f"needs in {needs['dtype']}, batch size {needs['batch_size']}, {needs['max_length']} tokens a row"
    rows = [(kind, *(size(need[part]) for part in parts)) for kind, need in needs["by_cache"].items()]
    print_table(("--cache", *parts), rows, title=title)
