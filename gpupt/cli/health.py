"""``gpupt health``: are the GPUs well, for people, scripts, Nagios and Prometheus."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpupt.cli.context import Settings, common, terminal_colour, terminal_width
from gpupt.errors import BadInput, GpuptError
from gpupt.model.health import CheckResult, HealthReport, Verdict

if TYPE_CHECKING:
    from gpupt.apply.clusterworld import ClusterWorld
    from gpupt.model.cluster import Placement
    from gpupt.model.pci import PciAddress
    from gpupt.report.health import Reports

UNKNOWN = 3
CONNECT_SECONDS = 30.0
MOST_NODES = 32
LOAD_SECONDS = 60.0
LEAST_PERIOD = 1.0


class NagiosCommand(click.Command):
    """A command whose wrong usage is unknown too: Nagios takes 2 for a card that fails."""

    def make_context(self, *given: Any, **more: Any) -> click.Context:
        try:
            return super().make_context(*given, **more)
        except click.UsageError as error:
            error.show()
            sys.exit(UNKNOWN)


@click.command(cls=NagiosCommand)
@click.argument("name", metavar="[NAME]", required=False)
@click.option(
    "--all", "-a", "everything", is_flag=True, help="Every check, not only what is wrong."
)
@click.option("--lending", is_flag=True, help="Judge as before a loan: more is forbidden then.")
@click.option("--nagios", is_flag=True, help="One line for Nagios, with performance data.")
@click.option("--prometheus", is_flag=True, help="Metrics in Prometheus's text format.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Where --prometheus writes, whole or not at all.",
)
@click.option(
    "--level",
    type=click.Choice(["quick", "long"]),
    default="quick",
    help="long: put free cards under load too.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1, 3600),
    help="How long --level long loads each card (60).",
)
@click.option(
    "--python",
    metavar="PYTHON",
    help="The Python whose torch, jax, cupy or tensorflow --level long uses.",
)
@click.option("--record", is_flag=True, help="Keep what the cards are now as the baseline.")
@click.option("--against", metavar="baseline|FILE", help="Tell what changed since it was recorded.")
@click.option("--watch", type=float, metavar="SECONDS", help="Look again and again, on a terminal.")
@common
def health(
    settings: Settings,
    *,
    name: str | None,
    everything: bool,
    lending: bool,
    nagios: bool,
    prometheus: bool,
    output: str | None,
    level: str,
    seconds: float | None,
    python: str | None,
    record: bool,
    against: str | None,
    watch: float | None,
) -> None:
    """Check the health of the GPUs of this machine, or of a cluster's nodes.

    NVML (asked in a child with a deadline, so that no driver can hang gpupt), sysfs and the
    kernel's log of this boot.  What could not be read fails; what a card does not support is
    said so.  A card on vfio-pci is invisible to NVML: with NAME, the nodes of that cluster are
    asked, all at the same time.  Rules of your own are in STATE/health.yaml.

    \b
    Exit status, as Nagios reads it, of every output:
      0 OK    1 WARNING    2 CRITICAL    3 UNKNOWN (nothing could be judged, or wrong usage)

    \b
    Examples:
      gpupt health
      gpupt health --level long         free cards under load for a minute
      gpupt health herbarium            every node of a cluster
      gpupt health --nagios
      gpupt health --prometheus --output /var/lib/prometheus/node-exporter/gpupt.prom
      gpupt health --record             while all is well
      gpupt health --against baseline   what changed since
    """
    from gpupt.report.health import exit_code

    try:
        require_one_output(settings, nagios=nagios, prometheus=prometheus, output=output)
        load = load_of(level, seconds, python)
        look_once = (
            looker(settings, lending=lending, against=against, record=record, load=load)
            if name is None
            else cluster_looker(
                settings, name, lending=lending, kept=record or bool(against) or load is not None
            )
        )
        if watch is not None:
            require_watchable(settings, period=watch, others=nagios or prometheus or record)
            reports = watch_health(look_once, period=watch, everything=everything)
            sys.exit(exit_code(reports))
        reports = look_once()
        if prometheus:
            tell_prometheus(reports, output=output)
        elif nagios:
            from gpupt.report.health import nagios_line

            click.echo(nagios_line(reports))
        elif settings.as_json:
            from gpupt.report.health import cluster_json, health_json

            settings.emit(health_json(reports[""]) if name is None else cluster_json(name, reports))
        else:
            from gpupt.report.health import health_lines

            for line in health_lines(
                reports,
                everything=everything,
                colour=terminal_colour(),
                width=terminal_width(),
            ):
                click.echo(line)
    except BrokenPipeError:
        raise
    except (GpuptError, OSError) as error:
        # Nagios takes 1 for a warning and 2 for a failing card: this is neither.
        click.echo(f"gpupt: {error}", err=True)
        if nagios:
            # A plugin that says nothing on stdout is shown as one that says nothing.
            click.echo(f"GPU UNKNOWN - {' '.join(str(error).split()).replace('|', '/')}")
        sys.exit(UNKNOWN)
    sys.exit(exit_code(reports))


def require_one_output(
    settings: Settings, *, nagios: bool, prometheus: bool, output: str | None
) -> None:
    """Raise BadInput where two kinds of output are asked for."""
    if nagios + prometheus + settings.as_json > 1:
        raise BadInput("give one of --json, --nagios and --prometheus")
    if output is not None and not prometheus:
        raise BadInput("--output goes with --prometheus", remedy="redirect stdout for the others")


@dataclass(frozen=True, slots=True)
class Load:
    """How the long level loads each card: for how long, and by the frameworks of which Python."""

    seconds: float
    python: str


def load_of(level: str, seconds: float | None, python: str | None) -> Load | None:
    """How the cards are to be loaded, if they are; raises BadInput for what goes with it alone."""
    if level == "long":
        return Load(seconds or LOAD_SECONDS, python or sys.executable)
    if seconds is not None or python is not None:
        raise BadInput("--seconds and --python go with --level long")
    return None


def looker(
    settings: Settings, *, lending: bool, against: str | None, record: bool, load: Load | None
) -> Callable[[], Reports]:
    """What looks once: judges, loads, and compares or records where that is wanted."""
    from gpupt.apply.host import utc
    from gpupt.cli.healthlook import look
    from gpupt.decide.baseline import against_baseline, take_baseline
    from gpupt.edges.baselinefile import baseline_file, read_baseline, write_baseline

    file = baseline_file(settings.state)
    if against is not None and against != "baseline":
        file = Path(against)
    then = None if against is None else read_baseline(file)

    def look_once() -> Reports:
        found = look(settings, lending=lending)
        report = found.report
        measured: dict[PciAddress, dict[str, float]] = {}
        if load is not None:
            from gpupt.cli.healthburn import burn
            from gpupt.edges.healthfile import read_rules

            limits, _ = read_rules(settings.state)
            settings.say(f"loading the cards that are free, for about {load.seconds:g} s each")
            report, measured = burn(found, limits=limits, seconds=load.seconds, python=load.python)
            for gpu in report.gpus:
                for check in gpu.checks:
                    if check.id == "burn_in" and check.status is Verdict.UNSUPPORTED:
                        settings.say(f"{gpu.address}: {check.brief}")
        now = take_baseline(found.host, found.driver, recorded=utc(), measured=measured)
        if then is not None:
            report = against_baseline(report, now=now, then=then)
        if record and silent_library(report):
            # The facts that it tells are most of a baseline, and the recorded ones still true.
            settings.say("gpupt: not recorded: NVIDIA's library does not answer")
        elif record and not now.cards:
            settings.say("gpupt: not recorded: no GPU answers")
        elif record:
            place = baseline_file(settings.state)
            write_baseline(place, now)
            settings.say(f"{place}: {len(now.cards)} of {len(found.host.gpus)} GPUs recorded")
        return {"": report}

    return look_once


def silent_library(report: HealthReport) -> bool:
    """Whether NVIDIA's library, which cards are to be asked through, said nothing of any."""
    bad = (Verdict.FAIL, Verdict.WARN)
    return any(each.id == "nvml" and each.status in bad for each in report.machine)


