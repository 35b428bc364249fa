"""Timing in turn, on a clock that only the work itself moves."""

import gc
import mmap
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from llmq import environment, plugin
from llmq.measure import ClockFailed, in_visits, interleave, peak_memory, read, seconds_of
from llmq.types import Clock, Context, Reading

SECONDS = Reading("latency", "ms", "lower", lambda s: 1000 * s)
RATE = Reading("throughput", "tokens/s", "higher", lambda s: 64 / s)


@pytest.fixture
def time(monkeypatch):
    """A clock that stands still but for `time.now += …`."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr("llmq.measure.time", SimpleNamespace(perf_counter=lambda: time.now, sleep=lambda seconds: None))
    return time


def clock(time, log, name, seconds=(1.0,), readings=(SECONDS,), **settings):
    """Work that notes its name and takes each of `seconds` in turn."""

    def run():
        time.now += seconds[log.count(name) % len(seconds)]
        log.append(name)

    return Clock("speed", run, readings, "fake", **settings)


def test_every_round_visits_every_stage_once_alternately_forwards_and_backwards(time):
    log = []
    interleave({n: [clock(time, log, n, warmup=0, rounds=4)] for n in "abc"}, "cpu")
    assert "".join(log) == "abc|cba|abc|cba".replace("|", "")


def test_the_warm_up_comes_before_and_is_not_counted(time):
    log = []
    stages = {n: [clock(time, log, n, (50.0, 50.0, 1.0, 1.0, 1.0), warmup=2, rounds=3)] for n in "ab"}
    measured = interleave(stages, "cpu")
    assert "".join(log) == "aa|bb|ab|ba|ab".replace("|", "")
    for name in "ab":
        (latency,) = measured[name]
        assert latency.samples.values == pytest.approx((1000.0, 1000.0, 1000.0))
        assert latency.n == 3


def test_short_work_is_done_once_more_before_so_that_it_finds_its_caches_full(time):
    log = []
    stages = {n: [clock(time, log, n, (0.05, 0.05, 0.03, 0.01), warmup=2, rounds=2)] for n in "ab"}
    measured = interleave(stages, "cpu")
    assert "".join(log) == "aa|bb|aabb|bbaa".replace("|", "")
    assert measured["a"][0].samples.values == pytest.approx((10.0, 50.0))
    assert measured["a"][0].convention.endswith("each after one that is not timed")


def test_a_warm_up_of_none_is_none(time):
    log = []
    interleave({"a": [clock(time, log, "a", warmup=0, rounds=1)]}, "cpu")
    assert log == ["a"]


def test_each_stage_is_given_its_own_seconds_in_the_order_of_the_rounds(time):
    log = []
    stages = {
        "slow": [clock(time, log, "slow", (4.0, 5.0, 6.0), warmup=0, rounds=3)],
        "fast": [clock(time, log, "fast", (1.0, 2.0, 3.0), warmup=0, rounds=3)],
    }
    measured = interleave(stages, "cpu")
    assert measured["slow"][0].samples.values == pytest.approx((4000, 5000, 6000))
    assert measured["fast"][0].samples.values == pytest.approx((1000, 2000, 3000))


def test_a_drift_of_the_machine_moves_all_stages_alike(time):
    # The machine slows steadily; measured one after the other, the last stage would look slower than the first.
    def drifting():
        time.now += 1 + (time.now - 100) / 100

    measured = interleave({n: [Clock("speed", drifting, (SECONDS,), "fake", warmup=0, rounds=10)] for n in "ab"}, "cpu")
    a, b = (np.array(measured[n][0].samples.values) for n in "ab")
    assert (np.diff(a) > 0).all()
    assert abs((a - b).mean()) < 0.002 * a.mean()


def test_the_clocks_of_a_stage_are_timed_one_after_another(time):
    log = []
    stages = {
        n: [clock(time, log, f"{n}{k}", warmup=1, rounds=2, readings=(SECONDS, RATE)) for k in (1, 2)] for n in "ab"
    }
    measured = interleave(stages, "cpu")
    assert log == ["a1", "b1", "a1", "b1", "b1", "a1", "a2", "b2", "a2", "b2", "b2", "a2"]
    assert [m.metric for m in measured["b"]] == ["latency", "throughput"] * 2


def test_stages_with_unequal_clocks_are_refused(time):
    one = clock(time, [], "one")
    with pytest.raises(ValueError, match="zip"):
        interleave({"a": [one], "b": [one, one]}, "cpu")


def test_no_stages_have_no_measurements():
    assert interleave({}, "cpu") == {}


def test_seconds_are_those_of_the_work_alone(time):
    assert seconds_of(clock(time, [], "a", (2.5,)), "cpu") == 2.5


def test_a_reading_turns_every_second_into_its_unit_and_takes_the_median():
    work = Clock("speed", lambda: None, (RATE,), "64 tokens")
    measurement = read(work, RATE, [1.0, 2.0, 4.0])
    assert (measurement.task, measurement.metric, measurement.unit) == ("speed", "throughput", "tokens/s")
    assert measurement.better == "higher"
    assert measurement.value == 32.0
    assert measurement.samples.values == (64.0, 32.0, 16.0)
    assert (measurement.samples.statistic, measurement.samples.quantile) == ("quantile", 0.5)
    assert measurement.convention == (
        "64 tokens; median of rounds taken in turn with every other stage, "
        "where work takes under 0.1 s each after one that is not timed"
    )
    assert measurement.stderr > 0


def test_a_protocol_says_the_same_of_short_and_long_work(monkeypatch):
    told = []
    for seconds in (0.01, 3.0):
        monkeypatch.setattr("llmq.measure.seconds_of", lambda *_, s=seconds: s)
        (found,) = interleave({"a": [Clock("speed", lambda: None, (RATE,), "64 tokens")]}, "cpu")["a"]
        told.append(found.convention)
    assert told[0] == told[1]


def test_a_reading_may_be_another_quantile():
    late = Reading("latency_p90", "ms", "lower", lambda s: 1000 * s, quantile=0.9)
    seconds = [i / 10 for i in range(11)]
    measurement = read(Clock("speed", lambda: None, (late,), "fake"), late, seconds)
    assert measurement.value == pytest.approx(900.0)
    assert measurement.samples.quantile == 0.9
    assert "90% quantile" in measurement.convention


def test_steady_seconds_have_no_error():
    assert read(Clock("speed", lambda: None, (SECONDS,), "fake"), SECONDS, [0.5] * 8).stderr == 0.0


def test_peak_memory_counts_what_was_freed_before_the_end():
    size = 48 * 2**20
    with peak_memory("cpu") as peak:
        before = psutil.Process().memory_info().rss  # once freed memory has been given back
        with mmap.mmap(-1, size) as block:  # of the kernel: an allocator may hand out pages that are resident already
            for _ in range(48):
                block.write(bytes(2**20))
    assert peak.bytes > before + 0.8 * size
    assert "resident" in peak.convention


@pytest.mark.slow  # a process of few files: of a larger one the kernel writes out what lies untouched, just then
def test_peak_memory_of_a_stage_leaves_out_what_the_process_holds_without_it(llmq_cache):
    ballast = np.ones(64 * 2**20, np.uint8)  # resident before, and so no part of the model
    context = Context("cpu", 0)
    model: Any = plugin.build({"edsr": {"scale": 2, "n_resblocks": 8, "n_feats": 192}}, "models")
    speed: Any = plugin.build({"speed": {"rounds": 3}}, "tasks")
    with model.base(context).open("cpu") as loaded:
        alone, whole = speed.score(loaded)
        weights = sum(p.nbytes for p in loaded.module.parameters())
    assert (alone.metric, whole.metric) == ("peak_memory", "peak_memory_of_process")
    assert weights < alone.value < 2.5 * weights + 2**20 < whole.value
    assert "no model" in alone.convention
    assert "whole process" in whole.convention
    assert whole.value - alone.value > ballast.nbytes


def test_stages_without_room_beside_one_another_are_visited_one_at_a_time(time):
    from contextlib import contextmanager

    log, opened = [], []

    @contextmanager
    def stage(name, seconds):
        opened.append(name)
        assert len(opened) - opened.count("closed") == 1 + opened.count("closed")  # no other is open
        yield [clock(time, log, name, (seconds,), rounds=7, warmup=2)]
        opened.append("closed")

    found = in_visits({n: partial(stage, n, s) for n, s in (("a", 1.0), ("b", 2.0))}, "cpu")
    assert [name for name in opened if name != "closed"] == [*"abbaabbaabbaab"]  # as many visits as rounds
    assert log.count("a") == log.count("b") == 7 + 7 * 2
    assert {name: m.samples.values for name, (m,) in found.items()} == {"a": (1000.0,) * 7, "b": (2000.0,) * 7}
    assert found["a"][0].convention.endswith(
        "rounds taken in 8 visits to every stage, open alone, visits resampled whole"
    )


def test_rounds_of_one_visit_are_one_sample_of_the_machine(time):
    from contextlib import contextmanager

    from llmq.statistics import estimates

    rng = np.random.default_rng(0)

    @contextmanager
    def stage(name, seconds):
        drift = float(np.exp(rng.normal(0, 0.2)))  # of the machine, in this visit
        yield [clock(time, [], name, [seconds * drift * float(f) for f in np.exp(rng.normal(0, 0.005, 9))], rounds=40)]

    found = in_visits({n: partial(stage, n, s) for n, s in (("a", 1.0), ("b", 1.0))}, "cpu")
    (a,), (b,) = found.values()
    assert a.samples.clusters == tuple(i for i in range(8) for _ in range(5))
    beside = estimates.ratio(a.samples, b.samples)
    assert beside.n == 8
    assert beside.low < 1 < beside.high
    alone = replace(a.samples, clusters=None), replace(b.samples, clusters=None)
    assert beside.stderr > 1.5 * estimates.ratio(*alone).stderr
    assert a.stderr > 0.04


def test_a_visit_that_fails_names_its_stage(time):
    from contextlib import contextmanager

    @contextmanager
    def stage(name):
        if name == "b":
            raise RuntimeError("CUDA out of memory")
        yield [clock(time, [], name)]

    with pytest.raises(ClockFailed) as failed:
        in_visits({n: partial(stage, n) for n in "abc"}, "cpu")
    assert failed.value.stage == "b"


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self):
        self.own = self


@pytest.mark.slow
def test_libraries_are_set_aside_for_a_block_and_what_it_frees_is_collected(monkeypatch):
    monkeypatch.setattr(environment, "_set_aside", [0])
    gc.unfreeze()
    with environment.set_aside():
        libraries = gc.get_freeze_count()
        kept = Cycle()
        with environment.set_aside():
            dropped = weakref.ref(Cycle())
            gc.collect()
            assert dropped() is None
        assert gc.get_freeze_count() > libraries > 100_000
    assert gc.get_freeze_count() == 0
    freed = weakref.ref(kept)
    del kept
    gc.collect()
    assert freed() is None
