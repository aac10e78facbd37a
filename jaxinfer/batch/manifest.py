"""What a batch job is: its inputs, their shards, what the answers depend on, and the constants of its executable.

The manifest is made once, by the first worker and read by all others and by every later run. Making it reads the
whole input once: ids that repeat are found, rows are surveyed for what the engine must have room for, and each
shard's records are digested so that an input that changes under a running job is noticed.

Stability: internal.
"""

import dataclasses
import hashlib
import json
import secrets
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.batch import files
from jaxinfer.batch.params import SamplingParams
from jaxinfer.batch.requests import BadRow, Codec, Request, encode_prompt, encode_source, identity, parse_row
from jaxinfer.errors import InputError, JaxinferError, JobError

FORMAT = 1
SHARD_ROWS = 64
_SHARD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Input:
    """An input file as it was when the job began."""

    name: str
    size: int
    digest: str
    rows: int


@dataclass(frozen=True)
class Shard:
    """A run of rows of one file that is committed as a whole. `repeated`: (row, where its id was first)."""

    index: int
    file: int
    first: int
    offset: int
    rows: int
    digest: str
    repeated: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Survey:
    """What the rows ask for: the engine's shapes follow from it. Lengths are 0 when nothing counted the tokens."""

    rows: int = 0
    bad: int = 0  # rows that cannot be served
    sequences: int = 0  # the others' samples
    prompt_tokens: int = 0  # of the longest prompt
    length: int = 0  # of the longest prompt and its answer together
    max_tokens: int = 0
    bias: int = 0
    forced: int = 0
    stop_ids: int = 0
    top_logprobs: int = 0
    source: int = 0  # tokens of the longest text that an answer edits
    used: frozenset[str] = frozenset()  # parameters that some row sets to other than the default

    def add(self, row: Request, prompt_tokens: int, source: int = 0) -> "Survey":
        p = row.params
        return Survey(
            rows=self.rows + 1,
            bad=self.bad,
            sequences=self.sequences + p.n,
            prompt_tokens=max(self.prompt_tokens, prompt_tokens),
            length=max(self.length, prompt_tokens + p.max_tokens if prompt_tokens else 0),
            max_tokens=max(self.max_tokens, p.max_tokens),
            bias=max(self.bias, len(p.logit_bias) + len(p.banned_tokens) + 2 * len(p.bad_words)),
            forced=max(self.forced, len(p.forced_tokens)),
            stop_ids=max(self.stop_ids, len(p.stop_token_ids)),
            top_logprobs=max(self.top_logprobs, p.logprobs or 0),
            source=max(self.source, source),
            used=self.used | p.changed().keys(),
        )


@dataclass(frozen=True)
class Manifest:
    """A job. `fingerprint` is what the answers depend on; `settings` are constants chosen when the job began."""

    nonce: str
    inputs: tuple[Input, ...]
    shards: tuple[Shard, ...]
    fingerprint: Mapping[str, Any]
    run_seed: int
    settings: Mapping[str, Any]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> bytes:
        body = {
            "format": FORMAT,
            "nonce": self.nonce,
            "run_seed": self.run_seed,
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "inputs": [vars(i) for i in self.inputs],
            "shards": [[s.file, s.first, s.offset, s.rows, s.digest, s.repeated] for s in self.shards],
        }
        return json.dumps(body, indent=None).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> "Manifest":
        try:
            body = json.loads(data)
            if body["format"] != FORMAT:
                raise JobError(f"{path}: got format {body['format']!r}; accepted: {FORMAT} (another jaxinfer wrote it)")
            shards = tuple(
                Shard(index, file, first, offset, rows, digest, tuple((number, where) for number, where in repeated))
                for index, (file, first, offset, rows, digest, repeated) in enumerate(body["shards"])
            )
            inputs = tuple(Input(**i) for i in body["inputs"])
            nonce, fingerprint, settings = body["nonce"], body["fingerprint"], body["settings"]
            return cls(nonce, inputs, shards, fingerprint, int(body["run_seed"]), settings)
        except (ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"{path}: got a damaged manifest ({type(error).__name__}: {error}); "
                "accepted: a whole one. --force-new puts this job aside and begins a new one"
            ) from None


