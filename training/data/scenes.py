"""Scenes of one to three emoji on a coloured background, with captions that say what is where.

A scene is up to three objects, each in a quadrant of its own and of a kind, tint and size, and a background: about
eleven attributes, which a caption names all. Kinds follow Zipf's law in training and are uniform where models are
judged, so that what was seldom seen counts as much as what was often seen. Some pairs of kinds, and some tints of some
kinds, are never trained on.

Everything random comes from the `numpy.random.Generator` passed in, so that scene number `i` of seed `s` is the same on
every machine. Images are uint8 [128, 128, 3], sRGB.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from training.data.glyphs import DISTRACTORS, FONT_PATH, GLYPHS

SIZE = 128
GLYPH_POINTS = 109  # the one size at which a bitmap emoji font can be read

ObjectSize = Literal["small", "large"]
SIZES: tuple[ObjectSize, ...] = get_args(ObjectSize)
SIDES: dict[ObjectSize, int] = {"small": 36, "large": 56}
"""Longer side in pixels."""
CELL = 8
"""Pixels that a latent cell spans. Objects stand on this grid: a VAE of a few hours then draws them crisply, because it
meets each at one offset to its cells instead of 64."""
KINDS: tuple[str, ...] = tuple(GLYPHS)
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
NATURAL = "natural"
TINTS: dict[str, tuple[int, int, int]] = {
    NATURAL: (0, 0, 0),  # the glyph as it is; captions do not name it
    "violet": (134, 60, 220),
    "turquoise": (30, 190, 190),
    "magenta": (220, 30, 130),
    "bronze": (170, 100, 30),
}
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
ZIPF_OFFSET = 3
"""The kind of rank r, from 1, is drawn in proportion to 1 / (r + ZIPF_OFFSET): the first 16 times as often as the
last."""
HELD_OUT = 0.1
"""Share of pairs of kinds, and of tints of kinds, that are never trained on."""

# The first of each list is the canonical phrasing.
PLACE_TEMPLATES = ("{a} at the {q}", "{a} in the {q}", "{a} in the {q} corner", "at the {q} {a}", "{a} {q}")
SIZE_WORDS: dict[ObjectSize, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
}
BACKGROUND_TEMPLATES = (" on {ac} background", " on {c}", ", {c} background", " with {ac} background")
PREFIXES = ("", "draw ", "a drawing of ", "a picture of ", "an image of ", "show me ")


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene."""

    kind: str
    tint: str
    size: ObjectSize
    quadrant: int
    """Index into `QUADRANTS`."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What an image shows: one to three things, in the order of their quadrants, of different kinds."""

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self) -> None:
        quadrants = [thing.quadrant for thing in self.things]
        if not 1 <= len(quadrants) <= 3 or quadrants != sorted(set(quadrants)) or not set(quadrants) <= set(range(4)):
            raise ValueError(f"the quadrants are {quadrants}; give 1 to 3 different ones of 0 to 3, rising")


@dataclass(frozen=True, slots=True)
class Placed:
    """One object where it was drawn: centre and longer side, in pixels."""

    name: str
    tint: str
    x: float
    y: float
    side: int


