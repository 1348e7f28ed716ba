"""The door of the queue: who may come in, and when who may not is to come again.

A refusal is a promise. Its delay is estimated from measured work, and room is kept for whoever comes again in time, so
that one retry is enough. Everyone has a part of the queue by weight, and promises are good for that part: a flood of
requests keeps nobody out but itself. Jobs that came in stay.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cloud_server.engine.caller import Caller

MAX_PROMISES = 512
"""Of all callers; each may have a part of them by weight, and further refusals are estimates alone."""
MIN_RETRY_S, MAX_RETRY_S = 0.5, 3600.0
"""Of a delay. The upper one is for clocks that have gone wrong; a caller with less patience gives up at once."""
JITTER = 0.05
"""Part of a delay that is added at random at most, and a tenth of a second."""
MAX_TURNED_AWAY = 1024
"""Callers whose refusals are remembered until something changes."""
GRACE_S, GRACE = 3.0, 0.1
"""For how long room is kept: seconds, and a part of the delay."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """How busy it is and will be, as far as measured work tells."""

    waiting: Sequence[Caller]
    """In the order in which their jobs begin."""
    begins_s: Sequence[float]
    """When they do, from now on."""
    running: Sequence[Caller]
    num_free: int
    """Places that are free."""
    next_s: float
    """When the one after them would."""
    spacing_s: float
    """Mean time from one beginning to the next, further on."""
    barred: Sequence[Caller] = ()
    """Whose jobs wait until others of their own have ended, as a quota says: in nobody's way but their own."""
    barred_s: Sequence[float] = ()
    """When those begin."""

    def begin_s(self, index: int) -> float:
        """Returns when the job of an index begins, also beyond the last; 0 for one before the first."""
        if index < 0:
            return 0.0
        if index < len(self.begins_s):
            return self.begins_s[index]
        return self.next_s + (index - len(self.begins_s)) * self.spacing_s


@dataclass(frozen=True, slots=True)
class Promise:
    """That there is room from one time to another."""

    caller: Caller
    number: int
    """In the order in which they were given; kept when one is renewed."""
    due_s: float
    until_s: float


