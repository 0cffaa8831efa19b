"""Verbs that move GPUs: detach, attach, recover."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from gpupt.actions import Ledger, Plan, Run
from gpupt.apply.host import is_host_action
from gpupt.apply.world import World
from gpupt.cli.context import Settings, changing, common, consent, plan_json, require_live
from gpupt.cli.naming import named_gpu
from gpupt.decide.binding import Loans, choose_all, plan_attach, plan_detach
from gpupt.decide.viability import Preflight, closure
from gpupt.edges.bootrules import read_boot_rules
from gpupt.edges.display import read_display
from gpupt.edges.holders import holders_of, read_holders, vfio_to_be_had
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.kernel import Kernel
from gpupt.edges.sysfs import read_host
from gpupt.edges.tree import Reader
from gpupt.errors import BadInput, Failed, Refused
from gpupt.model.gpus import VFIO
from gpupt.model.health import GpuHealth
from gpupt.model.host import Fence, Finding, Host, Severity
from gpupt.model.pci import PciAddress
from gpupt.report.cluster import finding_json


@click.command()
@click.argument("gpus", nargs=-1, metavar="GPU...")
@click.option("--all", "everything", is_flag=True, help="Every GPU that can be taken.")
@click.option("--boot-gpu", is_flag=True, help="Allow the GPU of the boot display too.")
@click.option("--persist", is_flag=True, help="Keep them detached over reboots.")
@click.option("--unhealthy", is_flag=True, help="Take them though they fail health checks.")
@changing
@common
def detach(
    settings: Settings,
    *,
    gpus: tuple[str, ...],
    everything: bool,
    boot_gpu: bool,
    persist: bool,
    unhealthy: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Take GPUs from the host, for guests.

    A GPU goes with its whole IOMMU group and all functions of its card, to vfio-pci.  Where
    each function came from is written down first; `gpupt attach` restores exactly that.
    Refused (exit 3, nothing touched) when a disk or network card of the host would go
    along, when a process holds the GPU, when it fails its health checks or is fenced, or when
    it is the boot display.

    A reboot gives the GPUs back to the host's drivers.  With --persist a udev rule takes them
    again at boot, each only in the slot where it is and while it is the same card;
    `gpupt attach` removes the rule.  Give it for GPUs that are detached already, too.

    \b
    Examples:
      gpupt detach 41:00.0 --dry-run      show what would be done
      gpupt detach 41:00.0 42:00.0        take two GPUs
      gpupt detach --all --yes            take all that can be taken, without asking
      gpupt detach --persist 41:00.0      take it, and again at every boot
    """
    require_one_of(gpus, everything, verb="detach", remedy="gpupt list shows them")
    wanted = tuple(named_gpu(text, state=settings.state) for text in gpus)

    leaving = Leaving(settings)
    health_of = Gate(settings, wanted=not unhealthy)

    def decide(host: Host, ledger: Ledger) -> Plan:
        preflight = read_preflight(
            settings,
            host,
            boot_gpu=boot_gpu,
            fences=ledger.fences,
            health=health_of(host, None if everything else wanted),
        )
        chosen = wanted
        if everything:
            chosen, left = choose_all(host, loans=ledger.loans, preflight=preflight)
            if not chosen:
                raise none_left(left)
            leaving(left)
        return plan_detach(
            host,
            gpus=chosen,
            loans=ledger.loans,
            preflight=preflight,
            persist=read_boot_rules(settings.root, host.devices) if persist else None,
        )

    change(settings, decide, dry_run=dry_run, yes=yes, leaving=leaving)


@click.command()
@click.argument("gpus", nargs=-1, metavar="GPU...")
@click.option("--all", "everything", is_flag=True, help="Every GPU that is on loan.")
@changing
@common
def attach(
    settings: Settings, *, gpus: tuple[str, ...], everything: bool, dry_run: bool, yes: bool
) -> None:
    """Give GPUs back to the host, to the drivers they came from.

    Every function returns to the driver and the driver_override recorded when it was
    detached, and that is verified.  A GPU that a node has is refused: take its cluster down.
    What was detached with --persist is not taken at boot any more.

    \b
    Examples:
      gpupt attach 41:00.0
      gpupt attach --all --yes
    """
    require_one_of(gpus, everything, verb="attach", remedy="gpupt status shows them")
    wanted = tuple(named_gpu(text, state=settings.state) for text in gpus)

    leaving = Leaving(settings)

    def decide(host: Host, ledger: Ledger) -> Plan:
        chosen = wanted
        if everything:
            chosen, staying = free_loans(ledger.loans)
            leaving(staying)
        boot = read_boot_rules(settings.root)
        holders = holders_of(
            settings.root, host, {gpu: ledger.loans[gpu] for gpu in chosen if gpu in ledger.loans}
        )
        return plan_attach(host, gpus=chosen, loans=ledger.loans, boot=boot, holders=holders)

    change(settings, decide, dry_run=dry_run, yes=yes, leaving=leaving)


