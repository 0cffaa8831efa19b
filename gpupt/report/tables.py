"""Values as compact tables of text; colour is for terminals, and whoever prints decides."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpupt.model.gpus import fence_of, stands, state_of
from gpupt.model.host import Finding, Gpu, GpuState, Host, Records
from gpupt.model.pci import Bar, Link, PciAddress, PciDevice

if TYPE_CHECKING:
    from gpupt.actions import Ledger
    from gpupt.decide.doctor import Diagnosis
    from gpupt.model.roll import Roll

COLOURS = {
    "host": "32",
    "driverless": "33",
    "detached": "36",
    "lent": "35;1",
    "lost": "31;1",
    "fail": "31;1",
    "warn": "33",
    "info": "36",
    "dim": "2",
    "head": "1",
}


# A name is cut to that many characters before a column is dropped for it.
ENOUGH = 36
GPU_HEAD = ("GPU", "STATE", "DRIVER", "GROUP", "NUMA", "LINK", "BAR", "ID")


@dataclass(frozen=True, slots=True)
class Cell:
    """A piece of text, and the name of the colour it has on a terminal."""

    text: str
    colour: str = ""


def table(
    head: Sequence[str], rows: Sequence[Sequence[Cell]], *, colour: bool, width: int | None = None
) -> list[str]:
    """Columns as wide as they must be; the last is cut to ``width`` characters a line."""
    cells = [[Cell(text, "head") for text in head], *rows]
    widths = [max(len(row[column].text) for row in cells) for column in range(len(head))]
    if width is not None:
        rest = width - sum(widths[:-1]) - 2 * (len(widths) - 1)
        widths[-1] = max(min(widths[-1], rest), 8)
    lines = []
    for row in cells:
        parts = []
        for cell, room in zip(row, widths, strict=True):
            text = cell.text if len(cell.text) <= room else f"{cell.text[: room - 1]}…"
            parts.append(paint(text, cell.colour, colour=colour) + " " * (room - len(text)))
        lines.append("  ".join(parts).rstrip())
    return lines


def paint(text: str, name: str, *, colour: bool) -> str:
    """The text in that colour, where there is colour."""
    code = COLOURS.get(name)
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code and text else text


def gpu_table(
    host: Host,
    records: Records,
    *,
    colour: bool,
    width: int | None = None,
) -> list[str]:
    """``gpupt list``: a line for each GPU."""
    if not host.gpus:
        return ["no GPUs on this host"]
    rows = [gpu_row(gpu, host=host, records=records) for gpu in host.gpus]
    # A column that says nothing of any card is left out.
    kept = [
        column
        for column, name in enumerate(GPU_HEAD)
        if name not in {"NUMA", "LINK", "BAR"} or any(row[column].text != "–" for row in rows)
    ]
    names = [GpuName.of(gpu.device) for gpu in host.gpus]
    kept, room = make_room(
        kept, rows, needed=max(min(len(name.short), ENOUGH) for name in names), width=width
    )
    return table(
        [*(GPU_HEAD[column] for column in kept), "NAME"],
        [
            [*(row[column] for column in kept), Cell(name.within(room))]
            for row, name in zip(rows, names, strict=True)
        ],
        colour=colour,
    )


def make_room(
    kept: Sequence[int], rows: Sequence[Sequence[Cell]], *, needed: int, width: int | None
) -> tuple[list[int], int | None]:
    """The columns of ``kept`` that leave ``needed`` characters for the name, the least
    important dropped first, and the characters that are left for it (None: any number)."""
    kept = list(kept)
    if width is None:
        return kept, None
    wide = [
        max(len(GPU_HEAD[c]), *(len(row[c].text) for row in rows)) for c in range(len(GPU_HEAD))
    ]
    for least in ("ID", "BAR", "LINK", "NUMA"):
        if sum(wide[column] + 2 for column in kept) + needed <= width:
            break
        kept = [column for column in kept if GPU_HEAD[column] != least]
    return kept, width - sum(wide[column] + 2 for column in kept)


@dataclass(frozen=True, slots=True)
class GpuName:
    """What a card is called, and what else must be known of it."""

    name: str
    notes: str

    @classmethod
    def of(cls, device: PciDevice) -> GpuName:
        notes = []
        if device.boot_vga:
            notes.append("boot display")
        if device.physfn is not None:
            notes.append(f"VF of {device.physfn}")
        if device.sriov_numvfs:
            notes.append(f"{device.sriov_numvfs} VFs")
        name = cls.without_suffixes(device.name or "")
        return cls(name, f"({', '.join(notes)})" if notes else "")

    @staticmethod
    def without_suffixes(name: str) -> str:
        """A name of pci.ids, without what only lawyers read."""
        return name.replace(" Corporation", "").replace(", Inc.", "")

    @property
    def whole(self) -> str:
        """All of it: ``NVIDIA GH100 [H100 SXM5 80GB]``."""
        return f"{self.name} {self.notes}".strip()

    @property
    def sold_as(self) -> str:
        """The maker and what the card is sold as: ``NVIDIA H100 SXM5 80GB``."""
        sold = re.findall(r"\[([^]]+)\]", self.name)
        if not sold or not self.name.endswith("]"):
            return self.name
        maker = sold[0] if len(sold) > 1 else self.name.split()[0]
        return f"{maker} {sold[-1]}"

    @property
    def short(self) -> str:
        """As little as says which card it is, and the notes."""
        return f"{self.sold_as} {self.notes}".strip()

    def within(self, room: int | None) -> str:
        """As much as there is room for; the notes are never cut."""
        if room is None or len(self.whole) <= room:
            return self.whole
        if len(self.short) <= room:
            return self.short
        left = room - len(self.notes) - 2
        return f"{self.sold_as[:left].rstrip()}… {self.notes}".strip() if left > 0 else self.notes


def gpu_row(gpu: Gpu, *, host: Host, records: Records) -> list[Cell]:
    """A GPU's cells in ``gpupt list``, but for its name."""
    device = gpu.device
    loan = records.loans.get(gpu.address)
    state = state_of(gpu, loan)
    said = state.value
    if state is GpuState.LENT and loan is not None:
        said = f"lent {loan.cluster}/{loan.node}"
    if gpu.address in records.persistent:
        said += ", persistent"
    fenced = fence_of(device, records.fences) is not None
    if fenced:
        said += ", fenced"
    return [
        Cell(str(device.address)),
        Cell(said, "fail" if fenced else state.value),
        Cell(driver_of(device), "" if device.binding.driver else "dim"),
        Cell(group_of(gpu, host=host)),
        Cell("–" if device.numa_node is None else str(device.numa_node)),
        Cell(link_of(device.link)),
        Cell(largest_bar(device.bars)),
        Cell(str(device.id), "dim"),
    ]


