"""The SSH gate against a real sshd on the loopback (and against nobody)."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gpupt.edges.keys import make_key_pair, write_private
from gpupt.edges.ssh import Ssh, free_port
from gpupt.errors import DeadlineExceeded, Failed

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")


@dataclass
class Server:
    port: int
    key: Path
    host_key: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if SSHD is None:
        pytest.skip("no sshd on this machine: install openssh-server")
    Path("/run/sshd").mkdir(exist_ok=True)
    folder = tmp_path_factory.mktemp("sshd")
    host, user = make_key_pair("host"), make_key_pair("user")
    write_private(folder / "host", host.private)
    write_private(folder / "user", user.private)
    (folder / "authorized").write_text(user.public + "\n")
    port = free_port()
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        f"PidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        "Subsystem sftp internal-sftp\n"
    )
    process = subprocess.Popen(
        [SSHD, "-D", "-f", folder / "config", "-E", folder / "log"], stdin=subprocess.DEVNULL
    )
    try:
        yield Server(port, folder / "user", host.public)
    finally:
        process.terminate()
        process.wait(10)


def connect(server: Server, **changed: object) -> Ssh:
    given: dict[str, object] = {
        "port": server.port,
        "key": server.key,
        "host_key": server.host_key,
        "deadline": 10,
        "waiting_for": "the test server",
    }
    return Ssh.connect("127.0.0.1", **{**given, **changed})  # type: ignore[arg-type]


def test_words_arrive_as_given_and_both_streams_come_back(server: Server) -> None:
    lines: list[str] = []
    with connect(server) as ssh:
        done = ssh.run(
            ["sh", "-c", 'echo "$1"; echo oops >&2; exit 7', "x", "a b; $HOME '"],
            deadline=10,
            on_line=lines.append,
            check=False,
        )
        again = ssh.run(["cat"], stdin="ünï\n", deadline=10)
    assert (done.status, done.stdout, done.stderr) == (7, "a b; $HOME '\n", "oops\n")
    assert sorted(lines) == ["a b; $HOME '", "oops"]
    assert again.stdout == "ünï\n"


def test_a_large_output_is_whole(server: Server) -> None:
    with connect(server) as ssh:
        assert len(ssh.run(["seq", "1", "200000"], deadline=20).stdout.splitlines()) == 200000


def test_another_host_key_is_refused_at_once(server: Server) -> None:
    began = time.monotonic()
    with pytest.raises(Failed, match="another host key"):
        connect(server, host_key=make_key_pair("other").public, deadline=30)
    assert time.monotonic() - began < 20


def test_a_key_that_is_not_accepted_is_told(server: Server, tmp_path: Path) -> None:
    write_private(tmp_path / "other", make_key_pair("other").private)
    with pytest.raises(Failed, match="does not accept the cluster's key"):
        connect(server, key=tmp_path / "other")


def test_nobody_there_ends_at_the_deadline_by_name(server: Server) -> None:
    with pytest.raises(DeadlineExceeded, match="compute-9 did not answer SSH within 1 s"):
        connect(server, port=free_port(), deadline=1, waiting_for="compute-9")


def test_a_dead_node_ends_the_wait(server: Server) -> None:
    def dead() -> None:
        raise Failed("compute-9 ended while booting")

    with pytest.raises(Failed, match="ended while booting"):
        connect(server, port=free_port(), alive=dead)


def test_a_command_that_does_not_end_is_left_at_its_deadline(server: Server) -> None:
    with connect(server) as ssh, pytest.raises(DeadlineExceeded, match="sleep on the test server"):
        ssh.run(["sleep", "60"], deadline=1)


def test_a_failing_command_shows_what_it_said(server: Server) -> None:
    with connect(server) as ssh, pytest.raises(Failed) as caught:
        ssh.run(["ls", "/no such thing"], deadline=10)
    assert any("no such thing" in line for line in caught.value.details)


def test_files_travel(server: Server, tmp_path: Path) -> None:
    (tmp_path / "here").write_text("sheet 7")
    with connect(server) as ssh:
        ssh.put(tmp_path / "here", str(tmp_path / "there"))
        ssh.get(str(tmp_path / "there"), tmp_path / "back")
        with pytest.raises(Failed, match="cannot copy /no/such"):
            ssh.get("/no/such", tmp_path / "back2")
    assert (tmp_path / "back").read_text() == "sheet 7"


def test_a_page_that_nobody_serves(server: Server) -> None:
    with connect(server) as ssh, pytest.raises(Failed, match="does not serve localhost"):
        ssh.http_get(free_port(), "/json/", deadline=5)


class Slow(BaseHTTPRequestHandler):
    """Keeps no connection, and takes its time between the headers and the page."""

    def do_GET(self) -> None:
        page = self.path.encode() * 1000
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.flush()
        time.sleep(0.3)
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        """Tell nobody."""


def test_a_page_that_comes_after_its_headers_is_whole(server: Server) -> None:
    with HTTPServer(("127.0.0.1", 0), Slow) as pages, connect(server) as ssh:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        try:
            assert ssh.http_get(pages.server_port, "/json/", deadline=10) == b"/json/" * 1000
        finally:
            pages.shutdown()
