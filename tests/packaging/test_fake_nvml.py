"""The fake NVML against two programs that are not ours: what they show is what a card answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fakenvml
import pytest
from fakenvml import GIBIBYTE, error, h200

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]

NVITOP = """
import json
from nvitop import Device
print(json.dumps([
    {
        "name": device.name(),
        "uuid": device.uuid(),
        "address": device.bus_id(),
        "temperature": device.temperature(),
        "used": device.memory_used(),
        "power": device.power_usage(),
        "pids": sorted(device.processes()),
        "ecc": device.total_volatile_uncorrected_ecc_errors(),
    }
    for device in Device.all()
]))
"""


def run(argv: Sequence[str | Path], **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in argv],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with gpustat and nvitop, and the pynvml that they choose."""
    folder = tmp_path_factory.mktemp("others") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin/python"
    run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet",
         "gpustat>=1.1,<2", "nvitop>=1.5,<2"]
    )  # fmt: skip
    return folder / "bin"


@pytest.fixture(scope="module")
def scene(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine with a card that idles and one that works."""
    folder = tmp_path_factory.mktemp("nvml")
    origin = run([programs / "python", "-c", "import pynvml; print(pynvml.__file__)"]).strip()
    fakenvml.build(folder, pynvml=Path(origin))
    busy = h200("0000:3b:00.0").but(
        temperature=88,
        power=690_000,
        utilization=(98, 61),
        memory=(140 * GIBIBYTE, 100 * GIBIBYTE, 0),
        compute=(os.getpid(),),
        ecc_volatile=(12, 3),
    )
    file = fakenvml.write_scenario(folder / "nvml.ini", [h200("0000:19:00.0"), busy])
    return {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML_CONF": str(file)}


def test_gpustat(programs: Path, scene: dict[str, str]) -> None:
    shown = json.loads(run([programs / "gpustat", "--json"], **scene))
    assert [
        (card["name"], card["temperature.gpu"], card["utilization.gpu"], card["power.draw"])
        for card in shown["gpus"]
    ] == [("NVIDIA H200", 33, 7, 75), ("NVIDIA H200", 88, 98, 690)]
    assert [[each["pid"] for each in card["processes"]] for card in shown["gpus"]] == [
        [],
        [os.getpid()],
    ]


def test_gpustat_meets_a_lost_card(programs: Path, scene: dict[str, str], tmp_path: Path) -> None:
    file = fakenvml.write_scenario(
        tmp_path / "nvml.ini",
        [h200("0000:19:00.0"), h200("0000:3b:00.0").but(handle=error(15))],
    )
    shown = json.loads(
        run([programs / "gpustat", "--json"], **{**scene, "FAKE_NVML_CONF": str(file)})
    )
    assert shown["gpus"][0]["name"] == "NVIDIA H200"
    assert "lost" in shown["gpus"][1]["name"].lower()


def test_nvitop(programs: Path, scene: dict[str, str]) -> None:
    idle, busy = json.loads(run([programs / "python", "-c", NVITOP], **scene))
    assert idle == {
        "name": "NVIDIA H200",
        "uuid": "GPU-00000000-0000-0000-0000-000000000019",
        "address": "00000000:19:00.0",
        "temperature": 33,
        "used": GIBIBYTE,
        "power": 75_500,
        "pids": [],
        "ecc": 0,
    }
    assert (busy["pids"], busy["ecc"], busy["used"]) == ([os.getpid()], 3, 100 * GIBIBYTE)
