"""What is kept is whole: a job with its images or no job, the newest ends, a secret of full length."""

from pathlib import Path

import pytest

from edge_client.web.jobs.store import Store
from edge_client.web.jobs.uploads import Upload
from hybridsd.errors import HybridSDError, Reason


def test_a_job_whose_pictures_cannot_be_kept_is_none(tmp_path: Path) -> None:
    """A disk that takes no files takes no job either, and the next one is kept under the same id."""
    store = Store(tmp_path, max_jobs=10)
    (tmp_path / "uploads").write_bytes(b"in the way")
    with pytest.raises(HybridSDError, match="data_dir") as caught:
        store.add("a", "", "native", {"image": True}, "digest", Upload(image=b"image"))
    left = store.unfinished()
    (tmp_path / "uploads").unlink()
    job = store.add("a", "", "native", {"image": True}, "digest", Upload(image=b"image"))

    assert (caught.value.reason, left) == (Reason.INTERNAL, [])
    assert store.upload(job) == Upload(image=b"image")


def test_the_oldest_ends_are_forgotten_not_the_oldest_beginnings(tmp_path: Path) -> None:
    """A job that took long is still there when it ends, though later ones have ended before it."""
    store = Store(tmp_path, max_jobs=1)
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
    first = Store(tmp_path, max_jobs=1).secret()

    assert Store(tmp_path, max_jobs=1).secret() == first
    assert len(first) == 32
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0