def require_one_of(gpus: tuple[str, ...], everything: bool, *, verb: str, remedy: str) -> None:
    """Raise BadInput unless GPUs are named, or --all is given, and not both."""
    if everything and gpus:
        raise BadInput(
            f"name the GPUs to {verb}, or give --all: not both",
            details=f"--all, and {' '.join(gpus)}",
            remedy="leave one of them out",
        )
    if not everything and not gpus:
        raise BadInput(f"name the GPUs to {verb}, or give --all", remedy=remedy)


def none_left(left: Iterable[tuple[PciAddress, str]]) -> Refused:
    """The error when ``detach --all`` finds no GPU that it may take."""
    why = tuple(f"{address}: {reason}" for address, reason in left)
    return Refused(
        "no GPU can be detached",
        details=why or "this host has no GPU: no PCI function of a display's class",
        remedy="gpupt info GPU says what can be done about each"
        if why
        else "gpupt lab up boots an emulated host that has some",
    )


def free_loans(
    loans: Loans,
) -> tuple[tuple[PciAddress, ...], list[tuple[PciAddress, str]]]:
    """The GPUs that ``attach --all`` gives back, and those that stay with their nodes."""
    lent = [loan for loan in loans.values() if loan.node is not None]
    return (
        tuple(loan.gpu for loan in loans.values() if loan.node is None),
        [(loan.gpu, f"lent to {loan.cluster}/{loan.node}") for loan in lent],
    )


class Leaving:
    """The GPUs that ``--all`` leaves where they are, and why: said once, though a plan is
    decided again under the lock, and among the plan's findings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.left: dict[PciAddress, str] = {}

    def __call__(self, left: Iterable[tuple[PciAddress, str]]) -> None:
        for gpu, why in left:
            if self.left.get(gpu) != why:
                self.left[gpu] = why
                self.settings.say(f"leaving {gpu}: {why}")

    @property
    def findings(self) -> list[dict[str, Any]]:
        return [
            finding_json(Finding("left", Severity.INFO, str(gpu), why))
            for gpu, why in self.left.items()
        ]


def read_preflight(
    settings: Settings,
    host: Host,
    *,
    boot_gpu: bool,
    fences: Mapping[PciAddress, Fence],
    health: Mapping[PciAddress, GpuHealth] | None = None,
) -> Preflight:
    """What detach must know beyond the host itself."""
    reader = Reader(settings.root)
    functions = {address for gpu in host.gpus for address in closure(host, gpu)}
    return Preflight(
        vfio=vfio_to_be_had(reader),
        holders=read_holders(reader, host, functions, whole=True),
        boot_gpu=boot_gpu,
        fences=fences,
        display=read_display(reader),
        health=health or {},
    )


class Gate:
    """The health of GPUs that are to leave their drivers, looked at once in a verb.

    One that is with a guest, or ready for one, is invisible to its driver: not looked at."""

    def __init__(self, settings: Settings, *, wanted: bool = True) -> None:
        self.settings = settings
        self.wanted = wanted
        self.known: dict[PciAddress, GpuHealth] = {}

    def __call__(
        self, host: Host, only: Iterable[PciAddress] | None = None
    ) -> dict[PciAddress, GpuHealth]:
        """The health of the host's GPUs (``only`` these)."""
        asked = set(host.devices) if only is None else set(only)
        new = {
            gpu.address
            for gpu in host.gpus
            if gpu.address in asked - self.known.keys() and gpu.device.binding.driver != VFIO
        }
        if self.wanted and new:
            from gpupt.cli.healthlook import gate

            self.known |= gate(self.settings, new, lending=True)
        return self.known


def change(
    settings: Settings,
    decide: Callable[[Host, Ledger], Plan],
    *,
    dry_run: bool,
    yes: bool,
    leaving: Leaving | None = None,
) -> None:
    """Decide, show, ask, and carry out what was shown; nothing is touched before consent."""
    from gpupt.apply.execute import execute

    require_live(settings, dry_run=dry_run)
    plan = decide(read_host(settings.root, whole=True), read_ledger(settings.state))
    findings = [] if leaving is None else leaving.findings
    if not consent(settings, plan, dry_run=dry_run, yes=yes, findings=findings):
        if settings.as_json and not dry_run and not plan.actions:
            settings.emit(plan_json(plan, findings))
        return
    with open_world(settings) as world:
        now = decide(read_host(settings.root, whole=True), world.journal.ledger)
        if now != plan:
            raise Failed(
                "the host changed while the plan was being shown; nothing was touched",
                remedy="run the same command again",
            )
        with telling_fences(settings, world.journal):
            execute(plan, world=world)
    if settings.as_json:
        settings.emit(plan_json(plan, findings))
    settings.say(f"{plan.verb} {plan.subject}: done")


