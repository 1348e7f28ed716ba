"""The scheduler alone: no thread, no model."""

from collections.abc import Iterable

import pytest

from cloud_server.engine.caller import Caller
from cloud_server.engine.events import Failed, Finished, Queued, Usage
from cloud_server.engine.job import Job
from cloud_server.engine.request import JobRequest
from cloud_server.engine.scheduler import PLACE_TURNS, Scheduler
from cloud_server.engine.shares import Place, Shares
from cloud_server.engine.step import Trajectory
from hybridsd.errors import CloudBusy, Reason
from hybridsd.tokens import Quota
from tests.support.tiny_bundle import make_plan


def make_scheduler(**changes: object) -> Scheduler:
    settings = {"max_batch": 2, "max_queue": 3, "keep_finished": 2, "keep_finished_s": 60.0, **changes}
    return Scheduler(**settings)  # type: ignore[arg-type]


def make_job(name: str, *, model: str = "tiny", width: int = 8, caller: str = "") -> Job:
    plan = make_plan("ddim", 6)
    return Job(
        JobRequest(
            request_id=name, model=model, prompt="", latent_shape=(4, 8, width), plan=plan, handoff_call=len(plan.rows)
        ),
        caller=Caller(principal=caller),
    )


def begin(job: Job) -> None:
    """Gives a job the group that the executor would give it."""
    request = job.request
    group = (request.model, request.latent_shape, (1, 1), ())
    job.trajectory = Trajectory(request, group, None, 1, 1.0, 0)  # type: ignore[arg-type]


def add(scheduler: Scheduler, *jobs: Job) -> None:
    for job in jobs:
        scheduler.add(job)
    for job in scheduler.admit():
        begin(job)


def test_a_batch_is_of_one_group_and_groups_take_turns() -> None:
    """Jobs of the group that waited longest come first, up to a batch."""
    scheduler = make_scheduler()
    jobs = [make_job(str(index), model=model) for index, model in enumerate(("a", "b", "a", "b"))]
    add(scheduler, *jobs)

    turns = [[job.request.request_id for job in scheduler.choose()] for _ in range(4)]

    assert turns == [["0", "2"], ["1", "3"], ["0", "2"], ["1", "3"]]


def test_a_full_group_does_not_keep_another_waiting() -> None:
    """Places are counted by group."""
    scheduler = make_scheduler()
    add(scheduler, *(make_job(f"a{index}", model="a") for index in range(3)), make_job("b", model="b"))

    assert (scheduler.load().num_running, scheduler.load().num_queued) == (3, 1)
    assert scheduler.groups == {("a", (4, 8, 8), (1, 1), ()), ("b", (4, 8, 8), (1, 1), ())}


def test_a_group_that_did_not_fit_gets_smaller_batches() -> None:
    """And only that group."""
    scheduler = make_scheduler()
    small, wide = [make_job(f"s{i}") for i in range(2)], [make_job(f"w{i}", width=16) for i in range(2)]
    add(scheduler, *small, *wide)
    scheduler.limit_batch(("tiny", (4, 8, 16), (1, 1), ()), 1)

    assert [len(scheduler.choose()) for _ in range(4)] == [2, 1, 1, 2]


def refusal_s(scheduler: Scheduler, name: str, caller: str = "") -> float:
    """Returns the delay that a request is refused with."""
    with pytest.raises(CloudBusy) as refused:
        scheduler.check_room(name, Caller(principal=caller))
    assert refused.value.reason is Reason.QUEUE_FULL
    assert refused.value.retry_delay_s is not None
    return refused.value.retry_delay_s


def test_the_queue_is_bounded() -> None:
    """Beyond the places, `max_queue` jobs wait; the next one is told when to come again."""
    scheduler = make_scheduler(max_batch=1)
    jobs = [make_job(str(index)) for index in range(4)]
    add(scheduler, *jobs)
    scheduler.charge(jobs[:1], 2.0)

    assert 6 * 2.0 <= refusal_s(scheduler, "more") <= 1.1 * 6 * 2.0  # until the first place is free


def test_the_refused_do_not_come_again_together() -> None:
    """Each is given another time, as room comes: one after another, and not before the room is there."""
    scheduler = make_scheduler(max_batch=1, max_queue=30)
    jobs = [make_job(str(index)) for index in range(31)]
    add(scheduler, *jobs)
    scheduler.charge(jobs[:1], 0.1)

    delays = [refusal_s(scheduler, f"more-{index}") for index in range(100)]

    assert all(0.6 * (index + 1) - 1e-6 <= delay <= 0.63 * (index + 1) + 0.1 for index, delay in enumerate(delays))


