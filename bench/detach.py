#!/usr/bin/env python3
"""Detach and attach of 1, 8 and 64 GPUs, against the floor: the bare writes of the same words.

The machine is a tree of files (in memory where there is a place for it), which reacts to
writes as the kernel does; the state, whose journal is synced to disk at every step, is beside
it in a folder on disk.  Each card has a sound function, and an IOMMU group for both.  The
floor writes the same words to the same files in the same order, each in a child as gpupt does,
and once more in this process; the tree's reaction is in all of them, and resets and drivers'
own time in none.  What is above the floor is reading, deciding, the journal and verifying.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from timing import HERE, machine, ratio, time_command

sys.path.insert(0, str(HERE / "tests"))

from fakekernel import FakeKernel, Function, plant

from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.edges.holders import mapped_nodes, open_nodes, processes
from gpupt.edges.kernel import Kernel
from gpupt.edges.tree import Reader

SIZES = (1, 8, 64)
DRIVERS = {"nouveau": ["10de:2330"], "snd_hda_intel": ["10de:22ba"], "vfio-pci": []}
Word = tuple[str, str]


class WritingKernel(FakeKernel):
    """A fake kernel that is written to as the real one is: each write in a child.

    With ``apart`` false the writes are made in this process."""

    apart = True

    def write(self, path: PurePosixPath, text: str, *, deadline: float) -> None:
        self.writes.append((str(path), text))
        if self.apart:
            Kernel.write(self, path, text, deadline=deadline)
        else:
            number = os.open(self.root / path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            os.write(number, text.encode())
            os.close(number)
        word = text.strip()
        address = path.parts[4] if path.name == "driver_override" else word
        if self.react(path.name, address, word=word, driver=path.parent.name):
            raise SystemExit(f"the tree refused {word!r} in {path}")


def kernel_of(root: Path) -> WritingKernel:
    return WritingKernel(root, drivers=DRIVERS)


def make_host(root: Path, gpus: int) -> WritingKernel:
    """A machine with so many GPUs, each with its sound function in its group.

    They are on nouveau: no NVML is asked for their health."""
    functions = []
    for number in range(gpus):
        slot = f"{number // 255:04x}:{number % 255 + 1:02x}:00"
        group = number + 1
        functions += [
            Function(f"{slot}.0", "10de:2330", 0x030200, "nouveau", group=group),
            Function(f"{slot}.1", "10de:22ba", 0x040300, "snd_hda_intel", group=group),
        ]
    plant(root, functions, drivers=list(DRIVERS))
    return kernel_of(root)


def type_at(kernel: WritingKernel, state: Path, *words: str) -> None:
    """Type words at gpupt, in this process, and let it say what it likes."""
    settings = Settings(root=kernel.root, state=state, kernel=lambda _: kernel)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.main(list(words), prog_name="gpupt", obj=settings, standalone_mode=False)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write_bare(kernel: WritingKernel, words: Sequence[Word], *, apart: bool) -> None:
    """The floor: nothing but the writes."""
    kernel.apart = apart
    for path, text in words:
        kernel.write(PurePosixPath(path), text, deadline=10)
    kernel.apart = True


def time_bare(
    root: Path, gpus: int, *, before: list[Word], words: list[Word], apart: bool
) -> float:
    """Seconds of bare writes to a fresh machine, after those that lead up to them."""
    kernel = make_host(root, gpus)
    write_bare(kernel, before, apart=False)
    return seconds(lambda: write_bare(kernel, words, apart=apart))


def there_and_back(gpus: int, *, memory: Path | None, disk: Path) -> dict[str, float]:
    """Seconds of each way, and of the same writes bare; and how many writes each way made."""
    found: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="gpupt-bench-", dir=memory) as tree,
        tempfile.TemporaryDirectory(prefix="gpupt-bench-", dir=disk) as state,
    ):
        kernel = make_host(Path(tree, "host"), gpus)
        made: dict[str, list[Word]] = {}
        for name in ("detach", "detach again", "attach", "attach again"):
            kernel.writes = made[name] = []
            began = time.perf_counter()
            type_at(kernel, Path(state), name.split()[0], "--all", "--yes")
            found[name] = time.perf_counter() - began
            found[f"{name}: writes"] = len(made[name])
        for verb, before in (("detach", []), ("attach", made["detach"])):
            for how in ("apart", "within"):
                found[f"{verb}: {how}"] = time_bare(
                    Path(tree, f"{verb} {how}"),
                    gpus,
                    before=before,
                    words=made[verb],
                    apart=how == "apart",
                )
    return found


def time_cold(gpus: int, *, memory: Path | None, disk: Path, repeats: int) -> None:
    """Whole commands, each a new process: the first detach, and one with nothing to do."""
    with (
        tempfile.TemporaryDirectory(prefix="gpupt-bench-", dir=memory) as tree,
        tempfile.TemporaryDirectory(prefix="gpupt-bench-", dir=disk) as state,
    ):
        root = Path(tree, "host")
        make_host(root, gpus)
        words = [sys.executable, __file__, "--type-at", root, state]
        first = []
        for _ in range(repeats):
            first.append(time_once([*words, "detach", "--all", "--yes"]))
            time_once([*words, "attach", "--all", "--yes"])
        time_once([*words, "detach", "--all", "--yes"])
        print(f"gpupt detach of {gpus} GPUs, cold: best {1000 * min(first):.1f} ms")
        again = time_command(
            f"gpupt detach of {gpus} GPUs again, cold",
            [*words, "detach", "--all", "--yes"],
            repeats=repeats,
        )
        print(again)
        ratio("nothing to do, cold / 200 ms", again.best / 0.2, target="at most 1")


def time_once(words: Sequence[str | Path]) -> float:
    argv = [str(word) for word in words]
    return seconds(lambda: subprocess.run(argv, check=True, capture_output=True))


def time_holders(repeats: int) -> None:
    """What a real host's processes cost beside: the trees have none."""
    reader = Reader(Path("/"))
    pids = processes(reader)
    opened = min(seconds(lambda: [open_nodes(reader, p) for p in pids]) for _ in range(repeats))
    mapped = min(seconds(lambda: [mapped_nodes(reader, p) for p in pids]) for _ in range(repeats))
    print(
        f"beside it, on this machine: who holds a GPU among {len(pids)} processes "
        f"{1000 * opened:.1f} ms, and who only maps one {1000 * mapped:.1f} ms"
    )


