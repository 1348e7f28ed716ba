"""Several clouds that stand in for each other: which is asked, and which was bad of late. One cloud is a pool of one.

Each address of a name with several is a cloud of its own.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from edge_client.addresses import is_loopback
from edge_client.cache import Cache
from edge_client.cloud.client import Cloud
from edge_client.cloud.connection import read_target
from edge_client.cloud.names import find_addresses, is_address
from edge_client.cloud.types import CLOUD_FAILURES, Capabilities, CloudModel, CloudSegment, printable
from edge_client.request import Resolved, Stage
from hybridsd.errors import CloudBusy, CloudUnreachable, HybridSDError, Reason
from hybridsd.manifest import BundleFile
from hybridsd.plan import Plan

MAX_SERVERS = 16
"""Of a pool; also the most addresses of a name that are used."""
AGE_S = 2.0
"""An answer that is older is asked for again, beside the work."""
OLD_S = 10.0
"""One that is older than this is waited for."""
FIRST_ANSWER_S = 1.0
"""How long a choice waits for the first answer."""
GRACE_S = 0.1
"""How long it waits for the others then."""
UNION_S = 2.0
"""How long the answers of all are waited for, once one has come."""
REST_S = 1.0
"""A cloud that failed is left alone for so long, twice as long after each further failure."""
MAX_REST_S = 60.0
RESOLVE_S = 30.0
"""A name is resolved again after so long, or when a cloud has failed."""
RESOLVE_WAIT_S = 2.0
"""How long a name is waited for at first; again after so long at the earliest."""
NEAR_S, NEAR_PART = 0.002, 0.25
"""Loads this near to the least are equal: among them chance decides, so that many edges do not all choose one."""
ASSUMED_CALL_S = 0.1
JITTER = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a cloud must serve to be asked."""

    models: tuple[str, ...] = ("",)
    """Ids; empty is the default of the pool."""
    loras: tuple[str, ...] = ()
    latent_space: str = ""
    width: int = 0
    height: int = 0
    num_calls: int = 20

    @classmethod
    def of(cls, resolved: Resolved, stages: Sequence[Stage]) -> "Wanted":
        """Returns what stages of an image need."""
        return cls(
            models=tuple(dict.fromkeys(stage.model for stage in stages)) or ("",),
            loras=tuple(name for name, _ in resolved.request.loras),
            latent_space=resolved.latent_space,
            width=resolved.width,
            height=resolved.height,
            num_calls=resolved.num_inference_steps,
        )


