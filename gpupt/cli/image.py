"""``gpupt image``: build, list and prune the images that nodes boot from."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from gpupt.cli.context import Settings, VerbGroup, common
from gpupt.model.roll import Image


@click.group(cls=VerbGroup)
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
    if settings.as_json:
        settings.emit({"image": _as_json(made), "built": not was_there})
        return
    settings.say("nothing to do: the image is there" if was_there else "the image is built")
    size, names = image_size(made) >> 20, "+".join(made.rolls)
    click.echo(f"{made.digest}  {size} MiB  {names}  {Path(made.disk).parent}")


@image.command("list")
@common
def list_images(settings: Settings) -> None:
    """Show the images that are there, the newest first."""
    from gpupt.edges.images import image_size, read_images

    images = read_images(settings.state)
    if settings.as_json:
        settings.emit({"images": [_as_json(found) for found in images]})
        return
    for found in images:
        size = image_size(found) >> 20
        click.echo(f"{found.digest}  {size:>6} MiB  {'+'.join(found.rolls)}")
    if not images:
        settings.say(f"no images in {settings.state}")


@image.command()
@click.option("--all", "everything", is_flag=True, help="Also what today's rolls would use.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and stop.")
@common
def prune(settings: Settings, *, everything: bool, dry_run: bool) -> None:
    """Remove images and layers that no roll of today is baked into and no node boots from.

    An image that a disk of a cluster or of the lab stands on is always kept.
    """
    from gpupt.decide.layers import current_digests
    from gpupt.edges.bake import baking, read_ground
    from gpupt.edges.images import read_images
    from gpupt.edges.leftovers import find_leftovers, remove_leftover
    from gpupt.edges.rolls import read_rolls

    # What only looks need not be let in to write.
    with nullcontext() if dry_run else baking(settings.state, settings.say):
        sets = [found.rolls for found in read_images(settings.state)]
        keep = current_digests(sets, read_rolls(), ground=read_ground())
        leftovers = find_leftovers(settings.state, keep=frozenset() if everything else keep)
        for found in leftovers:
            if not dry_run:
                remove_leftover(found)
    freed = sum(found.size for found in leftovers)
    if settings.as_json:
        removed = [
            {"kind": found.kind, "digest": found.digest, "size": found.size} for found in leftovers
        ]
        settings.emit({"removed": removed, "freed": freed, "dry_run": dry_run})
        return
    for found in leftovers:
        click.echo(f"{found.digest}  {found.size >> 20:>6} MiB  {found.kind}")
    would = "would free" if dry_run else "freed"
    settings.say(f"{would} {freed >> 20} MiB" if leftovers else "nothing to do")


def _as_json(found: Image) -> dict[str, Any]:
    from gpupt.edges.images import image_size

    return {
        "digest": found.digest,
        "rolls": list(found.rolls),
        "disk": str(found.disk),
        "format": found.format,
        "virtual_size": found.virtual_size,
        "size": image_size(found),
        "kernel": str(found.kernel),
        "initrd": str(found.initrd),
    }
