"""The demo's story, told inside an emulated host: the same verbs that a real host runs.

Everything here goes over one SSH connection to the host; what gpupt says of itself is
judged by pci_facts.py, which reads sysfs on its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from gpupt.edges.ssh import Ssh
from gpupt.errors import Failed, GpuptError
from gpupt.model.demo import (
    HOST,
    UNREAD,
    FunctionKind,
    Holding,
    HostFunction,
    HostGroup,
    HostPicture,
    PhaseStatus,
    TimelineEntry,
)
from gpupt.model.pci import PciAddress, PciId


@dataclass
class Timeline:
    """Phases as they happen; ``say`` narrates.  Seconds count from ``began``."""

    say: Callable[[str], None]
    began: float = field(default_factory=time.monotonic)
    entries: list[TimelineEntry] = field(default_factory=list)

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    @contextmanager
    def phase(self, name: str, *, command: str = "", detail: str = "") -> Iterator[None]:
        """Name what is being done, and record how long it took, whether or not it succeeds."""
        start = self.now
        self.say(f"[{start:6.0f} s] {name}: {detail}" + (f"   ({command})" if command else ""))
        try:
            yield
        except BaseException as error:
            brief = error.brief if isinstance(error, GpuptError) else type(error).__name__
            failed = PhaseStatus.FAILED
            self.entries.append(TimelineEntry(name, start, self.now, failed, brief, command))
            raise
        self.entries.append(TimelineEntry(name, start, self.now, detail=detail, command=command))


@dataclass(frozen=True, slots=True)
class Inside:
    """gpupt in the emulated host, over SSH."""

    ssh: Ssh
    say: Callable[[str], None]

    def gpupt(
        self, *argv: str, deadline: float, accept: tuple[int, ...] = (0,)
    ) -> Mapping[str, Any]:
        """Run ``gpupt --json …`` there and return its object; narration is passed on.

        Empty for a failure that is accepted and printed none.  Raises Failed when its exit
        status is not one of ``accept`` or it printed no object."""
        words = ["gpupt", "--json", *argv]
        streams: list[str] = []

        def narrate(line: str) -> None:
            # Data and narration both come by here; JSON's own lines are not narration.
            if line and line[0] not in ' {}[]"':
                self.say(f"           {line}")
            streams.append(line)

        done = self.ssh.run(words, deadline=deadline, on_line=narrate, check=False)
        if done.status not in accept:
            said = done.stderr.strip().splitlines()[-25:]
            raise Failed(
                f"gpupt {argv[0]} in the emulated host exited with status {done.status}",
                details=(" ".join(words), *said),
            )
        if done.status and not done.stdout.strip():
            return {}
        try:
            found = json.loads(done.stdout)
        except ValueError:
            raise Failed(
                f"gpupt {argv[0]} in the emulated host printed no JSON object",
                details=(done.stdout[-400:], done.stderr[-400:]),
            ) from None
        if not isinstance(found, dict):
            raise Failed(f"gpupt {argv[0]} printed JSON that is no object")
        return found

    def facts(self) -> Facts:
        """PCI facts read by a script that knows nothing of gpupt."""
        script = files("gpupt.lab").joinpath("guest/pci_facts.py").read_text()
        done = self.ssh.run(["python3", "-"], stdin=script, deadline=60)
        return Facts.parse(json.loads(done.stdout))

    def versions(self) -> tuple[str, str]:
        """libvirt's and QEMU's versions there, as virsh says them."""
        done = self.ssh.run(["virsh", "version"], deadline=60, check=False)
        found = {}
        for line in done.stdout.splitlines():
            key, _, value = line.partition(":")
            found[key.strip()] = value.strip()
        return (
            found.get("Using library", "").removeprefix("libvirt ").strip(),
            found.get("Running hypervisor", "").removeprefix("QEMU ").strip(),
        )


@dataclass(frozen=True, slots=True)
class FunctionFacts:
    """One function at one moment."""

    address: PciAddress
    id: PciId
    class_code: int
    driver: str | None
    override: str | None
    group: int | None
    port: PciAddress | None


@dataclass(frozen=True, slots=True)
class Facts:
    """The host at one moment, as pci_facts.py read it."""

    functions: Mapping[PciAddress, FunctionFacts]
    machine: Mapping[str, Any]

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Facts:
        functions = {}
        for each in data["functions"]:
            address = PciAddress.parse(each["address"])
            functions[address] = FunctionFacts(
                address=address,
                id=PciId(int(each["vendor"], 16), int(each["device"], 16)),
                class_code=int(each["class"], 16),
                driver=each["driver"],
                override=each["override"],
                group=None if each["group"] is None else int(each["group"]),
                port=PciAddress.parse(each["port"]) if each["port"] else None,
            )
        return cls(functions, {k: v for k, v in data.items() if k != "functions"})

    def differences(self, later: Facts) -> tuple[str, ...]:
        """What is not as it was: drivers, overrides, functions come or gone; a line each."""
        said = []
        for address in sorted({*self.functions, *later.functions}):
            before, after = self.functions.get(address), later.functions.get(address)
            if before is None or after is None:
                said.append(f"{address} {'appeared' if before is None else 'is gone'}")
            elif (before.driver, before.override) != (after.driver, after.override):
                said.append(
                    f"{address} was on {before.driver} (override {before.override}), "
                    f"is on {after.driver} (override {after.override})"
                )
        return tuple(said)


def picture(
    before: Facts,
    during: Facts | None,
    after: Facts | None,
    *,
    holders: Mapping[PciAddress, str],
    names: Mapping[PciAddress, str],
    companions: Sequence[PciAddress],
    versions: tuple[str, str],
    accelerator: str,
) -> HostPicture:
    """The host's picture from three readings, None those that were never made; ``holders``
    says which node had what."""
    groups: dict[int, list[HostFunction]] = {}
    for address, was in sorted(before.functions.items()):
        if was.group is None:
            continue

        def holding(at: Facts | None, holder: str, address: PciAddress = address) -> Holding:
            if at is None:
                return UNREAD
            found = at.functions.get(address)
            return Holding(found.driver if found else None, holder)

        groups.setdefault(was.group, []).append(
            HostFunction(
                address=address,
                id=was.id,
                class_code=was.class_code,
                name=names.get(address, ""),
                kind=_kind(was, address in names, address in companions),
                before=holding(before, HOST),
                during=holding(during, holders.get(address, HOST)),
                after=holding(after, HOST),
                port=was.port,
            )
        )
    machine = before.machine
    return HostPicture(
        emulated=True,
        name=str(machine["name"]),
        cpus=int(machine["cpus"]),
        memory=int(machine["memory"]),
        groups=tuple(HostGroup(n, tuple(members)) for n, members in sorted(groups.items())),
        kernel=str(machine["kernel"]),
        distribution=str(machine["distribution"]),
        libvirt=versions[0],
        qemu=versions[1],
        iommu=", ".join(machine["iommus"]),
        accelerator=accelerator,
    )


def _kind(facts: FunctionFacts, is_gpu: bool, is_companion: bool) -> FunctionKind:
    if is_gpu:
        return FunctionKind.GPU
    if is_companion:
        return FunctionKind.COMPANION
    if facts.class_code >> 16 == 0x06:
        return FunctionKind.BRIDGE
    return FunctionKind.OTHER
