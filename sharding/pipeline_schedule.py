"""Tick tables of pipelines: which micro-batch each stage works on at each tick, and what that leaves idle and keeps.

Training: GPipe (Huang et al. 2018, arXiv:1811.06965) runs all forwards, then all backwards; 1F1B (PipeDream, Harlap et
al. 2018, arXiv:1806.03377; its flushing form) alternates them, so that a stage holds at most as many micro-batches as
there are stages from it to the end. Decoding: SARATHI (Agrawal et al. 2023, arXiv:2308.16369) cuts prompts into chunks
and lets decode tokens ride along with them. The programs of `pipeline_train` and `pipeline_decode` run these tables as
they stand, so a figure counted here is a figure of the program. Pure Python; a tick is one forward or one backward of
one micro-batch.

The tables are asked for by name; no state; exact by construction. In a bubble a stage has nothing to do.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxinfer.errors import ConfigError

TRAINING = ("gpipe", "1f1b", "1f1b-together")
POLICIES = ("whole", "chunked", "piggyback")
IDLE = -1


@dataclasses.dataclass(frozen=True)
class Table:
    """`forward[t][s]` and `backward[t][s]`: the micro-batch that stage s runs at tick t, -1 for none.

    `held`: the most micro-batches whose input a stage holds at once, those that have arrived and wait included; a
    program that keeps micro-batch m in slot `m % held` never overwrites one that it still needs.
    """

    name: str
    stages: int
    microbatches: int
    forward: tuple[tuple[int, ...], ...]
    backward: tuple[tuple[int, ...], ...]

    @property
    def ticks(self) -> int:
        """Length of the program's loop."""
        return len(self.forward)

    @property
    def busy(self) -> tuple[int, ...]:
        """Forwards and backwards of each stage."""
        rows = [*self.forward, *self.backward]
        return tuple(sum(row[s] != IDLE for row in rows) for s in range(self.stages))

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait: counted from the table, in forwards and backwards."""
        each = 2 if any(f != IDLE and b != IDLE for f, b in self._pairs()) else 1
        return 1 - sum(self.busy) / (each * self.ticks * self.stages)

    @property
    def held(self) -> int:
        """See the class."""
        return max(self.held_by(s) for s in range(self.stages))

    def held_by(self, stage: int) -> int:
        """The most micro-batches whose input this stage holds at the start of a tick, or in it."""
        arrive, leave = self._life(stage)
        return max(sum(arrive[m] <= t <= leave[m] for m in range(self.microbatches)) for t in range(self.ticks))

    def _life(self, stage: int) -> tuple[list[int], list[int]]:
        """When each micro-batch's input is there, and the tick of its backward."""
        source = max(stage - 1, 0)
        arrive, leave = [0] * self.microbatches, [0] * self.microbatches
        for t, (row, back) in enumerate(zip(self.forward, self.backward, strict=True)):
            if row[source] != IDLE:
                arrive[row[source]] = t + (stage > 0)
            if back[stage] != IDLE:
                leave[back[stage]] = t
        return arrive, leave

    def _pairs(self):
        for row, back in zip(self.forward, self.backward, strict=True):
            yield from zip(row, back, strict=True)


def training_table(name: str, stages: int, microbatches: int) -> Table:
    """The table of a training schedule.

    "gpipe" and "1f1b": one forward or one backward a tick, 2 (M + S - 1) ticks. "1f1b-together": every tick a forward
    and a backward, M + 2 S - 2 ticks, and up to 2 S - 1 held inputs: shorter where stages go in lock-step, because in
    "1f1b" one stage's forward waits beside its neighbour's longer backward.
    Raises ConfigError for an unknown name or counts below 1.
    """
    if name not in TRAINING:
        raise ConfigError(f"pipeline schedule {name!r} is unknown; known: {', '.join(TRAINING)}")
    if stages < 1 or microbatches < 1:
        raise ConfigError(f"a pipeline needs at least 1 stage and 1 micro-batch, got {stages} and {microbatches}")
    s_last, m_all = stages - 1, range(microbatches)
    forward: dict[tuple[int, int], int] = {}
    backward: dict[tuple[int, int], int] = {}
    for s in range(stages):
        for m in m_all:
            match name:
                case "gpipe":
                    forward[s, m] = s + m
                    backward[s, m] = microbatches + 2 * s_last - s + m
                case "1f1b":
                    forward[s, m] = s + m if m < stages - s else s + 2 * m
                    backward[s, m] = 2 * stages - 1 - s + 2 * m
                case _:
                    forward[s, m] = s + m
                    backward[s, m] = 2 * s_last - s + m
    ticks = max(backward.values()) + 1
    return Table(name, stages, microbatches, _rows(forward, ticks, stages), _rows(backward, ticks, stages))


