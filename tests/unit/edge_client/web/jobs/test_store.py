"""What is kept is whole: a job with its images or no job, the newest ends, a secret of full length."""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from edge_client.web.jobs.quotas import Work
from edge_client.web.jobs.store import Store
from edge_client.web.jobs.uploads import Upload
from hybridsd.errors import HybridSDError, Reason

Opening = Callable[..., Store]


@pytest.fixture(params=["sqlite", "postgres"])
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opening]:
    """Opens stores of one folder, and of one database of either kind."""
    database = None if request.param == "sqlite" else request.getfixturevalue("postgres").fresh()
    opened: list[Store] = []

    def open_store(**options: Any) -> Store:
        if database is None:
            for store in opened:
                store.close()
        opened.append(Store(tmp_path, database=database, **{"max_jobs": 100, **options}))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


def swept(store: Store) -> None:
    """Waits until all files that are to go are gone."""
    store._sweeper.submit(lambda: None).result()


def test_a_job_whose_pictures_cannot_be_kept_is_none(tmp_path: Path, opening: Opening) -> None:
    """A disk that takes no files takes no job either, and the next one is kept under the same id."""
    store = opening(max_jobs=10)
    (tmp_path / "uploads").write_bytes(b"in the way")
    with pytest.raises(HybridSDError, match=r"data_dir|`images`") as caught:
        store.add("a", "", "native", {"image": True}, "digest", Upload(image=b"image"))
    left = store.unfinished()
    (tmp_path / "uploads").unlink()
    job = store.add("a", "", "native", {"image": True}, "digest", Upload(image=b"image"))

    assert (caught.value.reason, left) == (Reason.INTERNAL, [])
    assert store.upload(job) == Upload(image=b"image")


def test_the_oldest_ends_are_forgotten_not_the_oldest_beginnings(opening: Opening) -> None:
    """A job that took long is still there when it ends, though later ones have ended before it."""
    store = opening(max_jobs=1)
    for job_id in ("slow", "fast"):
        store.add(job_id, "", "native", {}, job_id, Upload())
    store.finish("fast", "completed")
    store.finish("slow", "completed")

    assert [job.id for job in store.page("", limit=10)] == ["slow"]
    with pytest.raises(HybridSDError) as caught:
        store.get("fast")
    assert caught.value.reason is Reason.JOB_GONE


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    """It survives a restart, is long, and nobody else may read it; what a crash left of one is not used."""
    (tmp_path / "secret.partial").write_bytes(b"x")
    store = Store(tmp_path, max_jobs=1)
    first = store.secret()
    store.close()

    assert Store(tmp_path, max_jobs=1).secret() == first
    assert len(first) == 32
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0


def finished(store: Store, job_id: str, owner: str, num_bytes: int = 0) -> None:
    """Adds a job with one image of that size, and ends it."""
    job = store.add(job_id, owner, "native", {}, job_id, Upload())
    if num_bytes:
        store.add_image(job, {"index": 0}, store.write_image(job, 0, bytes(num_bytes)))
    store.finish(job_id, "completed")


def kept(store: Store, owner: str) -> list[str]:
    return [job.id for job in store.page(owner, limit=100)]


def test_whoever_keeps_most_loses_the_oldest(opening: Opening) -> None:
    """By number: a flood of one owner evicts its own jobs, never those of another."""
    store = opening(max_jobs=4)
    finished(store, "b", "b")
    for index in range(20):
        finished(store, f"a{index}", "a")

    assert kept(store, "b") == ["b"]
    assert kept(store, "a") == ["a19", "a18", "a17"]


def test_whoever_keeps_most_bytes_loses_the_oldest(tmp_path: Path, opening: Opening) -> None:
    """By size: as by number; the files go too, and the job that has just ended stays."""
    store = opening(max_bytes=1000)
    finished(store, "b", "b", 300)
    for index in range(5):
        finished(store, f"a{index}", "a", 300)
    assert kept(store, "b") == ["b"]
    assert kept(store, "a") == ["a4", "a3"]
    swept(store)
    assert len(list((tmp_path / "images").iterdir())) == 3

    finished(store, "huge", "a", 2000)
    assert (kept(store, "a"), kept(store, "b")) == (["huge"], ["b"])
    finished(store, "next", "a", 10)
    assert (kept(store, "a"), kept(store, "b")) == (["next"], ["b"])


