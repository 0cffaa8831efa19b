"""Machines after real boards are read right: what is counted, grouped, refused and reported."""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from boards import BOARDS, NAMES, SECRETS, hgx, sleeping_laptop, workstation
from click.testing import CliRunner
from machines import unpack

from gpupt.actions import Ledger
from gpupt.cli.main import cli
from gpupt.decide.doctor import diagnose
from gpupt.decide.viability import Preflight, assess_lending, closure
from gpupt.edges.hostfacts import read_facts
from gpupt.edges.pciids import with_names
from gpupt.edges.snapshot import write_snapshot
from gpupt.edges.sysfs import PciReader, read_host
from gpupt.model.gpus import state_of
from gpupt.model.host import GpuState, Host, Records
from gpupt.model.pci import Link, PciAddress
from gpupt.report.tables import gpu_table

Golden = Callable[[str, str], None]
GIB = 1 << 30
# The one GPU of each board that is looked into.
INTERESTING = {
    "hgx": "9d:00.0",
    "hgx_no_acs": "19:00.0",
    "hgx_one_lost": "9b:00.0",
    "workstation": "61:00.0",
    "old_kernel": "21:00.0",
    "sleeping_laptop": "01:00.0",
    "sixteen": "0002:0a:00.0",
    "mi300x": "26:00.0",
    "mi250": "29:00.0",
    "sriov": "41:00.4",
}


def at(text: str) -> PciAddress:
    return PciAddress.parse(text)


def texts(addresses: object) -> list[str]:
    assert isinstance(addresses, (list, tuple))
    return [str(address).removeprefix("0000:") for address in addresses]


@dataclass(frozen=True)
class Facts:
    """What must be read of a board, counted by hand.

    ``display`` is the address of a display that serves the console alone; ``gpus`` are the
    others; ``refused`` maps each reason to the GPUs that it keeps from being lent; ``found``
    maps each finding of doctor to its subjects.
    """

    gpus: list[str]
    display: str | None
    groups: int
    companions: int
    critical: dict[str, str]
    refused: dict[str, list[str]]
    found: dict[str, list[str]]


HGX = ["19:00.0", "1b:00.0", "41:00.0", "43:00.0", "9b:00.0", "9d:00.0", "c1:00.0", "c3:00.0"]
BY_ROOT = {"01:00.0": "/ is on it"}
ASIDE = {**BY_ROOT, "e3:00.0": "the default route leaves by it (enxac1f6b000001)"}
FABRIC = {"nvswitch": ["host"], "boot-framebuffer": ["03:00.0"], "slow-bar-map": ["host"]}
TURING = ["01:00.0", "21:00.0", "41:00.0", "61:00.0"]
TURING_NEEDS = {"42:00.0": "the default route leaves by it (enp66s0)", "62:00.0": "/ is on it"}
EPYC = {"c1:00.0": "/ is on it", "d1:00.0": "the default route leaves by it (eno1np0)"}
AMD_FOUND = {"boot-framebuffer": ["c3:00.0"], "slow-bar-map": ["host"]}
VIRTUAL = [f"41:00.{number}" for number in range(4, 8)]

