"""The gate to cluster.yaml: text in, a ClusterSpec out, and the place of every value.

Every error is a BadInput that names file, line and column; nothing else is touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from ipaddress import AddressValueError, IPv4Network, NetmaskValueError
from pathlib import Path

from gpupt.edges.yamlfile import Value, parse_yaml, read_yaml
from gpupt.errors import BadInput
from gpupt.model.cluster import ClusterSpec, GpuRequest, NodeSpec, Role
from gpupt.model.pci import PciAddress

DEFAULT_SUBNET = IPv4Network("10.71.0.0/24")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
LEAST_MEMORY = 64 << 20
LEAST_DISK = 1 << 30
MOST_NODES = 200
MOST_GPUS = 64
# RFC 1123: letters, digits and hyphens, no hyphen at either end, at most 63.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True)
class SpecFile:
    """A specification and where its values stand: ``places`` maps paths such as
    ``nodes[1].gpus[0]`` and ``network.subnet`` to ``file:line:column``."""

    spec: ClusterSpec
    places: Mapping[str, str]


def read_specfile(
    file: Path, *, known_rolls: Sequence[str], host_rolls: Mapping[str, str] | None = None
) -> SpecFile:
    """The specification in a file; ``host_rolls`` are those that are not for nodes, each
    with what it is for.  Raises BadInput."""
    return _read_cluster(read_yaml(file), known_rolls, host_rolls or {})


def parse_specfile(
    text: str,
    *,
    file: str,
    known_rolls: Sequence[str],
    host_rolls: Mapping[str, str] | None = None,
) -> SpecFile:
    """The specification in a text; ``file`` names it in errors; raises BadInput."""
    return _read_cluster(parse_yaml(text, file=file), known_rolls, host_rolls or {})


def parse_size(text: str) -> int:
    """Bytes of a text such as ``2560 MiB`` or ``1.5 GiB``; raises BadInput."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        hint = f"write {text.strip()} MiB or {text.strip()} GiB" if text.strip().isdigit() else ""
        raise BadInput(
            f"{text!r} is not a size",
            details="expected a number and KiB, MiB, GiB or TiB, such as 3 GiB",
            remedy=hint,
        )
    number, unit = found.groups()
    if unit not in UNITS:
        near = get_close_matches(unit, UNITS, 1, 0.5)
        raise BadInput(
            f"{text!r} has the unknown unit {unit!r}",
            details="expected KiB, MiB, GiB or TiB, which count in powers of 1024",
            remedy=f"did you mean {number} {near[0]}?" if near else "",
        )
    size = float(number) * UNITS[unit]
    if size != int(size):
        raise BadInput(f"{text!r} is not a whole number of bytes")
    return int(size)


def _read_cluster(
    value: Value, known_rolls: Sequence[str], host_rolls: Mapping[str, str]
) -> SpecFile:
    fields = value.fields(
        "cluster", "rolls", "network", "nodes", required=("cluster", "rolls", "nodes")
    )
    places = {name: str(field.where) for name, field in fields.items()}
    name = _read_name(fields["cluster"], most=32)
    rolls = _read_rolls(fields["rolls"], known_rolls, host_rolls)
    subnet = DEFAULT_SUBNET
    if "network" in fields:
        network = fields["network"].fields("subnet", required=("subnet",))
        places["network.subnet"] = str(network["subnet"].where)
        subnet = _read_subnet(network["subnet"])
    nodes = _read_nodes(fields["nodes"], places)
    # The network's own address, the gateway and the broadcast address are not for nodes.
    if subnet.num_addresses - 3 < len(nodes):
        at = network["subnet"] if "network" in fields else fields["nodes"]
        at.wrong(f"{subnet} has no room for {len(nodes)} nodes", expected="a wider subnet")
    return SpecFile(ClusterSpec(name, rolls, subnet, nodes), places)


def _read_name(value: Value, *, most: int = 63) -> str:
    """A host name of RFC 1123; lower case, since names are compared as they are written."""
    name = value.text()
    if not _LABEL.fullmatch(name) or len(name) > most or name.isdigit() or name == "localhost":
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:most].strip("-")
        useful = near and not near.isdigit() and near not in {name, "localhost"}
        value.wrong(
            f"{name!r} is not a name for a node or cluster",
            expected=f"lower-case letters, digits and inner hyphens (RFC 1123), at most {most}, "
            "not only digits, not localhost",
            remedy=f"did you mean {near!r}?" if useful else "",
        )
    return name


def _read_rolls(
    value: Value, known: Sequence[str], host_rolls: Mapping[str, str]
) -> tuple[str, ...]:
    known = [name for name in known if name not in host_rolls]
    rolls: list[str] = []
    for item in value.items():
        name = item.text()
        if name in host_rolls:
            item.wrong(
                f"roll {name!r} is not for nodes: it is for machines that run them",
                expected="one of " + ", ".join(known),
                remedy=f"leave it out ({name}: {host_rolls[name]})",
            )
        if name not in known:
            near = get_close_matches(name, known, 1)
            item.wrong(
                f"unknown roll {name!r}",
                expected="one of " + ", ".join(known),
                remedy=f"did you mean {near[0]!r}?" if near else "gpupt roll list shows them",
            )
        if name in rolls:
            item.wrong(f"roll {name!r} stands here a second time")
        rolls.append(name)
    return tuple(rolls)


