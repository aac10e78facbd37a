"""jaxinfer.measure, by fake clocks where a figure is claimed: what is timed, in which order, and what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import measure
from jaxinfer.errors import InputError
from jaxinfer.measure import host
from jaxinfer.measure import results as results_module

pytestmark = pytest.mark.smoke


class Clock:
    """A clock that stands still except when `work` or a wait spends time on it."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds(self) if callable(seconds) else seconds
            return name

        return call


def test_interleaved_counts_what_it_says():
    clock = Clock()
    first = iter([5.0])  # the first call compiles
    slow = clock.work("slow", lambda c: next(first, 2.0))
    timings = measure.interleaved(
        {"slow": slow, "fast": clock.work("fast", 0.5)}, rounds=3, warmup=2, clock=clock, wait=lambda x: x
    )
    assert timings["slow"].seconds == (2.0, 2.0, 2.0) and timings["slow"].first == 5.0
    assert timings["fast"].seconds == (0.5, 0.5, 0.5) and timings["fast"].median == 0.5
    assert clock.calls == ["slow", "slow", "fast", "fast"] + ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert measure.speedup(timings["slow"], timings["fast"]) == measure.Ratio(4.0, 4.0, 4.0)


def test_interleaved_shares_a_machine_that_slows_down():
    """A machine that becomes five times slower half-way changes both medians, and not the ratio."""
    clock = Clock()

    def pace(seconds):
        return lambda c: seconds * (5 if len(c.calls) > 12 else 1)

    timings = measure.interleaved(
        {"a": clock.work("a", pace(3.0)), "b": clock.work("b", pace(1.0))}, rounds=9, clock=clock, wait=lambda x: x
    )
    assert len(set(timings["a"].seconds)) == 2
    assert measure.speedup(timings["a"], timings["b"]).median == 3.0


def test_interleaved_waits_for_the_arrays():
    """The time that a call's arrays take to be ready is the call's."""
    clock = Clock()

    def wait(_):
        clock.now += 7.0

    assert measure.interleaved({"f": lambda: 1}, rounds=2, clock=clock, wait=wait)["f"].seconds == (7.0, 7.0)


def test_short_calls_are_repeated():
    clock = Clock()
    timing = measure.interleaved(
        {"f": clock.work("f", 0.01)}, rounds=2, warmup=1, min_seconds=0.095, clock=clock, wait=lambda x: x
    )["f"]
    assert timing.repeats == 10 and timing.median == pytest.approx(0.01)
    assert len(clock.calls) == 1 + 2 * 10


def test_timing_statistics():
    timing = measure.Timing((3.0, 1.0, 2.0, 5.0), first=9.0)
    assert (timing.median, timing.min, timing.quantile(1.0)) == (2.5, 1.0, 5.0)
    assert timing.row()["first_call_s"] == 9.0 and timing.row()["rounds"] == 4


@pytest.mark.parametrize("options", [{"rounds": 0}, {"warmup": 0}])
def test_interleaved_refuses(options):
    with pytest.raises(InputError):
        measure.interleaved({"f": lambda: 0}, **options)
    with pytest.raises(InputError):
        measure.interleaved({})


def test_speedup_refuses_unrelated_runs():
    with pytest.raises(InputError, match="2 and 1 rounds"):
        measure.speedup(measure.Timing((1.0, 1.0), 1.0), measure.Timing((1.0,), 1.0))


def test_latency_curve():
    clock = Clock()

    def step(size):
        clock.now += 1.0 + 0.5 * size

    curve = measure.latency_curve(step, [8, 1, 4, 4], rounds=3, clock=clock, wait=lambda x: x)
    assert curve == measure.LatencyCurve((1, 4, 8), (1.5, 3.0, 5.0))
    assert curve(4) == 3.0 and curve(2) == 2.0 and curve(16) == 9.0
    assert hash(curve) == hash(measure.LatencyCurve((1, 4, 8), (1.5, 3.0, 5.0)))
    with pytest.raises(InputError):
        measure.LatencyCurve((4, 1), (1.0, 2.0))


def test_latency_curve_does_not_fall_beyond_its_end():
    assert measure.LatencyCurve((1, 2), (3.0, 2.0))(100) == 2.0


def test_roofline():
    limits = measure.Limits(bandwidth=100.0, flops=1000.0)
    assert limits.ridge == 10.0
    memory = measure.roofline(flops=500.0, nbytes=200.0, seconds=4.0, limits=limits)
    assert memory == measure.Share(0.5, 2.0, "memory")
    compute = measure.roofline(flops=5000.0, nbytes=200.0, seconds=10.0, limits=limits)
    assert compute == measure.Share(0.5, 5.0, "compute")
    with pytest.raises(InputError):
        measure.roofline(flops=1.0, nbytes=1.0, seconds=0.0, limits=limits)


