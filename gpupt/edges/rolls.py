"""Reads rolls: a folder each, with roll.yaml and an Ansible role."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from gpupt.edges.resources import resource_folder
from gpupt.edges.yamlfile import Value, read_yaml
from gpupt.errors import BadInput
from gpupt.model.roll import Check, Job, Roll

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_ROLES = ("frontend", "compute", "host")
_IGNORED = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
_LONGEST = 24 * 3600


def read_rolls(folder: Path | None = None) -> dict[str, Roll]:
    """Every roll under ``folder`` (by default this installation's) by name, sorted; a
    variant follows its roll, by a name such as ``tensorflow=cuda``.

    Raises BadInput with file, line and column.
    """
    folder = folder or resource_folder("rolls")
    found: dict[str, Roll] = {}
    for entry in sorted(folder.iterdir()):
        if (entry / "roll.yaml").is_file():
            roll, variants = read_roll(entry)
            found[roll.name] = roll
            for name, lock in variants:
                summary = f"{roll.summary} (variant {name})"
                found[f"{roll.name}={name}"] = replace(roll, lock=lock, summary=summary)
    return found


def read_roll(folder: Path) -> tuple[Roll, tuple[tuple[str, str], ...]]:
    """The roll in that folder, whose name is the folder's, and the names and locks of its
    variants.  Raises BadInput."""
    if not _NAME.fullmatch(folder.name):
        raise BadInput(
            f"{folder.name!r} cannot be a roll's name",
            details=f"at {folder}",
            remedy="use lower-case letters, digits and hyphens",
        )
    fields = read_yaml(folder / "roll.yaml").fields(
        "version",
        "summary",
        "needs",
        "packages",
        "sources",
        "lock",
        "variants",
        "checks",
        "jobs",
        required=("version", "summary"),
    )
    roll = Roll(
        name=folder.name,
        version=fields["version"].text(),
        summary=fields["summary"].text(),
        needs=_texts(fields.get("needs")),
        packages=_texts(fields.get("packages")),
        lock=_lock(fields.get("lock"), folder),
        checks=tuple(_check(item) for item in _items(fields.get("checks"))),
        jobs=tuple(_job(item) for item in _items(fields.get("jobs"))),
        digest=folder_digest(folder),
        sources=_texts(fields.get("sources")),
    )
    return roll, tuple(_variant(item, folder) for item in _items(fields.get("variants")))


def verify_roll(roll: Roll, folder: Path | None = None) -> tuple[str, ...]:
    """What was checked of a roll beyond reading it, a phrase each; raises BadInput.

    ``folder`` holds the rolls (by default this installation's).
    """
    home = (folder or resource_folder("rolls")) / roll.name
    facts = [f"{len(files_of(home))} files"]
    if roll.lock:
        facts.append(f"{check_lock(home / roll.lock)} Python distributions locked with hashes")
    if (home / "tasks").is_dir():
        tasks = home / "tasks/main.yml"
        if tasks.is_file():
            count = sum(1 for _ in read_yaml(tasks).items())
            facts.append(f"{count} task{'' if count == 1 else 's'}")
    return tuple(facts)


def check_lock(path: Path) -> int:
    """How many distributions a lock pins; raises BadInput where one has no version or no
    hash, and for an option such as an index's address, which belongs to the machine."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    pinned = 0
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0].startswith("-"):
            raise BadInput(
                f"the lock {path} holds an option: {words[0]}",
                remedy="package sources are the machine's own, never a roll's",
            )
        if "==" not in words[0] or not any(word.startswith("--hash=") for word in words[1:]):
            raise BadInput(
                f"the lock {path} does not pin {words[0]}",
                details="expected NAME==VERSION --hash=sha256:…",
                remedy="make it with: uv pip compile --generate-hashes",
            )
        pinned += 1
    return pinned


def files_of(folder: Path) -> list[Path]:
    """Every file of a folder but caches, sorted by its path."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not _IGNORED.intersection(path.relative_to(folder).parts)
    )


def folder_digest(folder: Path) -> str:
    """SHA-256 over the path and content of every file.

    Modes are left out: they differ between a checkout and an installed wheel, so roles
    state the mode of what they install.
    """
    total = hashlib.sha256()
    for path in files_of(folder):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def _items(value: Value | None) -> tuple[Value, ...]:
    return tuple(value.items()) if value else ()


def _texts(value: Value | None) -> tuple[str, ...]:
    return tuple(item.text() for item in _items(value))


def _lock(value: Value | None, folder: Path) -> str | None:
    if value is None:
        return None
    name = value.text()
    if not (folder / name).is_file():
        value.wrong(f"the lock {name!r} is not there", expected=f"a file under {folder}")
    return name


def _variant(value: Value, folder: Path) -> tuple[str, str]:
    fields = value.fields("name", "lock", required=("name", "lock"))
    name = fields["name"].text()
    if not _NAME.fullmatch(name):
        fields["name"].wrong(
            f"{name!r} cannot be a variant's name", expected="lower-case letters, digits, hyphens"
        )
    lock = _lock(fields["lock"], folder)
    assert lock is not None
    return name, lock


def _check(value: Value) -> Check:
    fields = value.fields(
        "name", "command", "roles", "deadline", required=("name", "command", "roles", "deadline")
    )
    for item in fields["roles"].items():
        if item.text() not in _ROLES:
            item.wrong(f"no node has the role {item.text()!r}", expected=", ".join(_ROLES))
    return Check(
        name=fields["name"].text(),
        command=_command(fields["command"]),
        roles=_texts(fields["roles"]),
        deadline=fields["deadline"].whole(least=1, most=_LONGEST),
    )


def _job(value: Value) -> Job:
    fields = value.fields(
        "name",
        "summary",
        "command",
        "deadline",
        required=("name", "summary", "command", "deadline"),
    )
    return Job(
        name=fields["name"].text(),
        summary=fields["summary"].text(),
        command=_command(fields["command"]),
        deadline=fields["deadline"].whole(least=1, most=_LONGEST),
    )


def _command(value: Value) -> tuple[str, ...]:
    words = _texts(value)
    if not words:
        value.wrong("the command is empty", expected="a program and its arguments, as a list")
    return words
