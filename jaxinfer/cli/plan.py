"""`jaxinfer plan`: which ways to split a model over devices fit, what each holds and sends, and which to take.

Stability: experimental.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli import options
from jaxinfer.errors import InputError

if TYPE_CHECKING:
    from jaxinfer.sharding.planner import Chip, Plan

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def plan(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    devices: Annotated[int, typer.Option(min=1, help="Devices to use, all of them.")] = 8,
    chip: Annotated[str, typer.Option(help="Whose memory and speeds: h200 or v5p.")] = "h200",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a device, as 80GB; default: the chip's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of all devices together.")] = 64,
    max_length: options.MaxLength = None,
    weights: options.Weights = "auto",
    cache: options.CacheKind = "auto",
    train: Annotated[
        bool, typer.Option("--train", help="Plan a training step, with Adam, in place of decoding.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """List the ways to split a model over devices: bytes a device, bytes sent a step, predicted time. Loads no weights.

    \b
    Example:
      jaxinfer plan DIR --devices 8 --chip h200 --batch-size 64 --max-length 8192
    The first that fits is what to give to `jaxinfer generate --mesh`. Times are predictions from data sheets.
    """
    from jaxinfer.cli.output import print_json
    from jaxinfer.sharding import planner

    if chip not in planner.CHIPS:
        raise InputError(f"--chip: got {chip!r}; accepted: {', '.join(planner.CHIPS)}")
    device = planner.CHIPS[chip]
    device = planner.Chip(chip, bytes_of(memory), device.flops, device.bandwidth, device.link) if memory else device
    found, picked = survey(model, devices, device, batch_size, max_length, weights, cache, train=train)
    if as_json:
        print_json({"picked": None if picked is None else str(picked), "plans": [row(p, device) for p in found]})
    else:
        _print(found, picked, device, train=train)
    if picked is None:
        planner.pick(found, device)  # raises, and says what is missing


def survey(
    model: str,
    devices: int,
    chip: Chip,
    batch_size: int,
    max_length: int | None,
    weights: str,
    cache: str,
    *,
    train: bool,
) -> tuple[list[Plan], Plan | None]:
    """Every plan, and the one to take; None where none fits."""
    from jaxinfer.checkpoint import hub
    from jaxinfer.cli import memory
    from jaxinfer.sharding import planner

    chosen = options.format_of("bf16" if weights == "auto" else weights, cache)
    step = options.step_of(hub.resolve(model), chosen, max_length)
    length = step.config.max_length
    job = planner.Job("train", batch_size, length) if train else planner.Job("decode", batch_size, 1, length)
    params = memory.abstract_params(step, () if train else chosen.rules)
    found = planner.plans(step, devices, job, chip, params, width=2)
    fit = [plan for plan in found if plan.fits(chip.memory)]
    return found, fit[0] if fit else None


def row(plan: Plan, chip: Chip) -> dict[str, Any]:
    """A plan as JSON values."""
    return {
        "mesh": str(plan),
        "fits": plan.fits(chip.memory),
        "bytes": {name: getattr(plan, name) for name in ("weights", "cache", "optimizer", "work", "total")},
        "sent": dict(plan.sends),
        "predicted_seconds": plan.seconds(chip),
    }


def bytes_of(text: str) -> float:
    """`80GB` or `80GiB` as bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)", text.strip().upper())
    if found is None or not math.isfinite(float(found.group(1))) or found.group(2) not in UNITS:
        raise InputError(f"--memory: got {text!r}; accepted: a size such as 80GB or 96GiB")
    return float(found.group(1)) * UNITS[found.group(2)]


def _print(found: list[Plan], picked: Plan | None, chip: Chip, *, train: bool) -> None:
    from jaxinfer.cli.output import note, print_table, size

    parts = ("weights", "cache", "optimizer", "work", "total")
    rows = [
        (str(p), "yes" if p.fits(chip.memory) else "no", *(size(getattr(p, name)) for name in parts), size(p.sent),
         f"{1e3 * p.seconds(chip):.3g}")
        for p in found
    ]  # fmt: skip
    what = "training" if train else "decoding"
    title = f"a {what} step on {chip.name}, {size(chip.memory)} a device; times are predictions, not measurements"
    print_table(("--mesh", "fits", *parts, "sent", "predicted ms"), rows, title=title)
    if picked is not None:
        note(f"take --mesh {picked}" if picked.axes else "one device is enough")
