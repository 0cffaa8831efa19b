"""Reads the host's IPv4 routes from /proc, for subnets that must not clash."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from gpupt.model.cluster import Route

# linux/route.h
RTF_UP = 0x1


def read_routes(root: Path) -> tuple[Route, ...] | None:
    """The routes of the main table; None where the tree does not show them."""
    try:
        lines = (root / "proc/net/route").read_text(errors="replace").splitlines()
    except OSError:
        return None
    found = []
    for line in lines[1:]:
        words = line.split()
        try:
            if len(words) < 8 or not int(words[3], 16) & RTF_UP:
                continue
            destination, mask = (_address(words[position]) for position in (1, 7))
            found.append(Route(words[0], IPv4Network(f"{destination}/{mask}", strict=False)))
        except ValueError:
            # No row of the kernel's.
            continue
    return tuple(found)


def _address(text: str) -> IPv4Address:
    """An address as the kernel prints it: 32 bits in hex, in the machine's byte order (all
    that gpupt runs on are little-endian)."""
    return IPv4Address(int.from_bytes(bytes.fromhex(text), "little"))
