"""Quotas of principals, on a clock of our own."""

import pytest

from cloud_server.engine import quotas
from cloud_server.engine.caller import Caller
from cloud_server.engine.job import Job
from cloud_server.engine.quotas import Quotas, check_pixels, check_queued
from cloud_server.models.load import Model
from hybridsd.errors import CloudBusy, HybridSDError, InvalidRequest, Reason
from hybridsd.tokens import Quota
from tests.support.engine_fakes import job_request


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def caller(name: str = "alice", **limits: int) -> Caller:
    return Caller(principal=name, quota=Quota(**limits))


def refusal(run: object) -> HybridSDError:
    with pytest.raises(CloudBusy) as refused:
        run()  # type: ignore[operator]
    return refused.value


def key(name: object = "fox") -> tuple[str, str]:
    return ("alice", str(name))


def test_steps_of_a_minute_are_charged_and_come_back() -> None:
    """Who comes again after the delay is let in, and not before it is worth while."""
    clock = Clock()
    counted, alice = Quotas(clock, rand=lambda: 0.0), caller(steps_per_minute=60)
    counted.charge(alice, key("first"), 40)
    error = refusal(lambda: counted.charge(alice, key(), 40))
    assert error.reason is Reason.QUOTA_EXCEEDED
    assert error.quota == "token alice: steps_per_minute"
    assert "60 steps a minute" in error.message
    assert error.retry_delay_s == pytest.approx(20)
    clock.now_s += 19
    refusal(lambda: counted.check(alice, key(), 40))
    clock.now_s += 1
    counted.check(alice, key(), 40)
    counted.charge(alice, key(), 40)
    refusal(lambda: counted.charge(alice, key("third"), 2))
    counted.charge(caller("bob", steps_per_minute=60), key(), 60)
    counted.charge(caller("carol"), key(), 10_000)


def test_whoever_comes_when_told_is_let_in_and_those_between_wait() -> None:
    """Many of one token are told different times, each is kept, and a newcomer does not take what was promised."""
    clock = Clock()
    counted, alice = Quotas(clock), caller(steps_per_minute=60)
    counted.charge(alice, key("first"), 60)
    told = {
        name: refusal(lambda name=name: counted.charge(alice, key(name), 20)).retry_delay_s or 0.0  # type: ignore[misc]
        for name in range(4)
    }
    began_s, delays = clock.now_s, sorted(told.items(), key=lambda item: item[1])
    assert [round(delay_s / 20) for _, delay_s in delays] == [1, 2, 3, 4]
    for index, (name, delay_s) in enumerate(delays):
        clock.now_s = began_s + delay_s
        if index < 3:
            refusal(lambda index=index: counted.charge(alice, key(f"new-{index}"), 20))  # type: ignore[misc]
        counted.charge(alice, key(name), 20)


def test_promises_that_nobody_takes_up_end() -> None:
    clock = Clock()
    counted, alice = Quotas(clock), caller(steps_per_minute=60)
    counted.charge(alice, key("first"), 60)
    for name in range(1000):
        error = refusal(lambda name=name: counted.charge(alice, key(name), 20))  # type: ignore[misc]
        assert error.retry_delay_s
        assert error.retry_delay_s <= 1.1 * quotas.MAX_PROMISE_S
    assert len(counted._accounts["alice"].promises) <= quotas.MAX_PROMISE_S / 20
    clock.now_s += quotas.MAX_PROMISE_S + quotas.GRACE_S + 1
    counted.charge(alice, key("late"), 60)


def test_a_job_that_never_fits_is_not_told_to_come_again() -> None:
    error = refusal(lambda: Quotas(Clock()).check(caller(steps_per_minute=60), key(), 61))
    assert error.retry_delay_s is None
    assert "ask for at most" in error.message
    assert "60" in error.message


def test_steps_that_did_not_run_are_given_back(tiny_model: Model) -> None:
    """Whatever ended the job; never more than was taken."""
    counted, alice = Quotas(Clock()), caller(steps_per_minute=6)
    job = Job(job_request(tiny_model), caller=alice)
    counted.charge(alice, job.key, job.num_asked_calls)
    refusal(lambda: counted.check(alice, key(""), 1))
    job.num_calls = 2
    counted.end(job)
    counted.check(alice, key(""), 4)
    refusal(lambda: counted.check(alice, key(""), 5))


def test_a_changed_limit_forgives_nothing() -> None:
    counted = Quotas(Clock())
    counted.charge(caller(steps_per_minute=60), key(), 50)
    counted.check(caller(steps_per_minute=100), key(""), 50)
    refusal(lambda: counted.check(caller(steps_per_minute=100), key(""), 51))
    refusal(lambda: counted.check(caller(steps_per_minute=40), key(""), 1))


def test_promises_are_bounded() -> None:
    """However many ids a principal makes up: each check looks at all of them, and others wait for it."""
    counted, alice = Quotas(Clock()), caller(steps_per_minute=10**6)
    counted.charge(alice, key("first"), 10**6)
    for index in range(quotas.MAX_PROMISES + 10):
        refusal(lambda index=index: counted.check(alice, key(index), 1))

    assert len(counted._accounts["alice"].promises) == quotas.MAX_PROMISES


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MAX_ACCOUNTS", 8)
    counted = Quotas(Clock())
    for index in range(100):
        counted.charge(caller(f"token-{index}", steps_per_minute=60), key(), 60)
    assert len(counted._accounts) == 8
    refusal(lambda: counted.check(caller("token-99", steps_per_minute=60), key(), 1))


@pytest.mark.parametrize(
    ("limits", "num_running", "num_waiting", "free_places", "is_refused"),
    [
        ({}, 9, 99, 0, False),
        ({"queued": 2}, 0, 1, 0, False),
        ({"queued": 2}, 0, 2, 0, True),
        ({"queued": 0}, 0, 0, 1, False),
        ({"queued": 0}, 1, 0, 0, True),
        ({"queued": 0, "jobs": 1}, 1, 0, 5, True),
        ({"queued": 1, "jobs": 2}, 1, 1, 5, False),
    ],
)
def test_jobs_that_wait(
    limits: dict[str, int], num_running: int, num_waiting: int, free_places: int, is_refused: bool
) -> None:
    """A job that begins at once does not wait; one beyond `jobs` does, whatever is free."""

    def check() -> None:
        check_queued(
            caller(**limits), num_running=num_running, num_waiting=num_waiting, free_places=free_places,
            retry_delay_s=lambda: 7.0,
        )  # fmt: skip

    if not is_refused:
        check()
        return
    error = refusal(check)
    assert (error.reason, error.retry_delay_s, error.quota) == (Reason.QUOTA_EXCEEDED, 7.0, "token alice: queued")


def test_pixels_are_refused_for_good() -> None:
    check_pixels(Quota(), 4096, 4096)
    check_pixels(Quota(pixels=64 * 64), 64, 64)
    with pytest.raises(InvalidRequest, match="4096") as refused:
        check_pixels(Quota(pixels=64 * 64), 64, 72)
    assert refused.value.reason is Reason.SIZE_INVALID
    assert refused.value.retry_delay_s is None