class Door:
    """What has been promised to whom, by owner and request id."""

    def __init__(self, *, max_queue: int, rand: Callable[[], float] = random.random) -> None:
        """Takes how many jobs may wait.

        A quarter more may, so that the first job of whoever has none here finds room, and that of whoever was promised
        it. While others are here, who has its part already leaves a quarter free.
        """
        self._max_queue, self._rand = max_queue, rand
        self._spare = max_queue // 4
        self._extra = max(2, self._spare)
        self._promises: dict[tuple[str, str], Promise] = {}
        self._number = 0
        self._lapse_s = float("inf")  # when the first promise does
        self._turned_away: tuple[Outlook | None, dict[Caller, float]] = None, {}

    def __len__(self) -> int:
        return len(self._promises)

    def forget(self, key: tuple[str, str]) -> None:
        """Takes a promise back: whoever had it has come in, or gives up."""
        if self._promises.pop(key, None) is not None:
            self._turned_away = None, {}

    def num_promised(self, caller: Caller, now_s: float) -> int:
        """Returns how many promises a principal has."""
        return sum(
            promise.caller.principal == caller.principal and now_s <= promise.until_s
            for promise in self._promises.values()
        )

    def delay_s(self, key: tuple[str, str], caller: Caller, outlook: Outlook, now_s: float) -> float | None:
        """Lets a job in, or promises when.

        Args:
            key: Owner and id of the job; whoever has no id cannot be known again, and is promised nothing.
            caller: Who asks.
            outlook: How busy it is.
            now_s: The time.

        Returns:
            None where there is room; else the seconds after which there will be, a little more at random.
        """
        if now_s > self._lapse_s:
            self._promises = {k: promise for k, promise in self._promises.items() if now_s <= promise.until_s}
            self._lapse_s = min((promise.until_s for promise in self._promises.values()), default=float("inf"))
            self._turned_away = None, {}
        mine = self._promises.get(key)
        if mine is None and self._turned_away[0] is outlook and caller in self._turned_away[1]:
            return self._later(self._turned_away[1][caller])  # a flood is cheap
        number = self._number if mine is None else mine.number
        ahead = [promise for promise in self._promises.values() if promise.number < number]
        room = _Room(self._max_queue, caller, outlook, [promise.caller for promise in ahead])
        is_due = mine is not None and now_s >= mine.due_s
        if self._has_room(room, ahead, outlook, now_s, is_due=is_due):
            return None
        wait_s = room.opens_s(outlook, self._max_queue)
        if mine is not None:
            wait_s = max(wait_s, mine.due_s - now_s)
        wait_s = min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)
        delay_s = self._later(wait_s)
        if mine is not None or (key[1] and self._may_promise(room, caller)):
            self._number += mine is None
            until_s = now_s + delay_s + GRACE_S + GRACE * delay_s
            self._promises[key] = Promise(caller, number, now_s + wait_s, until_s)
            self._lapse_s = min(self._lapse_s, until_s)
            self._turned_away = None, {}
        else:
            if self._turned_away[0] is not outlook or len(self._turned_away[1]) >= MAX_TURNED_AWAY:
                self._turned_away = outlook, {}
            self._turned_away[1][caller] = wait_s
        return delay_s

    def _later(self, wait_s: float) -> float:
        return wait_s + self._rand() * (0.1 + JITTER * wait_s)

    def _has_room(self, room: "_Room", ahead: list[Promise], outlook: Outlook, now_s: float, *, is_due: bool) -> bool:
        """Whether a job may come in now: behind those who have been promised the room before it is free again."""
        most = self._max_queue
        if room.num_waiting < 0:
            return True  # a place is free, and nobody is there to take it
        if is_due and room.is_within_part:
            return room.num_waiting < most + self._extra
        until_s = now_s + max(MIN_RETRY_S, outlook.begin_s(len(outlook.waiting)))
        soon = [promise.caller for promise in ahead if promise.due_s <= until_s]
        kept = min(room.kept(soon), most - self._spare)  # those who come have a quarter more
        is_new = all(one.principal != room.caller.principal for one in soon)
        if is_new and room.num_of_principal == 0:
            return room.num_waiting + kept < most + self._extra
        if room.is_within_part_with(soon):
            return room.num_waiting + kept < most
        is_new = all((one.principal, one.user) != (room.caller.principal, room.caller.user) for one in soon)
        if is_new and room.num_of_user == 0:
            return room.num_waiting + kept < most + self._extra // 2 - (self._spare if room.has_other_principals else 0)
        return room.num_waiting + kept < most - (self._spare if room.is_shared else 0)

    def _may_promise(self, room: "_Room", caller: Caller) -> bool:
        part = max(1, int(MAX_PROMISES * room.share))
        users = [one.caller.user for one in self._promises.values() if one.caller.principal == caller.principal]
        return (
            len(self._promises) < MAX_PROMISES
            and len(users) < part
            and users.count(caller.user) < max(1, part // len({*users, caller.user}))
        )


class _Room:
    """A caller's part of the queue, and what it has of it."""

    def __init__(self, max_queue: int, caller: Caller, outlook: Outlook, promised: Sequence[Caller]) -> None:
        self.caller, self._max_queue = caller, max_queue
        here = [*outlook.waiting, *outlook.running, *promised, caller]
        self._weights = {one.principal: one.weight for one in here}
        self._weight = sum(self._weights.values())
        self.share = caller.weight / self._weight
        users = {one.user for one in here if one.principal == caller.principal}
        self.has_other_principals = len(self._weights) > 1
        self.is_shared = self.has_other_principals or len(users) > 1
        barred = [one for one in outlook.barred if one.principal == caller.principal]
        self._waiting = Counter(one.principal for one in [*outlook.waiting, *barred])
        self._users = Counter(one.user for one in [*outlook.waiting, *barred] if one.principal == caller.principal)
        self._promised = promised
        self.num_waiting = len(outlook.waiting) + len(barred) - (0 if barred else outlook.num_free)
        self.num_of_principal = self._waiting[caller.principal]
        self.num_of_user = self._users[caller.user]
        self.part = self._part(caller.principal)
        self.part_of_user = max(1, self.part // len(users))

    def _is_user(self, other: Caller) -> bool:
        return (other.principal, other.user) == (self.caller.principal, self.caller.user)

    def _part(self, principal: str) -> int:
        return max(1, int(self._max_queue * self._weights[principal] / self._weight))

    @property
    def is_within_part(self) -> bool:
        """Whether the caller may have one more, as far as its own part goes."""
        return self.is_within_part_with([])

    def is_within_part_with(self, promised: Sequence[Caller]) -> bool:
        """The same, if these came in before."""
        num_users = sum(map(self._is_user, promised))
        num = sum(one.principal == self.caller.principal for one in promised)
        return self.num_of_principal + num < self.part and self.num_of_user + num_users < self.part_of_user

    def kept(self, promised: Sequence[Caller]) -> int:
        """Returns how much of the queue is kept for these: of each principal, or user, not more than its part."""
        own, me = self.caller.principal, self.caller.user
        principals = Counter(one.principal for one in promised)
        users = Counter(one.user for one in promised if one.principal == own)
        del principals[own]
        return (
            users.pop(me, 0)
            + sum(min(count, max(0, self.part_of_user - self._users[name])) for name, count in users.items())
            + sum(min(count, max(0, self._part(name) - self._waiting[name])) for name, count in principals.items())
        )

    def opens_s(self, outlook: Outlook, most: int) -> float:
        """Returns how long it takes until there is room, behind all who have been promised it before."""
        num_promised = sum(one.principal == self.caller.principal for one in self._promised)
        num_by_user = sum(map(self._is_user, self._promised))
        jobs = sorted(
            zip([*outlook.begins_s, *outlook.barred_s], [*outlook.waiting, *outlook.barred], strict=True),
            key=lambda begin: begin[0],
        )
        if self.num_of_user + num_by_user >= self.part_of_user and self.part_of_user < self.part:
            begins = [begin_s for begin_s, one in jobs if self._is_user(one)]
            return self._of_own(begins, self.num_of_user + num_by_user - self.part_of_user, outlook)
        begins = [begin_s for begin_s, one in jobs if one.principal == self.caller.principal]
        own_s = self._of_own(begins, self.num_of_principal + num_promised - self.part, outlook)
        all_s = outlook.begin_s(self.num_waiting + outlook.num_free + self.kept(self._promised) - most)
        return max(own_s, all_s)

    def _of_own(self, begins_s: Sequence[float], index: int, outlook: Outlook) -> float:
        """Returns when the own job of an index has begun, also beyond the last."""
        if index < 0:
            return 0.0
        if index < len(begins_s):
            return begins_s[index]
        last_s = begins_s[-1] if begins_s else outlook.begin_s(0)
        return last_s + (index - len(begins_s) + 1) * outlook.spacing_s / self.share
