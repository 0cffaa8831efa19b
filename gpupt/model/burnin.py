"""What a burn-in measured of one card, and what NVIDIA's own diagnostic said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from gpupt.model.health import Silence
from gpupt.model.pci import PciAddress


class Stage(StrEnum):
    """The parts of a burn-in, in their order; START is until a framework has the card."""

    START = "start"
    BANDWIDTH = "bandwidth"
    MEMORY = "memory"
    MATRIX = "matrix"


@dataclass(frozen=True, slots=True)
class BurnReading:
    """What a burn-in of one card measured; None: not measured, and ``silent`` says why.

    Rates are the best of several rounds in GB/s (1e9 bytes), ``device`` counting what is read
    and what is written; memory in bytes, temperatures in degrees Celsius; ``memory_errors`` and
    ``copy_errors`` are words that held something else than was written.  No ``framework``: none
    took the card.  A stage in ``silent`` did not end; what it measured before is kept.
    """

    address: PciAddress
    framework: str | None = None
    name: str | None = None
    seconds: float = 0.0
    # Without pinned buffers in the host, a low rate is the framework's and not the card's.
    pinned: bool | None = None
    host_to_device: float | None = None
    host_to_device_median: float | None = None
    device_to_host: float | None = None
    device_to_host_median: float | None = None
    device: float | None = None
    copy_errors: int | None = None
    memory_tested: int | None = None
    memory_patterns: int | None = None
    memory_errors: int | None = None
    products: int | None = None
    wrong_products: int | None = None
    tflops: float | None = None
    tflops_half: float | None = None
    # What NVML said while the card was loaded: NVML's bit mask of what held its clocks back.
    temperature_peak: int | None = None
    margin_least: int | None = None
    clock_events_seen: int | None = None
    silent: Mapping[Stage, Silence] = field(default_factory=dict)
    details: str = ""


@dataclass(frozen=True, slots=True)
class DcgmTest:
    """One test of ``dcgmi diag`` for one card, in DCGM's words; ``severities`` its numbers."""

    name: str
    status: str
    messages: tuple[str, ...] = ()
    severities: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DcgmReading:
    """What ``dcgmi diag`` said of one card; ``silent``: why it said nothing."""

    address: PciAddress
    tests: tuple[DcgmTest, ...] = ()
    silent: Silence | None = None
    details: str = ""
