"""A batch job on disk: every row answered exactly once, in order, whatever is killed and whoever works on it.

Beside the output `answers.jsonl` stands the folder `answers.jsonl.job`:

    manifest.json          the job (manifest.py); written once, by whoever comes first
    work-<nonce>/leases/   which worker has which shard (leases.py)
    work-<nonce>/tmp/      files being written
    work-<nonce>/parts/    00000.jsonl ...: the committed answers of each shard
    done.json              the output is complete; written last, after which work-<nonce> is removed
    report.json            what the last worker measured

A part, the manifest, the output and done.json are each written under a temporary name, synced, and then linked to
their own name, which fails where the name is taken: so each of them is whole or absent, and the first one wins. A
kill at any moment loses at most the shards in work. The folder's name in `work-<nonce>` keeps a worker of a job that
was put aside (--force-new) from writing into its successor.

Stability: experimental.
"""

import filecmp
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxinfer.batch import answers, files, manifest
from jaxinfer.batch.leases import Disk, Lease, Leases, Process, Scratch
from jaxinfer.batch.manifest import Manifest, Shard
from jaxinfer.batch.params import SamplingParams
from jaxinfer.batch.requests import BadRow, Codec, Limits, Prepared, prepare_row
from jaxinfer.errors import JobError

LEASE_SECONDS = 300.0


@dataclass(frozen=True)
class Row:
    """An input row of a claimed shard: its place "file:line", its JSON, and what is wrong with it already."""

    where: str
    data: bytes
    problem: str | None
    repeats: str | None  # where its id was first, when it is not the first


@dataclass(frozen=True)
class Claim:
    """A shard that this worker holds."""

    shard: Shard
    lease: Lease


