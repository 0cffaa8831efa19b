"""The emulated host under test, and this checkout's gpupt that boots it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpupt.edges.process import Completed
from gpupt.edges.ssh import Ssh
from gpupt.lab.host import Lab, await_ready
from gpupt.lab.story import Facts

CHECKOUT = Path(__file__).resolve().parents[2]
# Images are kept where quickstart keeps them: what one has baked, the other finds.
STATE = Path(os.environ.get("GPUPT_STATE", "/var/lib/gpupt"))
NAME = "emulated-tier"
MEMORY = "6G"
BENCH = "/root/bench"
PYTHON = "/opt/gpupt/venv/bin/python"
FACTS = CHECKOUT / "gpupt/lab/guest/pci_facts.py"


def gpupt(*words: str, deadline: float = 1800) -> subprocess.CompletedProcess[str]:
    """Run this checkout's gpupt on this machine."""
    argv = [sys.executable, "-m", "gpupt.cli.main", "--state", str(STATE), *words]
    done = subprocess.run(
        argv, cwd=CHECKOUT, timeout=deadline, capture_output=True, text=True, check=False
    )
    print(f"$ gpupt {' '.join(words)}\n{done.stderr}", file=sys.stderr)
    return done


@dataclass(frozen=True)
class EmulatedHost:
    """The booted host as a person uses it; ``share`` is a folder it sees as /mnt/share."""

    name: str
    share: Path

    def run(self, *words: str, deadline: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a command in it, by way of ``gpupt lab run``."""
        return gpupt("lab", "run", "--name", self.name, "--", *words, deadline=deadline)

    def python(self, script: str, *, deadline: float = 900) -> str:
        """Run one of the scripts of inside/ with gpupt's interpreter; its output."""
        done = self.run(PYTHON, f"/mnt/share/{script}", deadline=deadline)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@dataclass
class Host:
    """The emulated host under test; one connection is kept, and made anew after a reset."""

    lab: Lab
    ssh: Ssh

    def run(self, *argv: str, deadline: float = 120, check: bool = True) -> Completed:
        return self.ssh.run(argv, deadline=deadline, check=check)

    def sh(self, script: str, *, deadline: float = 120, check: bool = True) -> Completed:
        return self.run("sh", "-c", script, deadline=deadline, check=check)

    def gpupt(self, *words: str, status: int = 0, deadline: float = 180) -> Mapping[str, Any]:
        """What ``gpupt --json …`` prints there; holds its exit status to ``status``."""
        done = self.run("gpupt", "--json", *words, deadline=deadline, check=False)
        assert done.status == status, f"gpupt {words}: {done.status}\n{done.stdout}{done.stderr}"
        found: Mapping[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        return found

    def facts(self) -> Facts:
        """Drivers and overrides, read by a script that knows nothing of gpupt."""
        done = self.ssh.run(["python3", "-"], stdin=FACTS.read_text(), deadline=60)
        return Facts.parse(json.loads(done.stdout))

    def driver(self, address: str) -> str | None:
        shown = self.sh(f"readlink /sys/bus/pci/devices/0000:{address}/driver || true").stdout
        return shown.strip().rpartition("/")[2] or None

    def put(self, *files: Path) -> None:
        """Lay files on the bench, where ``python`` there finds them."""
        self.run("mkdir", "-p", BENCH)
        for file in files:
            self.ssh.put(file, f"{BENCH}/{file.name}")

    def reset(self, *, deadline: float = 400) -> None:
        """The reset button: nothing is written out, nothing is shut down."""
        with self.lab.qmp() as qmp:
            qmp.command("system_reset")
            qmp.wait_for("RESET", deadline=20)
        self.ssh.close()
        self.ssh = self.lab.connect(deadline=deadline)
        await_ready(self.ssh, name=self.lab.name)
