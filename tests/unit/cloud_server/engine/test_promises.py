"""The door of the queue: room for everyone, and refusals that are true. No thread, no clock."""

from collections.abc import Callable

import pytest

from cloud_server.engine.caller import Caller
from cloud_server.engine.promises import GRACE_S, MAX_PROMISES, MAX_TURNED_AWAY, Door, Outlook

ALICE, BOB, CAROL = (Caller(principal=name, owner=name) for name in ("alice", "bob", "carol"))


class Cloud:
    """A queue that empties one by one each second, in order."""

    def __init__(self, max_queue: int = 8, num_places: int = 1) -> None:
        self.now_s, self.waiting = 0.0, list[Caller]()
        self.running = [ALICE] * num_places
        self.outlook: Outlook | None = None
        self.num_free = 0
        self.door = Door(max_queue=max_queue, rand=lambda: 0.0)

    def ask(self, name: str, caller: Caller) -> float | None:
        """Asks for room; who finds it is in the queue."""
        if self.outlook is None or list(self.outlook.waiting) != self.waiting:
            self.outlook = Outlook(
                waiting=list(self.waiting),
                begins_s=[float(index + 1) for index in range(len(self.waiting))],
                running=self.running,
                num_free=self.num_free,
                next_s=len(self.waiting) + 1.0,
                spacing_s=1.0,
            )
        outlook = self.outlook
        delay_s = self.door.delay_s((caller.owner, name), caller, outlook, self.now_s)
        if delay_s is None:
            self.door.forget((caller.owner, name))
            self.waiting.append(caller)
        return delay_s

    def fill(self, caller: Caller) -> int:
        """Asks until there is no room; returns how often there was."""
        for index in range(10_000):
            if self.ask(f"fill-{index}", caller) is not None:
                self.door.forget((caller.owner, f"fill-{index}"))
                return index
        raise AssertionError("there is no end of room")

    def tick(self, seconds: float = 1.0) -> None:
        self.now_s += seconds
        del self.waiting[: int(seconds)]


def test_who_is_alone_has_the_whole_queue() -> None:
    """`max_queue` jobs, no more."""
    assert Cloud(max_queue=8).fill(ALICE) == 8


def test_a_promise_is_kept_against_those_who_come_later() -> None:
    """Room that one was promised is not given to another who asks at the right moment."""
    cloud = Cloud()
    cloud.fill(ALICE)
    delay_s = cloud.ask("promised", ALICE)
    assert delay_s == 1.0
    cloud.tick()

    assert cloud.ask("later", ALICE) is not None
    assert cloud.ask("promised", ALICE) is None


def test_the_promised_come_in_one_after_another() -> None:
    """Fifty who are refused at once are each told another time, and none of them twice."""
    cloud = Cloud()
    cloud.fill(ALICE)
    delays = [cloud.ask(f"more-{index}", ALICE) for index in range(50)]
    assert delays == [float(index + 1) for index in range(50)]

    for index in range(50):
        cloud.tick()
        assert cloud.ask(f"more-{index}", ALICE) is None


def test_whoever_comes_too_early_is_sent_back_to_the_same_time() -> None:
    """Asking more often moves nobody forward, and costs no place in the line."""
    cloud = Cloud()
    cloud.fill(ALICE)
    for index in range(4):
        cloud.ask(f"more-{index}", ALICE)
    cloud.tick()

    assert cloud.ask("more-3", ALICE) == 3.0
    assert cloud.ask("more-0", ALICE) is None


@pytest.mark.parametrize("leave", ["lapse", "forget"])
def test_room_of_those_who_do_not_come_is_free(leave: str) -> None:
    """After its grace, or at once when the caller says that it gives up."""
    cloud = Cloud()
    cloud.fill(ALICE)
    cloud.ask("gone", ALICE)
    cloud.tick()
    assert cloud.ask("next", ALICE) is not None
    cloud.door.forget((ALICE.owner, "next"))
    if leave == "forget":
        cloud.door.forget((ALICE.owner, "gone"))
    else:
        cloud.now_s += GRACE_S + 1.0  # nothing has moved meanwhile

    assert cloud.ask("another", ALICE) is None


