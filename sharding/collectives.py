"""The collectives of a compiled program: how often each runs a call, over how many devices, and what it moves.

A claim about communication ("one all-reduce a block", "no weight is gathered") is a claim about the program that XLA
made, so tests and the planner read that program's text. Machinery; nothing is run.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from jaxinfer.errors import InputError

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, as one device sees it.

    `shapes` and `nbytes` of its result there, `parts`: devices that take part in one group, `times`: runs in one call
    of the program (loops of known length multiply; a loop of unknown length, marked by `unbounded`, counts as one trip,
    and every branch of a conditional counts, marked by `conditional`), `name`: the traced operation that it comes from,
    where XLA kept it.
    On a CPU, XLA sums bfloat16 in float32: `nbytes` are what that program moves.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int
    parts: int
    times: int
    unbounded: bool
    conditional: bool
    name: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one call by the ring algorithm, the least that any algorithm sends."""
        n = self.parts
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
        return self.times * self.nbytes * share.get(self.kind, (n - 1) / n)


def collectives(program: Any) -> list[Collective]:
    """The collectives of a compiled program (`jax.jit(f).lower(...).compile()`) or of its text, in the text's order.

    Those of one device (XLA leaves some) are left out. Raises InputError for a program that is not compiled.
    """
    text = program if isinstance(program, str) else program.as_text()
    if text is None or "HloModule" not in text or "ENTRY" not in text:
        raise InputError("collectives: got no compiled program; accepted: jax.jit(f).lower(...).compile() or its text")
    partitions = re.search(r"num_partitions=(\d+)", text)
    everyone = int(partitions.group(1)) if partitions else 1
    lines = _computations(text)
    runs = _runs(lines)
    found = []
    for name, body in lines.items():
        times, unbounded, conditional = runs.get(name, (0, False, False))
        for line in body if times else ():
            one = _collective(line, everyone)
            if one is not None:
                found.append(dataclasses.replace(one, times=times, unbounded=unbounded, conditional=conditional))
    return found


def summary(program: Any) -> dict[str, tuple[int, int]]:
    """`{kind: (runs, result bytes a device)}` of one call, for the kinds that there are."""
    found = program if isinstance(program, list) else collectives(program)
    kinds = sorted({one.kind for one in found})
    of = {kind: [one for one in found if one.kind == kind] for kind in kinds}
    return {kind: (sum(c.times for c in ones), sum(c.times * c.nbytes for c in ones)) for kind, ones in of.items()}


def sent(program: Any, kinds: Iterable[str] = KINDS, *, conditional: bool = True) -> float:
    """Bytes that each device sends in one call, of these kinds; without `conditional`, where no branch is taken."""
    wanted = set(kinds)
    if unknown := wanted - set(KINDS):
        raise InputError(f"kind {sorted(unknown)[0]!r} is no collective; accepted: {', '.join(KINDS)}")
    found = program if isinstance(program, list) else collectives(program)
    return sum(one.sent for one in found if one.kind in wanted and (conditional or not one.conditional))


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation; the entry's name is "ENTRY"."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault("ENTRY" if head.group(1) else head.group(2), [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return found


def _runs(lines: dict[str, list[str]]) -> dict[str, tuple[int, bool, bool]]:
    """How often each computation runs in one call, and whether a loop of unknown length, or a conditional, is around
    it."""
    calls: dict[str, list[tuple[str, int, bool, bool]]] = {}
    for caller, body in lines.items():
        for line in body:
            callees = _CALLS.findall(line)
            for group in _BRANCHES.findall(line):
                callees += [name.strip().lstrip("%") for name in group.split(",")]
            trips, unknown = 1, False
            if " while(" in line:
                known = _TRIPS.search(line)
                trips, unknown = (int(known.group(1)), False) if known else (1, True)
            for callee in callees:
                if callee in lines:
                    calls.setdefault(callee, []).append((caller, trips, unknown, " conditional(" in line))
    memo: dict[str, tuple[int, bool, bool]] = {"ENTRY": (1, False, False)}

    def of(name: str) -> tuple[int, bool, bool]:
        if name not in memo:
            above = [(of(caller), *call) for caller, *call in calls.get(name, ())]
            above = [one for one in above if one[0][0]]  # callers that run
            total = sum(times * trips for (times, _, _), trips, _, _ in above)
            unknown = any(around or here for (_, around, _), _, here, _ in above)
            memo[name] = (total, unknown, any(around or here for (_, _, around), _, _, here in above))
        return memo[name]

    return {name: of(name) for name in lines}


def _collective(line: str, everyone: int) -> Collective | None:
    found = _INSTRUCTION.match(line)
    if found is None:
        return None
    opcode = found.group(3)
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    shapes = [(dtype, _dims(dims)) for dtype, dims in _SHAPE.findall(found.group(2))]
    if opcode in ("all-gather-start", "collective-permute-start"):  # (operands, results, maybe contexts u32[])
        shapes = [shape for shape in shapes if shape != ("u32", ())]
        shapes = shapes[len(shapes) // 2 :]
    parts = _parts(line, kind, everyone)
    if parts < 2:
        return None
    nbytes = sum(math.ceil(math.prod(dims) * _bits(dtype) / 8) for dtype, dims in shapes)
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind, tuple(dims for _, dims in shapes), nbytes, parts, 1, False, False, name.group(1) if name else ""
    )


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(part.lstrip("<=")) for part in text.split(",") if part)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)  # f32, bf16, s8, f8e4m3fn, f4e2m1fn
    if digits is None:
        raise InputError(f"collectives: element type {dtype!r} is unknown")
    return int(digits.group())


def _parts(line: str, kind: str, everyone: int) -> int:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        sources = re.findall(r"\{(\d+),(\d+)", pairs.group(0)) if pairs else []
        return 2 if any(a != b for a, b in sources) else 1
    groups = re.search(r"replica_groups=(\{\{[\d,]*\}|\{\}|\[[\d,]+\]<=)", line)
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes.group(1)))
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes.group(2))  # an axis, or a part of one: 'a':(1)2
        return math.prod(int(part or sizes[name]) for name, part in named)
    if groups is None:
        if "replica_groups=" in line:
            raise InputError(f"collectives: replica groups are not understood in {line.strip()[:200]}")
        return everyone
    text = groups.group(1)
    if text.startswith("["):  # [groups,devices]<=[...]
        return int(text[1:-3].split(",")[-1])
    return len(re.findall(r"\d+", text)) or everyone
