#!/usr/bin/env python3
"""Reading a host in one process, against the floor: the bare reads of the same files.

The floor opens, reads and closes exactly the files that gpupt's reading opened (found by an
audit hook), and follows as many links; what is above it is parsing and values, and on a tree
that is not the live machine's, the care that no link leads out of it.  As root each tree is
also read as ``/``, as the live machine is, by a child that has it for its root.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from list import make_tree
from timing import machine

from gpupt.edges import critical  # noqa: F401  imported before a child loses sight of it
from gpupt.edges.sysfs import read_host

SIZES = (64, 512, 4096, 8192)
GOAL = 20  # µs a function, with 8 GPUs in the machine
DEVICES = "sys/bus/pci/devices"

opened: list[str] = []
listening = False


def note_open(event: str, arguments: tuple[object, ...]) -> None:
    # A name alone is one that is read from the folder stood in: it is made whole again below.
    if listening and event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])


def best(work: Callable[[], object], *, repeats: int) -> float:
    """Seconds of the quickest of several runs: what the machine can do undisturbed."""
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def best_as_root(tree: Path, *, whole: bool, repeats: int) -> float | None:
    """The same of reading the tree as ``/``; None where this may not be done."""
    if os.geteuid() != 0:
        return None
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.chroot(tree)
            took = best(lambda: read_host(Path("/"), whole=whole), repeats=repeats)
            os.write(into, struct.pack("d", took))
        finally:
            os._exit(0)
    os.close(into)
    os.waitpid(child, 0)
    said = os.read(out, 8)
    os.close(out)
    return struct.unpack("d", said)[0] if len(said) == 8 else None


def files_read(tree: Path, *, whole: bool) -> list[str]:
    """The files that a reading opens, in its order."""
    global listening
    opened.clear()
    listening = True
    read_host(tree, whole=whole)
    listening = False
    files, here = [], ""
    for name in opened:
        if "/" not in name:
            files.append(f"{here}/{name}")
        elif Path(name).is_dir():
            here = name
        else:
            files.append(name)
    return [path for path in files if Path(path).is_file()]


def read_bare(files: list[str], links: list[str]) -> None:
    for path in files:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.read(number, 4096)
        os.close(number)
    for path in links:
        os.readlink(path)


def tell(tree: Path, size: int, *, what: str, whole: bool, goal: str, repeats: int) -> None:
    """Print what reading a tree took, for each function and against the floor."""
    files = files_read(tree, whole=whole)
    devices = (tree / DEVICES).iterdir()
    links = [str(d / name) for d in devices for name in ("driver", "iommu_group")]
    ours = best(lambda: read_host(tree, whole=whole), repeats=repeats)
    floor = best(lambda: read_bare(files, links), repeats=repeats)
    live = best_as_root(tree, whole=whole, repeats=repeats)
    each = 1e6 / size
    as_root = f"{live * each:6.1f} µs" if live is not None else "unknown (not root)"
    print(
        f"{size:5} functions, {what:<24} {1000 * ours:8.1f} ms, {ours * each:6.1f} µs a function, "
        f"as /: {as_root};  bare reads of {len(files)} files {floor * each:6.1f} µs, "
        f"ratio {ours / floor:4.2f} ×   (goal: {goal})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    asked = parser.parse_args()
    print(machine())
    sys.addaudithook(note_open)
    # Like sysfs, in memory.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for size in asked.sizes:
        repeats = max(3, asked.repeats * 512 // max(size, 512))
        for gpus, what in ((8, "8 GPUs in full"), (None, "a quarter GPUs, in full")):
            with tempfile.TemporaryDirectory(prefix="gpupt-bench-", dir=memory) as folder:
                tree = make_tree(Path(folder), size, gpus=gpus)
                goal = f"at most {GOAL} µs" if gpus else "none set"
                tell(tree, size, what=what, whole=False, goal=goal, repeats=repeats)
                if gpus:
                    tell(tree, size, what="all of them in full", whole=True, goal="none set",
                         repeats=repeats)  # fmt: skip


if __name__ == "__main__":
    main()
