"""Jobs and their images on disk, so that they survive a restart: rows in SQLite, images as files beside it.

Each call is one short transaction of a few milliseconds and may be made from the event loop, but for `add` and
`write_image`, which write files and belong into a thread.
"""

import contextlib
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from edge_client.web.jobs.database import Database
from edge_client.web.jobs.files import open_files
from edge_client.web.jobs.folder_lock import FolderLock
from edge_client.web.jobs.quotas import Work, exceeded, whole_delay
from edge_client.web.jobs.tables import images as _images
from edge_client.web.jobs.tables import jobs as _jobs
from edge_client.web.jobs.uploads import Upload
from edge_client.web.schemas.native import State
from edge_client.web.settings import LEASE_S
from hybridsd.errors import CloudUnreachable, HybridSDError, Reason

P = ParamSpec("P")
T = TypeVar("T")

UNFINISHED: tuple[State, ...] = ("queued", "running")
WEBHOOK_S = 120.0
"""So long a replica may take for all attempts at a webhook; then another makes them."""
RETRY_S = 10.0
"""When to come again with an image for which there is no room."""
_ABANDONED_S = 3600.0
"""An upload that is not with its job after this is what a crash has left."""
_REMOVED = "removed"
"""Not visible to clients: the row remembers that the job existed."""
_MARK = "images-of"
"""File beside the images that names their database."""

_EMPTY: sa.ColumnElement[str] = sa.literal_column("''", sa.Text)  # no parameter: it stands in GROUP BY as well
_SHARER = sa.case((_jobs.c.owner != _EMPTY, _jobs.c.owner), else_=_jobs.c.user)
"""Whose share of the folder a job takes: its owner's, or where no token is needed that of the address it came from."""
_IS_DONE = _jobs.c.state.not_in((*UNFINISHED, _REMOVED))
_HIDDEN = ("lease_until", "webhook_until")
"""Columns that are the store's own."""


class LeaseLostError(Exception):
    """Another replica has taken over the job, or it has ended: what this one has made of it does not count."""


class NoRoomError(Exception):
    """More jobs wait, at all replicas, than this one knew of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What of an unfinished job replicas watch."""

    id: str
    state: State
    attempts: int
    is_leased: bool
    """A replica runs it, this one or another."""
    is_cancelled: bool


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
    upload_key: str = ""
    """Where its uploads are."""
    is_cancelled: bool = False
    """Somebody has asked for that."""
    num_left: int = 0
    """Attempts that ended only because their replica was told to stop."""
    images: list[dict[str, Any]] = field(default_factory=list)
    made_by: dict[int, int] = field(default_factory=dict)
    """The attempts that made its images, by their indices."""

    @property
    def work(self) -> Work:
        """What it asks of the models."""
        return Work(steps=self.steps, width=self.width, height=self.height)


