"""GPU health for people, scripts, Nagios and Prometheus.

Reports come by the name of the machine that they are of: a node's, or empty for this one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

from gpupt.model.health import CheckResult, GpuHealth, HealthReport, Verdict, worst
from gpupt.report.tables import Cell, GpuName, paint, plural, table

# https://nagios-plugins.org/doc/guidelines.html: state words, and the exit codes behind them.
NAGIOS = {
    Verdict.OK: ("OK", 0),
    Verdict.WARN: ("WARNING", 1),
    Verdict.FAIL: ("CRITICAL", 2),
    Verdict.UNSUPPORTED: ("UNKNOWN", 3),
}
SEVEREST = (Verdict.FAIL, Verdict.WARN, Verdict.OK, Verdict.UNSUPPORTED)
COLOUR = {
    Verdict.OK: "host",
    Verdict.WARN: "warn",
    Verdict.FAIL: "fail",
    Verdict.UNSUPPORTED: "dim",
}
# Units that Nagios knows in performance data; any other is left out.
UNITS_OF_NAGIOS = {"s", "%", "B"}
MACHINE = "machine"
GPU_HEAD = ["GPU", "HEALTH", "DRIVER", "FAIL", "WARN", "OK", "N/A", "NAME"]
# Cards that are named in one line for Nagios; the others are counted alone.
MOST_NAMED = 3
LINE, INDENT = 78, "      "
Reports = Mapping[str, HealthReport]


def status_of(report: HealthReport) -> Verdict:
    """The worst of a report.  No GPU, and nothing wrong: that is not well, unless none is what
    there is to be."""
    counted = any(check.id == "gpu_count" for check in report.machine)
    if report.status is Verdict.OK and not report.gpus and not counted:
        return Verdict.UNSUPPORTED
    return report.status


def verdict_of(reports: Reports) -> Verdict:
    """The worst of all."""
    return worst(status_of(report) for report in reports.values())


def exit_code(reports: Reports) -> int:
    """What Nagios reads: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN."""
    return NAGIOS[verdict_of(reports)][1]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong: what it is of, a check that says so, and how many more of each say so.

    Of several subjects, ADDRESS stands in the check's words for that of each.
    """

    subjects: tuple[str, ...]
    check: CheckResult
    more: int = 0

    @property
    def said(self) -> str:
        """``gpu_lost and 16 more: the card is lost to its driver``."""
        more = f" and {self.more} more" if self.more else ""
        return f"{self.check.id}{more}: {self.check.brief}"

    @property
    def subject(self) -> str:
        """``0000:41:00.0``, or ``8 GPUs``."""
        if len(self.subjects) == 1:
            return self.subjects[0]
        cards = all(":" in each for each in self.subjects)
        return plural(len(self.subjects), "GPU" if cards else "machine")

    @property
    def named(self) -> str:
        """``0000:41:00.0``, or ``8 GPUs (0000:41:00.0, 0000:42:00.0, 0000:43:00.0, …)``."""
        if len(self.subjects) == 1:
            return self.subject
        more = ["…"] if len(self.subjects) > MOST_NAMED else []
        return f"{self.subject} ({', '.join([*self.subjects[:MOST_NAMED], *more])})"


def problems(reports: Reports) -> list[Problem]:
    """What is not well, the worst first; one cause that fails many checks of a card is told
    once, and one check that says the same of many cards too."""
    found: dict[tuple[str, str, Verdict], Problem] = {}
    for subject, checks in subjects(reports):
        for check in checks:
            if check.status not in {Verdict.FAIL, Verdict.WARN}:
                continue
            key = (subject, check.brief, check.status)
            known = found.get(key)
            found[key] = (
                replace(known, more=known.more + 1) if known else Problem((subject,), check)
            )
    alike: dict[Problem, list[Problem]] = {}
    for problem in found.values():
        alike.setdefault(anonymous(problem), []).append(problem)
    told = [
        same[0]
        if len(same) == 1
        else replace(shared, subjects=tuple(each.subjects[0] for each in same))
        for shared, same in alike.items()
    ]
    return sorted(told, key=lambda each: SEVEREST.index(each.check.status))


