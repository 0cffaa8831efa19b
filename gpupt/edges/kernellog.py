"""The gate to the kernel's log: of this boot and no other, and why when it cannot be read.

The journal has all of the boot; /dev/kmsg has what the kernel's buffer still holds.  Files
under /var/log hold other boots too, and do not tell them apart: they are not read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpupt.edges.process import run
from gpupt.edges.tree import Reader
from gpupt.errors import DeadlineExceeded, GpuptError
from gpupt.model.health import Silence
from gpupt.model.kernellog import KernelLog, LogLine

# The newest lines: what a flood of PCIe errors leaves of a boot, and no more than memory bears.
MOST_LINES = 50_000
# The kernel's buffer is 32 MiB at most (log_buf_len), and a record 8 KiB.
MOST_BYTES = 1 << 26
RECORD = 1 << 14
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")
# Older systemd has the monotonic clock of the kernel's record, newer ones that of the boot.
_CLOCKS = ("_SOURCE_BOOTTIME_TIMESTAMP", "_SOURCE_MONOTONIC_TIMESTAMP", "__MONOTONIC_TIMESTAMP")
_TELLING = (Silence.DENIED, Silence.TIMEOUT, Silence.ERROR)
_DENIED = re.compile(r"permission|not seeing messages", re.I)


def read_kernel_log(root: Path, *, deadline: float = 10.0) -> KernelLog:
    """The kernel's log of this boot of the machine under ``root``, the newest MOST_LINES.

    Another tree's journal is not asked: journalctl tells of the machine it runs on.
    """
    if os.path.realpath(root) != "/":
        return read_kmsg(root)
    journal = read_journal(deadline=deadline)
    if journal.lines:
        return journal
    kmsg = read_kmsg(root)
    if kmsg.silent is None:
        return kmsg
    # What could be mended says more than what is not there.
    silent = next((why for why in _TELLING if why in {journal.silent, kmsg.silent}), kmsg.silent)
    return KernelLog(silent=silent, details=f"{journal.details}; {kmsg.details}")


def read_journal(*, deadline: float) -> KernelLog:
    """What journalctl tells; without lines when it could not be asked, or had none."""
    words = ["journalctl", "-k", "-b", "-o", "json", "--no-pager", "-n", str(MOST_LINES + 1)]
    words.append(f"--output-fields={','.join(('MESSAGE', '_BOOT_ID', *_CLOCKS[:2]))}")
    try:
        done = run(words, deadline=deadline, check=False)
    except DeadlineExceeded as error:
        return KernelLog(silent=Silence.TIMEOUT, details=error.brief)
    except GpuptError as error:
        return KernelLog(silent=Silence.UNSUPPORTED, details=error.brief)
    log = parse_journal(done.stdout, said=done.stderr.strip())
    # One that broke off has told a part: what it did not tell is no sign of health.
    return log if done.status == 0 else replace(log, whole=False)


def parse_journal(text: str, *, said: str = "") -> KernelLog:
    """The log in journalctl's JSON, one object in a line; ``said`` is what went to stderr."""
    lines = []
    boot = None
    # By newlines alone: a process's name may have any other separator in it.
    for each in text.split("\n"):
        try:
            entry = json.loads(each)
        except ValueError:
            # Cut off, or no entry at all.
            continue
        message = journal_text(entry.get("MESSAGE")) if isinstance(entry, dict) else None
        if message is None:
            continue
        boot = entry.get("_BOOT_ID") or boot
        lines.append(LogLine(message, journal_seconds(entry)))
    if not lines:
        silent = Silence.DENIED if _DENIED.search(said) else Silence.UNSUPPORTED
        return KernelLog(silent=silent, details=f"journalctl: {said or 'no entries'}")
    whole = len(lines) <= MOST_LINES
    return KernelLog(tuple(lines[-MOST_LINES:]), boot, "journalctl -k -b", whole)


def journal_text(value: Any) -> str | None:
    """A field of the journal: bytes come as numbers where they are not all printable, several
    of one name as a list, and one that is too long as null."""
    if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        return bytes(each & 0xFF for each in value).decode("utf-8", errors="replace")
    if isinstance(value, list) and value:
        return journal_text(value[0])
    return value if isinstance(value, str) else None


def journal_seconds(entry: dict[str, Any]) -> float | None:
    """Seconds since the boot, of the clock that is nearest to the kernel's own."""
    for clock in _CLOCKS:
        said = entry.get(clock)
        if isinstance(said, str) and said.isdecimal() and len(said) <= 20:
            return int(said) / 1e6
    return None


def read_kmsg(root: Path) -> KernelLog:
    """What the kernel's own buffer holds."""
    reader = Reader(root)
    number = reader.open("dev/kmsg")
    if number is None:
        if "/dev/kmsg" in reader.denied:
            return KernelLog(silent=Silence.DENIED, details="/dev/kmsg: permission denied")
        return KernelLog(silent=Silence.UNSUPPORTED, details="no /dev/kmsg")
    try:
        if reader.top is not None and stat.S_ISCHR(os.fstat(number).st_mode):
            # This machine's own, bound into the folder of another.
            why = "/dev/kmsg: only the running machine has a log"
            return KernelLog(silent=Silence.UNSUPPORTED, details=why)
        raw, error = records(number)
    finally:
        os.close(number)
    if error:
        refused = error in {errno.EPERM, errno.EACCES}
        silent = Silence.DENIED if refused else Silence.ERROR
        return KernelLog(silent=silent, details=f"/dev/kmsg: {os.strerror(error)}")
    boot = (reader.text("proc/sys/kernel/random/boot_id") or "").replace("-", "") or None
    return parse_kmsg(raw, boot=boot)


def records(number: int) -> tuple[bytes, int]:
    """All records that are there now, and the error that ended the reading, if it was one."""
    parts: list[bytes] = []
    size = 0
    while size < MOST_BYTES:
        try:
            part = os.read(number, RECORD)
        except BlockingIOError:
            break
        except BrokenPipeError:
            # Overwritten as it was read: the next one is there.
            continue
        except OSError as error:
            return b"".join(parts), 0 if parts else (error.errno or errno.EIO)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts), 0


def parse_kmsg(raw: bytes, *, boot: str | None) -> KernelLog:
    """The log in the records of /dev/kmsg: ``priority,number,microseconds,flags;message``, and
    the properties of its device in lines that begin with a space (Documentation/ABI/testing)."""
    lines = []
    first: int | None = None
    for number, line in kernel_records(raw):
        first = number if first is None else first
        if line is not None:
            lines.append(line)
    whole = first in {None, 0} and len(lines) <= MOST_LINES
    return KernelLog(tuple(lines[-MOST_LINES:]), boot, "/dev/kmsg", whole)


def kernel_records(raw: bytes) -> Iterator[tuple[int, LogLine | None]]:
    """The number of every record, and its line if the kernel itself wrote it."""
    for record in raw.split(b"\n"):
        head, semicolon, message = record.partition(b";")
        words = head.split(b",")
        if not semicolon or record.startswith(b" ") or len(words) < 3:
            continue
        try:
            priority, number, microseconds = (int(word) for word in words[:3])
            seconds = microseconds / 1e6
        except (ValueError, OverflowError):
            continue
        # Root's processes write here too: the kernel's own messages are those of facility 0.
        own = priority >> 3 == 0
        text = _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), message)
        line = LogLine(text.decode("utf-8", errors="replace"), seconds)
        yield number, line if own else None
