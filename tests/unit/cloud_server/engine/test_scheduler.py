"""The scheduler alone: no thread, no model."""

import pytest

from cloud_server.engine.events import Failed, Finished, Queued, Usage
from cloud_server.engine.job import Job
from cloud_server.engine.request import JobRequest
from cloud_server.engine.scheduler import Scheduler
from cloud_server.engine.step import Trajectory
from hybridsd.errors import CloudBusy, Reason
from tests.support.tiny_bundle import make_plan


def make_scheduler(**changes: float) -> Scheduler:
    settings = {"max_batch": 2, "max_queue": 3, "keep_finished": 2, "keep_finished_s": 60.0, **changes}
    return Scheduler(**settings)  # type: ignore[arg-type]


def make_job(name: str, *, model: str = "tiny", width: int = 8) -> Job:
    plan = make_plan("ddim", 6)
    return Job(
        JobRequest(
            request_id=name, model=model, prompt="", latent_shape=(4, 8, width), plan=plan, handoff_call=len(plan.rows)
        )
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


def test_the_queue_is_bounded() -> None:
    """Beyond the places, `max_queue` jobs wait; the next one is told when to come again."""
    scheduler = make_scheduler(max_batch=1)
    add(scheduler, *(make_job(str(index)) for index in range(4)))
    scheduler.note_call(2.0)

    with pytest.raises(CloudBusy) as refused:
        scheduler.check_room()

    assert refused.value.retry_delay_s == 6 * 2.0


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

    assert [scheduler.find(str(index)) for index in range(4)] == [None, None, jobs[2], jobs[3]]
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