def test_a_hint_is_never_close_to_nothing() -> None:
    """Also before anything was measured."""
    scheduler = make_scheduler(max_batch=1)
    add(scheduler, *(make_job(str(index)) for index in range(4)))

    assert all(0.5 <= refusal_s(scheduler, f"more-{index}") <= 60.0 for index in range(100))


def test_a_promise_is_kept_by_the_queue() -> None:
    """Whoever was refused has the room that comes, by its id, and not whoever asks first; a cancel gives it back."""
    now_s = [0.0]
    scheduler = make_scheduler(max_batch=1, clock=lambda: now_s[0], rand=lambda: 0.0)
    jobs = [make_job(str(index)) for index in range(4)]
    add(scheduler, *jobs)
    scheduler.charge(jobs[:1], 0.5)
    now_s[0] += refusal_s(scheduler, "promised")
    refusal_s(scheduler, "given-up")
    scheduler.forget_promise("given-up")
    scheduler.end(jobs[0], Failed(Reason.INTERNAL.error("oh")))
    for job in scheduler.admit():
        begin(job)

    refusal_s(scheduler, "later")
    scheduler.check_room("promised")
    add(scheduler, make_job("promised"))
    refusal_s(scheduler, "promised-no-more")


def test_whoever_may_have_no_jobs_is_told_so() -> None:
    """And does not wait for ever."""
    with pytest.raises(CloudBusy, match="0 jobs") as refused:
        make_scheduler().check_room("any", Caller(principal="a", quota=Quota(jobs=0)))
    assert refused.value.reason is Reason.QUOTA_EXCEEDED


def test_jobs_that_a_quota_bars_are_bounded_and_in_nobodys_way() -> None:
    """They count as waiting for their own token alone, and who is refused hears when the next of them begins."""
    scheduler = make_scheduler(max_batch=4, max_queue=8, rand=lambda: 0.0)
    flood = Caller(principal="flood", quota=Quota(jobs=1))

    def come(number: int) -> None:
        scheduler.check_room(str(number), flood)
        job = make_job(str(number))
        job.caller = flood
        add(scheduler, job)

    for number in range(1 + 8):
        come(number)
    scheduler.charge(scheduler.choose(), 1.0)
    with pytest.raises(CloudBusy) as refused:
        come(9)
    assert (len(scheduler.running), len(scheduler.waiting)) == (1, 8)
    assert refused.value.retry_delay_s == pytest.approx(6.0)
    assert scheduler.wait_s(flood) == pytest.approx(9 * 6.0)  # behind the one that runs and those eight

    for number in range(3 + 4):  # free places, and half of the queue
        other = Caller(principal="other")
        scheduler.check_room(str(number), other)
        job = make_job(str(number), caller="other")
        add(scheduler, job)


def test_the_wait_is_what_it_will_be() -> None:
    """0 where a place is free; behind all that a caller has, and less for one who has had nothing."""
    scheduler = make_scheduler(max_batch=2, max_queue=9)
    assert scheduler.load(Caller(principal="a")).wait_s == 0.0
    jobs = [make_job(f"a{index}", caller="a") for index in range(8)]
    add(scheduler, jobs[0])
    scheduler.charge(jobs[:1], 1.0)
    assert scheduler.load(Caller(principal="a")).wait_s == 0.0  # the second place
    add(scheduler, *jobs[1:])

    assert scheduler.load(Caller(principal="a")).wait_s == 4 * 6.0  # three pairs, after the one that runs
    assert scheduler.load(Caller(principal="b")).wait_s == 6.0
    assert scheduler.load(Caller(principal="vip", has_priority=True)).wait_s == 1.0  # the next call


def test_whoever_has_more_makes_room_at_once() -> None:
    """Of two with work for all places each has half of them from the next call on; states stay as they are."""
    scheduler = make_scheduler(max_batch=4, max_queue=9)
    many, few = (
        [make_job(f"a{index}", caller="a") for index in range(6)],
        [make_job(f"b{index}", caller="b") for index in range(4)],
    )
    add(scheduler, *many)
    scheduler.charge(scheduler.choose(), 1.0)
    state = many[3].trajectory
    add(scheduler, *few)

    assert [job.request.request_id for job in scheduler.choose()] == ["a0", "a1", "a2", "b0"]
    assert many[3].trajectory is state
    for _ in range(20):
        scheduler.charge(scheduler.choose(), 1.0)
        add(scheduler)
    assert sorted(job.caller.principal for job in scheduler.choose()) == ["a", "a", "b", "b"]