FACTS = {
    "hgx": Facts(
        HGX, "03:00.0", 62, 0, ASIDE,
        {"boot-framebuffer": ["03:00.0"]},
        FABRIC,
    ),
    "hgx_no_acs": Facts(
        HGX, "03:00.0", 26, 0,
        {
            **BY_ROOT,
            "18:00.0": "the default route leaves by it (ibp0)",
            "1a:00.0": "/scratch1 is on it",
            "42:00.0": "/scratch2 is on it",
            "9c:00.0": "/scratch3 is on it",
            "c2:00.0": "/scratch4 is on it",
        },
        {"boot-framebuffer": ["03:00.0"], "group-host-critical": HGX},
        {"group-host-critical": HGX, **FABRIC},
    ),
    "hgx_one_lost": Facts(
        HGX, "03:00.0", 62, 0, ASIDE,
        {"boot-framebuffer": ["03:00.0"], "lost-device": ["9b:00.0"]},
        {"lost-device": ["9b:00.0"], **FABRIC},
    ),
    "workstation": Facts(
        TURING, None, 17, 12, TURING_NEEDS,
        {"boot-framebuffer": ["01:00.0"]},
        {"boot-framebuffer": ["01:00.0"]},
    ),
    "old_kernel": Facts(
        TURING, None, 17, 12, TURING_NEEDS,
        {"boot-framebuffer": ["01:00.0"]},
        {"boot-framebuffer": ["01:00.0"]},
    ),
    "sleeping_laptop": Facts(
        ["01:00.0"], "00:02.0", 5, 1,
        {
            "00:0e.0": "/ is on it",
            "00:14.3": "the default route leaves by it (wlp0s20f3)",
            "10000:e1:00.0": "/ is on it",
        },
        {"boot-framebuffer": ["00:02.0"]},
        {"boot-framebuffer": ["00:02.0"]},
    ),
    "sixteen": Facts(
        [
            f"{domain}{bus}:00.0"
            for domain in ("", "0001:", "0002:", "0003:")
            for bus in ("09", "0a", "10", "9f")
        ],
        None, 35, 0,
        {
            "64:05.5": "/ is on it",
            "b1:00.0": "the default route leaves by it (ens1f0)",
            "10000:01:00.0": "/ is on it",
        },
        {}, {},
    ),
    "mi300x": Facts(
        [f"{bus}:00.0" for bus in ("05", "26", "46", "65", "85", "a6", "c6", "e5")],
        "c3:00.0", 21, 0, EPYC, {"boot-framebuffer": ["c3:00.0"]}, AMD_FOUND,
    ),
    "mi250": Facts(
        [f"{bus}:00.0" for bus in ("29", "2c", "59", "5c", "89", "8c", "b9", "bc")],
        "c3:00.0", 21, 0, EPYC, {"boot-framebuffer": ["c3:00.0"]}, AMD_FOUND,
    ),
    "sriov": Facts(
        ["41:00.0", *VIRTUAL, "c1:00.0"], None, 14, 0,
        {"51:00.0": "/ is on it", "d1:00.0": "the default route leaves by it (ens5f0)"},
        {"sriov-active": ["41:00.0", *VIRTUAL]},
        {"sriov-active": ["41:00.0", *VIRTUAL], "slow-bar-map": ["host"]},
    ),
}  # fmt: skip


@pytest.fixture(params=BOARDS)
def board(request: pytest.FixtureRequest, quick_path: Path) -> tuple[str, Path]:
    """A board's name and its tree."""
    root = quick_path / "board"
    root.mkdir()
    BOARDS[request.param](root)
    return request.param, root


def run(root: Path, *words: str) -> str:
    """What a verb says of the tree."""
    state = root.parent / "state"
    said = CliRunner().invoke(cli, ["--root", str(root), "--state", str(state), *words])
    assert said.exit_code == 0 or (words[0] == "doctor" and said.exit_code == 1), said.output
    return said.stdout


def test_what_people_and_scripts_see(board: tuple[str, Path], golden: Golden) -> None:
    name, root = board
    golden(f"boards/list-{name}.txt", run(root, "list"))
    golden(f"boards/doctor-{name}.txt", run(root, "doctor"))
    golden(f"boards/info-{name}.txt", run(root, "info", INTERESTING[name]))
    golden(f"boards/list-{name}.json", run(root, "list", "--json"))


def test_the_table_fits_a_terminal(board: tuple[str, Path]) -> None:
    _, root = board
    host = with_names(read_host(root), root)
    lines = gpu_table(host, Records(), colour=False, width=80)
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == [str(gpu.address) for gpu in host.gpus]
    for line, gpu in zip(lines[1:], host.gpus, strict=True):
        assert ("(boot display)" in line) is bool(gpu.device.boot_vga)
        assert "NVIDIA" in line or "AMD" in line or gpu.device.boot_vga


