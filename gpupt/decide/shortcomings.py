"""What keeps a host from lending GPUs that no file can mend, each with its evidence; pure."""

from __future__ import annotations

from collections.abc import Iterator

from gpupt.model.host import Finding, Host, Severity
from gpupt.model.preparation import PreparationFacts

INTEL, AMD = "GenuineIntel", "AuthenticAMD"
# ACPI's table of the IOMMU, which the firmware hides when the IOMMU is off.
TABLE = {INTEL: "DMAR", AMD: "IVRS"}
CALLED = {INTEL: "VT-d", AMD: "AMD-Vi, or IOMMU"}
OFF = frozenset({"intel_iommu=off", "amd_iommu=off", "iommu=off"})
UNMAPPED = frozenset({"intremap=off", "nointremap"})
INTEL_ON = "intel_iommu=on"


def assess_shortcomings(host: Host, *, facts: PreparationFacts) -> Iterator[Finding]:
    """What needs the firmware, or an admin's own decision."""
    yield from iommu(host, facts=facts)
    yield from interrupts(host, facts=facts)
    yield from virtualisation(facts)
    if not facts.vfio:
        yield Finding(
            "vfio-missing",
            Severity.FAIL,
            "host",
            "the kernel has no vfio-pci",
            ("neither in /sys/bus/pci/drivers nor among the modules of the running kernel",),
            "install the modules of the running kernel, or reboot into the one installed",
        )


def kernel_words_lacking(host: Host, *, facts: PreparationFacts) -> tuple[str, ...]:
    """The words that the running kernel would have needed to switch the IOMMU on.

    Only Intel's needs one, and only where CONFIG_INTEL_IOMMU_DEFAULT_ON is not set: the
    firmware offers VT-d and there is no group.
    """
    running = set(host.kernel_cmdline.split())
    if host.iommu_present or facts.vendor != INTEL or INTEL_ON in running:
        return ()
    if firmware_off(facts) or words_against(host, facts=facts):
        return ()
    return (INTEL_ON,)


def firmware_off(facts: PreparationFacts) -> bool:
    """Whether the firmware is known not to offer an IOMMU."""
    table = TABLE.get(facts.vendor or "")
    return facts.tables is not None and table is not None and table not in facts.tables


def words_against(host: Host, *, facts: PreparationFacts) -> tuple[str, ...]:
    """Words with which an admin switched the IOMMU off, and that the next boot has still."""
    next_boot = facts.boot.words
    words = frozenset(host.kernel_cmdline.split()) if next_boot is None else next_boot
    return tuple(sorted(words & OFF))


def iommu(host: Host, *, facts: PreparationFacts) -> Iterator[Finding]:
    """No IOMMU group, and not for a word that is lacking."""
    if host.iommu_present or kernel_words_lacking(host, facts=facts):
        return
    line = f"kernel command line: {host.kernel_cmdline or '(not readable)'}"
    evidence = ["/sys/kernel/iommu_groups is empty"]
    called = CALLED.get(facts.vendor or "", "VT-d, AMD-Vi or SMMU")
    if firmware_off(facts):
        table = TABLE[facts.vendor or ""]
        brief = f"the firmware offers no IOMMU ({called})"
        evidence.append(f"there is no ACPI table {table}: the firmware hides it while it is off")
        remedy = f"switch on {called} in the firmware's setup, boot, and prepare again"
        if "hypervisor" in (facts.flags or ()):
            evidence.append("this is itself a virtual machine (flag hypervisor in /proc/cpuinfo)")
            remedy = "give this virtual machine an IOMMU (vIOMMU) in its hypervisor"
    elif against := words_against(host, facts=facts):
        brief = f"the kernel command line switches the IOMMU off: {' '.join(against)}"
        evidence.append(line)
        remedy = "take that out where you put it; gpupt takes out no word that it did not write"
    else:
        why = "is not why" if host.kernel_cmdline else "could not be read"
        brief = f"there are no IOMMU groups, and the kernel command line {why}"
        evidence.append(line)
        if facts.tables is None:
            evidence.append("/sys/firmware/acpi/tables is not there, so the firmware is not known")
        remedy = (
            f"switch on {called} in the firmware's setup; "
            "dmesg | grep -iE 'dmar|amd-vi|iommu|smmu' shows what the kernel found; "
            "after a change that is waiting, reboot"
        )
    yield Finding("iommu-off", Severity.FAIL, "host", brief, tuple(evidence), remedy)


def interrupts(host: Host, *, facts: PreparationFacts) -> Iterator[Finding]:
    """Interrupts are not remapped: the firmware's x2APIC setting, or a word of an admin's."""
    if not host.iommu_present or facts.remapped is not False:
        return
    against = sorted(UNMAPPED & set(host.kernel_cmdline.split()))
    yield Finding(
        "intremap-off",
        Severity.FAIL,
        "host",
        "interrupts are not remapped: vfio refuses to give devices to guests",
        ("no IR-… among the interrupt chips in /proc/interrupts",)
        + ((f"kernel command line: {' '.join(against)}",) if against else ()),
        f"take {' '.join(against)} out of the kernel command line; reboot"
        if against
        else "enable interrupt remapping (x2APIC) in the firmware's setup",
    )


def virtualisation(facts: PreparationFacts) -> Iterator[Finding]:
    """The processor's virtualisation (VT-x, SVM) is off, or KVM could not use it."""
    if facts.flags is None or facts.vendor not in TABLE:
        return
    flag, module, called = (
        ("vmx", "kvm_intel", "Intel VT-x") if facts.vendor == INTEL else ("svm", "kvm_amd", "SVM")
    )
    inside = "hypervisor" in facts.flags
    where = (
        "allow nested virtualisation in this machine's hypervisor"
        if inside
        else f"switch on {called} in the firmware's setup (power the machine off after)"
    )
    if flag not in facts.flags:
        yield Finding(
            "kvm-unusable",
            Severity.WARN,
            "host",
            f"the processor does not offer {called}: nodes would be emulated, slowly",
            (f"/proc/cpuinfo has no flag {flag}",),
            where,
        )
    elif not facts.kvm:
        yield Finding(
            "kvm-unusable",
            Severity.WARN,
            "host",
            f"the processor has {called}, and KVM does not run",
            (f"/proc/cpuinfo has the flag {flag}, and there is no /dev/kvm",),
            f"modprobe {module} says why; where dmesg says 'disabled by bios', {where}",
        )