class Member:
    """A cloud of a pool, and what is known of it. Thread-safe.

    Attributes:
        cloud: The connection to it.
        num_jobs: Jobs of this edge that it has now.
    """

    def __init__(self, cloud: Cloud, clock: Callable[[], float] = time.monotonic) -> None:
        self.cloud, self._clock = cloud, clock
        self._lock = threading.Lock()
        self.num_jobs = 0
        self.last: Capabilities | None = None
        """What it answered last, however long ago."""
        self.found: Capabilities | None = None
        """The same; None where it did not answer when it was asked last."""
        self.error: HybridSDError | None = None
        """Why it did not."""
        self.asked_at = self.found_at = float("-inf")
        self.is_asking = False
        self._begun_at: list[float] = []
        self._rest_until = self._failed_at = 0.0
        self._num_failures = 0
        self._heals = False

    @property
    def target(self) -> str:
        """Its name, for people."""
        return self.cloud.target

    @property
    def rests_s(self) -> float:
        """For how long it is better left alone."""
        return max(0.0, self._rest_until - self._clock())

    def renew(self) -> None:
        """Has it connected to anew, where nobody was there."""
        if self._heals:
            self.cloud.renew()

    def begin(self) -> None:
        """Notes that a job of this edge goes there."""
        self.renew()
        with self._lock:
            self.num_jobs += 1
            now = self._clock()  # an only cloud may never be asked for its load
            self._begun_at = [*(at for at in self._begun_at if now - at < OLD_S), now]

    def end(self) -> None:
        """Notes that it has ended."""
        with self._lock:
            self.num_jobs -= 1

    def failed(self, error: HybridSDError) -> None:
        """Remembers that it was bad: for as long as it says, else longer after each further time."""
        with self._lock:
            now = self._clock()
            rest_s = 0.0 if error.retry_delay_s else REST_S
            if not isinstance(error, CloudBusy):
                if now - self._failed_at > 2 * MAX_REST_S:
                    self._num_failures = 0
                self._num_failures, self._failed_at = self._num_failures + 1, now
                rest_s = min(MAX_REST_S, REST_S * 2.0 ** min(self._num_failures - 1, 10))
            rest_s = max(rest_s, min(error.retry_delay_s or 0.0, MAX_REST_S)) * random.uniform(1.0, 1.0 + JITTER)
            self._rest_until = max(self._rest_until, now + rest_s)
            self._heals = isinstance(error, CloudUnreachable) and error.retry_delay_s is None

    def got_on(self) -> None:
        """Notes that a job of it got on: all is well."""
        with self._lock:
            self._num_failures, self._rest_until, self._heals = 0, 0.0, False

    def answered(self, found: Capabilities | HybridSDError, asked_at: float) -> None:
        """Notes what it says of itself, or why it does not."""
        if isinstance(found, HybridSDError):
            self.failed(found)
        with self._lock:
            self.is_asking = False
            if isinstance(found, HybridSDError):
                self.found, self.error = None, found
                return
            self.last = self.found = found
            self.error, self.found_at = None, self._clock()
            self._begun_at = [at for at in self._begun_at if at >= asked_at]
            if self._heals:  # nobody was there, and now somebody is
                self._rest_until, self._heals = 0.0, False

    def serves(self, wanted: Wanted, default: str) -> bool | None:
        """Returns whether it can do what is wanted; None where it never said."""
        found = self.last
        if found is None:
            return None
        by_id = {model.id: model for model in found.models}
        models = [by_id.get(name or default) for name in wanted.models]
        return all(model is not None and self._fits(model, wanted) for model in models) and (
            not found.max_size or max(wanted.width, wanted.height) <= found.max_size
        )

    @staticmethod
    def _fits(model: CloudModel, wanted: Wanted) -> bool:
        same_space = not wanted.latent_space or model.latent_space == wanted.latent_space
        return same_space and set(wanted.loras) <= set(model.loras)

    def load_s(self, num_calls: int) -> float:
        """Returns how busy it is: about the seconds that a new job would lose there."""
        with self._lock:
            found, more = self.found, len(self._begun_at)
        if found is None:
            return float("inf")
        call_s = found.call_s or ASSUMED_CALL_S
        busy = (found.num_running + found.num_queued + more) / found.max_batch
        return found.expected_wait_s(num_calls, call_s, more_jobs=more) + busy * call_s


@dataclass(slots=True)
class _Name:
    """A target as it was given, and the clouds that it stands for."""

    target: str
    host: str
    port: int
    members: list[Member]
    addresses: tuple[str, ...] = ()
    resolved_at: float = float("-inf")
    is_resolving: bool = False

    @property
    def is_fixed(self) -> bool:
        """Whether it is one cloud for ever: an address, or this machine."""
        return is_address(self.host) or is_loopback(self.host)


