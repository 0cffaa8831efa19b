"""The gate around every loan: judged before a card leaves, in its node, and when it is back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from clusters import GPU, machine, node, spec_of
from fakekernel import FakeKernel
from fakenvml import CRASH, HANG, error
from healthhost import Machine, hear, some
from machines import emulated_host
from test_health_report import COUNT, card
from test_nodehealth import FAILED, HERE
from test_nvml import library  # noqa: F401 (a fixture)

from gpupt.actions import AwaitNode
from gpupt.apply.clusterworld import ClusterWorld
from gpupt.apply.host import check_gpu, fence_for
from gpupt.apply.waits import require_well
from gpupt.apply.world import World
from gpupt.cli import healthlook
from gpupt.cli.binding import ReturnCheck
from gpupt.decide.allocation import allocate
from gpupt.decide.facts import NodeFacts
from gpupt.decide.viability import about_health
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.process import Completed
from gpupt.edges.sysfs import read_host
from gpupt.errors import BadInput, Failed
from gpupt.model.cluster import Placement
from gpupt.model.health import CheckResult, GpuHealth, HealthReport, Verdict
from gpupt.model.pci import PciAddress
from gpupt.report.health import health_json

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

ONE, TWO = "0000:41:00.0", "0000:42:00.0"
SPEC = """\
cluster: herbarium
rolls: [spark]
nodes:
  - {name: frontend, role: frontend, cpus: 1, memory: 128 MiB}
  - {name: compute-0, role: compute, cpus: 1, memory: 128 MiB, gpus: 1}
"""


@pytest.fixture
def host(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:  # noqa: F811
    """A machine with two cards on NVIDIA's driver."""
    return hear(some(tmp_path, ONE, TWO), library, monkeypatch)


def driver(host: Machine, address: str) -> str | None:
    return host.kernel.driver_of(address)


# Before a loan


@needs_compiler
def test_a_card_that_fails_a_check_is_not_detached(host: Machine) -> None:
    host.let(ONE, remapped=(0, 1, 0, 1))
    before = host.kernel.tree()
    status, said = host.type("detach", ONE, TWO, "--yes")
    assert status == 3
    assert f"{ONE} cannot be detached: it is not well" in str(said.exception)
    assert f"{ONE}: remap_failure: " in str(said.exception)
    assert "--unhealthy" in str(said.exception)
    assert (host.kernel.tree(), host.kernel.writes) == (before, [])
    assert read_ledger(host.state).loans == {}
    # Nor is it fenced: nobody has had it since it was well.
    assert read_ledger(host.state).fences == {}


@needs_compiler
def test_the_others_are_lent_all_the_same(host: Machine) -> None:
    host.let(ONE, ecc_volatile=(0, 1))
    assert host.type("detach", TWO, "--yes")[0] == 0
    assert (driver(host, ONE), driver(host, TWO)) == ("nvidia", "vfio-pci")
    assert host.type("attach", TWO, "--yes")[0] == 0
    status, said = host.type("detach", "--all", "--yes")
    assert status == 0
    assert f"leaving {ONE}: it is not well" in said.stderr
    assert (driver(host, ONE), driver(host, TWO)) == ("nvidia", "vfio-pci")


