"""Why a GPU cannot be lent: each reason fires, and none of them without its cause."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fakekernel import FakeKernel, Function, plant
from machines import MACHINES, emulated_host, laptop, server

from gpupt.decide.binding import gpu_at, plan_detach
from gpupt.decide.viability import Preflight, assess_lending, closure
from gpupt.edges.sysfs import read_host
from gpupt.errors import Refused
from gpupt.model.gpus import identity_of
from gpupt.model.host import FunctionOrigin, Holder, Host, Loan
from gpupt.model.pci import Identity, PciAddress, PciId


def at(text: str) -> PciAddress:
    return PciAddress.parse(text)


def host_of(root: Path, *functions: Function) -> Host:
    plant(root, functions, drivers=["vfio-pci"])
    (root / "proc/self").mkdir(exist_ok=True)
    (root / "proc/self/mountinfo").write_text("22 1 0:30 / / rw - overlay overlay rw\n")
    return read_host(root, whole=True)


def reasons(
    host: Host, gpu: str, *, loans: dict[PciAddress, Loan] | None = None, **known: object
) -> list[str]:
    preflight = Preflight(**known)  # type: ignore[arg-type]
    found = assess_lending(host, gpu_at(host, at(gpu)), loans=loans or {}, preflight=preflight)
    return [finding.id for finding in found]


def card(
    address: str, group: int | None, driver: str | None = "nvidia", **more: object
) -> Function:
    return Function(address, "10de:2330", 0x030200, driver, group=group, **more)  # type: ignore[arg-type]


def test_healthy_cards_can_be_lent(tmp_path: Path) -> None:
    for machine, gpus in {
        "emulated_host": ["01:00.0", "02:00.0"],
        "server": ["19:00.0", "db:00.0"],
        "laptop": ["01:00.0"],
    }.items():
        MACHINES[machine](tmp_path / machine)
        host = read_host(tmp_path / machine, whole=True)
        for gpu in gpus:
            assert reasons(host, gpu) == []


def test_no_iommu_group(tmp_path: Path) -> None:
    assert reasons(host_of(tmp_path, card("0000:01:00.0", None)), "01:00.0") == ["iommu-off"]


def test_vfio_missing(tmp_path: Path) -> None:
    assert reasons(host_of(tmp_path, card("0000:01:00.0", 1)), "01:00.0", vfio=False) == [
        "vfio-missing"
    ]


def test_the_boot_display_is_asked_for(tmp_path: Path) -> None:
    host = host_of(tmp_path, card("0000:01:00.0", 1, boot_vga=1))
    assert reasons(host, "01:00.0") == ["boot-framebuffer"]
    assert reasons(host, "01:00.0", boot_gpu=True) == []


@pytest.mark.parametrize("id", ["1a03:2000", "102b:0536", "19a2:0800"])
def test_a_management_controllers_display_stays(tmp_path: Path, id: str) -> None:
    """Where another card is the boot display, nobody asks for this one by its boot_vga."""
    host = host_of(tmp_path, Function("0000:01:00.0", id, 0x030000, "ast", group=1, boot_vga=0))
    assert reasons(host, "01:00.0") == ["management-display"]
    assert reasons(host, "01:00.0", boot_gpu=True) == []


def test_lost(tmp_path: Path) -> None:
    assert "lost-device" in reasons(
        host_of(tmp_path, card("0000:01:00.0", 1, lost=True)), "01:00.0"
    )


@pytest.mark.parametrize("driver", [None, "amdgpu", "nvidia"])
def test_virtual_functions(tmp_path: Path, driver: str | None) -> None:
    whole = card("0000:01:00.0", 1, "amdgpu", more={"sriov_numvfs": "2"})
    virtual = card("0000:01:00.4", 2, driver, physfn="0000:01:00.0")
    host = host_of(tmp_path, whole, virtual)
    assert reasons(host, "01:00.0") == ["sriov-active"]
    # A plain virtual function is lent by vfio-pci while the host's driver has the whole card;
    # NVIDIA's own driver lends its own by itself.
    assert reasons(host, "01:00.4") == (["sriov-active"] if driver == "nvidia" else [])
    for whose in (None, "vfio-pci"):
        odd = host_of(
            tmp_path / str(whose),
            replace(whole, driver=whose),
            card("0000:01:00.4", 2, "amdgpu", physfn="0000:01:00.0"),
        )
        assert reasons(odd, "01:00.4") == ["sriov-active"]


def test_holders_are_named(tmp_path: Path) -> None:
    laptop(tmp_path)
    host = read_host(tmp_path, whole=True)
    sound = {at("01:00.1"): (Holder(4242, "pipewire", "/dev/snd/controlC1"),)}
    with pytest.raises(Refused) as error:
        plan_detach(host, gpus=[at("01:00.0")], loans={}, preflight=Preflight(holders=sound))
    assert "PID 4242 (pipewire) has /dev/snd/controlC1 open" in str(error.value)


@pytest.mark.parametrize(
    ("id", "class_code", "driver"),
    [("144d:a80a", 0x010802, "nvme"), ("8086:1592", 0x020000, "ice")],
)
def test_what_the_host_needs_is_never_taken(
    tmp_path: Path, id: str, class_code: int, driver: str
) -> None:
    kernel = emulated_host(tmp_path)
    folder = tmp_path / "sys/bus/pci/devices"
    for needed, why in (("0000:00:04.0", "/ is on it"), ("0000:00:03.0", "the default route")):
        link = folder / needed / "iommu_group"
        before = link.readlink()
        link.unlink()
        link.symlink_to("../../../kernel/iommu_groups/13")
        host = read_host(kernel.root, whole=True)
        assert reasons(host, "02:00.0") == ["group-host-critical"]
        assert reasons(host, "01:00.0") == []
        with pytest.raises(Refused) as error:
            plan_detach(host, gpus=[at("02:00.0")], loans={}, preflight=Preflight())
        assert f"{needed} (group 13): {why}" in str(error.value)
        link.unlink()
        link.symlink_to(before)


def test_a_bridge_on_a_driver_of_its_own(tmp_path: Path) -> None:
    bridge = Function("0000:00:01.0", "8086:1901", 0x060400, "strange", group=1)
    host = host_of(tmp_path, bridge, card("0000:01:00.0", 1))
    assert reasons(host, "01:00.0") == ["group-not-viable"]
    port = Function("0000:00:01.0", "8086:1901", 0x060400, "pcieport", group=1)
    assert reasons(host_of(tmp_path / "b", port, card("0000:01:00.0", 1)), "01:00.0") == []


def loan_of(host: Host, gpu: str, *, node: str | None = None) -> Loan:
    origins = tuple(
        FunctionOrigin(address, identity_of(host.devices[address]), host.devices[address].binding)
        for address in closure(host, gpu_at(host, at(gpu)))
    )
    return Loan(at(gpu), origins, "c" if node else None, node)


def test_lent_already(tmp_path: Path) -> None:
    host = host_of(tmp_path, card("0000:01:00.0", 1))
    assert reasons(host, "01:00.0", loans={at("01:00.0"): loan_of(host, "01:00.0")}) == []
    lent = {at("01:00.0"): loan_of(host, "01:00.0", node="n1")}
    assert "lent" in reasons(host, "01:00.0", loans=lent)


def test_its_neighbour_is_lent(tmp_path: Path) -> None:
    host = host_of(tmp_path, card("0000:01:00.0", 1), card("0000:02:00.0", 1))
    lent = {at("02:00.0"): loan_of(host, "02:00.0", node="n1")}
    assert reasons(host, "01:00.0", loans=lent) == ["lent"]


def test_the_address_holds_another_card(tmp_path: Path) -> None:
    host = host_of(tmp_path, card("0000:01:00.0", 1))
    was = Identity(PciId(0x10DE, 0x1EB8), None, 0x030200)
    origin = FunctionOrigin(at("01:00.0"), was, host.devices[at("01:00.0")].binding)
    loan = Loan(at("01:00.0"), (origin,))
    assert "address-moved" in reasons(host, "01:00.0", loans={at("01:00.0"): loan})


def addresses(host: Host, gpu: str) -> list[str]:
    return [str(address) for address in closure(host, gpu_at(host, at(gpu)))]


def test_the_whole_slot_leaves_in_whichever_groups(tmp_path: Path) -> None:
    host = host_of(
        tmp_path,
        card("0000:01:00.0", 1),
        Function("0000:01:00.1", "10de:10f9", 0x040300, "snd_hda_intel", group=2),
        Function("0000:05:00.0", "8086:15f3", 0x020000, "igc", group=2),
        Function("0000:06:00.0", "8086:15f3", 0x020000, "igc", group=3),
    )
    assert addresses(host, "01:00.0") == ["0000:01:00.0", "0000:01:00.1", "0000:05:00.0"]


def test_a_second_card_in_the_group_brings_its_slot(tmp_path: Path) -> None:
    host = host_of(
        tmp_path,
        Function("0000:00:01.0", "8086:1901", 0x060400, "pcieport", group=1),
        card("0000:01:00.0", 1),
        card("0000:02:00.0", 1),
        Function("0000:02:00.1", "10de:10f9", 0x040300, "snd_hda_intel", group=4),
    )
    assert addresses(host, "01:00.0") == ["0000:01:00.0", "0000:02:00.0", "0000:02:00.1"]
    assert addresses(host, "02:00.0") == addresses(host, "01:00.0")


def test_bridges_stay(tmp_path: Path) -> None:
    kernel: FakeKernel = server(tmp_path / "server")
    assert addresses(read_host(kernel.root, whole=True), "19:00.0") == ["0000:19:00.0"]
    laptop(tmp_path / "laptop")
    assert "0000:00:01.0" not in addresses(read_host(tmp_path / "laptop", whole=True), "01:00.0")


def test_a_group_that_grew_since_the_loan(tmp_path: Path) -> None:
    host = host_of(tmp_path, card("0000:01:00.0", 1), card("0000:02:00.0", 1))
    whole = loan_of(host, "01:00.0")
    assert reasons(host, "01:00.0", loans={whole.gpu: whole}) == []
    part = Loan(whole.gpu, whole.origins[:1])
    assert reasons(host, "01:00.0", loans={part.gpu: part}) == ["group-not-viable"]
