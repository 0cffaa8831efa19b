"""Asks a node for the health of its GPUs: with this very gpupt, sent there and run.

Nothing need be installed in a node beside Python, and host and node never differ in version.
What is sent is pure Python: gpupt, click, PyYAML and pynvml.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpupt.edges.healthfile import health_file
from gpupt.edges.process import Completed
from gpupt.errors import Failed
from gpupt.model.health import CheckResult, GpuHealth, HealthReport, Verdict
from gpupt.model.pci import PciAddress

if TYPE_CHECKING:
    from gpupt.edges.ssh import Ssh

# In memory, and gone with the next boot.
PLACE = "/run/gpupt/health"
NEEDED = ("gpupt", "click", "yaml", "pynvml")
# What of gpupt no health check imports.
LEFT_OUT = {"lab", "__pycache__"}
SECONDS = 120.0
# `gpupt health` says with 0 to 3 how the cards are; any other status, it did not run.
ANSWERS = range(4)


def ask_node(ssh: Ssh, *, state: Path, lending: bool, deadline: float = SECONDS) -> HealthReport:
    """The health of a node's GPUs, by the rules of this state folder; raises Failed,
    DeadlineExceeded."""
    folder = install(ssh, state=state, deadline=deadline)
    words = ["env", f"PYTHONPATH={folder}", "python3", "-P", "-m", "gpupt.cli.main"]
    words += ["--state", f"{folder}/state", "health", "--json", *(["--lending"] if lending else [])]
    done = ssh.run(words, deadline=deadline, check=False)
    return parse_report(done, node=ssh.name)


def install(ssh: Ssh, *, state: Path, deadline: float) -> str:
    """The folder on the node that has gpupt in it, put there if it is not."""
    rules = health_file(state)
    text = rules.read_bytes() if rules.exists() else b""
    archive = pack(text)
    folder = f"{PLACE}/{hashlib.sha256(archive).hexdigest()[:16]}"
    if ssh.run(["test", "-e", f"{folder}/whole"], deadline=deadline, check=False).status == 0:
        return folder
    half = f"{folder}.tar.gz"
    ssh.run(["mkdir", "-p", "-m", "700", folder], deadline=deadline)
    with tempfile.NamedTemporaryFile() as file:
        file.write(archive)
        file.flush()
        ssh.put(Path(file.name), half)
    ssh.run(["tar", "-xzf", half, "-C", folder, "--no-same-owner"], deadline=deadline)
    ssh.run(["rm", half], deadline=deadline)
    ssh.run(["touch", f"{folder}/whole"], deadline=deadline)
    return folder


@cache
def pack(rules: bytes) -> bytes:
    """An archive of what is sent; the same source gives the same bytes.  Raises Failed."""
    raw = io.BytesIO()
    # Neither the time nor a name of this machine is in it.
    with (
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, data in sorted({**sources(), "state/health.yaml": rules}.items()):
            if data or name != "state/health.yaml":
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(data), 0o600
                archive.addfile(entry, io.BytesIO(data))
    return raw.getvalue()


def sources() -> dict[str, bytes]:
    """Every file of Python that the node needs, by its place there."""
    found = {}
    for package in NEEDED:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise Failed(f"{package} is not installed", remedy="reinstall gpupt")
        origin = Path(spec.origin)
        files = origin.parent.rglob("*.py") if origin.name == "__init__.py" else [origin]
        base = origin.parent.parent if origin.name == "__init__.py" else origin.parent
        for file in files:
            if not LEFT_OUT & set(file.relative_to(base).parts):
                found[str(file.relative_to(base))] = file.read_bytes()
    return found


def parse_report(done: Completed, *, node: str) -> HealthReport:
    """The report that a node's `gpupt health --json` printed; raises Failed."""
    try:
        if done.status not in ANSWERS:
            raise ValueError(f"status {done.status}")
        told = json.loads(done.stdout)
        return HealthReport(
            gpus=tuple(
                GpuHealth(
                    address=PciAddress.parse(gpu["address"]),
                    uuid=gpu["uuid"],
                    name=gpu["name"],
                    driver=gpu["driver"],
                    checks=tuple(read_check(check) for check in gpu["checks"]),
                )
                for gpu in told["gpus"]
            ),
            machine=tuple(read_check(check) for check in told["machine"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-8:]
        raise Failed(
            f"{node} did not say how its GPUs are",
            details=(f"{type(error).__name__}: {error}", *said),
            remedy="the node needs Python 3.11 or later: python3 --version",
        ) from None


def read_check(told: dict[str, Any]) -> CheckResult:
    """One check; raises KeyError, ValueError, TypeError."""
    return CheckResult(
        id=str(told["id"]),
        status=Verdict(told["status"]),
        brief=str(told["brief"]),
        value=told["value"],
        threshold=told["threshold"],
        remedy=str(told["remedy"]),
        number=told["number"],
        unit=str(told["unit"]),
    )
