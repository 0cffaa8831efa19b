"""Plans of bringing a cluster up and of taking it down; pure.

What is there already is left alone: a second `up` of the same file plans nothing, one after
a crash or a reboot plans what is missing, and `down` goes by libvirt and the loans alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpupt.actions import (
    Action,
    AwaitNode,
    AwaitRoll,
    BakeImage,
    LendGpu,
    MakeCluster,
    Plan,
    RemoveCluster,
    ResetGpu,
    ReturnGpu,
    StartNetwork,
    StartNode,
    StopNetwork,
    StopNode,
)
from gpupt.decide.binding import plan_attach, plan_detach
from gpupt.decide.domain import domain_name, network_name, spec_digest
from gpupt.decide.sizing import show_size
from gpupt.decide.viability import Preflight, moved_functions
from gpupt.errors import Refused
from gpupt.model.cluster import Allocation, ClusterSpec, Domain, Network, NodeSpec, Placement, Role
from gpupt.model.gpus import VFIO
from gpupt.model.host import Finding, Host, Loan, Severity
from gpupt.model.pci import PciAddress
from gpupt.model.roll import Roll

# A node is up within seconds on KVM; under emulation minutes pass, and a big machine spends
# minutes on pinning memory before the first instruction.
NODE_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What plans of clusters are decided from, all of it read at one time.

    ``folder`` is what the cluster's folder records, ``has_folder`` whether there is one at
    all; ``image`` the digest of the image the nodes are to boot, ``has_image`` whether it
    is baked.  ``persistent`` GPUs are detached for good, until `attach`."""

    host: Host
    loans: Mapping[PciAddress, Loan]
    domains: Sequence[Domain] = ()
    networks: Sequence[Network] = ()
    has_folder: bool = False
    folder: Allocation | None = None
    image: str = ""
    has_image: bool = False
    preflight: Preflight = field(default_factory=Preflight)
    persistent: frozenset[PciAddress] = frozenset()


def plan_up(
    allocation: Allocation, *, around: Surroundings, rolls: Sequence[Roll]
) -> tuple[Plan, tuple[Finding, ...]]:
    """What is missing of the cluster, in order; ``rolls`` are all that its image holds.

    Raises Refused when it is up from another specification, or its names are taken.
    """
    spec = allocation.spec
    require_names(spec, around=around)
    require_unchanged(spec, around=around)
    running = {
        domain.membership.node
        for domain in around.domains
        if domain.running and domain.membership and domain.membership.cluster == spec.name
    }
    missing = [each for each in in_start_order(allocation) if each.node.name not in running]
    if missing and running and around.folder is None:
        raise Refused(
            f"{spec.name} is up in part, and its keys are gone",
            details=f"running: {', '.join(sorted(running))}",
            remedy=f"gpupt down {spec.name}, then up again",
        )
    findings = assess_image(spec, around=around)
    if not missing:
        return Plan("up", spec.name, ()), findings
    actions: list[Action] = []
    if not around.has_image:
        why = "no image of these rolls is baked yet"
        actions.append(BakeImage(tuple(roll.name for roll in rolls), around.image, why=why))
    if around.folder is None:
        why = "its keys, host keys and addresses"
        actions.append(MakeCluster(allocation, around.image, why=why))
    actions += take_gpus(missing, cluster=spec.name, around=around)
    if not any(net.name == network_name(spec.name) and net.active for net in around.networks):
        why = f"{spec.subnet}, with an address for each node"
        actions.append(StartNetwork(allocation, why=why))
    for each in missing:
        actions.append(
            StartNode(spec.name, each, around.image, why=f"{each.node.role}, {_shape(each)}")
        )
    for each in missing:
        why = "until it answers SSH and shows its GPUs" if each.cards else "until it answers SSH"
        actions.append(AwaitNode(spec.name, each, NODE_SECONDS, why=why))
    roles = {node.role.value for node in spec.nodes}
    for roll in rolls:
        checks = [check for check in roll.checks if roles.intersection(check.roles)]
        if checks:
            why = ", ".join(check.name for check in checks)
            deadline = sum(check.deadline for check in checks)
            actions.append(AwaitRoll(spec.name, roll.name, deadline, why=why))
    return Plan("up", spec.name, tuple(actions)), findings