@contextmanager
def telling_fences(settings: Settings, journal: Journal) -> Iterator[None]:
    """Say in the end, whatever the end, which GPUs were fenced on the way, and why."""
    before = journal.ledger.fences
    try:
        yield
    finally:
        for gpu, fence in journal.ledger.fences.items():
            if before.get(gpu) != fence:
                settings.say(f"{gpu} is fenced: {fence.reason}; gpupt status says more")


class ReturnCheck:
    """How well a GPU is that came back: all that came back, and are on loan until they were
    looked at, are looked at at once.

    A look serves each of them once, and on the driver that it was on then."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.known: dict[PciAddress, GpuHealth] = {}

    def __call__(self, gpu: PciAddress) -> GpuHealth | None:
        known = self.known.pop(gpu, None)
        driver = Reader(self.settings.root).link(f"sys/bus/pci/devices/{gpu}/driver")
        if known is not None and known.driver == driver:
            return known
        from gpupt.cli.healthlook import gate

        loans = read_ledger(self.settings.state).loans
        home = {
            each.address
            for each in read_host(self.settings.root).gpus
            if each.address in loans and each.device.binding.driver not in {None, VFIO}
        }
        self.known = gate(self.settings, home | {gpu}, lending=False)
        return self.known.pop(gpu, None)


@contextmanager
def open_world(settings: Settings, *, cluster: Any = None) -> Iterator[World]:
    """The world of this host, held for changing; ``cluster`` is its ClusterWorld, if any."""
    with Journal(settings.state) as journal:
        kernel = settings.kernel(settings.root) if settings.kernel else Kernel(settings.root)
        yield World(kernel, journal, settings.detail, cluster=cluster, health=ReturnCheck(settings))


def cluster_of(settings: Settings, runs: Iterable[Run]) -> Any:
    """The ClusterWorld, when one of these runs is about a cluster: else libvirt is not needed."""
    if all(is_host_action(action) for run in runs for action in run.plan.actions):
        return None
    from gpupt.cli.clusterworld import cluster_world

    return cluster_world(settings)


@click.command()
@changing
@common
def recover(settings: Settings, *, dry_run: bool, yes: bool) -> None:
    """Finish or undo what a crash cut short.

    A detach or an up that did not come to its end is undone in reverse; an attach or a down
    is carried on.  Overrides to vfio-pci that no loan knows and no process uses are cleared,
    udev rules of `detach --persist` that no loan knows are removed, and loans whose card was
    exchanged for another are forgotten.
    May be cut short itself, and run again.

    \b
    Examples:
      gpupt recover --dry-run             show what is unfinished
      gpupt recover --yes
    """
    from gpupt.apply.recover import clean_up
    from gpupt.apply.recover import recover as recover_run
    from gpupt.decide.binding import plan_forget, plan_release
    from gpupt.decide.inverse import plan_recovery
    from gpupt.decide.persistence import plan_stray_rules

    def decide(host: Host, ledger: Ledger) -> tuple[Plan, list[Plan]]:
        plans = [
            plan_recovery(run, host=host, loans=ledger.loans).plan
            for run in reversed(ledger.unfinished)
        ]
        reader = Reader(settings.root)
        holders = read_holders(reader, host, host.devices)
        boot = read_boot_rules(settings.root)
        left = [
            plan_forget(host, loans=ledger.loans, boot=boot),
            plan_stray_rules(ledger, boot=boot),
            plan_release(host, ledger=ledger, holders=holders),
        ]
        subject = "; ".join(plan.subject for plan in [*plans, *left] if plan.actions)
        actions = tuple(action for plan in [*plans, *left] for action in plan.actions)
        return Plan("recover", subject or "this host", actions), left

    require_live(settings, dry_run=dry_run)
    ledger = read_ledger(settings.state)
    plan, _ = decide(read_host(settings.root, whole=True), ledger)
    if ledger.unfinished and not plan.actions and not dry_run:
        # Cut short before its first write: only the journal is to be put right.
        settings.say("an earlier run was cut short before it changed anything")
    elif not consent(settings, plan, dry_run=dry_run, yes=yes):
        if settings.as_json and not dry_run and not plan.actions:
            settings.emit(plan_json(plan))
        return
    with open_world(settings, cluster=cluster_of(settings, ledger.unfinished)) as world:
        host = read_host(settings.root, whole=True)
        now, left = decide(host, world.journal.ledger)
        if now != plan:
            raise Failed(
                "the host changed while the plan was being shown; nothing was touched",
                remedy="gpupt recover",
            )
        with telling_fences(settings, world.journal):
            for run in reversed(world.journal.ledger.unfinished):
                recover_run(run, host=host, world=world)
            for rest in left:
                clean_up(rest, world=world)
    if settings.as_json:
        settings.emit(plan_json(plan))
    settings.say(f"recover {plan.subject}: done")
