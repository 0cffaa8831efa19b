"""STATE/replays.json: PCIe replay counters of an earlier look, for a rate of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gpupt.edges.baselinefile import write_whole
from gpupt.errors import BadInput, Failed
from gpupt.model.healthrules import Baseline
from gpupt.model.pci import PciAddress

FILE = "replays.json"
# A rate over less time is mostly noise; counts are kept this long before they are renewed.
LEAST_SECONDS = 30.0
RENEW_SECONDS = 600.0


def read_replays(state: Path, *, boot: str) -> Baseline | None:
    """The counts of an earlier look in this boot; None where there are none to go by."""
    try:
        told = json.loads((state / FILE).read_text(encoding="utf-8"))
        seconds = now() - float(told["at"])
        if not boot or told["boot"] != boot or seconds < LEAST_SECONDS:
            return None
        counts = {PciAddress.parse(name): int(count) for name, count in told["replays"].items()}
        return Baseline(seconds, counts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadInput):
        return None


def keep_replays(state: Path, counts: Mapping[PciAddress, int], *, boot: str) -> None:
    """Keep the counts, unless ones that are young enough are kept; not kept is only no rate."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads((state / FILE).read_text(encoding="utf-8"))
        if told["boot"] == boot and now() - float(told["at"]) < RENEW_SECONDS:
            return
    replays = {str(address): count for address, count in counts.items()}
    with suppress(Failed):
        write_whole(
            state / FILE, json.dumps({"boot": boot, "at": now(), "replays": replays}) + "\n"
        )


def now() -> float:
    """Seconds since this boot, which no change of the clock touches."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
