"""The host's configuration files under one root: read, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gpupt.errors import BadInput, Failed

NEW_FILE = 0o644


class Etc:
    """Files by their absolute names (``/etc/…``, ``/boot/…``) on the machine under ``root``.

    A name whose links lead out of the root is none of that machine's: absent when it is
    read, BadInput when it is written.  ``denied`` are those that may not be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root).rstrip("/")
        self.denied: list[str] = []

    def place(self, name: str) -> Path | None:
        """Where the file really is, links followed; None: outside the root."""
        real = os.path.realpath(f"{self.root}/{name.lstrip('/')}")
        return Path(real) if real.startswith(f"{self.root}/") else None

    def raw(self, name: str) -> bytes | None:
        """What the file holds; None: absent, denied or outside."""
        place = self.place(name)
        try:
            return None if place is None else place.read_bytes()
        except PermissionError:
            self.denied.append(name)
            return None
        except OSError:
            return None

    def text(self, name: str) -> str | None:
        """The file as text that can be written back exactly, whatever its bytes."""
        raw = self.raw(name)
        return None if raw is None else raw.decode("utf-8", errors="surrogateescape")

    def names(self, folder: str, *, ending: str = "") -> list[str]:
        """The full names of what is in a folder, sorted."""
        place = self.place(folder)
        try:
            found = [] if place is None else sorted(os.listdir(place))
        except PermissionError:
            self.denied.append(folder)
            return []
        except OSError:
            return []
        return [f"{folder}/{name}" for name in found if name.endswith(ending)]

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        place = self.place(name)
        return place is not None and place.exists()

    def program(self, name: str) -> str | None:
        """The name of an installed program with its folder."""
        for folder in ("/usr/sbin", "/usr/bin", "/sbin", "/bin"):
            place = self.place(f"{folder}/{name}")
            if place is not None and os.access(place, os.X_OK) and place.is_file():
                return f"{folder}/{name}"
        return None

    def missing_folders(self, name: str) -> tuple[str, ...]:
        """The folders that have to be made for the file, outermost first."""
        found = []
        folder = os.path.dirname(name)
        while folder not in {"", "/"} and not self.exists(folder):
            found.append(folder)
            folder = os.path.dirname(folder)
        return tuple(reversed(found))

    def put(self, name: str, content: bytes | str | None) -> None:
        """Make the file hold ``content``, whole or not at all, and on the disk; None removes it.

        A file that was there keeps its owner and mode.  Raises Failed, BadInput.
        """
        place = self.place(name)
        if place is None:
            raise BadInput(f"{name} leads out of {self.root}", details="nothing was written there")
        if isinstance(content, str):
            content = content.encode("utf-8", errors="surrogateescape")
        try:
            if content is None:
                place.unlink(missing_ok=True)
            else:
                place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                replace_whole(place, content)
            flush_folder(place.parent)
        except OSError as error:
            raise Failed(
                f"cannot {'remove' if content is None else 'write'} {name}",
                details=error.strerror or str(error),
                remedy="run gpupt as root, on a filesystem that can be written to",
            ) from None

    def remove_folders(self, folders: Iterable[str]) -> None:
        """Remove folders that gpupt made, innermost first, as far as they are empty."""
        for folder in reversed(tuple(folders)):
            place = self.place(folder)
            if place is not None:
                with suppress(OSError):
                    place.rmdir()


def replace_whole(place: Path, content: bytes) -> None:
    """Write beside the file, then rename over it."""
    # Hidden, and of no ending that any reader of a .d folder looks for.
    half = place.with_name(f".{place.name}.gpupt-{os.getpid()}")
    try:
        number = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(number, "wb") as file:
            try:
                was = place.stat()
            except FileNotFoundError:
                os.fchmod(number, NEW_FILE)
            else:
                # The EFI partition knows no owners.
                with suppress(PermissionError):
                    os.fchown(number, was.st_uid, was.st_gid)
                    os.fchmod(number, was.st_mode & 0o7777)
            file.write(content)
            file.flush()
            os.fsync(number)
        half.replace(place)
    finally:
        with suppress(OSError):
            half.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Have the folder's entries on the disk, where its filesystem can do that."""
    with suppress(FileNotFoundError):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):
                os.fsync(number)
        finally:
            os.close(number)