def plan_down(
    cluster: str, *, around: Surroundings, keep_detached: bool = False
) -> tuple[Plan, tuple[Finding, ...]]:
    """End the cluster's nodes and network, and give its GPUs back to the host's drivers
    (``keep_detached``: leave them ready for the next cluster; persistent ones stay so)."""
    members = [
        domain
        for domain in around.domains
        if domain.membership is not None and domain.membership.cluster == cluster
    ]
    # Compute nodes first: they have the frontend's /home mounted.
    members.sort(key=is_frontend)
    actions: list[Action] = []
    computes = [m.membership.node for m in members if m.membership and not is_frontend(m)]
    for domain in members:
        assert domain.membership is not None
        node = domain.membership.node
        others = tuple(computes[1:]) if computes[:1] == [node] else ()
        why = "end its machine" if domain.running else "forget its machine"
        actions.append(StopNode(cluster, node, why=why, together=others))
    if any(network.cluster == cluster for network in around.networks):
        actions.append(StopNetwork(cluster, why="no node uses it any more"))
    lent = {gpu: loan for gpu, loan in around.loans.items() if loan.cluster == cluster}
    for gpu, loan in lent.items():
        # What an earlier `down` could not bring home is nobody's already.
        stays = gpu in around.persistent
        if loan.node is not None or stays:
            why = f"{loan.node or cluster} is gone" + (", and it stays detached" if stays else "")
            actions.append(ReturnGpu(gpu, why=why, cluster=None if stays else cluster))
    for gpu, loan in lent.items():
        had = loan.node is not None or not keep_detached
        device = around.host.devices.get(gpu)
        away = device is not None and device.binding.driver == VFIO
        if had and away and not moved_functions(around.host, loan):
            actions.append(ResetGpu(gpu, why="a guest had it: reset, and see that it answers"))
    findings: list[Finding] = []
    if not keep_detached:
        home = {gpu: loan for gpu, loan in lent.items() if gpu not in around.persistent}
        given, findings = give_back(home, around=around)
        actions += given
    named = {
        gpu for domain in members if domain.membership is not None for gpu in domain.membership.gpus
    }
    for gpu in sorted(named - set(around.loans)):
        findings.append(
            Finding(
                id="loan-missing",
                severity=Severity.WARN,
                subject=str(gpu),
                brief=f"{cluster} has {gpu}, and no loan says which driver it came from",
                remedy="gpupt recover clears what was left on it",
            )
        )
    if around.has_folder:
        actions.append(RemoveCluster(cluster, why="its keys, overlays and record"))
    return Plan("down", cluster, tuple(actions)), tuple(findings)


def is_frontend(domain: Domain) -> bool:
    """Whether the domain is a cluster's frontend."""
    return domain.membership is not None and domain.membership.role is Role.FRONTEND


def take_gpus(
    placements: Sequence[Placement], *, cluster: str, around: Surroundings
) -> list[Action]:
    """Detach the GPUs that are still with the host, and lend each to its node."""
    wanted = [(gpu, each.node.name) for each in placements for gpu in each.gpus]
    # What an earlier `up` lent to the same node is not lent elsewhere.
    loans = {
        gpu: replace(loan, cluster=None, node=None)
        if (gpu, loan.node) in wanted and loan.cluster == cluster
        else loan
        for gpu, loan in around.loans.items()
    }
    away = [
        gpu
        for gpu, _ in wanted
        if gpu not in loans or around.host.devices[gpu].binding.driver != VFIO
    ]
    actions: list[Action] = []
    if away:
        detach = plan_detach(around.host, gpus=away, loans=loans, preflight=around.preflight)
        actions += detach.actions
    for gpu, node in wanted:
        loan = around.loans.get(gpu)
        if loan is None or (loan.cluster, loan.node) != (cluster, node):
            actions.append(LendGpu(gpu, cluster, node, why=f"{node} is to have it"))
    return actions


def give_back(
    lent: Mapping[PciAddress, Loan], *, around: Surroundings
) -> tuple[list[Action], list[Finding]]:
    """Each GPU back to the drivers it came from; one whose address holds another card now is
    left on loan and named."""
    findings = []
    returning = []
    for gpu, loan in lent.items():
        moved = moved_functions(around.host, loan)
        if moved:
            findings.append(
                Finding(
                    id="address-moved",
                    severity=Severity.WARN,
                    subject=str(gpu),
                    brief=f"{gpu} is not the card that was lent, and stays as it is",
                    evidence=moved,
                    remedy="put the card back into its slot, then gpupt attach",
                )
            )
        else:
            returning.append(gpu)
    loans = {
        gpu: replace(loan, cluster=None, node=None) if gpu in returning else loan
        for gpu, loan in around.loans.items()
    }
    if not returning:
        return [], findings
    return list(plan_attach(around.host, gpus=returning, loans=loans).actions), findings


