#!/usr/bin/env python3
"""Reading a host in one process, against the floor: the bare reads of the same files.

The floor opens, reads and closes exactly the files that gpupt's reading opened (found by an
audit hook), and follows as many links; what is above it is parsing and values.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from list import SIZES, make_tree
from timing import machine, ratio

from gpupt.edges.sysfs import read_host

opened: list[str] = []
listening = False


def note_open(event: str, arguments: tuple[object, ...]) -> None:
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


def read_bare(files: list[str], links: list[str]) -> None:
    for path in files:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.read(number, 4096)
        os.close(number)
    for path in links:
        os.readlink(path)


def main() -> None:
    global listening
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    print(machine())
    sys.addaudithook(note_open)
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="gpupt-bench-") as folder:
            tree = make_tree(Path(folder), size)
            for whole in (False, True):
                opened.clear()
                listening = True
                read_host(tree, whole=whole)
                listening = False
                files = [path for path in opened if Path(path).is_file()]
                devices = (tree / "sys/bus/pci/devices").iterdir()
                links = [str(d / name) for d in devices for name in ("driver", "iommu_group")]
                ours = best(lambda t=tree, w=whole: read_host(t, whole=w), repeats=repeats)
                floor = best(lambda f=files, k=links: read_bare(f, k), repeats=repeats)
                what = "all in full" if whole else "GPUs in full"
                print(
                    f"{size:5} functions, {what:<12} {1000 * ours:8.1f} ms, "
                    f"{len(files)} files; bare reads {1000 * floor:.1f} ms"
                )
                ratio("read_host / bare reads", ours / floor, target="none set")


if __name__ == "__main__":
    main()
