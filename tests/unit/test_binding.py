"""Plans of detach and attach, as lists of actions; and no tree makes a plan that does harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fakekernel import Function, plant
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import emulated_host, laptop, server

from gpupt.actions import BindFunction, EraseLoan, Plan, RecordLoan
from gpupt.decide.binding import choose_all, plan_attach, plan_detach
from gpupt.decide.viability import Preflight
from gpupt.edges.sysfs import read_host
from gpupt.errors import BadInput, GpuptError, Refused
from gpupt.model.gpus import find_gpus, identity_of
from gpupt.model.host import Attribute, Critical, FunctionOrigin, Holder, Host, Loan
from gpupt.model.pci import DriverBinding, IommuGroup, PciAddress, PciDevice, PciId

FREE = Preflight()


def at(text: str) -> PciAddress:
    return PciAddress.parse(text)


def origin(host: Host, address: str) -> FunctionOrigin:
    device = host.devices[at(address)]
    return FunctionOrigin(device.address, identity_of(device), device.binding)


def moves(plan: Plan) -> list[tuple[str, str | None, str | None, str | None]]:
    return [
        (str(action.address), action.before, action.after, action.override)
        for action in plan.actions
        if isinstance(action, BindFunction)
    ]


def test_detach_of_a_laptops_card(tmp_path: Path) -> None:
    laptop(tmp_path)
    host = read_host(tmp_path, whole=True)
    plan = plan_detach(host, gpus=[at("01:00.0")], loans={}, preflight=FREE)
    assert (plan.verb, plan.subject) == ("detach", "0000:01:00.0")
    record = plan.actions[0]
    assert isinstance(record, RecordLoan)
    assert [o.attributes for o in record.origins] == [
        (Attribute("sys/bus/pci/devices/0000:01:00.0/d3cold_allowed", "1"),),
        (),
        (),
        (),
    ]
    assert tuple(replace(each, attributes=()) for each in record.origins) == tuple(
        origin(host, f"01:00.{function}") for function in range(4)
    )
    assert moves(plan) == [
        ("0000:01:00.1", "snd_hda_intel", "vfio-pci", "vfio-pci"),
        ("0000:01:00.2", "xhci_hcd", "vfio-pci", "vfio-pci"),
        ("0000:01:00.3", "nvidia-gpu", "vfio-pci", "vfio-pci"),
        ("0000:01:00.0", "nvidia", "vfio-pci", "vfio-pci"),
    ]


def test_attach_is_the_way_back(tmp_path: Path) -> None:
    laptop(tmp_path)
    before = read_host(tmp_path, whole=True)
    detach = plan_detach(before, gpus=[at("01:00.0")], loans={}, preflight=FREE)
    record = detach.actions[0]
    assert isinstance(record, RecordLoan)
    loan = Loan(record.gpu, record.origins)
    away = replace(
        before,
        devices={
            address: replace(device, binding=DriverBinding("vfio-pci", "vfio-pci"))
            if address.bus == 1
            else device
            for address, device in before.devices.items()
        },
    )
    plan = plan_attach(away, gpus=[at("01:00.0")], loans={loan.gpu: loan})
    assert moves(plan) == [
        ("0000:01:00.0", "vfio-pci", "nvidia", None),
        ("0000:01:00.1", "vfio-pci", "snd_hda_intel", None),
        ("0000:01:00.2", "vfio-pci", "xhci_hcd", None),
        ("0000:01:00.3", "vfio-pci", "nvidia-gpu", None),
    ]
    assert isinstance(plan.actions[-1], EraseLoan)


def test_a_card_that_boot_gave_to_vfio_is_recorded_and_not_moved(tmp_path: Path) -> None:
    plant(tmp_path, [Function("0000:01:00.0", "10de:2330", 0x030200, "vfio-pci", group=1)])
    host = read_host(tmp_path, whole=True)
    plan = plan_detach(host, gpus=[at("01:00.0")], loans={}, preflight=FREE)
    assert [type(action) for action in plan.actions] == [RecordLoan]
    loan = Loan(at("01:00.0"), (origin(host, "01:00.0"),))
    back = plan_attach(host, gpus=[loan.gpu], loans={loan.gpu: loan})
    assert [type(action) for action in back.actions] == [EraseLoan]


def two_in_one_group(root: Path) -> Host:
    plant(
        root,
        [
            Function("0000:01:00.0", "10de:2330", 0x030200, "nvidia", group=1),
            Function("0000:02:00.0", "10de:2330", 0x030200, "nvidia", group=1),
        ],
        drivers=["vfio-pci"],
    )
    return read_host(root, whole=True)


def test_cards_of_one_group_return_when_the_last_of_them_does(tmp_path: Path) -> None:
    host = two_in_one_group(tmp_path)
    both = [at("01:00.0"), at("02:00.0")]
    plan = plan_detach(host, gpus=both, loans={}, preflight=FREE)
    assert len(moves(plan)) == 2
    loans = {a.gpu: Loan(a.gpu, a.origins) for a in plan.actions if isinstance(a, RecordLoan)}
    assert set(loans) == set(both)
    away = replace(
        host,
        devices={
            address: replace(device, binding=DriverBinding("vfio-pci", "vfio-pci"))
            for address, device in host.devices.items()
        },
    )
    first = plan_attach(away, gpus=[at("01:00.0")], loans=loans)
    assert [type(action) for action in first.actions] == [EraseLoan]
    del loans[at("01:00.0")]
    last = plan_attach(away, gpus=[at("02:00.0")], loans=loans)
    assert [address for address, *_ in moves(last)] == ["0000:02:00.0", "0000:01:00.0"]
    assert all(after == "nvidia" for _, _, after, _ in moves(last))


def test_a_card_taken_later_knows_where_it_came_from_first(tmp_path: Path) -> None:
    host = two_in_one_group(tmp_path)
    plan = plan_detach(host, gpus=[at("01:00.0")], loans={}, preflight=FREE)
    record = plan.actions[0]
    assert isinstance(record, RecordLoan)
    away = replace(
        host,
        devices={
            address: replace(device, binding=DriverBinding("vfio-pci", "vfio-pci"))
            for address, device in host.devices.items()
        },
    )
    loans = {record.gpu: Loan(record.gpu, record.origins)}
    later = plan_detach(away, gpus=[at("02:00.0")], loans=loans, preflight=FREE)
    (second,) = later.actions
    assert isinstance(second, RecordLoan)
    assert second.origins == record.origins


def test_a_loan_whose_card_drifted_back_is_bound_again(tmp_path: Path) -> None:
    laptop(tmp_path)
    host = read_host(tmp_path, whole=True)
    loan = Loan(at("01:00.0"), tuple(origin(host, f"01:00.{number}") for number in range(4)))
    plan = plan_detach(host, gpus=[loan.gpu], loans={loan.gpu: loan}, preflight=FREE)
    assert {type(action) for action in plan.actions} == {BindFunction}
    assert len(plan.actions) == 4


def test_unknown_and_companion_addresses_are_bad_input(tmp_path: Path) -> None:
    laptop(tmp_path)
    host = read_host(tmp_path, whole=True)
    with pytest.raises(BadInput) as error:
        plan_detach(host, gpus=[at("7f:00.0")], loans={}, preflight=FREE)
    assert "0000:01:00.0  10de:1f11" in error.value.details
    with pytest.raises(BadInput, match=r"companion of 0000:01:00\.0"):
        plan_detach(host, gpus=[at("01:00.1")], loans={}, preflight=FREE)
    with pytest.raises(BadInput, match="no GPU at"):
        plan_attach(host, gpus=[at("7f:00.0")], loans={})


def test_attach_of_what_is_lent_or_moved_is_refused(tmp_path: Path) -> None:
    emulated_host(tmp_path)
    host = read_host(tmp_path, whole=True)
    loan = Loan(at("01:00.0"), (origin(host, "01:00.0"),), "c", "n1")
    with pytest.raises(Refused, match="lent to c/n1") as error:
        plan_attach(host, gpus=[loan.gpu], loans={loan.gpu: loan})
    assert "gpupt down c" in error.value.remedy
    was = replace(loan.origins[0].identity, id=PciId(0x10DE, 0x1EB8))
    moved = Loan(loan.gpu, (replace(loan.origins[0], identity=was),))
    with pytest.raises(Refused, match="not the card that was detached") as error:
        plan_attach(host, gpus=[loan.gpu], loans={loan.gpu: moved})
    assert error.value.details == ("0000:01:00.0 was 10de:1eb8, is 10de:2330",)


def test_a_function_that_is_gone_is_not_asked_for(tmp_path: Path) -> None:
    emulated_host(tmp_path)
    host = read_host(tmp_path, whole=True)
    loan = Loan(at("02:00.0"), (origin(host, "02:00.0"), origin(host, "02:00.1")))
    rest = {address: d for address, d in host.devices.items() if address != at("02:00.1")}
    plan = plan_attach(replace(host, devices=rest), gpus=[loan.gpu], loans={loan.gpu: loan})
    assert [type(action) for action in plan.actions] == [EraseLoan]


def test_all_names_what_it_leaves(tmp_path: Path) -> None:
    server(tmp_path)
    host = read_host(tmp_path, whole=True)
    taken, left = choose_all(host, loans={}, preflight=FREE)
    assert len(taken) == 8
    assert left == ((at("02:00.0"), "it is the boot display"),)


# Arbitrary machines: any classes, drivers, groups and critical devices.
DRIVERS = st.sampled_from([None, "nvidia", "vfio-pci", "pcieport", "nvme", "ice", "pci-stub"])
CLASSES = st.sampled_from([0x030000, 0x030200, 0x040300, 0x0C0330, 0x060400, 0x060000, 0x010802])


@st.composite
def machines(draw: st.DrawFn) -> tuple[Host, list[Loan]]:
    slots = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=8, unique=True))
    devices: dict[PciAddress, PciDevice] = {}
    for bus, slot in slots:
        for function in range(draw(st.integers(1, 3))):
            address = PciAddress(0, bus, slot, function)
            class_code = draw(CLASSES)
            devices[address] = PciDevice(
                address=address,
                id=PciId(0x10DE, draw(st.integers(1, 3))),
                class_code=class_code,
                binding=DriverBinding(
                    draw(DRIVERS), draw(st.sampled_from([None, "vfio-pci", "x"]))
                ),
                iommu_group=draw(st.none() | st.integers(0, 5)),
                boot_vga=draw(st.sampled_from([None, False, False, True])),
                is_bridge=class_code == 0x060400,
                lost=draw(st.sampled_from([False, False, False, True])),
            )
    members: dict[int, list[PciAddress]] = {}
    for device in devices.values():
        if device.iommu_group is not None:
            members.setdefault(device.iommu_group, []).append(device.address)
    everything = sorted(devices)
    critical = draw(st.lists(st.sampled_from(everything), max_size=2)) if everything else []
    host = Host(
        devices=devices,
        groups={number: IommuGroup(number, tuple(sorted(m))) for number, m in members.items()},
        gpus=find_gpus(devices),
        critical=tuple(Critical(address, "the host needs it") for address in critical),
    )
    loans = []
    for gpu in host.gpus:
        if draw(st.booleans()):
            node = draw(st.sampled_from([None, "n1"]))
            known = FunctionOrigin(
                gpu.address, identity_of(gpu.device), DriverBinding(draw(DRIVERS), None)
            )
            loans.append(Loan(gpu.address, (known,), "c" if node else None, node))
    return host, loans


@settings(max_examples=300, deadline=None)
@given(machines(), st.booleans())
def test_no_plan_touches_what_it_must_not(made: tuple[Host, list[Loan]], boot_gpu: bool) -> None:
    host, held = made
    loans = {loan.gpu: loan for loan in held}
    preflight = Preflight(boot_gpu=boot_gpu)
    taken, left = choose_all(host, loans=loans, preflight=preflight)
    assert set(taken) | {address for address, _ in left} == {gpu.address for gpu in host.gpus}
    assert all(why for _, why in left)
    for chosen in [*[[gpu.address] for gpu in host.gpus], list(taken)]:
        try:
            plan = plan_detach(host, gpus=chosen, loans=loans, preflight=preflight)
        except GpuptError as error:
            assert isinstance(error, Refused)
            assert error.details
            continue
        critical = {entry.address for entry in host.critical}
        recorded = {o.address for loan in held for o in loan.origins}
        for action in plan.actions:
            if isinstance(action, RecordLoan):
                recorded |= {origin.address for origin in action.origins}
            if isinstance(action, BindFunction):
                device = host.devices[action.address]
                assert action.address not in critical
                assert action.address in recorded
                assert not device.is_bridge
                assert not device.lost
                assert boot_gpu or not device.boot_vga
                assert (action.after, action.override) == ("vfio-pci", "vfio-pci")


def test_what_a_guest_holds_is_not_given_back(tmp_path: Path) -> None:
    """A guest that gpupt did not start: the kernel would take the card from it, unasked."""
    laptop(tmp_path)
    host = read_host(tmp_path, whole=True)
    gpu, sound = at("01:00.0"), at("01:00.1")
    loan = Loan(gpu, (origin(host, "01:00.0"), origin(host, "01:00.1")))
    for holder in (gpu, sound):
        held = {holder: (Holder(4242, "qemu-system-x86", "/dev/vfio/12"),)}
        with pytest.raises(Refused) as error:
            plan_attach(host, gpus=[gpu], loans={gpu: loan}, holders=held)
        assert "PID 4242 (qemu-system-x86) has /dev/vfio/12 open" in str(error.value)
    # The driver's own hold, which no process has, is none.
    kept = {gpu: (Holder(0, "", "/dev/nvidia0"),)}
    assert plan_attach(host, gpus=[gpu], loans={gpu: loan}, holders=kept).verb == "attach"
