"""Checks of the machine as a whole: IOMMU, vfio, KVM, libvirt, limits, what was left behind."""

from __future__ import annotations

from collections.abc import Iterator

from gpupt.actions import Ledger
from gpupt.decide.binding import orphans
from gpupt.decide.viability import moved_functions
from gpupt.model.facts import HostFacts
from gpupt.model.gpus import VFIO
from gpupt.model.host import Finding, Host, Severity

GIB = 1 << 30
# type1's own default (vfio_iommu_type1.c); fewer mappings than that breaks large BARs.
DMA_ENTRIES = 65535


def iommu_off(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """No IOMMU group: nothing can be passed through."""
    if host.iommu_present:
        return
    yield Finding(
        "iommu-off",
        Severity.FAIL,
        "host",
        "there are no IOMMU groups: no device can be passed through",
        (
            "/sys/kernel/iommu_groups is empty (the kernel's line `IOMMU enabled` proves nothing)",
            f"kernel command line: {host.kernel_cmdline or '(not readable)'}",
        ),
        "enable VT-d or AMD-Vi (Arm: SMMU) in the firmware; "
        + (
            "on Intel with a kernel before 6.8 add intel_iommu=on to the kernel command line "
            "(gpupt host prepare does); reboot"
            if "intel_iommu=on" not in host.kernel_cmdline
            else "the kernel command line asks for it already; reboot"
        ),
    )


def intremap_off(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """Interrupts are not remapped: vfio refuses, or a guest could forge interrupts."""
    chips = facts.interrupt_chips
    if not host.iommu_present or chips is None or any(chip.startswith("IR-") for chip in chips):
        return
    if facts.unsafe_interrupts:
        yield Finding(
            "intremap-off",
            Severity.WARN,
            "host",
            "interrupts are not remapped, and unsafe interrupts are allowed",
            ("/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts is Y",),
            "a guest could disturb the host; enable interrupt remapping in the firmware (x2apic)",
        )
        return
    yield Finding(
        "intremap-off",
        Severity.FAIL,
        "host",
        "interrupts are not remapped: vfio refuses to give devices to guests",
        (f"interrupt chips in /proc/interrupts: {', '.join(sorted(chips)) or 'none'} (no IR-…)",),
        "enable interrupt remapping (x2apic) in the firmware, and drop intremap=off; only as a "
        "last resort: vfio_iommu_type1.allow_unsafe_interrupts=1",
    )


def vfio_missing(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """vfio-pci is neither loaded nor to be loaded."""
    if not facts.vfio:
        yield Finding(
            "vfio-missing",
            Severity.FAIL,
            "host",
            "the kernel has no vfio-pci",
            ("neither in /sys/bus/pci/drivers nor among the modules of the running kernel",),
            "install the modules of the running kernel, or reboot into the kernel that is "
            "installed; then: modprobe vfio-pci",
        )


def unbind_stuck(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A process hangs inside an unbind: the driver waits for whoever holds the device."""
    for stuck in facts.stuck:
        who = f"{stuck.command} (PID {stuck.pid})"
        if stuck.guest:
            evidence = f"{who} is inside unbind_store, and vfio waits for a guest to let go"
            remedy = (
                "fuser -v /dev/vfio/* names the guest's QEMU: let it run on if it is stopped, "
                "or end it"
            )
        else:
            evidence = f"{who} is in state D inside unbind_store"
            remedy = (
                "do not retry; stop nvidia-persistenced and whatever holds the GPU, set "
                "nvidia-drm modeset=0; reboot if it stays"
            )
        yield Finding(
            "unbind-stuck",
            Severity.FAIL,
            f"PID {stuck.pid}",
            "an unbind does not come to its end",
            (evidence,),
            remedy,
        )


def id_wide_claim(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """vfio-pci is told to take ids, and so takes the twin of a card too."""
    for claim in facts.claims:
        for identifier in claim.ids:
            twins = [d.address for d in host.devices.values() if d.id == identifier]
            if len(twins) > 1:
                yield Finding(
                    "id-wide-claim",
                    Severity.WARN,
                    str(identifier),
                    f"vfio-pci takes all {len(twins)} cards of {identifier} at boot",
                    (f"{claim.where}", *(str(address) for address in twins)),
                    "remove the ids there; gpupt detach takes cards by their address",
                )


def boot_order(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """vfio-pci was told to take a card at boot, and another driver was first."""
    for claim in facts.claims:
        for device in host.devices.values():
            driver = device.binding.driver
            if device.id in claim.ids and driver not in {None, VFIO}:
                yield Finding(
                    "boot-order",
                    Severity.WARN,
                    str(device.address),
                    f"vfio-pci was to take it at boot, and {driver} was first",
                    (claim.where, f"kernel command line: {host.kernel_cmdline}"),
                    f"add `softdep {driver} pre: vfio-pci` to /etc/modprobe.d and rebuild the "
                    "initramfs; or leave the claim out and use gpupt detach",
                )


def orphan_override(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A driver_override to vfio-pci that no loan explains."""
    for address in orphans(host, loans=ledger.loans):
        driver = host.devices[address].binding.driver
        yield Finding(
            "orphan-override",
            Severity.WARN,
            str(address),
            "driver_override is vfio-pci, and no loan explains it",
            (f"driver: {driver or 'none'}", "left by a crash, or set by another program"),
            "gpupt recover --dry-run shows what would be cleared",
        )
    for run in ledger.unfinished:
        yield Finding(
            "orphan-override",
            Severity.FAIL,
            f"{run.plan.verb} {run.plan.subject}",
            "a run was cut short, and its changes stand half-way",
            (
                f"PID {run.pid}: {sum(entry.done for entry in run.entries)} of "
                f"{len(run.plan.actions)} actions done",
            ),
            "gpupt recover",
        )


def address_moved(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A loan names an address that holds another card now."""
    for loan in ledger.loans.values():
        for line in moved_functions(host, loan):
            yield Finding(
                "address-moved",
                Severity.FAIL,
                str(loan.gpu),
                "the address on loan holds another card now",
                (line,),
                "put the card back into its slot; or gpupt recover, which forgets its loan",
            )


def memlock(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """Guests cannot lock their memory, or not map it in enough pieces."""
    limits = facts.limits
    if limits is None:
        return
    if not limits.as_root and limits.locked is not None:
        enough = limits.total is not None and limits.locked >= limits.total
        if not enough:
            yield Finding(
                "memlock",
                Severity.WARN,
                "host",
                f"guests of this user may lock {limits.locked / GIB:.1f} GiB of memory",
                ("a guest with a GPU locks all of its memory; libvirt's system URI sees to that",),
                "use qemu:///system, or raise memlock in /etc/security/limits.d",
            )
    if limits.dma_entries is not None and limits.dma_entries < DMA_ENTRIES:
        yield Finding(
            "memlock",
            Severity.WARN,
            "host",
            f"vfio allows {limits.dma_entries} DMA mappings a guest",
            ("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit",),
            f"set vfio_iommu_type1.dma_entry_limit={DMA_ENTRIES}",
        )


def kvm_unusable(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """KVM is not there, or does not run a guest."""
    if facts.kvm is not None:
        yield Finding(
            "kvm-unusable",
            Severity.WARN,
            "/dev/kvm",
            "KVM does not run a guest: nodes will be emulated, slowly",
            (facts.kvm,),
            "enable virtualisation in the firmware, or nested virtualisation in the hypervisor",
        )


def libvirt_unreachable(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """No connection to libvirt."""
    if facts.libvirt is not None:
        yield Finding(
            "libvirt-unreachable",
            Severity.FAIL,
            "libvirt",
            "there is no connection to libvirt",
            (facts.libvirt.brief, *facts.libvirt.details),
            facts.libvirt.remedy,
        )
