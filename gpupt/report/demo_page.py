"""The demo's page for people: one HTML file that asks nothing of the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

from gpupt.edges.templates import render_template
from gpupt.model.demo import (
    HOST,
    NOT_READ,
    UNREAD,
    ClassifierResult,
    DemoNode,
    DemoSummary,
    FunctionKind,
    Holding,
    HostFunction,
    HostGroup,
    PhaseStatus,
    TimelineEntry,
)
from gpupt.report.card import class_name

COLOURS = 6  # how many nodes have a colour of their own (classes holder-1 … in the style)
FACTORIAL_OF_10 = 3_628_800
WIDTH, MARGIN, HEADER, ROW, GAP = 340, 8, 30, 46, 12


@dataclass(frozen=True, slots=True)
class Tile:
    """A function in the picture: its place in the drawing, its texts and its colour."""

    y: int
    name: str
    address: str
    id: str
    driver: str
    colour: str
    changed: bool
    gpu: bool


@dataclass(frozen=True, slots=True)
class Box:
    """An IOMMU group in the picture: ``holder`` is who had its endpoints at that moment,
    named in a pill ``pill`` wide."""

    y: int
    height: int
    title: str
    port: str
    holder: str
    pill: int
    colour: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Moment:
    """The host drawn at one moment; ``height`` in the drawing's units."""

    title: str
    caption: str
    boxes: tuple[Box, ...]
    height: int
    spoken: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A phase in the timeline; ``left`` and ``width`` in per cent of the whole."""

    entry: TimelineEntry
    left: float
    width: float
    share: int
    took: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the confusion matrix; ``shade`` 0 to 1, within its true class."""

    count: int
    share: float
    shade: float
    right: bool


@dataclass(frozen=True, slots=True)
class Measure:
    """A fraction drawn as a bar, with the uncertainty of its sample where it has one."""

    name: str
    value: float
    text: str
    note: str
    main: bool = False


def render_demo_page(summary: DemoSummary) -> str:
    """The page as text, complete in itself; raises Failed when the template is broken."""
    colours = holder_colours(summary.nodes)
    return render_template(
        "demo-report.html.j2",
        s=summary,
        others=len(summary.host.groups) - len(groups_with_gpus(summary.host.groups)),
        moments=tuple(host_moments(summary, colours)),
        svg_width=WIDTH,
        bars=tuple(timeline_bars(summary)),
        colours=colours,
        lent=tuple(gpu for gpu in summary.host.gpus if gpu.was_lent),
        kept=tuple(gpu for gpu in summary.host.gpus if not gpu.was_lent),
        names={str(gpu.address): short_name(gpu) for gpu in summary.host.gpus},
        confusion=confusion_cells(summary.classifier) if summary.classifier else (),
        measures=measures(summary.classifier) if summary.classifier else (),
        stopped_at=next((e for e in summary.timeline if e.status is PhaseStatus.FAILED), None),
        factorial_of_10=FACTORIAL_OF_10,
        gib=gib,
        duration=duration,
        percent=percent,
    )


def holder_colours(nodes: tuple[DemoNode, ...]) -> dict[str, str]:
    """The style's class for each holder: nodes that were lent a GPU come first."""
    ordered = sorted(nodes, key=lambda node: not node.lent)
    return {HOST: "holder-host"} | {
        node.name: f"holder-{number % COLOURS + 1}" for number, node in enumerate(ordered)
    }


def host_moments(summary: DemoSummary, colours: dict[str, str]) -> Iterator[Moment]:
    """The host before, during and after."""
    lent = any(gpu.was_lent for gpu in summary.host.gpus)
    after = "not everything was given back"
    if summary.restored:
        after = "every function on the driver it came from"
    elif any(gpu.after == UNREAD for gpu in summary.host.gpus):
        after = "not read: nothing is known"
    for name, title, caption in (
        ("before", "Before", "every card belongs to the host"),
        ("during", "During", "whole groups, lent to nodes" if lent else "no GPU was lent"),
        ("after", "After", after),
    ):
        y, boxes = MARGIN, []
        for group in groups_with_gpus(summary.host.groups):
            box = draw_group(group, name, y=y, colours=colours)
            boxes.append(box)
            y += box.height + GAP
        said = "; ".join(f"{box.title}: {box.holder}" for box in boxes)
        yield Moment(title, caption, tuple(boxes), y - GAP + MARGIN, said)


def groups_with_gpus(groups: tuple[HostGroup, ...]) -> tuple[HostGroup, ...]:
    """The groups that hold a GPU or something that is not where it was: those worth drawing."""
    return tuple(
        group
        for group in groups
        if any(
            function.kind is FunctionKind.GPU or function.after not in (function.before, UNREAD)
            for function in group.functions
        )
    )


