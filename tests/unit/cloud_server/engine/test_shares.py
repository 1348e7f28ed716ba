"""Fair shares, in virtual time: no thread, no model, no clock."""

from statistics import mean

import pytest

from cloud_server.engine.caller import Caller
from cloud_server.engine.shares import HEAD_START, MAX_LINE_TURNS, QUANTUM_CALLS, Accounts
from hybridsd.tokens import Quota
from tests.support.crowd import Crowd, Member, jain

CALL_S = 1.0


class EvenCrowd(Crowd):
    """A crowd at a machine whose calls all take a second, so that times are counts of calls."""

    def call_s(self, batch: object) -> float:
        return CALL_S


def caller(name: str, **changes: object) -> Caller:
    principal, _, user = name.partition("/")
    return Caller(principal=principal, user=user, owner=name, **changes)  # type: ignore[arg-type]


def mixed(weights: dict[str, float], num: int = 200) -> list[Member]:
    """Returns clients of several tokens, of whom each has images of all lengths and sizes."""
    calls, widths, names = [(4,), (8, 12), (20,), (50,), (6, 25)], (8, 8, 8, 16, 20), list(weights)
    return [
        Member(
            caller(names[index % len(names)], weight=weights[names[index % len(names)]]),
            calls[index // len(names) % len(calls)],
            width=widths[index // 7 % len(widths)],
        )
        for index in range(num)
    ]


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 2.0, "c": 4.0}], ids=str)
def test_tokens_share_by_weight_and_refusals_are_honest(weights: dict[str, float]) -> None:
    """At ten times what a machine can do, with images of all sizes: shares, retries, waits and batches are well."""
    members = mixed(weights)
    crowd = Crowd(members)
    crowd.run(120.0)

    def index(from_s: int, for_s: int) -> float:
        costs = crowd.costs(from_s, from_s + for_s)
        return jain([costs[name] / weight for name, weight in weights.items()])

    assert min(index(start, 10) for start in range(10, 110, 5)) >= 0.95
    assert min(index(start, 20) for start in range(10, 100, 5)) >= 0.98
    retries = [count for member in members for count in member.retries]
    assert mean(retries) <= 1.5
    assert sorted(retries)[int(0.99 * len(retries))] <= 8
    assert mean(map(len, crowd.batches)) >= 6.5  # of 8


@pytest.mark.parametrize(("max_batch", "factor"), [(8, 1.1), (1, 2.2)])
def test_one_job_beside_thirty(max_batch: int, factor: float) -> None:
    """It takes as many calls as alone where there are several places, and its half of them where there is one."""
    one = Member(caller("one"), (20,), begins_s=30.0, images=20)
    crowd = EvenCrowd([one, *(Member(caller("many"), (20,)) for _ in range(30))], max_batch=max_batch)
    crowd.run(1200.0)

    assert len(one.seen) == 20
    assert mean(one.seen) <= factor * 20
    assert max(one.seen) <= factor * 20 + 2 * QUANTUM_CALLS


@pytest.mark.parametrize(("max_batch", "most"), [(8, 4 + 2), (1, 4 + QUANTUM_CALLS + 2)])
def test_long_jobs_do_not_starve_short_ones(max_batch: int, most: int) -> None:
    """A job of 4 steps beside thirty of 50 of the same size waits a quantum at most, and a call with many places."""
    one = Member(caller("short"), (4,), begins_s=30.0, images=20, think_s=10.0)
    crowd = EvenCrowd([one, *(Member(caller("long"), (50,)) for _ in range(30))], max_batch=max_batch)
    crowd.run(2000.0)

    assert len(one.seen) == 20
    assert max(one.seen) <= most


def test_long_and_short_have_the_same() -> None:
    """What counts is time, not images."""
    crowd = EvenCrowd(
        [Member(caller("short"), (4,)) for _ in range(10)] + [Member(caller("long"), (50,)) for _ in range(10)]
    )
    crowd.run(600.0)

    costs = crowd.costs(100.0, 600.0)
    assert jain([costs["short"], costs["long"]]) > 0.99


def test_users_of_a_principal_share_its_share() -> None:
    """Nobody gains by naming users, and a user with many jobs does not take those of another."""
    crowd = EvenCrowd(
        [Member(caller("gateway/many"), (20,)) for _ in range(12)]
        + [Member(caller("gateway/few"), (20,)) for _ in range(4)]
        + [Member(caller("token"), (20,)) for _ in range(8)]
    )
    crowd.run(1000.0)

    costs = crowd.costs(100.0, 1000.0)
    assert jain([costs["gateway"], costs["token"]]) > 0.99
    assert jain([costs["gateway/many"], costs["gateway/few"]]) > 0.99


def test_idleness_earns_nothing_and_work_alone_is_no_debt() -> None:
    """Whoever comes back after a while has its share from then on: no more, and no less for who worked meanwhile."""
    comes_back = [Member(caller("idle"), (20,), images=1) for _ in range(8)]
    later = [Member(caller("idle"), (20,), begins_s=1000.0) for _ in range(8)]
    crowd = EvenCrowd([*comes_back, *later, *(Member(caller("busy"), (20,), begins_s=1.0) for _ in range(8))])
    crowd.run(1400.0)

    for from_s in (1010.0, 1100.0, 1200.0):
        costs = crowd.costs(from_s, from_s + 100.0)
        assert jain([costs["idle"], costs["busy"]]) > 0.95
    assert crowd.costs(200.0, 900.0).get("idle", 0.0) == 0.0


