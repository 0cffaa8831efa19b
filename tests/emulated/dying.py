"""Runs gpupt in the emulated host and stops it at one of its writes to the kernel.

    python dying.py HOW NUMBER -- gpupt's words

HOW: ``before`` or ``after`` the write of that number SIGKILL; ``freeze`` after it (and
/run/frozen appears).  Nothing of gpupt is told, so nothing can be tidied up.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path, PurePosixPath
from threading import Lock

from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.edges.kernel import Kernel

TURN = Lock()


class Dying(Kernel):
    """The real kernel, until the write of that number."""

    how = ""
    left = 0

    def write(self, path: PurePosixPath, text: str, *, deadline: float) -> None:
        # Cards move at the same time: one of them makes the write of that number.
        with TURN:
            Dying.left -= 1
            ours = Dying.left == 0
        if ours and self.how == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(path, text, deadline=deadline)
        if ours and self.how == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        if ours and self.how == "freeze":
            Path("/run/frozen").touch()
            time.sleep(600)


if __name__ == "__main__":
    Dying.how, Dying.left = sys.argv[1], int(sys.argv[2])
    cli.main(sys.argv[4:], obj=Settings(kernel=Dying), standalone_mode=False)
    sys.exit("gpupt ended before the write it was to die at")
