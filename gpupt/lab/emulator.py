"""The QEMU that runs the emulated host: Debian 13's, out of a baked tree, on any
distribution; no mount is needed, the tree's loader is told where the libraries lie."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from gpupt.edges.process import run
from gpupt.errors import Failed

LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
# The one that roll emulator builds goes before Debian's.
PROGRAMS = ("opt/gpupt/emulator/qemu-system-x86_64", "usr/bin/qemu-system-x86_64")
FIRMWARE = ("usr/share/qemu", "usr/share/seabios")
MODULES = "usr/lib/x86_64-linux-gnu/qemu"


@dataclass(frozen=True, slots=True)
class Emulator:
    """How QEMU is called, and what it needs in its environment."""

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]


def find_emulator(trees: Sequence[Path], *, preload: Path | None = None) -> Emulator:
    """QEMU out of ``trees`` (the layers of a baked image, topmost first).

    ``preload`` is loaded into it.  Raises Failed when the trees lack a part of it.
    """
    program = _first(trees, *PROGRAMS)
    firmware = [part for folder in FIRMWARE for part in ("-L", str(_first(trees, folder)))]
    libraries = [str(tree / LIBRARIES) for tree in trees if (tree / LIBRARIES).is_dir()]
    words = [str(_first(trees, LOADER)), "--library-path", ":".join(libraries)]
    if preload is not None:
        words += ["--preload", str(preload)]
    return Emulator(
        (*words, str(program), *firmware),
        (("QEMU_MODULE_DIR", str(_first(trees, MODULES))),),
    )


def build_disguises(folder: Path) -> Path:
    """fakepci.so, compiled into ``folder`` unless it is there; raises Failed without a
    compiler."""
    source = files("gpupt.lab").joinpath("fakepci.c").read_bytes()
    library = folder / f"fakepci-{hashlib.sha256(source).hexdigest()[:12]}.so"
    if library.is_file():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Failed(
            "the emulated host's cards need a C compiler, and there is none",
            remedy="apt-get install gcc libc6-dev",
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "fakepci.c"
    text.write_bytes(source)
    half = library.with_name(f".{library.name}.{os.getpid()}")
    run([compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", half, text], deadline=120)
    half.replace(library)
    return library


def _first(trees: Sequence[Path], *inside: str) -> Path:
    """The first of those paths that a tree has; raises Failed when none has any."""
    for path in inside:
        for tree in trees:
            if (tree / path).exists():
                return tree / path
    raise Failed(
        f"the baked trees have no /{inside[-1]}",
        details=tuple(str(tree) for tree in trees),
        remedy="build the image of the roll that has QEMU: gpupt image build gpupt",
    )
