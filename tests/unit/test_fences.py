"""A fenced GPU is lent to nobody; one that does not come back from its guest is fenced."""

from __future__ import annotations

import errno
import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from clusters import BARE, GPU, SOUND, domain_of, node, spec_of, two_gpus, whole_cluster
from fakekernel import FakeKernel, Fault
from machines import emulated_host

from gpupt.actions import FenceGpu, JournalEntry, Plan, ResetGpu, UnfenceGpu
from gpupt.apply.execute import execute
from gpupt.apply.world import World
from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.decide.allocation import allocate
from gpupt.decide.binding import plan_detach
from gpupt.decide.inverse import inverse
from gpupt.decide.viability import Preflight, assess_lending
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.sysfs import read_host
from gpupt.errors import Failed, GpuptError, Refused
from gpupt.model.gpus import identity_of
from gpupt.model.host import Fence, Holder
from gpupt.model.pci import DriverBinding, PciAddress, PciId

NODES = {BARE: "compute-0", GPU: "compute-1"}


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return emulated_host(tmp_path / "machine")


@pytest.fixture
def live(tmp_path: Path, kernel: FakeKernel) -> Settings:
    return Settings(root=kernel.root, state=tmp_path / "state", kernel=lambda root: kernel)


def lend(live: Settings, kernel: FakeKernel) -> None:
    """Both GPUs are with nodes of a cluster."""
    host = read_host(kernel.root, whole=True)
    plan = plan_detach(host, gpus=list(NODES), loans={}, preflight=Preflight())
    with Journal(live.state) as journal:
        execute(plan, world=World(kernel, journal, lambda line: None))
        for loan in journal.ledger.loans.values():
            journal.record(replace(loan, cluster="herbarium", node=NODES[loan.gpu]))
    kernel.writes.clear()


def type_in(live: Settings, *words: str) -> Result:
    return CliRunner().invoke(cli, ["--connect", "test:///default", *words], obj=live)


def down(live: Settings) -> Result:
    return type_in(live, "down", "herbarium", "--yes")


def fence_on(kernel: FakeKernel, gpu: PciAddress = GPU) -> Fence:
    device = read_host(kernel.root).devices[gpu]
    return Fence(gpu, identity_of(device), "double-bit errors", "2026-01-01T00:00:00+00:00")


def resets(kernel: FakeKernel) -> list[str]:
    return [path for path, _ in kernel.writes if path.endswith("/reset")]


def test_what_a_guest_had_is_reset_and_given_back(live: Settings, kernel: FakeKernel) -> None:
    before = read_host(kernel.root, whole=True).devices
    lend(live, kernel)
    assert down(live).exit_code == 0
    assert resets(kernel) == [f"/sys/bus/pci/devices/{gpu}/reset" for gpu in (BARE, GPU)]
    # The reset comes before the host's driver has the card again.
    assert kernel.writes[0][0].endswith("/reset")
    assert read_host(kernel.root, whole=True).devices == before
    assert read_ledger(live.state).fences == {}


