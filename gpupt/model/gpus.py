"""Which PCI functions are GPUs, and which are companions on the same card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gpupt.model.host import Fence, Gpu, GpuState, Host, Loan
from gpupt.model.pci import Identity, PciAddress, PciDevice, PciId

NVIDIA = 0x10DE
AMD = 0x1002
GPU_VENDORS = frozenset({NVIDIA, AMD, 0x8086})
VFIO = "vfio-pci"
# What a card that has fallen off the bus answers when its ids are read anew.
ALL_ONES = PciId(0xFFFF, 0xFFFF)


def is_gpu_class(class_code: int, *, vendor: int) -> bool:
    """Whether the class is a display's (03xxxx), or a GPU vendor's accelerator's (12xxxx).

    AMD's Instinct cards and some of NVIDIA's report 1200 instead of a display class.
    """
    base = class_code >> 16
    return base == 0x03 or (base == 0x12 and vendor in GPU_VENDORS)


def is_integrated_npu(device: PciDevice) -> bool:
    """Whether an accelerator is Intel's NPU, which sits in the root complex and is no GPU."""
    return device.class_code >> 16 == 0x12 and device.id.vendor == 0x8086 and not device.address.bus


def find_gpus(devices: Mapping[PciAddress, PciDevice]) -> tuple[Gpu, ...]:
    """Every GPU in the order of addresses: one for each card, one for each virtual function.

    A second display function of a slot, like a sound or USB-C function, is a companion.
    """
    slots: dict[tuple[int, int, int], list[PciDevice]] = {}
    for device in devices.values():
        slots.setdefault(device.address.slot, []).append(device)
    found: list[Gpu] = []
    for functions in slots.values():
        displays = [
            device
            for device in functions
            if is_gpu_class(device.class_code, vendor=device.id.vendor)
            and not is_integrated_npu(device)
        ]
        whole = [device for device in displays if device.physfn is None]
        found.extend(Gpu(device) for device in displays if device.physfn is not None)
        if whole:
            main = min(whole, key=lambda device: device.address)
            found.append(Gpu(main, companions_of(main, functions)))
    return tuple(sorted(found, key=lambda gpu: gpu.address))


def companions_of(main: PciDevice, functions: list[PciDevice]) -> tuple[PciAddress, ...]:
    """The other functions of the card: not its bridges, not its virtual functions."""
    return tuple(
        sorted(
            device.address
            for device in functions
            if device is not main and not device.is_bridge and device.physfn is None
        )
    )


def identity_of(device: PciDevice) -> Identity:
    """What is recorded of a function, to know it again."""
    return Identity(device.id, device.subsystem, device.class_code)


def is_another_card(now: Identity, was: Identity) -> bool:
    """Whether an address holds another card than it did; all ones say nothing of that."""
    return now.id != ALL_ONES and replace(now, serial=was.serial) != was


def fence_of(device: PciDevice, fences: Mapping[PciAddress, Fence]) -> Fence | None:
    """The fence of the card that is at the device's address now; one of another card that was
    there does not count."""
    fence = fences.get(device.address)
    if fence is None or is_another_card(identity_of(device), fence.identity):
        return None
    return fence


def stands(fence: Fence, host: Host) -> bool:
    """Whether the card that was fenced is still in its place."""
    device = host.devices.get(fence.gpu)
    return device is not None and not is_another_card(identity_of(device), fence.identity)


def state_of(gpu: Gpu, loan: Loan | None) -> GpuState:
    """Who has the GPU: a loan to a node counts before the driver, and a lost card before both."""
    if gpu.device.lost:
        return GpuState.LOST
    if loan is not None and loan.node is not None:
        return GpuState.LENT
    driver = gpu.device.binding.driver
    if driver is None:
        return GpuState.DRIVERLESS
    # Variant drivers (mlx5_vfio_pci, nvgrace_gpu_vfio_pci) serve guests as vfio-pci does.
    if driver == VFIO or driver.endswith(("_vfio_pci", "-vfio-pci")):
        return GpuState.DETACHED
    return GpuState.HOST