@dataclass(frozen=True)
class Totals:
    """What the finished output holds."""

    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Job:
    """An open job. `open` makes or resumes one; then claim, commit, and at last `assemble`."""

    output: Path
    inputs: Sequence[Path]
    manifest: Manifest
    defaults: SamplingParams = SamplingParams()
    disk: Disk = field(default_factory=Disk)
    lease_seconds: float = LEASE_SECONDS
    longest: int = files.LONGEST_LINE

    def __post_init__(self) -> None:
        self.folder = folder_of(self.output)
        self.work = self.folder / f"work-{self.manifest.nonce}"
        if not self.finished:
            for name in ("leases", "tmp", "parts"):
                (self.work / name).mkdir(parents=True, exist_ok=True)
        self._scratch = Scratch(self.work / "tmp", Process.this())
        self._scratch.sweep()
        self._leases = Leases(self.work / "leases", self._scratch, self.disk, self.lease_seconds)
        self._cursor = files.Cursor(self.inputs, longest=self.longest)
        self._held: list[Claim] = []
        self._committed: set[int] = set()
        self._rows_known = 0  # in them
        self._first = 0  # shards before this one are committed
        self._touched = time.monotonic()
        if self.finished:
            shutil.rmtree(self.work, ignore_errors=True)

    @property
    def finished(self) -> bool:
        """Whether the output is complete and in its place."""
        return (self.folder / "done.json").exists()

    def part(self, shard: int) -> Path:
        return self.work / "parts" / f"{shard:05d}.jsonl"

    def rows_committed(self) -> int:
        """Rows in committed shards, this worker's and the others'."""
        for shard in self.manifest.shards:
            if shard.index not in self._committed and self.part(shard.index).exists():
                self._know(shard)
        return self._rows_known

    @property
    def all_committed(self) -> bool:
        return self.finished or self.rows_committed() == self.manifest.rows

    def unclaimed(self) -> tuple[int, int]:
        """(rows that nobody has claimed or committed, workers that hold a lease or are this one)."""
        try:
            leases = self._leases.held()
        except FileNotFoundError:  # others have finished the job
            return 0, 1
        owners = set(leases.values()) if self._held else {*leases.values(), b"this"}
        shards = self.manifest.shards[self._first :]
        free = (s.rows for s in shards if s.index not in self._committed and f"{s.index:05d}" not in leases)
        return sum(free), max(1, len(owners))

    @property
    def rows_left(self) -> int:
        """Rows that are neither held here nor known to be committed; cheap."""
        return self.manifest.rows - self._rows_known - sum(claim.shard.rows for claim in self._held)

    def claim(self) -> Claim | None:
        """The first shard that is neither committed nor held by a living worker; None when there is none now."""
        if self.finished:
            return None
        held = {claim.shard.index for claim in self._held}
        while self._first < len(self.manifest.shards) and self._first in self._committed:
            self._first += 1
        for shard in self.manifest.shards[self._first :]:
            if shard.index in self._committed or shard.index in held:
                continue
            if self.part(shard.index).exists():
                self._know(shard)
                continue
            try:
                lease = self._leases.claim(f"{shard.index:05d}")
            except FileNotFoundError:
                if self.finished:
                    return None
                raise self._gone() from None
            if lease is not None:
                if self.finished or self.part(shard.index).exists():  # committed between the look and the claim
                    lease.release()
                    continue
                claim = Claim(shard, lease)
                self._held.append(claim)
                return claim
        return None

    def rows(self, claim: Claim) -> list[Row]:
        """The shard's input rows. Raises JobError when the input is no longer what the job was planned from."""
        return _rows(self.manifest, claim.shard, self._cursor)

    def touch(self) -> None:
        """Keeps this worker's leases alive; cheap, to be called whenever there was progress."""
        if time.monotonic() - self._touched > self.lease_seconds / 10:
            for claim in self._held:
                claim.lease.touch()
            self._touched = time.monotonic()

    def commit(self, claim: Claim, lines: Sequence[bytes]) -> None:
        """Makes the shard's answers final: one line a row, in input order. The first commit of a shard wins."""
        shard = claim.shard
        if len(lines) != shard.rows:
            raise JobError(f"shard {shard.index}: got {len(lines)} answers; accepted: {shard.rows}, one for each row")
        temporary = self._scratch.new(f"part-{shard.index:05d}")
        try:
            self.disk.write(temporary, lines)
            self.disk.link(temporary, self.part(shard.index))
        except FileNotFoundError:  # the work folder is gone: others finished the job, or it was put aside
            if not self.finished:
                raise self._gone() from None
        self._know(shard)
        self._held.remove(claim)
        claim.lease.release()

    def abandon(self) -> int:
        """Gives back every shard that is held and not committed; returns how many."""
        abandoned, self._held = self._held, []
        for claim in abandoned:
            claim.lease.release()
        return len(abandoned)

    def assemble(self) -> Totals | None:
        """Joins the parts into the output, in input order; None while another worker is at it.

        Raises JobError when a file that is not this job's answers stands at the output's name; nothing is lost then.
        """
        if self.finished:
            shutil.rmtree(self.work, ignore_errors=True)
            return self.totals()
        if self.rows_committed() != self.manifest.rows:
            raise JobError(f"{self.folder}: got {self.rows_committed()} committed rows; accepted: all rows")
        lease = None
        try:
            lease = self._leases.claim("assemble")
            if lease is None:
                return None
            self._assemble(lease)
        except FileNotFoundError:
            if not self.finished:
                raise self._gone() from None
        finally:
            if lease is not None:
                lease.release()
        shutil.rmtree(self.work, ignore_errors=True)
        return self.totals()

    def totals(self) -> Totals:
        """Counts of the finished output."""
        return Totals(**json.loads((self.folder / "done.json").read_bytes()))

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Puts the report beside the manifest (the last one stays)."""
        temporary = self.folder / f"report.json.{os.getpid()}.tmp"
        temporary.write_bytes(json.dumps(report, indent=1).encode() + b"\n")
        os.replace(temporary, self.folder / "report.json")

    def _assemble(self, lease: Lease) -> None:
        counts = {"rows": 0, "errors": 0, "prompt_tokens": 0, "completion_tokens": 0}
        temporary = self._scratch.new("output")
        lines = self._lines(counts, lease)
        self.disk.write(temporary, _gzip(lines) if self.output.suffix.lower() == ".gz" else lines)
        if self._moved():
            raise self._gone()
        keep = self._scratch.new("output-copy")
        os.link(temporary, keep)
        if not self.disk.link(temporary, self.output) and not filecmp.cmp(keep, self.output, shallow=False):
            raise JobError(
                f"{self.output}: got a file that is not this job's answers; accepted: no file. Move it away and "
                "give the same command again: the answers are kept and will be put there"
            )
        done = self._scratch.new("done")
        self.disk.write(done, [json.dumps(counts).encode()])
        self.disk.link(done, self.folder / "done.json")

    def _lines(self, counts: dict[str, int], lease: Lease) -> Iterator[bytes]:
        for shard in self.manifest.shards:
            lines = self.part(shard.index).read_bytes().splitlines(keepends=True)
            if len(lines) != shard.rows or not lines[-1].endswith(b"\n"):
                raise JobError(
                    f"{self.part(shard.index)}: got {len(lines)} lines; accepted: {shard.rows} whole ones. The disk "
                    "damaged it: delete this file and give the same command again"
                )
            for line in lines:
                failed, prompt, completion = answers.tally(line)
                counts["rows"] += 1
                counts["errors"] += failed
                counts["prompt_tokens"] += prompt
                counts["completion_tokens"] += completion
            lease.touch()
            yield b"".join(lines)

    def _know(self, shard: Shard) -> None:
        """Remembers that a shard is committed."""
        if shard.index not in self._committed:
            self._committed.add(shard.index)
            self._rows_known += shard.rows

    def _moved(self) -> bool:
        """Whether the folder holds another job by now (--force-new while this worker ran)."""
        path = self.folder / "manifest.json"
        return not path.exists() or Manifest.from_json(path.read_bytes(), path).nonce != self.manifest.nonce

    def _gone(self) -> JobError:
        return JobError(f"{self.work}: the job's folder was removed or put aside while this worker was at work")


def folder_of(output: Path) -> Path:
    """The job's folder beside its output."""
    return output.with_name(output.name + ".job")


