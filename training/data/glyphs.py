"""Makes the font of the scenes: a subset of Noto Color Emoji with just our objects, under another name.

Only the committed font is read at run time: neither the source font nor a system package is needed.

Make the file again with::

    python -m training.data.glyphs /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf

The source is the Debian package fonts-noto-color-emoji, SIL Open Font License 1.1; the licence is beside the
subset.
"""

from __future__ import annotations

from pathlib import Path

import click
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

ASSETS = Path(__file__).parent / "assets"
FONT_PATH = ASSETS / "SceneGlyphs.ttf"
FONT_NAME = "Hybrid SD Scene Glyphs"

GLYPHS: dict[str, str] = {
    "fox": "\U0001f98a",
    "cat": "\U0001f431",
    "car": "\U0001f697",
    "apple": "\U0001f34e",
    "tree": "\U0001f332",
    "rocket": "\U0001f680",
    "frog": "\U0001f438",
    "pizza": "\U0001f355",
    "robot": "\U0001f916",
    "ball": "\u26bd",
    "panda": "\U0001f43c",
    "banana": "\U0001f34c",
    "guitar": "\U0001f3b8",
    "mushroom": "\U0001f344",
    "penguin": "\U0001f427",
    "crown": "\U0001f451",
    "donut": "\U0001f369",
    "cactus": "\U0001f335",
    "pig": "\U0001f437",
    "umbrella": "\u2614",
    "burger": "\U0001f354",
    "sunflower": "\U0001f33b",
    "ghost": "\U0001f47b",
    "strawberry": "\U0001f353",
    "dog": "\U0001f436",
    "house": "\U0001f3e0",
    "bus": "\U0001f68c",
    "fish": "\U0001f41f",
    "carrot": "\U0001f955",
    "owl": "\U0001f989",
    "bicycle": "\U0001f6b2",
    "cake": "\U0001f370",
    "lion": "\U0001f981",
    "key": "\U0001f511",
    "watermelon": "\U0001f349",
    "butterfly": "\U0001f98b",
    "train": "\U0001f686",
    "bell": "\U0001f514",
    "octopus": "\U0001f419",
    "lemon": "\U0001f34b",
    "airplane": "\u2708",
    "snail": "\U0001f40c",
    "hat": "\U0001f3a9",
    "cherry": "\U0001f352",
    "drum": "\U0001f941",
    "turtle": "\U0001f422",
    "chair": "\U0001fa91",
    "bear": "\U0001f43b",
    "grapes": "\U0001f347",
    "clock": "\u23f0",
    "elephant": "\U0001f418",
    "corn": "\U0001f33d",
    "camera": "\U0001f4f7",
    "bee": "\U0001f41d",
    "anchor": "\u2693",
    "tomato": "\U0001f345",
    "trumpet": "\U0001f3ba",
    "whale": "\U0001f433",
    "hammer": "\U0001f528",
    "pear": "\U0001f350",
}
"""The kinds of objects, the most frequent in training first."""
DISTRACTORS: dict[str, str] = {
    "alien": "\U0001f47d",
    "skull": "\U0001f480",
    "rose": "\U0001f339",
    "tractor": "\U0001f69c",
    "pineapple": "\U0001f34d",
    "rabbit": "\U0001f430",
    "boot": "\U0001f462",
    "violin": "\U0001f3bb",
    "sheep": "\U0001f411",
    "lobster": "\U0001f99e",
    "candle": "\U0001f56f",
    "shield": "\U0001f6e1",
}
"""Objects that no caption names and no scene shows: the judge learns on them what "neither" is."""


def subset_font(source: Path, target: Path) -> None:
    """Writes the glyphs of `GLYPHS` from `source` to `target`, renamed to `FONT_NAME`."""
    font = TTFont(source)
    options = Options()
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "DSIG"]
    options.notdef_outline = True
    options.name_IDs = ["*"]
    options.recalc_timestamp = False
    subsetter = Subsetter(options=options)
    subsetter.populate(unicodes=[ord(char) for char in (GLYPHS | DISTRACTORS).values()])
    subsetter.subset(font)
    names = font["name"]
    for record in list(names.names):
        if record.nameID in (1, 3, 4, 16):
            record.string = FONT_NAME
        elif record.nameID == 6:
            record.string = FONT_NAME.replace(" ", "")
        elif record.nameID == 7:  # the trademark notice speaks of the source's name
            names.names.remove(record)
    target.parent.mkdir(parents=True, exist_ok=True)
    font.save(target)


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", "target", type=click.Path(path_type=Path), default=FONT_PATH, show_default=True)
def main(source: Path, target: Path) -> None:
    """Subset SOURCE (Noto Color Emoji, bitmap build) to the objects of the scenes."""
    subset_font(source, target)
    click.echo(f"{target}: {len(GLYPHS | DISTRACTORS)} glyphs, {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