def cluster_looker(
    settings: Settings, name: str, *, lending: bool, kept: bool
) -> Callable[[], Reports]:
    """What looks once at every node of a cluster that has GPUs; raises BadInput."""
    if kept:
        raise BadInput(
            "--record, --against and --level long are of this machine's cards, not of a cluster's",
            remedy="gpupt ssh NAME NODE runs what is installed in a node",
        )
    from concurrent.futures import ThreadPoolExecutor

    from gpupt.cli.clusterworld import cluster_world
    from gpupt.cli.nodes import require_cluster

    placements = [p for p in require_cluster(settings, name).allocation.placements if p.cards]

    def look_once() -> Reports:
        ours = cluster_world(settings)

        def one(placement: Placement) -> HealthReport:
            return node_report(settings, ours, name, placement, lending=lending)

        try:
            with ThreadPoolExecutor(max_workers=min(len(placements), MOST_NODES) or 1) as pool:
                found = list(pool.map(one, placements))
        finally:
            ours.close()
        return {p.node.name: report for p, report in zip(placements, found, strict=True)}

    return look_once


def node_report(
    settings: Settings, ours: ClusterWorld, cluster: str, placement: Placement, *, lending: bool
) -> HealthReport:
    """The health of a node's GPUs; a node that does not answer fails."""
    from gpupt.decide.nodehealth import counted
    from gpupt.edges.nodehealth import ask_node

    try:
        ssh = ours.ssh(cluster, placement, deadline=CONNECT_SECONDS)
        return counted(ask_node(ssh, state=settings.state, lending=lending), placement)
    except GpuptError as error:
        said = "; ".join((error.brief, *error.details[-1:]))
        check = CheckResult("node", Verdict.FAIL, said, remedy=error.remedy)
        return HealthReport((), (check,))


