"""Whether a cluster fits the machine: memory is pinned for GPUs, CPUs can be shared."""

from __future__ import annotations

from collections.abc import Sequence

from gpupt.errors import Refused
from gpupt.model.cluster import Capacity, ClusterSpec, NodeSpec
from gpupt.model.host import Finding, Severity

# QEMU's own memory for each guest (device models, page tables, migration bitmaps): a floor
# seen with q35 and virtio devices, and kept free beside the guests' memory.
QEMU_OVERHEAD = 160 << 20


def show_size(size: int) -> str:
    """Bytes for a person: the largest unit that keeps it readable (``2560 MiB``, ``3 GiB``)."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            whole = size % factor == 0
            below = factor >> 10
            if not whole and size % below == 0 and size // below < 10_000:
                continue
            return f"{size // factor} {unit}" if whole else f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _mib(size: int) -> str:
    """Bytes in the one unit that lets sums be checked."""
    return f"{size >> 20} MiB"


def assess_size(
    spec: ClusterSpec, *, starting: Sequence[NodeSpec], capacity: Capacity
) -> tuple[Finding, ...]:
    """Warnings about the nodes that are to be started on a machine of that capacity.

    Raises Refused when the nodes with GPUs do not fit the memory that is available, since
    passthrough pins every page of theirs, or when all together exceed what the machine has.
    """
    pinned = sum(node.memory + QEMU_OVERHEAD for node in starting if node.gpus.wanted)
    whole = sum(node.memory for node in starting)
    if pinned > capacity.available:
        raise Refused(
            f"{spec.name} needs {_mib(pinned)} of memory for its GPU nodes, and this machine "
            f"has {_mib(capacity.available)} available of {_mib(capacity.memory)}",
            details=tuple(
                f"{node.name}: {_mib(node.memory)}, pinned for its GPUs, and "
                f"{_mib(QEMU_OVERHEAD)} for QEMU itself"
                for node in starting
                if node.gpus.wanted
            ),
            remedy="give the GPU nodes less memory, or end what uses the machine's",
        )
    if whole > capacity.memory:
        raise Refused(
            f"{spec.name} needs {_mib(whole)} of memory, and this machine has "
            f"{_mib(capacity.memory)} in all",
            details=tuple(f"{node.name}: {_mib(node.memory)}" for node in starting),
            remedy="give the nodes less memory",
        )
    findings = []
    if whole + QEMU_OVERHEAD * len(starting) > capacity.available:
        findings.append(
            Finding(
                id="memory-tight",
                severity=Severity.WARN,
                subject=spec.name,
                brief=f"the nodes may come to use {show_size(whole)} of memory, and this "
                f"machine has {show_size(capacity.available)} available",
                remedy="give them less, or watch that the machine does not run out",
            )
        )
    for node in starting:
        if node.cpus > capacity.cpus:
            findings.append(
                Finding(
                    id="cpus-overcommitted",
                    severity=Severity.WARN,
                    subject=node.name,
                    brief=f"{node.name} has {node.cpus} CPUs and the machine {capacity.cpus}",
                    remedy=f"give it at most {capacity.cpus}",
                )
            )
    all_cpus = sum(node.cpus for node in spec.nodes)
    if all_cpus > capacity.cpus:
        findings.append(
            Finding(
                id="cpus-shared",
                severity=Severity.INFO,
                subject=spec.name,
                brief=f"the nodes' {all_cpus} CPUs share the machine's {capacity.cpus}",
            )
        )
    return tuple(findings)
