"""Verbs that read the host: list, info, status, snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from gpupt.cli.context import Settings, common, terminal_colour, terminal_width
from gpupt.edges.bootrules import read_persistent
from gpupt.edges.pciids import read_names, with_names
from gpupt.edges.sysfs import read_host
from gpupt.errors import Failed, GpuptError
from gpupt.model.host import Finding, Host, Loan, Records
from gpupt.model.pci import PciAddress

# A libvirt that is stuck does not keep anybody from seeing the rest.
LIBVIRT_SECONDS = 10.0


def known_records(settings: Settings) -> Records:
    """What is on record; no loans and fences, with a word on stderr, when they cannot be read."""
    persistent = read_persistent(settings.root)
    if not (settings.state / "journal.sqlite").exists():
        return Records(persistent=persistent)
    from gpupt.edges.journal import read_ledger

    try:
        ledger = read_ledger(settings.state)
    except Failed as error:
        settings.say(f"gpupt: loans and fences are not shown: {error}")
        return Records(persistent=persistent)
    return Records(ledger.loans, ledger.fences, persistent)


@click.command("list")
@common
def list_gpus(settings: Settings) -> None:
    """Show the GPUs, who has each, and their IOMMU groups.

    STATE is host (a driver of the host has it), driverless, detached (on vfio-pci, lent to
    nobody), lent (a node has it) or lost (fallen off the bus); with "persistent" where
    `detach --persist` has it taken again at boot, and "fenced" where it is lent to nobody.
    GROUP is the IOMMU group, and how many
    other functions leave the host with the GPU.

    \b
    Examples:
      gpupt list
      gpupt list --json | jq -r '.gpus[] | select(.state == "host") | .address'
      gpupt --root /path/to/recorded/tree list
    """
    host = with_names(read_host(settings.root), settings.root)
    records = known_records(settings)
    if settings.as_json:
        from gpupt.report.hostjson import list_json

        settings.emit(list_json(host, records))
        return
    from gpupt.report.tables import gpu_table

    for line in gpu_table(host, records, colour=terminal_colour(), width=terminal_width()):
        click.echo(line)


@click.command()
@common
def status(settings: Settings) -> None:
    """Show who has what, what nodes lost, and what is unfinished.

    Loans (GPUs taken from the host, and which node has each; persistent: over reboots too),
    nodes that do not have the GPU they were lent any more, fences, runs that a crash cut
    short, driver overrides, and udev rules of ours that no loan explains.  Exit 0 whatever is
    found; JSON has the same under loans, findings, fences, unfinished, overrides and
    boot_rules.

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
    persistent = read_persistent(settings.root)
    findings = lent_findings(settings, host, ledger.loans)
    if settings.as_json:
        settings.emit(status_json(host, ledger, persistent=persistent, findings=findings))
        return
    for line in status_lines(
        host, ledger, persistent=persistent, findings=findings, colour=terminal_colour()
    ):
        click.echo(line)


def lent_findings(
    settings: Settings, host: Host, loans: Mapping[PciAddress, Loan]
) -> tuple[Finding, ...]:
    """What became of GPUs that are lent to nodes; libvirt is asked only where there are some."""
    lent = {gpu: loan for gpu, loan in loans.items() if loan.node is not None}
    if not lent:
        return ()
    from gpupt.decide.lent import assess_lent
    from gpupt.edges.holders import holders_of
    from gpupt.edges.hypervisor import Hypervisor

    domains = None
    if settings.root.resolve() == Path("/"):
        try:
            with Hypervisor.connect(settings.connect, deadline=LIBVIRT_SECONDS) as hypervisor:
                domains = hypervisor.domains()
        except GpuptError as error:
            settings.say(f"whether the nodes run is not known: {error.brief}")
    return assess_lent(host, lent, domains=domains, holders=holders_of(settings.root, host, lent))


@click.command()
@click.argument("gpu")
@common
def info(settings: Settings, *, gpu: str) -> None:
    """Explain one GPU and its IOMMU group.

    GPU is an address (41:00.0) or an alias from STATE/aliases.yaml.  Shows every function
    that leaves the host with it, and what would keep it from being detached now.

    \b
    Examples:
      gpupt info 41:00.0
      gpupt info 41:00.0 --json
    """
    from gpupt.cli.binding import read_preflight
    from gpupt.cli.naming import named_gpu
    from gpupt.decide.binding import gpu_at
    from gpupt.decide.viability import assess_lending, closure

    host = with_names(read_host(settings.root, whole=True), settings.root)
    found = gpu_at(host, named_gpu(gpu, state=settings.state))
    records = known_records(settings)
    preflight = read_preflight(settings, host, boot_gpu=False, fences=records.fences)
    reasons = assess_lending(host, found, loans=records.loans, preflight=preflight)
    functions = closure(host, found)
    if settings.as_json:
        from gpupt.report.hostjson import info_json

        data = info_json(found, host=host, records=records, leaving=functions, reasons=reasons)
        settings.emit(data)
        return
    from gpupt.report.card import info_lines

    names = read_names(settings.root, (host.devices[address].id for address in functions))
    for line in info_lines(
        found,
        host=host,
        records=records,
        leaving=functions,
        reasons=reasons,
        names=names,
        colour=terminal_colour(),
        width=terminal_width(),
    ):
        click.echo(line)


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, writable=True))
@common
def snapshot(settings: Settings, *, file: str) -> None:
    """Record this machine's PCI facts in a file.

    FILE is a .tar.gz of the files that gpupt reads: PCI functions, IOMMU groups, drivers,
    NUMA nodes, mounts and routes.  No serial numbers, MAC addresses, UUIDs or file names of
    yours.  Unpacked, every reading verb works on it.

    \b
    Examples:
      gpupt snapshot host.tar.gz
      mkdir host && tar -xzf host.tar.gz -C host && gpupt --root host doctor
    """
    from gpupt.edges.snapshot import write_snapshot

    count = write_snapshot(settings.root, Path(file))
    if settings.as_json:
        settings.emit({"file": file, "entries": count})
        return
    settings.say(f"{file}: {count} entries")
