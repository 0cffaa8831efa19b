"""QEMU's control socket: one command, one answer, a deadline on each."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from gpupt.errors import DeadlineExceeded, Failed


class Qmp:
    """A connection to a running QEMU; a context manager."""

    def __init__(self, connection: socket.socket, *, name: str) -> None:
        self._socket = connection
        self._unread = b""
        self.name = name
        self.events: list[dict[str, Any]] = []

    @classmethod
    def connect(cls, path: Path, *, deadline: float) -> Qmp:
        """Connect to the socket at ``path``; raises Failed when nobody listens there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(deadline)
        try:
            # By way of the folder: a socket's path may have 107 characters, ours may be longer.
            folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
            try:
                connection.connect(f"/proc/self/fd/{folder}/{path.name}")
            finally:
                os.close(folder)
            qmp = cls(connection, name=str(path))
            qmp._receive("QMP", time.monotonic() + deadline)
            qmp.command("qmp_capabilities", deadline=deadline)
        except OSError as error:
            connection.close()
            raise Failed(f"QEMU does not answer at {path}", details=str(error)) from None
        except BaseException:
            connection.close()
            raise
        return qmp

    def command(self, name: str, *, deadline: float = 10, **arguments: object) -> Any:
        """What the command returns; raises Failed when QEMU refuses, DeadlineExceeded."""
        end = time.monotonic() + deadline
        request = {"execute": name, "arguments": arguments} if arguments else {"execute": name}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise Failed(f"QEMU went away before {name}", details=str(error)) from None
        answer = self._receive("return", end)
        if "error" in answer:
            raise Failed(f"QEMU refuses {name}", details=str(answer["error"].get("desc", answer)))
        return answer["return"]

    def wait_for(self, event: str, *, deadline: float) -> dict[str, Any]:
        """The next event of that name, or one that already came; raises DeadlineExceeded."""
        for seen in self.events:
            if seen["event"] == event:
                self.events.remove(seen)
                return seen
        return self._receive("event", time.monotonic() + deadline, event=event)

    def _receive(self, key: str, end: float, *, event: str = "") -> dict[str, Any]:
        """The next message that has ``key`` (or is an error); events on the way are kept."""
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                message: dict[str, Any] = json.loads(line)
                if "event" in message and message["event"] != event:
                    self.events.append(message)
                elif key in message or "error" in message:
                    return message
                continue
            left = end - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(f"QEMU did not answer in time ({event or key}, {self.name})")
            self._socket.settimeout(left)
            try:
                more = self._socket.recv(65536)
            except TimeoutError:
                continue
            except OSError as error:
                raise Failed(f"QEMU went away ({self.name})", details=str(error)) from None
            if not more:
                raise Failed(f"QEMU went away ({self.name})")
            self._unread += more

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