class Pool:
    """The clouds that an edge may ask. Thread-safe.

    Args:
        targets: Each "host:port", at most `MAX_SERVERS`.
        connect: Opens a connection to a target, at one of its addresses where it is given.
        resolve: Returns the addresses of a host; OSError where it has none.
        clock: Seconds that never go back.

    Raises:
        InvalidRequest: FIELD_INVALID if there are too few or too many; what `connect` raises.
    """

    def __init__(
        self,
        targets: Sequence[str],
        connect: Callable[[str, str | None], Cloud],
        *,
        resolve: Callable[[str, int], tuple[str, ...]] = find_addresses,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 1 <= len(targets) <= MAX_SERVERS:
            raise Reason.FIELD_INVALID.error(
                f"`server` names {len(targets)} clouds; give 1 to {MAX_SERVERS}", field="server"
            )
        self._connect, self._resolve, self._clock = connect, resolve, clock
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._retired: list[Member] = []
        self._names_are_old = False
        self._closed = False
        self._away: str | None = None
        self._names = [
            _Name(target, *read_target(target), [Member(connect(target, None), clock)])
            for target in dict.fromkeys(targets)
        ]

    @classmethod
    def of(cls, cloud: "Cloud | Pool") -> "Pool":
        """Returns a pool as it is, and a cloud as a pool of one. Closing that closes the cloud."""
        if isinstance(cloud, Pool):
            return cloud
        pool = cls.__new__(cls)
        pool._clock, pool._lock = time.monotonic, threading.Lock()
        pool._news = threading.Condition(pool._lock)
        pool._retired, pool._names_are_old, pool._closed, pool._away = [], False, False, None
        pool._names = [_Name(cloud.target, "127.0.0.1", 0, [Member(cloud)])]
        return pool

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all connections; what was cancelled is told first, for a bounded time."""
        with self._lock:
            self._closed = True
            members = [*self._current(), *self._retired]
        closing = [threading.Thread(target=member.cloud.close, daemon=True) for member in members[1:]]
        for thread in closing:
            thread.start()
        members[0].cloud.close()
        for thread in closing:
            thread.join()

    @property
    def target(self) -> str:
        """The targets as they were given, for people."""
        return ", ".join(name.target for name in self._names)

    @property
    def cache(self) -> Cache:
        """Where what the clouds sent is remembered, for all."""
        with self._lock:
            return self._current()[0].cloud.cache

    @property
    def away(self) -> str | None:
        """Why no cloud is to be asked now; None where one may be."""
        if self._away is not None:
            return self._away
        reasons = [member.cloud.away for member in self.members()]
        return None if None in reasons else "; ".join(filter(None, reasons))

    @away.setter
    def away(self, why: str | None) -> None:
        self._away = why
        with self._lock:
            for member in self._current():
                member.cloud.away = why

    def members(self) -> tuple[Member, ...]:
        """Returns the clouds that there are. Names are resolved beside that; only the first time it waits for them."""
        now = self._clock()
        with self._news:
            for name in self._names:
                due_s = RESOLVE_WAIT_S if self._names_are_old else RESOLVE_S
                if not name.is_fixed and not name.is_resolving and now - name.resolved_at > due_s:
                    name.is_resolving = True
                    threading.Thread(target=self._look_up, args=(name,), name="hybridsd-names", daemon=True).start()
            self._names_are_old = False
            waiting = [name for name in self._names if name.is_resolving and name.resolved_at == float("-inf")]
            if waiting:
                self._news.wait_for(lambda: not any(name.is_resolving for name in waiting), RESOLVE_WAIT_S)
                for name in waiting:
                    name.resolved_at = max(name.resolved_at, now)  # it is not waited for again
            return self._current()

    def _current(self) -> tuple[Member, ...]:
        return tuple(member for name in self._names for member in name.members)

    def _look_up(self, name: _Name) -> None:
        try:
            found = self._resolve(name.host, name.port)[:MAX_SERVERS]
        except (OSError, UnicodeError):  # whoever connects says so
            found = ()
        with self._news:
            name.is_resolving, name.resolved_at = False, self._clock()
            unused = [member for member in self._retired if member.num_jobs == 0]  # not those that retire now:
            self._retired = [member for member in self._retired if member.num_jobs]  # one may have been chosen just now
            if found and set(found) != set(name.addresses) and not self._closed:
                with contextlib.suppress(HybridSDError):  # a file of `connect` may be gone: then all stays as it is
                    self._change(name, found)
            self._news.notify_all()
        for member in unused:
            member.cloud.close()

    def _change(self, name: _Name, addresses: tuple[str, ...]) -> None:
        """Has a member for each address; those that go on keep what is known of them."""
        before = dict(zip(name.addresses, name.members, strict=True)) if len(name.addresses) > 1 else {}
        if len(addresses) == 1:  # as a name without more: gRPC resolves it
            if len(name.addresses) > 1:
                self._retired += name.members
                name.members = [Member(self._connect(name.target, None), self._clock)]
        else:
            members = [before.get(each) or Member(self._connect(name.target, each), self._clock) for each in addresses]
            self._retired += [member for member in name.members if member not in members]
            name.members = members
        for member in name.members:
            if self._away is not None:
                member.cloud.away = self._away
        name.addresses = addresses

    def failed(self, member: Member, error: HybridSDError) -> None:
        """Remembers that a cloud was bad, and resolves its name again."""
        member.failed(error)
        self._names_are_old = True

    def choose(self, wanted: Wanted, *, without: Collection[Member] = ()) -> Member | None:
        """Returns the cloud to ask: the least loaded of those that serve what is wanted and were not bad of late.

        Asks them for their load where that is old, beside the work: it waits only where nothing is known, and briefly.

        Args:
            wanted: What it must serve. Where none is known to, the first is to say so.
            without: Those not to choose.

        Returns:
            None where no other is left.
        """
        members = self.members()
        if len(members) == 1:
            return None if members[0] in without else members[0]
        able = [member for member in members if member not in without and member.cloud.away is None]
        if not able:
            return None
        self._learn(able)
        default = self.default_model
        fitting = [member for member in able if member.serves(wanted, default) is not False]
        if not fitting:
            return None if without else able[0]
        ready = [member for member in fitting if not member.rests_s]
        if not ready:
            return min(fitting, key=lambda member: member.rests_s)
        loads = {member: member.load_s(wanted.num_calls) for member in ready}
        least = min(loads.values())
        near = [member for member, load_s in loads.items() if load_s <= least * (1 + NEAR_PART) + NEAR_S]
        return min(near, key=lambda member: (member.num_jobs, random.random()))

    @property
    def default_model(self) -> str:
        """The first model of the first cloud that has said which it has; empty where none has."""
        with self._lock:
            known = [member.last.models for member in self._current() if member.last is not None]
        return next((models[0].id for models in known if models), "")

    def refusal(self) -> HybridSDError:
        """Returns why none is to be asked now."""
        return Reason.UNAVAILABLE.error(f"no cloud is to be asked now: {self.away or 'all have failed'}")

    def fit(self, segment: CloudSegment, member: Member, *, default: str = "") -> CloudSegment:
        """Returns a segment with the default model named, where that is not the cloud's own first.

        Args:
            segment: What is to be run.
            member: Where.
            default: What an empty model stands for; else the default of the pool.
        """
        default, found = default or self.default_model, member.last
        if found is None or not found.models or found.models[0].id == default:
            return segment
        stages = tuple(replace(stage, model=stage.model or default) for stage in segment.stages)
        return replace(segment, stages=stages)

    def _learn(self, members: Sequence[Member]) -> None:
        """Asks what is not known, or old; waits only where nothing of use is known."""
        self._ask(members, AGE_S)
        now = self._clock()
        with self._news:
            if any(member.found is not None and now - member.found_at < OLD_S for member in members):
                return
            until = time.monotonic() + FIRST_ANSWER_S
            is_first = True
            while any(member.is_asking for member in members):
                if is_first and any(member.found is not None and member.found_at >= now for member in members):
                    until, is_first = min(until, time.monotonic() + GRACE_S), False
                left_s = until - time.monotonic()
                if left_s <= 0 or not self._news.wait(left_s):
                    return

    def _ask(self, members: Sequence[Member], age_s: float) -> None:
        """Asks those whose last question is older, each in a thread of its own; at most one question each."""
        with self._lock:
            now = self._clock()
            due = [each for each in members if not each.is_asking and now - each.asked_at >= age_s]
            for member in due:
                member.is_asking, member.asked_at = True, now
        for member in due:
            threading.Thread(target=self._ask_one, args=(member,), name="hybridsd-ask", daemon=True).start()

    def _ask_one(self, member: Member) -> None:
        found: Capabilities | HybridSDError
        try:
            member.renew()
            found = member.cloud.capabilities()
        except HybridSDError as error:
            found = error
        except Exception as error:  # of a channel that was closed meanwhile
            found = Reason.INTERNAL.error(printable(f"{member.target} cannot be asked: {error!r}"))
        with self._news:
            member.answered(found, member.asked_at)
            self._news.notify_all()

    def ask_all(self, wait_s: float = UNION_S) -> tuple[Member, ...]:
        """Asks all what they can do, and returns them; who has not answered in time may have answered before.

        Args:
            wait_s: How long to wait for the others once one has answered, and twice as long for that.
        """
        members = self.members()
        self._ask(members, 0.0)
        until = time.monotonic() + 2 * wait_s
        with self._news:
            self._news.wait_for(lambda: not all(member.is_asking for member in members), until - time.monotonic())
            self._news.wait_for(lambda: not any(member.is_asking for member in members), wait_s)
        return members

    def capabilities(self) -> Capabilities:
        """Returns what the clouds can do together.

        Raises:
            HybridSDError: By the table of errors, where none answers.
        """
        members = self.members()
        if len(members) == 1:
            member, asked_at = members[0], self._clock()
            try:
                found = member.cloud.capabilities()
            except HybridSDError as error:
                member.answered(error, asked_at)
                raise
            member.answered(found, asked_at)
            return found
        return self.union(self.ask_all())

    def union(self, members: Sequence[Member]) -> Capabilities:
        """Returns what clouds that have answered can do together.

        Raises:
            HybridSDError: Why the first did not answer, where none has.
        """
        answers = [member.found for member in members if member.found is not None]
        if not answers:
            error = next((member.error for member in members if member.error is not None), None)
            raise error or Reason.UNAVAILABLE.error(f"none of {self.target} answers")
        if len(answers) == 1:
            return answers[0]
        models: dict[str, CloudModel] = {}
        bundles: dict[str, tuple[BundleFile, ...]] = {}
        max_timesteps: dict[str, float] = {}
        for each in answers:
            for model in each.models:
                known = models.setdefault(model.id, model)
                models[model.id] = replace(known, loras=tuple(dict.fromkeys((*known.loras, *model.loras))))
            max_timesteps |= {name: most for name, most in each.max_timesteps.items() if name not in bundles}
            bundles = {**each.bundles, **bundles}
        waits = [each.wait_s for each in answers]
        sizes = [each.max_size for each in answers]
        return Capabilities(
            server_version=", ".join(dict.fromkeys(each.server_version for each in answers)),
            models=tuple(models.values()),
            bundles=bundles,
            max_timesteps=max_timesteps,
            num_running=sum(each.num_running for each in answers),
            num_queued=sum(each.num_queued for each in answers),
            call_s=min((each.call_s for each in answers if each.call_s), default=0.0),
            max_batch=sum(each.max_batch for each in answers),
            min_size=min(each.min_size for each in answers),
            max_size=0 if 0 in sizes else max(sizes),
            wait_s=min((wait for wait in waits if wait is not None), default=None),
        )

    def models(self) -> tuple[CloudModel, ...]:
        """Returns the models of all, as they said within the last minute.

        Raises:
            HybridSDError: By the table of errors, where none answers.
        """
        members = self.members()
        if len(members) == 1:
            return members[0].cloud.models()
        self._learn([member for member in members if member.cloud.away is None])
        if any(member.found is not None for member in members):
            return self.union(members).models
        return self.capabilities().models

    def compile_plan(
        self, model: str, scheduler: str, num_inference_steps: int, begin_step: int = 0, *, prediction_type: str = ""
    ) -> Plan:
        """Returns the plan of a scheduler; see `Cloud.compile_plan`. A cloud that fails is stood in for."""
        tried: list[Member] = []
        first: HybridSDError | None = None
        while (member := self.choose(Wanted(models=(model,)), without=tried)) is not None:
            try:
                return member.cloud.compile_plan(
                    model, scheduler, num_inference_steps, begin_step, prediction_type=prediction_type
                )
            except CLOUD_FAILURES as error:
                self.failed(member, error)
                tried.append(member)
                first = first or error
        raise first or self.refusal()

    def download(self, bundle: str, path: str, offset_bytes: int) -> Iterator[bytes]:
        """Yields a file's content from an offset on, from a cloud that has the bundle; see `Cloud.download`."""
        members = self.members()
        offers = [member.last.bundles.get(bundle) if member.last else None for member in members]
        offered = next((files for files in offers if files), None)
        having = [
            member for member, files in zip(members, offers, strict=True) if files == offered or len(members) == 1
        ]
        first: HybridSDError | None = None
        for member in sorted(having, key=lambda each: (each.cloud.away is not None, each.rests_s)):
            has_begun = False
            try:
                for chunk in member.cloud.download(bundle, path, offset_bytes):
                    has_begun = True
                    yield chunk
                return
            except CLOUD_FAILURES as error:
                if has_begun:
                    raise
                self.failed(member, error)
                first = first or error
        raise first or self.refusal()
