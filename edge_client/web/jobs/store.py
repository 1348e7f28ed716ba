"""Jobs and their pictures on disk, so that they survive a restart: rows in SQLite, pictures as files beside it.

Knows SQLAlchemy and paths; nothing of how jobs are run or shown. Each call is one short transaction, in a few
milliseconds at most, and may be made from the event loop.
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

from edge_client.web.jobs.worker import Upload
from edge_client.web.schemas.native import State
from hybridsd.errors import Reason

UNFINISHED: tuple[State, ...] = ("queued", "running")
_REMOVED = "removed"
"""A state that clients never see: the row says that there was such a job."""

_meta = sa.MetaData()
_jobs = sa.Table(
    "jobs", _meta,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("face", sa.Text, nullable=False),
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
    """A job as it is kept."""

    number: int
    """Grows with each job; what pages are cut by."""
    id: str
    owner: str
    """Whose it is; empty where the gateway asks for no token."""
    face: str
    state: State
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempts: int
    request: dict[str, Any]
    """The body of the native API, the seed filled in, pictures as true or false."""
    digest: str
    """Of the body as it came, to tell a repeated request from another one."""
    error: dict[str, Any] | None
    webhook_due: bool
    images: list[dict[str, Any]] = field(default_factory=list)


class Store:
    """The jobs of one gateway.

    Args:
        folder: Where they are kept; made if missing.
        max_jobs: Finished jobs beyond this many are deleted, the oldest first.

    Raises:
        InvalidRequest: FIELD_INVALID if it cannot be opened.
    """

    def __init__(self, folder: Path, *, max_jobs: int) -> None:
        self._folder, self._max_jobs = folder, max_jobs
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._engine = sa.create_engine(f"sqlite:///{folder / 'jobs.sqlite'}")
            sa.event.listen(self._engine, "connect", _configure)
            _meta.create_all(self._engine)
        except (OSError, sa.exc.SQLAlchemyError) as error:
            raise Reason.FIELD_INVALID.error(f"cannot keep jobs in {folder}: {error}; choose another --data-dir",
                field="data_dir",
            ) from error  # fmt: skip

    def close(self) -> None:
        """Ends the connections."""
        self._engine.dispose()

    def add(
        self, job_id: str, owner: str, face: str, request: dict[str, Any], digest: str, upload: Upload
    ) -> StoredJob:
        """Keeps a new job.

        Raises:
            InvalidRequest: REQUEST_ID_REUSED where there is, or was, another one with that id.
        """
        values = {
            "id": job_id, "owner": owner, "face": face, "state": "queued", "created_at": time.time(),
            "request": request, "digest": digest, "webhook_due": request.get("webhook") is not None,
        }  # fmt: skip
        try:
            with self._begin() as connection:
                number = connection.execute(_jobs.insert().values(values)).inserted_primary_key[0]  # type: ignore[index]
                self._write_upload(number, upload)  # before the row counts: a job without its pictures cannot be run
        except sa.exc.IntegrityError as error:
            raise Reason.REQUEST_ID_REUSED.error(
                f"there was a job {job_id} already; choose another id", field="id"
            ) from error
        return self.get(job_id)

    def begin(self, job_id: str) -> StoredJob:
        """Notes that a job runs, once more."""
        now = time.time()
        self._update(job_id, state="running", started_at=now, attempts=_jobs.c.attempts + 1)
        return self.get(job_id)

    def add_image(self, job: StoredJob, record: dict[str, Any], png: bytes) -> None:
        """Keeps a finished picture; one with its index that an earlier try made is replaced."""
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
        """Notes how a job ended, and deletes the oldest beyond the limit."""
        self._update(job_id, state=state, error=error, finished_at=time.time())
        job = self.get(job_id)
        shutil.rmtree(self._upload(job.number, "image").parent, ignore_errors=True)
        self._prune()
        return job

    def told_webhook(self, job_id: str) -> None:
        """Notes that nobody waits for word of a job any more."""
        self._update(job_id, webhook_due=False)

    def get(self, job_id: str, owner: str | None = None) -> StoredJob:
        """Returns a job.

        Args:
            job_id: Its id.
            owner: Who asks; None is the gateway itself.

        Raises:
            NotFound: NOT_FOUND, also for a job of somebody else; JOB_GONE for one that was deleted.
        """
        with self._begin() as connection:
            row = connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id)).first()
            if row is None or owner not in (None, row.owner):
                raise Reason.NOT_FOUND.error(f"there is no job {job_id[:64]!r}; list the jobs, or make one")
            if row.state == _REMOVED:
                raise Reason.JOB_GONE.error(f"job {job_id[:64]} was deleted, or is too old; make it again")
            return self._job(connection, row)

    def page(self, owner: str, *, limit: int, before: int | None = None, state: str | None = None) -> list[StoredJob]:
        """Returns jobs of an owner, the newest first."""
        query = sa.select(_jobs).where(_jobs.c.owner == owner, _jobs.c.state != _REMOVED)
        if before is not None:
            query = query.where(_jobs.c.number < before)
        if state is not None:
            query = query.where(_jobs.c.state == state)
        with self._begin() as connection:
            rows = connection.execute(query.order_by(_jobs.c.number.desc()).limit(limit)).all()
            return [self._job(connection, row) for row in rows]

    def unfinished(self) -> list[StoredJob]:
        """Returns what was not finished when the gateway ended last, the oldest first."""
        query = sa.select(_jobs).where(_jobs.c.state.in_(UNFINISHED)).order_by(_jobs.c.number)
        with self._begin() as connection:
            return [self._job(connection, row) for row in connection.execute(query)]

    def untold(self) -> list[StoredJob]:
        """Returns finished jobs whose webhook has not been told."""
        query = sa.select(_jobs).where(_jobs.c.webhook_due, _jobs.c.state.in_(("completed", "failed", "cancelled")))
        with self._begin() as connection:
            return [self._job(connection, row) for row in connection.execute(query)]

    def remove(self, job: StoredJob) -> None:
        """Deletes a finished job with its pictures; that there was one is remembered."""
        with self._begin() as connection:
            self._remove(connection, job.number)

    def upload(self, job: StoredJob) -> Upload:
        """Returns the pictures that came with a job."""
        image, mask = (self._upload(job.number, name) for name in ("image", "mask"))
        return Upload(
            image.read_bytes() if job.request.get("image") else None,
            mask.read_bytes() if job.request.get("mask") else None,
        )

    def image_path(self, job: StoredJob, index: int) -> Path:
        """Returns where a picture of a job is or will be, a PNG file."""
        return self._folder / "images" / str(job.number) / f"{index}.png"

    def secret(self) -> bytes:
        """Returns the key that addresses of pictures are signed with; made once."""
        path = self._folder / "secret"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            partial.touch(mode=0o600)
            partial.write_bytes(secrets.token_bytes(32))
            partial.replace(path)  # all of it or nothing: a part could be guessed
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
        except (sa.exc.OperationalError, OSError) as error:  # the disk is full, or the file is locked
            what = getattr(error, "orig", error)
            raise Reason.INTERNAL.error(f"the job store fails: {what}; look at the disk of --data-dir") from error


def _configure(connection: Any, _record: object) -> None:
    """Lets readers and one writer work at once; a crash of the machine takes the last moment, never the file."""
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")