def open_job(
    output: Path,
    inputs: Sequence[Path],
    *,
    fingerprint: Mapping[str, Any],
    settings: Callable[[manifest.Survey], Mapping[str, Any]],
    defaults: SamplingParams | None = None,
    seed: int | None = None,
    codec: Codec | None = None,
    max_length: int | None = None,
    force_new: bool = False,
    shard_rows: int = manifest.SHARD_ROWS,
    lease_seconds: float = LEASE_SECONDS,
    longest: int = files.LONGEST_LINE,
    disk: Disk | None = None,
    progress: Callable[[int], None] | None = None,
) -> Job:
    """Begins a job, or resumes the one whose folder stands beside `output`.

    `fingerprint` names everything that the answers depend on besides the inputs (model, versions, device); the
    defaults and the seed are added to it. `settings` chooses the executable's constants from the survey of the rows
    (those whose prompt is shorter than `max_length`, where given), for the first worker only. Raises JobError when
    there is a job here of other inputs or another fingerprint (what changed is named), or a finished file;
    `force_new` puts both aside under a new name. Nothing is ever deleted.
    """
    disk = disk or Disk()
    defaults = defaults or SamplingParams()
    fingerprint = manifest.canonical({**fingerprint, "sampling": defaults.changed(), "seed": seed})
    files.check_inputs(inputs)
    folder = folder_of(output)
    if not output.parent.is_dir():
        raise JobError(f"output {output}: got no folder {output.parent}; accepted: a folder that exists")
    if output.is_dir() or (folder.exists() and not folder.is_dir()):
        raise JobError(f"output {output}: got a name that is in use; accepted: a new file, with a folder {folder.name}")
    if force_new:
        for path in (output, folder):
            put_aside(path)
    there = output.exists()  # looked at before the manifest: a job puts its output there only after its manifest
    path = folder / "manifest.json"
    fresh = not path.exists()
    if fresh:
        if there:
            raise JobError(
                f"output {output}: got a file that is there already, and no job of it in {folder.name}; accepted: a "
                "new name. --force-new puts it aside under another name"
            )
        made = manifest.make(
            inputs,
            defaults=defaults,
            fingerprint=fingerprint,
            seed=seed,
            settings=settings,
            codec=codec,
            max_length=max_length,
            shard_rows=shard_rows,
            longest=longest,
            progress=progress,
        )
        folder.mkdir(exist_ok=True)
        scratch = Scratch(folder, Process.this())
        scratch.sweep()
        temporary = scratch.new("manifest")
        disk.write(temporary, [made.to_json()])
        fresh = disk.link(temporary, path)
    plan = Manifest.from_json(path.read_bytes(), path)
    _check(plan, inputs, fingerprint, folder, digests=not fresh)
    job = Job(output, inputs, plan, defaults, disk, lease_seconds, longest)
    if job.finished and not output.exists():
        raise JobError(
            f"output {output}: this job was finished and its output is gone; accepted: the file in its place, or "
            "--force-new, which begins a new job"
        )
    return job


