"""Puts together what verbs about clusters need: what is there now, and what changes it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gpupt.actions import BakeImage, Ledger
from gpupt.apply.clusterworld import ClusterWorld
from gpupt.cli.context import Settings
from gpupt.cli.naming import alias_file, read_aliases
from gpupt.decide.allocation import allocate, assess_subnet
from gpupt.decide.cluster import Surroundings, require_names, require_unchanged
from gpupt.decide.layers import Stack, is_hosts, plan_stack
from gpupt.decide.sizing import assess_size
from gpupt.decide.viability import Preflight
from gpupt.edges.bake import bake_image, check_machine, read_ground
from gpupt.edges.bootrules import read_persistent
from gpupt.edges.clusterfolder import ClusterFolder
from gpupt.edges.hypervisor import Hypervisor
from gpupt.edges.images import find_image
from gpupt.edges.kvm import KvmVerdict, probe_kvm
from gpupt.edges.rolls import read_rolls
from gpupt.edges.routes import read_routes
from gpupt.edges.specfile import SpecFile, read_specfile
from gpupt.errors import Failed
from gpupt.model.cluster import Allocation, ClusterSpec
from gpupt.model.host import Finding, Host, Severity
from gpupt.model.pci import PciAddress
from gpupt.model.roll import Roll

# What every node's image holds, asked for or not: it says what the node is and sees.
ALWAYS = "node"
# A guest in an emulated host takes half a minute to its first instruction.
KVM_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """Where an `up` would lead: the allocation, what is around it, and what was noticed."""

    allocation: Allocation
    around: Surroundings
    stack: Stack
    findings: tuple[Finding, ...]


def aliases_of(settings: Settings) -> Mapping[str, PciAddress]:
    """The aliases of the state folder; none when there is no file of them."""
    file = alias_file(settings.state)
    return read_aliases(file) if file.exists() else {}


def read_cluster_file(file: Path) -> SpecFile:
    """The specification in a file, of rolls that this installation has for nodes; raises
    BadInput."""
    rolls = read_rolls()
    hosts = {name: found.summary for name, found in rolls.items() if is_hosts(name, rolls)}
    return read_specfile(file, known_rolls=list(rolls), host_rolls=hosts)


def look_around(
    settings: Settings,
    cluster: str,
    *,
    hypervisor: Hypervisor,
    ledger: Ledger,
    host: Host,
    preflight: Preflight | None = None,
) -> Surroundings:
    """What is there of a cluster, and around it; without its image."""
    folder = ClusterFolder(settings.state, cluster)
    record = None
    # A damaged record is no obstacle to `down`, which goes by libvirt and the loans.
    with suppress(Failed):
        record = folder.read()
    return Surroundings(
        host=host,
        loans=ledger.loans,
        domains=hypervisor.domains(),
        networks=hypervisor.networks(),
        has_folder=folder.exists,
        folder=None if record is None else record.allocation,
        preflight=preflight or Preflight(),
        persistent=read_persistent(settings.root),
    )


def look_ahead(
    settings: Settings, read: SpecFile, *, around: Surroundings, hypervisor: Hypervisor
) -> Outlook:
    """Decide the allocation and hold it against the machine; raises BadInput, Refused."""
    spec = read.spec
    # Said first: what was changed in the file may be what else is wrong with it.
    require_names(spec, around=around)
    require_unchanged(spec, around=around)
    stack = stack_of(spec, rolls=read_rolls())
    routes = read_routes(settings.root)
    findings = []
    if routes is None:
        findings.append(
            Finding(
                "routes-unread",
                Severity.INFO,
                spec.name,
                f"{settings.root}/proc/net/route cannot be read: clashes of the subnet with "
                "the host's routes were not looked for",
            )
        )
    place = read.places.get("network.subnet", "")
    assess_subnet(spec, networks=around.networks, routes=routes or (), place=place)
    allocation = allocate(
        spec,
        host=around.host,
        loans=around.loans,
        domains=around.domains,
        preflight=around.preflight,
        aliases=aliases_of(settings),
        alias_file=str(alias_file(settings.state)),
        places=read.places,
    )
    running = {domain.name for domain in around.domains if domain.running}
    starting = [node for node in spec.nodes if f"{spec.name}-{node.name}" not in running]
    if starting:
        findings += assess_size(spec, starting=starting, capacity=hypervisor.capacity())
    has_image = find_image(settings.state, stack.digest) is not None
    return Outlook(
        allocation=allocation,
        around=replace(around, image=stack.digest, has_image=has_image),
        stack=stack,
        findings=tuple(findings),
    )


def stack_of(spec: ClusterSpec, *, rolls: Mapping[str, Roll]) -> Stack:
    """The layers of the image that the cluster's nodes boot."""
    return plan_stack((*spec.rolls, ALWAYS), rolls, ground=read_ground())


def cluster_world(settings: Settings, *, hypervisor: Hypervisor | None = None) -> ClusterWorld:
    """What cluster actions act on; with no ``hypervisor``, libvirt is not asked before the
    first of them."""
    rolls = read_rolls()

    def bake(action: BakeImage) -> None:
        stack = plan_stack(action.rolls, rolls, ground=read_ground())
        if stack.digest != action.digest:
            raise Failed(
                f"the rolls changed since image {action.digest} was planned",
                remedy="run gpupt up again",
            )
        bake_image(
            stack.layers, stack.digest, rolls=rolls, state=settings.state, narrate=settings.say
        )

    return ClusterWorld(
        state=settings.state,
        uri=settings.connect,
        rolls=rolls,
        bake=bake,
        accelerated=kvm_verdict(settings),
        hypervisor_open=hypervisor,
        slow=is_lab(settings.root),
    )


def is_lab(root: Path) -> bool:
    """Whether the host is an emulated one, which its kernel's command line says."""
    try:
        return any(
            word.startswith("gpupt.lab=") for word in (root / "proc/cmdline").read_text().split()
        )
    except OSError:
        return False


def kvm_verdict(settings: Settings) -> Callable[[], bool]:
    """Whether KVM runs guests here, found out once for each boot of the host."""
    known: list[bool] = []

    def verdict() -> bool:
        if not known:
            found = remembered(settings.state)
            if found is None:
                settings.say("finding out whether KVM runs guests here, by running one")
                found = probe_kvm(deadline=KVM_SECONDS)
                remember(settings.state, found)
            if not found.usable:
                settings.say(f"KVM is not used ({found.why}): nodes are emulated, and slow")
            known.append(found.usable)
        return known[0]

    return verdict


def boot_id() -> str:
    """What tells this boot of the machine from the others; empty where the kernel hides it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def remembered(state: Path) -> KvmVerdict | None:
    """The verdict of this boot; None when none was noted."""
    try:
        noted = json.loads((state / "kvm.json").read_text())
        if boot_id() and noted["boot"] == boot_id():
            return KvmVerdict(bool(noted["usable"]), str(noted["why"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def remember(state: Path, verdict: KvmVerdict) -> None:
    """Note the verdict for as long as the machine runs; not noted is only slower."""
    noted = {"boot": boot_id(), "usable": verdict.usable, "why": verdict.why}
    half = state / f".kvm.json.{os.getpid()}"
    with suppress(OSError):
        state.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps(noted) + "\n")
        half.replace(state / "kvm.json")


def require_bakery(outlook: Outlook) -> None:
    """Refuse before anything is touched when the image is missing and cannot be baked here."""
    if not outlook.around.has_image:
        check_machine()
