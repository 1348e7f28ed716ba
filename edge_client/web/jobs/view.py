"""What clients see of a job and its pictures, and pictures in the format that they want. Knows the store."""

import io
from typing import Any, Literal

from PIL import Image as Pillow

from edge_client.web.auth import Access
from edge_client.web.jobs.store import Store, StoredJob
from hybridsd.errors import Reason

Format = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Views:
    """Makes what clients see.

    Args:
        access: Signs addresses of pictures where tokens are needed: an <img> sends none.
        store: Where pictures are.
    """

    def __init__(self, access: Access, store: Store) -> None:
        self._access, self._store = access, store

    def job(self, job: StoredJob, position: int | None) -> dict[str, Any]:
        """Returns a `schemas.Job`."""
        fields = ("id", "state", "face", "created_at", "started_at", "finished_at", "attempts", "request", "error")
        images = [{**record, "url": self.image_url(job, record["index"])} for record in job.images]
        return {name: getattr(job, name) for name in fields} | {"queue_position": position, "images": images}

    def image_url(self, job: StoredJob, index: int) -> str:
        """Returns the path of a picture, with a key where one is needed."""
        path = f"/v1/jobs/{job.id}/images/{index}"
        return path if self._access.is_open else f"{path}?key={self._access.sign(path)}"

    def image(self, job: StoredJob, index: int, wanted: Format = "png", quality: int = 95) -> bytes:
        """Returns a picture as a file; a PNG says how it was made, the others do not.

        Raises:
            NotFound: NOT_FOUND where there is none of that number, or not yet.
        """
        try:
            content = self._store.image_path(job, index).read_bytes()
        except OSError as error:
            raise Reason.NOT_FOUND.error(
                f"job {job.id} has no picture {index}; it has {len(job.images)}, from 0 on"
            ) from error
        return content if wanted == "png" else reencode(content, wanted, quality)


def reencode(content: bytes, wanted: Format, quality: int = 95) -> bytes:
    """Returns a picture in another format.

    Args:
        content: A picture that Pillow reads.
        wanted: Its format.
        quality: 0 to 100, of JPEG and WebP; 100 of WebP is lossless.
    """
    stream = io.BytesIO()
    with Pillow.open(io.BytesIO(content)) as picture:
        options: dict[str, Any] = {} if wanted == "png" else {"quality": quality}
        if wanted == "webp" and quality == 100:
            options["lossless"] = True
        if wanted == "jpeg" and quality >= 90:
            options["subsampling"] = 0
        picture.convert("RGB").save(stream, format=wanted.upper(), **options)
    return stream.getvalue()
