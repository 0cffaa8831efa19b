"""Checks of what a card is joined by: its PCIe link, NVLink and the NVSwitch fabric."""

from __future__ import annotations

from collections.abc import Mapping

from gpupt.decide.health_case import Case, unanswered, unsupported
from gpupt.decide.xid import reset_command
from gpupt.model.health import CheckResult, Fabric, NvLink, Verdict
from gpupt.model.healthrules import NVLINK_SERIOUS
from gpupt.model.pci import Link

RESEAT = "systemctl poweroff, then reseat the card and its riser"
# GT/s of the PCIe generations; 2.5 and 5 are the first two.
GENERATIONS: Mapping[float, int] = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
FABRIC_MANAGER = "systemctl restart nvidia-fabricmanager"
# nvml.h, nvmlGpuFabricState_t.
NOT_STARTED, IN_PROGRESS, COMPLETED = 1, 2, 3
# nvml.h, NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_*: two bits each, 0 not supported, 1 true, 2 false.
DEGRADED_BANDWIDTH, ROUTE_RECOVERY, ROUTE_UNHEALTHY, TIMEOUT_RECOVERY = 0, 2, 4, 6
# Four bits: 0 not supported, 1 none, the rest are kinds of it.
WRONG_CONFIGURATION = 8


def pcie_width(case: Case) -> CheckResult | None:
    """The link has fewer lanes than the card and its port could have.

    A link that sleeps keeps its lanes, so no load is needed.  Where the port is not known, a
    card in a slot with fewer lanes than its own looks the same as one that sits badly.
    """
    check, link = "pcie_width", case.gpu.device.link
    most = least(link.max_width, above(case).max_width)
    if link.width is None or most is None:
        return unsupported(check, "sysfs does not show the link's width")
    narrow = link.width < most
    return CheckResult(
        check,
        Verdict.FAIL if narrow else Verdict.OK,
        f"the link has {link.width} of {most:g} lanes",
        value=f"x{link.width}",
        threshold=f"x{most:g}",
        remedy=RESEAT if narrow else "",
        number=link.width,
        unit="lanes",
    )


def above(case: Case) -> Link:
    """The link of the port above; nothing known of it is no bound."""
    return Link() if case.port is None else case.port.link


def least(own: float | None, port: float | None) -> float | None:
    """What card and port can do together."""
    return own if own is None or port is None else min(own, port)


def generations(case: Case) -> tuple[int | None, int | None]:
    """The link's PCIe generation, and the best it could have: by NVML, else by sysfs."""
    reading, link = case.reading, case.gpu.device.link
    if reading is not None and reading.pcie_gen and reading.pcie_gen_max:
        return reading.pcie_gen, reading.pcie_gen_max
    most = least(link.max_speed, above(case).max_speed)
    return GENERATIONS.get(link.speed or 0), GENERATIONS.get(most or 0)


def pcie_gen(case: Case) -> CheckResult | None:
    """The link is slower than it could be although the card works."""
    check, reading = "pcie_gen", case.reading
    if reading is not None and "handle" in reading.silent:
        # Said once, by nvml or gpu_lost: here sysfs speaks alone.
        reading = None
    if reading is not None:
        missing = unanswered(case, check, "pcie_gen", "pcie_gen_max")
        if missing is not None and missing.status is Verdict.FAIL:
            return missing
    now, most = generations(case)
    if now is None or most is None:
        return unsupported(check, "the link's speed is not known")
    verdict, brief, remedy = Verdict.OK, f"the link runs at generation {now} of {most}", ""
    if now < most:
        busy = reading.utilization if reading is not None else None
        if busy is None:
            missing = None if reading is None else unanswered(case, check, "utilization")
            slow = f"{brief}: whether the card idles is not known"
            idle = missing is None or missing.status is Verdict.UNSUPPORTED
            return unsupported(check, slow) if idle else missing
        if busy >= case.limits.busy_utilization:
            verdict, brief = Verdict.WARN, f"{brief} at {busy} % load"
            remedy = "update the machine's firmware; try another riser or slot"
        else:
            brief = f"{brief}: the card idles"
    return CheckResult(
        check, verdict, brief, value=f"gen {now}", threshold=f"gen {most}", remedy=remedy,
        number=now,
    )  # fmt: skip


def pcie_replay(case: Case) -> CheckResult | None:
    """Packets are sent again more often than a link's bit error rate explains."""
    check = "pcie_replay"
    now = case.reading.pcie_replays if case.reading is not None else None
    if now is None:
        return unanswered(case, check, "pcie_replays")
    previous = case.limits.previous
    before = None if previous is None else previous.replays.get(case.address)
    if previous is None or before is None or previous.seconds <= 0:
        return unsupported(check, "it takes two counts, some time apart")
    if now < before:
        return unsupported(check, "the counter began anew: the driver was loaded again")
    _, generation = generations(case)
    lanes = case.gpu.device.link.max_width
    if lanes is None and case.reading is not None:
        lanes = case.reading.pcie_width_max
    each = case.limits.replays_per_lane.get(generation or 0)
    if each is None or lanes is None:
        return unsupported(check, "the link's generation and width are not known")
    # Over less than a minute a single replay would make a high rate.
    rate, most = (now - before) / max(previous.seconds / 60, 1), each * lanes
    return CheckResult(
        check,
        Verdict.WARN if rate > most else Verdict.OK,
        f"{rate:.1f} replays a minute on the PCIe link",
        value=f"{rate:.1f}/min",
        threshold=f"{most:.1f}/min",
        remedy=RESEAT if rate > most else "",
        number=round(rate, 3),
        unit="/min",
    )