def test_uploads_that_wait_have_a_share(tmp_path: Path, opening: Opening) -> None:
    """Who is alone may have all of it; nobody's leave no room for another's; what has run makes room."""
    store = opening(max_bytes=800)
    store.add("a", "a", "native", {"image": True}, "a", Upload(image=bytes(160), mask=bytes(30)))
    with pytest.raises(HybridSDError, match="max-data-mib") as caught:
        store.add("a2", "a", "native", {"image": True}, "a2", Upload(image=bytes(20)))
    store.add("b", "b", "native", {"image": True}, "b", Upload(image=bytes(90)))
    store.add("b2", "b", "native", {"image": True}, "b2", Upload(image=bytes(10)))
    with pytest.raises(HybridSDError, match="101 yours"):
        store.add("b3", "b", "native", {"image": True}, "b3", Upload(image=bytes(1)))
    store.finish("a", "failed")
    store.add("a2", "a", "native", {"image": True}, "a2", Upload(image=bytes(20)))
    swept(store)

    assert caught.value.reason is Reason.TOO_MANY_JOBS
    assert caught.value.retry_delay_s
    assert len(list((tmp_path / "uploads").iterdir())) == 3


def test_an_address_cannot_fill_the_folder(opening: Opening) -> None:
    """Where no token is needed, addresses share it: uploads that wait, and images that are kept."""
    store = opening(max_jobs=3, max_bytes=800)
    store.add("a", "", "native", {"image": True}, "a", Upload(image=bytes(190)), user="a")
    with pytest.raises(HybridSDError, match="yours"):
        store.add("a2", "", "native", {"image": True}, "a2", Upload(image=bytes(20)), user="a")
    store.add("b", "", "native", {"image": True}, "b", Upload(image=bytes(200)), user="b")
    with pytest.raises(HybridSDError, match="would wait"):  # as many as there may be of all newcomers together
        store.add("c", "", "native", {"image": True}, "c", Upload(image=bytes(20)), user="c")
    for job_id in ("b", "a"):
        store.finish(job_id, "completed")
    for index in range(5):
        store.add(f"flood{index}", "", "native", {}, f"flood{index}", Upload(), user="a")
        store.finish(f"flood{index}", "completed")
    assert kept(store, "") == ["flood4", "flood3", "b"]


def test_a_token_keeps_no_more_than_its_quota(opening: Opening) -> None:
    """Its own oldest job goes, although there is room; the last one stays even if it is too large by itself."""
    quotas = {"a": 500}
    store = opening(quota_bytes=quotas.get)
    for index in range(3):
        finished(store, f"a{index}", "a", 200)
        finished(store, f"b{index}", "b", 200)
    assert (kept(store, "a"), kept(store, "b")) == (["a2", "a1"], ["b2", "b1", "b0"])
    assert (store.kept_bytes("a"), store.kept_bytes("c")) == (400, 0)
    finished(store, "huge", "a", 900)
    assert kept(store, "a") == ["huge"]

    with pytest.raises(HybridSDError, match="at most 500") as never:
        store.add("x", "a", "native", {"image": True}, "x", Upload(image=bytes(501)))
    store.add("y", "a", "native", {"image": True}, "y", Upload(image=bytes(400)))
    with pytest.raises(HybridSDError, match="allows 500") as later:
        store.add("z", "a", "native", {"image": True}, "z", Upload(image=bytes(200)))
    assert (never.value.reason, never.value.retry_delay_s) == (Reason.BODY_TOO_LARGE, None)
    assert later.value.reason is Reason.QUOTA_EXCEEDED
    assert later.value.retry_delay_s


def test_tables_without_users_are_brought_up_to_date(tmp_path: Path) -> None:
    """Version 1, before tenants: its jobs are kept, and new ones say whose they are."""
    store = Store(tmp_path, max_jobs=100)
    finished(store, "old", "a")
    store.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        for name in ("user", "steps", "width", "height"):
            connection.execute(f"ALTER TABLE jobs DROP COLUMN {name}")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    store = Store(tmp_path, max_jobs=100)
    store.add("new", "a", "native", {}, "new", Upload(), user="id", work=Work(steps=3, width=8, height=16))
    old, new = store.get("old"), store.get("new")
    store.close()

    assert (old.user, old.work, old.state) == ("", Work(), "completed")
    assert (new.user, new.work.cost) == ("id", 3 * 8 * 16)


