"""A batch job on Ray: a share of a job, the actor, and a cluster of two that gives the file of a plain worker."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.batch import ray_job
from jaxinfer.errors import ConfigError
from tests.batch_fakes import Codec, FakeEngine, open_job, run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"id": i, "prompt": f"row {i}", "max_tokens": 5 + i % 7, "temperature": i % 2} for i in range(60)]
    lines[17]["prompt"] = "poison later"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def expected(rows, tmp_path):
    """The file of a worker without Ray."""
    return run(tmp_path / "plain.jsonl", [rows])[1]


def parts(output, rows):
    """What an actor works with."""
    return open_job(output, [rows], shard_rows=8), FakeEngine(), Codec()


def worker(output, rows):
    return functools.partial(parts, output, rows)


def test_an_actor_answers_a_shard_a_ticket_and_the_last_one_ends_the_job(rows, expected, tmp_path):
    output = tmp_path / "out.jsonl"
    job = open_job(output, [rows], shard_rows=8)
    model = ray_job.Model(worker(output, rows))
    told = model({"id": np.arange(3)})
    assert {name: value.tolist() for name, value in told.items()}["rows"] == [24]
    assert job.rows_committed() == 24 and not output.exists()
    others = ray_job.Model(worker(output, rows))({"id": np.arange(5)})
    assert int(others["rows"][0]) == 36 and int(told["errors"][0] + others["errors"][0]) == 1
    assert output.read_bytes() == expected
    assert model({"id": np.arange(1)})["rows"].tolist() == [0]  # a ticket too many


def test_a_share_claims_no_more_than_it_may(rows, tmp_path):
    job = open_job(tmp_path / "out.jsonl", [rows], shard_rows=8)
    share = ray_job.Share(job, 2)
    assert not share.spent
    assert [share.claim() is None for _ in range(3)] == [False, False, True] and share.spent
    assert share.manifest is job.manifest  # a job in all else
    lone = ray_job.Share(open_job(tmp_path / "out.jsonl", [rows], shard_rows=8), 20)
    while lone.claim() is not None:
        pass
    assert lone.spent  # the other two are held: nothing is free


def test_the_test_of_shares_sees_one_without_an_end(rows, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_job.Share, "spent", property(lambda self: False))  # the planted bug
    monkeypatch.setattr(ray_job.Share, "claim", lambda self: self._job.claim())
    output = tmp_path / "out.jsonl"
    told = ray_job.Model(worker(output, rows))({"id": np.arange(3)})
    assert int(told["rows"][0]) != 24


def test_without_ray_the_error_names_the_extra(monkeypatch, rows, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "jaxinfer\[ray\]"'):
        ray_job.run(worker(tmp_path / "o", rows), open_job(tmp_path / "o", [rows]), workers=1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cluster_gives_the_same_file_and_goes_on_where_a_job_stopped(rows, expected, tmp_path):
    output = tmp_path / "ray.jsonl"
    ray_job.Model(worker(output, rows))({"id": np.arange(2)})  # a worker that stopped after two shards
    job, told = open_job(output, [rows], shard_rows=8), []
    assert job.rows_committed() == 16
    ray = ray_job.require_ray()
    here = {"env_vars": {"PYTHONPATH": str(ROOT)}}  # where actors find this file
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=here)
    try:
        totals = ray_job.run(
            worker(output, rows), job, workers=2, ticket_shards=2, progress=lambda *now: told.append(now)
        )  # fmt: skip
        assert ray.is_initialized()  # a Ray that ran before runs on
    finally:
        ray.shutdown()
    assert totals is not None and (totals.rows, totals.errors) == (60, 1)
    assert output.read_bytes() == expected
    assert told[-1] == (60, 60) and job.finished