def anonymous(problem: Problem) -> Problem:
    """The problem without what it is of, and without its measures: alike for cards alike."""
    address = problem.subjects[0].rpartition("/")[2]
    check = problem.check
    return Problem(
        (),
        CheckResult(
            check.id,
            check.status,
            check.brief.replace(address, "ADDRESS"),
            threshold=check.threshold,
            remedy=check.remedy.replace(address, "ADDRESS"),
        ),
        problem.more,
    )


def health_lines(
    reports: Reports, *, everything: bool = False, colour: bool, width: int | None = None
) -> list[str]:
    """``gpupt health``: what is wrong, then a line for each GPU; ``everything``: each check.

    Tables are cut to ``width`` characters a line."""
    lines = []
    for problem in problems(reports):
        lines += problem_lines(problem, colour=colour)
    if lines:
        lines.append("")
    rows = [
        [*([Cell(node)] if node else []), *gpu_row(gpu)]
        for node, report in reports.items()
        for gpu in report.gpus
    ]
    if not rows:
        return [*lines, "no GPU was judged: there is none here"]
    head = ["NODE", *GPU_HEAD] if len(rows[0]) > len(GPU_HEAD) else GPU_HEAD
    lines += table(head, rows, colour=colour, width=width)
    if everything:
        lines += ["", *check_lines(reports, colour=colour, width=width)]
    return lines


def problem_lines(problem: Problem, *, colour: bool) -> list[str]:
    """A problem with its rule and its remedy, and the cards that have it in common."""
    check = problem.check
    mark = paint(f"{check.status.value:<4}", COLOUR[check.status], colour=colour)
    lines = [f"{mark}  {problem.subject}  {problem.said}"]
    if len(problem.subjects) > 1:
        named = "  ".join(problem.subjects)
        lines += wrap(named, LINE, initial_indent=INDENT, subsequent_indent=INDENT)
    if check.threshold:
        lines.append(f"{INDENT}{paint(f'rule: {check.threshold}', 'dim', colour=colour)}")
    if check.remedy:
        lines.append(f"{INDENT}→ {check.remedy}")
    return lines


def gpu_row(gpu: GpuHealth) -> list[Cell]:
    """A GPU's line: its verdict, how many checks said what, and what it is."""
    number = Counter(check.status for check in gpu.checks)
    return [
        Cell(str(gpu.address)),
        Cell(gpu.status.value, COLOUR[gpu.status]),
        Cell(gpu.driver or "–"),
        *(Cell(str(number[verdict] or "–")) for verdict in SEVEREST),
        Cell(GpuName(gpu.name or "–", "").short),
    ]


def check_lines(reports: Reports, *, colour: bool, width: int | None = None) -> list[str]:
    """Every check, a line each."""
    rows = [
        [
            Cell(subject),
            Cell(check.id),
            Cell(check.status.value, COLOUR[check.status]),
            Cell(check.value or "–"),
            Cell(check.threshold or "–", "dim"),
        ]
        for subject, checks in subjects(reports)
        for check in checks
    ]
    return table(["SUBJECT", "CHECK", "", "VALUE", "RULE"], rows, colour=colour, width=width)


def subjects(reports: Reports) -> Iterator[tuple[str, Sequence[CheckResult]]]:
    """Each machine and each GPU, with their checks; a node's are called NODE/GPU."""
    for node, report in reports.items():
        if report.machine:
            yield node or MACHINE, report.machine
        for gpu in report.gpus:
            yield f"{node}/{gpu.address}" if node else str(gpu.address), gpu.checks


def cluster_json(cluster: str, reports: Reports) -> dict[str, Any]:
    """``gpupt health NAME --json``."""
    return {
        "cluster": cluster,
        "status": verdict_of(reports).value,
        "nodes": {node: health_json(report) for node, report in reports.items()},
    }


def health_json(report: HealthReport) -> dict[str, Any]:
    """``gpupt health --json``."""
    return {
        "status": status_of(report).value,
        "gpus": [
            {
                "address": str(gpu.address),
                "uuid": gpu.uuid,
                "name": gpu.name,
                "driver": gpu.driver,
                "status": gpu.status.value,
                "checks": [check_json(check) for check in gpu.checks],
            }
            for gpu in report.gpus
        ],
        "machine": [check_json(check) for check in report.machine],
    }


