"""What real cards answer.  ``./runtests gpu`` runs this and prints it; nothing is faked here.

The figures of a run belong into docs/health.md, with the card, the driver and the date.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpupt.edges.nvml import read_driver
from gpupt.edges.sysfs import read_host
from gpupt.model.gpus import NVIDIA
from gpupt.model.health import Library, Silence
from gpupt.model.pci import PciAddress

pytestmark = pytest.mark.gpu
# What a driver that is well may say of a question: an answer, or that it is none of its own.
LOADED = {"burn_in", "bandwidth", "memory_pattern", "matrix", "burn_heat"}
# torch, jax, cupy or tensorflow may be in another Python than the one that runs the tests.
PYTHON = os.environ.get("GPUPT_FRAMEWORKS_PYTHON", sys.executable)
HONEST = {Silence.UNSUPPORTED, Silence.DENIED}


def cards() -> list[PciAddress]:
    """NVIDIA's cards that are on its driver."""
    return [
        gpu.address
        for gpu in read_host(Path("/")).gpus
        if gpu.device.id.vendor == NVIDIA and gpu.device.binding.driver == "nvidia"
    ]


@pytest.fixture(scope="module", autouse=True)
def there_is_one() -> None:
    if not cards():
        pytest.skip("no card is on NVIDIA's driver here")


def health(*words: str, deadline: float = 600) -> tuple[int, dict[str, Any]]:
    argv = [sys.executable, "-m", "gpupt.cli.main", "health", "--json", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=deadline, check=False)
    print(done.stderr, end="")
    return done.returncode, json.loads(done.stdout)


def test_nvml_answers_for_every_card(capsys: pytest.CaptureFixture[str]) -> None:
    reading = read_driver(cards())
    with capsys.disabled():
        print(f"\nNVML {reading.nvml}, driver {reading.driver}")
        for gpu in reading.gpus:
            silent = {name: str(why) for name, why in gpu.silent.items()}
            print(f"  {gpu.address} {gpu.name}: not told: {silent}")
    assert reading.library is Library.ANSWERED
    assert [gpu.address for gpu in reading.gpus] == cards()
    for gpu in reading.gpus:
        assert gpu.uuid is not None
        assert gpu.name is not None
        assert gpu.temperature is not None
        assert set(gpu.silent.values()) <= HONEST, gpu.silent


def test_health_judges_every_card(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = health()
    with capsys.disabled():
        print(f"\ngpupt health: {said['status']}, exit {status}")
        for gpu in said["gpus"]:
            for check in gpu["checks"]:
                print(
                    f"  {gpu['address']} {check['id']:<20} {check['status']:<12} {check['value']}"
                )
    assert status in {0, 1, 2}
    judged = {gpu["address"]: gpu["checks"] for gpu in said["gpus"]}
    for card in cards():
        answered = [each for each in judged[str(card)] if each["status"] != "unsupported"]
        assert len(answered) >= 8, judged[str(card)]


def test_a_card_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = health("--level", "long", "--seconds", "20", "--python", PYTHON)
    with capsys.disabled():
        print(f"\ngpupt health --level long: {said['status']}, exit {status}")
        for gpu in said["gpus"]:
            for check in gpu["checks"]:
                if check["id"] in LOADED:
                    said_of = f"{check['id']:<16} {check['status']:<12} {check['brief']}"
                    print(f"  {gpu['address']} {said_of}")
    for card in cards():
        (gpu,) = (each for each in said["gpus"] if each["address"] == str(card))
        checks = {each["id"]: each for each in gpu["checks"]}
        if checks["burn_in"]["status"] == "unsupported":
            pytest.skip(checks["burn_in"]["brief"])
        assert checks["matrix"]["status"] == "ok", checks["matrix"]
        assert checks["memory_pattern"]["status"] == "ok", checks["memory_pattern"]
