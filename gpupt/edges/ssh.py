"""The gate to SSH: pinned host keys, one connection for many commands, no wait without end."""

from __future__ import annotations

import codecs
import http.client
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gpupt.edges.process import Completed
from gpupt.errors import DeadlineExceeded, Failed

if TYPE_CHECKING:
    import paramiko

# A refused or reset connection is a node that still boots; anything else is told at once.
RETRY_SECONDS = 0.5
# Under emulation a key exchange takes seconds; a peer that went silent must not take for ever.
HANDSHAKE_SECONDS = 45


class Ssh:
    """One connection to a node, kept for all that is asked of it."""

    def __init__(self, client: paramiko.SSHClient, *, name: str) -> None:
        self._client = client
        self.name = name

    @classmethod
    def connect(
        cls,
        host: str,
        *,
        port: int = 22,
        user: str = "root",
        key: Path,
        host_key: str,
        deadline: float,
        waiting_for: str,
        alive: Callable[[], None] = lambda: None,
    ) -> Ssh:
        """Connect within ``deadline`` seconds, trying until the node answers.

        ``host_key`` is the only key accepted ("ssh-ed25519 AAAA…").  ``alive`` is called
        between tries and raises when there is no point in waiting on.  Raises
        DeadlineExceeded naming ``waiting_for``; Failed when the host key is another one or
        our key is not accepted.
        """
        import paramiko

        end = time.monotonic() + deadline
        said = "no answer"
        while (left := end - time.monotonic()) > 0:
            alive()
            client = paramiko.SSHClient()
            kind, _, blob = host_key.strip().partition(" ")
            entry = paramiko.hostkeys.HostKeyEntry.from_line(
                f"{_known_name(host, port)} {kind} {blob.split()[0]}"
            )
            assert entry is not None and entry.key is not None
            client.get_host_keys().add(_known_name(host, port), kind, entry.key)
            client.set_missing_host_key_policy(paramiko.RejectPolicy())
            patience = min(HANDSHAKE_SECONDS, max(left, 1.0))
            try:
                client.connect(
                    host,
                    port=port,
                    username=user,
                    key_filename=str(key),
                    look_for_keys=False,
                    allow_agent=False,
                    timeout=patience,
                    banner_timeout=patience,
                    auth_timeout=patience,
                )
            except paramiko.BadHostKeyException as error:
                client.close()
                raise Failed(
                    f"{waiting_for} answers with another host key than the one pinned for it",
                    details=str(error),
                    remedy="another machine has its address: end it, or take the cluster down",
                ) from None
            except paramiko.AuthenticationException as error:
                client.close()
                raise Failed(
                    f"{waiting_for} does not accept the cluster's key",
                    details=(str(error), "its credentials did not reach it"),
                ) from None
            except (OSError, EOFError, paramiko.SSHException) as error:
                client.close()
                said = str(error) or type(error).__name__
                time.sleep(min(RETRY_SECONDS, max(end - time.monotonic(), 0)))
                continue
            transport = client.get_transport()
            assert transport is not None
            transport.set_keepalive(30)
            return cls(client, name=waiting_for)
        raise DeadlineExceeded(
            f"{waiting_for} did not answer SSH within {deadline:g} s",
            details=f"{user}@{host} port {port}: {said}",
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        deadline: float,
        stdin: str | None = None,
        on_line: Callable[[str], None] | None = None,
        check: bool = True,
    ) -> Completed:
        """Run a command on the node to its end; ``on_line`` gets each line of both streams.

        Each word reaches the command as it is given.  Raises DeadlineExceeded, and Failed
        when the connection is lost or, with ``check``, the command exits non-zero.
        """
        import paramiko

        end = time.monotonic() + deadline
        line = shlex.join(argv)
        try:
            transport = self._client.get_transport()
            if transport is None or not transport.is_active():
                raise paramiko.SSHException("the connection is closed")
            channel = transport.open_session(timeout=min(deadline, HANDSHAKE_SECONDS))
            try:
                channel.exec_command(line)
                if stdin is not None:
                    channel.settimeout(deadline)
                    channel.sendall(stdin.encode())
                channel.shutdown_write()
                status, out, err = self._collect(channel, end, on_line)
            finally:
                channel.close()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{argv[0]} on {self.name} did not end within {deadline:g} s", details=line
            ) from None
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise Failed(
                f"the connection to {self.name} was lost", details=(line, str(error))
            ) from None
        done = Completed(tuple(argv), status, out, err)
        if check and status != 0:
            said = (err.strip() or out.strip()).splitlines()[-12:]
            raise Failed(
                f"{argv[0]} on {self.name} failed with status {status}", details=(line, *said)
            )
        return done

    @staticmethod
    def _collect(
        channel: paramiko.Channel, end: float, on_line: Callable[[str], None] | None
    ) -> tuple[int, str, str]:
        """Drain both streams until the command is over; raises TimeoutError at ``end``."""
        streams = {
            "out": (channel.recv_ready, channel.recv),
            "err": (channel.recv_stderr_ready, channel.recv_stderr),
        }
        whole = {"out": "", "err": ""}
        partial = {"out": "", "err": ""}
        decoders = {
            name: codecs.getincrementaldecoder("utf-8")("backslashreplace") for name in streams
        }
        while True:
            idle = True
            # Asked before reading: what came before the end is then surely drained.
            over = channel.exit_status_ready() and channel.eof_received
            for name, (ready, receive) in streams.items():
                while ready():
                    idle = False
                    text = decoders[name].decode(receive(65536))
                    whole[name] += text
                    if on_line is not None:
                        *lines, partial[name] = (partial[name] + text).split("\n")
                        for each in lines:
                            on_line(each)
            if idle and over:
                break
            if idle and channel.closed and not channel.exit_status_ready():
                raise EOFError("the channel closed before the command ended")
            if time.monotonic() > end:
                raise TimeoutError
            if idle:
                time.sleep(0.02)
        if on_line is not None:
            for rest in partial.values():
                if rest:
                    on_line(rest)
        return channel.recv_exit_status(), whole["out"], whole["err"]

    def put(self, local: Path, remote: str) -> None:
        """Copy a file to the node; raises Failed."""
        self._transfer("put", str(local), remote)

    def get(self, remote: str, local: Path) -> None:
        """Copy a file from the node; raises Failed."""
        self._transfer("get", remote, str(local))

    def _transfer(self, verb: Literal["put", "get"], source: str, target: str) -> None:
        import paramiko

        try:
            with self._client.open_sftp() as sftp:
                getattr(sftp, verb)(source, target)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise Failed(
                f"cannot copy {source} to {target} ({verb}, {self.name})", details=str(error)
            ) from None

    def http_get(self, port: int, path: str, *, deadline: float, host: str = "localhost") -> bytes:
        """GET a page that the node serves, through this connection and no open port.

        Raises Failed when nothing listens or the answer is not 200.
        """
        import paramiko

        transport = self._client.get_transport()
        if transport is None or not transport.is_active():
            raise Failed(f"the connection to {self.name} was lost")
        page = f"{host}:{port}{path}"
        try:
            channel = transport.open_channel(
                "direct-tcpip", (host, port), ("localhost", 0), timeout=deadline
            )
            channel.settimeout(deadline)
            connection = _ChannelConnection(host, channel)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                body = answer.read()
            finally:
                channel.close()
        except (OSError, EOFError, paramiko.SSHException, http.client.HTTPException) as error:
            raise Failed(f"{self.name} does not serve {page}", details=str(error)) from None
        if answer.status != 200:
            raise Failed(f"{self.name} answers {answer.status} for {page}")
        return body

    def close(self) -> None:
        """End the connection; harmless a second time."""
        with suppress(OSError, EOFError):
            self._client.close()

    def __enter__(self) -> Ssh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ChannelConnection(http.client.HTTPConnection):
    """HTTP over a channel that is already open."""

    def __init__(self, host: str, channel: paramiko.Channel) -> None:
        super().__init__(host)
        self.sock = channel

    def connect(self) -> None:
        """Nothing to do: the channel is the connection."""

    def close(self) -> None:
        """Nothing to do before the page is read: a server that keeps no connection is left as
        soon as its headers are there, and a closed channel, unlike a socket, reads nothing."""


def _known_name(host: str, port: int) -> str:
    """The host as known_hosts writes it."""
    return host if port == 22 else f"[{host}]:{port}"


def free_port() -> int:
    """A TCP port of the loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
