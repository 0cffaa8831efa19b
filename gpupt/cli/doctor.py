"""``gpupt doctor``: what keeps this host from lending its GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gpupt.cli.context import Settings, common, terminal_colour
from gpupt.errors import BadInput, GpuptError
from gpupt.model.facts import Guest


@click.command()
@click.option("--probe-kvm", is_flag=True, help="Run a tiny guest, to see whether KVM works.")
@common
def doctor(settings: Settings, *, probe_kvm: bool) -> None:
    """Diagnose what would keep this host from lending GPUs.

    Each finding has its evidence and what to do.  A check that could not run is listed,
    with why; it is never taken for passed.  Exit 1 when a check failed, else 0.

    \b
    Examples:
      gpupt doctor
      gpupt doctor --probe-kvm
      gpupt doctor --json | jq -r '.findings[] | "\\(.id) \\(.subject)"'
      gpupt --root /path/to/recorded/tree doctor
    """
    from gpupt.decide.doctor import diagnose
    from gpupt.edges.hostfacts import read_facts
    from gpupt.edges.journal import read_ledger
    from gpupt.edges.sysfs import read_host

    host = read_host(settings.root, whole=True)
    unread: dict[str, str] = {}
    kvm = kvm_verdict(settings, unread, probe=probe_kvm)
    libvirt, guests = ask_libvirt(settings, unread)
    facts = read_facts(settings.root, host, kvm=kvm, libvirt=libvirt, guests=guests, unread=unread)
    diagnosis = diagnose(host, ledger=read_ledger(settings.state), facts=facts)
    if settings.as_json:
        from gpupt.report.hostjson import doctor_json

        settings.emit(doctor_json(diagnosis))
    else:
        from gpupt.report.tables import doctor_lines

        for line in doctor_lines(host, diagnosis, colour=terminal_colour()):
            click.echo(line)
    if not diagnosis.healthy:
        sys.exit(1)


def kvm_verdict(settings: Settings, unread: dict[str, str], *, probe: bool) -> str | None:
    """What is wrong with KVM; None: nothing, or not known, and then ``unread`` says why."""
    if settings.root.resolve() != Path("/"):
        unread["kvm-unusable"] = "only the running machine's KVM can be tried"
        return None
    if not Path("/dev/kvm").exists():
        return "there is no /dev/kvm"
    from gpupt.cli.clusterworld import remembered

    noted = None if probe else remembered(settings.state)
    if noted is not None:
        return None if noted.usable else noted.why
    if not probe:
        unread["kvm-unusable"] = "--probe-kvm runs a tiny guest; that /dev/kvm is there says little"
        return None
    from gpupt.edges.kvm import probe_kvm

    try:
        verdict = probe_kvm(deadline=60)
    except GpuptError as error:
        unread["kvm-unusable"] = error.brief
        return None
    return None if verdict.usable else verdict.why


def ask_libvirt(
    settings: Settings, unread: dict[str, str]
) -> tuple[GpuptError | None, tuple[Guest, ...]]:
    """What libvirt answers, when it is an error, and the guests that it has; raises BadInput for
    a wrong --connect."""
    if settings.root.resolve() != Path("/"):
        for name in ("libvirt-unreachable", "guest-topology"):
            unread[name] = "only the running machine's libvirt can be asked"
        return None, ()
    from gpupt.edges.hypervisor import Hypervisor

    try:
        with Hypervisor.connect(settings.connect) as hypervisor:
            return None, hypervisor.guests()
    except BadInput:
        raise
    except GpuptError as error:
        unread["guest-topology"] = error.brief
        return error, ()