def draw_group(group: HostGroup, moment: str, *, y: int, colours: dict[str, str]) -> Box:
    """One group with its functions, top at ``y``."""
    endpoints = [f for f in group.functions if f.kind is not FunctionKind.BRIDGE]
    shown = tuple(
        draw_function(function, moment, y=y + HEADER + number * ROW, colours=colours)
        for number, function in enumerate(group.functions)
    )
    holders = {holding(function, moment).holder for function in endpoints or group.functions}
    ports = sorted({str(function.port) for function in endpoints if function.port is not None})
    holder = holders.pop() if len(holders) == 1 else "several"
    return Box(
        y=y,
        height=HEADER + ROW * len(group.functions) + 4,
        title=f"IOMMU group {group.number}",
        port=f"port {short(ports[0])}" if len(ports) == 1 else "",
        holder=shortened(holder, 14),
        pill=max(50, 18 + 7 * min(len(holder), 14)),
        colour=colours.get(holder, "holder-none"),
        tiles=shown,
    )


def draw_function(function: HostFunction, moment: str, *, y: int, colours: dict[str, str]) -> Tile:
    """One function with its driver at that moment."""
    held = holding(function, moment)
    return Tile(
        y=y,
        name=shortened(short_name(function), 34),
        address=str(function.address),
        id=str(function.id),
        driver=held.driver or (NOT_READ if held == UNREAD else "no driver"),
        colour=colours.get(held.holder, "holder-none"),
        changed=held != UNREAD and held.driver != function.before.driver,
        gpu=function.kind is FunctionKind.GPU,
    )


def holding(function: HostFunction, moment: str) -> Holding:
    """Who had a function before, during or after."""
    match moment:
        case "before":
            return function.before
        case "during":
            return function.during
        case _:
            return function.after


def shortened(text: str, most: int) -> str:
    """A text of at most that many characters, an ellipsis in place of what is cut."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def short_name(function: HostFunction) -> str:
    """A function's name as pci.ids has it, less what the vendor's is padded with; what kind
    of function it is where it has no name."""
    named = function.name.replace(" Corporation", "")
    return named or f"{class_name(function.class_code)} function"


def short(address: str) -> str:
    """An address without domain 0000, as lspci writes it."""
    return address.removeprefix("0000:")


def timeline_bars(summary: DemoSummary) -> Iterator[Bar]:
    """A bar for each phase, on the scale of the whole demo."""
    whole = max([summary.seconds, *(entry.end for entry in summary.timeline)], default=0) or 1
    for entry in summary.timeline:
        yield Bar(
            entry,
            left=round(100 * entry.start / whole, 2),
            width=round(max(100 * entry.seconds / whole, 0.4), 2),
            share=round(100 * entry.seconds / whole),
            took=duration(entry.seconds),
        )


def confusion_cells(found: ClassifierResult) -> tuple[tuple[Cell, Cell], tuple[Cell, Cell]]:
    """The confusion matrix in shares of the true class; rows are unstained, stained."""
    rows = []
    for number, row in enumerate(found.confusion):
        total = sum(row) or 1
        cells = [
            Cell(count, count / total, round(count / total, 3), column == number)
            for column, count in enumerate(row)
        ]
        rows.append((cells[0], cells[1]))
    return (rows[0], rows[1])


def measures(found: ClassifierResult) -> tuple[Measure, ...]:
    """Accuracy with its 95 % interval, what it is to be held against, and kappa."""
    shown = [
        Measure(
            "accuracy",
            found.accuracy,
            percent(found.accuracy, found.applied_to),
            "with its 95 % interval",
            main=True,
        ),
        Measure(
            "majority class",
            found.majority_baseline,
            percent(found.majority_baseline),
            "always saying the commoner answer",
        ),
    ]
    if found.colour_baseline is not None:
        colour = found.colour_baseline
        why = "a logistic regression on the sheet’s mean colour alone"
        shown.append(Measure("mean colour", colour, percent(colour), why))
    kappa = "agreement beyond chance: 0 none, 1 whole"
    shown.append(Measure("quadratic kappa", max(found.kappa, 0.0), f"{found.kappa:.2f}", kappa))
    return tuple(shown)


def percent(value: float, sample: int = 0) -> str:
    """A fraction as per cent, with the 95 % interval (Wilson's) of a sample of that size."""
    text = f"{100 * value:.1f} %"
    if sample > 0:
        z = 1.96
        middle = (value + z * z / (2 * sample)) / (1 + z * z / sample)
        spread = value * (1 - value) / sample + z * z / (4 * sample * sample)
        half = z / (1 + z * z / sample) * sqrt(spread)
        low, high = max(middle - half, 0.0), min(middle + half, 1.0)
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return text


def duration(seconds: float) -> str:
    """Seconds in words: ``0.4 s``, ``12 s``, ``3 min 05 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def gib(size: int) -> str:
    """Bytes in GiB, without a needless decimal."""
    return f"{size / 2**30:.1f}".removesuffix(".0") + " GiB"