def tell_prometheus(reports: Reports, *, output: str | None) -> None:
    """Write the metrics to a file, or to stdout."""
    from gpupt.edges.baselinefile import write_whole
    from gpupt.report.health import prometheus_text

    text = prometheus_text(reports, seconds=time.time())
    if output is None:
        click.echo(text, nl=False)
    else:
        write_whole(Path(output), text)


def require_watchable(settings: Settings, *, period: float, others: bool) -> None:
    """Raise BadInput unless the report can be shown again and again; ``others``: something is
    asked for that is done once."""
    if not sys.stdout.isatty() or settings.as_json or others:
        raise BadInput(
            "--watch is for a terminal, and for the table alone",
            remedy="leave it out, and run it from a timer",
        )
    if not period >= LEAST_PERIOD:
        raise BadInput(f"--watch takes {LEAST_PERIOD:g} s or more")


def watch_health(look_once: Callable[[], Reports], *, period: float, everything: bool) -> Reports:
    """Show the report until Ctrl-C, anew every ``period`` seconds; returns the last."""
    from gpupt.report.health import health_lines

    reports: Reports = {}
    try:
        while True:
            begun = time.monotonic()
            reports = look_once()
            lines = health_lines(
                reports, everything=everything, colour=terminal_colour(), width=terminal_width()
            )
            # Home, the text with each line cleared to its end, then everything below.
            told = [f"gpupt health, every {period:g} s; Ctrl-C ends", "", *lines]
            click.echo("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in told) + "\x1b[J", nl=False)
            time.sleep(max(0.0, begun + period - time.monotonic()))
    except KeyboardInterrupt:
        click.echo()
    return reports
