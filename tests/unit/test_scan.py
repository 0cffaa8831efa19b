"""However a tree's folders are linked, the reader finds what is in it and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fakekernel import Function, modalias, plant
from machines import MACHINES

from gpupt.edges.sysfs import PciReader, read_host
from gpupt.edges.tree import Reader
from gpupt.errors import BadInput

CARD = Function("0000:01:00.0", "10de:2330", 0x030200, "nvidia", group=1)
BUS = "sys/bus/pci/devices"
SECRET = modalias("DEAD:BEEF", 0x030200, "DEAD:BEEF")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A machine with one card, and beside it what it must not lead to."""
    plant(tmp_path / "tree", [CARD])
    outside = tmp_path / f"outside/{CARD.address}"
    outside.mkdir(parents=True)
    (outside / "modalias").write_text(SECRET)
    return tmp_path / "tree"


def move(tree: Path, old: str, new: str) -> None:
    (tree / new).parent.mkdir(parents=True, exist_ok=True)
    (tree / old).rename(tree / new)


def relink(tree: Path, link: str, target: str) -> None:
    if (tree / link).is_symlink():
        (tree / link).unlink()
    (tree / link).symlink_to(target)


def test_a_card_behind_bridges(tree: Path) -> None:
    before = read_host(tree, whole=True)
    deep = f"sys/devices/pci0000:00/0000:00:01.0/0000:00:02.0/{CARD.address}"
    move(tree, f"sys/devices/pci0000:00/{CARD.address}", deep)
    relink(tree, f"{BUS}/{CARD.address}", f"../../../{deep.removeprefix('sys/')}")
    for name, target in (("driver", "bus/pci/drivers/nvidia"), ("iommu_group", "x/1")):
        relink(tree, f"{deep}/{name}", f"../../../../../{target}")
    assert read_host(tree, whole=True).devices == before.devices


@pytest.mark.parametrize(
    "target",
    [
        "../../../devices/./pci0000:00/0000:01:00.0",
        "../../../../sys/devices/pci0000:00/0000:01:00.0",
        "../../../devices/pci0000:00/../pci0000:00/0000:01:00.0",
        "../../../devices//pci0000:00/0000:01:00.0",
        "../../../devices/pci0000:00/0000:01:00.0/",
        "../../../devices/by-name/0000:01:00.0",
        "../../../devices/by-name/card",
        "{tree}/sys/devices/pci0000:00/0000:01:00.0",
    ],
)
def test_other_links_within_the_tree_are_followed(tree: Path, target: str) -> None:
    before = read_host(tree)
    relink(tree, "sys/devices/by-name", "pci0000:00")
    relink(tree, "sys/devices/pci0000:00/card", CARD.address)
    relink(tree, f"{BUS}/{CARD.address}", target.format(tree=tree))
    assert read_host(tree) == before


@pytest.mark.parametrize(
    "target",
    [
        "../../../../../outside/0000:01:00.0",
        "{tree}/../outside/0000:01:00.0",
        "../../../devices/way-out/0000:01:00.0",
        "../../../devices/out",
        "../../../devices/pci0000:00/../../../../outside/0000:01:00.0",
        "../../../devices/pci0000:00/../../../..",
    ],
)
def test_no_link_leads_out(tree: Path, target: str) -> None:
    relink(tree, "sys/devices/way-out", "../../../outside")
    relink(tree, "sys/devices/out", f"../../../outside/{CARD.address}")
    relink(tree, f"{BUS}/{CARD.address}", target.format(tree=tree))
    with pytest.raises(BadInput, match="no function of this tree"):
        read_host(tree)


@pytest.mark.parametrize("name", ["modalias", "vendor", "driver_override", "config"])
def test_no_attribute_leads_out(tree: Path, name: str) -> None:
    attribute = tree / f"{BUS}/{CARD.address}/{name}"
    attribute.unlink()
    attribute.symlink_to(f"../../../../../outside/{CARD.address}/modalias")
    assert "dead" not in str(read_host(tree)).lower()


def test_an_attribute_may_be_a_link_within_the_tree(tree: Path) -> None:
    before = read_host(tree)
    folder = tree / f"{BUS}/{CARD.address}"
    (folder / "modalias").rename(tree / "proc/modalias")
    (folder / "modalias").symlink_to("../../../../proc/modalias")
    assert read_host(tree) == before


@pytest.mark.parametrize("folder", ["sys", "sys/bus", "sys/bus/pci", BUS, "sys/devices"])
def test_a_folder_of_the_tree_may_be_a_link(tree: Path, folder: str) -> None:
    before = read_host(tree)
    place = tree / folder
    place.rename(place.with_name("moved"))
    place.symlink_to("moved")
    assert read_host(tree) == before


@pytest.mark.parametrize("path", ["sys/..", "sys/../..", "sys/bus/../../../outside", "../outside"])
def test_a_name_does_not_lead_up_and_out(tree: Path, path: str) -> None:
    reader = Reader(tree)
    assert reader.is_inside(path) is os.path.realpath(tree / path).startswith(str(tree))
    assert reader.text(f"{path}/{CARD.address}/modalias") is None
    assert reader.names(path) in ([], ["proc", "sys"])


def test_a_link_to_nothing_is_no_function(tree: Path) -> None:
    relink(tree, f"{BUS}/{CARD.address}", f"../../../devices/pci0000:00/{CARD.address}-gone")
    assert read_host(tree).devices == {}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_live_machine_is_read_as_its_record_is(tmp_path: Path, machine: str) -> None:
    MACHINES[machine](tmp_path)
    recorded, live = PciReader(tmp_path), PciReader(tmp_path)
    live.top = None
    for reader in (recorded, live):
        reader.stand_in("sys/bus")
    assert recorded.devices() == live.devices()
    assert (recorded.here, live.here) == (None, None)


@pytest.mark.parametrize("whole", [False, True])
def test_no_folder_stays_open(tree: Path, whole: bool) -> None:
    before = os.listdir("/proc/self/fd")
    read_host(tree, whole=whole)
    relink(tree, f"{BUS}/0000:01:00.1", "../../../../..")
    with pytest.raises(BadInput):
        read_host(tree, whole=whole)
    assert os.listdir("/proc/self/fd") == before
