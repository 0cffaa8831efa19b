"""Run in the emulated host: gpupt's command line, each call in a fork of this process.

    python forks.py PORT

Under emulation it takes seconds to import gpupt, and this process has done so already.  GET
/ASKED (JSON of words and a deadline, quoted) answers with the exit status and both streams; a
fork has the words, the streams, the exit and the end that a process of its own would have.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import unquote

import gpupt
from gpupt.cli.main import main


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = json.loads(unquote(self.path[1:]))
        body = json.dumps(called(asked["words"], deadline=asked["deadline"])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tell nobody."""


def called(words: list[str], *, deadline: float) -> dict[str, object]:
    """One call of gpupt, to its end; a negative status is the signal that ended it.

    After ``deadline`` seconds that is SIGKILL, so that the next call finds somebody here.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            become_gpupt(words, out.fileno(), err.fileno())
        watched = os.pidfd_open(child)
        over, _, _ = select.select([watched], [], [], deadline)
        os.close(watched)
        if not over:
            os.kill(child, signal.SIGKILL)
        _, ended = os.waitpid(child, 0)
        told = []
        for stream in (out, err):
            stream.seek(0)
            told.append(stream.read().decode(errors="backslashreplace"))
    return {"status": os.waitstatus_to_exitcode(ended), "out": told[0], "err": told[1]}


def become_gpupt(words: list[str], out: int, err: int) -> None:
    """Go on as `gpupt WORDS` would, and never return."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.closerange(3, 256)
    sys.argv = ["gpupt", *words]
    status: str | int | None = 1
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code
    except Exception:  # noqa: BLE001  (what a process of its own would end with)
        traceback.print_exc()
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def import_all() -> None:
    """What any verb may come to import."""
    for module in pkgutil.walk_packages(gpupt.__path__, "gpupt."):
        if ".guest" not in module.name:
            importlib.import_module(module.name)
    for name in ("jinja2", "libvirt", "paramiko", "rich.live", "rich.table", "sqlite3", "yaml"):
        importlib.import_module(name)


if __name__ == "__main__":
    import_all()
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
