"""``gpupt lab``: an emulated GPU host, to try everything with no GPU."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpupt.cli.context import Settings, VerbGroup, common
from gpupt.errors import BadInput, Failed

if TYPE_CHECKING:
    from gpupt.lab.host import Lab
    from gpupt.model.roll import Image

# Verbs that live elsewhere, imported when they are asked for: name → module:attribute, help.
ELSEWHERE = {"demo": ("gpupt.cli.demo:demo", "Show all of it, end to end, on an emulated host.")}


class LabVerbs(VerbGroup):
    """The lab's verbs, and those of ELSEWHERE imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = ELSEWHERE[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        others = [(name, line) for name, (_, line) in ELSEWHERE.items()]
        with formatter.section("Verbs"):
            formatter.write_dl(sorted(own + others))


@click.group(cls=LabVerbs)
def lab() -> None:
    """An emulated GPU host: an IOMMU, cards with NVIDIA's ids, nested KVM; no GPU needed.

    It proves passthrough, libvirt, recovery and the stack; it does not prove NVIDIA's driver,
    real resets, large BARs or speed.

    \b
    Examples:
      gpupt lab up                       boot it (half a minute and more)
      gpupt lab run -- gpupt list        what gpupt sees in it
      gpupt lab shell                    a shell in it
      gpupt lab down                     power it off, and remove it
    """


name_option = click.option("--name", default="lab", show_default=True, help="Which one.")


@lab.command()
@name_option
@click.option("--cpus", type=click.IntRange(1, 64), default=None, help="Default: this machine's.")
@click.option(
    "--memory",
    default=None,
    metavar="SIZE",
    help="Such as '10 GiB' (default: two thirds of what is free).",
)
@click.option(
    "--topology",
    default="default",
    show_default=True,
    metavar="NAME|FILE",
    help="The cards in it and how they hang: a name of docs/lab.md, or a YAML file.",
)
@click.option(
    "--share",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="A folder that it sees, and may write to, at /mnt/share.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    metavar="DIGEST",
    help="An image its gpupt finds built (default: the newest of every set of rolls).",
)
@click.option(
    "--host-image", default=None, metavar="DIGEST", help="What it boots (default: roll gpupt's)."
)
@click.option(
    "--accelerator",
    type=click.Choice(["auto", "kvm", "tcg"]),
    default="auto",
    show_default=True,
    help="auto: KVM if a guest really runs on it.",
)
@common
def up(
    settings: Settings,
    *,
    name: str,
    cpus: int | None,
    memory: str | None,
    topology: str,
    share: Path | None,
    images: tuple[str, ...],
    host_image: str | None,
    accelerator: str,
) -> None:
    """Boot the emulated host and wait until it is ready for work; it stays up after."""
    from gpupt.lab.host import check_name, find_lab

    known = find_lab(settings.state, check_name(name))
    if known is not None and known.is_running:
        settings.say(f"{name}: nothing to do, it is up")
        _show(settings, known, changed=False)
        return
    started = boot_lab(
        settings,
        name=name,
        cpus=cpus,
        memory=parse_memory(memory) if memory else None,
        topology=topology,
        share=share,
        images=images,
        host_image=host_image,
        accelerator=accelerator,
    )
    _show(settings, started, changed=True)


def boot_lab(
    settings: Settings,
    *,
    name: str = "lab",
    cpus: int | None = None,
    memory: int | None = None,
    topology: str = "default",
    share: Path | None = None,
    images: tuple[str, ...] = (),
    host_image: str | None = None,
    accelerator: str = "auto",
    narrate: Callable[[str], None] | None = None,
) -> Lab:
    """Boot an emulated host and return when it is ready for work; ``memory`` in bytes.

    ``images``: digests of what its own gpupt finds already built; none named: the newest of
    every set of rolls.  Raises BadInput, Failed when an image is missing or it does not boot.
    """
    from gpupt.cli.qemu import choose_qemu
    from gpupt.edges.ssh import free_port
    from gpupt.lab.host import start_lab
    from gpupt.lab.machine import Machine
    from gpupt.lab.topologyfile import find_topology

    # QEMU runs in the lab's folder: paths that it is given must not be relative to ours.
    settings = replace(settings, state=settings.state.resolve())
    narrate = narrate or settings.say
    cards = find_topology(topology)
    nodes = _node_images(settings, images)
    boots = _host_image(settings, host_image)
    accelerator, trees = choose_qemu(settings, accelerator, narrate=narrate)
    machine = Machine(
        name=name,
        image=boots,
        topology=cards,
        cpus=cpus or min(os.cpu_count() or 2, 16),
        memory=memory or default_memory(),
        port=free_port(),
        accelerator=accelerator,
        images=nodes,
        share=share.resolve() if share else None,
    )
    return start_lab(machine, state=settings.state, trees=trees, narrate=narrate)


