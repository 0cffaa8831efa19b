"""Plans are carried out, verified, and undone before an error is reported."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from fakekernel import FakeKernel, Fault, modalias
from machines import emulated_host, laptop

from gpupt.actions import Action, EraseLoan, Plan
from gpupt.apply.execute import execute
from gpupt.apply.world import World
from gpupt.decide.binding import plan_attach, plan_detach
from gpupt.decide.viability import Preflight
from gpupt.edges.journal import Journal
from gpupt.edges.sysfs import read_host
from gpupt.errors import Failed, Refused
from gpupt.model.host import Holder
from gpupt.model.pci import DriverBinding, PciAddress

GPU = PciAddress.parse("0000:02:00.0")
SOUND = PciAddress.parse("0000:02:00.1")
BARE = PciAddress.parse("0000:01:00.0")


def detach(kernel: FakeKernel, journal: Journal, *gpus: PciAddress) -> Plan:
    host = read_host(kernel.root, whole=True)
    plan = plan_detach(host, gpus=gpus, loans=journal.ledger.loans, preflight=Preflight())
    execute(plan, world=World(kernel, journal, lambda line: None))
    return plan


def attach(kernel: FakeKernel, journal: Journal, *gpus: PciAddress) -> Plan:
    host = read_host(kernel.root, whole=True)
    plan = plan_attach(host, gpus=gpus, loans=journal.ledger.loans)
    execute(plan, world=World(kernel, journal, lambda line: None))
    return plan


@pytest.fixture
def kernel(quick_path: Path) -> FakeKernel:
    return emulated_host(quick_path / "machine")


@pytest.fixture
def journal(quick_path: Path) -> Journal:
    return Journal(quick_path / "state")


def test_there_and_back(kernel: FakeKernel, journal: Journal) -> None:
    before = kernel.tree()
    detach(kernel, journal, GPU, BARE)
    for address in (GPU, SOUND, BARE):
        assert kernel.binding(address) == DriverBinding("vfio-pci", "vfio-pci")
    assert set(journal.ledger.loans) == {GPU, BARE}
    attach(kernel, journal, GPU, BARE)
    assert kernel.binding(BARE) == DriverBinding(None, None)
    assert kernel.tree() == before
    assert journal.ledger.loans == {}
    assert journal.ledger.unfinished == ()


def test_a_second_time_writes_nothing(kernel: FakeKernel, journal: Journal) -> None:
    detach(kernel, journal, GPU)
    written = list(kernel.writes)
    assert detach(kernel, journal, GPU).actions == ()
    assert kernel.writes == written
    attach(kernel, journal, GPU)
    written = list(kernel.writes)
    assert attach(kernel, journal, GPU).actions == ()
    assert kernel.writes == written


def test_override_stands_before_unbind_and_probe(kernel: FakeKernel, journal: Journal) -> None:
    detach(kernel, journal, BARE, GPU)
    names = [path.rpartition("/")[2] for path, word in kernel.writes if "01:00.0" in path + word]
    assert names == ["d3cold_allowed", "driver_override", "drivers_probe"]
    names = [path.rpartition("/")[2] for path, word in kernel.writes if "02:00.0" in path + word]
    assert names == ["driver_override", "unbind", "drivers_probe"]


def test_the_recorded_driver_returns_though_another_wants_it(
    quick_path: Path, journal: Journal
) -> None:
    kernel = laptop(quick_path / "laptop")
    before = kernel.tree()
    gpu = PciAddress.parse("01:00.0")
    detach(kernel, journal, gpu)
    attach(kernel, journal, gpu)
    # A probe gives the card to nouveau, which stands before nvidia; nvidia is bound by name.
    assert ("/sys/bus/pci/drivers/nouveau/unbind", str(gpu)) in kernel.writes
    assert ("/sys/bus/pci/drivers/nvidia/bind", str(gpu)) in kernel.writes
    assert kernel.tree() == before


def test_a_recorded_override_is_restored(kernel: FakeKernel, journal: Journal) -> None:
    (kernel.root / f"sys/bus/pci/devices/{SOUND}/driver_override").write_text("snd_hda_intel\n")
    (kernel.root / f"sys/bus/pci/devices/{BARE}/driver_override").write_text("none\n")
    before = kernel.tree()
    detach(kernel, journal, GPU, BARE)
    attach(kernel, journal, GPU, BARE)
    assert kernel.tree() == before


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("unbind", str(GPU), errno.EBUSY), "EBUSY"),
        (Fault("unbind", str(GPU), "stuck"), "did not finish unbind"),
        (Fault("unbind", str(GPU), "silent"), "did not leave bochs-drm"),
        (Fault("bind", str(GPU), errno.ENODEV, times=1), "ENODEV"),
        (Fault("driver_override", str(GPU), errno.EINVAL), "EINVAL"),
        (Fault("driver_override", str(GPU), "silent", times=1), "ENODEV"),
    ],
    ids=["busy", "stuck", "unbind lost", "no device", "invalid", "override lost"],
)
def test_a_failed_detach_leaves_the_host_as_it_was(
    kernel: FakeKernel, journal: Journal, fault: Fault, said: str
) -> None:
    before = kernel.tree()
    kernel.faults = [fault, Fault("drivers_probe", str(GPU), "silent", times=1)]
    with pytest.raises(Failed) as error:
        detach(kernel, journal, GPU, BARE)
    assert said in str(error.value)
    assert f"undone: bind {SOUND}" in error.value.details
    assert kernel.tree() == before
    assert journal.ledger.loans == {}
    assert journal.ledger.unfinished == ()


def test_a_silent_bind_is_found_out(kernel: FakeKernel, journal: Journal) -> None:
    before = kernel.tree()
    kernel.faults = [
        Fault("drivers_probe", str(BARE), "silent"),
        Fault("bind", str(BARE), "silent"),
    ]
    with pytest.raises(Failed, match="did not move to vfio-pci") as error:
        detach(kernel, journal, BARE)
    assert "though no write failed" in str(error.value)
    assert kernel.tree() == before


def test_what_cannot_be_undone_is_left_for_recover(kernel: FakeKernel, journal: Journal) -> None:
    kernel.faults = [
        Fault("unbind", str(GPU), errno.EBUSY),
        # The sound function goes to vfio-pci, and does not come back.
        Fault("unbind", str(SOUND), "silent", times=0),
        Fault("bind", str(SOUND), errno.EBUSY),
        Fault("drivers_probe", str(SOUND), "silent", times=None),
    ]
    kernel.faults[-1].times = 0
    kernel.faults.append(Fault("never", "", 0))

    def fail_on_the_way_back(point: str, action: Action) -> None:
        if point == "intended" and getattr(action, "address", None) == GPU:
            kernel.faults[-2].times = None

    host = read_host(kernel.root, whole=True)
    plan = plan_detach(host, gpus=[GPU], loans={}, preflight=Preflight())
    with pytest.raises(Failed) as error:
        execute(plan, world=World(kernel, journal, lambda line: None, None, fail_on_the_way_back))
    assert "gpupt recover tries again" in str(error.value)
    (run,) = journal.ledger.unfinished
    assert [entry.action.why for entry in run.entries]
    with pytest.raises(Refused, match="cut short"):
        detach(kernel, journal, BARE)


def test_ctrl_c_and_sigterm_undo(kernel: FakeKernel, journal: Journal) -> None:
    before = kernel.tree()
    handler = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM):

        def interrupt(point: str, action: Action, number: int = number) -> None:
            if point == "performed" and getattr(action, "address", None) == GPU:
                os.kill(os.getpid(), number)

        host = read_host(kernel.root, whole=True)
        plan = plan_detach(host, gpus=[GPU], loans={}, preflight=Preflight())
        with pytest.raises(KeyboardInterrupt):
            execute(plan, world=World(kernel, journal, lambda line: None, None, interrupt))
        assert kernel.tree() == before
        assert journal.ledger.unfinished == ()
    assert signal.getsignal(signal.SIGTERM) == handler


def test_one_function_that_does_not_return_keeps_no_other(
    kernel: FakeKernel, journal: Journal
) -> None:
    detach(kernel, journal, GPU, BARE)
    kernel.faults = [Fault("unbind", str(SOUND), errno.EBUSY, times=1)]
    with pytest.raises(Failed, match="EBUSY") as error:
        attach(kernel, journal, GPU, BARE)
    assert "still on loan" in str(error.value)
    assert kernel.binding(GPU).driver == "bochs-drm"
    assert kernel.binding(BARE).driver is None
    assert set(journal.ledger.loans) == {GPU}
    attach(kernel, journal, GPU)
    assert kernel.binding(SOUND) == DriverBinding("snd_hda_intel", None)
    assert journal.ledger.loans == {}


def test_a_loan_is_not_forgotten_before_everything_is_back(
    kernel: FakeKernel, journal: Journal
) -> None:
    detach(kernel, journal, GPU)
    plan = Plan("attach", str(GPU), (EraseLoan(GPU, why="too early"),))
    with pytest.raises(Failed, match="not back where it came from"):
        execute(plan, world=World(kernel, journal, lambda line: None))
    assert set(journal.ledger.loans) == {GPU}


def test_a_lost_card_that_stays_on_vfio_pci_stays_on_loan(
    kernel: FakeKernel, journal: Journal
) -> None:
    detach(kernel, journal, GPU)
    config = kernel.root / f"sys/bus/pci/devices/{GPU}/config"
    whole = config.read_bytes()
    config.write_bytes(b"\xff" * 64)
    with pytest.raises(Failed, match="fallen off the bus") as error:
        attach(kernel, journal, GPU)
    assert f"{GPU} is not back where it came from" in str(error.value)
    assert kernel.binding(GPU).driver == "vfio-pci"
    assert set(journal.ledger.loans) == {GPU}
    config.write_bytes(whole)
    attach(kernel, journal, GPU)
    assert kernel.binding(GPU) == DriverBinding("bochs-drm", None)
    assert journal.ledger.loans == {}


def test_a_card_that_answers_all_ones_for_its_ids_is_no_other_card(
    kernel: FakeKernel, journal: Journal
) -> None:
    detach(kernel, journal, GPU)
    folder = kernel.root / f"sys/bus/pci/devices/{GPU}"
    (folder / "modalias").write_text(modalias("ffff:ffff", 0xFFFFFF, "ffff:ffff"))
    plan = Plan("attach", str(GPU), (EraseLoan(GPU, why="too early"),))
    with pytest.raises(Failed, match="not back where it came from") as error:
        execute(plan, world=World(kernel, journal, lambda line: None))
    assert any(line.startswith(f"{GPU}: vfio-pci") for line in error.value.details)
    assert set(journal.ledger.loans) == {GPU}


def test_a_card_exchanged_after_the_plan_was_made_is_not_written_to(
    kernel: FakeKernel, journal: Journal
) -> None:
    detach(kernel, journal, GPU)
    host = read_host(kernel.root, whole=True)
    plan = plan_attach(host, gpus=[GPU], loans=journal.ledger.loans)
    folder = kernel.root / f"sys/bus/pci/devices/{GPU}"
    (folder / "modalias").write_text(modalias("1af4:1042", 0x010000, "1af4:1100"))
    written = len(kernel.writes)
    with pytest.raises(Failed, match="not the card that was detached"):
        execute(plan, world=World(kernel, journal, lambda line: None))
    assert all("02:00.0" not in path + word for path, word in kernel.writes[written:])
    assert kernel.binding(SOUND) == DriverBinding("snd_hda_intel", None)


def test_vfio_pci_is_loaded_when_it_is_not_there(kernel: FakeKernel, journal: Journal) -> None:
    vfio = kernel.root / "sys/bus/pci/drivers/vfio-pci"
    for control in vfio.iterdir():
        control.unlink()
    vfio.rmdir()
    with pytest.raises(Failed, match="vfio-pci is not loaded"):
        detach(kernel, journal, GPU)
    kernel.loadable = {"vfio-pci"}
    detach(kernel, journal, GPU)
    assert kernel.binding(GPU).driver == "vfio-pci"


def test_a_card_that_a_guest_has_open_is_not_unbound(
    kernel: FakeKernel, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened between the plan and the write: the last look is right before it."""
    detach(kernel, journal, GPU)
    held = (Holder(4242, "qemu-system-x86", "/dev/vfio/13"),)
    monkeypatch.setattr(FakeKernel, "holders", lambda self, address: held if address == GPU else ())
    with pytest.raises(Failed, match="in use by a guest") as error:
        attach(kernel, journal, GPU)
    assert "PID 4242" in str(error.value)
    assert kernel.binding(GPU).driver == "vfio-pci"
    assert set(journal.ledger.loans) == {GPU}
    monkeypatch.undo()
    attach(kernel, journal, GPU)
    assert kernel.binding(GPU).driver == "bochs-drm"