def nvlink(case: Case) -> CheckResult | None:
    """An NVLink that is to be up is down, or has errors that a sound one has not."""
    check = "nvlink"
    links = case.reading.nvlinks if case.reading is not None else None
    if links is None:
        return unanswered(case, check, "nvlinks")
    up = sum(link.active for link in links)
    expected = expected_links(case, links)
    counted = {"value": f"{up} of {len(links)} up", "number": up, "unit": "links"}
    reset = f"{FABRIC_MANAGER}; {reset_command(case.address)}"
    if expected is not None and up < expected:
        return CheckResult(
            check, Verdict.FAIL, f"{expected - up} NVLinks are down: {numbers_down(links)}",
            threshold=f"{expected} up", remedy=reset, **counted,  # type: ignore[arg-type]
        )  # fmt: skip
    errors = serious_errors(links)
    if errors:
        brief, remedy = f"NVLink errors: {errors}", f"nvidia-smi nvlink -e -i {case.address}"
    elif expected is None and 0 < up < len(links):
        brief = f"NVLinks are down, and no bridge may be meant: {numbers_down(links)}"
        remedy = "reseat the bridge, or say how many NVLinks are expected"
    else:
        brief = "no NVLink is in use" if up == 0 else f"{up} NVLinks are up"
        return CheckResult(check, Verdict.OK, brief, **counted)  # type: ignore[arg-type]
    return CheckResult(check, Verdict.WARN, brief, remedy=remedy, **counted)  # type: ignore[arg-type]


def expected_links(case: Case, links: tuple[NvLink, ...]) -> int | None:
    """How many links are to be up: as its owner says; all of a module on a baseboard (SXM) that
    has some, and of a card in a whole fabric; None for one that may have none."""
    if case.wanted.nvlinks is not None:
        return case.wanted.nvlinks
    reading = case.reading
    if reading is None:
        return None
    found = reading.fabric
    whole = found is not None and found.state == COMPLETED and found.status == 0
    # A card that a guest has alone, without its switches or its neighbours, has no link up.
    lone = not any(link.active for link in links)
    return len(links) if whole or ("SXM" in (reading.name or "") and not lone) else None


def numbers_down(links: tuple[NvLink, ...]) -> str:
    """The numbers of the links that are down."""
    return ", ".join(str(link.number) for link in links if not link.active)


def serious_errors(links: tuple[NvLink, ...]) -> str:
    """The counters that are 0 on a sound link, where they are not."""
    return "; ".join(
        f"link {link.number} {name} {link.errors[name]}"
        for link in links
        for name in NVLINK_SERIOUS
        if link.errors.get(name)
    )


def fabric(case: Case) -> CheckResult | None:
    """The card is not, or not well, in its NVSwitch fabric."""
    check = "fabric"
    found = case.reading.fabric if case.reading is not None else None
    if found is None:
        return unanswered(case, check, "fabric")
    if found.state == 0:
        return unsupported(check, "the card is in no NVSwitch fabric")
    verdict, brief = state_of_fabric(found)
    return CheckResult(
        check,
        verdict,
        brief,
        value=f"state {found.state}, status {found.status}, health {found.health_mask:#x}",
        threshold=f"state {COMPLETED}, status 0",
        remedy="" if verdict is Verdict.OK else FABRIC_MANAGER,
    )


def state_of_fabric(found: Fabric) -> tuple[Verdict, str]:
    """What NVML's three numbers say; a state that is not known fails."""
    if found.state in {NOT_STARTED, IN_PROGRESS}:
        return Verdict.WARN, "the fabric manager has not set it up yet"
    if found.state != COMPLETED:
        return Verdict.FAIL, f"the fabric's state {found.state} is not known"
    if found.status:
        return Verdict.FAIL, f"it did not join its fabric: NVML error {found.status}"

    def part(shift: int, width: int = 0x3) -> int:
        return found.health_mask >> shift & width

    if part(ROUTE_UNHEALTHY) == 1:
        return Verdict.FAIL, "a route through the fabric is unhealthy"
    if part(DEGRADED_BANDWIDTH) == 1:
        return Verdict.FAIL, "the fabric's bandwidth is degraded"
    if part(WRONG_CONFIGURATION, 0xF) > 1:
        return Verdict.FAIL, "the fabric is not configured rightly"
    if part(ROUTE_RECOVERY) == 1 or part(TIMEOUT_RECOVERY) == 1:
        return Verdict.WARN, "the fabric recovers from an error"
    return Verdict.OK, "it is in its fabric"
