"""What Spark jobs do before they submit anything."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import gpu_addresses
import gpupt_job
import pytest
from gpupt_job import Refused, Worker

ONE = Worker("compute-0", 2, ("0",))
FOUR = Worker("compute-1", 32, ("0", "1", "2", "3"))
NONE = Worker("compute-2", 8, ())


def offered(host: str, gpus: int, *, state: str = "ALIVE") -> dict[str, Any]:
    """A worker as the master's page shows it."""
    resources = {"gpu": {"name": "gpu", "addresses": [str(at) for at in range(gpus)]}}
    return {"host": host, "cores": 2, "state": state, "resources": resources if gpus else {}}


@contextmanager
def master(state: bytes) -> Iterator[str]:
    """A master's page on the loopback that says this."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(state)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/json/"
    finally:
        server.shutdown()
        thread.join(timeout=5)
        server.server_close()


def test_only_living_workers_count() -> None:
    state = {"workers": [offered("a", 2), offered("b", 1, state="DEAD"), offered("c", 0)]}
    with master(json.dumps(state).encode()) as page:
        assert gpupt_job.read_workers(page) == (Worker("a", 2, ("0", "1")), Worker("c", 2, ()))


def test_a_master_that_does_not_answer_is_named() -> None:
    with pytest.raises(Refused, match=r"does not answer at http://127\.0\.0\.1:9/json/"):
        gpupt_job.read_workers("http://127.0.0.1:9/json/")
    with master(b"<html>") as page, pytest.raises(Refused, match="does not answer"):
        gpupt_job.read_workers(page)


def test_without_a_frontend_there_is_nobody_to_ask() -> None:
    with pytest.raises(Refused, match="GPUPT_FRONTEND is not set"):
        gpupt_job.master_page({})
    assert gpupt_job.master_page({"GPUPT_FRONTEND": "fe"}) == "http://fe:8080/json/"


def test_all_gpus_are_used_unless_fewer_are_asked_for() -> None:
    assert gpupt_job.require_gpus([ONE, FOUR, NONE], None) == 5
    assert gpupt_job.require_gpus([ONE, FOUR, NONE], 2) == 2


@pytest.mark.parametrize(
    ("workers", "asked", "says"),
    [
        ([ONE, FOUR], 6, r"6 GPUs were asked for and 5 are offered \(compute-0 1, compute-1 4\)"),
        ([ONE], 0, "0 GPUs were asked for"),
        ([NONE], None, r"no worker offers a GPU \(compute-2 0\)"),
        ([], None, r"no worker offers a GPU \(there is no worker\)"),
    ],
)
def test_what_cannot_be_given_is_refused(
    workers: list[Worker], asked: int | None, says: str
) -> None:
    with pytest.raises(Refused, match=says):
        gpupt_job.require_gpus(workers, asked)


def test_an_executor_leaves_room_for_one_on_every_gpu() -> None:
    assert gpupt_job.cores_for([ONE, FOUR, NONE]) == 2
    assert gpupt_job.cores_for([FOUR]) == 8


def test_a_refusal_exits_3_and_submits_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with master(json.dumps({"workers": [offered("a", 1)]}).encode()) as page:
        monkeypatch.setenv("GPUPT_MASTER_PAGE", page)
        assert gpu_addresses.main(["--gpus", "2"]) == 3
    out = capsys.readouterr()
    assert out.out == ""
    assert "refused: 2 GPUs were asked for and 1 are offered (a 1)" in out.err


def test_a_result_is_the_last_line_and_what_fails_exits_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def late() -> dict[str, Any]:
        raise gpupt_job.Late("1 of 2 executors came within 5 s")

    assert gpupt_job.run(lambda: {"workers": 2}) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"workers": 2}
    assert gpupt_job.run(late) == 1
    assert "failed: 1 of 2 executors" in capsys.readouterr().err
