"""``gpupt roll``: what nodes are made of."""

from __future__ import annotations

from typing import Any

import click

from gpupt.cli.context import Settings, VerbGroup, common
from gpupt.model.roll import Roll


@click.group(cls=VerbGroup)
def roll() -> None:
    """Rolls: the bundles that nodes are made of.

    \b
    Examples:
      gpupt roll list              every roll, and what it needs
      gpupt roll info spark        its packages, checks and jobs
      gpupt roll build spark       bake its layer and those below it
      gpupt roll verify            read every roll, and check that all is there
    """


@roll.command("list")
@common
def list_rolls(settings: Settings) -> None:
    """Show every roll, its version and what it needs."""
    from gpupt.edges.rolls import read_rolls

    rolls = read_rolls()
    if settings.as_json:
        settings.emit({"rolls": [{**_brief(found), "name": name} for name, found in rolls.items()]})
        return
    from gpupt.cli.context import terminal_colour, terminal_width
    from gpupt.report.tables import roll_table

    for line in roll_table(rolls, colour=terminal_colour(), width=terminal_width()):
        click.echo(line)


@roll.command()
@click.argument("name", metavar="ROLL")
@common
def info(settings: Settings, *, name: str) -> None:
    """Show a roll's packages, checks and jobs, and the rolls it is baked on."""
    from gpupt.decide.layers import closure
    from gpupt.edges.rolls import read_rolls

    rolls = read_rolls()
    order = closure((name,), rolls)
    found = rolls[name]
    baked_on = [one.name for one in order if one.name != found.name]
    if settings.as_json:
        settings.emit({"roll": {**_whole(found), "baked_on": baked_on}})
        return
    click.echo(f"{name} {found.version}: {found.summary}")
    lines = [
        ("baked on", " → ".join(baked_on)),
        ("packages", " ".join(found.packages)),
        ("sources", " ".join(found.sources)),
        ("Python", found.lock or ""),
        ("digest", found.digest),
    ]
    for key, value in lines:
        if value:
            click.echo(f"  {key:<9} {value}")
    for check in found.checks:
        on = ", ".join(check.roles)
        click.echo(f"  check     {check.name} on {on}: {' '.join(check.command)}")
    for job in found.jobs:
        click.echo(f"  job       {job.name}: {job.summary}")


@roll.command()
@click.argument("rolls", nargs=-1, required=True, metavar="ROLL...")
@click.option("--mirror", default=None, metavar="URL", help="The Debian archive to bake from.")
@common
def build(settings: Settings, *, rolls: tuple[str, ...], mirror: str | None) -> None:
    """Bake the layers of rolls and of all they need, and no image."""
    from gpupt.decide.layers import plan_stack
    from gpupt.edges.bake import bake_layers, read_ground
    from gpupt.edges.rolls import read_rolls

    known = read_rolls()
    stack = plan_stack(rolls, known, ground=read_ground())
    baked = bake_layers(
        stack.layers, rolls=known, state=settings.state, narrate=settings.say, mirror=mirror
    )
    if settings.as_json:
        layers = [{"roll": layer.roll, "digest": layer.digest} for layer in stack.layers]
        settings.emit({"layers": layers, "baked": list(baked)})
        return
    for layer in stack.layers:
        how = "baked" if layer.roll in baked else "there"
        click.echo(f"{layer.digest}  {how}  {layer.roll}")


@roll.command()
@click.argument("names", nargs=-1, metavar="[ROLL...]")
@common
def verify(settings: Settings, *, names: tuple[str, ...]) -> None:
    """Read rolls (all, when none is named) and check what can be checked without baking.

    Names, needs, locks with a hash for every file, and a role for what is to be done.
    """
    from gpupt.decide.layers import closure
    from gpupt.edges.rolls import read_rolls, verify_roll
    from gpupt.report.tables import plural

    rolls = read_rolls()
    wanted = names or tuple(rolls)
    closure(wanted, rolls)
    checked = {name: verify_roll(rolls[name]) for name in wanted}
    if settings.as_json:
        settings.emit({"rolls": [{"name": name, "facts": list(checked[name])} for name in wanted]})
        return
    for name in wanted:
        click.echo(f"{name}: {', '.join(checked[name])}")
    click.echo(f"ok: {plural(len(wanted), 'roll')} read, all that they name is there")


def _brief(found: Roll) -> dict[str, Any]:
    return {
        "name": found.name,
        "version": found.version,
        "summary": found.summary,
        "needs": list(found.needs),
        "jobs": [job.name for job in found.jobs],
    }


def _whole(found: Roll) -> dict[str, Any]:
    return {
        **_brief(found),
        "packages": list(found.packages),
        "sources": list(found.sources),
        "lock": found.lock,
        "digest": found.digest,
        "checks": [
            {
                "name": check.name,
                "command": list(check.command),
                "roles": list(check.roles),
                "deadline": check.deadline,
            }
            for check in found.checks
        ],
        "jobs": [
            {
                "name": job.name,
                "summary": job.summary,
                "command": list(job.command),
                "deadline": job.deadline,
            }
            for job in found.jobs
        ],
    }