def check_rows(
    inputs: Sequence[Path],
    *,
    defaults: SamplingParams,
    codec: Codec,
    limits: Limits,
    longest: int = files.LONGEST_LINE,
) -> Iterator[tuple[str, Prepared | BadRow]]:
    """Every row's place and what a job would make of it, without a model and without writing anything."""
    files.check_inputs(inputs)
    plan = manifest.make(inputs, defaults=defaults, fingerprint={}, seed=0, settings=lambda survey: {}, longest=longest)
    cursor = files.Cursor(inputs, longest=longest)
    for shard in plan.shards:
        for row in _rows(plan, shard, cursor):
            options = {"defaults": defaults, "codec": codec, "limits": limits}
            yield row.where, prepare_row(row.data, where=row.where, problem=row.problem, repeats=row.repeats, **options)


def put_aside(path: Path) -> Path | None:
    """Renames a file or folder to the first free of `<name>.old-1`, `.old-2` ...; None where there is none."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.rename(path, aside)
    return aside


def _rows(plan: Manifest, shard: Shard, cursor: files.Cursor) -> list[Row]:
    records = cursor.take(shard.file, shard.first, shard.offset, shard.rows)
    repeats, name = dict(shard.repeated), plan.inputs[shard.file].name
    if files.digest_records(records) != shard.digest:
        raise JobError(
            f"input {name}: got other rows from row {shard.first} on than when the job began; accepted: an input that "
            "stays as it is until the job is done"
        )
    return [Row(f"{name}:{r.number}", r.data, r.problem, repeats.get(r.number)) for r in records]


def _check(
    plan: Manifest, inputs: Sequence[Path], fingerprint: Mapping[str, Any], folder: Path, *, digests: bool
) -> None:
    changed = manifest.differences(plan.fingerprint, fingerprint)
    if len(inputs) != len(plan.inputs):
        changed.append(f"input: begun with {len(plan.inputs)} files, now {len(inputs)}")
    elif digests:
        for path, was in zip(inputs, plan.inputs, strict=True):
            if path.stat().st_size != was.size or files.digest(path) != was.digest:
                changed.append(f"input {path}: other contents than {was.name} had")
    if changed:
        raise JobError(
            f"{folder}: got a job that was begun otherwise ({'; '.join(changed)}); accepted: the same command again, "
            "another --output, or --force-new, which puts this job aside and begins a new one"
        )


def _gzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Compressed without a name or a time in the header, so that the same answers give the same bytes."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    for chunk in chunks:
        yield compressor.compress(chunk)
    yield compressor.flush()
