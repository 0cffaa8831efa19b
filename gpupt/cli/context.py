"""What every verb shares: the global options, data on stdout, narration on stderr, consent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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


def show_plan(settings: Settings, plan: Plan) -> None:
    """Print the plan for a person on stderr, or as JSON on stdout."""
    from gpupt.actions import subject_of

    if settings.as_json:
        settings.emit(plan_json(plan))
        return
    width = max((len(subject_of(action)) for action in plan.actions), default=0)
    for number, action in enumerate(plan.actions, 1):
        kind = type(action).__name__
        settings.say(f"{number:3}  {kind:<13} {subject_of(action):<{width}}  {action.why}")


def consent(settings: Settings, plan: Plan, *, dry_run: bool, yes: bool) -> bool:
    """Show the plan and ask; True when it is to be carried out.

    False: nothing to do, a dry run, or a person said no.  With no terminal nothing is
    asked: raises BadInput after printing the plan, and nothing is touched.
    """
    if not plan.actions:
        if settings.as_json and dry_run:
            settings.emit(plan_json(plan))
        settings.say(f"{plan.verb} {plan.subject}: nothing to do")
        return False
    if dry_run or not (yes and settings.as_json):
        show_plan(settings, plan)
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
    return click.confirm("Carry this out?", default=False, err=True)
