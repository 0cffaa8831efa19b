"""What keeps a host from lending its GPUs: every check, and which of them could run; pure.

A check is a function of the host, the ledger and further facts; ids are those of
docs/doctor.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gpupt.actions import Ledger
from gpupt.decide import doctor_cards as cards
from gpupt.decide import doctor_guests as guests
from gpupt.decide import doctor_host as machine
from gpupt.model.facts import HostFacts
from gpupt.model.host import Finding, Host, Severity

Check = Callable[[Host, Ledger, HostFacts], Iterator[Finding]]

CHECKS: Mapping[str, Check] = {
    "iommu-off": machine.iommu_off,
    "intremap-off": machine.intremap_off,
    "vfio-missing": machine.vfio_missing,
    "group-not-viable": cards.group_not_viable,
    "group-host-critical": cards.group_host_critical,
    "companion-missed": cards.companion_missed,
    "boot-framebuffer": cards.boot_framebuffer,
    "device-held": cards.device_held,
    "unbind-stuck": machine.unbind_stuck,
    "id-wide-claim": machine.id_wide_claim,
    "boot-order": machine.boot_order,
    "orphan-override": machine.orphan_override,
    "iommufd-busy": cards.iommufd_busy,
    "address-moved": machine.address_moved,
    "rmrr": cards.rmrr,
    "host-bar-window": cards.host_bar_window,
    "memlock": machine.memlock,
    "no-reset": cards.no_reset,
    "d3cold": cards.d3cold,
    "wrong-vfio-flavour": cards.wrong_vfio_flavour,
    "nvswitch": cards.nvswitch,
    "numa-hugepages": cards.numa_hugepages,
    "kvm-unusable": machine.kvm_unusable,
    "libvirt-unreachable": machine.libvirt_unreachable,
    "lost-device": cards.lost_device,
    "fenced": cards.fenced,
    "sriov-active": cards.sriov_active,
    "guest-bar-window": guests.guest_bar_window,
    "slow-bar-map": guests.slow_bar_map,
    "guest-topology": guests.guest_topology,
}
# What only shows when something is done, and who looks at it then.
ELSEWHERE: Mapping[str, str] = {
    "bind-silent": "seen as a function is bound: detach and attach verify the driver link",
}
ORDER = (Severity.FAIL, Severity.WARN, Severity.INFO)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The findings, worst first, the checks that ran, and those that could not, with why."""

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    skipped: Mapping[str, str]

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(finding.severity is not Severity.FAIL for finding in self.findings)


def diagnose(host: Host, *, ledger: Ledger, facts: HostFacts) -> Diagnosis:
    """Run every check that the facts allow."""
    skipped = {**facts.unread, **ELSEWHERE}
    checked = tuple(name for name in CHECKS if name not in skipped)
    findings = [finding for name in checked for finding in CHECKS[name](host, ledger, facts)]
    findings.sort(key=lambda finding: ORDER.index(finding.severity))
    return Diagnosis(tuple(findings), checked, skipped)
