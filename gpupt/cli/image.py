"""``gpupt image``: build, list and prune the images that nodes boot from."""

from __future__ import annotations

from pathlib import Path

import click

from gpupt.cli.context import Settings, common


@click.group()
def image() -> None:
    """Images baked from rolls.

    \b
    Examples:
      gpupt image build spark tensorflow     bake those rolls and all they need
      gpupt image list                       what is there, and how large
      gpupt image prune                      remove images and layers no roll asks for
    """


@image.command()
@click.argument("rolls", nargs=-1, required=True, metavar="ROLL...")
@click.option(
    "--mirror",
    default=None,
    metavar="URL",
    help="The Debian archive (default: GPUPT_DEBIAN_MIRROR, else this machine's own).",
)
@common
def build(settings: Settings, *, rolls: tuple[str, ...], mirror: str | None) -> None:
    """Bake rolls, and all they need, into a bootable image; nothing to do when it is there."""
    from gpupt.decide.layers import plan_stack
    from gpupt.edges.bake import bake_image, read_ground
    from gpupt.edges.images import find_image, image_size
    from gpupt.edges.rolls import read_rolls

    known = read_rolls()
    stack = plan_stack(rolls, known, ground=read_ground())
    was_there = find_image(settings.state, stack.digest) is not None
    made = bake_image(
        stack.layers,
        stack.digest,
        rolls=known,
        state=settings.state,
        narrate=settings.say,
        mirror=mirror,
    )
    size = image_size(made)
    if settings.as_json:
        settings.emit(
            {
                "image": {
                    "digest": made.digest,
                    "rolls": list(made.rolls),
                    "disk": str(made.disk),
                    "format": made.format,
                    "virtual_size": made.virtual_size,
                    "size": size,
                    "kernel": str(made.kernel),
                    "initrd": str(made.initrd),
                },
                "built": not was_there,
            }
        )
        return
    settings.say("nothing to do: the image is there" if was_there else "the image is built")
    click.echo(f"{made.digest}  {size >> 20} MiB  {'+'.join(made.rolls)}  {Path(made.disk).parent}")
