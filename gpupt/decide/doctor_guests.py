"""Checks of what guests make of the cards: their address space, their buses, their start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from gpupt.actions import Ledger
from gpupt.decide.sizing import show_size
from gpupt.model.facts import Guest, HostFacts
from gpupt.model.host import Finding, Gpu, Host, Severity
from gpupt.model.pci import Bar, PciAddress

GIB = 1 << 30
# What lies below 4 GiB in any guest: its first memory, and windows of 32 bits.
LOW = 4 * GIB
# OVMF's PlatformDynamicMmioWindow: an eighth of the address space, of which it uses 47 bits.
EIGHTH, UEFI_BITS = 3, 47
# From this Linux on vfio maps large BARs by huge pages (vfio/type1: Use mapping page mask for
# pfnmaps); before, guests with H100s were seen to start 30 s later for each 128 GiB.
FAST_MAPS = (6, 15)
SLOW_BAR = 32 * GIB
SLOW_SECONDS, SLOW_BYTES = 30, 128 * GIB
# Buses of a guest on which each device has a PCI Express port to itself.
PORTS = frozenset({"pcie-root-port", "pcie-switch-downstream-port"})


def large_bars(gpu: Gpu) -> tuple[Bar, ...]:
    """The windows that may lie above 4 GiB."""
    return tuple(bar for bar in gpu.device.bars if bar.bits == 64)


def room_below_port(gpu: Gpu) -> int:
    """Bytes of address space that the GPU takes below a port of its own: a port's window is
    aligned as its largest BAR is."""
    sizes = [bar.size for bar in large_bars(gpu)]
    return -(-sum(sizes) // max(sizes)) * max(sizes) if sizes else 0


def gpus_of(guest: Guest, host: Host) -> tuple[Gpu, ...]:
    """The host's GPUs that a guest has."""
    has = {function.host for function in guest.functions}
    return tuple(gpu for gpu in host.gpus if gpu.address in has)


def guest_bar_window(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A GPU's memory does not fit where a guest can map it."""
    if facts.address_bits is not None:
        for gpu in host.gpus:
            size = sum(bar.size for bar in large_bars(gpu))
            if LOW + size > 1 << facts.address_bits:
                yield Finding(
                    "guest-bar-window",
                    Severity.WARN,
                    str(gpu.address),
                    f"its BARs of {show_size(size)} do not fit into the "
                    f"{show_size(1 << facts.address_bits)} that a guest here can address",
                    (f"/proc/cpuinfo: {facts.address_bits} bits physical",),
                    "a smaller resizable BAR; where this is itself a guest, give it the address "
                    "bits of its host",
                )
    for guest in facts.guests:
        yield from window_of_guest(guest, gpus_of(guest, host), host_bits=facts.address_bits)


def window_of_guest(
    guest: Guest, gpus: Iterable[Gpu], *, host_bits: int | None
) -> Iterator[Finding]:
    """What there is to say of one guest; nothing where its address bits are not known."""
    cards = tuple(gpus)
    bits = host_bits if guest.host_bits else guest.address_bits
    if guest.host_bits and guest.address_bits is not None and host_bits is not None:
        bits = min(host_bits, guest.address_bits)
    needed = sum(room_below_port(gpu) for gpu in cards)
    if bits is None or not needed:
        return
    if guest.uefi:
        room = max(1 << min(bits, UEFI_BITS) >> EIGHTH, guest.window or 0)
        how = "OVMF keeps an eighth of that for BARs at most"
        if guest.window is not None:
            how += f", and was told to keep {show_size(guest.window)}"
    else:
        room = (1 << bits) - LOW - guest.memory
        how = f"its memory takes {show_size(guest.memory)} of that"
    if needed > room:
        yield Finding(
            "guest-bar-window",
            Severity.WARN,
            guest.name,
            f"its GPUs take {show_size(needed)} of address space, and it has "
            f"{show_size(max(room, 0))} for them",
            (
                *(f"{gpu.address}: {show_size(room_below_port(gpu))}" for gpu in cards),
                f"its processor addresses {bits} bits, {show_size(1 << bits)}",
                how,
            ),
            'virsh edit: <cpu mode="host-passthrough"> gives it the host\'s address bits'
            + (f"; or opt/ovmf/X-PciMmio64Mb of at least {needed >> 20}" if guest.uefi else ""),
        )


def slow_bar_map(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """The kernel maps large BARs page by page, and guests start late by it."""
    if facts.kernel is None or facts.kernel >= FAST_MAPS:
        return
    slow = {
        gpu.address: sum(bar.size for bar in large_bars(gpu))
        for gpu in host.gpus
        if any(bar.size >= SLOW_BAR for bar in large_bars(gpu))
    }
    if slow:
        most = max(slow.values())
        yield Finding(
            "slow-bar-map",
            Severity.INFO,
            "host",
            f"a guest starts about {seconds(most)} s later for each GPU of "
            f"{show_size(most // GIB * GIB)} of BARs",
            (
                f"the kernel is {'.'.join(map(str, facts.kernel))}: before "
                f"{'.'.join(map(str, FAST_MAPS))} vfio maps BARs page by page "
                "(a distribution's may have what is newer)",
                *cards_by_size(slow),
            ),
            "wait; Linux 6.15 with QEMU 9.2, or later ones, map them at once",
        )


def seconds(size: int) -> int:
    """About how long BARs of that size keep a guest from starting."""
    return round(SLOW_SECONDS * size / SLOW_BYTES)


def cards_by_size(slow: Mapping[PciAddress, int]) -> Iterator[str]:
    """A line for each size of BARs, with the GPUs that have it."""
    for size in sorted(set(slow.values()), reverse=True):
        named = [str(address) for address, other in slow.items() if other == size]
        yield f"{show_size(size // GIB * GIB)}: {', '.join(named)}"


def guest_topology(host: Host, ledger: Ledger, facts: HostFacts) -> Iterator[Finding]:
    """A domain of libvirt's has GPUs where drivers do not find what they look for."""
    for guest in facts.guests:
        gpus = gpus_of(guest, host)
        if not gpus:
            continue
        wrong = tuple(misplaced(guest, gpus))
        if wrong:
            yield Finding(
                "guest-topology",
                Severity.WARN,
                guest.name,
                "its GPUs are not each on a PCI Express port of their own",
                wrong,
                "virsh edit: machine q35, and a controller of model pcie-root-port for each GPU",
            )


def misplaced(guest: Guest, gpus: Iterable[Gpu]) -> Iterator[str]:
    """What is wrong with where a guest has its GPUs, a line each."""
    named = guest.machine.split("-")
    if named[0] == "pc" and "q35" not in named:
        yield f"machine {guest.machine}: i440FX has no PCI Express at all"
        return
    buses = {function.host: function.bus for function in guest.functions}
    on_port: dict[int, list[Gpu]] = {}
    for gpu in gpus:
        bus = buses[gpu.address]
        model = None if bus is None else guest.controllers.get(bus)
        if bus is None or model is None:
            continue
        if model in PORTS:
            on_port.setdefault(bus, []).append(gpu)
        else:
            yield f"{gpu.address} is on the guest's bus {bus}, a {model}: no port is above it"
    for bus, several in on_port.items():
        if len(several) > 1:
            names = ", ".join(str(gpu.address) for gpu in several)
            yield f"{names} share the port of the guest's bus {bus}"
