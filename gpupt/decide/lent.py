"""Whether the nodes still have the GPUs that they were lent; pure.

A guest whose card was unbound, pulled out or fell off the bus goes on running and says
nothing: its domain stays ``running``.  What tells is the host's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gpupt.decide.viability import moved_functions
from gpupt.model.cluster import Domain
from gpupt.model.gpus import VFIO
from gpupt.model.host import Finding, Holder, Host, Loan, Severity
from gpupt.model.pci import PciAddress

Holders = Mapping[PciAddress, tuple[Holder, ...]]


def assess_lent(
    host: Host,
    loans: Mapping[PciAddress, Loan],
    *,
    domains: Sequence[Domain] | None,
    holders: Holders | None,
) -> tuple[Finding, ...]:
    """What is wrong with GPUs that nodes have, a finding each; none: every node has its own.

    ``domains`` None: libvirt did not answer; ``holders`` None: not every process could be
    looked into.
    """
    found: list[Finding] = []
    for loan in loans.values():
        if loan.node is None:
            continue
        domain = node_of(loan, domains)
        if domains is not None and (domain is None or not domain.running):
            found.append(about_node(loan, domain))
        # A card that is gone explains why nobody holds it.
        runs = None if domains is None else domain is not None and domain.running
        about = about_card(host, loan, runs=runs, holders=holders)
        found.extend(finding for finding in [next(about, None)] if finding is not None)
    return tuple(found)


def node_of(loan: Loan, domains: Sequence[Domain] | None) -> Domain | None:
    """The domain of the node that has the GPU."""
    for domain in domains or ():
        member = domain.membership
        if member is not None and (member.cluster, member.node) == (loan.cluster, loan.node):
            return domain
    return None


def about_node(loan: Loan, domain: Domain | None) -> Finding:
    """A node that has a GPU and does not run."""
    return finding(
        "node-down",
        Severity.WARN,
        loan,
        "is not there any more" if domain is None else "does not run",
        f"libvirt has {'no such domain' if domain is None else f'{domain.name}, not running'}",
        remedy=f"gpupt up with its file starts it again; gpupt down {loan.cluster} gives "
        f"{loan.gpu} back",
    )


def about_card(
    host: Host, loan: Loan, *, runs: bool | None, holders: Holders | None
) -> Iterator[Finding]:
    """How a node lost its GPU, the strongest evidence first."""
    back = f"gpupt down {loan.cluster} ends its cluster"
    device = host.devices.get(loan.gpu)
    if device is None:
        yield finding(
            "gpu-gone",
            Severity.FAIL,
            loan,
            "lost its GPU: it left the bus",
            f"{loan.gpu} is not on the bus any more",
            remedy=f"{back}; echo 1 > /sys/bus/pci/rescan, once the card is in its slot again",
        )
        return
    if device.lost:
        yield finding(
            "lost-device",
            Severity.FAIL,
            loan,
            "lost its GPU: it has fallen off the bus",
            f"config space of {loan.gpu} reads all ones",
            remedy=f"{back} and fences the card; power the machine off and on again",
        )
    moved = moved_functions(host, loan)
    if moved:
        yield finding(
            "address-moved",
            Severity.FAIL,
            loan,
            "has another card than it was lent",
            *moved,
            remedy=f"{back}, and leaves the card that is there now alone",
        )
    astray = [
        (origin.address, found.binding.driver or "no driver")
        for origin in loan.origins
        if (found := host.devices.get(origin.address)) is not None and found.binding.driver != VFIO
    ]
    if astray:
        yield finding(
            "gpu-unbound",
            Severity.FAIL,
            loan,
            "runs without its GPU: it was taken from vfio-pci behind its back",
            *(f"{address} is on {driver}, not on {VFIO}" for address, driver in astray),
            remedy=f"{back}, and puts every function where it came from; then up again",
        )
    if runs and holders is not None and not holders.get(loan.gpu):
        yield finding(
            "gpu-unheld",
            Severity.FAIL,
            loan,
            "runs without its GPU: no process has it open",
            f"nobody has /dev/vfio/{device.iommu_group} open",
            remedy=f"{back}; then up again",
        )


def finding(
    id: str, severity: Severity, loan: Loan, brief: str, *evidence: str, remedy: str
) -> Finding:
    """A finding about a node's GPU."""
    node = f"{loan.cluster}/{loan.node}"
    return Finding(id, severity, str(loan.gpu), f"{node} {brief}", evidence, remedy)
