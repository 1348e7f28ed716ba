"""Jobs and images as clients get them."""

import base64
from typing import Any

from edge_client.images.files import convert
from edge_client.web.auth import Access
from edge_client.web.jobs.store import Store, StoredJob
from edge_client.web.schemas.native import Format
from hybridsd.errors import Reason

MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Views:
    """Turns stored jobs into JSON and reads their images.

    Args:
        access: Signs URLs of images where tokens are needed: an <img> sends no token.
        store: Holds the images.
    """

    def __init__(self, access: Access, store: Store) -> None:
        self._access, self._store = access, store

    def job(self, job: StoredJob, position: int | None) -> dict[str, Any]:
        """Returns a `schemas.native.Job`."""
        fields = (
            "id",
            "owner",
            "state",
            "api",
            "created_at",
            "started_at",
            "finished_at",
            "attempts",
            "request",
            "error",
        )
        images = [{**record, "url": self.image_url(job, record["index"])} for record in job.images]
        return {name: getattr(job, name) for name in fields} | {"queue_position": position, "images": images}

    def image_url(self, job: StoredJob, index: int) -> str:
        """Returns the path of an image, signed where tokens are needed."""
        path = f"/v1/jobs/{job.id}/images/{index}"
        return path if self._access.is_open else f"{path}?key={self._access.sign(path)}"

    def image(
        self, job: StoredJob, index: int, wanted: Format = "png", quality: int = 95, max_side: int | None = None
    ) -> bytes:
        """Returns an image as a file; one of its own size says how it was made.

        Args:
            job: Whose image it is.
            index: Its index in the job, from 0.
            wanted: The format.
            quality: 0 to 100, for JPEG and WebP.
            max_side: Scales it down to at most so many pixels a side.

        Raises:
            NotFound: NOT_FOUND if it does not exist, or not yet.
            InternalError: INTERNAL if it cannot be read.
        """
        try:
            content = self._store.read_image(job, index)
        except FileNotFoundError as error:
            raise Reason.NOT_FOUND.error(
                f"job {job.id} has no image {index}; it has {len(job.images)}, counted from 0"
            ) from error
        return content if wanted == "png" and max_side is None else convert(content, wanted, quality, max_side)

    def image_base64(self, job: StoredJob, index: int, wanted: Format = "png", quality: int = 95) -> str:
        """Returns an image as `image` does, in base64."""
        return base64.b64encode(self.image(job, index, wanted, quality)).decode("ascii")


def preview_base64(data_url: str, wanted: Format = "png") -> str:
    """Returns the preview of a "preview" event in another format, in base64."""
    content = base64.b64decode(data_url.partition(",")[2])
    return base64.b64encode(convert(content, wanted)).decode("ascii")