def bubble_formula(name: str, stages: int, microbatches: int) -> float:
    """The bubble share that the papers give: (S - 1) / (M + S - 1), and twice that lag for "1f1b-together"."""
    lag = (2 if name == "1f1b-together" else 1) * (stages - 1)
    return lag / (microbatches + lag)


def held_formula(name: str, stages: int, microbatches: int) -> int:
    """Held inputs by formula: M for GPipe, min(M, S) for 1F1B, min(M, 2 S - 1) for its form in lock-step."""
    most = {"gpipe": microbatches, "1f1b": stages, "1f1b-together": 2 * stages - 1}[name]
    return min(microbatches, most)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of `prompt` tokens of which `new` are to follow."""

    prompt: int
    new: int


@dataclasses.dataclass(frozen=True)
class Item:
    """One micro-batch: at most one chunk of a prompt, and one token of each live row of a group.

    `group` -1: no decoding. `rows`: for each place of the group the request that decodes there, -1 for none. `steps`:
    how many tokens of it are there already. `request` -1: no chunk; else `start` and `count` of its prompt's tokens
    and the row that they go to. `first`: the row is new and its cache is emptied.
    """

    group: int = IDLE
    rows: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    request: int = IDLE
    row: int = IDLE
    start: int = 0
    count: int = 0
    first: bool = False


@dataclasses.dataclass(frozen=True)
class DecodeTable:
    """`items` in the order in which every stage runs them, and `at[i][s]`: the tick of item i on stage s."""

    policy: str
    stages: int
    groups: int
    chunk: int
    items: tuple[Item, ...]
    at: tuple[tuple[int, ...], ...]

    @property
    def ticks(self) -> int:
        """Length of the program's loop."""
        return self.at[-1][-1] + 1

    @property
    def bubble(self) -> float:
        """Share of the stages' ticks in which they have no micro-batch."""
        return 1 - len(self.items) / self.ticks

    @property
    def held(self) -> int:
        """The most micro-batches that wait before a stage, the one that it takes up included."""
        most = 1
        for s in range(1, self.stages):
            for at in self.at:
                most = max(most, sum(one[s - 1] < at[s] <= one[s] for one in self.at))
        return most

    def work(self) -> tuple[tuple[int, ...], ...]:
        """`[t][s]`: the item of stage s at tick t, -1 for none."""
        return _rows({(s, i): t for i, row in enumerate(self.at) for s, t in enumerate(row)}, self.ticks, self.stages)


def decode_table(
    requests: Sequence[Request], *, stages: int, groups: int, rows: int, chunk: int, policy: str = "piggyback"
) -> DecodeTable:
    """Serve all requests, first come first served, with `groups` groups of `rows` rows; a freed row takes the next.

    A row's token is known once its item has left the last stage, so a group decodes every `stages` ticks at most and
    as many groups keep the pipeline full. Policies: "piggyback" puts the next chunk of a waiting prompt and a group's
    tokens into one micro-batch (decoding is never delayed); "chunked" gives each its own, decoding first; "whole" is
    what serving was before: a prompt goes through a stage in one piece, and the next stage starts after its end.
    Raises ConfigError for counts below 1, an unknown policy, or requests without prompt or output.
    """
    if policy not in POLICIES:
        raise ConfigError(f"decoding policy {policy!r} is unknown; known: {', '.join(POLICIES)}")
    for name, count in (("stages", stages), ("groups", groups), ("rows", rows), ("chunk", chunk)):
        if count < 1:
            raise ConfigError(f"{name}: got {count}, accepts 1 or more")
    for i, one in enumerate(requests):
        if one.prompt < 1 or one.new < 1:
            raise ConfigError(f"request {i}: got a prompt of {one.prompt} and {one.new} new tokens, accepts 1 or more")
    if not requests:
        raise ConfigError("no request: a table needs at least one")
    return _Planner(list(requests), stages, groups, rows, chunk, policy).plan()


