"""A loan that outlives a reboot: the rule, its way there and back, and every crash between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fakekernel import FakeKernel, modalias
from fakeudev import boot
from machines import MACHINES, emulated_host
from test_cli_host import Host
from test_recover import killed, quiet, recover_all, run_and_die

from gpupt.actions import PersistLoan, Plan, RecordLoan, UnpersistLoan
from gpupt.apply.execute import execute
from gpupt.apply.world import World
from gpupt.decide.binding import plan_attach, plan_detach, plan_forget
from gpupt.decide.persistence import plan_stray_rules, render_rule
from gpupt.decide.viability import Preflight
from gpupt.edges.bootrules import (
    read_boot_rules,
    read_persistent,
    remove_rule,
    rule_file,
    write_rule,
)
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.sysfs import read_host
from gpupt.errors import Failed, Refused
from gpupt.model.pci import DriverBinding, PciAddress

POINTS = ("planned", "intended", "performed", "done")
BARE, GPU, SOUND = (PciAddress.parse(text) for text in ("01:00.0", "02:00.0", "02:00.1"))
VFIO = DriverBinding("vfio-pci", "vfio-pci")


def with_udev(root: Path) -> None:
    """What a host has that can take cards at boot."""
    (root / "usr/lib/udev/rules.d").mkdir(parents=True)
    (root / "etc/udev/rules.d").mkdir(parents=True)
    (root / "etc/udev/rules.d/70-persistent-net.rules").write_text("# the admin's\n")


@pytest.fixture
def kernel(quick_path: Path) -> FakeKernel:
    kernel = emulated_host(quick_path / "machine")
    with_udev(kernel.root)
    return kernel


@pytest.fixture
def state(quick_path: Path) -> Path:
    return quick_path / "state"


def decide_detach(kernel: FakeKernel, state: Path, *gpus: PciAddress) -> Plan:
    host = read_host(kernel.root, whole=True)
    return plan_detach(
        host,
        gpus=gpus or (BARE, GPU),
        loans=read_ledger(state).loans,
        preflight=Preflight(),
        persist=read_boot_rules(kernel.root, host.devices),
    )


def decide_attach(kernel: FakeKernel, state: Path, *gpus: PciAddress) -> Plan:
    host = read_host(kernel.root, whole=True)
    rules = read_boot_rules(kernel.root)
    return plan_attach(host, gpus=gpus or (BARE, GPU), loans=read_ledger(state).loans, boot=rules)


def carry_out(kernel: FakeKernel, state: Path, plan: Plan) -> None:
    with Journal(state) as journal:
        execute(plan, world=World(kernel, journal, quiet))


def kinds(plan: Plan) -> list[str]:
    return [type(action).__name__ for action in plan.actions]


def bindings(kernel: FakeKernel) -> dict[PciAddress, DriverBinding]:
    return {address: kernel.binding(address) for address in (BARE, GPU, SOUND)}


def names(kernel: FakeKernel) -> list[str]:
    """What lies in the folder of the rules."""
    return sorted(os.listdir(kernel.root / "etc/udev/rules.d"))


# The rule


def test_the_rule(kernel: FakeKernel, state: Path, golden: Callable[[str, str], None]) -> None:
    plan = decide_detach(kernel, state, GPU)
    assert kinds(plan) == ["RecordLoan", "BindFunction", "BindFunction", "PersistLoan"]
    persist = plan.actions[-1]
    assert isinstance(persist, PersistLoan)
    assert persist.before is None
    golden("machines/boot-rule.rules", persist.rule)


def test_a_slot_that_is_not_known_is_refused(kernel: FakeKernel, state: Path) -> None:
    record = decide_detach(kernel, state, GPU).actions[0]
    assert isinstance(record, RecordLoan)
    with pytest.raises(Refused, match="its place on the bus is not known") as error:
        render_rule(GPU, record.origins, places={GPU: "/devices/pci0000:00/0000:02:00.0"})
    assert error.value.details == (f"{SOUND} is not in the tree of buses",)


# There and back, with boots between


@pytest.mark.parametrize("machine", MACHINES)
def test_over_a_reboot_and_back(quick_path: Path, state: Path, machine: str) -> None:
    kernel = MACHINES[machine](quick_path / machine)
    with_udev(kernel.root)
    boot(kernel)
    at_home = kernel.tree()
    gpus = [
        gpu.address for gpu in read_host(kernel.root, whole=True).gpus if not gpu.device.boot_vga
    ]
    carry_out(kernel, state, decide_detach(kernel, state, *gpus))
    detached = kernel.tree()
    assert read_persistent(kernel.root) == set(gpus)
    assert decide_detach(kernel, state, *gpus).actions == ()
    boot(kernel)
    assert kernel.tree() == detached
    assert decide_detach(kernel, state, *gpus).actions == ()
    carry_out(kernel, state, decide_attach(kernel, state, *gpus))
    assert decide_attach(kernel, state, *gpus).actions == ()
    assert kernel.tree() == at_home
    boot(kernel)
    assert kernel.tree() == at_home


def test_without_it_a_reboot_gives_the_card_back(kernel: FakeKernel, state: Path) -> None:
    host = read_host(kernel.root, whole=True)
    carry_out(kernel, state, plan_detach(host, gpus=[GPU], loans={}, preflight=Preflight()))
    boot(kernel)
    assert bindings(kernel)[GPU] == DriverBinding("bochs-drm", None)
    # The card is on loan all the same, and is taken again, for good this time.
    carry_out(kernel, state, decide_detach(kernel, state, GPU))
    boot(kernel)
    assert (bindings(kernel)[GPU], bindings(kernel)[SOUND]) == (VFIO, VFIO)
    assert names(kernel) == [f"10-gpupt-{GPU}.rules", "70-persistent-net.rules"]


def test_what_is_detached_already_is_made_persistent(kernel: FakeKernel, state: Path) -> None:
    host = read_host(kernel.root, whole=True)
    carry_out(kernel, state, plan_detach(host, gpus=[GPU], loans={}, preflight=Preflight()))
    written = len(kernel.writes)
    plan = decide_detach(kernel, state, GPU)
    assert kinds(plan) == ["PersistLoan"]
    carry_out(kernel, state, plan)
    assert kernel.writes[written:] == []
    assert kinds(decide_attach(kernel, state, GPU))[0] == "UnpersistLoan"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("vendor", "0x1002"),
        ("device", "0x1111"),
        ("class", "0x010802"),
        ("subsystem_vendor", "0x1af4"),
        ("subsystem_device", "0x0001"),
    ],
)
def test_another_card_is_not_taken(kernel: FakeKernel, state: Path, file: str, text: str) -> None:
    carry_out(kernel, state, decide_detach(kernel, state))
    (kernel.root / f"sys/bus/pci/devices/{GPU}/{file}").write_text(f"{text}\n")
    written = len(kernel.writes)
    boot(kernel)
    touched = [path for path, word in kernel.writes[written:] if f"{GPU}" in path + word]
    assert touched == ["/sys/bus/pci/drivers_probe"], "as for every function: by the boot itself"
    assert bindings(kernel)[GPU].override is None
    assert (bindings(kernel)[BARE], bindings(kernel)[SOUND]) == (VFIO, VFIO)


def test_a_twin_that_was_renumbered_is_not_taken(quick_path: Path, state: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    with_udev(kernel.root)
    carry_out(kernel, state, decide_detach(kernel, state, BARE))
    # The same ids at the same address, and in another slot: the bus got the twin's number.
    devices = kernel.root / "sys/devices"
    (devices / "pci0000:00/0000:00:02.0/").mkdir(exist_ok=True)
    (devices / f"pci0000:00/{BARE}").rename(devices / f"pci0000:00/0000:00:02.0/{BARE}")
    link = kernel.root / f"sys/bus/pci/devices/{BARE}"
    link.unlink()
    link.symlink_to(f"../../../devices/pci0000:00/0000:00:02.0/{BARE}")
    boot(kernel)
    assert kernel.binding(BARE) == DriverBinding(None, None)


@pytest.mark.parametrize("loadable", [True, False])
def test_vfio_pci_is_loaded_first(kernel: FakeKernel, state: Path, loadable: bool) -> None:
    boot(kernel)
    at_home = bindings(kernel)
    carry_out(kernel, state, decide_detach(kernel, state))
    shutil.rmtree(kernel.root / "sys/bus/pci/drivers/vfio-pci")
    kernel.loadable = {"vfio-pci"} if loadable else set()
    boot(kernel)
    # Without it, the card is left to the host, and not to nobody.
    assert bindings(kernel) == (dict.fromkeys(at_home, VFIO) if loadable else at_home)


# Crashes


def test_killed_at_every_boundary(kernel: FakeKernel, state: Path) -> None:
    at_home = kernel.tree()
    plan = decide_detach(kernel, state)
    for at in range(len(plan.actions) * len(POINTS)):
        assert run_and_die(kernel, state, plan, at=at), at
        recover_all(kernel, state)
        assert kernel.tree() == at_home, f"detach killed at boundary {at}"
        assert (read_ledger(state).loans, read_ledger(state).unfinished) == ({}, ())
    assert not run_and_die(kernel, state, plan)
    detached = kernel.tree()
    boundaries = len(decide_attach(kernel, state).actions) * len(POINTS)
    assert boundaries == 40
    for at in range(boundaries):
        assert run_and_die(kernel, state, decide_attach(kernel, state), at=at), at
        recover_all(kernel, state)
        assert kernel.tree() == at_home, f"attach killed at boundary {at}"
        assert read_ledger(state).loans == {}
        assert not run_and_die(kernel, state, decide_detach(kernel, state))
        assert kernel.tree() == detached


def test_a_power_cut_at_every_boundary(quick_path: Path, kernel: FakeKernel, state: Path) -> None:
    """The host boots before anybody recovers, and the rules are obeyed as they lie."""
    boot(kernel)
    at_home = kernel.tree()
    plan = decide_detach(kernel, state)
    for at in range(len(plan.actions) * len(POINTS)):
        assert run_and_die(kernel, state, plan, at=at), at
        boot(kernel)
        recover_all(kernel, state)
        assert kernel.tree() == at_home, f"detach cut at boundary {at}"
        assert (read_ledger(state).loans, read_ledger(state).unfinished) == ({}, ())
    assert not run_and_die(kernel, state, plan)
    for at in range(len(decide_attach(kernel, state).actions) * len(POINTS)):
        assert run_and_die(kernel, state, decide_attach(kernel, state), at=at), at
        boot(kernel)
        recover_all(kernel, state)
        assert kernel.tree() == at_home, f"attach cut at boundary {at}"
        assert read_ledger(state).loans == {}
        assert not run_and_die(kernel, state, decide_detach(kernel, state))


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace", "unlink"])
def test_killed_within_the_write(
    kernel: FakeKernel, state: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home = kernel.tree()
    plan = decide_detach(kernel, state)
    owner: object = os if call == "fsync" else Path

    def work() -> None:
        # In the child alone: the parent is not killed.
        monkeypatch.setattr(owner, call, lambda *words, **more: os.kill(os.getpid(), 9))
        with Journal(state) as journal:
            execute(plan, world=World(kernel, journal, quiet))

    with Journal(state):
        pass
    assert killed(work)
    recover_all(kernel, state)
    assert kernel.tree() == at_home
    assert read_ledger(state).unfinished == ()


def test_the_rule_that_was_there_comes_back(kernel: FakeKernel, state: Path) -> None:
    write_rule(kernel.root, GPU, "# of another gpupt\n")
    before = kernel.tree()
    plan = decide_detach(kernel, state)
    (persist,) = (a for a in plan.actions if isinstance(a, PersistLoan) and a.gpu == GPU)
    assert persist.before == "# of another gpupt\n"
    for at in range(len(plan.actions) * len(POINTS)):
        assert run_and_die(kernel, state, plan, at=at), at
        recover_all(kernel, state)
        assert kernel.tree() == before


def test_a_rule_that_cannot_be_removed_keeps_the_loan(kernel: FakeKernel, state: Path) -> None:
    carry_out(kernel, state, decide_detach(kernel, state, GPU))
    plan = decide_attach(kernel, state, GPU)
    rule_file(kernel.root, GPU).unlink()
    (rule_file(kernel.root, GPU) / "in the way").mkdir(parents=True)
    with pytest.raises(Failed, match="cannot be changed"):
        carry_out(kernel, state, plan)
    assert bindings(kernel)[GPU] == VFIO
    assert set(read_ledger(state).loans) == {GPU}
    assert read_ledger(state).unfinished == ()


# What recover clears


def test_a_rule_without_a_loan_is_removed(kernel: FakeKernel, state: Path) -> None:
    carry_out(kernel, state, decide_detach(kernel, state))
    rules = read_boot_rules(kernel.root)
    assert plan_stray_rules(read_ledger(state), boot=rules).actions == ()
    with Journal(state) as journal:
        journal.erase(GPU)
    plan = plan_stray_rules(read_ledger(state), boot=rules)
    assert [a.gpu for a in plan.actions if isinstance(a, UnpersistLoan)] == [GPU]


def test_recover_forgets_the_rule_of_an_exchanged_card(kernel: FakeKernel, state: Path) -> None:
    carry_out(kernel, state, decide_detach(kernel, state))
    (kernel.root / f"sys/bus/pci/devices/{GPU}/modalias").write_text(
        modalias("1002:744c", 0x030000, "0001:0002")
    )
    host, loans = read_host(kernel.root, whole=True), read_ledger(state).loans
    plan = plan_forget(host, loans=loans, boot=read_boot_rules(kernel.root))
    assert kinds(plan) == ["UnpersistLoan", "BindFunction", "EraseLoan"]


# Where nothing may be written


@pytest.mark.parametrize("verb", ["detach", "attach"])
def test_refused_before_anything_is_touched(kernel: FakeKernel, state: Path, verb: str) -> None:
    host = read_host(kernel.root, whole=True)
    boot_rules = read_boot_rules(kernel.root, host.devices)
    locked = replace(boot_rules, obstacle=("it is read-only", "mount it"))
    with pytest.raises(Refused, match="udev rules cannot be changed") as error:
        if verb == "detach":
            plan_detach(host, gpus=[GPU], loans={}, preflight=Preflight(), persist=locked)
        else:
            rules = replace(locked, rules={GPU: "…"})
            plan_attach(host, gpus=[GPU], loans={}, boot=rules)
    remedy = "mount it; or leave --persist out" if verb == "detach" else "mount it"
    assert (error.value.details, error.value.remedy) == (("it is read-only",), remedy)
    # Who has nothing to change there is not held up.
    assert plan_attach(host, gpus=[GPU], loans={}, boot=locked).actions == ()


def test_where_no_rule_can_be_written(kernel: FakeKernel, tmp_path: Path) -> None:
    assert read_boot_rules(kernel.root).obstacle is None
    (tmp_path / "none").mkdir()
    assert read_boot_rules(tmp_path / "none").udev is False
    (tmp_path / "none/lib/udev").mkdir(parents=True)
    found = read_boot_rules(tmp_path / "none")
    assert (found.udev, found.obstacle) == (True, None)
    (tmp_path / "none/etc").write_text("a file\n")
    why, _ = read_boot_rules(tmp_path / "none").obstacle or ("", "")
    assert "is no folder" in why


def test_nothing_outside_the_root_is_read_or_written(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"10-gpupt-{GPU}.rules").write_text("not ours\n")
    root = tmp_path / "root"
    (root / "usr/lib/udev").mkdir(parents=True)
    (root / "etc/udev").mkdir(parents=True)
    (root / "etc/udev/rules.d").symlink_to(outside)
    assert read_persistent(root) == frozenset()
    why, _ = read_boot_rules(root).obstacle or ("", "")
    assert "leads out of" in why
    for change in (lambda: write_rule(root, BARE, "…"), lambda: remove_rule(root, GPU)):
        with pytest.raises(Failed, match="leads out of"):
            change()
    assert os.listdir(outside) == [f"10-gpupt-{GPU}.rules"]


def test_a_link_in_the_place_of_a_rule_is_not_written_through(kernel: FakeKernel) -> None:
    # As an admin masks a rule.
    rule_file(kernel.root, GPU).symlink_to("/dev/null")
    with pytest.raises(Failed, match="cannot be changed"):
        write_rule(kernel.root, GPU, "…")
    assert rule_file(kernel.root, GPU).is_symlink()


# As it is typed


def test_as_it_is_typed(kernel: FakeKernel, golden: Callable[[str, str], None]) -> None:
    host = Host(kernel)
    status, result = host.type("detach", "--persist", "02:00.0", "--dry-run")
    assert status == 0
    golden("machines/detach-persist-dry-run.txt", result.stdout)
    assert names(kernel) == ["70-persistent-net.rules"]
    assert host.type("detach", "--persist", "02:00.0", "--yes")[0] == 0
    assert [gpu["persistent"] for gpu in host.data("list")["gpus"]] == [False, True, False]
    told = host.data("status")
    assert told["loans"][0]["persistent"] is True
    assert told["boot_rules"] == [{"gpu": str(GPU), "loan": True}]
    golden("machines/status-persistent.txt", host.type("status")[1].stdout)
    assert "detached, persistent" in host.type("list")[1].stdout
    assert "taken again by a udev rule" in host.type("info", "02:00.0")[1].stdout
    again = host.type("detach", "--persist", "02:00.0", "--yes")[1]
    assert "nothing to do" in again.stderr
    boot(kernel)
    assert host.data("list")["gpus"][1]["state"] == "detached"
    assert host.type("attach", "--all", "--yes")[0] == 0
    assert names(kernel) == ["70-persistent-net.rules"]
    assert host.data("list")["gpus"][1]["persistent"] is False


def test_recover_as_it_is_typed(kernel: FakeKernel) -> None:
    host = Host(kernel)
    boot(kernel)
    at_home = bindings(kernel)
    host.type("detach", "--persist", "02:00.0", "--yes")
    # The state is lost, and the host boots.
    for file in host.state.iterdir():
        file.unlink()
    boot(kernel)
    assert bindings(kernel)[GPU] == VFIO
    assert "though no loan explains it: 0000:02:00.0" in host.type("status")[1].stdout
    assert host.type("recover", "--yes")[0] == 0
    assert names(kernel) == ["70-persistent-net.rules"]
    assert bindings(kernel) == at_home


def test_a_host_without_udev_as_it_is_typed(quick_path: Path) -> None:
    kernel = emulated_host(quick_path / "machine")
    before = kernel.tree()
    status, result = Host(kernel).type("detach", "--persist", "02:00.0", "--yes")
    assert status == 3
    assert "no udev" in str(result.exception)
    assert kernel.tree() == before
    assert kernel.writes == []


def test_an_etc_that_cannot_be_written_as_it_is_typed(kernel: FakeKernel) -> None:
    shutil.rmtree(kernel.root / "etc/udev/rules.d")
    (kernel.root / "etc/udev/rules.d").write_text("no folder\n")
    before = kernel.tree()
    status, result = Host(kernel).type("detach", "--persist", "02:00.0", "--yes")
    assert status == 3
    assert "rules.d is no folder" in str(result.exception)
    assert (kernel.tree(), kernel.writes) == (before, [])
    assert Host(kernel).type("detach", "02:00.0", "--yes")[0] == 0


def test_a_rule_under_another_spelling_is_not_ours(kernel: FakeKernel) -> None:
    folder = kernel.root / "etc/udev/rules.d"
    for name in ("10-gpupt-02:00.0.rules", "10-gpupt-0000:02:00.9.rules", "10-gpupt-x.rules"):
        (folder / name).write_text("# not of our making\n")
    assert read_persistent(kernel.root) == frozenset()
