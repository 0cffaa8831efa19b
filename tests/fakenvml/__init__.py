"""A libnvidia-ml.so.1 with no driver and no card, which answers as a scenario says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("fakenvml.c")
SONAME = "libnvidia-ml.so.1"
# Values that are not answers.
HANG, DEAF, CRASH, ABORT = "hang", "deaf", "crash", "abort"
GIBIBYTE = 1 << 30

Value = str | int | tuple[int, ...] | None


def error(number: int) -> str:
    """The value of a question that is answered with this error of nvml.h."""
    return f"!{number}"


@dataclass(frozen=True)
class Card:
    """A card at an address, and its values by key; None takes a key away: not supported."""

    address: str
    values: Mapping[str, Value] = field(default_factory=dict)

    def but(self, **changes: Value) -> Card:
        """The same card with other values; ``__`` in a name stands for a dot."""
        named = {name.replace("__", "."): value for name, value in changes.items()}
        return Card(self.address, {**self.values, **named})


def h200(address: str) -> Card:
    """A healthy H200 that idles, as its driver would answer for it."""
    number = int(address.split(":")[-2], 16)
    values: dict[str, Value] = {
        "name": "NVIDIA H200",
        "uuid": f"GPU-00000000-0000-0000-0000-{number:012x}",
        "serial": f"16500000000{number:02d}",
        "pci_id": "0x233510de",
        "vbios": "96.00.A0.00.03",
        "inforom": "G520.0280.00.05",
        "gsp": "580.95.05",
        "field.230": "uint 0",
        "remapped": (0, 0, 0, 0),
        "unrepairable_memory": 0,
        "ecc": (1, 1),
        "ecc_volatile": (0, 0),
        "ecc_aggregate": (0, 0),
        "sram_exceeded": 0,
        "pcie_gen": 5,
        "pcie_gen_max": 5,
        "pcie_width": 16,
        "pcie_width_max": 16,
        "pcie_replays": 3,
        "clock_events": "0x1",
        "temperature": 33,
        "temperature_margin": 54,
        "temperature_thresholds": (92, 89, 95, 87),
        "power": 75_500,
        "power_limit": 700_000,
        "power_enforced": 650_000,
        "power_default": 700_000,
        "power_range": (200_000, 700_000),
        "memory": (140 * GIBIBYTE, GIBIBYTE, 512 << 20),
        "bar1": (256 * GIBIBYTE, 1 << 20),
        "utilization": (7, 2),
        "clocks": (345, 330, 3201, 765),
        "clocks_max": (1980, 1980, 3201, 1545),
        "nvlink": "1" * 18,
        **{f"nvlink_errors.{link}": (0, 0, 0, 0, 0) for link in range(18)},
        "fabric": (3, 0, 0),
        "compute": 0,
        "graphics": 0,
        "mig": (0, 0),
        "inforom_check": "ok",
        "performance_state": 0,
        "persistence": 1,
        "compute_mode": 0,
        "display": 0,
        "compute_capability": (9, 0),
    }
    return Card(address, values)


def write_scenario(file: Path, cards: Iterable[Card] = (), **library: Value) -> Path:
    """Write the scenario of these cards and these values of the library as a whole."""
    whole: dict[str, Value] = {
        "driver": "580.95.05", "nvml": "13.580.95.05", "cuda": 13000, "confidential": 0
    }  # fmt: skip
    sections = [("library", {**whole, **library})]
    sections += [("gpu", {"bus_id": card.address, **card.values}) for card in cards]
    lines = []
    for name, values in sections:
        lines.append(f"[{name}]")
        lines += [f"{key} = {text(value)}" for key, value in values.items() if value is not None]
    # What is no UTF-8 in an answer is written as the bytes that it stands for.
    file.write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")
    return file


def text(value: Value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def build(folder: Path, *, pynvml: Path | None = None) -> Path:
    """Build the library into a folder for LD_LIBRARY_PATH, with stubs for every other symbol
    that a pynvml (the installed one) looks up; returns the folder."""
    stubs = folder / "stubs.c"
    missing = sorted(looked_up(pynvml or installed()) - defined())
    stubs.write_text("".join(f"int {name}(void) {{ return 3; }}\n" for name in missing))
    subprocess.run(
        ["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
         f"-Wl,-soname,{SONAME}", "-o", folder / SONAME, SOURCE, stubs],
        check=True,
        timeout=120,
    )  # fmt: skip
    return folder


def installed() -> Path:
    """The source of the pynvml that is installed here."""
    found = find_spec("pynvml")
    assert found is not None and found.origin is not None
    return Path(found.origin)


def looked_up(pynvml: Path) -> set[str]:
    """The symbols that a pynvml looks up."""
    return set(re.findall(r'_nvmlGetFunctionPointer\("(\w+)"\)', pynvml.read_text()))


def defined() -> set[str]:
    """The symbols that our own source defines."""
    source = SOURCE.read_text()
    plain = re.findall(r"^(?:int|const char \*)\s*(nvml\w+)\(", source, re.MULTILINE)
    by_macro = re.findall(r"^(?:TEXT|NUMBER|WIDE|PAIR)\((nvml\w+),", source, re.MULTILINE)
    return {*plain, *by_macro}