def _read_subnet(value: Value) -> IPv4Network:
    text = value.text()
    try:
        subnet = IPv4Network(text)
    except (AddressValueError, NetmaskValueError, ValueError) as error:
        remedy = ""
        with suppress(ValueError):
            remedy = f"did you mean {IPv4Network(text, strict=False)}?" if "/" in text else ""
        value.wrong(
            f"{text!r} is not an IPv4 subnet ({error})",
            expected="a subnet such as 10.71.0.0/24",
            remedy=remedy,
        )
    if not subnet.is_private or subnet.is_loopback or subnet.is_link_local:
        value.wrong(
            f"{subnet} is not a private subnet",
            expected="a subnet of 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16",
        )
    if not 16 <= subnet.prefixlen <= 29:
        value.wrong(f"{subnet} is too wide or too narrow", expected="a prefix of /16 to /29")
    return subnet


def _read_nodes(value: Value, places: dict[str, str]) -> tuple[NodeSpec, ...]:
    items = list(value.items())
    if len(items) > MOST_NODES:
        value.wrong(f"{len(items)} nodes", expected=f"at most {MOST_NODES}")
    seen: dict[str, str] = {}
    claimed: dict[str, str] = {}
    nodes: list[NodeSpec] = []
    frontend: Value | None = None
    for item in items:
        node = _read_node(item, seen=seen, claimed=claimed, places=places)
        if node.role is Role.FRONTEND:
            if frontend is not None:
                item.wrong(
                    f"a second frontend, {node.name!r}",
                    expected=f"one; the first is at {frontend.where}",
                )
            frontend = item
        nodes.append(node)
    if frontend is None:
        value.wrong("no node is the frontend", expected="one node with role: frontend")
    return tuple(nodes)


def _read_node(
    item: Value, *, seen: dict[str, str], claimed: dict[str, str], places: dict[str, str]
) -> NodeSpec:
    fields = item.fields(
        *("name", "role", "cpus", "memory", "disk", "gpus"),
        required=("name", "role", "cpus", "memory"),
    )
    places[item.path] = str(item.where)
    places.update({field.path: str(field.where) for field in fields.values()})
    name = _read_name(fields["name"])
    if name in seen:
        fields["name"].wrong(f"two nodes are named {name!r}", expected=f"one; see {seen[name]}")
    seen[name] = str(fields["name"].where)
    return NodeSpec(
        name=name,
        role=_read_role(fields["role"]),
        cpus=fields["cpus"].whole(least=1, most=1024),
        memory=_read_size(fields["memory"], least=LEAST_MEMORY),
        disk=_read_size(fields["disk"], least=LEAST_DISK) if "disk" in fields else 0,
        gpus=_read_gpus(fields["gpus"], claimed=claimed, places=places)
        if "gpus" in fields
        else GpuRequest(),
    )


def _read_role(value: Value) -> Role:
    text = value.text()
    known = [role.value for role in Role]
    if text not in known:
        near = get_close_matches(text, known, 1)
        value.wrong(
            f"unknown role {text!r}",
            expected="one of " + ", ".join(known),
            remedy=f"did you mean {near[0]!r}?" if near else "",
        )
    return Role(text)


def _read_size(value: Value, *, least: int) -> int:
    try:
        size = parse_size(value.text())
    except BadInput as error:
        value.wrong(
            error.brief,
            expected=(error.details or ("",))[0].removeprefix("expected "),
            remedy=error.remedy,
        )
    if not least <= size <= 1 << 50:
        value.wrong(f"{value.called} is {value.text()}", expected=f"{least >> 20} MiB to 1024 TiB")
    # libvirt counts memory and qemu-img counts disks in whole blocks.
    if size % (1 << 20):
        value.wrong(f"{value.called} is {value.text()}", expected="whole MiB")
    return size


def _read_gpus(value: Value, *, claimed: dict[str, str], places: dict[str, str]) -> GpuRequest:
    """A count, or a list of addresses and aliases; addresses take their full form."""
    if not value.is_list:
        if value.tag != "int":
            value.wrong(
                f"{value.called} is not a list and not a count",
                expected='gpus: 2, or gpus: ["0000:41:00.0", …]',
                remedy="gpupt list shows the addresses of this host's GPUs",
            )
        return GpuRequest(count=value.whole(least=0, most=MOST_GPUS))
    named: list[str] = []
    for item in value.items():
        text = item.text()
        if ":" in text:
            try:
                text = str(PciAddress.parse(text))
            except BadInput as error:
                item.wrong(
                    error.brief,
                    expected=error.details[0].removeprefix("expected "),
                    remedy=error.remedy,
                )
        elif not _ALIAS.fullmatch(text):
            item.wrong(
                f"{text!r} names no GPU",
                expected='an address such as "0000:41:00.0" in quotes, or an alias',
                remedy="gpupt list shows the addresses of this host's GPUs",
            )
        if text in claimed:
            item.wrong(f"GPU {text} is named twice", expected=f"once; see {claimed[text]}")
        claimed[text] = str(item.where)
        places[item.path] = str(item.where)
        named.append(text)
    if len(named) > MOST_GPUS:
        value.wrong(f"{len(named)} GPUs for one node", expected=f"at most {MOST_GPUS}")
    return GpuRequest(named=tuple(named))
