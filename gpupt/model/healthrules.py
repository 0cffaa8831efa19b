"""What a card's health is held against: thresholds, and what its owner expects of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase

from gpupt.errors import BadInput
from gpupt.model.pci import PciAddress

# Replays a minute and lane at a bit error rate of 1e-12, by PCIe generation: 2.5 to 64 GT/s.
# Sixteen lanes make the known 15.4 (generation 4) and 30.7 (generation 5).
REPLAYS_PER_LANE: Mapping[int, float] = {1: 0.15, 2: 0.30, 3: 0.48, 4: 0.96, 5: 1.92, 6: 3.84}
# Counters of a link that stay at 0 on a sound one; the others count what is corrected anyway.
NVLINK_SERIOUS = ("replay", "recovery", "recovery_failed", "ecc_data", "buffer_overruns")


@dataclass(frozen=True, slots=True)
class Baseline:
    """Replay counters read earlier, ``seconds`` before those that are judged."""

    seconds: float
    replays: Mapping[PciAddress, int]


@dataclass(frozen=True, slots=True)
class Expectations:
    """What the owner says there is to be; None: nothing is expected, and nothing judged.

    ``count`` of whole GPUs of GPU vendors; ``nvlinks`` that are up on each card.
    """

    count: int | None = None
    mig: bool | None = None
    confidential: bool | None = None
    nvlinks: int | None = None


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where a value becomes a warning or a failure.

    Temperatures in degrees Celsius, power in watts, utilization in percent.  ``models`` maps a
    pattern of model names (``*H100*``) to other values for these.
    """

    margin_warn: float = 10
    margin_fail: float = 0
    remap_uncorrectable_fail: float = 512
    retired_warn: float = 10
    retired_fail: float = 63
    # More than this many pages with double-bit errors fail.
    retired_double_most: float = 15
    busy_utilization: float = 50
    aer_corrected_warn: float = 100
    # A limit this little below its default is rounding.
    power_slack: float = 1
    replays_per_lane: Mapping[int, float] = field(default_factory=lambda: dict(REPLAYS_PER_LANE))
    previous: Baseline | None = None
    models: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, changes in self.models.items():
            unknown = sorted(set(changes) - OVERRIDABLE)
            if unknown:
                raise BadInput(
                    f"thresholds of {pattern!r}: there is no {', '.join(unknown)}",
                    details=f"there are {', '.join(sorted(OVERRIDABLE))}",
                )

    def for_model(self, name: str | None) -> Thresholds:
        """The thresholds for a card of that name; of two patterns that match, the later wins."""
        lower = (name or "").lower()
        changes: dict[str, float] = {}
        for pattern, values in self.models.items():
            if fnmatchcase(lower, pattern.lower()):
                changes.update(values)
        # mypy cannot see that the names of OVERRIDABLE are those of numbers.
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]


OVERRIDABLE = frozenset(each.name for each in fields(Thresholds) if each.type == "float")