def by_reason(host: Host) -> dict[str, list[str]]:
    """The GPUs that cannot be lent, by why."""
    found: dict[str, list[str]] = {}
    for gpu in host.gpus:
        reasons = assess_lending(host, gpu, loans={}, preflight=Preflight())
        for reason in {reason.id for reason in reasons}:
            found.setdefault(reason, []).append(str(gpu.address).removeprefix("0000:"))
    return found


def test_facts_counted_by_hand(board: tuple[str, Path]) -> None:
    name, root = board
    facts = FACTS[name]
    host = read_host(root, whole=True)
    listed = sorted([*facts.gpus, *([facts.display] if facts.display else [])], key=at)
    assert texts([gpu.address for gpu in host.gpus]) == listed
    assert len(host.groups) == facts.groups
    assert not any(group.strangers for group in host.groups.values())
    assert sum(len(gpu.companions) for gpu in host.gpus) == facts.companions
    assert {str(each.address).removeprefix("0000:"): each.why for each in host.critical} == (
        facts.critical
    )
    assert by_reason(host) == facts.refused
    assert host.unreadable == ()


def test_no_healthy_card_is_accused(board: tuple[str, Path]) -> None:
    name, root = board
    host = read_host(root, whole=True)
    unread = {"kvm-unusable": "…", "libvirt-unreachable": "…", "guest-topology": "…"}
    facts = read_facts(root, host, unread=unread)
    diagnosis = diagnose(host, ledger=Ledger(), facts=facts)
    found: dict[str, list[str]] = {}
    for finding in diagnosis.findings:
        found.setdefault(finding.id, []).append(finding.subject.removeprefix("0000:"))
    assert found == FACTS[name].found
    old = {"no-reset", "wrong-vfio-flavour"} if name == "old_kernel" else set()
    assert set(diagnosis.skipped) == {*unread, "bind-silent", *old}


def test_what_is_no_gpu_is_none(board: tuple[str, Path]) -> None:
    _, root = board
    host = read_host(root, whole=True)
    mains = {gpu.address for gpu in host.gpus}
    for gpu in host.gpus:
        assert not mains & set(gpu.companions)
        leaving = closure(host, gpu)
        assert not any(host.devices[address].class_code >> 16 == 0x06 for address in leaving)
    for address, device in host.devices.items():
        if device.class_code >> 8 in {0x0680, 0x0403, 0x0C03, 0x0C80}:
            assert address not in mains


def test_a_recording_says_the_same_and_gives_nobody_away(
    board: tuple[str, Path], quick_path: Path
) -> None:
    name, root = board
    file = quick_path / "board.tar.gz"
    write_snapshot(root, file)
    with tarfile.open(file) as archive:
        for entry in archive:
            content = archive.extractfile(entry) if entry.isfile() else None
            whole = f"{entry.name} {entry.linkname}".encode() + (content.read() if content else b"")
            for secret in SECRETS:
                assert secret.encode() not in whole, entry.name
    again = quick_path / "again"
    again.mkdir()
    unpack(file, again)
    (again / "usr/share/misc").mkdir(parents=True)
    (again / "usr/share/misc/pci.ids").write_text(NAMES)
    assert run(again, "list", "--json") == run(root, "list", "--json")
    was, now = (read_host(tree, whole=True) for tree in (root, again))
    assert now.devices == was.devices
    assert {each.address for each in now.critical} == {each.address for each in was.critical}
    assert by_reason(now) == FACTS[name].refused
    # Of processes nothing is recorded; all else that doctor finds, it finds again.
    assert found_in(again) == found_in(root)


def found_in(root: Path) -> list[tuple[str, str]]:
    """The findings of doctor and their subjects."""
    said = json.loads(run(root, "doctor", "--json"))
    return [(finding["id"], finding["subject"]) for finding in said["findings"]]


