"""Rolls' checks are tried until they pass or their deadline ends, over a real sshd."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from test_ssh import Server, connect, server  # noqa: F401 (a fixture)

from gpupt.apply.waits import last_json, pass_check
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
            check("sh", "-c", "echo no worker yet >&2; exit 1", deadline=2),
            node=lambda: ssh,
            drop=ssh.close,
            roll="spark",
            narrate=said.append,
        )
    assert time.monotonic() - began < 8
    assert caught.value.brief == "spark: ready did not pass on the test server within 2 s"
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
    assert time.monotonic() - began < 8


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