def roll_table(rolls: Mapping[str, Roll], *, colour: bool, width: int | None = None) -> list[str]:
    """``gpupt roll list``: a line for each roll, and what it needs."""
    rows = [
        [Cell(name), Cell(roll.version), Cell(", ".join(roll.needs) or "–"), Cell(roll.summary)]
        for name, roll in rolls.items()
    ]
    return table(["ROLL", "VERSION", "NEEDS", "SUMMARY"], rows, colour=colour, width=width)


def driver_of(device: PciDevice) -> str:
    """The driver, and an override that is not the driver itself."""
    driver, override = device.binding.driver, device.binding.override
    if override and override != driver:
        return f"{driver or '–'} (override {override})"
    return driver or "–"


def group_of(gpu: Gpu, *, host: Host) -> str:
    """The group's number, and how many other functions leave with the GPU: ``14 +1``."""
    number = gpu.device.iommu_group
    members = host.groups[number].members if number is not None else ()
    others = {m for m in members if not host.devices[m].is_bridge} | set(gpu.companions)
    others.discard(gpu.address)
    more = f" +{len(others)}" if others else ""
    return f"{'–' if number is None else number}{more}"


def link_of(link: Link) -> str:
    """``x16 32 GT/s``; ``x8/x16 16/32 GT/s`` for a link that runs below what it could."""
    if link.width is None and link.speed is None:
        return "–"
    width = f"x{link.width}" if link.width is not None else "x?"
    if link.max_width is not None and link.max_width != link.width:
        width += f"/x{link.max_width}"
    speed = f"{link.speed:g}" if link.speed is not None else "?"
    if link.max_speed is not None and link.max_speed != link.speed:
        speed += f"/{link.max_speed:g}"
    return f"{width} {speed} GT/s"


def largest_bar(bars: Sequence[Bar]) -> str:
    """The size of the largest BAR."""
    return size_of(max(bar.size for bar in bars)) if bars else "–"


