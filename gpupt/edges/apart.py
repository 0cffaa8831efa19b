"""Reads files of sysfs in a child with a deadline: some wait for a lock of the device.

``driver_override`` and ``sriov_numvfs`` are shown under the device's lock, and a process that
reads ``config`` waits while the card is reset (drivers/pci/pci-sysfs.c, drivers/pci/access.c).
An unbind that never ends keeps that lock for ever: who reads then is never seen again.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

DEADLINE = 5.0
MOST = 4096
HEADER = 64
_HEAD = struct.Struct("=iii")


def read_apart(
    paths: Sequence[str],
    *,
    deadline: float = DEADLINE,
    read: Callable[[str], bytes] | None = None,
) -> dict[str, bytes | OSError]:
    """The first bytes of each file, or why there are none; a file that was not come to before
    ``deadline`` seconds had passed is not among the keys."""
    if not paths:
        return {}
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        # The child makes system calls only, so it is safe beside this process's threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            # Nothing of the parent's stays open in a child that may never end: least of all the
            # lock of its state folder.
            os.closerange(3, theirs)
            os.closerange(theirs + 1, os.sysconf("SC_OPEN_MAX"))
            tell(paths, theirs, read or first_bytes)
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        return hear(paths, ours, until=time.monotonic() + deadline)
    finally:
        os.close(ours)
        put_away(child)


def put_away(child: int) -> None:
    """End the child; one that waits for a lock cannot be ended, and is left behind."""
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    end = time.monotonic() + 0.5
    with suppress(ChildProcessError):
        while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < end:
            time.sleep(0.0005)


def first_bytes(path: str) -> bytes:
    """The first bytes of a file; raises OSError."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        # Of a card's config space no more than is looked at: each word of it is asked of the card.
        return os.read(number, HEADER if path.endswith("/config") else MOST)
    finally:
        os.close(number)


def tell(paths: Sequence[str], to: int, read: Callable[[str], bytes]) -> None:
    """In the child: send what each file holds, one after another."""
    for index, path in enumerate(paths):
        try:
            data, error = read(path), 0
        except OSError as failure:
            data, error = b"", failure.errno or 1
        message = _HEAD.pack(index, error, len(data)) + data
        while message:
            message = message[os.write(to, message) :]


def hear(paths: Sequence[str], source: int, *, until: float) -> dict[str, bytes | OSError]:
    """What the child sent before ``until``."""
    raw = bytearray()
    while (left := until - time.monotonic()) > 0:
        ready, _, _ = select.select([source], [], [], left)
        part = os.read(source, 1 << 16) if ready else b""
        if not part:
            break
        raw += part
    found: dict[str, bytes | OSError] = {}
    at = 0
    while at + _HEAD.size <= len(raw):
        index, error, size = _HEAD.unpack_from(raw, at)
        data = bytes(raw[at + _HEAD.size : at + _HEAD.size + size])
        if len(data) < size:
            break
        found[paths[index]] = OSError(error, os.strerror(error)) if error else data
        at += _HEAD.size + size
    return found