def test_large_images_do_not_take_the_time_of_small_ones() -> None:
    """Calls of one size that take six times as long have a turn less often."""
    crowd = Crowd(
        [Member(caller("large"), (20,), width=20) for _ in range(8)]
        + [Member(caller("small"), (20,), width=8) for _ in range(8)]
    )
    crowd.run(120.0)

    costs = crowd.costs(20.0, 120.0)
    assert jain([costs["large"], costs["small"]]) > 0.99
    widths = [batch[0].request.latent_shape[2] for batch in crowd.batches]
    assert widths.count(8) > 5 * widths.count(20)


def test_one_size_of_a_caller_does_not_starve_another() -> None:
    """Who uses its share for large images still has places for its small ones."""
    members = mixed({"a": 1.0, "b": 1.0, "c": 1.0}, 40)
    crowd = Crowd(members)
    crowd.run(120.0)

    assert all(member.seen for member in members)
    assert max(crowd.waits_s) < 20.0


@pytest.mark.parametrize("weight", [1.0, 1000.0])
def test_many_sizes_do_not_take_the_turns_of_one(weight: float) -> None:
    """Each in a batch of its own: they have the share of their caller among them, not a share each."""
    many = [Member(caller("many", weight=weight), (20,)) for _ in range(12)]
    crowd = EvenCrowd([*many, *(Member(caller("sizes"), (20,), width=9 + index) for index in range(24))])
    crowd.run(1000.0)

    costs = crowd.costs(100.0, 1000.0)
    assert costs["sizes"] > 0
    assert costs["sizes"] / 900 < 1 / (1 + weight) + 0.03


def test_priority_is_a_head_start() -> None:
    """A job of priority begins at the next call; those of a flood of them take no more than their share for long."""
    first = Member(caller("vip", has_priority=True), (20,), begins_s=50.0, images=3, think_s=50.0)
    crowd = EvenCrowd([first, *(Member(caller(f"other-{index}"), (20,)) for index in range(20))])
    crowd.run(300.0)
    assert len(first.seen) == 3
    assert max(first.seen) <= 20 + 2

    flood = [Member(caller("vip", has_priority=True), (20,)) for _ in range(30)]
    crowd = EvenCrowd([*flood, *(Member(caller("other"), (20,)) for _ in range(10))])
    crowd.run(500.0)
    early, later = crowd.costs(0.0, 16.0), crowd.costs(200.0, 500.0)
    assert early.get("other", 0.0) == 0.0
    assert later["other"] > 0.45 * 300
    assert HEAD_START * QUANTUM_CALLS > 100  # calls of a job: what the flood may have first


def test_every_job_begins_after_bounded_work_of_others() -> None:
    """However many newcomers with priority, and with more weight: who waits has a place after `MAX_LINE_TURNS`."""
    waits = Member(caller("light", weight=0.001), (20,), begins_s=50.0, images=1)
    crowd = EvenCrowd(
        [waits]
        + [
            Member(caller(f"vip-{index}", has_priority=True, weight=1000.0), (3,), begins_s=3.0 * index, images=1)
            for index in range(400)
        ],
        max_batch=1,
    )
    crowd.run(3000.0)

    assert len(waits.seen) == 1
    assert waits.seen[0] > 100.0  # it did have to wait
    began_s = next(batch for batch, jobs in enumerate(crowd.batches) if jobs[0].caller.principal == "light")
    assert began_s <= 50 + MAX_LINE_TURNS + QUANTUM_CALLS


@pytest.mark.parametrize("max_batch", [1, 8])
def test_whoever_has_had_too_much_is_not_starved(max_batch: int) -> None:
    """By no weight, and by no other user of its own: a place that it has waited for is not lost at once."""
    members = [
        Member(caller("light", weight=0.001), (20,)),
        *(Member(caller("heavy/many", weight=1000.0), (20,), begins_s=3.0) for _ in range(20)),
        Member(caller("heavy/one", weight=1000.0), (50,)),
    ]
    crowd = EvenCrowd(members, max_batch=max_batch)
    crowd.run(3000.0)

    for principal, user in (("light", ""), ("heavy", "one"), ("heavy", "many")):
        turns = [
            index
            for index, batch in enumerate(crowd.batches)
            if any((job.caller.principal, job.caller.user) == (principal, user) for job in batch)
        ]
        gaps = [after - before for before, after in zip([0, *turns], [*turns, len(crowd.batches)], strict=True)]
        assert max(gaps) <= MAX_LINE_TURNS + 3 * QUANTUM_CALLS
    assert len(members[0].seen) >= 5


def test_a_quota_of_jobs_bars_nobody_else() -> None:
    """No more than so many have places, and those that wait for that are in nobody's way."""
    quota = Quota(jobs=2)
    others = [Member(caller("other"), (20,), begins_s=5.0) for _ in range(6)]
    crowd = EvenCrowd([*(Member(caller("limited", quota=quota), (20,)) for _ in range(20)), *others])
    crowd.run(400.0)

    of_limited = [sum(job.caller.principal == "limited" for job in batch) for batch in crowd.batches]
    assert set(of_limited) == {2}
    assert max(max(member.seen) for member in others) <= 20 + 1


def test_batches_are_stable() -> None:
    """A batch changes when jobs begin and end, and hardly else: its joined embeddings are kept until then."""
    members = mixed({"a": 1.0, "b": 1.0, "c": 1.0}, 60)
    for member in members:
        member.width = 8
    crowd = Crowd(members)
    crowd.run(60.0)

    changes = sum(a != b for a, b in zip(crowd.batches, crowd.batches[1:], strict=False))
    num_done = sum(len(member.seen) for member in members)
    assert changes <= 1.2 * num_done


def test_accounts_are_bounded() -> None:
    """A million names cost nothing once they are gone."""
    accounts = Accounts()
    for index in range(10_000):
        accounts.charge({f"name-{index}": 1.0}, {f"name-{index}": 1.0, "always": 1.0}, {"always"}, 16.0)

    assert len(accounts._had) < 1100
