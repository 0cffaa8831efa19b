"""The emulated host under test, and this checkout's gpupt that boots it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gpupt.edges.process import Completed
from gpupt.edges.ssh import Ssh
from gpupt.errors import Failed
from gpupt.lab.host import Lab, await_ready
from gpupt.lab.story import Facts

CHECKOUT = Path(__file__).resolve().parents[2]
# Images are kept where quickstart keeps them: what one has baked, the other finds.
STATE = Path(os.environ.get("GPUPT_STATE", "/var/lib/gpupt"))
# Each worker of pytest-xdist has a host of its own.
NAME = f"emulated-tier-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
MEMORY = "6G"
BENCH = "/root/bench"
PYTHON = "/opt/gpupt/venv/bin/python"
FACTS = CHECKOUT / "gpupt/lab/guest/pci_facts.py"
FORKS = CHECKOUT / "tests/emulated/inside/forks.py"
FORKS_PORT = 7099


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

    def python(self, script: str, *words: str, deadline: float = 900) -> str:
        """Run one of the scripts of inside/ with gpupt's interpreter; its output."""
        done = self.run(PYTHON, f"/mnt/share/{script}", *words, deadline=deadline)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@dataclass
class Host:
    """The emulated host under test; one connection is kept, and made anew after a reset."""

    lab: Lab
    ssh: Ssh
    forks: bool = False

    def run(self, *argv: str, deadline: float = 120, check: bool = True) -> Completed:
        """Run a command there; gpupt in a fork that has it imported (inside/forks.py)."""
        if argv[0] == "gpupt":
            done = self.fork(*argv[1:], deadline=deadline)
            assert not check or done.status == 0, (
                f"{argv}: {done.status}\n{done.stdout}{done.stderr}"
            )
            return done
        return self.ssh.run(argv, deadline=deadline, check=check)

    def sh(self, script: str, *, deadline: float = 120, check: bool = True) -> Completed:
        return self.run("sh", "-c", script, deadline=deadline, check=check)

    def gpupt(self, *words: str, status: int = 0, deadline: float = 180) -> Mapping[str, Any]:
        """What ``gpupt --json …`` prints there; holds its exit status to ``status``."""
        done = self.run("gpupt", "--json", *words, deadline=deadline, check=False)
        assert done.status == status, f"gpupt {words}: {done.status}\n{done.stdout}{done.stderr}"
        found: Mapping[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        return found

    def fork(self, *words: str, deadline: float) -> Completed:
        """One call of gpupt's command line, by the process there that keeps it imported."""
        if not self.forks:
            self.put(FORKS)
            self.sh(f"setsid {PYTHON} {BENCH}/forks.py {FORKS_PORT} > {BENCH}/forks.log 2>&1 &")
            end = time.monotonic() + 60
            while not self.forks:
                try:
                    self.ask(["--version"], deadline=30)
                    self.forks = True
                except Failed:
                    assert time.monotonic() < end, self.run("cat", f"{BENCH}/forks.log").stdout
                    time.sleep(0.5)
        told = self.ask(words, deadline=deadline)
        return Completed(("gpupt", *words), told["status"], told["out"], told["err"])

    def ask(self, words: Sequence[str], *, deadline: float) -> Mapping[str, Any]:
        asked = quote(json.dumps({"words": list(words), "deadline": deadline}))
        # It ends the call at the deadline, and answers then.
        body = self.ssh.http_get(FORKS_PORT, f"/{asked}", deadline=deadline + 20)
        told: Mapping[str, Any] = json.loads(body)
        return told

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
        self.forks = False
        self.ssh = self.lab.connect(deadline=deadline)
        await_ready(self.ssh, name=self.lab.name)
