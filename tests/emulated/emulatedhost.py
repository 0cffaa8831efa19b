"""A booted emulated host, and how tests run things in it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

GPUPT = Path(sys.executable).parent / "gpupt"
# Where the image keeps gpupt's own interpreter.
PYTHON = "/opt/gpupt/venv/bin/python"


@dataclass(frozen=True)
class EmulatedHost:
    """A booted host; ``share`` is a folder that it sees as /mnt/share."""

    name: str
    share: Path

    def run(self, *words: str, deadline: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        return subprocess.run(
            [GPUPT, "lab", "run", "--name", self.name, "--", *words],
            capture_output=True,
            text=True,
            timeout=deadline,
            check=False,
        )

    def python(self, script: str, *, deadline: float = 900) -> str:
        """Run one of the scripts of inside/ with gpupt's interpreter; its output."""
        done = self.run(PYTHON, f"/mnt/share/{script}", deadline=deadline)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
