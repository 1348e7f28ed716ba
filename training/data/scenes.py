"""Scenes of one or two emoji on a coloured background, with captions that say what is where.

Everything random comes from the `numpy.random.Generator` passed in, so that scene number `i` of seed `s` is the same on
every machine. Images are uint8 [128, 128, 3], sRGB. "first" is the object on the left or on top, "second" the one on
the right or below.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from training.data.glyphs import FONT_PATH, GLYPHS

SIZE = 128
GLYPH_POINTS = 109  # the one size at which a bitmap emoji font can be read

Layout = Literal["single", "beside", "stacked"]
LAYOUTS: tuple[Layout, ...] = ("single", "beside", "stacked")
OBJECTS: tuple[str, ...] = tuple(GLYPHS)
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "gray": (136, 136, 136),
    "yellow": (250, 214, 72),
    "orange": (240, 136, 44),
    "pink": (246, 160, 196),
    "purple": (128, 84, 186),
    "blue": (72, 130, 226),
    "green": (88, 176, 96),
}
COLOURS: tuple[str, ...] = tuple(BACKGROUNDS)

# {a} is the first object with its article, {b} the second. The first two of each list are the canonical phrasings.
TEMPLATES: dict[Layout, tuple[str, ...]] = {
    "single": ("{a}", "{a}", "a picture of {a}", "one {a0}", "just {a}", "{a} in the middle"),
    "beside": (
        "{a} to the left of {b}",
        "{b} to the right of {a}",
        "{a} left of {b}",
        "{b} right of {a}",
        "{a} on the left and {b} on the right",
        "{b} on the right and {a} on the left",
        "{a} and to its right {b}",
        "{b} and to its left {a}",
        "{a} with {b} to its right",
        "{b} with {a} to its left",
    ),
    "stacked": (
        "{a} above {b}",
        "{b} below {a}",
        "{a} on top of {b}",
        "{b} under {a}",
        "{b} beneath {a}",
        "{a} over {b}",
        "{a} at the top and {b} at the bottom",
        "{a} and below it {b}",
        "{b} and above it {a}",
        "{a} with {b} below it",
        "{b} with {a} above it",
    ),
}
BACKGROUND_TEMPLATES: tuple[str, ...] = (
    " on {ac} background",
    " on {c}",
    ", {c} background",
    " with {ac} background",
)


@dataclass(frozen=True)
class Scene:
    """What an image shows. `second` is None exactly when `layout` is "single"."""

    layout: Layout
    first: str
    second: str | None
    background: str

    def __post_init__(self) -> None:
        if (self.second is None) != (self.layout == "single"):
            raise ValueError(f"layout {self.layout!r} does not go with second object {self.second!r}")


@dataclass(frozen=True)
class Placed:
    """One object where it was drawn: centre and longer side, in pixels."""

    name: str
    x: float
    y: float
    side: float


@cache
def held_out_pairs() -> frozenset[frozenset[str]]:
    """Gives the unordered pairs of objects that are never trained on: the tenth with the smallest hash of its names."""
    pairs = sorted(
        (frozenset(pair) for pair in combinations(OBJECTS, 2)),
        key=lambda pair: hashlib.sha256(" ".join(sorted(pair)).encode()).digest(),
    )
    return frozenset(pairs[: len(pairs) // 10])


def sample_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """Draws a scene: one in six is a single object; with `held_out` always two, of a pair never trained on."""
    background = COLOURS[rng.integers(len(COLOURS))]
    if not held_out and rng.random() < 1 / 6:
        return Scene("single", OBJECTS[rng.integers(len(OBJECTS))], None, background)
    layout: Layout = "beside" if rng.random() < 0.5 else "stacked"
    while True:
        i, j = rng.choice(len(OBJECTS), size=2, replace=False)
        if (frozenset((OBJECTS[i], OBJECTS[j])) in held_out_pairs()) == held_out:
            return Scene(layout, OBJECTS[i], OBJECTS[j], background)


def with_article(name: str) -> str:
    """Puts "a" or "an" in front of `name`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(scene: Scene, rng: np.random.Generator, *, free: float = 0.0) -> str:
    """Says what is where. Every caption is true of `scene`.

    Args:
        scene: What to describe.
        rng: Chooses the phrasing.
        free: Probability of a paraphrase: any template, perhaps without articles or without the background.
    """
    paraphrase = rng.random() < free
    templates = TEMPLATES[scene.layout]
    template = templates[rng.integers(len(templates) if paraphrase else 2)]
    second = scene.second or ""
    bare = paraphrase and rng.random() < 0.15
    words = {
        "a": scene.first if bare else with_article(scene.first),
        "a0": scene.first,
        "b": second if bare or not second else with_article(second),
    }
    tail = BACKGROUND_TEMPLATES[rng.integers(len(BACKGROUND_TEMPLATES)) if paraphrase else 0]
    if paraphrase and rng.random() < 0.15:
        tail = ""
    return template.format(**words) + tail.format(c=scene.background, ac=with_article(scene.background))


