"""The database of the jobs: SQLite in the folder of one gateway, or Postgres that several share."""

import asyncio
import contextlib
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import URL, Connection

from edge_client.web.jobs import tables
from hybridsd.errors import HybridSDError, Reason

log = structlog.get_logger()

P = ParamSpec("P")
T = TypeVar("T")

CALL_S = 10.0
"""No caller waits longer for a shared database."""
CLOSE_S = 3.0
"""How long to wait for what still runs."""
RETRY_S = 1.0
"""While it is lost, it is asked again so often; all others are refused at once."""
_CHANNEL = "hybridsd"
_THREADS = 16
_LIMITS = {"statement_timeout": "8s", "lock_timeout": "6s", "idle_in_transaction_session_timeout": "30s"}
"""Of Postgres: whoever is cut off in the middle holds nobody up for long."""
_CONNECT = {
    "connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 3, "keepalives_count": 3,
    "tcp_user_timeout": 8000, "application_name": "hybridsd-gateway",
}  # fmt: skip
_MIGRATING = 7_206_541
"""Key of the lock under which tables are changed; others are `lock`'s."""


class Database:
    """Gives transactions. Safe to use from several threads.

    Args:
        url: Of Postgres; None: SQLite.
        folder: Of the file of SQLite.

    Raises:
        InvalidRequest: FIELD_INVALID if the address is none of Postgres, or nothing speaks to it.
        CloudUnreachable: DATABASE_UNAVAILABLE if it does not answer.
        SQLAlchemyError: SQLite cannot use the file.
    """

    def __init__(self, url: str | None, folder: Path) -> None:
        self.is_shared = url is not None
        self._retry_at, self._asks = 0.0, threading.Lock()
        self._lost_at: float | None = None
        self.why_lost = ""
        """What the driver said last."""
        if url is None:
            self.name, self._secrets = str(folder), list[str]()
            self.engine = sa.create_engine(f"sqlite:///{folder / 'jobs.sqlite'}")
            sa.event.listen(self.engine, "connect", _configure_sqlite)
        else:
            address = _postgres(url)
            self._secrets = [str(each) for each in (address.password, address.query.get("password")) if each]
            service = address.query.get("service")
            host = address.host or address.query.get("host") or "localhost"
            self.name = f"of service {service}" if service else f"{host}/{address.database or ''}"
            self.engine = sa.create_engine(
                address, connect_args=_CONNECT, pool_size=4, max_overflow=_THREADS, pool_timeout=CALL_S,
                pool_pre_ping=True, hide_parameters=True,
            )  # fmt: skip
            sa.event.listen(self.engine, "connect", _configure_postgres)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="database") if self.is_shared else None

    def close(self) -> None:
        """Closes the connections."""
        if self._threads is not None:  # one that waits for a silent database is left behind
            ending = threading.Thread(target=self._threads.shutdown, daemon=True)
            ending.start()
            ending.join(CLOSE_S)
        self.engine.dispose()

    @property
    def now(self) -> sa.ColumnElement[float]:
        """The time by the clock that all replicas share, in seconds."""
        if not self.is_shared:
            return sa.literal(time.time(), sa.Float)
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Float)

    @property
    def lost_s(self) -> float:
        """For how many seconds it has not answered; 0: it does."""
        lost_at = self._lost_at
        return 0.0 if lost_at is None else time.monotonic() - lost_at

    async def run(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Does work with the database: in a thread where it is shared, and at once where it is a file.

        Raises:
            CloudUnreachable: DATABASE_UNAVAILABLE if it does not answer within `CALL_S`.
        """
        if self._threads is None:
            return work(*args, **options)
        done = asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **options))
        try:
            async with asyncio.timeout(CALL_S):  # `wait_for` of Python 3.11 may lose a cancellation
                return await done
        except TimeoutError:
            raise self._lost(f"no answer in {CALL_S:g} s") from None

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """Yields a connection in a transaction.

        Raises:
            CloudUnreachable: DATABASE_UNAVAILABLE if a shared one does not answer.
            InternalError: INTERNAL if SQLite fails, as with a full disk.
        """
        if not self.is_shared:
            try:
                with self.engine.begin() as connection:
                    yield connection
            except sa.exc.OperationalError as error:
                raise Reason.INTERNAL.error(
                    f"the job store fails: {error.orig}; check the disk of `data_dir`"
                ) from error
            return
        is_probe = self._lost_at is not None
        if is_probe and not self._may_ask():
            raise self._refusal()
        try:
            with self.engine.begin() as connection:
                if is_probe:
                    connection.execute(sa.select(1))
                    self._found()
                yield connection
            self._found()
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError) as error:
            raise self._failed(error) from error

    def lock(self, connection: Connection, what: str) -> None:
        """Waits until no other replica holds this lock; the end of the transaction lets go. SQLite needs none."""
        if self.is_shared:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"hybridsd {what}"))))

    def notify(self, connection: Connection, what: str) -> None:
        """Tells all replicas something when the transaction ends; see `listen`."""
        if self.is_shared:
            connection.execute(sa.select(sa.func.pg_notify(_CHANNEL, what)))

    def listen(self, tell: Callable[[str], None], is_over: Callable[[], bool]) -> None:
        """Passes on what replicas tell, until it is over. For a thread; goes on when the database is back."""
        while not is_over():
            try:
                with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    connection.exec_driver_sql(f"LISTEN {_CHANNEL}")
                    driver: Any = connection.connection.driver_connection
                    connection.detach()  # nobody else is to hear with it
                    tell("")  # whatever was said before
                    while not is_over():
                        for said in driver.notifies(timeout=0.5):
                            tell(said.payload)
            except Exception as error:  # the driver's own, too: without this, others find out by asking
                log.debug("database_listener", error=type(error).__name__)
                if not is_over():
                    time.sleep(RETRY_S)

    def update(self, fill: Callable[[Connection, int], None]) -> None:
        """Brings the tables up to date, one replica at a time.

        Args:
            fill: Called in the same transaction, with the version that they had.

        Raises:
            InvalidRequest: FIELD_INVALID if they are those of a newer gateway.
        """
        with self.begin() as connection:
            if self.is_shared:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
                tables.facts.create(connection, checkfirst=True)
                version = int(self.fact(connection, "version") or tables.SCHEMA_VERSION)
            else:
                version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version > tables.SCHEMA_VERSION:
                where, what = ("the database", "`database`") if self.is_shared else (self.name, "`data_dir`")
                raise Reason.FIELD_INVALID.error(
                    f"{where} was written by a newer gateway (version {version} of its tables; this one knows "
                    f"{tables.SCHEMA_VERSION}); update this one, or change {what}",
                    field=what.strip("`"),
                )
            tables.update(connection)
            fill(connection, version)
            if self.is_shared:
                self.set_fact(connection, "version", str(tables.SCHEMA_VERSION))
            else:
                connection.exec_driver_sql(f"PRAGMA user_version = {tables.SCHEMA_VERSION}")

    def fact(self, connection: Connection, name: str) -> str | None:
        """Returns what is written down under a name; None: nothing."""
        facts = tables.facts
        return connection.scalar(sa.select(facts.c.value).where(facts.c.name == name))

    def set_fact(self, connection: Connection, name: str, value: str) -> None:
        """Writes something down under a name."""
        connection.execute(tables.facts.delete().where(tables.facts.c.name == name))
        connection.execute(tables.facts.insert().values(name=name, value=value))

    def _may_ask(self) -> bool:
        """Returns whether to ask a database that is lost: one caller every `RETRY_S`."""
        with self._asks:
            if time.monotonic() < self._retry_at:
                return False
            self._retry_at = time.monotonic() + RETRY_S
            return True

    def _found(self) -> None:
        if self._lost_at is not None:
            log.info("database_back", lost_s=round(self.lost_s, 1))
        self._lost_at = None

    def _lost(self, why: str) -> HybridSDError:
        with self._asks:
            self.why_lost, self._retry_at = why, time.monotonic() + RETRY_S
            if self._lost_at is None:
                self._lost_at = time.monotonic()
                log.warning("database_lost", error=why)
        return self._refusal()

    def _failed(self, error: sa.exc.SQLAlchemyError) -> HybridSDError:
        """Returns the refusal for an error of Postgres; those of the connection mean that it is lost for all."""
        cause = getattr(error, "orig", None)
        state = getattr(cause, "sqlstate", None)
        if state is None or state.startswith(("08", "57P", "53300", "25006")):
            return self._lost(self.without_secrets(cause or error))
        log.warning("database_failed", error=type(cause).__name__, code=state)
        return self._refusal()

    def without_secrets(self, error: BaseException) -> str:
        """Returns the first line of what an error says, without the password."""
        said = str(error).strip().partition("\n")[0]
        for each in self._secrets:
            said = said.replace(each, "***")
        return said[:300]

    def _refusal(self) -> HybridSDError:
        return Reason.DATABASE_UNAVAILABLE.error(
            "the gateway's database does not answer; nothing is lost: come again in a few seconds", retry_delay_s=3.0
        )


def _postgres(url: str) -> URL:
    """Returns the address of a database. Messages do not quote it: it may have a password in it.

    Raises:
        InvalidRequest: FIELD_INVALID.
    """
    try:
        address = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        address = None
    if address is None or address.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise Reason.FIELD_INVALID.error(
            "`database` is no address of Postgres; give one such as postgresql://user@host:5432/hybridsd, or omit it "
            "for SQLite",
            field="database",
        )
    if "@" in (address.host or ""):  # what would be looked up, and told, is a part of the password
        raise Reason.FIELD_INVALID.error(
            "`database` has an @ in its password; write it as %40, and likewise : as %3A, / as %2F and % as %25",
            field="database",
        )
    if importlib.util.find_spec("psycopg") is None:
        raise Reason.FIELD_INVALID.error(
            "`database` needs psycopg; install it with pip install 'hybridsd[edge,postgres]'", field="database"
        )
    return address.set(drivername="postgresql+psycopg")


def _configure_sqlite(connection: Any, _record: object) -> None:
    """Lets readers and one writer work at once. A power loss may cost the last transactions, never the file."""
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _configure_postgres(connection: Any, _record: object) -> None:
    """Sets the limits, by statements: poolers do not pass on the options of a connection."""
    for name, value in _LIMITS.items():
        connection.execute(f"SET {name} = '{value}'")
    connection.commit()
