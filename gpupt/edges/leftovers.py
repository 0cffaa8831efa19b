"""Images and layers that nothing leads to any more and nothing stands on."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from gpupt.edges.images import RECORD, images_folder, layers_folder
from gpupt.edges.process import run
from gpupt.errors import Failed

_QCOW2 = b"QFI\xfb"


@dataclass(frozen=True, slots=True)
class Leftover:
    """A folder that can go; ``kind`` is image or layer, ``size`` in bytes on the disk."""

    kind: str
    digest: str
    path: Path
    size: int


def find_leftovers(state: Path, *, keep: frozenset[str]) -> tuple[Leftover, ...]:
    """Images and layers whose digest is not in ``keep`` and that are not in use.

    In use is an image that a disk of a cluster or of the lab stands on, or that a record
    of theirs names, and a layer that a running program was started from.  Raises Failed
    where the guests' folders may not be read: what is in use would not be known.
    """
    for kind in ("clusters", "lab"):
        if (state / kind).is_dir() and not os.access(state / kind, os.R_OK | os.X_OK):
            raise Failed(
                f"{state / kind} cannot be read: which images are in use is not known",
                remedy="run gpupt as root",
            )
    used = _named_by_guests(state)
    running = _command_lines()
    found = []
    for kind, folder in (("image", images_folder(state)), ("layer", layers_folder(state))):
        for path in sorted(folder.glob("[!.]*/")):
            if path.name in keep or path.name in used:
                continue
            if kind == "layer" and str(path).encode() in running:
                continue
            found.append(Leftover(kind, path.name, path, _size(path)))
    return tuple(found)


def remove_leftover(leftover: Leftover) -> None:
    """Remove it, an image's record first, so that half an image is never taken for whole."""
    (leftover.path / RECORD).unlink(missing_ok=True)
    shutil.rmtree(leftover.path)


def backing_file(disk: Path) -> str | None:
    """The file that a qcow2 overlay stands on, as its header names it (QEMU:
    docs/interop/qcow2.txt); None for what is no overlay."""
    with disk.open("rb") as file:
        header = file.read(20)
        if len(header) < 20 or header[:4] != _QCOW2:
            return None
        offset = int.from_bytes(header[8:16], "big")
        size = int.from_bytes(header[16:20], "big")
        if not offset:
            return None
        file.seek(offset)
        return file.read(size).decode("utf-8", errors="replace")


def _named_by_guests(state: Path) -> frozenset[str]:
    """Digests of images that clusters' and labs' disks or records name."""
    known = [path.name for path in images_folder(state).glob("[!.]*/")]
    texts = []
    for kind in ("clusters", "lab"):
        for path in (state / kind).rglob("*"):
            if path.suffix == ".qcow2" and path.is_file():
                texts.append(backing_file(path) or "")
            elif path.suffix in {".json", ".xml"} and path.is_file():
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return frozenset(digest for digest in known if any(digest in text for text in texts))


def _command_lines() -> bytes:
    """Every running program's words, in one."""
    words = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words.append(path.read_bytes())
        except OSError:
            continue  # it has ended since
    return b"\n".join(words)


def _size(folder: Path) -> int:
    done = run(["du", "-s", "--block-size=1", folder], deadline=600)
    return int(done.stdout.split()[0])
