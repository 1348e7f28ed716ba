"""Pictures that a user gives, as a request takes them: sizes, strength and mask are settled here for every surface.

Knows `image_inputs` and a manifest; nothing of command lines or web pages.
"""

from pathlib import Path

from edge_client.generation.request import ImageInput
from edge_client.images import inputs
from hybridsd.errors import Reason
from hybridsd.limits import MAX_SIZE
from hybridsd.manifest import Manifest

DEFAULT_STRENGTH = 0.75
"""Of an image to begin with; one with a mask is redrawn whole."""
Source = Path | bytes


def read_image(
    manifest: Manifest,
    source: Source,
    *,
    width: int | None = None,
    height: int | None = None,
    strength: float | None = None,
    fit: inputs.Fit = "crop",
    mask: Source | None = None,
    mask_blur: float = 0.0,
    invert_mask: bool = False,
) -> tuple[int, int, ImageInput]:
    """Returns width and height of the picture to be, and what it begins with.

    Args:
        manifest: Of the bundle that draws.
        source: A picture.
        width: Pixels; where neither is given the picture's own shape is kept, at about the bundle's area.
        height: Pixels.
        strength: How much is redrawn, in (0, 1]; None is `DEFAULT_STRENGTH`, or 1 with a mask.
        fit: How both come to that size.
        mask: What to draw anew: white, or transparent.
        mask_blur: Pixels, in [0, 256].
        invert_mask: Draws what the mask keeps, and keeps what it draws.

    Raises:
        InvalidRequest: Where one of them cannot be used, naming the field.
    """
    multiple, defaults = manifest.size_multiple, manifest.defaults
    if "vae_encoder" not in manifest.files:
        raise Reason.FIELD_INVALID.error(
            f"bundle {manifest.name} has no image encoder; leave the image out, or choose another bundle",
            field="image",
        )
    image = inputs.load_image(source)
    if width is None and height is None:
        width, height = inputs.natural_size(image, multiple, defaults.width * defaults.height)
    width, height = width or defaults.width, height or defaults.height
    for name, side in (("width", width), ("height", height)):
        if not multiple <= side <= MAX_SIZE or side % multiple:
            raise Reason.SIZE_INVALID.error(
                f"{name} is {side}; choose a multiple of {multiple} from {multiple} to {MAX_SIZE}",
                field=name,
            )
    drawn = cells = None
    if mask is not None:
        drawn = inputs.load_mask(mask, width, height, fit, blur_px=mask_blur)
        drawn = 1 - drawn if invert_mask else drawn
        if not drawn.any():
            raise Reason.FIELD_INVALID.error(
                "the mask is black all over, so nothing would be drawn; make what to draw white, or transparent",
                field="mask",
            )
        cells = inputs.to_cells(drawn, manifest.vae_scale_factor)
    if strength is None:
        strength = DEFAULT_STRENGTH if drawn is None else 1.0
    pixels = inputs.fit(image, width, height, fit)
    return width, height, ImageInput(image=pixels, strength=strength, mask=drawn, mask_cells=cells)
