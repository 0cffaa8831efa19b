"""A plan for a person: what is done alike is said once, and lines end at the terminal's edge."""

from __future__ import annotations

import re
import textwrap
from itertools import groupby

from gpupt.actions import VERBS, Action, Plan, SetAttribute, verb_and_subject

ATTRIBUTE = re.compile(r"/?sys/bus/pci/devices/(?P<function>[^/]+)/(?P<name>[^/]+)")
VERB_WIDTH = max(len(verb) for verb in VERBS.values())
INDENT = " " * (VERB_WIDTH + 4)
# Where no terminal says how wide it is.
WIDE = 100


def plan_lines(plan: Plan, *, width: int | None = None) -> list[str]:
    """The actions in their order; of those in a row that are of one kind the ones for one
    reason together, with all that they are about."""
    lines = []
    for _, run in groupby(plan.actions, key=type):
        reasons: dict[tuple[str, str], list[str]] = {}
        for action in run:
            verb, subject, reason = words(action)
            reasons.setdefault((verb, reason), []).append(subject)
        for (verb, reason), subjects in reasons.items():
            lines += entry(verb, subjects, reason, width=max(width or WIDE, 40))
    return lines


def words(action: Action) -> tuple[str, str, str]:
    """What is done, to what, and why."""
    verb, subject = verb_and_subject(action)
    found = ATTRIBUTE.fullmatch(action.path) if isinstance(action, SetAttribute) else None
    if isinstance(action, SetAttribute) and found is not None:
        setting = f"{found['name']} {action.before} → {action.value}"
        return verb, found["function"], f"{setting}: {action.why}"
    return verb, subject, action.why


def entry(verb: str, subjects: list[str], reason: str, *, width: int) -> list[str]:
    """One subject before its reason; several beneath, as many in a line as there is room for."""
    first = f"  {verb:<{VERB_WIDTH}}  "
    if len(subjects) == 1:
        whole = f"{first}{subjects[0]}  {reason}"
        if len(whole) <= width:
            return [whole]
        return [f"{first}{subjects[0]}", *wrapped(reason, width, INDENT)]
    told = wrapped(f"{reason} ({len(subjects)})", width, INDENT)
    room = max(width - len(INDENT), 1)
    column = max(map(len, subjects)) + 2
    many = max((room + 2) // column, 1)
    rows = [subjects[at : at + many] for at in range(0, len(subjects), many)]
    beneath = [INDENT + "".join(f"{each:<{column}}" for each in row).rstrip() for row in rows]
    return [first + told[0].lstrip(), *told[1:], *beneath]


def wrapped(text: str, width: int, indent: str) -> list[str]:
    """The text in lines of that width; a word that is longer stays whole."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [indent.rstrip()]
