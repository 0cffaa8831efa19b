"""Runs a job on a node so that it ends there when this end is interrupted."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from gpupt.edges.process import Completed
from gpupt.edges.ssh import Ssh
from gpupt.errors import GpuptError

FOLDER = "/run/gpupt/jobs"
# timeout(1) leads the job's process group, and passes on to all of it what it is sent.
# Whichever of the two comes first leaves its file before it looks for the other's.
START = 'mkdir -p "${0%/*}" && echo $$ > "$0" && test ! -e "$0.end" && exec timeout -k 30 "$@"'
END = 'mkdir -p "${0%/*}" && : > "$0.end"; test ! -e "$0" || kill -TERM "$(cat "$0")"'
LATE = 124
# What a node under emulation takes to look at a file and send a signal, and some more.
END_SECONDS = 30.0
SPARE_SECONDS = 60.0


def run_job(
    node: Ssh, argv: Sequence[str], *, deadline: float, on_line: Callable[[str], None]
) -> Completed:
    """Run a command to its end, which is LATE's exit status after ``deadline`` seconds.

    Ctrl-C here, and a deadline that passes unheard, end it there with all that it started.
    Raises DeadlineExceeded, and Failed when the connection is lost; its deadline ends it then.
    """
    note = f"{FOLDER}/{secrets.token_hex(8)}"
    words = ("sh", "-c", START, note, f"{deadline:g}", *argv)
    began = time.monotonic()
    try:
        done = node.run(words, deadline=deadline + SPARE_SECONDS, on_line=on_line, check=False)
        # One that did not heed TERM was killed, and timeout(1) with it.
        late = done.status != 0 and time.monotonic() - began >= deadline
        return replace(done, status=LATE) if late else done
    except BaseException:
        with suppress(GpuptError):
            node.run(("sh", "-c", END, note), deadline=END_SECONDS, check=False)
        raise
    finally:
        with suppress(GpuptError):
            node.run(("rm", "-f", note, f"{note}.end"), deadline=END_SECONDS, check=False)