def tell(gpus: int, best: dict[str, float]) -> None:
    """Print the quickest of several rounds, and what is above the floor for each GPU."""
    print(f"\n{gpus} GPUs, each with its sound function")
    for verb in ("detach", "attach"):
        apart, within = best[f"{verb}: apart"], best[f"{verb}: within"]
        print(
            f"{verb:<13} {1000 * best[verb]:8.1f} ms, {best[f'{verb}: writes']:.0f} writes; "
            f"the same in children {1000 * apart:.1f} ms, in this process {1000 * within:.1f} ms"
        )
        for name, floor in (("in children", apart), ("in this process", within)):
            above = 1000 * (best[verb] - floor) / gpus
            print(f"above  bare writes {name}, a GPU {above:26.1f} ms   (goal: at most 50 ms)")
        again = f"{verb} again"
        print(
            f"{again:<13} {1000 * best[again]:8.1f} ms, {best[f'{again}: writes']:.0f} writes   "
            "(goal: 0 writes)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gpus", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--type-at", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.type_at:
        root, state, *words = asked.type_at
        type_at(kernel_of(Path(root)), Path(state), *words)
        return
    print(machine())
    shared = Path("/dev/shm")
    where = {"memory": shared if os.access(shared, os.W_OK) else None, "disk": Path("/var/tmp")}
    for gpus in asked.gpus:
        rounds = [there_and_back(gpus, **where) for _ in range(asked.repeats)]
        tell(gpus, {key: min(each[key] for each in rounds) for key in rounds[0]})
    print()
    time_cold(asked.gpus[0], repeats=asked.repeats, **where)
    time_holders(asked.repeats)


if __name__ == "__main__":
    main()
