"""Source task of the embedded model: images of letters (no digits) rendered from free fonts, in PNG folders.

White ink on black, warped, cropped, thresholded, averaged down to 8x8, enlarged to 32x32.

Fonts come from these Debian packages, by license:
  SIL OFL: fonts-averia-sans-gwf fonts-breip fonts-cantarell fonts-comfortaa fonts-comic-neue
    fonts-dancingscript fonts-dkg-handwriting fonts-ecolier-court fonts-humor-sans fonts-lato
    fonts-kaushanscript fonts-liberation2 fonts-lobstertwo fonts-quicksand fonts-tomsontalks
  Apache-2.0: fonts-open-sans fonts-roboto-unhinted
  Bitstream Vera: fonts-dejavu-core
  GPL with font exception: fonts-rufscript fonts-sjfonts

Usage: python -m benchmarks letters OUT FONT_DIR [FONT_DIR ...] [--seed 0] [--train 30000]
Writes OUT/{train,validation,test}/<class>/NNNN.png; each split has its own fonts.
"""

import argparse
import itertools
import json
import random
import string
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont
from PIL.Image import Resampling, Transform

FOLDED = "ckopsuvwxyz"  # upper and lower case are identical after cropping to the ink
CANVAS = 96  # side in pixels of the square canvas of a letter
GLYPH = 60  # height in pixels of the cropped letter on the canvas
CELLS = 3  # the warp moves the corners of a CELLS x CELLS mesh


def class_name(letter: str) -> str:
    """Returns the class of a letter; letters with identical shapes have the same class."""
    if letter.lower() in FOLDED:
        return f"both_{letter.lower()}"
    if letter in "Il":
        return "bar"
    return f"{'upper' if letter.isupper() else 'lower'}_{letter.lower()}"


def usable(path: Path) -> bool:
    """Whether a font renders all ASCII letters, with distinct shapes (up to 4 exceptions)."""
    try:
        font = ImageFont.truetype(str(path), 48)
        masks = {bytes(font.getmask(letter)) for letter in string.ascii_letters}
    except OSError:
        return False
    return len(masks) >= len(string.ascii_letters) - 4 and b"" not in masks


def find_fonts(folders: list[Path]) -> list[Path]:
    """Returns the usable .ttf and .otf files in the folders, sorted by file name."""
    files = {p.name: p for f in folders for p in sorted(f.rglob("*.[ot]tf"))}
    return [files[name] for name in sorted(files) if usable(files[name])]


def glyph(font: ImageFont.FreeTypeFont, letter: str, rng: random.Random) -> Image.Image:
    """Renders a letter, crops it to its ink and resizes it to a random box on the canvas."""
    left, top, right, bottom = font.getbbox(letter)
    ink = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(ink).text((4 - left, 4 - top), letter, fill=255, font=font)
    ink = ink.crop(ink.getbbox())
    height = GLYPH * rng.uniform(0.9, 1.1)
    width = ink.width * height / ink.height * rng.uniform(0.75, 1.25)
    ink = ink.resize((max(6, round(min(width, GLYPH))), round(height)), Resampling.BILINEAR)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(ink, ((CANVAS - ink.width) // 2, (CANVAS - ink.height) // 2))
    return canvas


def warp(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Shears, rotates and bends the canvas."""
    shear = rng.uniform(-0.3, 0.3)
    canvas = canvas.rotate(rng.gauss(0, 7), Resampling.BILINEAR)
    matrix = (1, shear, -shear * CANVAS / 2, 0, 1, 0)
    canvas = canvas.transform(canvas.size, Transform.AFFINE, matrix, Resampling.BILINEAR)
    step = CANVAS / CELLS
    side = range(CELLS + 1)
    knots = [[(x * step + rng.gauss(0, 4), y * step + rng.gauss(0, 4)) for x in side] for y in side]
    mesh = []
    for y, x in itertools.product(range(CELLS), repeat=2):
        box = tuple(round(k * step) for k in (x, y, x + 1, y + 1))
        corners = (knots[y][x], knots[y + 1][x], knots[y + 1][x + 1], knots[y][x + 1])
        mesh.append((box, tuple(itertools.chain(*corners))))
    return canvas.transform(canvas.size, Transform.MESH, mesh, Resampling.BILINEAR)


def weigh(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Dilates or erodes the strokes until the amount of ink is that of handwriting."""
    low = rng.uniform(0.18, 0.34) * GLYPH**2
    for _ in range(4):
        ink = sum(canvas.histogram()[128:])
        if ink < low:
            canvas = canvas.filter(ImageFilter.MaxFilter(3))
        elif ink > low + 0.12 * GLYPH**2:
            canvas = canvas.filter(ImageFilter.MinFilter(3))
    return canvas


def scan(canvas: Image.Image, rng: random.Random) -> Image.Image:
    """Crops to the ink, samples it to 8x8 pixels as in the digits dataset, and resizes to 32x32."""
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))
    canvas = canvas.point(lambda value: 255 * (value > 96))
    ink = canvas.crop(canvas.getbbox() or (0, 0, CANVAS, CANVAS))
    height = rng.choice((30, 31, 32, 32, 32))
    width = max(3, min(round(ink.width * height / ink.height), rng.randint(24, 32)))
    page = Image.new("L", (32, 32))
    spot = ((32 - width) // 2 + rng.randint(-2, 2), (32 - height + 1) // 2)
    page.paste(ink.resize((width, height), Resampling.BILINEAR), spot)
    page = page.point(lambda value: 255 * (value > 127))
    return page.resize((8, 8), Resampling.BOX).resize((32, 32), Resampling.BICUBIC)


def write_split(out: Path, fonts: list[Path], count: int, rng: random.Random) -> None:
    """Writes a split with balanced classes and fonts sampled at random by family."""
    families: dict[Path, list[ImageFont.FreeTypeFont]] = {}
    for path in fonts:
        families.setdefault(path.parent, []).append(ImageFont.truetype(str(path), 80))
    styles = list(families.values())  # families have equal probability, independent of their number of styles
    classes: dict[str, list[str]] = {}
    for letter in string.ascii_letters:
        classes.setdefault(class_name(letter), []).append(letter)
    for name, letters in sorted(classes.items()):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count // len(classes)):
            canvas = glyph(rng.choice(rng.choice(styles)), rng.choice(letters), rng)
            scan(weigh(warp(canvas, rng), rng), rng).save(folder / f"{index:04d}.png")


def main(argv: list[str]) -> None:
    """Writes the three splits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("fonts", type=Path, nargs="+", help="folders with fonts, searched recursively")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=30000, help="approximate number of training images")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    fonts = find_fonts(args.fonts)
    rng.shuffle(fonts)
    tenth = max(1, len(fonts) // 10)
    write_split(args.out / "validation", fonts[:tenth], args.train // 10, rng)
    write_split(args.out / "test", fonts[tenth : 2 * tenth], args.train // 10, rng)
    write_split(args.out / "train", fonts[2 * tenth :], args.train, rng)
    print(json.dumps({"fonts": len(fonts), "train": args.train}))