class _Planner:
    """The bookkeeping of `decode_table`: which request is in which row, and when each group may decode again."""

    def __init__(self, requests: list[Request], stages: int, groups: int, rows: int, chunk: int, policy: str):
        self.requests, self.stages, self.groups, self.rows = requests, stages, groups, rows
        self.chunk, self.policy = chunk, policy
        self.holder = [IDLE] * (groups * rows)  # the request in each row
        self.read = [0] * len(requests)  # prompt tokens that are in items already; the last is fed as the first decode
        self.made = [0] * len(requests)
        self.ready = [0] * groups  # the tick at which a group's last tokens are back at the first stage
        self.waiting = list(range(len(requests)))
        self.prefilling: list[int] = []  # rows, first come first served
        self.items: list[Item] = []
        self.at: list[tuple[int, ...]] = []
        self.turn = 0

    def plan(self) -> DecodeTable:
        tick = 0
        while any(made < one.new for made, one in zip(self.made, self.requests, strict=True)):
            self._admit()
            for piece in self._next(tick):
                self.items.append(piece[0])
                self.at.append(piece[1])
            tick = max(tick + 1, self.at[-1][0] + 1 if self.at else 0)
        return DecodeTable(self.policy, self.stages, self.groups, self.chunk, tuple(self.items), tuple(self.at))

    def _admit(self) -> None:
        """Rows that are free take the next requests, spread over the groups so that each has work."""
        free = [r for r, holder in enumerate(self.holder) if holder == IDLE]
        for r in sorted(free, key=lambda r: (r % self.rows, r // self.rows)):
            if not self.waiting:
                return
            self.holder[r] = self.waiting.pop(0)
            self.prefilling.append(r)

    def _next(self, tick: int) -> list[tuple[Item, tuple[int, ...]]]:
        """What the first stage takes up at `tick`, with the ticks of every stage: nothing, one item, or a prompt's."""
        group = self._group(tick)
        decode = self._decode(group) if group != IDLE else Item()
        if self.policy == "piggyback":
            item = self._chunk(decode) if self.prefilling else decode
            found = [] if item == Item() else [item]
        elif group != IDLE:
            found = [decode]
        elif self.prefilling and self.policy == "whole":
            row, found = self.prefilling[0], []
            while self.prefilling and self.prefilling[0] == row:
                found.append(self._chunk(Item()))
        else:
            found = [self._chunk(Item())] if self.prefilling else []
        if not found:
            return []
        starts = self._starts(tick, len(found))
        placed = [(item, tuple(start + i for start in starts)) for i, item in enumerate(found)]
        if group != IDLE:
            self.ready[group] = placed[-1][1][-1] + 1
            self._free(group)
        return placed

    def _starts(self, tick: int, length: int) -> list[int]:
        """When each stage starts a micro-batch of `length` pieces: after its last one, and once it has arrived."""
        starts, start = [], tick
        for s in range(self.stages):
            busy = self.at[-1][s] + 1 if self.at else 0
            start = max(start, busy)
            starts.append(start)
            start += length
        return starts

    def _group(self, tick: int) -> int:
        """The next group in turn that has a row to decode and its tokens back, or -1."""
        for i in range(self.groups):
            g = (self.turn + i) % self.groups
            if self.ready[g] <= tick and any(self._decodes(r) for r in self._places(g)):
                self.turn = g + 1
                return g
        return IDLE

    def _places(self, group: int) -> range:
        return range(group * self.rows, (group + 1) * self.rows)

    def _decodes(self, row: int) -> bool:
        return self.holder[row] != IDLE and row not in self.prefilling

    def _decode(self, group: int) -> Item:
        live = [self.holder[r] if self._decodes(r) else IDLE for r in self._places(group)]
        steps = tuple(self.made[q] if q != IDLE else 0 for q in live)
        for q in live:
            if q != IDLE:
                self.made[q] += 1
        return Item(group=group, rows=tuple(live), steps=steps)

    def _free(self, group: int) -> None:
        """A row whose last token is under way is free: what comes next into it follows in every stage."""
        for r in self._places(group):
            q = self.holder[r]
            if q != IDLE and self.made[q] >= self.requests[q].new:
                self.holder[r] = IDLE

    def _chunk(self, item: Item) -> Item:
        """The item with the next chunk of the prompt that came first; all but its last token are read this way."""
        row = self.prefilling[0]
        q = self.holder[row]
        start = self.read[q]
        count = min(self.chunk, self.requests[q].prompt - 1 - start)
        self.read[q] += count
        if self.read[q] >= self.requests[q].prompt - 1:
            self.prefilling.pop(0)
        return dataclasses.replace(item, request=q, row=row, start=start, count=count, first=start == 0)


def _rows(placed: dict[tuple[int, int], int], ticks: int, stages: int) -> tuple[tuple[int, ...], ...]:
    """`{(stage, what): tick}` as `[tick][stage]`."""
    rows = [[IDLE] * stages for _ in range(ticks)]
    for (s, what), tick in placed.items():
        if rows[tick][s] != IDLE:
            raise AssertionError(f"stage {s} has two micro-batches at tick {tick}")
        rows[tick][s] = what
    return tuple(map(tuple, rows))
