"""Where sheets come from, by the number of their specimen: drawn, or read from a collection."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from herbarium.images import Sheet, Unreadable, decode
from herbarium.sheets import DEFAULT_HEIGHT, draw_sheet, draw_specimens

LABELS = {"0": 0, "unstained": 0, "1": 1, "stained": 1}


class Source(Protocol):
    """Gives the sheets of specimens by number, and the bytes of one by its names."""

    @property
    def synthetic(self) -> bool: ...

    def sheets(self, specimens: Sequence[int]) -> Iterator[Sheet]: ...

    def find(self, specimen: str, sheet: str) -> bytes: ...


class BadCollection(Exception):
    """The list of images contradicts itself or cannot be used; nothing was done."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Synthetic sheets of any number of specimens."""

    seed: int
    height: int = DEFAULT_HEIGHT

    @property
    def synthetic(self) -> bool:
        return True

    def sheets(self, specimens: Sequence[int]) -> Iterator[Sheet]:
        return draw_specimens(specimens, seed=self.seed, height=self.height)

    def find(self, specimen: str, sheet: str) -> bytes:
        return draw_sheet(int(specimen), int(sheet), seed=self.seed, height=self.height).jpeg


@dataclass(frozen=True, slots=True)
class Entry:
    """An image of a collection, its path relative to the collection's folder."""

    path: str
    label: int


@dataclass(frozen=True, slots=True)
class Collection:
    """Images in a folder that every node sees, grouped by specimen.

    `unreadable` are the paths left out with why; `duplicates` those whose bytes had been
    seen before.
    """

    folder: str
    names: tuple[str, ...]
    entries: tuple[tuple[Entry, ...], ...]
    unreadable: tuple[tuple[str, str], ...] = ()
    duplicates: tuple[str, ...] = ()

    @property
    def synthetic(self) -> bool:
        return False

    def sheets(self, specimens: Sequence[int]) -> Iterator[Sheet]:
        for number in specimens:
            for entry in self.entries[number]:
                encoded = Path(self.folder, entry.path).read_bytes()
                yield Sheet(self.names[number], entry.path, entry.label, encoded)

    def find(self, specimen: str, sheet: str) -> bytes:
        return Path(self.folder, sheet).read_bytes()


def read_collection(folder: Path, labels: Path, *, height: int) -> Collection:
    """The images that a CSV with the columns path, label and specimen names.

    A label is 0 or unstained, 1 or stained.  Each file is read once: an image that does not
    decode is left out and reported, one whose bytes came before is a duplicate.  Raises
    BadCollection for a missing column or file, an unknown label, and a path or an image
    that is in both classes.
    """
    kept: dict[str, list[Entry]] = {}
    seen: dict[str, tuple[int, str]] = {}
    classes: dict[str, int] = {}
    unreadable: list[tuple[str, str]] = []
    duplicates: list[str] = []
    for line, path, label, specimen in _rows(labels):
        if classes.setdefault(path, label) != label:
            raise BadCollection(f"{labels}:{line}: {path} is in both classes")
        try:
            encoded = (folder / path).read_bytes()
        except OSError as error:
            raise BadCollection(f"{labels}:{line}: {path}: {error.strerror}") from None
        digest = hashlib.sha256(encoded).hexdigest()
        if digest in seen:
            first_label, first = seen[digest]
            if first_label != label:
                raise BadCollection(
                    f"{labels}:{line}: {path} and {first} are the same image, in both classes"
                )
            duplicates.append(path)
            continue
        seen[digest] = (label, path)
        try:
            decode(encoded, height=height)
        except Unreadable as error:
            unreadable.append((path, str(error)))
            continue
        kept.setdefault(specimen, []).append(Entry(path, label))
    names = tuple(sorted(kept))
    return Collection(
        str(folder),
        names,
        tuple(tuple(kept[name]) for name in names),
        tuple(unreadable),
        tuple(duplicates),
    )


def _rows(labels: Path) -> Iterator[tuple[int, str, int, str]]:
    try:
        file = labels.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise BadCollection(f"{labels}: {error.strerror}") from None
    with file:
        table = csv.DictReader(file)
        missing = {"path", "label", "specimen"} - set(table.fieldnames or ())
        if missing:
            raise BadCollection(f"{labels}:1: no column {', '.join(sorted(missing))}")
        for row in table:
            given = (row["label"] or "").strip().lower()
            if given not in LABELS:
                raise BadCollection(
                    f"{labels}:{table.line_num}: label {given!r}; expected {', '.join(LABELS)}"
                )
            if not row["path"] or not row["specimen"]:
                raise BadCollection(f"{labels}:{table.line_num}: path or specimen is empty")
            yield table.line_num, row["path"], LABELS[given], row["specimen"]


@dataclass(frozen=True, slots=True)
class Split:
    """Numbers of the specimens to train on and to apply to: no specimen is in both."""

    train: tuple[int, ...]
    apply: tuple[int, ...]


def split_drawn(*, train: int, apply: int) -> Split:
    """Drawn specimens are independent of each other, so the first are as good as any."""
    return Split(tuple(range(train)), tuple(range(train, train + apply)))


def split_collection(collection: Collection, *, train_share: float, seed: int) -> Split:
    """A seeded shuffle of the specimens, cut once.  Raises BadCollection for an empty side."""
    count = len(collection.names)
    order = np.random.default_rng(seed).permutation(count).tolist()
    cut = round(count * train_share)
    if not 0 < cut < count:
        raise BadCollection(f"{count} specimens cannot be split {train_share:g} to train")
    return Split(tuple(sorted(order[:cut])), tuple(sorted(order[cut:])))
