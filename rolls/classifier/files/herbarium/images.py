"""Sheets as bytes, and bytes as pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Pixels = np.ndarray
"""uint8, (height, width, 3) or (sheets, height, width, 3)."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """One image of a specimen: its encoded bytes, and 1 when it is stained."""

    specimen: str
    sheet: str
    label: int
    jpeg: bytes


class Unreadable(Exception):
    """The bytes are no image, or only a part of one."""


def width_for(height: int) -> int:
    """The width at which a sheet of that height is looked at: three quarters of it."""
    return height * 3 // 4


def decode(encoded: bytes, *, height: int) -> Pixels:
    """An image as RGB pixels of that height; raises Unreadable.

    A JPEG is scaled down by 2, 4 or 8 while it is decoded (Pillow's draft mode), which
    leaves most of the work undone; what remains is an average over boxes.
    """
    size = (width_for(height), height)
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft("RGB", size)
            image.load()
            plain = image if image.mode == "RGB" else image.convert("RGB")
            if plain.size != size:
                plain = plain.resize(size, Image.Resampling.BOX)
            return np.asarray(plain)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Unreadable(str(error)) from None


def decode_all(sheets: Sequence[Sheet], *, height: int) -> tuple[Pixels, list[str | None]]:
    """Every sheet's pixels, and for each None or why it could not be read (then it is black)."""
    pixels = np.zeros((len(sheets), height, width_for(height), 3), np.uint8)
    problems: list[str | None] = [None] * len(sheets)
    for at, sheet in enumerate(sheets):
        try:
            pixels[at] = decode(sheet.jpeg, height=height)
        except Unreadable as error:
            problems[at] = str(error)
    return pixels, problems


def mean_colours(pixels: Pixels) -> np.ndarray:
    """The mean red, green and blue of each sheet, 0 to 255, float32 (sheets, 3)."""
    count = pixels.shape[1] * pixels.shape[2]
    sums = pixels.sum(axis=(1, 2), dtype=np.uint32)
    return (sums / count).astype(np.float32)
