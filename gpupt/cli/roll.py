"""``gpupt roll``: what nodes are made of."""

from __future__ import annotations

import click

from gpupt.cli.context import Settings, common


@click.group()
def roll() -> None:
    """Rolls: the bundles that nodes are made of.

    \b
    Examples:
      gpupt roll list              every roll, and what it needs
      gpupt roll info spark        its packages, checks and jobs
    """


@roll.command("list")
@common
def list_rolls(settings: Settings) -> None:
    """Show every roll, its version and what it needs."""
    from gpupt.edges.rolls import read_rolls

    rolls = read_rolls()
    if settings.as_json:
        settings.emit(
            {
                "rolls": [
                    {
                        "name": found.name,
                        "version": found.version,
                        "summary": found.summary,
                        "needs": list(found.needs),
                    }
                    for found in rolls.values()
                ]
            }
        )
        return
    width = max(len(name) for name in rolls)
    for found in rolls.values():
        click.echo(f"{found.name:<{width}}  {found.version:<8}  {found.summary}")