def check_json(check: CheckResult) -> dict[str, Any]:
    """One check; ``number`` and ``unit`` are the value for programs."""
    return {
        "id": check.id,
        "status": check.status.value,
        "value": check.value,
        "threshold": check.threshold,
        "remedy": check.remedy,
        "brief": check.brief,
        "number": check.number,
        "unit": check.unit,
    }


def nagios_line(reports: Reports) -> str:
    """One line for Nagios: the state, what is wrong, and performance data."""
    status = verdict_of(reports)
    word = NAGIOS[status][0]
    wrong = problems(reports)
    gpus = [gpu for report in reports.values() for gpu in report.gpus]
    if not gpus and not wrong:
        said = "no GPU here"
    elif wrong:
        said = "; ".join(f"{problem.named} {problem.said}" for problem in wrong)
    elif status is Verdict.UNSUPPORTED:
        said = "nothing could be checked"
    else:
        said = f"{plural(len(gpus), 'GPU')} well"
    data = " ".join(performance(reports))
    # A bar begins the performance data, and only the first line counts.
    text = re.sub(r"\s+", " ", said.replace("|", "/"))
    return f"GPU {word} - {text}" + (f" | {data}" if data else "")


def performance(reports: Reports) -> Iterator[str]:
    """``'0000:41:00.0 temperature'=45`` for each value that is a quantity."""
    for subject, checks in subjects(reports):
        for check in checks:
            if check.number is not None and check.unit:
                unit = check.unit if check.unit in UNITS_OF_NAGIOS else ""
                yield f"'{subject} {check.id}'={plain(check.number)}{unit}"


def plain(number: float) -> str:
    """The number with all its digits and no exponent, which Nagios does not read."""
    return f"{number:.6f}".rstrip("0").rstrip(".")


def prometheus_text(reports: Reports, *, seconds: float) -> str:
    """The report in Prometheus's text format, for a node exporter's textfile collector.

    ``seconds`` is when it was made (Unix time), so that a file that is not refreshed any more
    is seen to be old.
    """
    lines = [
        "# HELP gpupt_gpu_health 0 ok, 1 warn, 2 fail, 3 not to be judged.",
        "# TYPE gpupt_gpu_health gauge",
    ]
    for node, report in reports.items():
        for gpu in report.gpus:
            names = labels(
                node=node,
                address=str(gpu.address),
                uuid=gpu.uuid or "",
                name=gpu.name or "",
                driver=gpu.driver or "",
            )
            lines.append(f"gpupt_gpu_health{names} {NAGIOS[gpu.status][1]}")
    lines += [
        "# HELP gpupt_health_check 0 ok, 1 warn, 2 fail, 3 not supported.",
        "# TYPE gpupt_health_check gauge",
    ]
    values = []
    for (subject, name), check in series(reports).items():
        names = labels(subject=subject, check=name)
        lines.append(f"gpupt_health_check{names} {NAGIOS[check.status][1]}")
        if check.number is not None:
            more = labels(subject=subject, check=name, unit=check.unit)
            values.append(f"gpupt_health_value{more} {plain(check.number)}")
    lines += [
        "# HELP gpupt_health_value What a check measured, in its unit.",
        "# TYPE gpupt_health_value gauge",
        *values,
        "# HELP gpupt_health_status The worst of all: 0 ok, 1 warn, 2 fail, 3 not to be judged.",
        "# TYPE gpupt_health_status gauge",
        f"gpupt_health_status {exit_code(reports)}",
        "# HELP gpupt_health_time_seconds When the checks were made.",
        "# TYPE gpupt_health_time_seconds gauge",
        f"gpupt_health_time_seconds {seconds:.0f}",
    ]
    return "\n".join(lines) + "\n"


def series(reports: Reports) -> dict[tuple[str, str], CheckResult]:
    """Each check by subject and name, the worst of two of one name: a file in which a series
    stands twice is refused whole."""
    found: dict[tuple[str, str], CheckResult] = {}
    for subject, checks in subjects(reports):
        for check in checks:
            known = found.get((subject, check.id))
            if known is None or worst((known.status, check.status)) is not known.status:
                found[(subject, check.id)] = check
    return found


def labels(**given: str) -> str:
    """``{address="0000:41:00.0",name="…"}``, escaped as the format asks."""
    escaped = (
        (name, text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"'))
        for name, text in given.items()
    )
    return "{" + ",".join(f'{name}="{text}"' for name, text in escaped) + "}"
