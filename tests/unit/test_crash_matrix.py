"""SIGKILL at every boundary of detach, attach, up and down; the next run puts all right.

A boundary is a point of an action (planned, intended, performed, done) at which the journal
or the world differs from the point before.  docs/failure-modes.md has the figures, and they
are held to what is counted here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from clusters import IMAGE, roll, two_gpus
from fakehypervisor import FakeHypervisor
from fakekernel import FakeKernel
from machines import MACHINES
from test_images import make_image
from test_recover import POINTS, decide_attach, decide_detach, killed, quiet

from gpupt.actions import Action, BakeImage, Plan
from gpupt.apply import cluster
from gpupt.apply.clusterworld import ClusterWorld
from gpupt.apply.execute import execute
from gpupt.apply.recover import recover
from gpupt.apply.world import World
from gpupt.decide.allocation import allocate
from gpupt.decide.cluster import Surroundings, plan_down, plan_up
from gpupt.edges.clusterfolder import ClusterFolder
from gpupt.edges.images import find_image
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.sysfs import read_host
from gpupt.model.roll import Check

PAGE = Path(__file__).resolve().parents[2] / "docs/failure-modes.md"
SPEC = two_gpus()
NAME = SPEC.name
PROOF = Check("workers", ("spark-ready",), ("frontend",), 120)
ROLLS = (roll("base"), roll("spark", checks=(PROOF,)))


@dataclass
class Site:
    """A machine, its state folder and its libvirt, all of it in one folder."""

    kernel: FakeKernel
    folder: Path

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def hypervisor(self) -> FakeHypervisor:
        return FakeHypervisor(self.folder / "libvirt")

    def world(self, journal: Journal, boundary: Callable[[str, Action], None]) -> World:
        def bake(action: BakeImage) -> None:
            if find_image(self.state, action.digest) is None:
                make_image(self.state, action.digest)

        ours = ClusterWorld(
            state=self.state,
            uri="fake:///",
            rolls={},
            bake=bake,
            accelerated=lambda: True,
            hypervisor_open=self.hypervisor,
        )
        return World(self.kernel, journal, quiet, ours, boundary)

    def around(self) -> Surroundings:
        folder = ClusterFolder(self.state, NAME)
        record = folder.read()
        return Surroundings(
            host=read_host(self.kernel.root, whole=True),
            loans=read_ledger(self.state).loans,
            domains=self.hypervisor.domains(),
            networks=self.hypervisor.networks(),
            has_folder=folder.exists,
            folder=record.allocation if record else None,
            image=IMAGE,
            has_image=find_image(self.state, IMAGE) is not None,
        )

    def decide(self, verb: str) -> Plan:
        if verb == "detach":
            return decide_detach(self.kernel, self.state)
        if verb == "attach":
            return decide_attach(self.kernel, self.state)
        around = self.around()
        if verb == "down":
            return plan_down(NAME, around=around)[0]
        allocation = allocate(SPEC, host=around.host, loans=around.loans, domains=around.domains)
        return plan_up(allocation, around=around, rolls=ROLLS)[0]

    def run(self, plan: Plan, *, boundary: Callable[[str, Action], None]) -> None:
        with Journal(self.state) as journal:
            execute(plan, world=self.world(journal, boundary))

    def run_and_die(self, plan: Plan, *, at: int) -> bool:
        """Carry the plan out in a process that SIGKILL ends at its ``at``-th boundary."""
        passed = count()

        def boundary(point: str, action: Action) -> None:
            if next(passed) == at:
                self.kernel.die()

        return killed(lambda: self.run(plan, boundary=boundary))

    def recover(self) -> None:
        with Journal(self.state) as journal:
            host = read_host(self.kernel.root, whole=True)
            for run in reversed(journal.ledger.unfinished):
                recover(run, host=host, world=self.world(journal, lambda point, action: None))

    def what_is(self) -> dict[str, object]:
        """Everything that a verb may change and that recovery has to put right."""
        ledger = read_ledger(self.state)
        return {
            "tree": self.kernel.tree(),
            "loans": dict(ledger.loans),
            "unfinished": ledger.unfinished,
            "domains": self.hypervisor.domains(),
            "networks": self.hypervisor.networks(),
            "cluster": ClusterFolder(self.state, NAME).exists,
        }

    def keep(self) -> Path:
        """A copy of everything, to start from again."""
        kept = self.folder.with_name("kept")
        shutil.rmtree(kept, ignore_errors=True)
        return Path(shutil.copytree(self.folder, kept, symlinks=True))

    def restore(self, kept: Path) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(kept, self.folder, symlinks=True)


@pytest.fixture
def guests_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes are there once they are started; a disk is a file."""
    monkeypatch.setattr(cluster, "await_node", lambda action, ours, *, narrate: None)
    monkeypatch.setattr(cluster, "await_roll", lambda action, ours, *, narrate: None)

    def make_disk(folder: ClusterFolder, node: str, **_: object) -> bool:
        folder.disk(node).write_text("an overlay")
        return True

    monkeypatch.setattr(ClusterFolder, "make_disk", make_disk)


def figures(verb: str, machine: str) -> tuple[int, int]:
    """What docs/failure-modes.md says: boundaries tried, and recovered."""
    row = re.search(rf"^\| `{verb}` \| {machine} \| (\d+) \| (\d+) \|", PAGE.read_text(), re.M)
    assert row, f"docs/failure-modes.md has no figures for {verb} on {machine}"
    return int(row[1]), int(row[2])


@pytest.mark.parametrize(
    ("verb", "machine"),
    [
        ("detach", "emulated_host"),
        ("detach", "laptop"),
        ("attach", "emulated_host"),
        ("attach", "laptop"),
        ("up", "emulated_host"),
        ("down", "emulated_host"),
    ],
)
def test_every_boundary_is_recovered(
    quick_path: Path,
    guests_answer: None,
    figure: Callable[[str], None],
    verb: str,
    machine: str,
) -> None:
    # QEMU's own user passes through to the nodes' disks.
    quick_path.chmod(0o755)
    site = Site(MACHINES[machine](quick_path / "site/machine"), quick_path / "site")
    at_home = site.what_is()
    before = {"attach": "detach", "down": "up"}.get(verb)
    if before is not None:
        site.run(site.decide(before), boundary=lambda point, action: None)
    assert (site.what_is() == at_home) == (before is None)
    kept = site.keep()
    boundaries = len(site.decide(verb).actions) * len(POINTS)
    recovered, not_recovered = 0, []
    for at in range(boundaries):
        assert site.run_and_die(site.decide(verb), at=at), f"{verb}: no boundary {at}"
        # The original state for what takes, the declared one for what gives back: home, both.
        site.recover()
        if site.what_is() == at_home:
            recovered += 1
        else:
            not_recovered.append(at)
        site.restore(kept)
    # There is no boundary after the last, and a run that is left alone comes to its end.
    assert not site.run_and_die(site.decide(verb), at=boundaries)
    assert not read_ledger(site.state).unfinished
    figure(f"crash matrix: {verb} on {machine}: {recovered} of {boundaries} boundaries")
    assert not_recovered == []
    assert figures(verb, machine) == (boundaries, recovered)
