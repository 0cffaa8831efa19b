"""Recorded machines are read by the code that reads live ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from machines import NAMES, unpack

from gpupt.cli.main import cli
from gpupt.decide.viability import closure
from gpupt.edges.sysfs import read_host

HERE = Path(__file__).parent
RECORDED = sorted(path.name.removesuffix(".tar.gz") for path in HERE.glob("*.tar.gz"))
Golden = Callable[[str, str], None]


def planted(name: str, folder: Path) -> Path:
    """The machine's tree, with names of our own for its cards."""
    unpack(HERE / f"{name}.tar.gz", folder)
    names = folder / "usr/share/misc/pci.ids"
    names.parent.mkdir(parents=True)
    names.write_text(NAMES)
    return folder


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("verb", ["list", "doctor"])
def test_what_people_see(tmp_path: Path, golden: Golden, name: str, verb: str) -> None:
    said = CliRunner().invoke(cli, ["--root", str(planted(name, tmp_path)), verb])
    golden(f"recorded/{verb}-{name}.txt", said.stdout)


@pytest.mark.parametrize("name", RECORDED)
def test_what_scripts_see(tmp_path: Path, golden: Golden, name: str) -> None:
    said = CliRunner().invoke(cli, ["--root", str(planted(name, tmp_path)), "list", "--json"])
    assert json.loads(said.stdout)["schema"] == 1
    golden(f"recorded/list-{name}.json", said.stdout)


@pytest.mark.parametrize("name", RECORDED)
def test_what_holds_of_every_machine(tmp_path: Path, name: str) -> None:
    host = read_host(planted(name, tmp_path), whole=True)
    assert host.devices
    assert not host.unreadable
    for number, group in host.groups.items():
        assert all(host.devices[member].iommu_group == number for member in group.members)
    for gpu in host.gpus:
        assert not set(gpu.companions) & {other.address for other in host.gpus}
        assert gpu.address in closure(host, gpu)
        assert not any(host.devices[address].is_bridge for address in closure(host, gpu))