def test_the_secrets_are_there_to_be_given_away(quick_path: Path) -> None:
    hgx(quick_path)
    tree = b"".join(
        os.fsencode(path) + (path.read_bytes() if path.is_file() else b"")
        for path in quick_path.rglob("*")
    )
    for secret in SECRETS:
        assert secret.encode() in tree or secret == "5c25734a100f"


def test_eight_gpus_of_two_sockets(quick_path: Path) -> None:
    hgx(quick_path)
    host = read_host(quick_path, whole=True)
    cards = [gpu.device for gpu in host.gpus if gpu.device.id.vendor == 0x10DE]
    assert [card.numa_node for card in cards] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {card.link for card in cards} == {Link(16, 16, 32.0, 32.0)}
    assert [[bar.size for bar in card.bars] for card in cards] == (
        [[16 << 20, 128 * GIB, 32 << 20]] * 8
    )
    assert [len(host.groups[card.iommu_group or 0].members) for card in cards] == [1] * 8
    assert sum(device.class_code == 0x068000 for device in host.devices.values()) == 4
    for gpu in host.gpus:
        if gpu.device in cards:
            assert closure(host, gpu) == (gpu.address,)


def test_what_shares_a_switch_leaves_together(quick_path: Path) -> None:
    BOARDS["hgx_no_acs"](quick_path)
    host = read_host(quick_path, whole=True)
    by_address = {str(gpu.address): gpu for gpu in host.gpus}
    together = ["18:00.0", "19:00.0", "1a:00.0", "1b:00.0", "1c:00.0"]
    assert texts(closure(host, by_address["0000:19:00.0"])) == together
    assert texts(closure(host, by_address["0000:1b:00.0"])) == together
    # A card whose group holds the way out is not told that the others may go along.
    said = run(quick_path, "doctor")
    assert "let them go along" not in said


def test_the_functions_of_four_cards(quick_path: Path) -> None:
    workstation(quick_path)
    host = read_host(quick_path, whole=True)
    for gpu in host.gpus:
        assert [address.function for address in gpu.companions] == [1, 2, 3]
        assert closure(host, gpu) == (gpu.address, *gpu.companions)
        assert gpu.device.numa_node is None
        assert gpu.device.link == Link(16, 16, 2.5, 8.0)
    assert [gpu.device.boot_vga for gpu in host.gpus] == [True, False, False, False]


def test_ports_without_room_are_no_lack(quick_path: Path) -> None:
    workstation(quick_path)
    host = read_host(quick_path)
    first, last = host.gpus[0].device, host.gpus[-1].device
    assert [bar.index for bar in first.bars] == [0, 1, 3, 5]
    assert [bar.index for bar in last.bars] == [0, 1, 3]
    assert all(bar.assigned for bar in last.bars)