def test_promises_are_their_owners() -> None:
    """Another owner's id is another promise."""
    cloud = Cloud()
    cloud.fill(ALICE)
    cloud.ask("name", ALICE)
    thief = Caller(principal="alice", owner="thief")
    cloud.tick()

    assert cloud.ask("name", thief) is not None
    assert cloud.ask("name", ALICE) is None


def test_a_newcomer_finds_room_in_a_queue_that_another_has_filled() -> None:
    """The first job at once; further ones as the other's leave, until each has its part."""
    cloud = Cloud()
    cloud.fill(ALICE)
    assert cloud.ask("first", BOB) is None
    assert cloud.ask("second", BOB) is not None
    assert cloud.ask("more", ALICE) is not None

    for _ in range(4):
        cloud.tick()
    assert [cloud.ask(name, BOB) for name in ("second", "third", "fourth")] == [None] * 3
    assert cloud.ask("c", CAROL) is None
    assert len(cloud.waiting) <= 8 + 2


def test_a_flood_gets_its_part_of_promises_and_of_room() -> None:
    """Ten thousand ids of one caller take no room of another, nor its promises."""
    cloud = Cloud()
    cloud.fill(ALICE)
    cloud.ask("b", BOB)
    delays = [cloud.ask(f"flood-{index}", ALICE) for index in range(3000)]
    assert len(cloud.door) <= MAX_PROMISES // 2
    assert all(delay is not None for delay in delays)
    cloud.tick(5.0)

    assert [cloud.ask(f"b{index}", BOB) for index in range(2)] == [None] * 2
    assert cloud.ask("c", CAROL) is None


def test_promises_are_bounded() -> None:
    """Whoever asks under however many names."""
    cloud = Cloud()
    cloud.fill(ALICE)
    for index in range(MAX_PROMISES + 100):
        cloud.ask("name", Caller(principal=f"principal-{index}", owner=str(index)))

    assert len(cloud.door) <= MAX_PROMISES


def user(name: str) -> Caller:
    return Caller(principal="gateway", user=name, owner="gateway")


def other_token(name: str) -> Caller:
    return Caller(principal=name, owner=name)


@pytest.mark.parametrize("make", [user, other_token])
def test_users_of_a_gateway_find_room_as_principals_do(make: Callable[[str], Caller]) -> None:
    """One user who floods does not keep another out: its first job comes in."""
    cloud = Cloud()
    cloud.fill(make("flood"))

    assert cloud.ask("more", make("flood")) is not None
    assert cloud.ask("first", make("other")) is None


def test_a_gateway_that_invents_users_keeps_nobody_out() -> None:
    """Its users have the room of their principal, whatever they are called."""
    cloud = Cloud()
    cloud.running = [user("a")]
    for index in range(100):
        cloud.ask(f"id-{index}", user(f"user-{index}"))

    assert len(cloud.waiting) <= 8 + 1
    assert cloud.ask("first", ALICE) is None


def test_room_that_is_promised_for_later_is_used_until_then() -> None:
    """A queue does not stand empty for those who will come."""
    cloud = Cloud()
    cloud.fill(ALICE)
    for index in range(30):
        cloud.ask(f"more-{index}", ALICE)
    cloud.waiting = cloud.waiting[:1]  # the others have given up

    assert cloud.ask("now", ALICE) is None


def test_users_that_are_turned_away_are_not_kept() -> None:
    """However many a gateway makes up while nothing moves."""
    cloud = Cloud()
    cloud.fill(ALICE)
    for index in range(MAX_PROMISES + MAX_TURNED_AWAY + 10):
        cloud.ask("", Caller(principal="alice", user=str(index), owner=f"alice/{index}"))

    assert len(cloud.door._turned_away[1]) <= MAX_TURNED_AWAY


def test_an_idle_cloud_refuses_nobody() -> None:
    """Whatever it has promised to those who do not come: a place that is free is taken."""
    cloud = Cloud()
    cloud.fill(ALICE)
    for index in range(30):
        cloud.ask(f"more-{index}", ALICE)
    cloud.tick(8.0)
    cloud.num_free, cloud.running = 1, []

    assert cloud.ask("now", ALICE) is None
