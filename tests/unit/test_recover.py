"""From any point at which gpupt is killed, recover reaches the original or declared state."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from fakekernel import FakeKernel, Fault, modalias
from machines import MACHINES, emulated_host

from gpupt.actions import Action, Plan
from gpupt.apply.execute import execute
from gpupt.apply.recover import clean_up, recover
from gpupt.apply.world import World
from gpupt.decide import inverse
from gpupt.decide.binding import (
    Preflight,
    choose_all,
    plan_attach,
    plan_detach,
    plan_forget,
    plan_release,
)
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.sysfs import read_host
from gpupt.errors import Failed
from gpupt.model.pci import DriverBinding, PciAddress

POINTS = ("planned", "intended", "performed", "done")
BARE, GPU, SOUND = (PciAddress.parse(text) for text in ("01:00.0", "02:00.0", "02:00.1"))


def quiet(line: str) -> None:
    """Narrate to nobody."""


def decide_detach(kernel: FakeKernel, state: Path) -> Plan:
    host = read_host(kernel.root, whole=True)
    loans = read_ledger(state).loans
    taken, _ = choose_all(host, loans=loans, preflight=Preflight())
    return plan_detach(host, gpus=taken, loans=loans, preflight=Preflight())


def decide_attach(kernel: FakeKernel, state: Path) -> Plan:
    host = read_host(kernel.root, whole=True)
    loans = read_ledger(state).loans
    return plan_attach(host, gpus=tuple(loans), loans=loans)


def killed(work: Callable[[], None]) -> bool:
    """Do the work in a process of its own; whether it was killed on the way."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def run_and_die(kernel: FakeKernel, state: Path, plan: Plan, *, at: int | None = None) -> bool:
    """Execute a plan in a process that SIGKILL ends at its ``at``-th boundary."""
    passed = count()

    def boundary(point: str, action: Action) -> None:
        if next(passed) == at:
            kernel.die()

    def work() -> None:
        with Journal(state) as journal:
            execute(plan, world=World(kernel, journal, quiet, None, boundary))

    return killed(work)


def recover_all(kernel: FakeKernel, state: Path) -> None:
    with Journal(state) as journal:
        host = read_host(kernel.root, whole=True)
        for run in reversed(journal.ledger.unfinished):
            recover(run, host=host, world=World(kernel, journal, quiet))


@pytest.mark.parametrize("machine", ["emulated_host", "laptop"])
def test_killed_at_every_boundary(quick_path: Path, machine: str) -> None:
    kernel = MACHINES[machine](quick_path / "machine")
    state = quick_path / "state"
    at_home = kernel.tree()
    plan = decide_detach(kernel, state)
    boundaries = len(plan.actions) * len(POINTS)
    assert boundaries >= 20
    for at in range(boundaries):
        assert run_and_die(kernel, state, plan, at=at), at
        recover_all(kernel, state)
        assert kernel.tree() == at_home, f"detach killed at boundary {at}"
        assert read_ledger(state).loans == {}
        assert read_ledger(state).unfinished == ()
    assert not run_and_die(kernel, state, plan)
    detached = kernel.tree()
    boundaries = len(decide_attach(kernel, state).actions) * len(POINTS)
    for at in range(boundaries):
        assert run_and_die(kernel, state, decide_attach(kernel, state), at=at), at
        recover_all(kernel, state)
        assert kernel.tree() == at_home, f"attach killed at boundary {at}"
        assert read_ledger(state).loans == {}
        assert not run_and_die(kernel, state, decide_detach(kernel, state))
        assert kernel.tree() == detached


@pytest.mark.parametrize("effect", ["kill-before", "kill-after"])
@pytest.mark.parametrize("operation", ["driver_override", "unbind", "drivers_probe"])
def test_killed_at_every_write(quick_path: Path, operation: str, effect: str) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    at_home = kernel.tree()
    for address in ("0000:02:00.0", "0000:02:00.1"):
        kernel.faults = [Fault(operation, address, effect)]
        plan = decide_detach(kernel, state)
        assert run_and_die(kernel, state, plan)
        kernel.faults = []
        recover_all(kernel, state)
        assert kernel.tree() == at_home
        assert not run_and_die(kernel, state, plan)
        kernel.faults = [Fault(operation, address, effect)]
        assert run_and_die(kernel, state, decide_attach(kernel, state))
        kernel.faults = []
        recover_all(kernel, state)
        assert kernel.tree() == at_home
        assert read_ledger(state).loans == {}


