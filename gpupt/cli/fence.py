"""Verbs that keep GPUs from being lent, and allow it again: fence, unfence."""

from __future__ import annotations

import click

from gpupt.actions import Ledger, Plan
from gpupt.apply.host import utc
from gpupt.cli.binding import change, require_one_of
from gpupt.cli.context import Settings, changing, common
from gpupt.cli.naming import named_gpu
from gpupt.decide.binding import plan_fence, plan_unfence
from gpupt.errors import BadInput
from gpupt.model.host import Host

LONGEST = 200


@click.command()
@click.argument("gpus", nargs=-1, required=True, metavar="GPU...")
@click.option("--reason", required=True, metavar="TEXT", help="Why: shown wherever it is refused.")
@changing
@common
def fence(
    settings: Settings, *, gpus: tuple[str, ...], reason: str, dry_run: bool, yes: bool
) -> None:
    """Lend GPUs to nobody until they are unfenced.

    `detach` and `up` refuse a fenced GPU with the reason, or place their nodes elsewhere.  A
    node that has it keeps it.  gpupt fences by itself what does not answer, or fails its
    health checks, when it comes back from a guest.  A fence is of the card: another card in
    the same slot is not fenced.

    \b
    Examples:
      gpupt fence 41:00.0 --reason "double-bit errors, RMA opened"
      gpupt status
    """
    text = reason.strip()
    if not text or not text.isprintable() or len(text) > LONGEST:
        raise BadInput(
            "a reason is one line of text",
            details=f"{reason[:40]!r}, {len(reason)} characters",
            remedy=f"give --reason a few words, {LONGEST} characters at most",
        )
    wanted = tuple(named_gpu(word, state=settings.state) for word in gpus)
    since = utc()

    def decide(host: Host, ledger: Ledger) -> Plan:
        return plan_fence(host, gpus=wanted, fences=ledger.fences, reason=text, since=since)

    change(settings, decide, dry_run=dry_run, yes=yes)


@click.command()
@click.argument("gpus", nargs=-1, metavar="GPU...")
@click.option("--all", "everything", is_flag=True, help="Every GPU that is fenced.")
@changing
@common
def unfence(
    settings: Settings, *, gpus: tuple[str, ...], everything: bool, dry_run: bool, yes: bool
) -> None:
    """Let fenced GPUs be lent again.

    Nothing is checked here: the next `detach` or `up` looks at the card itself.

    \b
    Examples:
      gpupt unfence 41:00.0
      gpupt unfence --all --yes
    """
    require_one_of(gpus, everything, verb="unfence", remedy="gpupt status shows them")
    wanted = tuple(named_gpu(word, state=settings.state) for word in gpus)

    def decide(host: Host, ledger: Ledger) -> Plan:
        chosen = tuple(ledger.fences) if everything else wanted
        return plan_unfence(host, gpus=chosen, fences=ledger.fences)

    change(settings, decide, dry_run=dry_run, yes=yes)
