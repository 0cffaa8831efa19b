"""What a node says of its GPUs' health, in the host's addresses; pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gpupt.model.cluster import Placement
from gpupt.model.health import CheckResult, HealthReport, Library, Verdict
from gpupt.model.pci import PciAddress

# What these say of the library is of what is installed, and of no card.
INSTALLED = frozenset({Library.ABSENT, Library.MISMATCH, Library.DENIED, Library.NO_DRIVER})


def hosts_of(report: HealthReport, placement: Placement) -> dict[PciAddress, PciAddress]:
    """The node's address of each GPU to the host's: a node gets its cards in the order of
    their ports.  Empty when it judged another number of them."""
    seen = sorted(gpu.address for gpu in report.gpus)
    if len(seen) != len(placement.cards):
        return {}
    return dict(zip(seen, (card.gpu for card in placement.cards), strict=True))


def in_the_node(
    report: HealthReport, placement: Placement
) -> tuple[tuple[PciAddress | None, CheckResult], ...]:
    """Each check that keeps the node back, with the host's address of the GPU that it accuses.

    None: it is of no card, or of one that cannot be told from the others.  NVIDIA's library is
    in the node, so one that does not answer there keeps it back too.  Who works on a card of a
    node is the node's affair.
    """
    report = counted(report, placement)
    hosts = hosts_of(report, placement)
    found: list[tuple[PciAddress | None, CheckResult]] = []
    for gpu in report.gpus:
        at = hosts.get(gpu.address)
        found += [(at, check) for check in gpu.checks if keeps_back(check)]
    for check in report.machine:
        if keeps_back(check) or (check.id == "nvml" and check.status is not Verdict.OK):
            found.append((None, check))
    return tuple(found)


def keeps_back(check: CheckResult) -> bool:
    """Whether a check keeps a node from being ready."""
    return check.status is Verdict.FAIL and check.id != "processes"


def accusing(checks: Iterable[CheckResult]) -> tuple[CheckResult, ...]:
    """Those of a card's checks that fail by its own fault: neither by that of who works on it,
    nor of what is installed.  These keep it from being lent as long as they last, no longer."""
    failed = [check for check in checks if check.status is Verdict.FAIL]
    excused = {"processes"}
    if any(check.id == "nvml" and check.value in INSTALLED for check in failed):
        # A library that does not serve knows no card.
        excused |= {"nvml", "driver"}
    return tuple(check for check in failed if check.id not in excused)


def counted(report: HealthReport, placement: Placement) -> HealthReport:
    """The report with a check that the node judged as many GPUs as it was lent, in the place
    of the host's own count of them."""
    there, lent = len(report.gpus), len(placement.cards)
    check = CheckResult(
        "gpu_count",
        Verdict.OK if there == lent else Verdict.FAIL,
        f"{there} GPUs in the node, {lent} were lent to it",
        value=str(there),
        threshold=str(lent),
        remedy="" if there == lent else "gpupt show says what became of them",
        number=there,
    )
    others = tuple(each for each in report.machine if each.id != check.id)
    return replace(report, machine=(*others, check))
