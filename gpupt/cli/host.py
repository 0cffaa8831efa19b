"""Verbs that read the host: list, info, status, snapshot."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import click

from gpupt.cli.context import Settings, common
from gpupt.edges.pciids import with_names
from gpupt.edges.sysfs import read_host
from gpupt.errors import Failed
from gpupt.model.host import Loan
from gpupt.model.pci import PciAddress


def terminal_colour() -> bool:
    """Whether stdout is a terminal that wants colour (https://no-color.org)."""
    import os

    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def terminal_width() -> int | None:
    """Characters a line on a terminal; None where output is for a file or a program."""
    if not sys.stdout.isatty():
        return None
    import shutil

    return shutil.get_terminal_size().columns


def known_loans(settings: Settings) -> Mapping[PciAddress, Loan]:
    """The loans of the state folder; none, with a word on stderr, when it cannot be read."""
    if not (settings.state / "journal.sqlite").exists():
        return {}
    from gpupt.edges.journal import read_ledger

    try:
        return read_ledger(settings.state).loans
    except Failed as error:
        settings.say(f"gpupt: loans are not shown: {error}")
        return {}


@click.command("list")
@common
def list_gpus(settings: Settings) -> None:
    """Show the GPUs, who has each, and their IOMMU groups.

    STATE is host (a driver of the host has it), driverless, detached (on vfio-pci, lent to
    nobody), lent (a node has it) or lost (fallen off the bus).  GROUP is the IOMMU group,
    and how many other functions leave the host with the GPU.

    \b
    Examples:
      gpupt list
      gpupt list --json | jq -r '.gpus[] | select(.state == "host") | .address'
      gpupt --root /path/to/recorded/tree list
    """
    host = with_names(read_host(settings.root), settings.root)
    loans = known_loans(settings)
    if settings.as_json:
        from gpupt.report.hostjson import list_json

        settings.emit(list_json(host, loans))
        return
    from gpupt.report.tables import gpu_table

    for line in gpu_table(host, loans, colour=terminal_colour(), width=terminal_width()):
        click.echo(line)


@click.command()
@common
def status(settings: Settings) -> None:
    """Show who has what, and what is unfinished.

    Loans (GPUs taken from the host, and which node has each), runs that a crash cut short,
    and driver overrides.  Exit 0 whatever is found; JSON has the same under loans,
    unfinished and overrides.

    \b
    Examples:
      gpupt status
      gpupt status --json | jq '.loans[].gpu'
    """
    from gpupt.edges.journal import read_ledger
    from gpupt.report.hostjson import status_json
    from gpupt.report.tables import status_lines

    host = read_host(settings.root, whole=True)
    ledger = read_ledger(settings.state)
    if settings.as_json:
        settings.emit(status_json(host, ledger))
        return
    for line in status_lines(host, ledger, colour=terminal_colour()):
        click.echo(line)