def in_start_order(allocation: Allocation) -> list[Placement]:
    """The frontend first, then the others as the specification has them."""
    return sorted(allocation.placements, key=lambda each: each.node.role is not Role.FRONTEND)


def require_names(spec: ClusterSpec, *, around: Surroundings) -> None:
    """Raise Refused when a domain or network that is not ours has a name that we need."""
    for network in around.networks:
        if network.name == network_name(spec.name) and network.cluster != spec.name:
            raise Refused(
                f"libvirt has a network {network.name!r} that is not gpupt's",
                remedy="give the cluster another name",
            )
    names = {domain_name(spec.name, node.name): node.name for node in spec.nodes}
    for domain in around.domains:
        member = domain.membership
        if domain.name not in names:
            continue
        if member is None or member.cluster != spec.name:
            owner = f"a node of {member.cluster}" if member else "not gpupt's"
            raise Refused(
                f"libvirt has a domain {domain.name!r} that is {owner}",
                remedy=f"give the cluster, or its node {names[domain.name]}, another name",
            )


def require_unchanged(spec: ClusterSpec, *, around: Surroundings) -> None:
    """Raise Refused, with the difference, when the cluster was made from another spec."""
    made = {
        domain.membership.spec
        for domain in around.domains
        if domain.membership is not None and domain.membership.cluster == spec.name
    }
    before = around.folder.spec if around.folder else None
    if made <= {spec_digest(spec)} and before in (None, spec):
        return
    lines = differences(before, spec) if before else ()
    raise Refused(
        f"{spec.name} is up from another specification",
        details=lines or "its record is gone: the difference cannot be shown",
        remedy=f"gpupt down {spec.name} first, then up",
    )


def differences(before: ClusterSpec, after: ClusterSpec) -> tuple[str, ...]:
    """What changed between two specifications of one cluster, a line each."""
    lines = []
    if set(before.rolls) != set(after.rolls):
        lines.append(f"rolls: {', '.join(before.rolls)} → {', '.join(after.rolls)}")
    elif before.rolls != after.rolls:
        lines.append("rolls: in another order")
    if before.subnet != after.subnet:
        lines.append(f"subnet: {before.subnet} → {after.subnet}")
    old = {node.name: node for node in before.nodes}
    new = {node.name: node for node in after.nodes}
    lines += [f"{name}: gone" for name in old if name not in new]
    lines += [f"{name}: new" for name in new if name not in old]
    for name in old.keys() & new.keys():
        lines += [f"{name}: {line}" for line in _node_differences(old[name], new[name])]
    if not lines and [n.name for n in before.nodes] != [n.name for n in after.nodes]:
        lines.append("nodes: in another order")
    return tuple(sorted(lines))


def _node_differences(before: NodeSpec, after: NodeSpec) -> list[str]:
    pairs = [
        ("role", before.role.value, after.role.value),
        ("cpus", str(before.cpus), str(after.cpus)),
        ("memory", show_size(before.memory), show_size(after.memory)),
        ("disk", _disk(before), _disk(after)),
        ("gpus", _request(before), _request(after)),
    ]
    return [f"{name} {was} → {now}" for name, was, now in pairs if was != now]


def assess_image(spec: ClusterSpec, *, around: Surroundings) -> tuple[Finding, ...]:
    """A warning when running nodes boot from another image than the rolls now make."""
    older = {
        domain.membership.image
        for domain in around.domains
        if domain.running and domain.membership and domain.membership.cluster == spec.name
    } - {around.image}
    if not older:
        return ()
    return (
        Finding(
            id="image-changed",
            severity=Severity.WARN,
            subject=spec.name,
            brief=f"its nodes run from image {', '.join(sorted(older))}; "
            f"its rolls now make {around.image}",
            remedy=f"gpupt down {spec.name} and up again, to renew them",
        ),
    )


def _request(node: NodeSpec) -> str:
    return ", ".join(node.gpus.named) or str(node.gpus.count)


def _disk(node: NodeSpec) -> str:
    return show_size(node.disk) if node.disk else "the image's"


def _shape(placement: Placement) -> str:
    node = placement.node
    parts = [
        f"{node.cpus} CPU{'s' if node.cpus > 1 else ''}",
        show_size(node.memory),
        str(placement.ip),
    ]
    parts += [f"GPU {card.gpu} ({card.id})" for card in placement.cards]
    return ", ".join(parts)