def test_limits_measure_something():
    """Small sizes: the figures must be of this world, and the copy must be in place (no new pages)."""
    bandwidth = measure.copy_bandwidth(2**22, rounds=2)
    assert 1e8 < bandwidth < 1e14
    assert 1e7 < measure.matmul_rate(size=128, rounds=2) < 1e16
    assert 1e6 < measure.matmul_rate(jnp.int8, size=64, rounds=1) < 1e16
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(2**20)
    before = x.unsafe_buffer_pointer()
    assert update(x).unsafe_buffer_pointer() == before


@pytest.mark.parametrize(("others", "want"), [(0.0, True), (0.02, True), (0.5, False)])
def test_quiet(others, want, capsys):
    """On a machine with busy others `quiet` is False, and it prints the load either way."""
    cores = host.os.cpu_count()
    times = iter([10.0, 10.0 + others * cores + 0.4])  # 0.4 of the busy seconds are our own
    mine = iter([1.0, 1.4])
    clock = iter([0.0, 1.0])
    reading = measure.load(
        1.0, busy=lambda: next(times), own=lambda: next(mine), sleep=lambda s: None, clock=lambda: next(clock)
    )
    assert reading.others == pytest.approx(others)
    assert measure.quiet(reading=reading) is want
    printed = capsys.readouterr().err
    assert ("quiet" if want else "BUSY") in printed and "load average" in printed


def test_quiet_does_not_trust_the_unknown(capsys):
    assert not measure.quiet(reading=measure.Load(None, (), 1.0, 2))
    assert not measure.quiet(reading=measure.Load(None, (1.5, 0.1, 0.1), 1.0, 2))
    assert measure.quiet(reading=measure.Load(None, (0.02, 2.0, 2.0), 1.0, 2))


def test_load_of_this_machine():
    reading = measure.load(0.05)
    assert reading.others is None or 0.0 <= reading.others <= 1.0
    assert str(reading.cores) in str(reading)


def test_machine():
    facts = measure.machine()
    assert facts["device"] == "cpu" and facts["devices"] == jax.device_count()
    assert facts["versions"]["jax"] == jax.__version__ and facts["cores"] >= 1
    json.dumps(facts, allow_nan=False)


@pytest.fixture
def instant(monkeypatch):
    """No waiting for the load."""
    readings = []

    def load():
        readings.append(measure.Load(0.01 if len(readings) < 2 else 0.9, (0.1,), 1.0, 2))
        return readings[-1]

    monkeypatch.setattr(results_module, "load", load)


def test_results(tmp_path, instant):
    results = measure.Results("decode", tmp_path / "new", settings={"batch": 8})
    results.add(method="plain", tokens_s=np.float32(12.5), counts=jnp.arange(2))
    path = results.save()
    assert path.name == "decode-cpu.json"
    saved = json.loads(path.read_text())
    assert saved["rows"] == [{"method": "plain", "tokens_s": 12.5, "counts": [0, 1]}]
    assert saved["machine"]["versions"]["jax"] == jax.__version__ and saved["settings"] == {"batch": 8}
    assert saved["quiet"] is True
    results.add(method="fast", tokens_s=20)
    results.save()
    saved = json.loads(path.read_text())
    assert len(saved["rows"]) == 2 and saved["quiet"] is False and len(saved["loads"]) == 3
    assert [p.name for p in path.parent.iterdir()] == ["decode-cpu.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), jnp.nan])
def test_results_refuse_what_is_not_a_figure(tmp_path, instant, value):
    with pytest.raises(InputError):
        measure.Results("decode", tmp_path).add(value=value)
    with pytest.raises(InputError):
        measure.Results("../decode", tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, instant, monkeypatch):
    results = measure.Results("decode", tmp_path)
    old = results.save().read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(results_module.os, "replace", fail)
    results.add(a=1)
    with pytest.raises(OSError, match="disk full"):
        results.save()
    assert results.path.read_text() == old and len(list(tmp_path.iterdir())) == 1


def test_text_table():
    rows = [{"method": "plain", "tokens/s": 12.34567, "note": None}, {"method": "a|b", "tokens/s": 3}]
    assert measure.text_table(rows, ["method", "tokens/s"]).splitlines() == [
        "method  tokens/s",
        "------  --------",
        "plain      12.35",
        "a|b            3",
    ]
    assert measure.text_table(rows, markdown=True).splitlines()[1:] == [
        "|--------|---------:|-----:|",
        "| plain  |    12.35 |      |",
        "| a\\|b   |        3 |      |",
    ]
