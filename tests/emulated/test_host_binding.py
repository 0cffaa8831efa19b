"""Binding on a real kernel, with emulated cards: what FakeKernel claims, proved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from emulatedhost import EmulatedHost

pytestmark = pytest.mark.emulated
TRANSCRIPT = Path(__file__).parents[1] / "hosts/binding-answers.jsonl"


def test_there_and_back(emulated: EmulatedHost) -> None:
    before = emulated.run("gpupt", "list", "--json").stdout
    states = [gpu["state"] for gpu in json.loads(before)["gpus"]]
    done = emulated.run("gpupt", "detach", "--all", "--yes")
    assert done.returncode == 0, done.stderr
    during = json.loads(emulated.run("gpupt", "list", "--json").stdout)
    assert [gpu["state"] for gpu in during["gpus"]] == ["detached", "detached", "host"]
    again = emulated.run("gpupt", "detach", "--all", "--yes")
    assert (again.returncode, "nothing to do" in again.stderr) == (0, True)
    done = emulated.run("gpupt", "attach", "--all", "--yes")
    assert done.returncode == 0, done.stderr
    assert emulated.run("gpupt", "list", "--json").stdout == before
    assert states != ["detached", "detached", "host"]


def test_killed_at_every_fifth_boundary(
    emulated: EmulatedHost, figure: Callable[[str], None]
) -> None:
    """A sample, with each kind of boundary in it; tests/unit/test_crash_matrix.py has them all."""
    told = json.loads(emulated.python("killed.py", "5").splitlines()[-1])
    figure(f"killed on a real kernel: at {told['killed']} of {told['boundaries']} boundaries")
    assert told["boundaries"] >= 40
    assert told["killed"] >= told["boundaries"] / 5
    assert told["astray"] == []
    assert told["home"] is True


def test_the_kernel_answers_as_recorded(emulated: EmulatedHost) -> None:
    emulated.run("modprobe", "vfio-pci")
    said = [json.loads(line) for line in emulated.python("answers.py").splitlines()]
    assert said == [json.loads(line) for line in TRANSCRIPT.read_text().splitlines()]


def test_doctor_finds_the_host_fit(emulated: EmulatedHost) -> None:
    told = json.loads(emulated.run("gpupt", "doctor", "--json").stdout)
    assert [entry["id"] for entry in told["findings"] if entry["severity"] == "fail"] == []
    assert {"device-held", "intremap-off", "libvirt-unreachable"} <= set(told["checked"])