def make(
    inputs: Sequence[Path],
    *,
    defaults: SamplingParams,
    fingerprint: Mapping[str, Any],
    seed: int | None,
    settings: Callable[[Survey], Mapping[str, Any]],
    codec: Codec | None = None,
    max_length: int | None = None,
    shard_rows: int = SHARD_ROWS,
    longest: int = files.LONGEST_LINE,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Reads the inputs and plans the job. With `codec`, prompts are tokenized to learn their lengths.

    A prompt of `max_length` tokens or more leaves no room for an answer: such a row is surveyed as bad, so that one
    of them does not widen every slot.

    Without `seed` the run's seed, for rows that have none, follows from the inputs, so that the same job gives the
    same file again.
    Raises InputError for an input that cannot be read to its end.
    """
    names = files.names_of(inputs)
    survey, ids, numbers = Survey(), bytearray(), array("Q")
    shards: list[Shard] = []
    sources: list[Input] = []
    for file, (path, name) in enumerate(zip(inputs, names, strict=True)):
        pending: list[files.Record] = []
        size, before = 0, len(numbers)
        for record in files.read(path, longest=longest):
            if len(pending) == shard_rows or size > _SHARD_BYTES:
                shards.append(_shard(len(shards), file, pending))
                size, pending = 0, []
            pending.append(record)
            size += len(record.data)
            where = f"{name}:{record.number}"
            row = parse_row(record.data, where=where, defaults=defaults, problem=record.problem)
            ids += hashlib.blake2b(identity(row.id), digest_size=16).digest()
            numbers.append(record.number)
            survey = _surveyed(survey, row, codec, max_length)
            if progress is not None:
                progress(len(numbers))
        if pending:
            shards.append(_shard(len(shards), file, pending))
        sources.append(Input(name, path.stat().st_size, files.digest(path), len(numbers) - before))
    if not numbers:
        raise InputError(f"input {', '.join(map(str, inputs))}: got no rows; accepted: at least one")
    if seed is None:
        seed = int.from_bytes(hashlib.sha256("".join(i.digest for i in sources).encode()).digest()[:7], "big")
    return Manifest(
        nonce=secrets.token_hex(6),
        inputs=tuple(sources),
        shards=_with_repeats(shards, names, bytes(ids), numbers),
        fingerprint=canonical(fingerprint),
        run_seed=seed,
        settings=canonical(settings(survey)),
    )


def canonical(value: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping as it looks after a trip through JSON."""
    return json.loads(json.dumps(value, sort_keys=True))


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What changed between two fingerprints, one line for each value: "temperature: begun with 0, now 0.5"."""
    if isinstance(before, dict) and isinstance(now, dict):
        out: list[str] = []
        for key in sorted(before.keys() | now.keys()):
            out += differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return out
    return [] if before == now else [f"{name}: begun with {json.dumps(before)}, now {json.dumps(now)}"]


def _shard(index: int, file: int, records: Sequence[files.Record]) -> Shard:
    return Shard(index, file, records[0].number, records[0].start, len(records), files.digest_records(records))


def _surveyed(survey: Survey, row: Request | BadRow, codec: Codec | None, max_length: int | None) -> Survey:
    if isinstance(row, Request):
        try:
            tokens = len(encode_prompt(row, codec)) if codec is not None else 0
            if max_length is None or tokens < max_length:
                return survey.add(row, tokens, len(encode_source(row, codec)) if codec is not None else 0)
        except JaxinferError:
            pass
    return dataclasses.replace(survey, rows=survey.rows + 1, bad=survey.bad + 1)


def _with_repeats(
    shards: Sequence[Shard], names: Sequence[str], ids: bytes, numbers: Sequence[int]
) -> tuple[Shard, ...]:
    """The shards with the rows whose id an earlier row has. The first row keeps the id."""
    halves = np.frombuffer(ids, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: rows of one id stay in input order
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    first_of_run = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    first = {int(order[i]): int(order[first_of_run[i]]) for i in np.flatnonzero(same)}
    starts = np.cumsum([0, *(shard.rows for shard in shards)])

    def where(row: int) -> str:
        shard = shards[int(np.searchsorted(starts, row, side="right")) - 1]
        return f"{names[shard.file]}:{numbers[row]}"

    out = []
    for shard, start in zip(shards, starts, strict=False):
        rows = range(int(start), int(start) + shard.rows)
        repeated = tuple((numbers[row], where(first[row])) for row in rows if row in first) if first else ()
        out.append(dataclasses.replace(shard, repeated=repeated))
    return tuple(out)
