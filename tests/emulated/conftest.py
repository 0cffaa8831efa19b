"""The emulated GPU host that the tests of this folder share: baked, booted, taken down."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from emulatedhost import MEMORY, NAME, STATE, EmulatedHost, Host, gpupt

from gpupt.lab.host import Lab, find_lab
from gpupt.lab.story import Facts


@pytest.fixture(scope="session")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the host sees, with the scripts of inside/ in it."""
    folder = tmp_path_factory.mktemp("share")
    shutil.copytree(Path(__file__).parent / "inside", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def booted(share: Path) -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("baking the images of the emulated host needs root")
    gpupt("lab", "down", "--name", NAME)
    words = ["--memory", MEMORY, "--share", str(share)]
    for option, roll in (("--host-image", "gpupt"), ("--image", "node")):
        built = gpupt("--json", "image", "build", roll)
        assert built.returncode == 0, built.stderr
        words += [option, json.loads(built.stdout)["image"]["digest"]]
    try:
        up = gpupt("lab", "up", "--name", NAME, *words)
        assert up.returncode == 0, up.stderr
        lab = find_lab(STATE, NAME)
        assert lab is not None
        yield lab
    finally:
        down = gpupt("lab", "down", "--name", NAME)
        assert down.returncode == 0, down.stderr
        assert find_lab(STATE, NAME) is None


@pytest.fixture(scope="session")
def emulated(booted: Lab, share: Path) -> EmulatedHost:
    return EmulatedHost(booted.name, share)


@pytest.fixture(scope="session")
def connected(booted: Lab) -> Iterator[Host]:
    host = Host(booted, booted.connect(deadline=60))
    yield host
    host.ssh.close()


@pytest.fixture(scope="session")
def as_booted(connected: Host) -> Facts:
    """Every driver as it was before any test touched one."""
    return connected.facts()


@pytest.fixture
def host(connected: Host, as_booted: Facts) -> Iterator[Host]:
    """The host with everything of it at home, before the test and after."""
    yield connected
    # One that a test stopped, and then failed, would keep the lock from all that come after it.
    connected.sh("pkill -KILL -f [d]ying.py", check=False)
    left = as_booted.differences(connected.facts())
    if left:
        connected.run("gpupt", "recover", "--yes", check=False)
        connected.run("gpupt", "attach", "--all", "--yes", check=False)
    assert not left, "the test left drivers as they were not"


@pytest.fixture
def is_home(host: Host, as_booted: Facts) -> Callable[[], None]:
    """Assert that every driver and override is as it was, and nothing is lent or unfinished."""

    def look() -> None:
        assert as_booted.differences(host.facts()) == ()
        listed = host.gpupt("list")["gpus"]
        assert [(gpu["state"], gpu["lease"]) for gpu in listed] == [("host", None)] * 3
        assert host.gpupt("recover", "--dry-run")["actions"] == []

    return look