def size_of(size: int) -> str:
    """Bytes in the largest unit that is whole: ``256 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or size % 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} TiB"


def finding_lines(findings: Sequence[Finding], *, colour: bool) -> list[str]:
    """``gpupt doctor``: each finding with its evidence and what to do."""
    lines = []
    for finding in findings:
        mark = paint(f"{finding.severity.value:<4}", finding.severity.value, colour=colour)
        name = paint(finding.id, "head", colour=colour)
        lines.append(f"{mark}  {name}  {finding.subject}: {finding.brief}")
        lines.extend(f"      {paint(line, 'dim', colour=colour)}" for line in finding.evidence)
        if finding.remedy:
            lines.append(f"      → {finding.remedy}")
    return lines


def status_lines(
    host: Host,
    ledger: Ledger,
    *,
    persistent: Collection[PciAddress] = (),
    findings: Sequence[Finding] = (),
    colour: bool,
) -> list[str]:
    """``gpupt status``: loans, what nodes lost, fences, unfinished runs, overrides, rules that
    no loan explains."""
    lines = loan_lines(host, ledger, persistent=persistent, colour=colour)
    if findings:
        lines += ["", *finding_lines(findings, colour=colour)]
    for fence in ledger.fences.values():
        gone = "" if stands(fence, host) else ": another card is there now, or none"
        lines += [
            "",
            paint(f"{fence.gpu} is fenced", "fail", colour=colour)
            + f" since {fence.since}: {fence.reason}{gone}",
            *(f"      {paint(line, 'dim', colour=colour)}" for line in fence.evidence),
            f"  → gpupt unfence {fence.gpu} lets it be lent again",
        ]
    for run in ledger.unfinished:
        done = sum(entry.done for entry in run.entries)
        lines += [
            "",
            paint("unfinished: ", "fail", colour=colour)
            + f"{run.plan.verb} {run.plan.subject} (PID {run.pid}, "
            f"{done} of {len(run.plan.actions)} actions done)",
            "  → gpupt recover",
        ]
    on_loan = {origin.address for loan in ledger.loans.values() for origin in loan.origins}
    stray = [
        device
        for device in host.devices.values()
        if device.binding.override and device.address not in on_loan
    ]
    if stray:
        rows = [
            [
                Cell(str(device.address)),
                Cell(device.binding.driver or "–"),
                Cell(device.binding.override or ""),
            ]
            for device in stray
        ]
        lines += ["", "driver overrides that no loan explains:"]
        lines += table(["FUNCTION", "DRIVER", "OVERRIDE"], rows, colour=colour)
    unexplained = sorted(set(persistent) - set(ledger.loans))
    if unexplained:
        named = " ".join(str(gpu) for gpu in unexplained)
        lines += ["", f"taken at boot, though no loan explains it: {named}", "  → gpupt recover"]
    return lines


def loan_lines(
    host: Host, ledger: Ledger, *, persistent: Collection[PciAddress], colour: bool
) -> list[str]:
    """A line for each function on loan: who has it, and where it returns to."""
    if not ledger.loans:
        return ["no GPU is on loan"]
    rows = []
    for loan in ledger.loans.values():
        lent = loan.node is not None
        to = f"{loan.cluster}/{loan.node}" if lent else "nobody yet"
        if loan.gpu in persistent:
            to += ", persistent"
        for origin in loan.origins:
            device = host.devices.get(origin.address)
            main = origin.address == loan.gpu
            rows.append(
                [
                    Cell(f"{'' if main else '  '}{origin.address}"),
                    Cell(to if main else "", "lent" if lent else "detached"),
                    Cell("gone" if device is None else device.binding.driver or "–"),
                    Cell(origin.binding.driver or "no driver"),
                    Cell(str(origin.identity.id), "dim"),
                ]
            )
    return table(["ON LOAN", "TO", "DRIVER", "RETURNS TO", "ID"], rows, colour=colour)


def doctor_lines(host: Host, diagnosis: Diagnosis, *, colour: bool) -> list[str]:
    """``gpupt doctor``: the findings, then what was and was not looked at."""
    lines = finding_lines(diagnosis.findings, colour=colour)
    if lines:
        lines.append("")
    counts = Counter(finding.severity.value for finding in diagnosis.findings)
    said = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"
    lines.append(
        f"{len(diagnosis.checked)} checks of {plural(len(host.gpus), 'GPU')} in "
        f"{plural(len(host.groups), 'IOMMU group')}: "
        + paint(said, "fail" if counts["fail"] else "host", colour=colour)
    )
    reasons: dict[str, list[str]] = {}
    for name, why in diagnosis.skipped.items():
        reasons.setdefault(why, []).append(name)
    lines += [
        paint(f"not checked: {', '.join(names)} ({why})", "dim", colour=colour)
        for why, names in reasons.items()
    ]
    if host.unreadable:
        more = f" and {len(host.unreadable) - 1} more" if len(host.unreadable) > 1 else ""
        lines.append(
            paint(
                f"not readable: {host.unreadable[0]}{more}; root may read it", "warn", colour=colour
            )
        )
    return lines


def plural(count: int, noun: str) -> str:
    """``1 GPU``, ``2 GPUs``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