def place(scene: Scene, rng: np.random.Generator) -> tuple[Placed, ...]:
    """Chooses where the objects stand and how large they are; no two overlap and none leaves the image."""
    if scene.second is None:
        x, y = SIZE / 2 + rng.uniform(-9, 9, size=2)
        return (Placed(scene.first, x, y, rng.uniform(74, 98)),)
    near, far = 33 + rng.uniform(-3, 3), 95 + rng.uniform(-3, 3)
    across = SIZE / 2 + rng.uniform(-14, 14, size=2)
    sides = rng.uniform(46, 56, size=2)
    if scene.layout == "beside":
        return (
            Placed(scene.first, near, across[0], sides[0]),
            Placed(scene.second, far, across[1], sides[1]),
        )
    return Placed(scene.first, across[0], near, sides[0]), Placed(scene.second, across[1], far, sides[1])


@cache
def _glyph(name: str) -> Image.Image:
    """Reads one object from the font: RGBA with premultiplied alpha, cropped to what is visible."""
    font = ImageFont.truetype(str(FONT_PATH), GLYPH_POINTS)
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), GLYPHS[name], font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox()).convert("RGBa")


@cache
def _sized_glyph(name: str, side: int) -> NDArray[np.float32]:
    """Gives one object with its longer side `side` pixels: float32 [h, w, 4], premultiplied, 0..255 (alpha 0..1)."""
    glyph = _glyph(name)
    scale = side / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    pixels = np.asarray(glyph.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0), dtype=np.float32).copy()
    pixels[..., 3] /= 255
    return pixels


def draw(placed: tuple[Placed, ...], colour: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draws `placed` objects on a flat background: float32 [3] in 0..255 => uint8 [128, 128, 3]."""
    image = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    image[:] = colour
    for item in placed:
        glyph = _sized_glyph(item.name, round(item.side))
        height, width = glyph.shape[:2]
        top = min(max(round(item.y - height / 2), 0), SIZE - height)
        left = min(max(round(item.x - width / 2), 0), SIZE - width)
        area = image[top : top + height, left : left + width]
        area *= 1 - glyph[..., 3:]
        area += glyph[..., :3]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def background_colour(scene: Scene, rng: np.random.Generator) -> NDArray[np.float32]:
    """Gives the colour behind `scene`, slightly varied: float32 [3] in 0..255."""
    return np.asarray(BACKGROUNDS[scene.background], dtype=np.float32) + rng.uniform(-9, 9, size=3).astype(np.float32)


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draws `scene` with random places, sizes and a slight variation of the background: uint8 [128, 128, 3]."""
    placed = place(scene, rng)
    return draw(placed, background_colour(scene, rng))


def to_model_range(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Moves images to what a VAE sees: uint8 [B, H, W, 3] => float32 [B, 3, H, W] in [-1, 1]."""
    return np.ascontiguousarray((images.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2))


def from_model_range(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Moves images back from what a VAE gives: float32 [B, 3, H, W] in [-1, 1] => uint8 [B, H, W, 3]."""
    pixels: NDArray[np.uint8] = np.clip(np.rint((images.transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255).astype(np.uint8)
    return pixels