def _smallest_hashes(candidates: list[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    candidates.sort(key=lambda pair: hashlib.sha256(" ".join(pair).encode()).digest())
    return frozenset(candidates[: round(len(candidates) * HELD_OUT)])


@cache
def held_out_pairs() -> frozenset[tuple[str, str]]:
    """Gives the pairs of kinds, sorted by name, that no training scene shows together."""
    return _smallest_hashes([(min(pair), max(pair)) for pair in combinations(KINDS, 2)])


@cache
def held_out_tints() -> frozenset[tuple[str, str]]:
    """Gives the (kind, tint) that no training scene shows; the natural tint is never held out."""
    return _smallest_hashes([(kind, tint) for kind in KINDS for tint in TINTS if tint != NATURAL])


def is_held_out(scene: Scene) -> bool:
    """Whether a scene shows a pair or a tint that is never trained on."""
    kinds = sorted(thing.kind for thing in scene.things)
    return any(pair in held_out_pairs() for pair in combinations(kinds, 2)) or any(
        (thing.kind, thing.tint) in held_out_tints() for thing in scene.things
    )


@cache
def _zipf() -> NDArray[np.float64]:
    weights = 1 / (np.arange(1, len(KINDS) + 1) + ZIPF_OFFSET)
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def sample_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """Draws a scene.

    Args:
        rng: Draws everything.
        held_out: False is a training scene: one object in 20%, two in 40%, three in 40%, kinds by Zipf's law, nothing
            held out. True is a scene to judge models by: three objects, kinds uniform, something held out.
    """
    while True:
        count = 3 if held_out else int(rng.choice((1, 2, 3), p=(0.2, 0.4, 0.4)))
        kinds = rng.choice(len(KINDS), size=count, replace=False, p=None if held_out else _zipf())
        quadrants = sorted(rng.choice(len(QUADRANTS), size=count, replace=False).tolist())
        tints = rng.integers(len(TINTS), size=count)
        sizes = rng.integers(len(SIZES), size=count)
        scene = Scene(
            tuple(
                Thing(KINDS[kind], tuple(TINTS)[tint], SIZES[size], quadrant)
                for kind, tint, size, quadrant in zip(kinds, tints, sizes, quadrants, strict=True)
            ),
            tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        )
        if is_held_out(scene) == held_out:
            return scene


def with_article(name: str) -> str:
    """Puts "a" or "an" in front of `name`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(scene: Scene, rng: np.random.Generator, *, free: float = 0.0) -> str:
    """Says what is where. Every caption is true of `scene` and names all of it, except perhaps the background.

    Args:
        scene: What to describe.
        rng: Chooses the phrasing, and the order of the things.
        free: Probability of a paraphrase: other words, perhaps words before it, perhaps without the background.
    """
    paraphrase = rng.random() < free

    def choose(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))] if paraphrase else options[0]

    parts = []
    for index in rng.permutation(len(scene.things)):
        thing = scene.things[index]
        words = [choose(SIZE_WORDS[thing.size]), *([] if thing.tint == NATURAL else [thing.tint]), thing.kind]
        phrase = choose(PLACE_TEMPLATES)
        parts.append(phrase.format(a=with_article(" ".join(words)), q=QUADRANTS[thing.quadrant]))
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    tail = choose(BACKGROUND_TEMPLATES)
    if paraphrase and rng.random() < 0.15:
        tail = ""
    return choose(PREFIXES) + text + tail.format(c=scene.background, ac=with_article(scene.background))


def place(scene: Scene, rng: np.random.Generator) -> tuple[Placed, ...]:
    """Chooses where the objects stand, on a grid of `CELL` pixels; none leaves its quadrant."""
    placed = []
    for thing in scene.things:
        side, quadrant = SIDES[thing.size], SIZE // 2
        cells = -(-side // CELL)
        x, y = CELL * (rng.integers(quadrant // CELL - cells + 1, size=2) + cells / 2)
        row, column = divmod(thing.quadrant, 2)
        placed.append(Placed(thing.kind, thing.tint, float(x + column * quadrant), float(y + row * quadrant), side))
    return tuple(placed)


@cache
def _glyph(name: str) -> Image.Image:
    """Reads one object from the font: RGBA with premultiplied alpha, cropped to what is visible."""
    font = ImageFont.truetype(str(FONT_PATH), GLYPH_POINTS)
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), (GLYPHS | DISTRACTORS)[name], font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox()).convert("RGBa")


@cache
def _sized_glyph(name: str, tint: str, side: int) -> NDArray[np.float32]:
    """Gives one object with its longer side `side` pixels: float32 [h, w, 4], premultiplied, 0..255 (alpha 0..1)."""
    glyph = _glyph(name)
    scale = side / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    pixels = np.asarray(glyph.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0), dtype=np.float32).copy()
    pixels[..., 3] /= 255
    return pixels if tint == NATURAL else tinted(pixels, TINTS[tint])


def tinted(pixels: NDArray[np.float32], tint: tuple[int, int, int]) -> NDArray[np.float32]:
    """Redraws an object in one hue, dark over `tint` to light by its luminance: float32 [h, w, 4], premultiplied."""
    alpha = pixels[..., 3:]
    straight = pixels[..., :3] / np.maximum(alpha, 1e-3)
    light = np.clip(straight @ np.array([0.299, 0.587, 0.114], np.float32) / 255, 0, 1)[..., None]
    hue = np.array(tint, np.float32)
    dark, bright = 0.15 * hue, 0.25 * hue + 0.75 * 255
    colour = np.where(light < 0.5, dark + 2 * light * (hue - dark), hue + (2 * light - 1) * (bright - hue))
    return np.concatenate([colour * alpha, alpha], axis=-1).astype(np.float32)


def draw(placed: tuple[Placed, ...], colour: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draws `placed` objects on a flat background: float32 [3] in 0..255 => uint8 [128, 128, 3]."""
    image = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    image[:] = colour
    for item in placed:
        glyph = _sized_glyph(item.name, item.tint, item.side)
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
