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
    "frog": "\U0001f438",
    "panda": "\U0001f43c",
    "pig": "\U0001f437",
    "penguin": "\U0001f427",
    "robot": "\U0001f916",
    "ghost": "\U0001f47b",
    "apple": "\U0001f34e",
    "banana": "\U0001f34c",
    "strawberry": "\U0001f353",
    "donut": "\U0001f369",
    "pizza": "\U0001f355",
    "burger": "\U0001f354",
    "cactus": "\U0001f335",
    "tree": "\U0001f332",
    "mushroom": "\U0001f344",
    "sunflower": "\U0001f33b",
    "rocket": "\U0001f680",
    "car": "\U0001f697",
    "guitar": "\U0001f3b8",
    "ball": "\u26bd",
    "crown": "\U0001f451",
    "umbrella": "\u2614",
}


def subset_font(source: Path, target: Path) -> None:
    """Writes the glyphs of `GLYPHS` from `source` to `target`, renamed to `FONT_NAME`."""
    font = TTFont(source)
    options = Options()
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "DSIG"]
    options.notdef_outline = True
    options.name_IDs = ["*"]
    options.recalc_timestamp = False
    subsetter = Subsetter(options=options)
    subsetter.populate(unicodes=[ord(char) for char in GLYPHS.values()])
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
    click.echo(f"{target}: {len(GLYPHS)} glyphs, {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
