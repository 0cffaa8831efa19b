"""One emulated host for the whole tier; whatever is shown by it is shown on emulated cards."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulatedhost import GPUPT, EmulatedHost

INSIDE = Path(__file__).parent / "inside"
BOOT_SECONDS = 900


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedHost]:
    """A host of its own, booted for the tier and removed after it."""
    share = tmp_path_factory.mktemp("share")
    shutil.copytree(INSIDE, share, dirs_exist_ok=True)
    name = "test-tier"
    down = [GPUPT, "lab", "down", "--name", name]
    subprocess.run(down, capture_output=True, check=False, timeout=120)
    booted = subprocess.run(
        [GPUPT, "lab", "up", "--name", name, "--share", share],
        capture_output=True,
        text=True,
        timeout=BOOT_SECONDS,
        check=False,
    )
    if "image is not there" in booted.stderr:
        pytest.skip("the emulated host's image is not baked: gpupt image build gpupt")
    assert booted.returncode == 0, booted.stderr
    yield EmulatedHost(name, share)
    subprocess.run(down, capture_output=True, check=False, timeout=120)