@needs_compiler
def test_unhealthy_takes_it_and_does_not_ask(
    host: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.let(ONE, ecc_volatile=(0, 1))

    def asked(*given: Any, **more: Any) -> None:
        raise AssertionError("it was asked")

    monkeypatch.setattr(healthlook, "look", asked)
    assert host.type("detach", ONE, "--unhealthy", "--yes")[0] == 0
    assert driver(host, ONE) == "vfio-pci"


@needs_compiler
@pytest.mark.parametrize(
    "changes", [{"init": error(18)}, {"init": CRASH}, {"init": HANG}, {"driver": HANG}]
)
def test_a_library_that_does_not_serve_keeps_every_card(
    host: Machine, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(healthlook, "NVML_SECONDS", 1.5)
    host.play(**changes)
    status, said = host.type("detach", "--all", "--yes")
    assert status == 3
    assert "no GPU can be detached" in str(said.exception)
    assert host.kernel.writes == []


@needs_compiler
def test_a_process_on_the_card_keeps_it(host: Machine) -> None:
    host.let(ONE, compute=(4711,))
    assert host.type("health")[0] == 0
    status, said = host.type("detach", ONE, "--yes")
    assert (status, "processes use it: 4711" in str(said.exception)) == (3, True)
    host.let(ONE, compute=0)
    assert host.type("detach", ONE, "--yes")[0] == 0


@needs_compiler
def test_rules_that_are_none_lend_nothing(host: Machine) -> None:
    host.rules("expect: {cuont: 8}\n")
    status, said = host.type("detach", ONE, "--yes")
    assert (status, "health.yaml:1:10" in str(said.exception)) == (2, True)
    assert host.kernel.writes == []
    # How many there are to be is of no one card.
    host.rules("expect: {count: 8}\n")
    assert host.type("detach", ONE, "--yes")[0] == 0


@needs_compiler
def test_a_second_detach_asks_nothing(host: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[set[PciAddress]] = []
    really = healthlook.look

    def look(settings: Any, *, lending: bool, only: set[PciAddress]) -> Any:
        looks.append(only)
        return really(settings, lending=lending, only=only)

    monkeypatch.setattr(healthlook, "look", look)
    assert host.type("detach", ONE, "--yes")[0] == 0
    # A plan is decided again under the lock: the cards are looked at once.
    assert looks == [{PciAddress.parse(ONE)}]
    status, said = host.type("detach", ONE, "--yes")
    assert (status, "nothing to do" in said.stderr) == (0, True)
    assert len(looks) == 1
    # On its return it is looked at again.
    assert host.type("attach", ONE, "--yes")[0] == 0
    assert looks[1:] == [{PciAddress.parse(ONE)}]


@needs_compiler
def test_a_look_at_one_card_forgets_no_other_s_replays(host: Machine) -> None:
    host.type("health")
    file = host.state / "replays.json"
    kept = json.loads(file.read_text())
    assert set(kept["replays"]) == {ONE, TWO}
    # So old that a look at all of them would renew it.
    file.write_text(json.dumps({**kept, "at": kept["at"] - 3600}))
    assert host.type("detach", ONE, "--yes")[0] == 0
    assert set(json.loads(file.read_text())["replays"]) == {ONE, TWO}


@needs_compiler
def test_up_places_its_nodes_on_what_is_well(host: Machine, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(SPEC)

    def lent(*words: str) -> set[str]:
        status, said = host.type("plan", str(file), "--json", *words)
        assert status == 0, said.stderr
        actions = json.loads(said.stdout)["actions"]
        return {each["subject"] for each in actions if each["kind"] == "BindFunction"}

    assert lent() == {ONE}
    host.let(ONE, remapped=(0, 1, 0, 1))
    assert lent() == {TWO}
    host.let(TWO, error=15)
    status, said = host.type("plan", str(file))
    assert status == 3
    assert f"{ONE}: " in str(said.exception)
    assert "it is not well" in str(said.exception)
    # One that is named is refused by its own reason.
    file.write_text(SPEC.replace("gpus: 1", f'gpus: ["{ONE}"]'))
    status, said = host.type("plan", str(file))
    assert (status, "it is not well" in str(said.exception)) == (3, True)


def test_each_cause_is_one_reason() -> None:
    gpu = next(each for each in machine("emulated_host").gpus if each.address == GPU)
    lost = [replace(FAILED, id=name, brief="the card is lost") for name in ("gpu_lost", "xid")]
    found = list(about_health(gpu, GpuHealth(GPU, None, None, None, (COUNT, *lost, FAILED))))
    assert [finding.evidence for finding in found] == [
        ("gpu_lost: the card is lost",),
        (f"remap_failure: {FAILED.brief}",),
    ]
    assert {finding.id for finding in found} == {"unhealthy"}
    assert list(about_health(gpu, None)) == []
    assert list(about_health(gpu, GpuHealth(GPU, None, None, None, (COUNT,)))) == []


# On its return


@needs_compiler
def test_a_card_that_comes_back_ill_is_fenced(host: Machine) -> None:
    assert host.type("detach", ONE, TWO, "--yes")[0] == 0
    host.let(ONE, ecc_volatile=(0, 3))
    status, said = host.type("attach", "--all", "--yes")
    assert status == 0
    assert f"{ONE} is fenced: its health: ecc_uncorrected: " in said.stderr
    # It is home all the same, and so is the other.
    assert (driver(host, ONE), driver(host, TWO)) == ("nvidia", "nvidia")
    ledger = read_ledger(host.state)
    assert (list(map(str, ledger.fences)), ledger.loans) == ([ONE], {})
    shown = host.type("status")[1].stdout
    assert f"{ONE} is fenced since" in shown
    assert "ecc_uncorrected" in shown
    # Well or not: a person says when it is mended.
    host.let(ONE, ecc_volatile=(0, 0))
    status, said = host.type("detach", ONE, "--yes")
    assert (status, "it is fenced" in str(said.exception)) == (3, True)
    assert host.type("unfence", ONE, "--yes")[0] == 0
    assert host.type("detach", ONE, "--yes")[0] == 0


@needs_compiler
@pytest.mark.parametrize(
    ("card_says", "library_says"),
    [
        ({"compute": (4711,)}, {}),
        # It waits for a reset, which the next loan begins with: then it is refused, if it must be.
        ({"remapped": (1, 0, 1, 0)}, {}),
        ({"temperature_margin": 5}, {}),
        # What is installed is the fault of no card.
        ({}, {"init": error(18)}),
        ({}, {"init": error(9)}),
    ],
)
def test_what_is_no_fault_of_the_card_fences_nothing(
    host: Machine, card_says: dict[str, Any], library_says: dict[str, Any]
) -> None:
    assert host.type("detach", ONE, "--yes")[0] == 0
    host.let(ONE, **card_says)
    host.play(**library_says)
    status, said = host.type("attach", ONE, "--yes")
    assert (status, "fenced" in said.stderr) == (0, False)
    assert read_ledger(host.state).fences == {}


@needs_compiler
def test_a_card_whose_driver_hangs_on_its_return_is_fenced(
    host: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healthlook, "NVML_SECONDS", 1.5)
    assert host.type("detach", ONE, "--yes")[0] == 0
    host.let(ONE, name=HANG)
    assert host.type("attach", ONE, "--yes")[0] == 0
    assert list(map(str, read_ledger(host.state).fences)) == [ONE]


@needs_compiler
def test_a_card_that_cannot_be_judged_on_its_return_is_home_and_that_is_said(
    host: Machine,
) -> None:
    assert host.type("detach", ONE, "--yes")[0] == 0
    host.rules("expect: {cuont: 8}\n")
    status, said = host.type("attach", ONE, "--yes")
    assert status == 1
    assert f"{ONE} is back, and its health could not be checked" in str(said.exception)
    assert driver(host, ONE) == "nvidia"
    assert read_ledger(host.state).loans == {}
    # It is lent to nobody until it can be judged.
    assert host.type("detach", ONE, "--yes")[0] == 2


@pytest.fixture
def world(tmp_path: Path) -> Any:
    kernel = emulated_host(tmp_path / "machine")
    with Journal(tmp_path / "state") as journal:
        yield World(kernel, journal, lambda line: None)


def test_more_that_fails_is_more_evidence_of_one_fence(world: World) -> None:
    other = replace(FAILED, id="xid", brief="Xid 79")
    for check in (FAILED, other, other):
        fence_for(GPU, check, world=world)
    fence = world.journal.ledger.fences[GPU]
    assert fence.reason == f"its health: remap_failure: {FAILED.brief}"
    assert fence.evidence == (f"remap_failure: {FAILED.brief}", "xid: Xid 79")
    # A slot without a card has nothing to be fenced.
    fence_for(PciAddress.parse("0000:7f:00.0"), FAILED, world=world)
    assert list(world.journal.ledger.fences) == [GPU]


def test_a_world_in_which_nobody_knows_health_fences_nothing(world: World) -> None:
    said: list[str] = []
    check_gpu(GPU, replace(world, narrate=said.append))
    assert said == [f"{GPU}: its health is not checked"]
    assert world.journal.ledger.fences == {}

    def refuse(gpu: PciAddress) -> GpuHealth | None:
        raise BadInput("unknown key 'cuont'", details="at health.yaml:1:1")

    with pytest.raises(Failed, match="is back, and its health could not be checked: unknown key"):
        check_gpu(GPU, replace(world, health=refuse))


# In the node


class Sick:
    """A connection to a node whose gpupt says this."""

    name = "compute-0"

    def __init__(self, said: str) -> None:
        self.said = said
        self.asked = 0

    def run(self, argv: Any, **_: Any) -> Completed:
        status = 2 if argv[0] == "env" else 0
        self.asked += argv[0] == "env"
        return Completed(tuple(argv), status, self.said if argv[0] == "env" else "", "")

    def close(self) -> None:
        """There is nothing open."""


def placement() -> Placement:
    return allocate(spec_of(node("c", count=2)), host=machine("emulated_host")).of("c")


def node_says(*checks: tuple[CheckResult, ...], machine: tuple[CheckResult, ...] = ()) -> Sick:
    cards = tuple(card(*each, address=at) for each, at in zip(checks, HERE, strict=False))
    return Sick(json.dumps(health_json(HealthReport(cards, machine))))


def wait_for(
    world: World, ssh: Sick, folder: Path, *, nvml: bool = True, unhealthy: bool = False
) -> list[str]:
    """What is narrated of a node that is waited for; raises Failed."""
    ours = ClusterWorld(
        state=folder, uri="", rolls={}, bake=print, accelerated=lambda: True, unhealthy=unhealthy
    )
    ours.connections[("herbarium", "c")] = ssh  # type: ignore[assignment]
    ours.facts["c"] = NodeFacts("c", "compute", "herbarium", (), True, True, "", (), nvml)
    said: list[str] = []
    action = AwaitNode("herbarium", placement(), deadline=1, why="")
    fence = partial(fence_for, world=world)
    require_well(action, ours, fence=fence, narrate=said.append)
    return said


def test_a_node_whose_cards_are_well_is_ready(world: World, tmp_path: Path) -> None:
    ssh = node_says((COUNT,), (COUNT,))
    assert wait_for(world, ssh, tmp_path) == ["c: its 2 GPUs are well"]
    assert world.journal.ledger.fences == {}


def test_a_node_whose_card_is_ill_is_not_and_that_card_is_fenced(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(Failed, match="a GPU of c is not well") as caught:
        wait_for(world, node_says((COUNT,), (FAILED,)), tmp_path)
    assert caught.value.details == (f"{GPU}: remap_failure: {FAILED.brief}",)
    assert "up again" in caught.value.remedy
    # By the host's address, and no other.
    assert list(world.journal.ledger.fences) == [GPU]


def test_what_is_installed_in_a_node_is_the_fault_of_no_card(world: World, tmp_path: Path) -> None:
    wrong = CheckResult(
        "nvml", Verdict.FAIL, "NVML is mismatch", value="mismatch", remedy="modprobe nvidia"
    )
    with pytest.raises(Failed, match="NVML is mismatch") as caught:
        wait_for(world, node_says((COUNT,), (COUNT,), machine=(wrong,)), tmp_path)
    assert caught.value.remedy == "modprobe nvidia"
    assert world.journal.ledger.fences == {}
    hung = replace(wrong, value="timeout", brief="NVML is timeout")
    with pytest.raises(Failed, match="NVML is timeout"):
        wait_for(world, node_says((COUNT,), (COUNT,), machine=(hung,)), tmp_path)
    # A library that hangs keeps the node back, and accuses no card by itself.
    assert world.journal.ledger.fences == {}
    odd = replace(wrong, status=Verdict.UNSUPPORTED, value="no-driver", brief="no driver")
    with pytest.raises(Failed, match="no driver"):
        wait_for(world, node_says((COUNT,), (COUNT,), machine=(odd,)), tmp_path)


def test_what_works_on_a_node_s_cards_is_its_own_affair(world: World, tmp_path: Path) -> None:
    busy = CheckResult("processes", Verdict.FAIL, "processes use it: 7")
    assert wait_for(world, node_says((busy,), (COUNT,)), tmp_path)


def test_a_node_that_says_nonsense_is_not_ready(world: World, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="did not say how its GPUs are"):
        wait_for(world, Sick("Segmentation fault"), tmp_path)
    assert world.journal.ledger.fences == {}


def test_a_node_is_not_asked_what_it_cannot_know_or_need_not_say(
    world: World, tmp_path: Path
) -> None:
    ssh = node_says((FAILED,), (FAILED,))
    assert wait_for(world, ssh, tmp_path, nvml=False) == []
    assert wait_for(world, ssh, tmp_path, unhealthy=True) == []
    assert ssh.asked == 0


def test_a_gate_knows_cards_that_are_with_guests_only_by_their_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpupt.cli.binding import Gate
    from gpupt.cli.context import Settings

    kernel: FakeKernel = emulated_host(tmp_path / "machine")
    settings = Settings(root=kernel.root, state=tmp_path / "state", kernel=lambda root: kernel)
    asked: list[set[PciAddress]] = []

    def gate(settings: Settings, gpus: set[PciAddress], *, lending: bool) -> dict[Any, Any]:
        asked.append(gpus)
        assert lending
        return {}

    monkeypatch.setattr(healthlook, "gate", gate)
    host = read_host(kernel.root)
    Gate(settings)(host, {GPU})
    assert asked == [{GPU}]
    Gate(settings, wanted=False)(host, {GPU})
    assert len(asked) == 1


@needs_compiler
def test_a_host_with_the_driver_alone_lends_by_what_sysfs_and_the_log_say(
    host: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(empty))
    status, said = host.type("detach", ONE, "--yes")
    assert status == 0, said.exception
    assert "NVIDIA's library is not installed" in said.stderr
    assert host.type("attach", ONE, "--yes")[0] == 0
    assert read_ledger(host.state).fences == {}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Which cards each look was at."""
    looks: list[set[str]] = []
    real = healthlook.gate

    def look(settings: Any, gpus: Any, **more: Any) -> Any:
        looks.append({str(gpu) for gpu in gpus})
        return real(settings, gpus, **more)

    monkeypatch.setattr(healthlook, "gate", look)
    return looks


@needs_compiler
def test_cards_that_come_back_together_are_looked_at_together(
    host: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.type("detach", "--all", "--yes")[0] == 0
    host.let(TWO, remapped=(1, 1, 0, 1))
    looks = counted(monkeypatch)
    assert host.type("attach", "--all", "--yes")[0] == 0
    assert looks == [{ONE, TWO}]
    assert list(map(str, read_ledger(host.state).fences)) == [TWO]


@needs_compiler
def test_a_look_from_before_a_card_came_back_is_not_used(
    host: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = ReturnCheck(host.settings)
    one, two = PciAddress.parse(ONE), PciAddress.parse(TWO)
    assert host.type("detach", "--all", "--yes")[0] == 0
    looks = counted(monkeypatch)
    # Both have their loans still, and one is on its driver; then the other is, too.
    for address in (ONE, TWO):
        (host.kernel.root / f"sys/bus/pci/devices/{address}/driver").unlink()
        host.kernel.attach(address, "nvidia")
        assert check(PciAddress.parse(address)) is not None
    assert looks == [{ONE}, {ONE, TWO}]
    assert check(one) is not None
    assert looks == [{ONE}, {ONE, TWO}]
    host.let(TWO, remapped=(1, 1, 0, 1))
    found = check(two)
    assert found is not None
    assert (found.status, looks[2:]) == (Verdict.FAIL, [{ONE, TWO}])
    # The same card again is looked at again.
    host.let(TWO, remapped=(0, 0, 0, 0))
    again = check(two)
    assert again is not None
    assert again.status is not Verdict.FAIL
    assert len(looks) == 4
