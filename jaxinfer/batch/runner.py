"""Runs a batch job on an engine of slots: rows in, answers out, every slot kept busy.

A slot holds one sequence. Sequences of several claimed shards wait in one queue and take slots as these fall free; a
shard is committed when all its rows have answers. The engine advances all slots by a fixed number of steps, then the
host looks: it cuts answers at stop strings, finishes rows, refills slots. An answer depends on its row alone (its
prompt, parameters and key), so order, neighbours, refills and restarts leave no trace in it.

Stability: experimental.
"""

import hashlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxinfer.batch.answers import Sample, TopTokens, answer_line, error_line
from jaxinfer.batch.job import Claim, Job, Row, Totals
from jaxinfer.batch.requests import BadRow, Codec, Limits, Prepared, identity, prepare_row
from jaxinfer.decode.text import CutText
from jaxinfer.errors import JobError

_LAST = 4  # sets of slots that make up the end of a job, in which the order of rows decides how full slots stay
_WORKERS = 64  # more than this many are not counted
EXIT_FINISHED, EXIT_ERRORS, EXIT_AGAIN = 0, 3, 75


@dataclass(frozen=True)
class Admission:
    """A sequence that goes into a slot. `key`: 64 bits from the row's seed and id and the sample's number."""

    slot: int
    row: Prepared
    key: tuple[int, int]


@dataclass(frozen=True)
class Event:
    """New tokens of a slot since the last look, with log-probabilities where the job has them.

    `finished`: None while it goes on, "stop" when the last token is one that ends an answer, "length" at the row's
    limit, "error" with `error` when this sequence cannot be continued. A finished slot is free again.
    """

    slot: int
    tokens: Sequence[int]
    logprobs: Sequence[float] | None = None
    top: Sequence[TopTokens] | None = None
    finished: str | None = None
    error: str = ""


@dataclass(frozen=True)
class Look:
    """What one `advance` brought: an Event for each filled slot, and the model steps that were made."""

    events: Sequence[Event]
    steps: int


