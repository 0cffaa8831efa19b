"""Every check of doctor fires on its cause, and is silent without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
from fakekernel import Function, plant
from machines import emulated_host, laptop, server

from gpupt.actions import JournalEntry, Ledger, LendGpu, Plan, RecordLoan, Run
from gpupt.decide.doctor import CHECKS, ELSEWHERE, diagnose
from gpupt.edges.hostfacts import read_facts
from gpupt.edges.sysfs import read_host
from gpupt.errors import Failed, GpuptError
from gpupt.model.facts import Guest, GuestFunction, MemoryLimits
from gpupt.model.gpus import identity_of
from gpupt.model.host import Fence, Finding, FunctionOrigin, Host, Loan
from gpupt.model.pci import PciAddress, PciId

GPU = "0000:01:00.0"
FOLDER = f"sys/bus/pci/devices/{GPU}"


def at(text: str) -> PciAddress:
    return PciAddress.parse(text)


def card(**more: object) -> Function:
    given = {"driver": "nvidia", "group": 1, **more}
    return Function(GPU, "10de:2330", 0x030200, **given)  # type: ignore[arg-type]


@dataclass
class Machine:
    """A planted machine and what doctor is told beside it."""

    functions: list[Function] = field(default_factory=lambda: [card()])
    files: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    ledger: Callable[[Host], Ledger] = lambda host: Ledger()
    kvm: str | None = None
    libvirt: GpuptError | None = None
    guests: tuple[Guest, ...] = ()
    limits: MemoryLimits | None = None
    drivers: Iterable[str] = ("vfio-pci",)

    def findings(self, root: Path) -> tuple[Finding, ...]:
        plant(root, self.functions, drivers=list(self.drivers))
        (root / "proc/1").mkdir()
        (root / "proc/self").mkdir(exist_ok=True)
        (root / "proc/self/mountinfo").write_text("22 1 0:30 / / rw - overlay overlay rw\n")
        for name, text in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        for name, target in self.links.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(target)
        host = read_host(root, whole=True)
        facts = read_facts(root, host, kvm=self.kvm, libvirt=self.libvirt, guests=self.guests)
        if self.limits is not None:
            unread = {key: why for key, why in facts.unread.items() if key != "memlock"}
            facts = replace(facts, limits=self.limits, unread=unread)
        return diagnose(host, ledger=self.ledger(host), facts=facts).findings


def on_loan(host: Host, *, was: PciId | None = None) -> Ledger:
    device = host.devices[at(GPU)]
    identity = identity_of(device)
    if was is not None:
        identity = replace(identity, id=was)
    loan = Loan(device.address, (FunctionOrigin(device.address, identity, device.binding),))
    return Ledger({loan.gpu: loan})


def fenced(host: Host, *, other: bool = False) -> Ledger:
    identity = identity_of(host.devices[at(GPU)])
    if other:
        identity = replace(identity, id=PciId(0x10DE, 0x20B5))
    return Ledger(fences={at(GPU): Fence(at(GPU), identity, "rma", "2026-01-01T00:00:00+00:00")})


def cut_short(host: Host) -> Ledger:
    record = RecordLoan(at(GPU), (), why="…")
    entry = JournalEntry(0, record, None, True)
    lend = LendGpu(at(GPU), "c", "n", why="…")
    return Ledger({}, (Run(1, Plan("detach", GPU, (record, lend)), 77, (entry,)),))


SOUND = Function("0000:01:00.1", "10de:10f9", 0x040300, "snd_hda_intel", group=1)
APART = replace(SOUND, group=2)
NIC = Function("0000:02:00.0", "8086:1592", 0x020000, "ice", group=1)
X86 = "           CPU0\n  9:  1  {}-IO-APIC  9-fasteoi  acpi\n 24: 3 {}-PCI-MSI-0000:01:00.0\n"
HELD = {"proc/77/comm": "python3\n", f"{FOLDER}/drm/renderD128/dev": "226:128\n"}
VFIO_HELD = {"proc/78/comm": "qemu-system-x86\n"}
SLEEPS_IN_UNBIND = {
    "proc/79/comm": "tee\n",
    "proc/79/stat": "79 (tee) S 1 79\n",
    "proc/79/stack": "[<0>] vfio_unregister_group_dev+0x1\n[<0>] unbind_store+0x1\n",
}
NODES = {
    f"sys/devices/system/node/node{n}/hugepages/hugepages-1048576kB/nr_hugepages": "16\n"
    if n == 0
    else "0\n"
    for n in (0, 1)
}
RELEASE = {"proc/sys/kernel/osrelease": "6.12.0\n"}
ALIASES = (
    "alias pci:v000010DEd*sv*sd*bc03sc02i00* nvidia\n"
    "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n"
    "alias vfio_pci:v000010DEd00002342sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci\n"
)
ROUTE = (
    "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
)
UPLINK = {"proc/net/route": ROUTE, "sys/devices/pci0000:00/0000:02:00.0/net/eth0/mtu": "1500\n"}
UPLINK_LINK = {"sys/class/net/eth0": "../../devices/pci0000:00/0000:02:00.0/net/eth0"}
GIB = 1 << 30
BITS = {
    n: {"proc/cpuinfo": f"address sizes\t: {n} bits physical, 48 bits virtual\n"} for n in (36, 46)
}
H100_BARS = ((0, 16 << 20, 0x14220C), (2, 128 * GIB, 0x14220C))
H100 = card(bars=H100_BARS)
GUEST = Guest(
    "other",
    "pc-q35-10.0",
    (GuestFunction(at(GPU), 5),),
    controllers={0: "pcie-root", 5: "pcie-root-port", 6: "pcie-root-port"},
    memory=64 * GIB,
    host_bits=True,
)
TWO = replace(GUEST, functions=(*GUEST.functions, GuestFunction(at("0000:05:00.0"), 5)))
APART_IN_GUEST = replace(TWO, functions=(GUEST.functions[0], GuestFunction(at("0000:05:00.0"), 6)))
TWIN = replace(card(), address="0000:05:00.0", group=5)
OVMF_40 = replace(GUEST, uefi=True, host_bits=False, address_bits=40)


def release(text: str) -> dict[str, str]:
    return {"proc/sys/kernel/osrelease": f"{text}\n"}


# check → a machine on which it fires, and one as like it as can be on which it does not
CASES: dict[str, list[tuple[Machine, Machine]]] = {
    "iommu-off": [(Machine([card(group=None)]), Machine())],
    "intremap-off": [
        (
            Machine(files={"proc/interrupts": X86.replace("{}-", "")}),
            Machine(files={"proc/interrupts": X86.replace("{}", "IR")}),
        ),
        (
            Machine(
                files={
                    "proc/interrupts": X86.replace("{}-", ""),
                    "sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts": "Y\n",
                }
            ),
            Machine(files={"proc/interrupts": "  9: 1 GICv3 27 Level arch_timer\n"}),
        ),
    ],
    "vfio-missing": [
        (
            Machine(drivers=()),
            Machine(
                drivers=(),
                files={
                    **RELEASE,
                    "lib/modules/6.12.0/modules.builtin": "kernel/drivers/vfio/pci/vfio-pci.ko\n",
                },
            ),
        )
    ],
    "group-not-viable": [
        (Machine([card(), NIC]), Machine([card(), replace(NIC, group=2)])),
        (Machine([card(driver="vfio-pci"), NIC]), Machine([card(), SOUND])),
        (
            Machine([card(), replace(NIC, class_code=0x060400)]),
            Machine([card(), replace(NIC, class_code=0x060400, driver="pcieport")]),
        ),
    ],
    "group-host-critical": [
        (
            Machine([card(), NIC], files=UPLINK, links=UPLINK_LINK),
            Machine([card(), replace(NIC, group=2)], files=UPLINK, links=UPLINK_LINK),
        )
    ],
    "companion-missed": [
        (Machine([card(driver="vfio-pci"), SOUND]), Machine([card(), SOUND])),
        (
            Machine([card(driver="vfio-pci"), APART]),
            Machine([card(driver="vfio-pci"), replace(APART, driver="vfio-pci")]),
        ),
    ],
    "boot-framebuffer": [
        (
            Machine([card(boot_vga=1)], files={"proc/fb": "0 EFI VGA\n"}),
            Machine([card(boot_vga=0)]),
        ),
        (
            Machine(
                files={
                    "proc/iomem": "a0000000-bfffffff : PCI Bus 0000:01\n"
                    f"  a0000000-afffffff : {GPU}\n    a0000000-a07e8fff : BOOTFB\n"
                }
            ),
            Machine(
                files={
                    "proc/iomem": f"a0000000-afffffff : {GPU}\n"
                    "b0000000-bfffffff : 0000:09:00.0\n  b0000000-b07e8fff : BOOTFB\n"
                }
            ),
        ),
    ],
    "device-held": [
        (
            Machine(files=HELD, links={"proc/77/fd/5": "/dev/dri/renderD128"}),
            Machine(files=HELD, links={"proc/77/fd/5": "/dev/dri/renderD129"}),
        )
    ],
    "unbind-stuck": [
        (
            Machine(
                files={
                    "proc/79/comm": "gpupt\n",
                    "proc/79/stat": "79 (gpupt (x) y) D 1 79\n",
                    "proc/79/stack": "[<0>] nv_pci_remove\n[<0>] unbind_store+0x1\n",
                }
            ),
            Machine(
                files={
                    "proc/79/comm": "gpupt\n",
                    "proc/79/stat": "79 (D unbind) S 1 79\n",
                    "proc/79/stack": "[<0>] unbind_store+0x1\n",
                }
            ),
        ),
        (
            Machine(files=SLEEPS_IN_UNBIND | {"proc/79/wchan": "vfio_unregister_group_dev"}),
            Machine(files=SLEEPS_IN_UNBIND | {"proc/79/wchan": "do_wait"}),
        ),
    ],
    "id-wide-claim": [
        (
            Machine(
                [card(), replace(card(), address="0000:05:00.0")],
                files={"proc/cmdline": "quiet vfio-pci.ids=10de:2330\n"},
            ),
            Machine(files={"proc/cmdline": "quiet vfio-pci.ids=10de:2330\n"}),
        ),
        (
            Machine(
                [card(), replace(card(), address="0000:05:00.0")],
                files={"etc/modprobe.d/vfio.conf": "options vfio-pci ids=10de:2330,10de:10f9\n"},
            ),
            Machine(
                [card(), replace(card(), address="0000:05:00.0")],
                files={"etc/modprobe.d/vfio.conf": "# options vfio-pci ids=10de:2330\n"},
            ),
        ),
    ],
    "boot-order": [
        (
            Machine(files={"proc/cmdline": "vfio-pci.ids=10de:2330\n"}),
            Machine([card(driver="vfio-pci")], files={"proc/cmdline": "vfio-pci.ids=10de:2330\n"}),
        )
    ],
    "orphan-override": [
        (
            Machine([card(override="vfio-pci")]),
            Machine([card(override="vfio-pci")], ledger=on_loan),
        ),
        (Machine(ledger=cut_short), Machine([card(override="nvidia")])),
    ],
    "iommufd-busy": [
        (
            Machine(
                [card(driver="vfio-pci")], files=VFIO_HELD, links={"proc/78/fd/3": "/dev/vfio/1"}
            ),
            Machine(
                [card(driver="vfio-pci")], files=VFIO_HELD, links={"proc/78/fd/3": "/dev/vfio/9"}
            ),
        )
    ],
    "address-moved": [
        (
            Machine(ledger=lambda host: on_loan(host, was=PciId(0x10DE, 0x1EB8))),
            Machine(ledger=on_loan),
        )
    ],
    "rmrr": [
        (
            Machine(
                files={
                    "sys/kernel/iommu_groups/1/reserved_regions": "0x8a000000 0x8c7fffff direct\n"
                }
            ),
            Machine(
                files={
                    "sys/kernel/iommu_groups/1/reserved_regions": "0xfee00000 0xfeefffff msi\n"
                    "0x8a000000 0x8c7fffff direct-relaxable\n"
                }
            ),
        )
    ],
    "host-bar-window": [
        (
            Machine(files={f"{FOLDER}/resource": "0x0 0x3ffffffff 0x14220c\n"}),
            Machine(
                files={f"{FOLDER}/resource": "0x2000000000 0x23ffffffff 0x14220c\n0x0 0x0 0x0\n"}
            ),
        )
    ],
    "memlock": [
        (
            Machine(limits=MemoryLimits(8 << 20, as_root=False, dma_entries=None, total=64 * GIB)),
            Machine(limits=MemoryLimits(8 << 20, as_root=True, dma_entries=65535, total=64 * GIB)),
        ),
        (
            Machine(limits=MemoryLimits(None, as_root=True, dma_entries=1024, total=None)),
            Machine(limits=MemoryLimits(64 * GIB, as_root=False, dma_entries=None, total=64 * GIB)),
        ),
    ],
    "no-reset": [
        (Machine([card(resets="")]), Machine([card(resets="flr bus")])),
        (
            Machine([replace(card(resets="bus"), id="1002:687f")]),
            Machine([replace(card(resets="device_specific bus"), id="1002:687f")]),
        ),
        (Machine([card(resets="")]), Machine([card(resets=None)])),
        # From 5.15 on, what cannot be reset has no such file, and what can has one.
        (
            Machine([card(resets=None), replace(NIC, group=2, resets="flr")]),
            Machine([card(resets="flr"), replace(NIC, group=2, resets=None)]),
        ),
    ],
    "d3cold": [
        (
            Machine([card(driver="vfio-pci", more={"d3cold_allowed": "1"})]),
            Machine([card(driver="nvidia", more={"d3cold_allowed": "1"})]),
        )
    ],
    "wrong-vfio-flavour": [
        (
            Machine(
                files={
                    **RELEASE,
                    "lib/modules/6.12.0/modules.alias": ALIASES,
                    f"{FOLDER}/modalias": "pci:v000010DEd00002342sv000010DEsd0000bc03sc02i00\n",
                }
            ),
            Machine(
                files={
                    **RELEASE,
                    "lib/modules/6.12.0/modules.alias": ALIASES,
                    f"{FOLDER}/modalias": "pci:v000010DEd00002330sv000010DEsd0000bc03sc02i00\n",
                }
            ),
        )
    ],
    "nvswitch": [
        (
            Machine([card(), Function("0000:83:00.0", "10de:22a3", 0x068000, group=3)]),
            Machine([card(), Function("0000:83:00.0", "8086:22a3", 0x068000, group=3)]),
        )
    ],
    "numa-hugepages": [
        (Machine([card(numa=1)], files=NODES), Machine([card(numa=0)], files=NODES)),
    ],
    "kvm-unusable": [(Machine(kvm="no guest answered within 20 s"), Machine())],
    "libvirt-unreachable": [(Machine(libvirt=Failed("refused", remedy="start it")), Machine())],
    "lost-device": [
        (Machine([card(lost=True)]), Machine()),
        (Machine([card(), replace(SOUND, lost=True)]), Machine([card(), SOUND])),
    ],
    "fenced": [
        # Another card is in the slot by now.
        (Machine([card()], ledger=fenced), Machine([card()], ledger=partial(fenced, other=True)))
    ],
    "sriov-active": [
        (
            Machine([card(more={"sriov_numvfs": "4"})]),
            Machine([card(more={"sriov_numvfs": "0"})]),
        ),
        (
            Machine([card(), replace(APART, class_code=0x030200, driver="nvidia", physfn=GPU)]),
            Machine([card(), replace(APART, class_code=0x030200, driver="amdgpu", physfn=GPU)]),
        ),
    ],
    "guest-bar-window": [
        # The processor of the host has too few address bits, whatever the guest.
        (Machine([H100], files=BITS[36]), Machine([H100], files=BITS[46])),
        # QEMU's 40 bits, of which OVMF keeps an eighth: 128 GiB for 128 GiB and 16 MiB.
        (
            Machine([H100], files=BITS[46], guests=(OVMF_40,)),
            Machine(
                [H100],
                files=BITS[46],
                guests=(replace(OVMF_40, host_bits=True, address_bits=None),),
            ),
        ),
        (
            Machine([H100], files=BITS[46], guests=(replace(OVMF_40, window=128 * GIB),)),
            Machine([H100], files=BITS[46], guests=(replace(OVMF_40, window=256 * GIB),)),
        ),
        # SeaBIOS takes what is above the guest's memory.
        (
            Machine(
                [H100],
                files=BITS[46],
                guests=(replace(OVMF_40, uefi=False, memory=800 * GIB),),
            ),
            Machine([H100], files=BITS[46], guests=(replace(OVMF_40, uefi=False),)),
        ),
    ],
    "slow-bar-map": [
        (Machine([H100], files=release("6.12.41+deb13")), Machine([H100], files=release("6.15.0"))),
        (Machine([H100], files=release("5.15.0-1")), Machine(files=release("5.15.0-1"))),
    ],
    "guest-topology": [
        (
            Machine(guests=(replace(GUEST, machine="pc-i440fx-9.2"),)),
            Machine(guests=(GUEST,)),
        ),
        (Machine([card(), TWIN], guests=(TWO,)), Machine([card(), TWIN], guests=(APART_IN_GUEST,))),
        (
            Machine(guests=(replace(GUEST, functions=(GuestFunction(at(GPU), 0),)),)),
            # A network card of the host on an old machine is nobody's concern here.
            Machine(
                guests=(replace(GUEST, machine="pc", functions=(GuestFunction(at("2:0.0"), 0),)),)
            ),
        ),
    ],
}


def test_every_check_has_a_case() -> None:
    assert set(CASES) == set(CHECKS)
    assert not set(CHECKS) & set(ELSEWHERE)


def cases(which: int) -> list[object]:
    """The machines on which checks fire (0), or those on which they do not (1)."""
    return [
        pytest.param(name, pair[which], id=f"{name}-{number}")
        for name, pairs in CASES.items()
        for number, pair in enumerate(pairs)
    ]


@pytest.mark.parametrize(("name", "machine"), cases(0))
def test_fires(tmp_path: Path, name: str, machine: Machine) -> None:
    found = [finding for finding in machine.findings(tmp_path) if finding.id == name]
    assert found
    for finding in found:
        assert finding.subject
        assert finding.brief
        assert not finding.brief.endswith(".")


@pytest.mark.parametrize(("name", "machine"), cases(1))
def test_is_silent(tmp_path: Path, name: str, machine: Machine) -> None:
    assert name not in {finding.id for finding in machine.findings(tmp_path)}


def test_a_healthy_machine_is_healthy(tmp_path: Path) -> None:
    for name, machine in (("e", emulated_host), ("s", server), ("l", laptop)):
        machine(tmp_path / name)
        host = read_host(tmp_path / name, whole=True)
        facts = read_facts(tmp_path / name, host)
        assert diagnose(host, ledger=Ledger(), facts=facts).healthy


def test_checked_and_skipped_are_all_there_is(tmp_path: Path) -> None:
    emulated_host(tmp_path)
    host = read_host(tmp_path, whole=True)
    facts = read_facts(tmp_path, host, unread={"kvm-unusable": "not asked"})
    diagnosis = diagnose(host, ledger=Ledger(), facts=facts)
    assert not set(diagnosis.checked) & set(diagnosis.skipped)
    assert set(diagnosis.checked) | set(diagnosis.skipped) == set(CHECKS) | set(ELSEWHERE)
    assert diagnosis.skipped["kvm-unusable"] == "not asked"
    assert diagnosis.skipped["device-held"] == "no processes under this root"


def test_a_kernel_that_tells_no_resets_is_not_asked(tmp_path: Path) -> None:
    plant(tmp_path, [card()])
    host = read_host(tmp_path, whole=True)
    diagnosis = diagnose(host, ledger=Ledger(), facts=read_facts(tmp_path, host))
    assert "reset_method" in diagnosis.skipped["no-reset"]


def test_the_worst_comes_first(tmp_path: Path) -> None:
    found = Machine([card(group=None, boot_vga=1, resets="")]).findings(tmp_path)
    assert [finding.severity.value for finding in found] == ["fail", "warn", "info"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every process")
def test_a_look_into_processes_that_is_denied_is_no_look(tmp_path: Path) -> None:
    Machine(files=HELD).findings(tmp_path)
    (tmp_path / "proc/77/fd").mkdir(mode=0)
    facts = read_facts(tmp_path, read_host(tmp_path, whole=True))
    assert "root only" in facts.unread["device-held"]


def test_the_remedy_for_libvirt_stands_once(tmp_path: Path) -> None:
    trouble = Failed("cannot reach libvirt", details="no socket", remedy="start it")
    (found,) = Machine(libvirt=trouble).findings(tmp_path)
    assert (found.evidence, found.remedy) == (("cannot reach libvirt", "no socket"), "start it")