class Watching(PciReader):
    """A reader that keeps which files it opened."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.opened: list[str] = []

    def open(self, path: str) -> int | None:
        self.opened.append(path.rpartition("/")[2])
        return super().open(path)


# For these the kernel asks the card itself, and powers it up to do so.
WAKING = {
    "config", "vpd", "current_link_width", "max_link_width", "current_link_speed", "serial_number",
}  # fmt: skip


@pytest.mark.parametrize(("address", "wakes"), [("01:00.0", False), ("00:02.0", True)])
def test_a_sleeping_card_is_not_woken(quick_path: Path, address: str, wakes: bool) -> None:
    sleeping_laptop(quick_path)
    reader = Watching(quick_path)
    device = reader.in_full(reader.devices()[at(address)])
    assert bool(WAKING & set(reader.opened)) is wakes
    assert not device.lost
    assert device.link == Link()


def test_a_sleeping_card_is_not_woken_on_an_old_kernel_either(quick_path: Path) -> None:
    sleeping_laptop(quick_path)
    (quick_path / "sys/bus/pci/devices/0000:01:00.0/power_state").unlink()
    reader = Watching(quick_path)
    device = reader.in_full(reader.devices()[at("01:00.0")])
    assert not WAKING & set(reader.opened)
    assert not device.lost


def test_order_is_by_number_in_all_domains(quick_path: Path) -> None:
    BOARDS["sixteen"](quick_path)
    host = read_host(quick_path, whole=True)
    assert list(host.devices) == sorted(host.devices)
    assert str(list(host.devices)[-1]) == "10000:01:00.0"
    assert [gpu.address.domain for gpu in host.gpus] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_virtual_functions_are_well_and_are_not_lent(quick_path: Path) -> None:
    BOARDS["sriov"](quick_path)
    host = read_host(quick_path, whole=True)
    whole, *virtual, other = [gpu.device for gpu in host.gpus]
    assert whole.sriov_numvfs == 4
    assert other.sriov_numvfs == 0
    assert len({device.iommu_group for device in virtual}) == 4
    for device in virtual:
        assert device.physfn == whole.address
        assert device.link == Link()
        assert device.sriov_numvfs is None
        # Its ids read FFFFh in config space, as SR-IOV has it: that is no card that was lost.
        assert not device.lost
    assert all(gpu.companions == () for gpu in host.gpus)


def test_a_virtual_function_can_be_lost_too(quick_path: Path) -> None:
    BOARDS["sriov"](quick_path)
    (quick_path / "sys/bus/pci/devices/0000:41:00.4/config").write_bytes(b"\xff" * 64)
    states = {
        str(gpu.address): state_of(gpu, None) for gpu in read_host(quick_path, whole=True).gpus
    }
    assert [name for name, state in states.items() if state is GpuState.LOST] == ["0000:41:00.4"]


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user who is not root, who may read what others let him read."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_absent_denied_and_lost_are_three_answers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        hgx(root, lost="0000:9b:00.0")
        functions = root / "sys/bus/pci/devices"
        for name in ("numa_node", "reset_method", "config"):
            (functions / "0000:19:00.0" / name).unlink()
            (functions / "0000:1b:00.0" / name).chmod(0)
        with unprivileged():
            host = read_host(root)
        absent, denied, _, _, lost = (gpu.device for gpu in host.gpus[1:6])
        for device in (absent, denied):
            assert (device.numa_node, device.reset_methods, device.lost) == (None, None, False)
        assert lost.lost
        assert lost.link == Link()
        assert sorted(host.unreadable) == [
            f"/sys/bus/pci/devices/0000:1b:00.0/{name}"
            for name in ("config", "numa_node", "reset_method")
        ]
        with unprivileged():
            said = run(root, "doctor")
        assert "not readable: /sys/bus/pci/devices/0000:1b:00.0/" in said
        assert "and 2 more" in said
        for name in ("numa_node", "reset_method", "config"):
            (functions / "0000:1b:00.0" / name).chmod(0o644)
        assert "not readable" not in run(root, "doctor")


def test_unknown_is_null_for_scripts(quick_path: Path) -> None:
    BOARDS["old_kernel"](quick_path)
    (gpu, *_) = json.loads(run(quick_path, "list", "--json"))["gpus"]
    assert (gpu["reset_methods"], gpu["numa_node"]) == (None, None)
    lost_root = quick_path / "lost"
    lost_root.mkdir()
    BOARDS["hgx_one_lost"](lost_root)
    by_address = {
        gpu["address"]: gpu for gpu in json.loads(run(lost_root, "list", "--json"))["gpus"]
    }
    lost = by_address["0000:9b:00.0"]
    assert lost["state"] == "lost"
    assert set(lost["link"].values()) == {None}
    assert by_address["0000:19:00.0"]["link"] == {
        "width": 16, "max_width": 16, "speed": 32.0, "max_speed": 32.0,
    }  # fmt: skip
