"""What is done to a card before it leaves its driver, and undone when it is back."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from clusters import BARE, BOOT
from fakekernel import FakeKernel, Fault
from machines import emulated_host

from gpupt.actions import Action, BindFunction, ReleaseFramebuffer, SetAttribute
from gpupt.apply.execute import execute
from gpupt.apply.world import World
from gpupt.decide.binding import plan_attach, plan_detach
from gpupt.decide.viability import Preflight
from gpupt.edges.display import read_display
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.sysfs import read_host
from gpupt.edges.tree import Reader
from gpupt.errors import Failed
from gpupt.model.host import Display
from gpupt.model.pci import PciAddress

CONSOLE = "sys/class/vtconsole/vtcon1/bind"
COLD = f"sys/bus/pci/devices/{BARE}/d3cold_allowed"


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """A host whose console draws on a framebuffer that the firmware set up."""
    kernel = emulated_host(tmp_path / "machine")
    for name, what, bind in (
        ("vtcon0", "(S) dummy device", "0"),
        ("vtcon1", "(M) frame buffer device", "1"),
    ):
        folder = kernel.root / f"sys/class/vtconsole/{name}"
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{what}\n")
        (folder / "bind").write_text(f"{bind}\n")
    driver = kernel.root / "sys/bus/platform/drivers/efi-framebuffer"
    driver.mkdir(parents=True)
    for name in ("bind", "unbind", "uevent", "module", "efi-framebuffer.0"):
        (driver / name).touch()
    return kernel


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def carry_out(kernel: FakeKernel, state: Path, verb: str, *gpus: PciAddress) -> list[Action]:
    host, loans = read_host(kernel.root, whole=True), read_ledger(state).loans
    display = read_display(Reader(kernel.root))
    preflight = Preflight(boot_gpu=True, display=display)
    plan = (
        plan_detach(host, gpus=gpus, loans=loans, preflight=preflight)
        if verb == "detach"
        else plan_attach(host, gpus=gpus, loans=loans)
    )
    with Journal(state) as journal:
        execute(plan, world=World(kernel, journal, lambda line: None))
    return list(plan.actions)


def holds(kernel: FakeKernel, path: str) -> str:
    return (kernel.root / path).read_text().strip()


def test_what_draws_on_the_display_is_read(kernel: FakeKernel) -> None:
    assert read_display(Reader(kernel.root)) == Display(
        (CONSOLE,), (("efi-framebuffer", "efi-framebuffer.0"),)
    )


def test_the_boot_gpu_goes_after_its_console_and_framebuffer(
    kernel: FakeKernel, state: Path
) -> None:
    actions = carry_out(kernel, state, "detach", BOOT)
    kinds = [type(action) for action in actions]
    assert kinds.index(SetAttribute) < kinds.index(ReleaseFramebuffer) < kinds.index(BindFunction)
    assert holds(kernel, CONSOLE) == "0"
    assert not (kernel.root / "sys/bus/platform/drivers/efi-framebuffer/efi-framebuffer.0").exists()
    assert kernel.binding(BOOT).driver == "vfio-pci"
    carry_out(kernel, state, "attach", BOOT)
    assert holds(kernel, CONSOLE) == "1"
    assert kernel.binding(BOOT).driver == "bochs-drm"
    assert read_ledger(state).loans == {}


def test_another_gpu_leaves_the_console_alone(kernel: FakeKernel, state: Path) -> None:
    actions = carry_out(kernel, state, "detach", BARE)
    assert not [action for action in actions if isinstance(action, ReleaseFramebuffer)]
    assert holds(kernel, CONSOLE) == "1"


def test_a_cards_power_is_not_cut_while_it_is_away(kernel: FakeKernel, state: Path) -> None:
    carry_out(kernel, state, "detach", BARE)
    assert holds(kernel, COLD) == "0"
    assert carry_out(kernel, state, "detach", BARE) == []
    carry_out(kernel, state, "attach", BARE)
    assert holds(kernel, COLD) == "1"


def test_after_a_reboot_it_is_seen_to_again(kernel: FakeKernel, state: Path) -> None:
    carry_out(kernel, state, "detach", BARE)
    (kernel.root / COLD).write_text("1\n")
    kernel.set_override(BARE, None)
    kernel.unbind(BARE, "vfio-pci")
    carry_out(kernel, state, "detach", BARE)
    assert holds(kernel, COLD) == "0"


def test_a_card_that_never_sleeps_is_not_written_to(kernel: FakeKernel, state: Path) -> None:
    (kernel.root / COLD).write_text("0\n")
    actions = carry_out(kernel, state, "detach", BARE)
    assert not [action for action in actions if isinstance(action, SetAttribute)]


@pytest.mark.parametrize("effect", [errno.EBUSY, "silent"])
def test_a_console_that_stays_undoes_all(
    kernel: FakeKernel, state: Path, effect: int | str
) -> None:
    before = kernel.tree()
    kernel.faults = [Fault("attribute", CONSOLE, effect)]
    with pytest.raises(Failed, match="EBUSY" if effect == errno.EBUSY else "does not become 0"):
        carry_out(kernel, state, "detach", BOOT)
    assert kernel.tree() == before
    assert (read_ledger(state).loans, read_ledger(state).unfinished) == ({}, ())


def test_the_loan_is_kept_until_the_attribute_is_back(kernel: FakeKernel, state: Path) -> None:
    carry_out(kernel, state, "detach", BARE)
    kernel.faults = [Fault("attribute", COLD, errno.EIO)]
    with pytest.raises(Failed, match="EIO") as error:
        carry_out(kernel, state, "attach", BARE)
    assert "is 0, was 1" in str(error.value) or BARE in read_ledger(state).loans
    kernel.faults = []
    carry_out(kernel, state, "attach", BARE)
    assert holds(kernel, COLD) == "1"
    assert read_ledger(state).loans == {}