def test_deleted_jobs_are_forgotten_in_the_end(opening: Opening) -> None:
    """The last ones are known to be gone; of the others not even a row is left."""
    store = opening(max_jobs=3)
    for index in range(10):
        finished(store, f"a{index}", "a")
    reasons = []
    for index in range(7):
        with pytest.raises(HybridSDError) as caught:
            store.get(f"a{index}")
        reasons.append(caught.value.reason)

    assert reasons == [Reason.NOT_FOUND] * 4 + [Reason.JOB_GONE] * 3
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM jobs").scalar_one() == 6


def test_a_page_is_two_queries(opening: Opening) -> None:
    """However many jobs and images are on it."""
    store = opening()
    for index in range(30):
        finished(store, f"a{index}", "a", 1)
    said: list[str] = []
    sa.event.listen(store._engine, "before_cursor_execute", lambda _c, _cursor, statement, *_: said.append(statement))
    jobs = store.page("a", limit=30)

    assert len(said) == 2
    assert [[record["index"] for record in job.images] for job in jobs] == [[0]] * 30


def test_a_folder_has_one_gateway(tmp_path: Path) -> None:
    """A second one is told who has it; when the first is gone, however it went, it may have it."""
    store = Store(tmp_path, max_jobs=1)
    with pytest.raises(HybridSDError, match=f"process {os.getpid()} on .*data_dir") as caught:
        Store(tmp_path, max_jobs=1)
    store.close()
    Store(tmp_path, max_jobs=1).close()

    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, "data_dir")


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(HybridSDError, match="data_dir") as caught:
        Store(tmp_path, max_jobs=1)

    assert (caught.value.reason, caught.value.field) == (Reason.FIELD_INVALID, "data_dir")


OLD = """
CREATE TABLE jobs (number INTEGER NOT NULL PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, api TEXT NOT NULL,
    state TEXT NOT NULL, created_at FLOAT NOT NULL, started_at FLOAT, finished_at FLOAT, attempts INTEGER NOT NULL,
    request JSON NOT NULL, digest TEXT NOT NULL, error JSON, webhook_due BOOLEAN NOT NULL);
CREATE TABLE images (job INTEGER NOT NULL REFERENCES jobs (number), "index" INTEGER NOT NULL, record JSON NOT NULL,
    PRIMARY KEY (job, "index"));
INSERT INTO jobs VALUES (1, 'done', '', 'native', 'completed', 1, 1, 2, 1, '{}', '', 'null', 0);
INSERT INTO jobs VALUES (2, 'waits', '', 'native', 'queued', 1, NULL, NULL, 0, '{"image": true}', '', 'null', 0);
INSERT INTO images VALUES (1, 0, '{"index": 0}');
"""
"""The tables of the first gateway."""


def test_tables_of_an_older_gateway_are_brought_up_to_date(tmp_path: Path) -> None:
    """Nothing is lost, and what the files take is known."""
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as connection:
        connection.executescript(OLD)
    for name, size in (("images/1/0.png", 700), ("uploads/2/image", 30)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    for _ in range(2):  # the second time there is nothing to do
        store = Store(tmp_path, max_jobs=10)
        jobs = store.page("", limit=10)
        store.close()

    assert [(job.id, job.image_bytes, job.upload_bytes) for job in jobs] == [("waits", 0, 30), ("done", 700, 0)]
    assert jobs[1].images == [{"index": 0}]


def test_tables_of_a_newer_gateway_are_left_alone(tmp_path: Path) -> None:
    Store(tmp_path, max_jobs=1).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 999")
    with pytest.raises(HybridSDError, match=r"newer gateway.*999"):
        Store(tmp_path, max_jobs=1)
    with pytest.raises(HybridSDError, match="newer gateway"):  # and not: used by another
        Store(tmp_path, max_jobs=1)
