"""Rolls' checks are tried until they pass or their deadline ends, over a real sshd."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from clusters import machine, two_gpus
from test_ssh import Server, connect, server  # noqa: F401 (a fixture)

from gpupt.actions import AwaitNode
from gpupt.apply import waits
from gpupt.apply.clusterworld import ClusterWorld
from gpupt.apply.waits import keep_journal, last_json, pass_check
from gpupt.decide.allocation import allocate
from gpupt.edges.process import Completed
from gpupt.edges.ssh import Ssh
from gpupt.errors import DeadlineExceeded
from gpupt.model.roll import Check


def check(*command: str, deadline: int = 20) -> Check:
    return Check("ready", command, ("frontend",), deadline)


def test_check_is_tried_until_it_passes(server: Server, tmp_path: Path) -> None:  # noqa: F811
    flag = tmp_path / "flag"
    threading.Timer(1.5, flag.touch).start()
    with connect(server) as ssh:
        pass_check(
            check("test", "-e", str(flag)),
            node=lambda: ssh,
            drop=ssh.close,
            roll="spark",
            narrate=print,
        )


def test_check_that_never_passes_says_what_it_said_last(server: Server) -> None:  # noqa: F811
    said: list[str] = []
    began = time.monotonic()
    with connect(server) as ssh, pytest.raises(DeadlineExceeded) as caught:
        pass_check(
            check("sh", "-c", "echo no worker yet >&2; exit 1", deadline=3),
            node=lambda: ssh,
            drop=ssh.close,
            roll="spark",
            narrate=said.append,
        )
    assert time.monotonic() - began < 30
    assert caught.value.brief == "spark: ready did not pass on the test server within 3 s"
    assert caught.value.details[-1] == "no worker yet"


def test_check_that_hangs_ends_at_its_deadline(server: Server) -> None:  # noqa: F811
    began = time.monotonic()
    with connect(server) as ssh, pytest.raises(DeadlineExceeded, match="ready did not pass"):
        pass_check(
            check("sleep", "60", deadline=2),
            node=lambda: ssh,
            drop=ssh.close,
            roll="x",
            narrate=print,
        )
    assert time.monotonic() - began < 30


def test_connection_that_is_lost_is_made_anew(server: Server, tmp_path: Path) -> None:  # noqa: F811
    made = []

    def node() -> Ssh:
        if not made:
            made.append(connect(server))
        return made[0]

    node().close()
    pass_check(check("true"), node=node, drop=made.clear, roll="x", narrate=print)
    assert len(made) == 1
    made[0].close()


def clusters_on(server: Server, folder: Path) -> ClusterWorld:  # noqa: F811
    """A world whose compute-0 is the test server."""
    ours = ClusterWorld(
        state=folder, uri="test:///default", rolls={}, bake=print, accelerated=lambda: False
    )
    ours.connections[("herbarium", "compute-0")] = connect(server)
    return ours


def test_journal_of_a_node_that_failed_is_kept(
    server: Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    placement = allocate(two_gpus(), host=machine("emulated_host")).of("compute-0")
    ours = clusters_on(server, tmp_path)
    ssh = ours.connections[("herbarium", "compute-0")]
    plain = ssh.run

    def run(argv: Sequence[str], *, deadline: float) -> Completed:
        # This machine may have no systemd: what it would say is said in its place.
        said = "nfs-server.service loaded failed" if argv[0] == "systemctl" else "[1.0] it broke"
        return plain(["echo", said], deadline=deadline)

    monkeypatch.setattr(ssh, "run", run)
    kept = keep_journal(ours, "herbarium", placement)
    file = ours.folder("herbarium").log("compute-0", "journal")
    assert kept == (
        "failed on compute-0: nfs-server.service",
        f"its journal is kept in {file}",
    )
    assert file.read_text() == "[1.0] it broke\n"
    ours.hang_up_all()


def test_journal_that_cannot_be_had_is_said(server: Server, tmp_path: Path) -> None:  # noqa: F811
    placement = allocate(two_gpus(), host=machine("emulated_host")).of("compute-0")
    ours = clusters_on(server, tmp_path)
    ours.connections[("herbarium", "compute-0")].close()
    assert keep_journal(ours, "herbarium", placement)[0].startswith(
        "its journal could not be kept: the connection"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('noise\n{"a": 1}\n', {"a": 1}),
        ('{"a": 1}\n{"b": 2}\n\n', {"b": 2}),
        ('{"a": 1}\ntail that is no JSON', {"a": 1}),
        ("[1]\n3\n", None),
        ("", None),
    ],
)
def test_result_of_a_job_is_its_last_object(text: str, found: object) -> None:
    assert last_json(text) == found


@pytest.mark.parametrize(("slow", "resets"), [(True, ["herbarium-compute-0"]), (False, [])])
def test_node_that_is_stuck_in_an_emulated_host_is_reset_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool, resets: list[str]
) -> None:
    placement = allocate(two_gpus(), host=machine("emulated_host")).of("compute-0")
    pressed: list[str] = []
    ours = ClusterWorld(
        state=tmp_path, uri="", rolls={}, bake=print, accelerated=lambda: True, slow=slow
    )
    ours.hypervisor_open = SimpleNamespace(reset=pressed.append)  # type: ignore[assignment]
    monkeypatch.setattr(waits, "require_running", lambda *_: None)
    monkeypatch.setattr(waits, "STUCK_SECONDS", -1.0)

    def silent(*_: object, alive: Callable[[], None], **__: object) -> NoReturn:
        alive()
        alive()
        raise DeadlineExceeded("compute-0 did not answer SSH")

    monkeypatch.setattr(ClusterWorld, "ssh", silent)
    action = AwaitNode("herbarium", placement, deadline=1, why="")
    with pytest.raises(DeadlineExceeded):
        waits.await_node(action, ours, narrate=print)
    assert pressed == resets