class Engine(Protocol):
    """What runs the model. A sequence's tokens must not depend on its slot, its neighbours or when it was admitted."""

    @property
    def slots(self) -> int: ...

    @property
    def limits(self) -> Limits: ...

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Fills free slots."""
        ...

    def advance(self) -> Look:
        """A fixed number of steps for every filled slot, fewer where all sequences end."""
        ...

    def release(self, slot: int) -> None:
        """Frees a slot whose sequence the host has ended; does nothing to a free one."""
        ...

    def reset(self) -> None:
        """Frees all slots, also after an exception."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `rows_done` of the whole job, everything else of this worker since it started."""

    rows_done: int
    rows_total: int
    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    slots: int
    steps: int

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    @property
    def useful(self) -> float:
        """Tokens of answers for each slot-step made: without drafts, the share of slot-steps that were useful."""
        return self.completion_tokens / (self.slots * self.steps) if self.steps else 0.0

    def report(self) -> dict[str, Any]:
        rates = {"tokens_per_second": round(self.tokens_per_second, 2), "useful_slot_steps": round(self.useful, 4)}
        return {**vars(self), "seconds": round(self.seconds, 3), **rates}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `totals` of the finished output, or None when it was stopped before that."""

    totals: Totals | None
    progress: Progress

    def exit_code(self, *, max_error_rate: float = 1.0) -> int:
        """0 finished, 3 finished with a larger share of error rows than allowed, 75 stopped: run it again."""
        if self.totals is None:
            return EXIT_AGAIN
        return EXIT_ERRORS if self.totals.errors > max_error_rate * self.totals.rows else EXIT_FINISHED


@dataclass
class _Shard:
    claim: Claim
    lines: list[bytes | None]


@dataclass
class _Row:
    """A row in work and where its answer goes."""

    prepared: Prepared
    shard: _Shard
    index: int
    samples: list[Sample | None]
    failed: bool = False


@dataclass
class _Sequence:
    """One sample of a row: what it has answered so far."""

    row: _Row
    sample: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopTokens] = field(default_factory=list)
    text: str = ""
    cut: CutText | None = None  # where the request has stop strings

    def restarted(self) -> "_Sequence":
        return _Sequence(self.row, self.sample)


def row_key(seed: int, row_id: str | int, sample: int) -> tuple[int, int]:
    """Two 32-bit words from (seed, row id, sample): the same for every engine, slot, worker and restart."""
    digest = hashlib.sha256(b"%d|%d|" % (seed, sample) + identity(row_id)).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


class Runner:
    """Drives one engine through one job. `run` returns when the output is complete or `stop` says so."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        codec: Codec,
        *,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
        grace: float = 10.0,
        poll: float = 0.5,
        most_failures: int = 8,
    ) -> None:
        self._job, self._engine, self._codec = job, engine, codec
        self._progress, self._stop, self._grace, self._poll = progress, stop, grace, poll
        self._most_failures = most_failures
        self._queue: deque[_Sequence] = deque()
        self._suspects: list[_Sequence] = []  # restarted after an exception, to be run one at a time
        self._alone = False
        self._slots: dict[int, _Sequence] = {}  # in the order of admission
        self._open = 0  # shards in work
        self._next_claim = self._next_count = 0.0
        self._rows_done = 0
        self._accused: list[tuple[_Row, str]] = []  # failed alone; an error once the engine is seen to work again
        self._answered = False
        self._begun = time.monotonic()
        self._counts = {"rows": 0, "errors": 0, "prompt_tokens": 0, "completion_tokens": 0, "steps": 0}

    def run(self) -> Outcome:
        """Works until every shard is committed and the output assembled, or until stopped.

        When stopped, what can be finished within `grace` seconds is; the rest is given back. Raises JobError when
        the engine fails on row after row: then it is the engine that is broken, not the rows.
        """
        try:
            deadline = None
            while True:
                if deadline is None and self._stop():
                    deadline = time.monotonic() + self._grace
                if deadline is not None and (not self._open or time.monotonic() > deadline):
                    break
                if deadline is None:
                    self._claim()
                if self._slots or self._queue or self._suspects:
                    self._turn()
                elif self._accused:
                    self._judge()
                elif self._job.all_committed:
                    break
                else:
                    time.sleep(self._poll)  # other workers hold the rest: wait, in case one dies
            totals = self._assemble() if self._job.all_committed else None
        finally:
            self._job.abandon()
        self._next_count = 0.0
        outcome = Outcome(totals, self._now())
        self._job.write_report({**outcome.progress.report(), "total": vars(totals) if totals else None})
        return outcome

    def _assemble(self) -> Totals | None:
        while (totals := self._job.assemble()) is None and not self._stop():
            time.sleep(self._poll)
        return totals

    def _now(self) -> Progress:
        if time.monotonic() >= self._next_count:  # it looks at every shard that is not done
            self._rows_done = self._job.manifest.rows if self._job.finished else self._job.rows_committed()
            self._next_count = time.monotonic() + 10 * self._poll
        counts = dict(self._counts)
        counts["completion_tokens"] += sum(len(sequence.tokens) for sequence in self._slots.values())
        seconds = time.monotonic() - self._begun
        rows = max(self._rows_done, self._counts["rows"])
        return Progress(rows, self._job.manifest.rows, seconds=seconds, slots=self._engine.slots, **counts)

    def _claim(self) -> None:
        """Claims shards until enough sequences wait in the queue.

        That is a set of slots; but of the last few sets of the job this worker's whole share, longest answers first,
        so that all slots fall empty at about the same time.
        """
        while time.monotonic() >= self._next_claim and not self._stop():
            share = self._last_share()
            if len(self._queue) >= max(share, self._engine.slots):
                return
            claim = self._job.claim()
            if claim is None:
                self._next_claim = time.monotonic() + self._poll
                return
            rows = self._job.rows(claim)
            shard = _Shard(claim, [None] * len(rows))
            self._open += 1
            for index, row in enumerate(rows):
                self._enqueue(row, shard, index)
            if share:
                self._queue = deque(sorted(self._queue, key=lambda s: -s.row.prepared.limit))

    def _last_share(self) -> int:
        """This worker's share of what waits and is unclaimed, when that is the end of the job; else 0."""
        slots = self._engine.slots
        if self._job.rows_left > _LAST * slots * _WORKERS:
            return 0
        rows, workers = self._job.unclaimed()
        rows += len(self._queue)
        return -(-rows // workers) if rows <= _LAST * slots * workers else 0

    def _enqueue(self, source: Row, shard: _Shard, index: int) -> None:
        row = prepare_row(
            source.data,
            where=source.where,
            defaults=self._job.defaults,
            codec=self._codec,
            limits=self._engine.limits,
            problem=source.problem,
            repeats=source.repeats,
        )
        if isinstance(row, BadRow):
            self._finish_line(shard, index, error_line(row), failed=True)
            return
        work = _Row(row, shard, index, [None] * row.request.params.n)
        self._queue.extend(_Sequence(work, sample) for sample in range(row.request.params.n))

    def _turn(self) -> None:
        """Fills the free slots, advances, and takes in what came; an exception makes every slot a suspect."""
        try:
            self._fill()
            look = self._engine.advance()
        except Exception as error:  # whatever the engine raises, the other rows must go on
            self._isolate(error)
            return
        self._counts["steps"] += look.steps
        for event in look.events:
            self._take(event)
        self._job.touch()
        if self._progress is not None:
            self._progress(self._now())

    def _fill(self) -> None:
        self._alone = self._alone and bool(self._slots)
        if self._alone:
            return
        if self._suspects:
            if self._slots:
                return
            self._alone = True
            waiting = deque([self._suspects.pop()])
        else:
            waiting = self._queue
        admissions = []
        for slot in range(self._engine.slots):
            if slot in self._slots or not waiting:
                continue
            sequence = self._slots[slot] = waiting.popleft()
            request = sequence.row.prepared.request
            seed = self._job.manifest.run_seed if request.params.seed is None else request.params.seed
            key = row_key(seed, request.id, sequence.sample)
            admissions.append(Admission(slot, sequence.row.prepared, key))
            if request.params.stop:
                sequence.cut = CutText(self._codec.decode, request.params.stop)
        if admissions:
            self._engine.admit(admissions)

    def _isolate(self, error: Exception) -> None:
        """Finds the row behind an exception: the slots' sequences begin again, one at a time, the newest first."""
        message = f"engine: {type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
        self._engine.reset()
        sequences, self._slots = list(self._slots.values()), {}
        if self._alone:
            self._alone = False
            self._accused.append((sequences[0].row, message))
            self._drop(sequences[0].row)
            failures = len(self._accused)
            if failures >= (self._most_failures if self._answered else min(3, self._most_failures)):
                raise JobError(f"the engine failed on {failures} rows one after another; the last: {message}")
            self._queue.extendleft(self._suspects)
            self._suspects = []
        else:
            self._suspects += [sequence.restarted() for sequence in sequences if not sequence.row.failed]

    def _drop(self, row: _Row) -> None:
        """Forgets the row's sequences."""
        row.failed = True
        self._queue = deque(s for s in self._queue if s.row is not row)
        self._suspects = [s for s in self._suspects if s.row is not row]
        for slot in [slot for slot, s in self._slots.items() if s.row is row]:
            self._release(slot)

    def _judge(self) -> None:
        """Gives accused rows their errors: the engine has worked since, or there is nothing left to try it on."""
        accused, self._accused = self._accused, []
        for row, message in accused:
            self._fail(row, message)

    def _fail(self, row: _Row, message: str) -> None:
        request = row.prepared.request
        self._finish_line(row.shard, row.index, error_line(BadRow(request.id, message, request.form)), failed=True)

    def _release(self, slot: int) -> None:
        del self._slots[slot]
        self._engine.release(slot)

    def _take(self, event: Event) -> None:
        """Takes in one slot's new tokens, up to where its answer ends."""
        sequence = self._slots.get(event.slot)
        if sequence is None:  # a sample of a row that failed in this same look
            return
        if event.finished == "error":
            del self._slots[event.slot]
            self._drop(sequence.row)
            self._fail(sequence.row, f"engine: {event.error}")
            return
        for index, token in enumerate(event.tokens):
            ends = event.finished == "stop" and index == len(event.tokens) - 1
            sequence.tokens.append(token)
            if event.logprobs is not None:
                sequence.logprobs.append(event.logprobs[index])
            if event.top is not None:
                sequence.top.append(event.top[index])
            if not ends and self._meets_stop(sequence, token):
                if event.finished is None:
                    self._release(event.slot)
                else:
                    del self._slots[event.slot]
                self._finish(sequence, "stop", sequence.text)
                return
        if event.finished is not None:
            del self._slots[event.slot]
            self._end(sequence, event.finished)

    def _meets_stop(self, sequence: _Sequence, token: int) -> bool:
        if sequence.cut is None:
            return False
        may_stop = len(sequence.tokens) >= sequence.row.prepared.request.params.min_tokens
        sequence.text += sequence.cut.push(token, may_stop=may_stop)
        return sequence.cut.stopped

    def _end(self, sequence: _Sequence, reason: str) -> None:
        """Ends a sequence that the engine finished; a stop string may still hide in the last unfinished character."""
        if sequence.cut is not None:
            rest = sequence.cut.end()
            if sequence.cut.stopped:
                self._finish(sequence, "stop", sequence.text + rest)
                return
        tokens = sequence.tokens[:-1] if reason == "stop" else sequence.tokens
        self._finish(sequence, reason, self._codec.decode(tokens))

    def _finish(self, sequence: _Sequence, reason: str, text: str) -> None:
        row, params = sequence.row, sequence.row.prepared.request.params
        self._answered = True
        self._judge()
        logprobs = tuple(sequence.logprobs) if params.logprobs is not None else None
        top = tuple(entry[: params.logprobs] for entry in sequence.top) if params.logprobs else None
        row.samples[sequence.sample] = Sample(text, reason, tuple(sequence.tokens), logprobs, top)
        self._counts["completion_tokens"] += len(sequence.tokens)
        samples = [sample for sample in row.samples if sample is not None]
        if len(samples) == len(row.samples):
            self._counts["prompt_tokens"] += len(row.prepared.tokens)
            self._finish_line(row.shard, row.index, answer_line(row.prepared, samples, self._codec), failed=False)

    def _finish_line(self, shard: _Shard, index: int, line: bytes, *, failed: bool) -> None:
        shard.lines[index] = line
        self._counts["rows"] += 1
        self._counts["errors"] += failed
        lines = [line for line in shard.lines if line is not None]
        if len(lines) == len(shard.lines):
            self._job.commit(shard.claim, lines)
            self._open -= 1


@contextmanager
def stop_on(*signals: signal.Signals) -> Iterator[Callable[[], bool]]:
    """A question that turns true when one of the signals (SIGTERM by default) arrives; the second one kills."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in signals or (signal.SIGTERM,)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
