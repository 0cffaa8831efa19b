"""What `down` says of the GPUs that it gave back: read back, never assumed."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from clusters import BARE, GPU, SOUND, two_gpus, whole_cluster
from fakekernel import FakeKernel, Fault
from machines import emulated_host

from gpupt.apply.execute import execute
from gpupt.apply.world import World
from gpupt.cli.cluster import read_back
from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.decide.allocation import allocate
from gpupt.decide.binding import plan_detach
from gpupt.decide.cluster import Surroundings, plan_down
from gpupt.decide.viability import Preflight
from gpupt.edges.bootrules import write_rule
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.sysfs import read_host
from gpupt.errors import GpuptError
from gpupt.model.host import Loan
from gpupt.model.pci import DriverBinding, PciAddress

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


def down(live: Settings, *words: str) -> tuple[int, dict[str, Any] | None]:
    """The exit status of `down --json`, and what it said."""
    argv = ["--connect", "test:///default", "--json", "down", "herbarium", "--yes", *words]
    result = CliRunner().invoke(cli, argv, obj=live)
    error = result.exception
    if error is not None and not isinstance(error, GpuptError | SystemExit):
        raise error
    status = error.exit_code if isinstance(error, GpuptError) else result.exit_code
    return status, json.loads(result.stdout) if result.stdout else None


def loans(live: Settings) -> dict[PciAddress, Loan]:
    return dict(read_ledger(live.state).loans)


def test_everything_is_back_and_a_second_time_there_is_nothing_to_do(
    live: Settings, kernel: FakeKernel
) -> None:
    before = kernel.tree()
    lend(live, kernel)
    status, said = down(live)
    assert (status, said and said["changed"], said and said["restored"]) == (0, True, True)
    assert kernel.tree() == before
    status, said = down(live)
    assert (status, said and said["changed"], said and said["restored"]) == (0, False, True)


def test_override_of_a_companion_is_read_back(live: Settings, kernel: FakeKernel) -> None:
    file = kernel.root / f"sys/bus/pci/devices/{SOUND}/driver_override"
    file.write_text("snd_hda_intel\n")
    before = kernel.tree()
    lend(live, kernel)
    status, said = down(live)
    assert kernel.tree() == before
    assert (status, said and said["restored"]) == (0, True)


def test_override_left_on_a_companion_is_seen(live: Settings, kernel: FakeKernel) -> None:
    host = read_host(kernel.root, whole=True)
    lend(live, kernel)
    lent = loans(live)
    around = Surroundings(host=host, loans=lent)
    with Journal(live.state) as journal:
        for gpu in lent:
            journal.erase(gpu)
    for address, driver in ((BARE, None), (GPU, "bochs-drm"), (SOUND, "snd_hda_intel")):
        kernel.set_override(address, None)
        kernel.unbind(address, "vfio-pci")
        if driver is not None:
            kernel.probe(address)
    assert read_back(live, lent, around=around, keep_detached=False, unrecorded=False)[1] is True
    kernel.set_override(SOUND, "vfio-pci")
    assert read_back(live, lent, around=around, keep_detached=False, unrecorded=False)[1] is False


def test_second_down_carries_on_where_the_first_failed(live: Settings, kernel: FakeKernel) -> None:
    before = kernel.tree()
    lend(live, kernel)
    kernel.faults = [Fault("unbind", str(GPU), errno.EBUSY)]
    assert down(live) == (1, None)
    assert loans(live)[GPU].node is None
    # Not yet either: it tries again, and does not say that all is well.
    assert down(live) == (1, None)
    assert kernel.binding(GPU).driver == "vfio-pci"
    kernel.faults = []
    status, said = down(live)
    assert (status, said and said["changed"], said and said["restored"]) == (0, True, True)
    assert kernel.tree() == before
    assert loans(live) == {}


def test_what_down_could_not_bring_home_can_be_attached_and_lent(
    live: Settings, kernel: FakeKernel
) -> None:
    before = kernel.tree()
    lend(live, kernel)
    kernel.faults = [Fault("unbind", str(GPU), errno.EBUSY, times=1)]
    assert down(live)[0] == 1
    host = read_host(kernel.root, whole=True)
    given = allocate(two_gpus(), host=host, loans=loans(live)).placements
    assert {gpu for each in given for gpu in each.gpus} == {BARE, GPU}
    done = CliRunner().invoke(cli, ["attach", "--all", "--yes"], obj=live)
    assert done.exit_code == 0, done.stderr
    assert kernel.tree() == before
    status, said = down(live)
    assert (status, said and said["restored"]) == (0, True)


def test_what_was_kept_detached_is_not_called_restored(live: Settings, kernel: FakeKernel) -> None:
    before = kernel.tree()
    lend(live, kernel)
    for changed in (True, False):
        status, said = down(live, "--keep-detached")
        assert (status, said and said["changed"], said and said["restored"]) == (0, changed, None)
    assert kernel.binding(GPU) == DriverBinding("vfio-pci", "vfio-pci")
    status, said = down(live)
    assert (status, said and said["changed"], said and said["restored"]) == (0, True, True)
    assert kernel.tree() == before


def test_what_is_persistent_stays_detached_and_is_nobodys(
    live: Settings, kernel: FakeKernel
) -> None:
    lend(live, kernel)
    write_rule(kernel.root, GPU, "# as detach --persist leaves it\n")
    status, said = down(live)
    assert (status, said and said["restored"]) == (0, True), "the other one is back"
    assert kernel.binding(GPU) == DriverBinding("vfio-pci", "vfio-pci")
    assert kernel.binding(BARE) == DriverBinding(None, None)
    assert {gpu: (loan.cluster, loan.node) for gpu, loan in loans(live).items()} == {
        GPU: (None, None)
    }
    # Nothing of the cluster is left for a second one to do.
    assert down(live)[0] == 0
    assert kernel.binding(GPU) == DriverBinding("vfio-pci", "vfio-pci")


def test_another_card_at_the_address_is_not_restored_the_second_time_either(
    live: Settings, kernel: FakeKernel
) -> None:
    lend(live, kernel)
    file = kernel.root / f"sys/bus/pci/devices/{GPU}/modalias"
    file.write_text(file.read_text().replace("1EB8", "20B5"))
    for changed in (True, False):
        status, said = down(live)
        assert (status, said and said["changed"], said and said["restored"]) == (1, changed, False)
    done = CliRunner().invoke(cli, ["recover", "--yes"], obj=live)
    assert done.exit_code == 0, done.stderr
    status, said = down(live)
    assert (status, said and said["restored"]) == (0, True)


@pytest.mark.parametrize("left", [(), (BARE,)])
def test_what_no_loan_knows_is_not_called_restored(
    live: Settings, kernel: FakeKernel, left: tuple[PciAddress, ...]
) -> None:
    host = read_host(kernel.root, whole=True)
    _, around = whole_cluster(host, two_gpus())
    lent = {gpu: around.loans[gpu] for gpu in left}
    _, findings = plan_down("herbarium", around=replace(around, loans=lent))
    assert {finding.id for finding in findings} == {"loan-missing"}
    assert read_back(live, lent, around=around, keep_detached=False, unrecorded=True)[1] is None
    kernel.set_override(BARE, "vfio-pci")
    seen = read_back(live, lent, around=around, keep_detached=False, unrecorded=True)[1]
    assert seen is (False if left else None)


@pytest.mark.parametrize("verb", [["show"], ["ssh"]])
def test_a_cluster_whose_folder_is_lost_is_not_denied(
    live: Settings, kernel: FakeKernel, verb: list[str]
) -> None:
    lend(live, kernel)
    words = [*verb, "herbarium", *(["frontend"] if verb == ["ssh"] else [])]
    done = CliRunner().invoke(cli, words, obj=live)
    assert "its folder is gone" in str(done.exception)
    assert "gpupt down herbarium takes it down" in str(done.exception)
