"""What replicas of a gateway tell each other through their database: events, who is there, what tokens have used."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from edge_client.web.jobs.database import Database
from edge_client.web.jobs.tables import buckets as _buckets
from edge_client.web.jobs.tables import events as _events
from edge_client.web.jobs.tables import jobs as _jobs
from edge_client.web.jobs.tables import replicas as _replicas

KEPT_S = 600.0
"""So long the events of a finished job can be read at any replica; afterwards its last one can."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event with its number, the SSE id."""

    number: int
    name: str
    data: dict[str, Any]


def slot(event: JobEvent) -> str:
    """Returns whose place an event takes: only the last preview of each image is kept. Empty: nobody's."""
    return f"preview {event.data['image_index']}" if event.name == "preview" else ""


class Board:
    """Reads and writes; each call is a transaction.

    Args:
        database: A shared one.
        lease_s: A replica that has said nothing for so long is taken to be gone.
    """

    def __init__(self, database: Database, lease_s: float) -> None:
        self._database, self._lease_s = database, lease_s

    def add_events(self, new: Sequence[tuple[int, str, JobEvent]]) -> None:
        """Tells events to all replicas.

        Args:
            new: Number and id of the job, and the event; those of a job in order.
        """
        rows = [
            {"job": number, "number": event.number, "name": event.name, "slot": slot(event), "data": event.data}
            for number, _, event in new
        ]
        with self._database.begin() as connection:
            connection.execute(postgresql.insert(_events).on_conflict_do_nothing(), rows)
            for row in rows:
                if row["slot"]:
                    same = (_events.c.job == row["job"]) & (_events.c.slot == row["slot"])
                    connection.execute(_events.delete().where(same, _events.c.number < row["number"]))
            for job_id in dict.fromkeys(job_id for _, job_id, _ in new):
                self._database.notify(connection, job_id)

    def events(self, after: Mapping[int, int]) -> list[tuple[int, JobEvent]]:
        """Returns the events of jobs, by their numbers, after the number of an event of each; in order."""
        if not after:
            return []
        each = [(_events.c.job == job) & (_events.c.number > number) for job, number in after.items()]
        query = sa.select(_events).where(sa.or_(*each)).order_by(_events.c.job, _events.c.number)
        with self._database.begin() as connection:
            rows = connection.execute(query).all()
        return [(row.job, JobEvent(row.number, row.name, row.data)) for row in rows]

    def last(self, job: int, name: str) -> JobEvent | None:
        """Returns the last event of a job with this name; None without one."""
        query = sa.select(_events).where(_events.c.job == job, _events.c.name == name)
        with self._database.begin() as connection:
            row = connection.execute(query.order_by(_events.c.number.desc()).limit(1)).first()
        return None if row is None else JobEvent(row.number, row.name, row.data)

    def forget_events(self) -> None:
        """Deletes the events of jobs that have ended some time ago, or are deleted."""
        kept = sa.select(_jobs.c.number).where(
            sa.or_(
                _jobs.c.state.in_(("queued", "running")),
                (_jobs.c.state != "removed") & (_jobs.c.finished_at > self._database.now - KEPT_S),
            )
        )
        with self._database.begin() as connection:
            connection.execute(_events.delete().where(_events.c.job.not_in(kept)))

    def beat(self, replica: str, num_workers: int) -> int:
        """Says that a replica is there; returns how many workers all have."""
        now = self._database.now
        here = postgresql.insert(_replicas).values(id=replica, workers=num_workers, seen_at=now)
        with self._database.begin() as connection:
            connection.execute(here.on_conflict_do_update(index_elements=["id"], set_={"seen_at": now}))
            connection.execute(_replicas.delete().where(_replicas.c.seen_at < now - 10 * self._lease_s))
            there = sa.select(sa.func.sum(_replicas.c.workers)).where(_replicas.c.seen_at > now - self._lease_s)
            return int(connection.scalar(there) or num_workers)

    def leave(self, replica: str) -> None:
        """Says that a replica goes."""
        with self._database.begin() as connection:
            connection.execute(_replicas.delete().where(_replicas.c.id == replica))

    def bucket(self, owner: str, per_minute: float) -> "StoredBucket":
        """Returns the bucket of a token, which all replicas take from."""
        return StoredBucket(self._database, owner, per_minute)


class StoredBucket:
    """A `hybridsd.quotas.Bucket` in the database."""

    def __init__(self, database: Database, owner: str, per_minute: float) -> None:
        self._database, self._owner, self._per_minute = database, owner, float(per_minute)

    @property
    def per_minute(self) -> float:
        """How much it holds, and gets in a minute."""
        return self._per_minute

    @property
    def left(self) -> float:
        """How much can be taken now."""
        return self._change(lambda level: level)

    def take(self, amount: float) -> float:
        """Takes an amount, or nothing.

        Returns:
            0 if it was taken; else the seconds until it is there, `math.inf` if it is more than a minute's worth.
        """
        if amount > self._per_minute:
            return math.inf
        before = self._change(lambda level: level - amount if amount <= level else level)
        return 0.0 if amount <= before else (amount - before) * 60 / self._per_minute

    def give_back(self, amount: float) -> None:
        """Puts back what was taken and not used."""
        self._change(lambda level: min(level + amount, self._per_minute))

    def _change(self, change: Callable[[float], float]) -> float:
        """Fills it up to now and changes it; returns what was in it before the change."""
        this, now = _buckets.c.owner == self._owner, self._database.now
        full = {"owner": self._owner, "per_minute": self._per_minute, "level": self._per_minute, "at_s": now}
        with self._database.begin() as connection:
            connection.execute(postgresql.insert(_buckets).values(full).on_conflict_do_nothing())
            query = sa.select(_buckets.c.per_minute, _buckets.c.level, _buckets.c.at_s, now.label("now_s"))
            row = connection.execute(query.where(this).with_for_update()).one()
            passed_s = max(row.now_s - row.at_s, 0.0)
            level: float = max(0.0, row.level + self._per_minute - row.per_minute)  # the operator may have changed it
            level = min(level + passed_s * self._per_minute / 60, self._per_minute)
            values = {"per_minute": self._per_minute, "level": change(level), "at_s": row.at_s + passed_s}
            connection.execute(_buckets.update().where(this).values(values))
        return level