@lab.command(context_settings={"allow_interspersed_args": False})
@name_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@common
def run(settings: Settings, *, name: str, command: tuple[str, ...]) -> None:
    """Run a command in the emulated host; its exit status becomes this command's."""
    from gpupt.lab.host import need_lab

    _become([*need_lab(settings.state, name).ssh_command("-T"), "--", shlex.join(command)])


@lab.command()
@name_option
@common
def shell(settings: Settings, *, name: str) -> None:
    """Open a shell in the emulated host."""
    from gpupt.lab.host import need_lab

    _become(need_lab(settings.state, name).ssh_command())


@lab.command()
@name_option
@common
def down(settings: Settings, *, name: str) -> None:
    """Power the emulated host off and remove it, with its disk and its keys."""
    from gpupt.lab.host import check_name, find_lab, stop_lab

    known = find_lab(settings.state, check_name(name))
    if known is None:
        settings.say(f"{name}: nothing to do, it is not up")
    else:
        stop_lab(known, narrate=settings.say)
    if settings.as_json:
        settings.emit({"lab": name, "changed": known is not None})


@lab.command(name="list")
@common
def list_labs(settings: Settings) -> None:
    """List the emulated hosts that were started and not taken down."""
    from gpupt.lab.host import read_labs

    labs = read_labs(settings.state)
    if settings.as_json:
        settings.emit({"labs": [_as_json(each) for each in labs]})
        return
    for each in labs:
        state = "up" if each.is_running else "ended"
        size = f"{each.cpus} cpus, {each.memory >> 20} MiB"
        click.echo(f"{each.name:<12} {state:<6} {size:<20} {each.accelerator}  {each.folder}")
    if not labs:
        settings.say("no emulated host; gpupt lab up boots one")


def parse_memory(text: str) -> int:
    """Bytes of a size as cluster files have it (``10 GiB``), or as QEMU does (``10G``);
    raises BadInput."""
    from gpupt.edges.specfile import parse_size

    short = text[:-1].isdigit() and text[-1:].upper() in {"M", "G"}
    size = parse_size(f"{text[:-1]} {text[-1:].upper()}iB" if short else text)
    if not 1 << 30 <= size < 1 << 44:
        raise BadInput(f"{text!r} is not the memory of a host", details="expected 1 GiB to 16 TiB")
    # QEMU counts in whole MiB.
    return size >> 20 << 20


def default_memory() -> int:
    """Two thirds of what the machine has free, 4 to 16 GiB, in bytes."""
    free = available_memory() or 8 << 30
    return max(4 << 30, min(16 << 30, free * 2 // 3 >> 20 << 20))


def available_memory() -> int | None:
    """Bytes that programs may still take; None where the kernel does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def _host_image(settings: Settings, digest: str | None) -> Image:
    """The image to boot; raises Failed when it is not there."""
    from gpupt.decide.layers import plan_stack
    from gpupt.edges.bake import read_ground
    from gpupt.edges.images import find_image
    from gpupt.edges.rolls import read_rolls

    stack = plan_stack(("gpupt",), read_rolls(), ground=read_ground())
    image = find_image(settings.state, digest or stack.digest)
    if image is None:
        raise Failed(
            "the emulated host's image is not there" if digest is None else f"no image {digest}",
            details=f"looked for {digest or stack.digest} in {settings.state / 'images'}",
            remedy="gpupt image build gpupt",
        )
    return image


def _node_images(settings: Settings, digests: tuple[str, ...]) -> tuple[Image, ...]:
    """The images named, else the newest of every set of rolls; a host's own is none of them."""
    from gpupt.edges.images import find_image, read_images

    if digests:
        found = tuple(find_image(settings.state, digest) for digest in digests)
        for digest, image in zip(digests, found, strict=True):
            if image is None:
                raise BadInput(f"no image {digest}", remedy="gpupt image list")
        return tuple(image for image in found if image is not None)
    newest: dict[tuple[str, ...], Image] = {}
    for image in read_images(settings.state):
        if "host" not in image.rolls:
            newest.setdefault(image.rolls, image)
    return tuple(newest.values())


def _become(argv: list[str]) -> None:
    """Turn into OpenSSH's client, which passes streams and the exit status through."""
    try:
        os.execvp(argv[0], argv)
    except FileNotFoundError:
        raise Failed("ssh is not installed", remedy="apt-get install openssh-client") from None


def _as_json(each: Lab) -> dict[str, object]:
    return {
        "name": each.name,
        "running": each.is_running,
        "pid": each.pid,
        "ssh_port": each.port,
        "accelerator": each.accelerator,
        "cpus": each.cpus,
        "memory": each.memory,
        "topology": each.topology,
        "image": each.image,
        "images": list(each.images),
        "folder": str(each.folder),
    }


def _show(settings: Settings, each: Lab, *, changed: bool) -> None:
    if settings.as_json:
        settings.emit({"lab": _as_json(each), "changed": changed})
    else:
        name = "" if each.name == "lab" else f" --name {each.name}"
        settings.say(f"gpupt lab run{name} -- gpupt list    shows the GPUs in it")
