"""Arrays of pixels: between the decoder's floats and 8 bits, masks and blends."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from edge_client.types import ImageU8
from hybridsd.errors import Reason


def to_u8(image: NDArray[np.float32]) -> ImageU8:
    """Returns an image, `[3, H, W]` in [-1, 1], as `[H, W, 3]` in 0 to 255; what lies outside is cut off.

    Raises:
        InternalError: If a value is not finite.
    """
    if not np.isfinite(image).all():
        raise Reason.INTERNAL.error("the decoder made values that are not finite; run `hybridsd doctor` on the bundle")
    scaled = np.rint((np.clip(image, -1.0, 1.0) + 1.0) * 127.5)
    return np.ascontiguousarray(scaled.transpose(1, 2, 0)).astype(np.uint8)


def from_u8(image_u8: ImageU8) -> NDArray[np.float32]:
    """Returns an image, `[H, W, 3]` in 0 to 255, as `[3, H, W]` in [-1, 1]."""
    floats: NDArray[np.float32] = image_u8.astype(np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)
    return floats


def resize(image_u8: ImageU8, width: int, height: int) -> ImageU8:
    """Returns an image, `[H, W, 3]`, in another size, by Lanczos; what sticks out of the new shape is cut off."""
    resized = ImageOps.fit(Image.fromarray(image_u8), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.uint8)


def to_cells(mask: NDArray[np.float32], cell: int) -> NDArray[np.float32]:
    """Returns a mask for latents, `[1, H / cell, W / cell]`: a cell is drawn as far as any pixel of it is.

    Args:
        mask: `[1, H, W]`.
        cell: Pixels that a latent spans.
    """
    _, height, width = mask.shape
    blocks = mask.reshape(1, height // cell, cell, width // cell, cell)
    return np.ascontiguousarray(blocks.max(axis=(2, 4)))


def composite(generated: ImageU8, original: ImageU8, mask: NDArray[np.float32]) -> ImageU8:
    """Returns the generated image where the mask is 1, exactly the original where it is 0, a blend between.

    Args:
        generated: `[H, W, 3]`.
        original: `[H, W, 3]`.
        mask: `[1, H, W]` in [0, 1].
    """
    share = mask[0][..., None]
    blended = share * generated.astype(np.float32) + (1.0 - share) * original.astype(np.float32)
    composed: ImageU8 = np.rint(blended).astype(np.uint8)
    return composed
