"""Jobs and their images on disk, so that they survive a restart: rows in SQLite, images as files beside it.

Each call is one short transaction of a few milliseconds and may be made from the event loop, but for `add` and
`write_image`, which write files and belong into a thread.
"""

import contextlib
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from edge_client.web.jobs.folder_lock import FolderLock
from edge_client.web.jobs.quotas import Work, exceeded, whole_delay
from edge_client.web.jobs.uploads import Upload
from edge_client.web.schemas.native import State
from hybridsd.errors import Reason

UNFINISHED: tuple[State, ...] = ("queued", "running")
SCHEMA_VERSION = 2
"""Of the tables. Version 0 had no sizes, version 1 no users and work."""
RETRY_S = 10.0
"""When to come again with an image for which there is no room."""
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
    sa.Column("upload_bytes", sa.Integer, nullable=False, server_default="0"),
    sa.Column("image_bytes", sa.Integer, nullable=False, server_default="0"),
    sa.Column("user", sa.Text, nullable=False, server_default=""),
    sa.Column("steps", sa.Integer, nullable=False, server_default="0"),
    sa.Column("width", sa.Integer, nullable=False, server_default="0"),
    sa.Column("height", sa.Integer, nullable=False, server_default="0"),
)  # fmt: skip
_images = sa.Table(
    "images", _meta,
    sa.Column("job", sa.ForeignKey("jobs.number"), primary_key=True),
    sa.Column("index", sa.Integer, primary_key=True),
    sa.Column("record", sa.JSON, nullable=False),
)  # fmt: skip

