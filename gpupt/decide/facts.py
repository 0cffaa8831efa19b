"""What a node says of itself (`gpupt-node facts`), and how it differs from what it was given."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from gpupt.errors import Failed
from gpupt.model.cluster import Placement
from gpupt.model.pci import PciId


@dataclass(frozen=True, slots=True)
class SeenGpu:
    """A GPU as the guest sees it: its address there, and its id."""

    address: str
    id: PciId


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node's own account; ``own_keys`` and ``own_host_key``: they came by credentials;
    ``nvml``: NVIDIA's management library is there."""

    hostname: str
    role: str
    cluster: str
    gpus: tuple[SeenGpu, ...]
    own_keys: bool
    own_host_key: bool
    home: str
    failed_units: tuple[str, ...]
    nvml: bool = False


def parse_facts(text: str) -> NodeFacts:
    """The facts on the last line of what the node printed; raises Failed."""
    lines = text.strip().splitlines() or [""]
    try:
        told = json.loads(lines[-1])
        return NodeFacts(
            hostname=str(told["hostname"]),
            role=str(told["role"]),
            cluster=str(told["cluster"]),
            gpus=tuple(
                SeenGpu(
                    str(gpu["address"]),
                    PciId(int(gpu["vendor_id"], 16), int(gpu["device_id"], 16)),
                )
                for gpu in told["gpus"]
            ),
            own_keys=told["identity"]["authorized_keys_from_credential"] is True,
            own_host_key=told["identity"]["host_key_from_credential"] is True,
            home=str(told["home"]),
            failed_units=tuple(str(unit) for unit in told["failed_units"]),
            nvml=told.get("nvml") is True,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise Failed(
            "a node's account of itself cannot be read",
            details=(lines[-1][:200], f"{type(error).__name__}: {error}"),
        ) from None


def assess_facts(facts: NodeFacts, *, cluster: str, placement: Placement) -> tuple[str, ...]:
    """What differs from what the node was given, a line each; empty when nothing does."""
    node = placement.node
    wrong = []
    for word, seen, wanted in (
        ("its name", facts.hostname, node.name),
        ("its cluster", facts.cluster, cluster),
        ("its role", facts.role, node.role.value),
    ):
        if seen != wanted:
            wrong.append(f"{word} is {seen!r}, declared {wanted!r}")
    if not facts.own_keys:
        wrong.append("its authorized key did not come from its credentials")
    if not facts.own_host_key:
        wrong.append("its host key did not come from its credentials")
    seen_ids = Counter(gpu.id for gpu in facts.gpus)
    wanted_ids = Counter(card.id for card in placement.cards)
    for each, count in sorted((wanted_ids - seen_ids).items()):
        where = ", ".join(str(card.gpu) for card in placement.cards if card.id == each)
        wrong.append(f"{count} GPU {each} is not seen (lent: {where})")
    for each, count in sorted((seen_ids - wanted_ids).items()):
        wrong.append(f"{count} GPU {each} is seen that was not lent")
    return tuple(wrong)
