"""A folder with a root file system, made ready to run programs in; needs root.

Runs only in a mount namespace of its own (``unshare --mount``), so that the kernel takes
every mount away when the bake ends, however it ends."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gpupt.edges.process import run

# Where the bake's own things appear in the tree; /run is a tmpfs there, nothing stays.
BENCH = "/run/bake"
_DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
}
_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}


@contextmanager
def overlay(lower: Sequence[Path], *, upper: Path, work: Path, merged: Path) -> Iterator[Path]:
    """Mount ``lower`` (topmost first) with writes going to ``upper``."""
    options = (
        f"lowerdir={':'.join(str(path) for path in lower)},upperdir={upper},workdir={work},"
        "redirect_dir=off,metacopy=off,index=off"
    )
    with mount("overlay", merged, kind="overlay", options=options):
        yield merged


@contextmanager
def overlay_readonly(lower: Sequence[Path], *, merged: Path) -> Iterator[Path]:
    """Mount ``lower`` (topmost first, two at least) for reading."""
    options = f"ro,lowerdir={':'.join(str(path) for path in lower)}"
    with mount("overlay", merged, kind="overlay", options=options):
        yield merged


@contextmanager
def mount(source: str | Path, target: Path, *, kind: str, options: str = "") -> Iterator[None]:
    """Mount, and unmount afterwards."""
    words = ["mount", "-t", kind, *(["-o", options] if options else []), source, target]
    run(words, deadline=30)
    try:
        yield
    finally:
        run(["umount", "--lazy", target], deadline=30)


@contextmanager
def bind(source: Path, target: Path, *, read_only: bool = False) -> Iterator[None]:
    """Show a file or folder at ``target``, which is made if it is missing."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    run(["mount", "--bind", source, target], deadline=30)
    try:
        if read_only:
            run(["mount", "-o", "remount,bind,ro", target], deadline=30)
        yield
    finally:
        run(["umount", "--lazy", target], deadline=30)


@contextmanager
def ready(tree: Path) -> Iterator[None]:
    """Give the tree /proc, /sys (for reading), a small /dev, /run, /tmp, the machine's name
    resolution, and a policy that starts no service."""
    with ExitStack() as stack:
        stack.enter_context(mount("proc", tree / "proc", kind="proc"))
        stack.enter_context(mount("sysfs", tree / "sys", kind="sysfs", options="ro"))
        stack.enter_context(mount("tmpfs", tree / "dev", kind="tmpfs", options="mode=755"))
        _fill_dev(tree / "dev")
        stack.enter_context(
            mount(
                "devpts",
                tree / "dev/pts",
                kind="devpts",
                options="newinstance,ptmxmode=0666,mode=620",
            )
        )
        stack.enter_context(mount("tmpfs", tree / "run", kind="tmpfs", options="mode=755"))
        stack.enter_context(mount("tmpfs", tree / "tmp", kind="tmpfs", options="mode=1777"))
        (tree / "run/lock").mkdir()
        resolver = Path("/etc/resolv.conf").resolve()
        if resolver.is_file():
            stack.enter_context(bind(resolver, tree / "etc/resolv.conf", read_only=True))
        stack.enter_context(_no_services(tree))
        yield


@contextmanager
def _no_services(tree: Path) -> Iterator[None]:
    """invoke-rc.d asks this program before it starts anything; 101: not allowed."""
    policy = tree / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink(missing_ok=True)


def _fill_dev(dev: Path) -> None:
    mask = os.umask(0)
    try:
        for name, (major, minor) in _DEVICES.items():
            os.mknod(dev / name, 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        (dev / "pts").mkdir(mode=0o755)
        (dev / "shm").mkdir(mode=0o1777)
        for name, target in _LINKS.items():
            (dev / name).symlink_to(target)
    finally:
        os.umask(mask)