class Store:
    """The jobs of one gateway, or of several replicas of one.

    Where there are too many finished jobs, or too many bytes of them, the oldest job of whoever has most is deleted:
    nobody loses images to somebody who keeps more. Beyond the quota of a token its own oldest job is deleted. The job
    that has ended last is kept in any case.

    A job that runs has a lease, which its replica renews. Once that is over, any replica may begin the job again, as
    its next attempt; what an earlier attempt still says does not count. SQLite has no leases: the folder is locked.

    Args:
        folder: Where they are stored; created if missing, and locked but with a shared database.
        max_jobs: Finished jobs to keep. Of deleted ones as many ids are remembered.
        max_bytes: Of their images. A quarter of it is the limit of uploaded images of waiting jobs; whoever has less
            than an equal share of that may go beyond it, up to twice as many.
        quota_bytes: Returns how much an owner may keep; None is no limit.
        database: Address of Postgres, for several replicas; None: SQLite in the folder.
        images: Folder or address of the images, and of uploads; None: the folder.
        lease_s: How long a replica keeps a job without a word.

    Raises:
        InvalidRequest: FIELD_INVALID if the folder cannot be used, or is used by another gateway; if the database is of
            a newer gateway; if the images are not those of the database.
        CloudUnreachable: DATABASE_UNAVAILABLE.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_jobs: int,
        max_bytes: int = 1 << 62,
        quota_bytes: Callable[[str], int | None] = lambda _owner: None,
        database: str | None = None,
        images: str | Path | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        self._folder, self._max_jobs, self.max_bytes, self.lease_s = folder, max_jobs, max_bytes, lease_s
        self._max_upload_bytes, self._quota_bytes = max_bytes // 4, quota_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.files = open_files(folder if images is None else images, is_shared=database is not None)
            with contextlib.ExitStack() as opened:
                if database is None:
                    opened.callback(FolderLock(folder).close)
                self.database = Database(database, folder)
                opened.callback(self.database.close)
                self._sweeper = ThreadPoolExecutor(1, thread_name_prefix="sweeper")
                opened.callback(self._sweeper.shutdown)
                self.database.update(self._fill_tables)
                if self.is_shared:
                    self._check_images()
                self._opened = opened.pop_all()
        except (OSError, sa.exc.SQLAlchemyError) as error:
            where, option = (folder, "data_dir") if database is None else ("the database, or images", "database")
            said = getattr(error, "orig", None) or error
            if database is not None and isinstance(error, sa.exc.SQLAlchemyError):
                said = self.database.without_secrets(said)
            raise Reason.FIELD_INVALID.error(f"cannot store jobs in {where}: {said}; change `{option}`", field=option
            ) from error  # fmt: skip
        except CloudUnreachable as error:
            raise Reason.DATABASE_UNAVAILABLE.error(
                f"the database {self.database.name} does not answer ({self.database.why_lost}); start it, or change "
                "`database`"
            ) from error
        self._remove_abandoned()

    @property
    def is_shared(self) -> bool:
        """Whether there may be other replicas."""
        return self.database.is_shared

    @property
    def _engine(self) -> sa.Engine:
        return self.database.engine

    def close(self) -> None:
        """Closes the connections and lets others have the folder."""
        self._opened.close()

    async def run(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Calls one of the methods below from the event loop, which a shared database does not hold up."""
        return await self.database.run(work, *args, **options)

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
        upload_key: str | None = None,
        may_add: Callable[[dict[str, int]], bool] = lambda _waiting: True,
    ) -> StoredJob:
        """Stores a new job.

        Args:
            job_id: Its id.
            owner: Whose it is.
            api: By which it came.
            request: The `JobCreate`.
            digest: Of the request.
            upload: Its images.
            user: Whose share it takes.
            work: What it asks for.
            upload_key: Where `write_upload` has written the images; None: they are still to be written.
            may_add: With a shared database, returns whether there is room, by how many jobs of each user wait.

        Raises:
            InvalidRequest: REQUEST_ID_REUSED if the id is taken, also by a deleted job; BODY_TOO_LARGE if its images
                are more than its owner may keep.
            CloudBusy: TOO_MANY_JOBS or QUOTA_EXCEEDED if there is no room for its images yet.
            NoRoomError: With a shared database, `may_add` refuses for how many jobs of each user wait.
        """
        num_bytes = upload.num_bytes
        if upload_key is None:
            self.check_room(owner, user, num_bytes)
            upload_key = self.write_upload(upload)
        values = {
            "id": job_id, "owner": owner, "api": api, "state": "queued", "created_at": time.time(),
            "request": request, "digest": digest, "webhook_due": request.get("webhook") is not None,
            "upload_bytes": num_bytes, "user": user, "steps": work.steps, "width": work.width, "height": work.height,
            "upload_key": upload_key,
        }  # fmt: skip
        try:
            with self._begin() as connection:
                if self.is_shared:
                    self.database.lock(connection, "add")  # or two replicas would find the same room
                    if not may_add(self._num_waiting(connection)):
                        raise NoRoomError
                    self._check_room(connection, owner, user, num_bytes)
                connection.execute(_jobs.insert().values(values))
                self._tell(connection)
        except BaseException as error:
            if upload_key:
                self._discard(f"uploads/{upload_key}")
            if not isinstance(error, sa.exc.IntegrityError):
                raise
            raise Reason.REQUEST_ID_REUSED.error(
                f"id {job_id} belongs to another job; choose another id", field="id"
            ) from error
        return self.get(job_id)

    def write_upload(self, upload: Upload) -> str:
        """Writes the images of a job that is still to be added; returns their place."""
        if upload == Upload():
            return ""
        key = f"{time.time():.0f}-{uuid.uuid4().hex}"
        with self._files():
            for name, content in (("image", upload.image), ("mask", upload.mask)):
                if content is not None:
                    self.files.write(f"uploads/{key}/{name}", content)
        return key

    def check_room(self, owner: str, user: str, num_bytes: int) -> None:
        """Refuses an upload for which there is no room; see `add`."""
        if num_bytes:
            with self._begin() as connection:
                self._check_room(connection, owner, user, num_bytes)

    def begin(self, job_id: str, *, user: str = "", at_most: int | None = None) -> StoredJob | None:
        """Marks a job as running, here, and counts the attempt.

        Args:
            job_id: Its id.
            user: Whose job it is.
            at_most: With a shared database, how many jobs of the user may run; None is no limit.

        Returns:
            The job; None if another replica runs it, or it has ended, or so many run.
        """
        until = self.database.now + self.lease_s if self.is_shared else None
        with self._begin() as connection:
            if at_most is not None and self.is_shared:
                self.database.lock(connection, f"user {user}")
                running = sa.select(sa.func.count()).where(_jobs.c.user == user, _jobs.c.state.in_(UNFINISHED))
                if (connection.scalar(running.where(sa.not_(self._is_free))) or 0) >= at_most:
                    return None
            begun = connection.execute(
                _jobs.update().where(_jobs.c.id == job_id, _jobs.c.state.in_(UNFINISHED), self._is_free)
                .values(state="running", started_at=time.time(), attempts=_jobs.c.attempts + 1, lease_until=until)
            )  # fmt: skip
            if begun.rowcount == 0:
                return None
            self._tell(connection)
            row = connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id)).one()
            return self._with_images(connection, [row])[0]

    def renew(self, attempts: dict[str, int]) -> set[str]:
        """Renews the leases of jobs that run here.

        Args:
            attempts: Their attempts, by id.

        Returns:
            The ids of those that are still this replica's.
        """
        if not attempts:
            return set()
        with self._begin() as connection:
            rows = connection.execute(
                _jobs.update().where(sa.tuple_(_jobs.c.id, _jobs.c.attempts).in_(list(attempts.items())),
                                     _jobs.c.state == "running")
                .values(lease_until=self.database.now + self.lease_s).returning(_jobs.c.id)
            )  # fmt: skip
            return set(rows.scalars())

    def release(self, attempts: dict[str, int]) -> None:
        """Gives up the leases of jobs that ran here, so that others need not wait."""
        with self._begin() as connection:
            mine = sa.tuple_(_jobs.c.id, _jobs.c.attempts).in_(list(attempts.items()))
            left = {"lease_until": None, "num_left": _jobs.c.num_left + 1}
            connection.execute(_jobs.update().where(mine, _jobs.c.state == "running").values(left))
            self._tell(connection)

    def ask_cancel(self, job_id: str) -> None:
        """Notes that an unfinished job is to be cancelled, for whoever runs it."""
        with self._begin() as connection:
            this = (_jobs.c.id == job_id) & _jobs.c.state.in_(UNFINISHED)
            connection.execute(_jobs.update().where(this).values(is_cancelled=True))
            self._tell(connection)

    def write_image(self, job: StoredJob, index: int, png: bytes) -> int:
        """Writes a finished image; replaces the one of an earlier attempt. Returns the bytes of all the job has."""
        with self._files():
            self.files.write(_image(job.number, index, job.attempts), png)
            return self.files.size(f"images/{job.number}")

    def add_image(self, job: StoredJob, record: dict[str, Any], num_bytes: int) -> None:
        """Adds a written image to its job.

        Args:
            job: The job, as it was begun.
            record: How the image was made.
            num_bytes: Of all its images.

        Raises:
            LeaseLostError: The job is not this attempt's any more. The image is removed.
        """
        index = int(record["index"])
        try:
            with self._begin() as connection:
                mine = (_jobs.c.number == job.number) & (_jobs.c.attempts == job.attempts)
                mine &= _jobs.c.state.in_(UNFINISHED)
                if connection.execute(_jobs.update().where(mine).values(image_bytes=num_bytes)).rowcount == 0:
                    raise LeaseLostError
                same = (_images.c.job == job.number) & (_images.c.index == index)
                connection.execute(_images.delete().where(same))
                made = {"job": job.number, "index": index, "record": record, "attempt": max(job.attempts, 1)}
                connection.execute(_images.insert().values(made))
        except LeaseLostError:
            if not self._has_image(job, index):
                self._discard(_image(job.number, index, job.attempts))
            raise

    def finish(
        self,
        job_id: str,
        state: State,
        error: dict[str, Any] | None = None,
        *,
        attempt: int | None = None,
        is_waiting: bool = False,
    ) -> StoredJob:
        """Marks a job as finished, and deletes older ones beyond the limits.

        Args:
            job_id: Its id.
            state: How it ended.
            error: Why.
            attempt: That has ended; None: whichever it was.
            is_waiting: It ends only if it does not run.

        Raises:
            LeaseLostError: It is not this attempt's any more, or runs, or had ended already.
        """
        this = (_jobs.c.id == job_id) & _jobs.c.state.in_(UNFINISHED)
        if attempt is not None:
            this &= _jobs.c.attempts == attempt
        if is_waiting:
            this &= self._is_free
        values: dict[str, Any] = {
            "state": state,
            "error": error,
            "finished_at": time.time(),
            "upload_bytes": 0,
            "lease_until": None,
        }
        if self.is_shared:  # its webhook is called from here
            values["webhook_until"] = self.database.now + WEBHOOK_S
        with self._begin() as connection:
            if connection.execute(_jobs.update().where(this).values(values)).rowcount == 0:
                raise LeaseLostError
            self._tell(connection)
            row = connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id)).one()
            job = self._with_images(connection, [row])[0]
        self._discard(_uploads(job))
        with contextlib.suppress(CloudUnreachable):  # it has ended all the same; the next one that ends does it
            self._prune(job)
        return job

    def disk_bytes(self) -> tuple[int, int | None]:
        """Returns the bytes of all images that are kept, finished and given, and what is left there, where known."""
        query = sa.select(sa.func.sum(_jobs.c.image_bytes + _jobs.c.upload_bytes))
        with self._begin() as connection:
            num_bytes = int(connection.scalar(query) or 0)
        with self._files():
            return num_bytes, self.files.free_bytes()

    def ping(self) -> None:
        """Asks the database whether it is there.

        Raises:
            CloudUnreachable: DATABASE_UNAVAILABLE.
        """
        with self._begin() as connection:
            connection.execute(sa.select(1))

    def finish_webhook(self, job_id: str) -> None:
        """Marks the webhook of a job as done."""
        with self._begin() as connection:
            connection.execute(_jobs.update().where(_jobs.c.id == job_id).values(webhook_due=False))

    def get(self, job_id: str, owner: str | None = None) -> StoredJob:
        """Returns a job.

        Args:
            job_id: Its id.
            owner: Owner of the request; None for the gateway itself.

        Raises:
            NotFound: NOT_FOUND, also for a job of another owner; JOB_GONE for a deleted one.
        """
        with self._begin() as connection:
            this = sa.select(_jobs).where(_jobs.c.id == job_id)
            row = None if "\0" in job_id else connection.execute(this).first()  # which Postgres does not take
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
            query = query.where(_jobs.c.owner == owner.replace("\0", "?"))
        if before is not None:
            query = query.where(_jobs.c.number < before)
        if state is not None:
            query = query.where(_jobs.c.state == state)
        with self._begin() as connection:
            rows = connection.execute(query.order_by(_jobs.c.number.desc()).limit(limit)).all()
            return self._with_images(connection, rows)

    def newest(self, user: str, api: str) -> str | None:
        """Returns the id of the newest job of a user that came by this API; None without one."""
        query = sa.select(_jobs.c.id).where(_jobs.c.user == user, _jobs.c.api == api, _jobs.c.state != _REMOVED)
        with self._begin() as connection:
            return connection.scalar(query.order_by(_jobs.c.number.desc()).limit(1))

    def unfinished(self, ids: Sequence[str] | None = None) -> list[StoredJob]:
        """Returns waiting and running jobs, oldest first; of these ids, or all."""
        query = sa.select(_jobs).where(_jobs.c.state.in_(UNFINISHED)).order_by(_jobs.c.number)
        if ids is not None:
            query = query.where(_jobs.c.id.in_(ids))
        with self._begin() as connection:
            return self._with_images(connection, connection.execute(query).all())

    def outlines(self) -> list[Outline]:
        """Returns waiting and running jobs of all replicas, oldest first."""
        is_leased = sa.not_(self._is_free).label("is_leased")
        query = sa.select(_jobs.c.id, _jobs.c.state, _jobs.c.attempts, is_leased, _jobs.c.is_cancelled)
        with self._begin() as connection:
            rows = connection.execute(query.where(_jobs.c.state.in_(UNFINISHED)).order_by(_jobs.c.number)).all()
        return [Outline(**row._mapping) for row in rows]

    def take_webhooks(self) -> list[StoredJob]:
        """Returns finished jobs whose webhook has not been called, and which no other replica is about to call."""
        due: sa.ColumnElement[bool] = _jobs.c.webhook_due & _jobs.c.state.in_(("completed", "failed", "cancelled"))
        with self._begin() as connection:
            if self.is_shared:
                now = self.database.now
                due &= sa.or_(_jobs.c.webhook_until.is_(None), _jobs.c.webhook_until < now)
                taken = _jobs.update().where(due).values(webhook_until=now + WEBHOOK_S).returning(_jobs.c.number)
                due = _jobs.c.number.in_(list(connection.execute(taken).scalars()))
            return self._with_images(connection, connection.execute(sa.select(_jobs).where(due)).all())

    def kept_bytes(self, owner: str) -> int:
        """Returns how many bytes of finished images are kept for an owner."""
        with self._begin() as connection:
            return int(connection.scalar(_kept_bytes(_jobs.c.owner == owner)) or 0)

    def remove(self, job: StoredJob) -> None:
        """Deletes a finished job with its images; its id stays taken."""
        with self._begin() as connection:
            self._remove(connection, job.number)
        self._discard(f"images/{job.number}")

    def upload(self, job: StoredJob) -> Upload:
        """Returns the uploaded images of a job."""
        with self._files():
            return Upload(
                *(
                    self.files.read(f"{_uploads(job)}/{name}") if job.request.get(name) else None
                    for name in ("image", "mask")
                )
            )

    def read_image(self, job: StoredJob, index: int) -> bytes:
        """Returns a finished image, a PNG file.

        Raises:
            FileNotFoundError: There is none.
            InternalError: INTERNAL if it cannot be read.
        """
        try:
            return self.files.read(_image(job.number, index, job.made_by.get(index, 1)))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._broken(error) from error

    def secret(self) -> bytes:
        """Returns the key that signs URLs of images; created once, for all replicas."""
        if self.is_shared:
            with self._begin() as connection:
                self.database.lock(connection, "secret")
                found = self.database.fact(connection, "secret")
                if found is None:
                    found = secrets.token_bytes(32).hex()
                    self.database.set_fact(connection, "secret", found)
            return bytes.fromhex(found)
        path = self._folder / "secret"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            partial.touch(mode=0o600)
            partial.write_bytes(secrets.token_bytes(32))
            partial.replace(path)  # all or nothing: a part could be guessed
        return path.read_bytes()

    @property
    def _is_free(self) -> sa.ColumnElement[bool]:
        """Whether no replica has a job."""
        return sa.or_(_jobs.c.lease_until.is_(None), _jobs.c.lease_until < self.database.now)

    def _num_waiting(self, connection: Connection) -> dict[str, int]:
        query = sa.select(_jobs.c.user, sa.func.count()).where(_jobs.c.state.in_(UNFINISHED), self._is_free)
        return dict(connection.execute(query.group_by(_jobs.c.user)).tuples().all())

    def _tell(self, connection: Connection) -> None:
        """Tells other replicas that a job has another state."""
        self.database.notify(connection, "")

    def _has_image(self, job: StoredJob, index: int) -> bool:
        """Returns whether an image of this attempt is the job's."""
        with self._begin() as connection:
            same = (_images.c.job == job.number) & (_images.c.index == index)
            same &= _images.c.attempt == max(job.attempts, 1)
            return connection.execute(sa.select(_images.c.job).where(same)).first() is not None

    def _with_images(self, connection: Connection, rows: Sequence[Row[Any]]) -> list[StoredJob]:
        images: dict[int, list[dict[str, Any]]] = {row.number: [] for row in rows}
        made_by: dict[int, dict[int, int]] = {row.number: {} for row in rows}
        query = sa.select(_images).where(_images.c.job.in_(list(images))).order_by(_images.c.index)
        for image in connection.execute(query) if rows else ():
            images[image.job].append(image.record)
            made_by[image.job][image._mapping["index"]] = image.attempt
        return [
            StoredJob(
                **{name: value for name, value in row._mapping.items() if name not in _HIDDEN},
                images=images[row.number], made_by=made_by[row.number],
            )
            for row in rows
        ]  # fmt: skip

    def _fill_tables(self, connection: Connection, version: int) -> None:
        """Fills in what the tables of the first gateway did not say: what files take."""
        for number in connection.scalars(sa.select(_jobs.c.number)).all() if version < 1 else ():
            sizes = {
                "upload_bytes": self.files.size(f"uploads/{number}"),
                "image_bytes": self.files.size(f"images/{number}"),
            }
            connection.execute(_jobs.update().where(_jobs.c.number == number).values(sizes))

    def _check_images(self) -> None:
        """Refuses images that are not those of the database: what one replica draws, all are to have."""
        with self._begin() as connection, self._files():
            self.database.lock(connection, "images")
            name = self.database.fact(connection, "images")
            try:
                found = self.files.read(_MARK).decode("ascii", "replace").strip()
            except FileNotFoundError:
                found = None
            if name is None and found is None:
                name = uuid.uuid4().hex
                self.files.write(_MARK, f"{name}\n".encode())
                self.database.set_fact(connection, "images", name)
            elif name != found:
                raise Reason.FIELD_INVALID.error(
                    f"the images in {self.files} are not those of the database {self.database.name}; give all replicas "
                    "the same folder or address that they share with `images`",
                    field="images",
                )

    def _remove_abandoned(self) -> None:
        """Removes uploads that a crash has left."""
        with self._begin() as connection:
            known = set(connection.scalars(sa.select(_jobs.c.upload_key).where(_jobs.c.state.in_(UNFINISHED))))
        with contextlib.suppress(OSError):
            for name in self.files.folders("uploads"):
                written_at, _, rest = name.partition("-")
                if not rest or name in known:
                    continue  # of an older gateway, by its number
                is_new = written_at.isdecimal() and float(written_at) > time.time() - _ABANDONED_S
                if not (self.is_shared and is_new):  # another replica may be about to add it
                    self._discard(f"uploads/{name}")

    def _check_room(self, connection: Connection, owner: str, user: str, num_bytes: int) -> None:
        """Refuses an upload that would fill the folder before its job has run."""
        if not num_bytes:
            return
        query = sa.select(_SHARER, sa.func.sum(_jobs.c.upload_bytes)).where(_jobs.c.upload_bytes > 0).group_by(_SHARER)
        waiting: dict[str, int] = {sharer: int(amount) for sharer, amount in connection.execute(query).tuples().all()}
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

    def _prune(self, ended: StoredJob) -> None:
        """Deletes finished jobs beyond the limits, but not the one that has just ended; forgets deleted ones."""
        quota, gone = self._quota_bytes(ended.owner), list[int]()
        with self._begin() as connection:
            self.database.lock(connection, "prune")
            own = _jobs.c.owner == ended.owner
            while quota is not None and (connection.scalar(_kept_bytes(own)) or 0) > quota:
                if not self._remove_oldest(connection, own, ended.number, gone):
                    break
            for column, limit in ((sa.literal_column("1", sa.Integer), self._max_jobs),
                                  (_jobs.c.image_bytes, self.max_bytes)):  # fmt: skip
                amount = sa.func.sum(column)
                query = sa.select(_SHARER, amount).where(_IS_DONE).group_by(_SHARER).order_by(amount.desc())
                while (sharers := connection.execute(query).all()) and sum(each for _, each in sharers) > limit:
                    if not self._remove_oldest(connection, sharers[0][0] == _SHARER, ended.number, gone):
                        break
            removed = sa.select(_jobs.c.number).where(_jobs.c.state == _REMOVED).order_by(_jobs.c.number.desc())
            known = removed.limit(self._max_jobs)
            connection.execute(_jobs.delete().where(_jobs.c.state == _REMOVED, _jobs.c.number.not_in(known)))
        for number in gone:
            self._discard(f"images/{number}")

    def _remove_oldest(self, connection: Connection, whose: sa.ColumnElement[bool], kept: int, gone: list[int]) -> bool:
        """Deletes the oldest finished job of somebody, but not `kept`. Returns whether there was one."""
        oldest = sa.select(_jobs.c.number).where(_IS_DONE, whose, _jobs.c.number != kept).order_by(_jobs.c.finished_at)
        number = connection.scalar(oldest.limit(1))
        if number is not None:
            self._remove(connection, number)
            gone.append(number)
        return number is not None

    def _remove(self, connection: Connection, number: int) -> None:
        connection.execute(_images.delete().where(_images.c.job == number))
        gone: dict[str, Any] = {
            "state": _REMOVED, "request": {}, "digest": "", "error": None, "webhook_due": False, "image_bytes": 0,
        }  # fmt: skip
        connection.execute(_jobs.update().where(_jobs.c.number == number).values(gone))

    def _discard(self, name: str) -> None:
        """Removes files; those of others' machines not now."""
        if self.is_shared:
            self._sweeper.submit(self.files.remove, name)
        else:
            self.files.remove(name)

    def _begin(self) -> contextlib.AbstractContextManager[Connection]:
        return self.database.begin()

    @contextlib.contextmanager
    def _files(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # such as a full disk
            raise self._broken(error) from error

    def _broken(self, error: OSError) -> HybridSDError:
        return Reason.INTERNAL.error(
            f"the job store fails: {error}; check the disk of `data_dir`" if not self.is_shared else
            f"the images cannot be kept or read: {error}; check `images`"
        )  # fmt: skip


def _kept_bytes(whose: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return sa.select(sa.func.sum(_jobs.c.image_bytes)).where(_IS_DONE, whose)


def _uploads(job: StoredJob) -> str:
    return f"uploads/{job.upload_key or job.number}"


def _image(number: int, index: int, attempt: int) -> str:
    """Returns the name of an image. Each attempt has its own: what a late one writes replaces nothing."""
    return f"images/{number}/{index}.png" if attempt <= 1 else f"images/{number}/{index}.{attempt}.png"
