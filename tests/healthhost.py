"""Machines with GPUs on NVIDIA's driver, a library that answers for them, and gpupt typed there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fakenvml
import pytest
from boards import BOARDS
from click.testing import CliRunner, Result
from fakekernel import FakeKernel, Function, plant, plant_driver
from fakenvml import Card

from gpupt.cli import healthlook
from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.edges.sysfs import read_host
from gpupt.errors import GpuptError
from gpupt.model.gpus import NVIDIA

# The kernel's buffer, from the boot on and with nothing in it that is worth a verdict.
QUIET = "6,0,1000,-;Linux version 6.12.41\n6,1,2000,-;PCI: Using configuration type 1\n"
BOOT = "9221d5d1-b60b-a624-bf14-0a1819cfda3b\n"


def well(address: str) -> Card:
    """A card of which no check says anything."""
    return fakenvml.h200(address).but(power_enforced=700_000)


@dataclass
class Machine:
    """A planted machine; ``cards`` are what the library knows, by address."""

    kernel: FakeKernel
    scenario: Path
    state: Path
    cards: dict[str, Card] = field(default_factory=dict)

    def play(self, **library: fakenvml.Value) -> None:
        """Let the library answer for the cards, and of itself."""
        fakenvml.write_scenario(self.scenario, self.cards.values(), **library)

    def let(self, address: str, **changes: fakenvml.Value) -> None:
        """Change what one card answers."""
        self.cards[address] = self.cards[address].but(**changes)
        self.play()

    @property
    def settings(self) -> Settings:
        return Settings(root=self.kernel.root, state=self.state, kernel=lambda root: self.kernel)

    def type(self, *words: str) -> tuple[int, Result]:
        """The exit status as main() gives it, and what was printed."""
        result = CliRunner().invoke(
            cli, ["--connect", "test:///default", *words], obj=self.settings
        )
        if isinstance(result.exception, GpuptError):
            return result.exception.exit_code, result
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result

    def judged(self, *words: str) -> tuple[int, dict[str, Any]]:
        """The exit status of `gpupt health`, and its report."""
        status, result = self.type("health", "--json", *words)
        return status, json.loads(result.stdout)

    def file(self, path: str, text: str) -> None:
        """A file of the machine."""
        place = self.kernel.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def rules(self, text: str) -> Path:
        """STATE/health.yaml."""
        self.state.mkdir(parents=True, exist_ok=True)
        file = self.state / "health.yaml"
        file.write_text(text)
        return file


def machine_at(kernel: FakeKernel, folder: Path) -> Machine:
    """The machine of a kernel, whose cards are all well."""
    made = Machine(kernel, folder / "nvml.ini", folder / "state")
    made.file("dev/kmsg", QUIET)
    made.file("proc/sys/kernel/random/boot_id", BOOT)
    for gpu in read_host(kernel.root).gpus:
        if gpu.device.id.vendor == NVIDIA:
            made.cards[str(gpu.address)] = well(str(gpu.address))
    made.play()
    return made


def eight(folder: Path) -> Machine:
    """An HGX board: eight H100."""
    BOARDS["hgx"](folder / "machine")
    plant_driver(folder / "machine", "vfio-pci")
    return machine_at(FakeKernel(folder / "machine", drivers={}), folder)


def some(folder: Path, *addresses: str, driver: str = "nvidia") -> Machine:
    """A machine with an H200 at each address, each in a group of its own."""
    functions = [
        Function(
            address,
            "10de:2335",
            0x030200,
            driver,
            group=number,
            link=(16, 16, 32.0, 32.0),
            resets="flr bus",
            subsystem="10de:18be",
        )
        for number, address in enumerate(addresses)
    ]
    drivers = {driver: ["10de:2335"], "vfio-pci": []}
    plant(folder / "machine", functions, drivers=list(drivers))
    return machine_at(FakeKernel(folder / "machine", drivers=drivers), folder)


def hear(machine: Machine, library: Path, patch: pytest.MonkeyPatch) -> Machine:
    """The machine, with its library where the linker finds it."""
    patch.setenv("LD_LIBRARY_PATH", str(library))
    patch.setenv("FAKE_NVML_CONF", str(machine.scenario))
    patch.setattr(healthlook, "SAMPLES_APART", 0.01)
    patch.setattr(healthlook, "CARD_SECONDS", 0.75)
    return machine
