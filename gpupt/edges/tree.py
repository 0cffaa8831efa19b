"""Reads small files of one tree, a machine's or the recording of one, and never leads out of it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

# A pipe that somebody put into a tree is not waited for.
TO_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
TO_READ_NO_LINK = TO_READ | os.O_NOFOLLOW
TO_STAND = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Reader:
    """Reads small files under one root, and remembers which were denied.

    A link that leads out of the tree of another machine is not followed: what is behind it
    is absent.  On the live machine (root ``/``) there is nothing outside.
    """

    def __init__(self, root: Path) -> None:
        self.root = f"{os.fspath(root).rstrip('/')}/"
        self.denied: list[str] = []
        self.foreseen: dict[str, bytes | None] = {}
        top = os.path.realpath(self.root)
        self.top = None if top == "/" else top
        self.seen_inside: set[str] = set()
        self.seen_plain: set[str] = set()
        self.ways: dict[tuple[str, str], str | None] = {}
        # The folder that is read in just now, and the number it is open as.
        self.here: str | None = None
        self.number_of_here = -1

    def text(self, path: str) -> str | None:
        """A file's text without the white space around it; None: absent or denied."""
        raw = self.bytes(path, most=4096)
        return None if raw is None else raw.decode("utf-8", errors="replace").strip()

    def bytes(self, path: str, *, most: int) -> bytes | None:
        """The first bytes of a file; None: absent, denied, or locked by the kernel."""
        if path in self.foreseen:
            kept = self.foreseen[path]
            return None if kept is None else kept[:most]
        number = self.open(path)
        if number is None:
            return None
        try:
            return os.read(number, most)
        except OSError:
            # An attribute the device does not support answers EINVAL or EIO when it is read.
            return None
        finally:
            os.close(number)

    def whole(self, path: str) -> str:
        """All of a file, such as one of /proc that comes in pieces; empty: absent or denied."""
        number = self.open(path)
        if number is None:
            return ""
        try:
            parts = []
            while part := os.read(number, 1 << 16):
                parts.append(part)
            return b"".join(parts).decode("utf-8", errors="replace")
        except OSError:
            return ""
        finally:
            os.close(number)

    def open(self, path: str) -> int | None:
        """A file of the tree, opened; None: absent, denied, or outside of the tree."""
        folder, _, name = path.rpartition("/")
        try:
            try:
                if folder == self.here:
                    return os.open(name, TO_READ_NO_LINK, dir_fd=self.number_of_here)
                if self.top is None:
                    return os.open(self.root + path, TO_READ)
                if folder not in self.seen_inside and not self.is_inside(folder):
                    return None
                return os.open(self.root + path, TO_READ_NO_LINK)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
            if self.top is None:
                return os.open(self.root + path, TO_READ)
            real = self.real_path(path)
            return None if real is None else os.open(f"{self.top}/{real}", TO_READ_NO_LINK)
        except PermissionError:
            self.denied.append("/" + path)
            return None
        except (OSError, ValueError):
            # ValueError: a NUL in a name that was read from a file.
            return None

    def is_inside(self, folder: str) -> bool:
        """Whether a folder is in the tree, links followed; an absent one is answered by
        whoever reads in it."""
        if self.top is None or folder in self.seen_inside:
            return True
        if self.is_plain(folder):
            self.seen_inside.add(folder)
            return True
        try:
            number = os.open(self.root + folder, os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError):
            return True
        try:
            real = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            real = os.path.realpath(self.root + folder)
        finally:
            os.close(number)
        if real != self.top and not real.startswith(f"{self.top}/"):
            return False
        self.seen_inside.add(folder)
        return True

    def stand_in(self, folder: str) -> bool:
        """Read in a folder until ``step_out``: the way there is gone once for all its files.

        Whether it is in the tree, or absent.
        """
        self.step_out()
        real = self.straight(folder)
        try:
            if real is not None:
                number = os.open(self.root + real, TO_STAND | os.O_NOFOLLOW)
            elif self.is_inside(folder):
                number = os.open(self.root + folder, TO_STAND)
            else:
                return False
        except (OSError, ValueError):
            return self.is_inside(folder)
        self.here, self.number_of_here = folder, number
        return True

    def step_out(self) -> None:
        """Stand in no folder any more."""
        if self.here is not None:
            os.close(self.number_of_here)
            self.here, self.number_of_here = None, -1

    def straight(self, path: str) -> str | None:
        """Where a link leads that the kernel could have made: up, and down past no other link.

        So it leads to a place in the tree, if that is no link itself.  None: any other.
        """
        if self.top is None:
            return None
        try:
            target, _, name = os.readlink(self.root + path).rpartition("/")
        except (OSError, ValueError):
            return None
        folder = path.rpartition("/")[0]
        try:
            above = self.ways[folder, target]
        except KeyError:
            above = self.ways[folder, target] = self.way(folder, target)
        return None if above is None or name in {"", ".", ".."} else f"{above}/{name}"

    def way(self, folder: str, target: str) -> str | None:
        """The folder that a link's text means, seen from its own; None where links are passed."""
        parts, words = folder.split("/"), target.split("/")
        up = words.count("..")
        if words[:up] != [".."] * up or not 0 < up < len(parts) or "" in words:
            return None
        found = "/".join([*parts[: len(parts) - up], *words[up:]])
        return found if self.is_plain(folder) and self.is_plain(found) else None

    def is_plain(self, path: str) -> bool:
        """Whether no part of a path is a link or leads up, nor absent: so it is in the tree."""
        if ".." in path:
            return False
        new = []
        while path and path not in self.seen_plain:
            new.append(path)
            path = path.rpartition("/")[0]
        try:
            for each in reversed(new):
                if stat.S_ISLNK(os.lstat(self.root + each).st_mode):
                    return False
                self.seen_plain.add(each)
        except (OSError, ValueError):
            return False
        return True

    def real_path(self, path: str) -> str | None:
        """The path with its links followed, from the root; None where they lead out of it."""
        top = self.top or ""
        try:
            real = os.path.realpath(self.root + path)
        except ValueError:
            return None
        return real[len(top) + 1 :] if real.startswith(f"{top}/") else None

    def names(self, folder: str) -> list[str]:
        """The names in a folder, sorted; none where there is no such folder."""
        try:
            return sorted(os.listdir(self.root + folder)) if self.is_inside(folder) else []
        except (OSError, ValueError):
            return []

    def link(self, path: str) -> str | None:
        """The last part of what a symbolic link points to."""
        folder, _, name = path.rpartition("/")
        try:
            if folder == self.here:
                target = os.readlink(name, dir_fd=self.number_of_here)
            elif folder in self.seen_inside or self.is_inside(folder):
                target = os.readlink(self.root + path)
            else:
                return None
        except (OSError, ValueError):
            return None
        name = target.rstrip("/").rpartition("/")[2]
        # The kernel's names are ASCII; any other is made fit to print.
        return name if name.isascii() else os.fsencode(name).decode("utf-8", errors="replace")

    def number(self, path: str, *, base: int = 16) -> int | None:
        said = self.text(path)
        try:
            return None if said is None else int(said, base)
        except ValueError:
            return None
