"""What a card was when its owner was content with it: what `health --against` compares with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gpupt.model.pci import PciAddress


@dataclass(frozen=True, slots=True)
class CardBaseline:
    """One card: facts by name as text (``uuid``, ``vbios``, ``link-width``, …); what the card
    did not tell is left out."""

    address: PciAddress
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Every card of a machine; ``recorded`` is UTC, as ISO 8601 has it."""

    recorded: str
    cards: Mapping[PciAddress, CardBaseline] = field(default_factory=dict)
