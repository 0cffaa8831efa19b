"""The host as the JSON that scripts rely on; what is unknown is null."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from gpupt.model.gpus import fence_of, stands, state_of
from gpupt.model.host import Finding, Gpu, Host, Loan, Records
from gpupt.model.pci import PciAddress

if TYPE_CHECKING:
    from gpupt.actions import Ledger
    from gpupt.decide.doctor import Diagnosis


def list_json(host: Host, records: Records) -> dict[str, Any]:
    """``gpupt list --json``."""
    return {"gpus": [gpu_json(gpu, host=host, records=records) for gpu in host.gpus]}


def gpu_json(gpu: Gpu, *, host: Host, records: Records) -> dict[str, Any]:
    """One GPU; ids are lower-case hex without 0x, sizes are bytes, speeds GT/s; persistent:
    taken again at boot; fenced: why it is lent to nobody."""
    device = gpu.device
    loan = records.loans.get(gpu.address)
    fence = fence_of(gpu.device, records.fences)
    group = host.groups.get(-1 if device.iommu_group is None else device.iommu_group)
    lease = loan is not None and loan.node is not None
    return {
        "address": str(device.address),
        "vendor_id": f"{device.id.vendor:04x}",
        "device_id": f"{device.id.device:04x}",
        "class": f"{device.class_code:06x}",
        "name": device.name,
        "driver": device.binding.driver,
        "driver_override": device.binding.override,
        "iommu_group": device.iommu_group,
        "group_members": [str(member) for member in group.members] if group else [],
        "companions": [str(companion) for companion in gpu.companions],
        "numa_node": device.numa_node,
        "boot_vga": device.boot_vga,
        "link": {
            "width": device.link.width,
            "max_width": device.link.max_width,
            "speed": device.link.speed,
            "max_speed": device.link.max_speed,
        },
        "bars": [
            {
                "index": bar.index,
                "size": bar.size,
                "prefetchable": bar.prefetchable,
                "bits": bar.bits,
            }
            for bar in device.bars
        ],
        "reset_methods": None if device.reset_methods is None else list(device.reset_methods),
        "state": state_of(gpu, loan).value,
        "lease": {"cluster": loan.cluster, "node": loan.node} if loan and lease else None,
        "persistent": gpu.address in records.persistent,
        "fenced": None if fence is None else fence.reason,
    }


def finding_json(finding: Finding) -> dict[str, Any]:
    """One finding of ``doctor --json`` or ``plan --json``."""
    return {
        "id": finding.id,
        "severity": finding.severity.value,
        "subject": finding.subject,
        "brief": finding.brief,
        "evidence": list(finding.evidence),
        "remedy": finding.remedy,
    }


def status_json(
    host: Host,
    ledger: Ledger,
    *,
    persistent: Collection[PciAddress] = (),
    findings: Sequence[Finding] = (),
) -> dict[str, Any]:
    """``gpupt status --json``; ``findings`` are about nodes that lost a GPU of theirs."""
    return {
        "loans": [
            loan_json(loan, host=host, persistent=loan.gpu in persistent)
            for loan in ledger.loans.values()
        ],
        "unfinished": [
            {
                "verb": run.plan.verb,
                "subject": run.plan.subject,
                "pid": run.pid,
                "actions": len(run.plan.actions),
                "done": sum(entry.done for entry in run.entries),
            }
            for run in ledger.unfinished
        ],
        "overrides": [
            {
                "address": str(device.address),
                "driver": device.binding.driver,
                "driver_override": device.binding.override,
            }
            for device in host.devices.values()
            if device.binding.override
        ],
        "boot_rules": [
            {"gpu": str(gpu), "loan": gpu in ledger.loans} for gpu in sorted(persistent)
        ],
        "fences": [
            {
                "gpu": str(fence.gpu),
                "id": str(fence.identity.id),
                "reason": fence.reason,
                "since": fence.since,
                "evidence": list(fence.evidence),
                "stands": stands(fence, host),
            }
            for fence in ledger.fences.values()
        ],
        "findings": [finding_json(finding) for finding in findings],
    }


def loan_json(loan: Loan, *, host: Host, persistent: bool) -> dict[str, Any]:
    """One loan: where each function came from, and where it is now."""
    return {
        "gpu": str(loan.gpu),
        "cluster": loan.cluster,
        "node": loan.node,
        "persistent": persistent,
        "functions": [
            {
                "address": str(origin.address),
                "id": str(origin.identity.id),
                "came_from": origin.binding.driver,
                "driver": device.binding.driver if device else None,
                "present": device is not None,
            }
            for origin in loan.origins
            for device in (host.devices.get(origin.address),)
        ],
    }


def doctor_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """``gpupt doctor --json``."""
    return {
        "findings": [finding_json(finding) for finding in diagnosis.findings],
        "checked": list(diagnosis.checked),
        "skipped": [{"id": id, "why": why} for id, why in diagnosis.skipped.items()],
    }


def info_json(
    gpu: Gpu,
    *,
    host: Host,
    records: Records,
    leaving: Sequence[PciAddress],
    reasons: Sequence[Finding],
) -> dict[str, Any]:
    """``gpupt info --json``: the GPU as in ``list``, what leaves with it, and what forbids it."""
    return {
        "gpu": gpu_json(gpu, host=host, records=records),
        "leaving": [
            {
                "address": str(device.address),
                "id": str(device.id),
                "class": f"{device.class_code:06x}",
                "driver": device.binding.driver,
                "iommu_group": device.iommu_group,
            }
            for device in (host.devices[address] for address in leaving)
        ],
        "refusals": [finding_json(reason) for reason in reasons],
    }