def test_recover_may_be_killed_too(quick_path: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    at_home = kernel.tree()
    plan = decide_detach(kernel, state)
    assert run_and_die(kernel, state, plan, at=len(plan.actions) * len(POINTS) - 2)
    for address in ("0000:02:00.1", "0000:01:00.0"):
        kernel.faults = [Fault("unbind", address, "kill-after")]
        assert killed(lambda: recover_all(kernel, state))
    kernel.faults = []
    recover_all(kernel, state)
    assert kernel.tree() == at_home
    assert read_ledger(state).loans == {}


def test_another_card_at_the_address_is_left_alone(quick_path: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    plan = decide_detach(kernel, state)
    assert run_and_die(kernel, state, plan, at=len(plan.actions) * len(POINTS) - 2)
    # The host boots again, and a network card has the address that the GPU had.
    folder = kernel.root / "sys/bus/pci/devices/0000:02:00.0"
    (folder / "modalias").write_text(modalias("8086:10c9", 0x020000))
    (folder / "vendor").write_text("0x8086\n")
    written = len(kernel.writes)
    recover_all(kernel, state)
    assert all("02:00.0" not in path + word for path, word in kernel.writes[written:])
    assert read_ledger(state).unfinished == ()
    assert read_ledger(state).loans == {}


def boot_with_a_disk_at(kernel: FakeKernel, address: PciAddress) -> None:
    """The host boots again: overrides are gone, and a disk controller has that address."""
    folder = kernel.root / f"sys/bus/pci/devices/{address}"
    (folder / "modalias").write_text(modalias("1af4:1042", 0x010000, "1af4:1100"))
    (folder / "vendor").write_text("0x1af4\n")
    (folder / "device").write_text("0x1042\n")
    (folder / "driver_override").write_text("(null)\n")
    (folder / "driver").unlink(missing_ok=True)
    (folder / "driver").symlink_to("../../../bus/pci/drivers/virtio-pci")


def test_an_attach_carried_on_leaves_another_card_alone(quick_path: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    assert not run_and_die(kernel, state, decide_detach(kernel, state))
    assert run_and_die(kernel, state, decide_attach(kernel, state), at=1)
    boot_with_a_disk_at(kernel, GPU)
    host = read_host(kernel.root, whole=True)
    ledger = read_ledger(state)
    (run,) = ledger.unfinished
    shown = inverse.plan_recovery(run, host=host, loans=ledger.loans)
    assert shown.left_alone == (GPU,)
    assert GPU not in {getattr(action, "address", None) for action in shown.plan.actions}
    written = len(kernel.writes)
    recover_all(kernel, state)
    assert all("02:00.0" not in path + word for path, word in kernel.writes[written:])
    assert kernel.binding(GPU) == DriverBinding("virtio-pci", None)
    assert kernel.binding(SOUND) == DriverBinding("snd_hda_intel", None)
    assert read_ledger(state).unfinished == ()
    assert read_ledger(state).loans == {}


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_detach_of_what_was_on_loan_is_undone_for_the_same_card_only(
    quick_path: Path, exchanged: bool
) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    assert not run_and_die(kernel, state, decide_detach(kernel, state))
    # A boot gave the GPU back to its driver; it is still on loan, and taken again.
    kernel.set_override(GPU, None)
    kernel.unbind(GPU, "vfio-pci")
    kernel.probe(GPU)
    again = decide_detach(kernel, state)
    assert [type(action).__name__ for action in again.actions] == ["BindFunction"]
    before = kernel.tree()
    assert run_and_die(kernel, state, again, at=2)
    if exchanged:
        boot_with_a_disk_at(kernel, GPU)
        before = kernel.tree()
    recover_all(kernel, state)
    assert kernel.tree() == before
    assert read_ledger(state).unfinished == ()


def test_what_nothing_on_record_knows_is_not_touched(quick_path: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    assert not run_and_die(kernel, state, decide_detach(kernel, state))
    assert run_and_die(kernel, state, decide_attach(kernel, state), at=1)
    with Journal(state) as journal:
        journal.erase(GPU)
    before = {address: kernel.binding(address) for address in (GPU, SOUND)}
    recover_all(kernel, state)
    assert {address: kernel.binding(address) for address in (GPU, SOUND)} == before
    assert kernel.binding(BARE) == DriverBinding(None, None)


@pytest.mark.parametrize("gone", [BARE, GPU, SOUND], ids=str)
def test_an_attach_is_carried_on_without_what_is_gone(quick_path: Path, gone: PciAddress) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    home = {address: kernel.binding(address) for address in (BARE, GPU, SOUND)}
    assert not run_and_die(kernel, state, decide_detach(kernel, state))
    assert run_and_die(kernel, state, decide_attach(kernel, state), at=1)
    (kernel.root / f"sys/bus/pci/devices/{gone}").unlink()
    recover_all(kernel, state)
    del home[gone]
    assert {address: kernel.binding(address) for address in home} == home
    assert read_ledger(state).unfinished == ()
    assert read_ledger(state).loans == {}


def test_an_attach_carried_on_ends_though_a_function_stays(quick_path: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    at_home = kernel.tree()
    assert not run_and_die(kernel, state, decide_detach(kernel, state))
    assert run_and_die(kernel, state, decide_attach(kernel, state), at=1)
    # The first of all, so that the others are only reached by going on.
    kernel.faults = [Fault("unbind", str(BARE), errno.EBUSY)]
    with pytest.raises(Failed, match="EBUSY") as error:
        recover_all(kernel, state)
    assert "what is not back is still on loan" in error.value.details
    assert kernel.binding(GPU) == DriverBinding("bochs-drm", None)
    assert kernel.binding(SOUND) == DriverBinding("snd_hda_intel", None)
    # No other verb is held up by it, and attach tries again.
    assert read_ledger(state).unfinished == ()
    assert set(read_ledger(state).loans) == {BARE}
    kernel.faults = []
    assert not run_and_die(kernel, state, decide_attach(kernel, state))
    assert kernel.tree() == at_home
    assert read_ledger(state).loans == {}


def test_a_card_that_is_gone_does_not_keep_recover_from_ending(quick_path: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    plan = decide_detach(kernel, state)
    assert run_and_die(kernel, state, plan, at=len(plan.actions) * len(POINTS) - 2)
    (kernel.root / "sys/bus/pci/devices/0000:02:00.1").unlink()
    recover_all(kernel, state)
    assert read_ledger(state).unfinished == ()
    assert read_ledger(state).loans == {}


def test_orphan_overrides_are_cleared(quick_path: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    at_home = kernel.tree()
    sound, gpu = PciAddress.parse("02:00.1"), PciAddress.parse("02:00.0")
    kernel.set_override(sound, "vfio-pci")
    kernel.set_override(gpu, "vfio-pci")
    kernel.unbind(gpu, "bochs-drm")
    kernel.probe(gpu)
    assert kernel.binding(gpu) == DriverBinding("vfio-pci", "vfio-pci")
    state = quick_path / "state"
    plan = plan_release(read_host(kernel.root, whole=True), ledger=read_ledger(state), holders={})
    assert [action.why for action in plan.actions]
    with Journal(state) as journal:
        clean_up(plan, world=World(kernel, journal, quiet))
    assert kernel.tree() == at_home


def test_a_loan_whose_card_was_exchanged_is_forgotten(quick_path: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    state = quick_path / "state"
    assert not run_and_die(kernel, state, decide_detach(kernel, state))
    host = read_host(kernel.root, whole=True)
    assert plan_forget(host, loans=read_ledger(state).loans).actions == ()
    folder = kernel.root / "sys/bus/pci/devices/0000:02:00.0"
    (folder / "modalias").write_text(modalias("1002:744c", 0x030000, "0001:0002"))
    written = len(kernel.writes)
    plan = plan_forget(read_host(kernel.root, whole=True), loans=read_ledger(state).loans)
    assert [type(action).__name__ for action in plan.actions] == ["BindFunction", "EraseLoan"]
    with Journal(state) as journal:
        clean_up(plan, world=World(kernel, journal, quiet))
    assert all("02:00.0" not in path + word for path, word in kernel.writes[written:])
    assert kernel.binding(PciAddress.parse("02:00.1")) == DriverBinding("snd_hda_intel", None)
    assert set(read_ledger(state).loans) == {PciAddress.parse("01:00.0")}
