"""What every verb shares: the global options, data on stdout, narration on stderr, consent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from gpupt.errors import BadInput

if TYPE_CHECKING:
    # `gpupt list` makes no plan: its start is a third shorter without these.
    from gpupt.actions import Plan

Verb = TypeVar("Verb", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Settings:
    """The global options; given before the verb, and the common ones after it too."""

    root: Path = Path("/")
    connect: str = "qemu:///system"
    state: Path = Path("/var/lib/gpupt")
    as_json: bool = False
    verbose: int = 0
    # Makes the Kernel of a root; tests give one that reacts as the kernel does.
    kernel: Callable[[Path], Any] | None = None

    @classmethod
    def of(cls, base: Settings | None, **given: Any) -> Settings:
        """``base`` with what was given on the command line laid over it."""
        base = base or cls()
        root, state = given.get("root"), given.get("state")
        if root and not state and base.state == cls.state_of(base.root):
            # What this machine has on loan says nothing of another one's tree.
            state = cls.state_of(Path(root))
        return cls(
            root=Path(root) if root else base.root,
            connect=given.get("connect") or base.connect,
            state=Path(state) if state else base.state,
            as_json=base.as_json or bool(given.get("as_json")),
            verbose=max(base.verbose, given.get("verbose") or 0),
            kernel=base.kernel,
        )

    @property
    def live(self) -> bool:
        """Whether a kernel answers under the root: it is no recording."""
        return self.kernel is not None or self.root.resolve() == Path("/")

    @staticmethod
    def state_of(root: Path) -> Path:
        """The state folder of the machine under a root."""
        return root / "var/lib/gpupt"

    def emit(self, data: Mapping[str, Any]) -> None:
        """Print one JSON object with the schema's number in it."""
        import json

        click.echo(json.dumps({"schema": 1, **data}, indent=2, sort_keys=False))

    def say(self, line: str) -> None:
        """Narrate on stderr."""
        click.echo(line, err=True)

    def detail(self, line: str) -> None:
        """Narrate on stderr, with -v only."""
        if self.verbose:
            click.echo(line, err=True)


class VerbGroup(click.Group):
    """A group that says which verb was meant, whichever click there is and wherever its
    verbs are found."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from difflib import get_close_matches

        word, verbs = args[0], self.list_commands(ctx)
        near = get_close_matches(word, verbs, 1)
        if word not in verbs and near and not ctx.resilient_parsing:
            ctx.fail(f"there is no verb {word!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


def common(verb: Verb) -> Verb:
    """Give a verb ``--json`` and ``--root`` after it too, and its Settings as first argument."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
    @click.option("--root", default=None, metavar="DIR", help="The tree with sys/ and proc/.")
    @click.pass_context
    @wraps(verb)
    def with_settings(ctx: click.Context, /, as_json: bool, root: str | None, **rest: Any) -> Any:
        settings = Settings.of(ctx.find_object(Settings), as_json=as_json, root=root)
        return verb(settings, **rest)

    return with_settings  # type: ignore[return-value]


def changing(verb: Verb) -> Verb:
    """Give a verb ``--dry-run`` and ``--yes``."""
    verb = click.option("--yes", "-y", is_flag=True, help="Do not ask.")(verb)
    return click.option("--dry-run", is_flag=True, help="Show the plan and stop.")(verb)


def require_live(settings: Settings, *, dry_run: bool) -> None:
    """Raise BadInput where something is to be changed under a root that no kernel serves."""
    if dry_run or settings.live:
        return
    raise BadInput(
        f"{settings.root} is a recorded tree: nothing can be changed there",
        details="no kernel answers to what is written in it; nothing was touched",
        remedy="leave --root out to change this machine, or give --dry-run to see the plan",
    )


def terminal_colour() -> bool:
    """Whether stdout is a terminal that wants colour (https://no-color.org)."""
    import os

    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Characters a line of stdout, or of ``stream``, on a terminal; None: for a file or program."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return None
    import os

    asked = os.environ.get("COLUMNS", "")
    try:
        return int(asked) if asked.isdecimal() else os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return None


def plan_json(plan: Plan, findings: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The plan as CONTRACT's ``plan --json`` has it."""
    from gpupt.actions import subject_of

    return {
        "actions": [
            {"kind": type(action).__name__, "subject": subject_of(action), "why": action.why}
            for action in plan.actions
        ],
        "findings": list(findings),
    }


def show_plan(
    settings: Settings,
    plan: Plan,
    *,
    asked_for: bool,
    findings: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Print the plan: ``asked_for``, it is the data and goes to stdout, as JSON where that is
    wanted; else it goes to stderr, for the person who is asked about it."""
    if settings.as_json and asked_for:
        settings.emit(plan_json(plan, findings))
        return
    from gpupt.report.plan import plan_lines

    for line in plan_lines(plan, width=terminal_width(sys.stdout if asked_for else sys.stderr)):
        click.echo(line, err=not asked_for)


def consent(
    settings: Settings,
    plan: Plan,
    *,
    dry_run: bool,
    yes: bool,
    findings: Iterable[Mapping[str, Any]] = (),
) -> bool:
    """Show the plan and ask; True when it is to be carried out.

    False: nothing to do, a dry run, or a person said no.  With no terminal nothing is
    asked: raises BadInput after printing the plan, and nothing is touched.
    """
    if not plan.actions:
        if settings.as_json and dry_run:
            settings.emit(plan_json(plan, findings))
        settings.say(f"{plan.verb} {plan.subject}: nothing to do")
        return False
    if dry_run or not (yes and settings.as_json):
        show_plan(settings, plan, asked_for=dry_run, findings=findings)
    if dry_run:
        return False
    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise BadInput(
            f"{plan.verb} {plan.subject} needs consent, and there is no terminal to ask on",
            details="the plan is printed above; nothing was touched",
            remedy="give --yes to carry it out",
        )
    agreed = click.confirm("Carry this out?", default=False, err=True)
    if not agreed:
        settings.say("nothing was touched")
    return agreed
