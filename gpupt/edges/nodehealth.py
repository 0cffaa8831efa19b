"""Asks a node for the health of its GPUs: with this very gpupt, sent there and run.

Nothing need be installed in a node beside Python, and host and node never differ in version.
What is sent is pure Python: gpupt, click, PyYAML and pynvml.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import tarfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpupt.edges.healthfile import health_file, is_there, read_rules
from gpupt.edges.process import Completed
from gpupt.errors import BadInput, Failed
from gpupt.model.health import CheckResult, GpuHealth, HealthReport, Verdict
from gpupt.model.pci import PciAddress

if TYPE_CHECKING:
    from gpupt.edges.ssh import Ssh

# In memory, and gone with the next boot.
PLACE = "/run/gpupt/health"
NEEDED = ("gpupt", "click", "yaml", "pynvml")
# What of gpupt no health check imports; all but the first are folders of a wheel's alone.
LEFT_OUT = {"lab", "rolls", "playbooks", "templates", "examples", "__pycache__"}
# The mark comes last: a folder without it was cut short.
UNPACK = (
    'set -e; mkdir -p "$1"; chmod 700 "$1"; '
    'base64 -d | tar -xzf - -C "$1" --no-same-owner; touch "$1/whole"'
)
SECONDS = 120.0
# Characters of a text, and of a name, that a node may say.
LONGEST, LONGEST_ID = 400, 40
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
    archive = pack(rules_of(state))
    folder = f"{PLACE}/{hashlib.sha256(archive).hexdigest()[:16]}"
    if ssh.run(["test", "-e", f"{folder}/whole"], deadline=deadline, check=False).status != 0:
        # Through the command's own deadline, which a copy of a file has not.
        text = base64.b64encode(archive).decode("ascii")
        ssh.run(["sh", "-c", UNPACK, "gpupt", folder], deadline=deadline, stdin=text)
    return folder


def rules_of(state: Path) -> bytes:
    """The file of rules of this state folder, empty where it has none; raises BadInput."""
    # Read here too: what is wrong in it is told by its place on this machine.
    read_rules(state)
    file = health_file(state)
    return file.read_bytes() if is_there(file) else b""


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
                    uuid=text_of(gpu["uuid"]),
                    name=text_of(gpu["name"]),
                    driver=text_of(gpu["driver"]),
                    checks=tuple(read_check(check) for check in gpu["checks"]),
                )
                for gpu in told["gpus"]
            ),
            machine=tuple(read_check(check) for check in told["machine"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, BadInput) as error:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-8:]
        said = [harmless(line) for line in lines]
        raise Failed(
            f"{node} did not say how its GPUs are",
            details=(harmless(f"{type(error).__name__}: {error}"), *said),
            remedy="the node needs Python 3.11 or later: python3 --version",
        ) from None


def read_check(told: dict[str, Any]) -> CheckResult:
    """One check; raises KeyError, ValueError, TypeError."""
    number = told["number"]
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{number} is no quantity")
    return CheckResult(
        id=harmless(str(told["id"]))[:LONGEST_ID],
        status=Verdict(told["status"]),
        brief=harmless(str(told["brief"])),
        value=text_of(told["value"]),
        threshold=text_of(told["threshold"]),
        remedy=harmless(str(told["remedy"])),
        number=number,
        unit=harmless(str(told["unit"]))[:LONGEST_ID],
    )


def harmless(text: str) -> str:
    """Text that a node made up, fit for the terminal of the host's root and for its records."""
    return "".join(each if each.isprintable() else "?" for each in text)[:LONGEST]


def text_of(value: object) -> str | None:
    """A text that may be lacking; raises TypeError."""
    if value is None or isinstance(value, str):
        return None if value is None else harmless(value)
    raise TypeError(f"{value!r} is no text")
