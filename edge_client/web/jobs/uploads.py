"""Decodes images in requests: base64 and data URLs. `edge_client.images.inputs` checks their content."""

import base64
import binascii
from dataclasses import dataclass

from edge_client.images.inputs import MAX_BYTES
from edge_client.web.schemas.native import JobCreate
from hybridsd.errors import Reason


@dataclass(frozen=True, slots=True)
class Upload:
    """The images of a request, as files."""

    image: bytes | None = None
    mask: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Of both."""
        return len(self.image or b"") + len(self.mask or b"")


def decode(text: str, field: str) -> bytes:
    """Decodes base64 or a data URL.

    Raises:
        InvalidRequest: FIELD_INVALID for invalid base64 or too many bytes.
    """
    payload = text.partition(",")[2] if text.startswith("data:") else text
    if len(payload) > MAX_BYTES * 4 // 3 + 4:
        raise Reason.FIELD_INVALID.error(
            f"{field} has {len(payload)} characters of base64; send at most {MAX_BYTES} bytes",
            field=field,
        )
    try:
        content = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Reason.FIELD_INVALID.error(
            f"{field} is not base64 ({error}); send a PNG, JPEG or WebP image in base64",
            field=field,
        ) from error
    if not content:
        raise Reason.FIELD_INVALID.error(f"{field} is empty; send an image or omit the field", field=field)
    return content


def split_uploads(create: JobCreate) -> tuple[JobCreate, Upload]:
    """Returns a request without its images, and the images."""
    contents = {
        name: None if (text := getattr(create, name)) is None else decode(text, name) for name in ("image", "mask")
    }
    return create.model_copy(update={"image": None, "mask": None}), Upload(**contents)