_SHARER = sa.case((_jobs.c.owner != "", _jobs.c.owner), else_=_jobs.c.user)
"""Whose share of the folder a job takes: its owner's, or where no token is needed that of the address it came from."""
_IS_DONE = _jobs.c.state.not_in((*UNFINISHED, _REMOVED))
_ADDED = (
    *((1, name, "INTEGER NOT NULL DEFAULT 0") for name in ("upload_bytes", "image_bytes")),
    (2, "user", "TEXT NOT NULL DEFAULT ''"),
    *((2, name, "INTEGER NOT NULL DEFAULT 0") for name in ("steps", "width", "height")),
)
"""Columns that older tables lack: since which version, name and type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredJob:
    """A job as it is stored."""

    number: int
    """Grows with each job; the cursor of pages."""
    id: str
    owner: str
    """Name of its token, or a hash of one without a name; empty where no token is needed."""
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
    upload_bytes: int = 0
    """Size of its uploaded images, until it has finished."""
    image_bytes: int = 0
    """Size of its finished images."""
    user: str = ""
    """Whose share it takes, as `Caller.user`; empty for a job of an older gateway."""
    steps: int = 0
    width: int = 0
    height: int = 0
    images: list[dict[str, Any]] = field(default_factory=list)

    @property
    def work(self) -> Work:
        """What it asks of the models."""
        return Work(steps=self.steps, width=self.width, height=self.height)


class Store:
    """The jobs of one gateway.

    Where there are too many finished jobs, or too many bytes of them, the oldest job of whoever has most is deleted:
    nobody loses images to somebody who keeps more. Beyond the quota of a token its own oldest job is deleted. The job
    that has ended last is kept in any case.

    Args:
        folder: Where they are stored; created if missing, and locked.
        max_jobs: Finished jobs to keep. Of deleted ones as many ids are remembered.
        max_bytes: Of their images. A quarter of it is the limit of uploaded images of waiting jobs; whoever has less
            than an equal share of that may go beyond it, up to twice as many.
        quota_bytes: Returns how much an owner may keep; None is no limit.

    Raises:
        InvalidRequest: FIELD_INVALID if the folder cannot be used, or is used by another gateway.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_jobs: int,
        max_bytes: int = 1 << 62,
        quota_bytes: Callable[[str], int | None] = lambda _owner: None,
    ) -> None:
        self._folder, self._max_jobs, self.max_bytes = folder, max_jobs, max_bytes
        self._max_upload_bytes, self._quota_bytes = max_bytes // 4, quota_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = FolderLock(folder)
            with contextlib.ExitStack() as opened:
                opened.callback(self._lock.close)
                self._engine = sa.create_engine(f"sqlite:///{folder / 'jobs.sqlite'}")
                opened.callback(self._engine.dispose)
                sa.event.listen(self._engine, "connect", _configure)
                self._migrate()
                self._opened = opened.pop_all()
        except (OSError, sa.exc.SQLAlchemyError) as error:
            raise Reason.FIELD_INVALID.error(f"cannot store jobs in {folder}: {error}; change `data_dir`",
                field="data_dir",
            ) from error  # fmt: skip
        for left in (folder / "uploads").glob("new-*"):  # by a crash
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Closes the connections and lets others have the folder."""
        self._opened.close()

    def add(
        self,
        job_id: str,
        owner: str,
        api: str,
        request: dict[str, Any],
        digest: str,
        upload: Upload,
        *,
        user: str = "",
        work: Work = Work(),  # noqa: B008 (it is frozen)
    ) -> StoredJob:
        """Stores a new job.

        Raises:
            InvalidRequest: REQUEST_ID_REUSED if the id is taken, also by a deleted job; BODY_TOO_LARGE if its images
                are more than its owner may keep.
            CloudBusy: TOO_MANY_JOBS or QUOTA_EXCEEDED if there is no room for its images yet.
        """
        num_bytes = sum(len(content) for content in (upload.image, upload.mask) if content is not None)
        values = {
            "id": job_id, "owner": owner, "api": api, "state": "queued", "created_at": time.time(),
            "request": request, "digest": digest, "webhook_due": request.get("webhook") is not None,
            "upload_bytes": num_bytes, "user": user, "steps": work.steps, "width": work.width, "height": work.height,
        }  # fmt: skip
        self._check_room(owner, user, num_bytes)
        new = self._folder / "uploads" / f"new-{uuid.uuid4().hex}"
        try:
            with self._guard():
                _write(new, upload)
            with self._begin() as connection:
                number = connection.execute(_jobs.insert().values(values)).inserted_primary_key[0]  # type: ignore[index]
                if num_bytes:
                    new.rename(self._upload(number, "image").parent)  # a job cannot run without its images
        except sa.exc.IntegrityError as error:
            raise Reason.REQUEST_ID_REUSED.error(
                f"id {job_id} belongs to another job; choose another id", field="id"
            ) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return self.get(job_id)

    def begin(self, job_id: str) -> StoredJob:
        """Marks a job as running and counts the attempt."""
        now = time.time()
        self._update(job_id, state="running", started_at=now, attempts=_jobs.c.attempts + 1)
        return self.get(job_id)

    def write_image(self, job: StoredJob, index: int, png: bytes) -> int:
        """Writes a finished image; replaces the one of an earlier attempt. Returns the bytes of all the job has."""
        path = self.image_path(job, index)
        with self._guard():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(png)
            partial.replace(path)
            return _size(path.parent)

    def add_image(self, job: StoredJob, record: dict[str, Any], num_bytes: int) -> None:
        """Adds a written image to its job.

        Args:
            job: The job.
            record: How the image was made.
            num_bytes: Of all its images.
        """
        with self._begin() as connection:
            same = (_images.c.job == job.number) & (_images.c.index == record["index"])
            connection.execute(_images.delete().where(same))
            connection.execute(_images.insert().values(job=job.number, index=record["index"], record=record))
            connection.execute(_jobs.update().where(_jobs.c.number == job.number).values(image_bytes=num_bytes))

    def finish(self, job_id: str, state: State, error: dict[str, Any] | None = None) -> StoredJob:
        """Marks a job as finished, and deletes older ones beyond the limits."""
        self._update(job_id, state=state, error=error, finished_at=time.time(), upload_bytes=0)
        job = self.get(job_id)
        shutil.rmtree(self._upload(job.number, "image").parent, ignore_errors=True)
        self._prune(job)
        return job

    def disk_bytes(self) -> tuple[int, int]:
        """Returns the bytes of all images that are kept, finished and given, and those that are left on the disk."""
        query = sa.select(sa.func.sum(_jobs.c.image_bytes + _jobs.c.upload_bytes))
        with self._begin() as connection:
            return connection.scalar(query) or 0, shutil.disk_usage(self._folder).free

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
            return self._with_images(connection, [row])[0]

    def page(
        self, owner: str | None, *, limit: int, before: int | None = None, state: str | None = None
    ) -> list[StoredJob]:
        """Returns jobs of an owner, newest first; None: of all owners."""
        query = sa.select(_jobs).where(_jobs.c.state != _REMOVED)
        if owner is not None:
            query = query.where(_jobs.c.owner == owner)
        if before is not None:
            query = query.where(_jobs.c.number < before)
        if state is not None:
            query = query.where(_jobs.c.state == state)
        with self._begin() as connection:
            rows = connection.execute(query.order_by(_jobs.c.number.desc()).limit(limit)).all()
            return self._with_images(connection, rows)

    def unfinished(self) -> list[StoredJob]:
        """Returns waiting and running jobs, oldest first."""
        query = sa.select(_jobs).where(_jobs.c.state.in_(UNFINISHED)).order_by(_jobs.c.number)
        with self._begin() as connection:
            return self._with_images(connection, connection.execute(query).all())

    def pending_webhooks(self) -> list[StoredJob]:
        """Returns finished jobs whose webhook has not been called."""
        query = sa.select(_jobs).where(_jobs.c.webhook_due, _jobs.c.state.in_(("completed", "failed", "cancelled")))
        with self._begin() as connection:
            return self._with_images(connection, connection.execute(query).all())

    def kept_bytes(self, owner: str) -> int:
        """Returns how many bytes of finished images are kept for an owner."""
        with self._begin() as connection:
            return connection.scalar(_kept_bytes(_jobs.c.owner == owner)) or 0

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

    def _upload(self, number: int, name: str) -> Path:
        return self._folder / "uploads" / str(number) / name

    def _with_images(self, connection: Connection, rows: Sequence[Row[Any]]) -> list[StoredJob]:
        images: dict[int, list[dict[str, Any]]] = {row.number: [] for row in rows}
        query = sa.select(_images.c.job, _images.c.record).where(_images.c.job.in_(list(images)))
        for number, record in connection.execute(query.order_by(_images.c.index)) if rows else ():
            images[number].append(record)
        return [StoredJob(**row._mapping, images=images[row.number]) for row in rows]

    def _migrate(self) -> None:
        """Creates the tables, or brings those of an older gateway up to date."""
        with self._engine.begin() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version > SCHEMA_VERSION:
                raise Reason.FIELD_INVALID.error(
                    f"{self._folder} was written by a newer gateway (version {version} of its tables; this one knows "
                    f"{SCHEMA_VERSION}); update this one, or change `data_dir`",
                    field="data_dir",
                )
            has_jobs = sa.inspect(connection).has_table("jobs")
            for since, name, kind in _ADDED if has_jobs else ():
                if version < since:
                    connection.exec_driver_sql(f"ALTER TABLE jobs ADD COLUMN {name} {kind}")
            _meta.create_all(connection)
            for number in connection.scalars(sa.select(_jobs.c.number)).all() if has_jobs and version < 1 else ():
                sizes = {
                    "upload_bytes": _size(self._upload(number, "image").parent),
                    "image_bytes": _size(self._folder / "images" / str(number)),
                }
                connection.execute(_jobs.update().where(_jobs.c.number == number).values(sizes))
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _check_room(self, owner: str, user: str, num_bytes: int) -> None:
        """Refuses an upload that would fill the folder before its job has run."""
        if not num_bytes:
            return
        query = sa.select(_SHARER, sa.func.sum(_jobs.c.upload_bytes)).where(_jobs.c.upload_bytes > 0).group_by(_SHARER)
        with self._begin() as connection:
            waiting: dict[str, int] = dict(connection.execute(query).tuples().all())
        own, total = waiting.get(owner or user, 0), sum(waiting.values())
        quota, limit = self._quota_bytes(owner), self._max_upload_bytes
        if quota is not None and num_bytes > quota:
            raise Reason.BODY_TOO_LARGE.error(
                f"the images have {num_bytes} bytes; the token allows at most {quota} (its limit bytes): send "
                "smaller ones",
                field="image",
            )
        if quota is not None and own + num_bytes > quota:
            raise exceeded(f"images of {own + num_bytes} bytes would wait; the token allows {quota} (its limit "
                           "bytes)", RETRY_S)  # fmt: skip
        share = limit if own == 0 else limit // len({*waiting, owner or user})
        if total + num_bytes > limit and (own + num_bytes > share or total + num_bytes > 2 * limit):
            delay_s = whole_delay(RETRY_S)
            raise Reason.TOO_MANY_JOBS.error(
                f"images of {total + num_bytes} bytes would wait, of them {own + num_bytes} yours; at most {limit} "
                f"may: retry in {delay_s} s, or ask the operator for a larger --max-data-mib",
                retry_delay_s=float(delay_s),
            )

    def _update(self, job_id: str, **values: Any) -> None:
        with self._begin() as connection:
            connection.execute(_jobs.update().where(_jobs.c.id == job_id).values(values))

    def _prune(self, ended: StoredJob) -> None:
        """Deletes finished jobs beyond the limits, but not the one that has just ended; forgets deleted ones."""
        quota = self._quota_bytes(ended.owner)
        with self._begin() as connection:
            own = _jobs.c.owner == ended.owner
            while quota is not None and (connection.scalar(_kept_bytes(own)) or 0) > quota:
                if not self._remove_oldest(connection, own, ended.number):
                    break
            for column, limit in ((sa.literal(1), self._max_jobs), (_jobs.c.image_bytes, self.max_bytes)):
                amount = sa.func.sum(column)
                query = sa.select(_SHARER, amount).where(_IS_DONE).group_by(_SHARER).order_by(amount.desc())
                while (sharers := connection.execute(query).all()) and sum(each for _, each in sharers) > limit:
                    if not self._remove_oldest(connection, sharers[0][0] == _SHARER, ended.number):
                        break
            removed = sa.select(_jobs.c.number).where(_jobs.c.state == _REMOVED).order_by(_jobs.c.number.desc())
            known = removed.limit(self._max_jobs)
            connection.execute(_jobs.delete().where(_jobs.c.state == _REMOVED, _jobs.c.number.not_in(known)))

    def _remove_oldest(self, connection: Connection, whose: sa.ColumnElement[bool], kept: int) -> bool:
        """Deletes the oldest finished job of somebody, but not `kept`. Returns whether there was one."""
        oldest = sa.select(_jobs.c.number).where(_IS_DONE, whose, _jobs.c.number != kept).order_by(_jobs.c.finished_at)
        number = connection.scalar(oldest.limit(1))
        if number is not None:
            self._remove(connection, number)
        return number is not None

    def _remove(self, connection: Connection, number: int) -> None:
        connection.execute(_images.delete().where(_images.c.job == number))
        gone: dict[str, Any] = {
            "state": _REMOVED, "request": {}, "digest": "", "error": None, "webhook_due": False, "image_bytes": 0,
        }  # fmt: skip
        connection.execute(_jobs.update().where(_jobs.c.number == number).values(gone))
        shutil.rmtree(self._folder / "images" / str(number), ignore_errors=True)

    @contextlib.contextmanager
    def _begin(self) -> Iterator[Connection]:
        with self._guard(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.OperationalError, OSError) as error:  # such as a full disk or a locked file
            what = getattr(error, "orig", error)
            raise Reason.INTERNAL.error(f"the job store fails: {what}; check the disk of `data_dir`") from error


def _kept_bytes(whose: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return sa.select(sa.func.sum(_jobs.c.image_bytes)).where(_IS_DONE, whose)


def _write(folder: Path, upload: Upload) -> None:
    for name, content in (("image", upload.image), ("mask", upload.mask)):
        if content is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def _size(folder: Path) -> int:
    """Returns the bytes of the files in a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def _configure(connection: Any, _record: object) -> None:
    """Lets readers and one writer work at once. A power loss may cost the last transactions, never the file."""
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")
