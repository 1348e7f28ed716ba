"""Pictures in requests: base64 and data URLs to bytes. What is in them is checked by `edge_client.images.inputs`."""

import base64
import binascii

from edge_client.images.inputs import MAX_BYTES
from edge_client.web.jobs.worker import Upload
from edge_client.web.schemas.native import JobCreate
from hybridsd.errors import Reason


def decode(text: str, field: str) -> bytes:
    """Returns the bytes of a picture that came as text.

    Raises:
        InvalidRequest: FIELD_INVALID for what is no base64, or too large.
    """
    payload = text.partition(",")[2] if text.startswith("data:") else text
    if len(payload) > MAX_BYTES * 4 // 3 + 4:
        raise Reason.FIELD_INVALID.error(
            f"{field} has {len(payload)} characters of base64; at most {MAX_BYTES} bytes",
            field=field,
        )
    try:
        content = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Reason.FIELD_INVALID.error(
            f"{field} is no base64 ({error}); send a PNG, JPEG or WebP picture in base64",
            field=field,
        ) from error
    if not content:
        raise Reason.FIELD_INVALID.error(f"{field} is empty; send a picture, or leave it out", field=field)
    return content


def take(create: JobCreate) -> tuple[JobCreate, Upload]:
    """Returns a job without its pictures, and the pictures."""
    contents = {
        name: None if (text := getattr(create, name)) is None else decode(text, name) for name in ("image", "mask")
    }
    return create.model_copy(update={"image": None, "mask": None}), Upload(**contents)
