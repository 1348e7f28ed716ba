"""Buckets that quotas are counted with."""

import math

import pytest

from hybridsd.quotas import JITTER, Bucket, jittered


class _Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_says_exactly_when_there_is_room() -> None:
    clock = _Clock()
    bucket = Bucket(60, clock)
    assert bucket.take(50) == 0.0
    wait_s = bucket.take(20)
    assert wait_s == pytest.approx(10.0)
    clock.now_s += wait_s - 0.001
    assert bucket.take(20) > 0
    clock.now_s += 0.002
    assert bucket.take(20) == 0.0


def test_what_is_more_than_a_minutes_worth_never_fits() -> None:
    assert Bucket(60, _Clock()).take(61) == math.inf
    assert Bucket(0, _Clock()).take(1) == math.inf
    assert Bucket(0, _Clock()).take(0) == 0.0


def test_a_bucket_never_holds_more_than_a_minutes_worth() -> None:
    clock = _Clock()
    bucket = Bucket(60, clock)
    bucket.give_back(10)
    clock.now_s += 3600
    assert bucket.left == 60
    assert bucket.take(60) == 0.0
    assert bucket.left == 0
    bucket.give_back(5)
    assert bucket.left == 5


def test_jitter_only_delays() -> None:
    assert jittered(8.0, lambda: 0.0) == 8.0
    assert jittered(8.0, lambda: 1.0) == 8.0 * (1 + JITTER)


def test_another_limit_forgives_nothing() -> None:
    """Neither a higher nor a lower one: what was taken comes back with time."""
    now_s = 0.0
    bucket = Bucket(60, lambda: now_s)
    assert bucket.take(60) == 0
    bucket.resize(120)
    assert bucket.left == 60
    bucket.resize(30)
    assert bucket.left == 0
    now_s = 60.0
    assert bucket.left == 30
