"""Jobs and their images on disk, so that they survive a restart: rows in SQLite, images as files beside it.

Each call is one short transaction of a few milliseconds and may be made from the event loop.
"""

import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from edge_client.web.jobs.uploads import Upload
from edge_client.web.schemas.native import State
from hybridsd.errors import Reason

UNFINISHED: tuple[State, ...] = ("queued", "running")
_REMOVED = "removed"
"""Not visible to clients: the row remembers that the job existed."""

_meta = sa.MetaData()
_jobs = sa.Table(
    "jobs", _meta,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("api", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("error", sa.JSON),
    sa.Column("webhook_due", sa.Boolean, nullable=False, default=False),
)  # fmt: skip
_images = sa.Table(
    "images", _meta,
    sa.Column("job", sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("index", sa.Integer, primary_key=True),
    sa.Column("record", sa.JSON, nullable=False),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredJob:
    """A job as it is stored."""

    number: int
    """Grows with each job; the cursor of pages."""
    id: str
    owner: str
    """Hash of its token; empty where no token is needed."""
    api: str
    state: State
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempts: int
    request: dict[str, Any]
    """The `JobCreate` with its seed; images as true or false."""
    digest: str
    """Hash of the original request, to recognize a repeated one."""
    error: dict[str, Any] | None
    webhook_due: bool
    images: list[dict[str, Any]] = field(default_factory=list)


class Store:
    """The jobs of one gateway.

    Args:
        folder: Where they are stored; created if missing.
        max_jobs: Finished jobs beyond this many are deleted, the oldest first.

    Raises:
        InvalidRequest: FIELD_INVALID if the folder cannot be used.
    """

    def __init__(self, folder: Path, *, max_jobs: int) -> None:
        self._folder, self._max_jobs = folder, max_jobs
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._engine = sa.create_engine(f"sqlite:///{folder / 'jobs.sqlite'}")
            sa.event.listen(self._engine, "connect", _configure)
            _meta.create_all(self._engine)
        except (OSError, sa.exc.SQLAlchemyError) as error:
            raise Reason.FIELD_INVALID.error(f"cannot store jobs in {folder}: {error}; change `data_dir`",
                field="data_dir",
            ) from error  # fmt: skip

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    def add(self, job_id: str, owner: str, api: str, request: dict[str, Any], digest: str, upload: Upload) -> StoredJob:
        """Stores a new job.

        Raises:
            InvalidRequest: REQUEST_ID_REUSED if the id is taken, also by a deleted job.
        """
        values = {
            "id": job_id, "owner": owner, "api": api, "state": "queued", "created_at": time.time(),
            "request": request, "digest": digest, "webhook_due": request.get("webhook") is not None,
        }  # fmt: skip
        try:
            with self._begin() as connection:
                number = connection.execute(_jobs.insert().values(values)).inserted_primary_key[0]  # type: ignore[index]
                self._write_upload(number, upload)  # before the commit: a job cannot run without its images
        except sa.exc.IntegrityError as error:
            raise Reason.REQUEST_ID_REUSED.error(
                f"id {job_id} belongs to another job; choose another id", field="id"
            ) from error
        return self.get(job_id)

    def begin(self, job_id: str) -> StoredJob:
        """Marks a job as running and counts the attempt."""
        now = time.time()
        self._update(job_id, state="running", started_at=now, attempts=_jobs.c.attempts + 1)
        return self.get(job_id)

    def add_image(self, job: StoredJob, record: dict[str, Any], png: bytes) -> None:
        """Stores a finished image; replaces the one of an earlier attempt."""
        path = self.image_path(job, int(record["index"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(png)
        partial.replace(path)
        with self._begin() as connection:
            same = (_images.c.job == job.number) & (_images.c.index == record["index"])
            connection.execute(_images.delete().where(same))
            connection.execute(_images.insert().values(job=job.number, index=record["index"], record=record))

    def finish(self, job_id: str, state: State, error: dict[str, Any] | None = None) -> StoredJob:
        """Marks a job as finished, and deletes the oldest beyond the limit."""
        self._update(job_id, state=state, error=error, finished_at=time.time())
        job = self.get(job_id)
        shutil.rmtree(self._upload(job.number, "image").parent, ignore_errors=True)
        self._prune()
        return job

    def finish_webhook(self, job_id: str) -> None:
        """Marks the webhook of a job as done."""
        self._update(job_id, webhook_due=False)

    def get(self, job_id: str, owner: str | None = None) -> StoredJob:
        """Returns a job.

        Args:
            job_id: Its id.
            owner: Owner of the request; None for the gateway itself.

        Raises:
            NotFound: NOT_FOUND, also for a job of another owner; JOB_GONE for a deleted one.
        """
        with self._begin() as connection:
            row = connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id)).first()
            if row is None or owner not in (None, row.owner):
                raise Reason.NOT_FOUND.error(f"there is no job {job_id[:64]!r}; list the jobs")
            if row.state == _REMOVED:
                raise Reason.JOB_GONE.error(f"job {job_id[:64]} was deleted; create it again with a new id")
            return self._job(connection, row)

    def page(self, owner: str, *, limit: int, before: int | None = None, state: str | None = None) -> list[StoredJob]:
        """Returns jobs of an owner, newest first."""
        query = sa.select(_jobs).where(_jobs.c.owner == owner, _jobs.c.state != _REMOVED)
        if before is not None:
            query = query.where(_jobs.c.number < before)
        if state is not None:
            query = query.where(_jobs.c.state == state)
        with self._begin() as connection:
            rows = connection.execute(query.order_by(_jobs.c.number.desc()).limit(limit)).all()
            return [self._job(connection, row) for row in rows]

    def unfinished(self) -> list[StoredJob]:
        """Returns waiting and running jobs, oldest first."""
        query = sa.select(_jobs).where(_jobs.c.state.in_(UNFINISHED)).order_by(_jobs.c.number)
        with self._begin() as connection:
            return [self._job(connection, row) for row in connection.execute(query)]

    def pending_webhooks(self) -> list[StoredJob]:
        """Returns finished jobs whose webhook has not been called."""
        query = sa.select(_jobs).where(_jobs.c.webhook_due, _jobs.c.state.in_(("completed", "failed", "cancelled")))
        with self._begin() as connection:
            return [self._job(connection, row) for row in connection.execute(query)]

    def remove(self, job: StoredJob) -> None:
        """Deletes a finished job with its images; its id stays taken."""
        with self._begin() as connection:
            self._remove(connection, job.number)

    def upload(self, job: StoredJob) -> Upload:
        """Returns the uploaded images of a job."""
        image, mask = (self._upload(job.number, name) for name in ("image", "mask"))
        return Upload(
            image.read_bytes() if job.request.get("image") else None,
            mask.read_bytes() if job.request.get("mask") else None,
        )

    def image_path(self, job: StoredJob, index: int) -> Path:
        """Returns the path of a finished image, a PNG file."""
        return self._folder / "images" / str(job.number) / f"{index}.png"

    def secret(self) -> bytes:
        """Returns the key that signs URLs of images; created once."""
        path = self._folder / "secret"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            partial.touch(mode=0o600)
            partial.write_bytes(secrets.token_bytes(32))
            partial.replace(path)  # all or nothing: a part could be guessed
        return path.read_bytes()

    def _write_upload(self, number: int, upload: Upload) -> None:
        for name, content in (("image", upload.image), ("mask", upload.mask)):
            if content is not None:
                path = self._upload(number, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def _upload(self, number: int, name: str) -> Path:
        return self._folder / "uploads" / str(number) / name

    def _job(self, connection: Connection, row: Row[Any]) -> StoredJob:
        query = sa.select(_images.c.record).where(_images.c.job == row.number).order_by(_images.c.index)
        images = [record for (record,) in connection.execute(query)]
        return StoredJob(**row._mapping, images=images)

    def _update(self, job_id: str, **values: Any) -> None:
        with self._begin() as connection:
            connection.execute(_jobs.update().where(_jobs.c.id == job_id).values(values))

    def _prune(self) -> None:
        states = (*UNFINISHED, _REMOVED)
        query = sa.select(_jobs.c.number).where(_jobs.c.state.not_in(states)).order_by(_jobs.c.finished_at.desc())
        with self._begin() as connection:
            for (number,) in connection.execute(query.offset(self._max_jobs)).all():
                self._remove(connection, number)

    def _remove(self, connection: Connection, number: int) -> None:
        connection.execute(_images.delete().where(_images.c.job == number))
        gone: dict[str, Any] = {"state": _REMOVED, "request": {}, "digest": "", "error": None, "webhook_due": False}
        connection.execute(_jobs.update().where(_jobs.c.number == number).values(gone))
        shutil.rmtree(self._folder / "images" / str(number), ignore_errors=True)

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (sa.exc.OperationalError, OSError) as error:  # such as a full disk or a locked file
            what = getattr(error, "orig", error)
            raise Reason.INTERNAL.error(f"the job store fails: {what}; check the disk of `data_dir`") from error


def _configure(connection: Any, _record: object) -> None:
    """Lets readers and one writer work at once. A power loss may cost the last transactions, never the file."""
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")
