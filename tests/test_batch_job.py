"""The job's folder: each row once, in order, whatever is killed and whoever works on it; no file of the user's lost."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxinfer.batch import job as jobs
from jaxinfer.batch.leases import Disk, Leases, Process, Scratch
from jaxinfer.errors import InputError, JobError
from tests import batch_fakes as fakes

HERE = Path(__file__).parent


def write_rows(path, count=60, start=0):
    """Rows of every kind: greedy, sampled with and without a seed, with stops, broken."""
    with path.open("w") as file:
        for i in range(start, start + count):
            row = {"id": f"row {i}", "prompt": f"prompt {i}", "max_tokens": 1 + i * 7 % 40, "temperature": i % 2}
            row |= {"seed": i} if i % 4 == 1 else {}
            row |= {"stop": ["ab", "q"]} if i % 5 == 0 else {}
            row |= {"temperature": -1} if i % 11 == 0 else {}
            file.write("{broken\n" if i % 17 == 0 else json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("in") / "in.jsonl")


@pytest.fixture(scope="module")
def undisturbed(rows, tmp_path_factory):
    outcome, output = fakes.run(tmp_path_factory.mktemp("out") / "out.jsonl", [rows])
    assert outcome.totals.rows == 60
    return output


def worker(output, *inputs, **options):
    words = [w for name, value in options.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, str(HERE / "batch_fakes.py"), str(output), *map(str, inputs), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ends(process, code):
    text, _ = process.communicate(timeout=60)
    assert process.returncode == code, text


def test_every_row_once_and_in_order(rows, undisturbed):
    answers = [json.loads(line) for line in undisturbed.splitlines()]
    sources = rows.read_text().splitlines()
    assert len(answers) == len(sources)
    for number, (answer, source) in enumerate(zip(answers, sources, strict=True), 1):
        if source == "{broken":
            assert answer["id"] == f"in.jsonl:{number}" and answer["error"].startswith("row: got no JSON")
            continue
        row = json.loads(source)
        assert answer["id"] == row["id"]
        if row["temperature"] < 0:
            assert list(answer) == ["id", "error"] and answer["error"].startswith("temperature: got -1")
        else:
            assert list(answer) == ["id", "text", "finish_reason", "usage"]


DEATHS = [
    "manifest:writing:1",
    "manifest:written:1",  # between write and link: no manifest
    "manifest:linked:1",
    "lease-00002:linked:1",
    "part-00003:writing:2",
    "part-00003:written:1",  # between write and commit
    "part-00003:linked:1",  # committed, lease still there
    "output:writing:1",
    "output:written:1",
    "output:linked:1",  # the output is in place, done.json is not
    "done:linked:1",  # done, work folder still there
]


@pytest.fixture(scope="module")
def killed(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(HERE / "batch_fakes.py"), str(folder), str(rows), "--each", *DEATHS]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return folder


@pytest.mark.parametrize("death", DEATHS)
def test_killed_at_any_point_and_resumed_the_file_is_the_same(death, killed, rows, undisturbed):
    output = killed / death / "out.jsonl"
    outcome, resumed = fakes.run(output, [rows])
    assert resumed == undisturbed
    assert outcome.totals.rows == 60
    assert sorted(p.name for p in jobs.folder_of(output).iterdir()) == ["done.json", "manifest.json", "report.json"]
    assert sorted(p.name for p in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.job"]


def test_two_workers_one_of_them_killed(rows, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    first = worker(output, rows, delay=0.01, die="part:written:2")
    second = worker(output, rows, delay=0.01)
    ends(first, -signal.SIGKILL)
    ends(second, 0)
    assert output.read_bytes() == undisturbed


def test_a_lost_lease_does_no_harm(rows, undisturbed, tmp_path):
    """Two workers on the same shard: the first commit stays, and both go on."""
    output = tmp_path / "out.jsonl"
    one = fakes.open_job(output, [rows], shard_rows=8, lease_seconds=0.0)
    two = fakes.open_job(output, [rows], shard_rows=8, lease_seconds=0.0)
    claim = one.claim()
    again = two.claim()
    assert again.shard.index == claim.shard.index == 0
    one.commit(claim, [b'{"id": "first"}\n'] * 8)
    two.commit(again, [b'{"id": "second"}\n'] * 8)
    assert one.part(0).read_bytes() == b'{"id": "first"}\n' * 8


def test_sigterm_gives_the_shards_back(rows, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    process = worker(output, rows, delay=0.05)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    ends(process, 75)
    work = next(jobs.folder_of(output).glob("work-*"))
    assert list((work / "leases").iterdir()) == [] and list((work / "tmp").iterdir()) == []
    assert not output.exists()
    ends(worker(output, rows), 0)
    assert output.read_bytes() == undisturbed


def test_a_finished_job_runs_nothing_again(rows, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    fakes.run(output, [rows])
    engine = fakes.FakeEngine()
    outcome, again = fakes.run(output, [rows], engine=engine)
    assert again == undisturbed and engine.made == 0 and outcome.totals.rows == 60
    output.rename(tmp_path / "kept.jsonl")
    with pytest.raises(JobError, match="was finished and its output is gone"):
        fakes.open_job(output, [rows])


def test_what_changed_is_named_and_nothing_is_deleted(rows, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    fakes.run(output, [rows])
    changed = {"model": "other", "versions": {"jaxinfer": "1"}}
    with pytest.raises(JobError, match='model: begun with "fake", now "other"; versions.jaxinfer: begun with "0"'):
        fakes.open_job(output, [rows], fingerprint=changed)
    with pytest.raises(JobError, match="seed: begun with null, now 3"):
        fakes.open_job(output, [rows], seed=3)
    with pytest.raises(JobError, match="sampling.top_k: begun with null, now 5"):
        fakes.open_job(output, [rows], defaults=jobs.SamplingParams(top_k=5))
    other = write_rows(tmp_path / "in.jsonl", 61)
    with pytest.raises(JobError, match="other contents than in.jsonl had"):
        fakes.open_job(output, [other])
    _, new = fakes.run(output, [other], force_new=True)
    assert new.splitlines()[0] != undisturbed.splitlines()[1] and len(new.splitlines()) == 61
    assert (tmp_path / "out.jsonl.old-1").read_bytes() == undisturbed
    assert (tmp_path / "out.jsonl.job.old-1" / "manifest.json").exists()


def test_a_users_file_is_never_overwritten(rows, undisturbed, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(JobError, match="a file that is there already"):
        fakes.open_job(output, [rows])
    output.unlink()
    job = fakes.open_job(output, [rows], shard_rows=8)
    output.write_text("mine")  # while the job runs
    with pytest.raises(JobError, match="not this job's answers"):
        fakes.Runner(job, fakes.FakeEngine(), fakes.Codec()).run()
    assert output.read_text() == "mine"
    output.rename(tmp_path / "mine.txt")
    engine = fakes.FakeEngine()
    assert fakes.run(output, [rows], engine=engine)[1] == undisturbed and engine.made == 0


def test_damage_is_named(rows, tmp_path):
    output = tmp_path / "out.jsonl"
    job = fakes.open_job(output, [rows])
    manifest = jobs.folder_of(output) / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:100])
    with pytest.raises(JobError, match="manifest.json: got a damaged manifest"):
        fakes.open_job(output, [rows])
    manifest.write_bytes(whole.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(JobError, match="got format 9; accepted: 1"):
        fakes.open_job(output, [rows])
    manifest.write_bytes(whole)
    job.part(0).write_bytes(b"{}\n")
    with pytest.raises(JobError, match=r"00000.jsonl: got 1 lines; accepted: 60 whole ones"):
        job.assemble()
    with pytest.raises(JobError, match="got 1 answers; accepted: 60"):
        job.commit(jobs.Claim(job.manifest.shards[0], None), [b"{}\n"])


def test_an_input_that_changes_under_the_job_is_noticed(tmp_path):
    path = write_rows(tmp_path / "in.jsonl")
    job = fakes.open_job(tmp_path / "out.jsonl", [path])
    path.write_text(path.read_text().replace("prompt 1", "PROMPT 1"))
    with pytest.raises(JobError, match="got other rows from row 1 on"):
        job.rows(job.claim())
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(InputError, match="got no rows"):
        fakes.open_job(tmp_path / "other.jsonl", [empty])
    with pytest.raises(JobError, match="got no folder"):
        fakes.open_job(tmp_path / "no" / "out.jsonl", [path])


def test_a_worker_of_a_job_put_aside_stops(rows, tmp_path):
    output = tmp_path / "out.jsonl"
    old = fakes.open_job(output, [rows], shard_rows=8)
    claim = old.claim()
    new = fakes.open_job(output, [rows], shard_rows=8, force_new=True)
    with pytest.raises(JobError, match="put aside while this worker was at work"):
        old.commit(claim, [b"{}\n"] * 8)
    assert new.rows_committed() == 0


def test_ids_that_repeat_across_shards_and_files(tmp_path):
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = [{"id": i % 7, "prompt": f"p{i}", "max_tokens": 2} for i in range(20)]
    one.write_text("".join(json.dumps(line) + "\n" for line in lines))
    two.write_text(
        '{"id": 3, "prompt": "x"}\n{"id": "3", "prompt": "x"}\n{"custom_id": "3", "body": {"prompt": "x"}}\n'
    )
    _, output = fakes.run(tmp_path / "out.jsonl", [one, two], shard_rows=4)
    answers = [json.loads(line) for line in output.splitlines()]
    assert ["error" in a for a in answers[:20]] == [False] * 7 + [True] * 13
    assert answers[9] == {"id": 2, "error": "id: got 2, which a.jsonl:3 has; accepted: new ids"}
    assert answers[20]["error"] == "id: got 3, which a.jsonl:4 has; accepted: new ids"
    assert "text" in answers[21]  # "3" is not 3
    assert answers[22]["error"]["message"] == "custom_id: got '3', which b.jsonl:2 has; accepted: new ids"


def test_compressed_input_and_output_hold_the_same(rows, undisturbed, tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(rows.read_bytes()))
    _, output = fakes.run(tmp_path / "out.jsonl.gz", [path], seed=5)
    _, plain = fakes.run(tmp_path / "out.jsonl", [rows], seed=5)
    _, again = fakes.run(tmp_path / "again.jsonl.gz", [path], seed=5)
    assert output == again
    assert gzip.decompress(output).replace(b"jsonl.gz:", b"jsonl:") == plain
    assert plain != undisturbed  # another seed, other samples


def test_rows_are_checked_without_a_job(rows, undisturbed, tmp_path):
    checked = list(jobs.check_rows([rows], defaults=jobs.SamplingParams(), codec=fakes.Codec(), limits=fakes.LIMITS))
    answers = [json.loads(line) for line in undisturbed.splitlines()]
    assert [getattr(row, "error", None) for _, row in checked] == [answer.get("error") for answer in answers]
    assert [where for where, _ in checked] == [f"in.jsonl:{number}" for number in range(1, 61)]


def leases(folder, seconds=10.0, process=None, clock=time.monotonic):
    for name in ("leases", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    return Leases(folder / "leases", Scratch(folder / "tmp", process or Process.this()), Disk(), seconds, clock)


def test_a_lease_of_a_dead_process_is_taken_at_once(tmp_path):
    sleeper = subprocess.Popen(["sleep", "60"])
    this = Process.this()
    stat = Path(f"/proc/{sleeper.pid}/stat").read_text().rsplit(")", 1)[1].split()
    other = Process(this.host, sleeper.pid, stat[19])
    assert leases(tmp_path, process=other).claim("0") is not None
    mine = leases(tmp_path)
    assert mine.claim("0") is None
    orphan = Scratch(tmp_path / "tmp", other).new("part")
    orphan.write_text("half")
    assert mine.scratch.sweep() == 0
    sleeper.kill()
    sleeper.wait()
    assert Process(this.host, os.getpid(), "another start").is_dead() and not this.is_dead()
    assert mine.claim("0") is not None
    assert mine.scratch.sweep() == 1 and not orphan.exists()


def test_a_lease_from_elsewhere_is_taken_when_it_was_watched_untouched(tmp_path):
    """Neither a clock ahead nor one behind makes a living lease look dead."""
    now = [0.0]
    theirs = leases(tmp_path, process=Process("another host", 1, "1"))
    lease = theirs.claim("0")
    mine = leases(tmp_path, seconds=10, clock=lambda: now[0])
    for skew in (-1e6, 0, 1e6):
        os.utime(lease.path, (time.time() + skew,) * 2)
        now[0] += 9
        assert mine.claim("0") is None
    now[0] += 9
    assert mine.claim("0") is None
    lease.touch()
    now[0] += 9
    assert mine.claim("0") is None
    now[0] += 11
    stolen = mine.claim("0")
    assert stolen is not None
    lease.touch()  # the zombie touches its own file, not its successor's
    lease.release()
    assert stolen.path.exists() and list((tmp_path / "tmp").iterdir()) == []
    stolen.release()
    assert not stolen.path.exists()


def test_a_living_lease_buried_by_mistake_is_put_back(tmp_path):
    """Between the look and the rename another worker took the stale lease and holds a new one."""
    now = [0.0]
    leases(tmp_path, process=Process("another host", 1, "1")).claim("0")
    slow, quick = (leases(tmp_path, seconds=10, clock=lambda: now[0]) for _ in range(2))
    assert slow.claim("0") is None and quick.claim("0") is None
    now[0] += 11
    held = quick.claim("0")
    assert slow._bury("0", tmp_path / "leases" / "0") is False
    content = json.loads(held.path.read_bytes())
    assert content["pid"] == os.getpid() and os.fstat(held.handle).st_ino == held.path.stat().st_ino


@pytest.mark.slow
def test_two_thousand_prompts_killed_ten_times(tmp_path):
    rows = write_rows(tmp_path / "in.jsonl", 2000)
    _, undisturbed = fakes.run(tmp_path / "calm.jsonl", [rows], engine=fakes.FakeEngine(slots=32))
    output = tmp_path / "out.jsonl"
    for kill in range(10):
        if kill % 3 == 1:
            ends(worker(output, rows, slots=32, delay=0.01, die="part:written:2"), -signal.SIGKILL)
            continue
        process = worker(output, rows, slots=32, delay=0.01)
        time.sleep(0.2 + 0.06 * kill)
        process.kill()
        ends(process, -signal.SIGKILL)  # it had not finished: ten processes really died
    ends(worker(output, rows, slots=32), 0)
    assert output.read_bytes() == undisturbed


@pytest.mark.parametrize("max_length, longest, bad", [(700, 50, 1), (None, 2017, 0)])
def test_one_overlong_prompt_does_not_widen_every_slot(tmp_path, max_length, longest, bad):
    """It will be an error row, so it is no reason for slots of its length; without the model's length it counts."""
    rows = tmp_path / "rows.jsonl"
    prompts = ["a" * 33, "b" * 2000, "c"]
    rows.write_text("".join(json.dumps({"id": i, "prompt": p, "max_tokens": 16}) + "\n" for i, p in enumerate(prompts)))
    seen = []
    options = {"codec": fakes.Codec(), "max_length": max_length, "settings": lambda survey: seen.append(survey) or {}}
    fakes.open_job(tmp_path / "out.jsonl", [rows], **options)
    [survey] = seen
    assert (survey.length, survey.bad) == (longest, bad)
