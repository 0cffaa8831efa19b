"""Clusters for people and programs: what `up`, `show` and `down` tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpupt.decide.facts import NodeFacts, SeenGpu
from gpupt.model.cluster import Domain, Placement
from gpupt.model.host import Finding, FunctionOrigin, Severity
from gpupt.model.pci import DriverBinding


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node as declared, as libvirt has it and as it sees itself (None: not asked, or no
    answer); ``ready`` is seconds from its start to its readiness."""

    placement: Placement
    domain: Domain | None
    facts: NodeFacts | None = None
    ready: float | None = None

    @property
    def state(self) -> str:
        """running, off (defined and not running) or missing."""
        if self.domain is None:
            return "missing"
        return "running" if self.domain.running else "off"


def node_json(status: NodeStatus) -> dict[str, Any]:
    """A node as the JSON of `up` and `show` has it."""
    placement = status.placement
    facts = status.facts
    return {
        "name": placement.node.name,
        "role": placement.node.role.value,
        "ip": str(placement.ip),
        "state": status.state,
        "domain_type": None if status.domain is None else status.domain.type,
        "gpus": [str(gpu) for gpu in placement.gpus],
        "gpus_seen": None if facts is None else [seen_json(gpu) for gpu in facts.gpus],
        "home": None if facts is None else facts.home,
        "failed_units": None if facts is None else list(facts.failed_units),
        "ready": None if status.ready is None else round(status.ready, 1),
    }


def seen_json(gpu: SeenGpu) -> dict[str, str]:
    """A GPU as the guest sees it."""
    return {
        "address": gpu.address,
        "vendor_id": f"{gpu.id.vendor:04x}",
        "device_id": f"{gpu.id.device:04x}",
    }


def nodes_text(nodes: Sequence[NodeStatus]) -> str:
    """A table for a person, a node a line."""
    rows = [("NODE", "ROLE", "STATE", "ADDRESS", "GPUS OF THE HOST", "SEEN IN THE NODE")]
    for status in nodes:
        placement = status.placement
        seen = "?"
        if status.facts is not None:
            seen = " ".join(f"{gpu.id}" for gpu in status.facts.gpus) or "-"
        rows.append(
            (
                placement.node.name,
                placement.node.role.value,
                status.state,
                str(placement.ip),
                " ".join(str(gpu) for gpu in placement.gpus) or "-",
                seen,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def finding_json(finding: Finding) -> dict[str, Any]:
    """A finding as `doctor --json` and `plan --json` have it."""
    return {
        "id": finding.id,
        "severity": finding.severity.value,
        "subject": finding.subject,
        "brief": finding.brief,
        "evidence": list(finding.evidence),
        "remedy": finding.remedy,
    }


def finding_text(finding: Finding) -> str:
    """A finding for a person, in as many lines as it needs."""
    word = {Severity.FAIL: "problem", Severity.WARN: "warning", Severity.INFO: "note"}
    lines = [f"{word[finding.severity]}: {finding.brief}"]
    lines += [f"  {line}" for line in finding.evidence]
    if finding.remedy:
        lines.append(f"  → {finding.remedy}")
    return "\n".join(lines)


def binding_json(binding: DriverBinding | None) -> dict[str, str | None] | None:
    """A binding; None for a function that is not there any more."""
    if binding is None:
        return None
    return {"driver": binding.driver, "override": binding.override}


@dataclass(frozen=True, slots=True)
class Return:
    """One function that a cluster had: as recorded before, as it was lent, as it is now."""

    origin: FunctionOrigin
    lent: DriverBinding | None
    now: DriverBinding | None

    @property
    def restored(self) -> bool:
        return self.now == self.origin.binding


def return_json(function: Return) -> dict[str, Any]:
    """A function's way back."""
    return {
        "address": str(function.origin.address),
        "recorded": binding_json(function.origin.binding),
        "before": binding_json(function.lent),
        "after": binding_json(function.now),
        "restored": function.restored,
    }


def return_text(function: Return) -> str:
    """A function's way back in one line."""
    origin = function.origin
    if function.restored:
        return f"{origin.address} is back on {_driver(origin.binding)}"
    return (
        f"{origin.address} is on {_driver(function.now)}, and came from {_driver(origin.binding)}"
    )


def _driver(binding: DriverBinding | None) -> str:
    if binding is None:
        return "nothing: it is gone"
    name = binding.driver or "no driver"
    return f"{name} with driver_override {binding.override}" if binding.override else name


def seconds_of(phases: Mapping[str, float]) -> dict[str, float]:
    """Phases with their seconds, rounded for reading."""
    return {name: round(seconds, 2) for name, seconds in phases.items()}
