"""``gpupt host prepare``: what this host lacks to lend GPUs, and giving it that."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpupt.cli.context import (
    Settings,
    VerbGroup,
    changing,
    common,
    consent,
    plan_json,
    require_live,
    terminal_colour,
)
from gpupt.errors import BadInput, Failed

if TYPE_CHECKING:
    from gpupt.decide.prepare import Decision
    from gpupt.model.preparation import Wishes


@click.group(cls=VerbGroup)
def host() -> None:
    """This host itself: getting it ready to lend GPUs."""


@host.command()
@click.option(
    "--hugepages", metavar="SIZE", help="Reserve so much memory in hugepages, such as '64 GiB'."
)
@click.option(
    "--memlock", metavar="USER", help="Let USER's own guests (qemu:///session) lock memory."
)
@click.option("--undo", is_flag=True, help="Take back what was written, and nothing else.")
@changing
@common
def prepare(
    settings: Settings,
    *,
    hugepages: str | None,
    memlock: str | None,
    undo: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Show what this host lacks to lend GPUs, and give it that.

    The kernel's command line, by the distribution's own tool; vfio-pci at boot; the limit of
    locked memory where libvirt cannot raise it; hugepages when asked.  All of it is for the
    next boot: the running kernel is left alone.  What needs the firmware is explained, and is
    yours to do; exit 1 while something of that kind is lacking, else 0.

    \b
    Examples:
      gpupt host prepare --dry-run
      gpupt host prepare --hugepages '64 GiB'
      gpupt host prepare --undo           remove exactly what it wrote
    """
    if undo and (hugepages or memlock):
        raise BadInput(
            "--undo takes back all that was written, and needs no other option",
            details=f"given: {'--hugepages' if hugepages else '--memlock'}",
            remedy="leave one of them out",
        )
    wishes = read_wishes(settings, hugepages=hugepages, memlock=memlock)
    require_live(settings, dry_run=dry_run)
    plan, findings = decided = decide(settings, wishes, undo=undo)
    if settings.as_json:
        from gpupt.report.hostjson import finding_json

        answer = plan_json(plan, [finding_json(finding) for finding in findings])
    else:
        from gpupt.report.tables import finding_lines

        answer = {}
        for line in finding_lines(findings, colour=terminal_colour()):
            click.echo(line, err=not dry_run)
    if settings.as_json and (dry_run or not plan.actions):
        settings.emit(answer)
    elif consent(settings, plan, dry_run=dry_run, yes=yes):
        apply(settings, decided, wishes=wishes, undo=undo)
        if settings.as_json:
            settings.emit(answer)
        settings.say(f"{plan.verb} {plan.subject}: done; it takes effect at the next boot")
    if any(finding.severity.value == "fail" for finding in findings):
        sys.exit(1)


def read_wishes(settings: Settings, *, hugepages: str | None, memlock: str | None) -> Wishes:
    """The options as values; raises BadInput."""
    from gpupt.model.preparation import Wishes

    size = None
    if hugepages is not None:
        from gpupt.edges.specfile import parse_size

        size = parse_size(hugepages)
    if memlock is not None:
        import pwd

        known = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", memlock) is not None
        if known and settings.root.resolve() == Path("/"):
            known = any(entry.pw_name == memlock for entry in pwd.getpwall())
        if not known:
            raise BadInput(f"there is no user {memlock!r}", remedy="give --memlock a user's name")
    return Wishes(hugepages=size, memlock_user=memlock)


def decide(settings: Settings, wishes: Wishes, *, undo: bool) -> Decision:
    """Read the host, and what was written before, and decide."""
    from gpupt.decide.prepare import FILES, UNITS, plan_preparation, plan_undo
    from gpupt.edges.preparation import read_preparation, read_record
    from gpupt.edges.sysfs import read_host

    facts = read_preparation(settings.root, files=FILES, units=UNITS)
    written = tuple(row.action for row in read_record(settings.state))
    if undo:
        return plan_undo(facts=facts, written=written)
    return plan_preparation(read_host(settings.root), facts=facts, wishes=wishes, written=written)


def apply(settings: Settings, shown: Decision, *, wishes: Wishes, undo: bool) -> None:
    """Carry out what was shown, with no other gpupt at work on this host."""
    from gpupt.apply.preparation import carry_out
    from gpupt.edges.etc import Etc
    from gpupt.edges.journal import take_lock

    lock = take_lock(settings.state)
    try:
        plan, _ = decide(settings, wishes, undo=undo)
        if plan != shown[0]:
            raise Failed(
                "the host changed while the plan was being shown; nothing was touched",
                remedy="run the same command again",
            )
        carry_out(plan, etc=Etc(settings.root), state=settings.state, narrate=settings.detail)
    finally:
        os.close(lock)