def test_a_batch_cap_recovers() -> None:
    """After a while one job more is tried; where that fails, after a longer while."""
    scheduler = make_scheduler()
    add(scheduler, make_job("0"), make_job("1"))
    group = ("tiny", (4, 8, 8), (1, 1), ())

    def turns_until_whole() -> int:
        turns = 0
        while len(scheduler.choose()) < 2:
            turns += 1
        return turns

    scheduler.limit_batch(group, 1)
    first = turns_until_whole()
    scheduler.limit_batch(group, 1)

    assert turns_until_whole() == 2 * first
    assert [len(scheduler.choose()) for _ in range(3)] == [2, 2, 2]


def test_callers_take_turns_for_places() -> None:
    """Whoever has many jobs waits longer than whoever has one, and is told so."""
    scheduler = make_scheduler(max_batch=1, max_queue=9)
    many, one = [make_job(f"a{index}", caller="a") for index in range(4)], make_job("b", caller="b")
    add(scheduler, *many, one)
    scheduler.post_positions()
    assert one._queued == Queued(0)
    assert [job._queued for job in many[1:]] == [Queued(1), Queued(2), Queued(3)]

    scheduler.charge(many[:1], 1.0)
    scheduler.end(many[0], Failed(Reason.INTERNAL.error("oh")))

    assert scheduler.admit() == [one]


def test_a_long_queue_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are ranked once for each size, not for each of 200 users that wait: all of it happens under a lock."""
    scheduler = make_scheduler(max_batch=2, max_queue=200)
    add(scheduler, *(make_job(str(index), width=8 + index % 2, caller=str(index)) for index in range(200)))
    ranked, rank = [], Shares.places

    def see(self: Shares, active: Iterable[Job]) -> list[Place]:
        ranked.append(1)
        return rank(self, active)

    monkeypatch.setattr(Shares, "places", see)
    assert scheduler.admit() == []
    assert len(ranked) <= 2


def test_a_long_job_does_not_keep_others_waiting() -> None:
    """After many turns it gives its place to one that waits, keeps its state, and has its turn again."""
    scheduler = make_scheduler(max_batch=1)
    long, short = make_job("long"), make_job("short")
    add(scheduler, long, short)
    state = long.trajectory
    for _ in range(PLACE_TURNS):
        assert scheduler.admit() == []
        assert scheduler.choose() == [long]
        scheduler.charge([long], 1.0)

    assert scheduler.admit() == [short]
    begin(short)
    assert scheduler.choose() == [short]
    assert long._queued is None or long._queued.position == 0
    scheduler.end(short, Failed(Reason.INTERNAL.error("oh")))
    assert scheduler.admit() == [long]
    assert long.trajectory is state
    assert scheduler.choose() == [long]


def test_a_long_job_alone_keeps_its_place() -> None:
    """Nobody waits, so nobody moves."""
    scheduler = make_scheduler(max_batch=1)
    job = make_job("long")
    add(scheduler, job)
    for _ in range(2 * PLACE_TURNS):
        assert scheduler.admit() == []
        assert scheduler.choose() == [job]


def test_positions_count_the_jobs_ahead() -> None:
    """Free places are nobody's ahead."""
    scheduler = make_scheduler(max_batch=1)
    jobs = [make_job(str(index)) for index in range(3)]
    add(scheduler, *jobs)

    assert [job._queued for job in jobs[1:]] == [Queued(0), Queued(1)]


def test_a_finished_job_is_remembered_and_a_failed_one_is_not() -> None:
    """A late retry finds the images of a finished job, and starts a failed one again; the oldest are forgotten."""
    scheduler = make_scheduler()
    jobs = [make_job(str(index)) for index in range(4)]
    add(scheduler, *jobs)
    scheduler.end(jobs[0], Failed(Reason.INTERNAL.error("oh")))
    for job in jobs[1:]:
        scheduler.end(job, Finished(Usage(0, 0, 0, 6)))

    assert [scheduler.find(("", str(index))) for index in range(4)] == [None, None, jobs[2], jobs[3]]
    assert scheduler.is_idle


def test_a_stopped_job_leaves_the_queue_at_once_and_its_place_when_swept() -> None:
    """Only the worker may end a running job."""
    scheduler = make_scheduler(max_batch=1)
    running, waiting = make_job("running"), make_job("waiting")
    add(scheduler, running, waiting)
    for job in (running, waiting):
        job.stop(Reason.CANCELLED.error("no more"))
    scheduler.sweep(active=False)

    assert isinstance(waiting.outcome, Failed)
    assert running.outcome is None

    scheduler.sweep(active=True)

    assert isinstance(running.outcome, Failed)
    assert scheduler.is_idle
