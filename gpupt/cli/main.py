"""The ``gpupt`` command: verbs are found in a table and imported when they are asked for."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from gpupt import __version__
from gpupt.cli.context import Settings, VerbGroup
from gpupt.errors import BadInput, Failed, GpuptError

# verb → module:attribute under gpupt.cli, and the line that --help shows.  A table, so
# that `gpupt list` imports nothing of libvirt, paramiko or jinja2.
VERBS: dict[str, tuple[str, str]] = {
    "list": ("host:list_gpus", "Show the GPUs, who has each, and their IOMMU groups."),
    "info": ("host:info", "Explain one GPU and its IOMMU group."),
    "status": ("host:status", "Show who has what, and what is unfinished."),
    "doctor": ("doctor:doctor", "Diagnose what would keep this host from lending GPUs."),
    "host": ("prepare:host", "Prepare this host to lend GPUs, and take that back."),
    "detach": ("binding:detach", "Take GPUs from the host, for guests."),
    "attach": ("binding:attach", "Give GPUs back to the host, to the drivers they came from."),
    "recover": ("binding:recover", "Finish or undo what a crash cut short."),
    "fence": ("fence:fence", "Lend GPUs to nobody, for a reason."),
    "unfence": ("fence:unfence", "Let fenced GPUs be lent again."),
    "snapshot": ("host:snapshot", "Record this machine's PCI facts in a file."),
    "plan": ("cluster:plan", "Show what `up` would do."),
    "up": ("cluster:up", "Bring a cluster up from its file."),
    "show": ("nodes:show", "Show a cluster's nodes and their GPUs."),
    "ssh": ("nodes:ssh", "Run a command, or a shell, on a node."),
    "run": ("nodes:run", "Run a roll's job on a cluster."),
    "down": ("cluster:down", "Take a cluster down and give its GPUs back."),
    "render": ("cluster:render", "Print every file that `up` would write, domain XML first."),
    "health": ("health:health", "Are the GPUs well: for people, scripts and Nagios."),
    "roll": ("roll:roll", "Rolls: the bundles that nodes are made of."),
    "image": ("image:image", "Images baked from rolls."),
    "lab": ("lab:lab", "An emulated GPU host, to try everything with no GPU."),
}

HELP = """Turn a host with GPUs into a virtual GPU cluster, and give every GPU back.

\b
Examples:
  gpupt list                      the GPUs of this host, and who has each
  gpupt doctor                    what keeps this host from lending them
  gpupt up cluster.yaml           frontend and GPU nodes, from one file
  gpupt down NAME                 the cluster gone, every GPU back on its driver
  gpupt lab demo                  all of it on an emulated host, with no GPU

Exit status: 0 done or nothing to do, 1 failed, 2 bad usage or input, 3 refused by preflight,
130 ended by Ctrl-C.  `health` speaks Nagios: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.
"""


class VerbTable(VerbGroup):
    """A group whose commands are imported on use; help comes from the table alone."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = VERBS.get(cmd_name)
        if found is None:
            return None
        module, _, attribute = found[0].partition(":")
        command = getattr(importlib.import_module(f"gpupt.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.command(cls=VerbTable, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpupt")
@click.option(
    "--root", default=None, metavar="DIR", help="The tree that holds sys/ and proc/ (default /)."
)
@click.option(
    "--connect", default=None, metavar="URI", help="Libvirt's URI (default qemu:///system)."
)
@click.option("--state", default=None, metavar="DIR", help="State folder (default /var/lib/gpupt).")
@click.option("--json", "as_json", is_flag=True, default=None, help="One JSON object on stdout.")
@click.option("-v", "--verbose", count=True, help="Say more on stderr.")
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> None:
    ctx.obj = Settings.of(ctx.obj, **given)
    # os.path's answer is no where it may not look; that is told when the state is used.
    if os.path.exists(ctx.obj.state) and not os.path.isdir(ctx.obj.state):
        raise BadInput(
            f"{ctx.obj.state} is not a folder",
            details="the state is a folder: the journal, the images and the clusters are in it",
            remedy="give --state a folder; one that is not there yet is made",
        )


def main() -> None:
    """Run the command line; every GpuptError becomes its text on stderr and its exit status."""
    # Closed by who started it (`gpupt list >&-`): what would be printed is wanted by nobody.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    try:
        try:
            status = cli.main(prog_name="gpupt", standalone_mode=False)
        finally:
            sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except click.exceptions.Abort:
        click.echo("gpupt: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except GpuptError as error:
        click.echo(f"gpupt: {error}", err=True)
        sys.exit(error.exit_code)
    except PermissionError as error:
        denied = Failed(
            f"permission denied: {error.filename or error.strerror}",
            remedy="run gpupt as root, or name files and folders of yours",
        )
        click.echo(f"gpupt: {denied}", err=True)
        sys.exit(denied.exit_code)
    except BrokenPipeError:
        # The reader went away (`gpupt list | head -1`): nothing is left to say.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EIO, errno.EDQUOT}:
            raise
        # What is left in the buffer cannot be written either, and Python would say so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        why = f"what it has to say could not be written: {error.strerror}"
        click.echo(f"gpupt: {why}", err=True)
        # Of health 1 is a warning about a card, and 3 is not knowing.
        sys.exit(3 if "health" in sys.argv[1:] else 1)


if __name__ == "__main__":
    main()