def test_what_the_host_or_another_guest_has_by_now_is_not_reset(
    live: Settings, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reboot gives the cards to the host's drivers, which work with them: a loan is no leave."""
    lend(live, kernel)
    for address, driver in ((GPU, "bochs-drm"), (SOUND, "snd_hda_intel")):
        kernel.set_override(address, None)
        kernel.unbind(address, "vfio-pci")
        kernel.bind(address, driver)
    kernel.writes.clear()
    assert down(live).exit_code == 0
    assert resets(kernel) == [f"/sys/bus/pci/devices/{BARE}/reset"]
    # Opened by another guest after the plan was made.
    host = read_host(kernel.root, whole=True)
    assert type_in(live, "detach", str(GPU), "--yes").exit_code == 0
    kernel.writes.clear()
    held = (Holder(4242, "qemu-system-x86", "/dev/vfio/13"),)
    monkeypatch.setattr(FakeKernel, "holders", lambda self, address: held)
    with Journal(live.state) as journal:
        reset = Plan("down", "herbarium", (ResetGpu(GPU, why=""),))
        execute(reset, world=World(kernel, journal, lambda line: None))
    assert (resets(kernel), read_ledger(live.state).fences) == ([], {})
    assert host.devices[GPU].binding.driver == "bochs-drm"


@pytest.mark.parametrize("known", [True, False])
def test_what_cannot_be_reset_is_given_back_all_the_same(
    live: Settings, kernel: FakeKernel, known: bool
) -> None:
    if known:
        # The emulated host's kernel names a way for such a card, and then has none.
        kernel.faults = [Fault("reset", str(GPU), errno.ENOTTY)]
    else:
        (kernel.root / f"sys/bus/pci/devices/{GPU}/reset").unlink()
    lend(live, kernel)
    assert down(live).exit_code == 0
    assert (f"/sys/bus/pci/devices/{GPU}/reset" in resets(kernel)) == known
    assert read_ledger(live.state).fences == {}
    assert kernel.binding(GPU) == DriverBinding("bochs-drm", None)


@pytest.mark.parametrize(
    ("effect", "word"),
    [
        ("lost", "fallen off the bus"),
        (errno.EIO, "refused reset"),
        ("stuck", "did not finish reset"),
    ],
)
def test_what_does_not_come_back_is_fenced(
    live: Settings, kernel: FakeKernel, effect: int | str, word: str
) -> None:
    lend(live, kernel)
    kernel.faults = [Fault("reset", str(GPU), effect)]
    done = down(live)
    assert isinstance(done.exception, Failed)
    assert f"{GPU} is fenced" in str(done.exception)
    ledger = read_ledger(live.state)
    assert list(ledger.fences) == [GPU]
    assert word in ledger.fences[GPU].reason
    # The other is home, and no run is left for recover.
    assert kernel.binding(BARE) == DriverBinding(None, None)
    assert BARE not in ledger.loans
    assert ledger.unfinished == ()
    # One that answers goes home, fenced; one that is lost stays on loan: where it came from is
    # still to be known.
    home = effect != "lost"
    assert (kernel.binding(GPU).driver == "bochs-drm") == home
    assert (GPU not in ledger.loans) == home
    said = json.loads(type_in(live, "status", "--json").stdout)
    assert [each["gpu"] for each in said["fences"]] == [str(GPU)]
    assert said["fences"][0]["stands"] is True
    again = type_in(live, "detach", str(GPU), "--yes")
    assert isinstance(again.exception, Refused)
    assert "it is fenced: after its guest" in str(again.exception)


def test_a_card_that_was_lost_goes_home_once_it_answers(live: Settings, kernel: FakeKernel) -> None:
    config = kernel.root / f"sys/bus/pci/devices/{GPU}/config"
    whole = config.read_bytes()
    lend(live, kernel)
    kernel.faults = [Fault("reset", str(GPU), "lost")]
    assert isinstance(down(live).exception, Failed)
    config.write_bytes(whole)
    kernel.faults = []
    assert type_in(live, "attach", str(GPU), "--yes").exit_code == 0
    assert kernel.binding(GPU) == DriverBinding("bochs-drm", None)
    assert kernel.binding(SOUND) == DriverBinding("snd_hda_intel", None)
    assert list(read_ledger(live.state).fences) == [GPU]
    assert type_in(live, "unfence", str(GPU), "--yes").exit_code == 0
    assert type_in(live, "detach", str(GPU), "--yes").exit_code == 0


def test_undoing_leaves_a_lost_card_alone_and_blocks_nothing(
    live: Settings, kernel: FakeKernel
) -> None:
    """A detach that fails because the card falls off the bus: the next verb is not refused."""

    def fall_off(point: str, action: Any) -> None:
        if point == "performed" and getattr(action, "address", None) == SOUND:
            kernel.lose(str(GPU))

    host = read_host(kernel.root, whole=True)
    plan = plan_detach(host, gpus=[GPU, BARE], loans={}, preflight=Preflight())
    with Journal(live.state) as journal, pytest.raises(Failed, match="fallen off the bus"):
        execute(plan, world=World(kernel, journal, lambda line: None, boundary=fall_off))
    ledger = read_ledger(live.state)
    assert ledger.unfinished == ()
    assert kernel.binding(SOUND) == DriverBinding("snd_hda_intel", None)
    assert list(ledger.loans) == [GPU]
    assert type_in(live, "detach", str(BARE), "--yes").exit_code == 0


def test_fence_and_unfence(live: Settings, kernel: FakeKernel) -> None:
    assert type_in(live, "fence", str(GPU), "--reason", "rma 4711", "--yes").exit_code == 0
    listed = {
        each["address"]: each for each in json.loads(type_in(live, "list", "--json").stdout)["gpus"]
    }
    assert listed[str(GPU)]["fenced"] == "rma 4711"
    assert listed[str(BARE)]["fenced"] is None
    assert "host, fenced" in type_in(live, "list").stdout
    assert "rma 4711" in type_in(live, "info", str(GPU)).stdout
    assert f"{GPU} is fenced since" in type_in(live, "status").stdout
    again = type_in(live, "fence", str(GPU), "--reason", "rma 4711", "--yes")
    assert "nothing to do" in again.stderr
    refused = type_in(live, "detach", str(GPU), "--yes")
    assert isinstance(refused.exception, Refused)
    assert "rma 4711" in str(refused.exception)
    left = type_in(live, "detach", "--all", "--dry-run")
    assert f"leaving {GPU}: it is fenced: rma 4711" in left.stderr
    assert type_in(live, "unfence", "--all", "--yes").exit_code == 0
    assert read_ledger(live.state).fences == {}
    assert type_in(live, "detach", str(GPU), "--dry-run").exit_code == 0


@pytest.mark.parametrize("reason", ["", "   ", "two\nlines", "x" * 201])
def test_a_reason_is_one_line(live: Settings, reason: str) -> None:
    done = type_in(live, "fence", str(GPU), "--reason", reason, "--yes")
    assert isinstance(done.exception, GpuptError)
    assert done.exception.exit_code == 2
    assert read_ledger(live.state).fences == {}


@pytest.mark.parametrize("verb", ["fence", "unfence"])
def test_what_is_no_gpu_is_refused(live: Settings, verb: str) -> None:
    more = ["--reason", "x"] if verb == "fence" else []
    done = type_in(live, verb, "0000:7f:00.0", *more, "--yes")
    assert isinstance(done.exception, GpuptError)
    assert done.exception.exit_code == 2


def test_a_fence_is_of_the_card_and_not_of_its_slot(kernel: FakeKernel) -> None:
    fence = fence_on(kernel)
    host = read_host(kernel.root, whole=True)
    gpu = next(each for each in host.gpus if each.address == GPU)
    found = assess_lending(host, gpu, loans={}, preflight=Preflight(fences={GPU: fence}))
    assert [each.id for each in found] == ["fenced"]
    other = replace(fence, identity=replace(fence.identity, id=PciId(0x10DE, 0x20B5)))
    assert assess_lending(host, gpu, loans={}, preflight=Preflight(fences={GPU: other})) == ()


def test_a_cluster_is_placed_elsewhere_or_refused(kernel: FakeKernel) -> None:
    host = read_host(kernel.root, whole=True)
    preflight = Preflight(fences={BARE: fence_on(kernel, BARE)})
    one = allocate(spec_of(node("compute-0", count=1)), host=host, preflight=preflight)
    assert [each.gpus for each in one.placements] == [(), (GPU,)]
    with pytest.raises(Refused, match="are left") as error:
        allocate(two_gpus(), host=host, preflight=preflight)
    assert "it is fenced: double-bit errors" in str(error.value)
    with pytest.raises(Refused, match="cannot be lent: it is fenced"):
        allocate(spec_of(node("compute-0", str(BARE))), host=host, preflight=preflight)


def test_a_node_keeps_what_was_fenced_while_it_runs_and_does_not_start_again(
    kernel: FakeKernel,
) -> None:
    host = read_host(kernel.root, whole=True)
    spec = two_gpus()
    allocation, around = whole_cluster(host, spec)
    preflight = Preflight(fences={GPU: fence_on(kernel)})
    kept = allocate(
        spec, host=around.host, loans=around.loans, domains=around.domains, preflight=preflight
    )
    assert kept == allocation
    stopped = tuple(domain_of(spec, each, running=False) for each in allocation.placements)
    with pytest.raises(Refused, match="of compute-1 is fenced"):
        allocate(spec, host=around.host, loans=around.loans, domains=stopped, preflight=preflight)


def test_fencing_is_undone_as_it_was_done(kernel: FakeKernel) -> None:
    fence = fence_on(kernel)
    old = replace(fence, reason="older")

    def back(action: FenceGpu | UnfenceGpu) -> Any:
        return inverse(JournalEntry(0, action, None, False))

    assert isinstance(back(FenceGpu(GPU, fence, None, why="")), UnfenceGpu)
    again = back(FenceGpu(GPU, fence, old, why=""))
    assert isinstance(again, FenceGpu)
    assert again.fence == old
    restored = back(UnfenceGpu(GPU, fence, why=""))
    assert isinstance(restored, FenceGpu)
    assert restored.fence == fence


def test_a_state_from_before_there_were_fences_is_read(live: Settings, kernel: FakeKernel) -> None:
    with Journal(live.state) as journal:
        journal.fence(fence_on(kernel))
    assert list(read_ledger(live.state).fences) == [GPU]
    with sqlite3.connect(live.state / "journal.sqlite") as connection:
        connection.execute("DROP TABLE fences")
    assert read_ledger(live.state).fences == {}
    with Journal(live.state) as journal:
        execute(
            Plan("fence", str(GPU), (FenceGpu(GPU, fence_on(kernel), None, why=""),)),
            world=World(kernel, journal, lambda line: None),
        )
        assert list(journal.ledger.fences) == [GPU]
