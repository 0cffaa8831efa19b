"""The images kept under the state folder: read, recorded, pruned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from gpupt.errors import Failed
from gpupt.model.roll import Image, Layer

RECORD = "image.json"


def images_folder(state: Path) -> Path:
    return state / "images"


def layers_folder(state: Path) -> Path:
    return state / "layers"


def read_images(state: Path) -> tuple[Image, ...]:
    """Every whole image, the newest first; raises Failed for a record that cannot be read."""
    records = images_folder(state).glob(f"*/{RECORD}")
    newest = sorted(records, key=lambda path: path.stat().st_mtime, reverse=True)
    return tuple(read_image(path.parent) for path in newest)


def layer_trees(state: Path, layers: Sequence[Layer]) -> tuple[Path, ...]:
    """The trees of those layers (given base first), the topmost first; raises Failed when
    one has not been baked."""
    trees = tuple(layers_folder(state) / layer.digest / "root" for layer in reversed(layers))
    for tree, layer in zip(trees, reversed(layers), strict=True):
        if not tree.is_dir():
            raise Failed(
                f"the layer of the roll {layer.roll} has not been baked",
                details=f"looked for {tree}",
                remedy=f"gpupt image build {layers[-1].roll}",
            )
    return trees


def find_image(state: Path, digest: str) -> Image | None:
    """The image of that digest, or None when it is not there whole."""
    folder = images_folder(state) / digest
    if not (folder / RECORD).is_file():
        return None
    image = read_image(folder)
    return image if Path(image.disk).exists() else None


def read_image(folder: Path) -> Image:
    """The image recorded in that folder; relative paths are the folder's.  Raises Failed."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Image(
            digest=str(record["digest"]),
            rolls=tuple(str(roll) for roll in record["rolls"]),
            disk=PurePosixPath(folder / str(record["disk"])),
            format=str(record["format"]),
            virtual_size=int(record["virtual_size"]),
            kernel=PurePosixPath(folder / str(record["kernel"])),
            initrd=PurePosixPath(folder / str(record["initrd"])),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Failed(
            f"the record of an image cannot be read: {path}",
            details=f"{type(error).__name__}: {error}",
            remedy=f"remove {folder} and build the image again",
        ) from None


def write_image(
    folder: Path,
    *,
    digest: str,
    rolls: Iterable[str],
    disk: str,
    format: str,
    virtual_size: int,
    kernel: str = "vmlinuz",
    initrd: str = "initrd",
) -> Image:
    """Record an image whose files lie in ``folder``; ``disk`` may be an absolute path, such
    as a block device with format raw."""
    record: dict[str, Any] = {
        "schema": 1,
        "digest": digest,
        "rolls": list(rolls),
        "disk": disk,
        "format": format,
        "virtual_size": virtual_size,
        "kernel": kernel,
        "initrd": initrd,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    half = folder / f".{RECORD}"
    half.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    half.replace(folder / RECORD)
    return read_image(folder)


def image_size(image: Image) -> int:
    """Bytes the image takes on the disk: its disk, kernel and initrd; 0 for a block device."""
    files = (Path(image.disk), Path(image.kernel), Path(image.initrd))
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())
