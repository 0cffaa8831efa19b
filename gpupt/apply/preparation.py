"""Carries out what `gpupt host prepare` and its --undo decided: all of it, or nothing.

What is going to be written is on record first, and the bytes of every file that a step may
change are kept until all steps are done: a step that fails has them all put back.  The record
tells a later run, after a crash too, what is gpupt's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gpupt.actions import (
    Action,
    Plan,
    RemoveFile,
    SetKernelLine,
    UnsetKernelLine,
    WriteFile,
    subject_of,
    told,
)
from gpupt.apply.execute import terminated_like_interrupted
from gpupt.edges.bootentries import entry_files, read_boot, read_entries
from gpupt.edges.etc import Etc
from gpupt.edges.preparation import Written, read_record, write_record
from gpupt.edges.process import run
from gpupt.errors import Failed, GpuptError

# Seconds: update-grub looks for other systems on every disk, kernel-install may build an initrd.
TOOL_DEADLINE = 600.0

Kept = Mapping[str, bytes | None]


def carry_out(plan: Plan, *, etc: Etc, state: Path, narrate: Callable[[str], None]) -> None:
    """Perform every action; on an error, Ctrl-C or SIGTERM all is put back before it is told.

    Raises Failed, with what was put back and what could not be.
    """
    with terminated_like_interrupted():
        before = read_record(state)
        kept: list[tuple[Action, Kept, tuple[str, ...]]] = []
        try:
            for action in plan.actions:
                file = file_in(action)
                made = etc.missing_folders(file.path) if isinstance(file, WriteFile) else ()
                kept.append((action, keep(action, etc=etc), made))
                narrate(f"{told(action)}: {action.why}")
                perform(action, made=made, etc=etc, state=state, narrate=narrate)
        except BaseException as error:
            said = put_back(kept, etc=etc, state=state, before=before)
            for line in said:
                narrate(line)
            if not isinstance(error, GpuptError):
                raise
            raise Failed(
                error.brief, details=(*error.details, *said), remedy=error.remedy
            ) from error


def file_in(action: Action) -> WriteFile | RemoveFile | None:
    """The file of an action, if it has one."""
    if isinstance(action, SetKernelLine | UnsetKernelLine):
        return action.file
    return action if isinstance(action, WriteFile | RemoveFile) else None


def perform(
    action: Action,
    *,
    made: tuple[str, ...],
    etc: Etc,
    state: Path,
    narrate: Callable[[str], None],
) -> None:
    """Bring about what the action says, and verify it."""
    match action:
        case WriteFile():
            note(action, made=made, state=state)
            etc.put(action.path, action.text)
        case RemoveFile():
            take_file_back(action, etc=etc, state=state)
            forget(action, state=state)
        case SetKernelLine():
            note(action, made=made, state=state)
            if action.file is not None:
                etc.put(action.file.path, action.file.text)
            with_initrd = {entry.release for entry in read_entries(etc) if entry.initrd}
            run_all(action.commands, etc=etc, narrate=narrate)
            require_words(action, with_initrd, etc=etc)
        case UnsetKernelLine():
            if action.file is not None:
                take_file_back(action.file, etc=etc, state=state)
            run_all(action.commands, etc=etc, narrate=narrate)
            forget(action, state=state)
        case _:
            raise TypeError(f"{type(action).__name__} does not prepare a host")


def run_all(
    commands: Sequence[tuple[str, ...]], *, etc: Etc, narrate: Callable[[str], None]
) -> None:
    """Run the boot loader's tool, that of the tree."""
    for program, *rest in commands:
        narrate(f"running {' '.join((program, *rest))}")
        run([f"{etc.root}{program}", *rest], deadline=TOOL_DEADLINE, environment={"LC_ALL": "C"})


def require_words(action: SetKernelLine, with_initrd: set[str], *, etc: Etc) -> None:
    """Raises Failed unless every boot entry has the words, and its initrd still."""
    found = read_boot(etc).words or frozenset()
    lacking = [word for word in action.words if word not in found]
    if lacking:
        raise Failed(
            f"{action.tool} reported success, and the boot entries lack {' '.join(lacking)}",
            details="a later file in /etc/default/grub.d may set the line anew"
            if action.tool == "update-grub"
            else "the entries may be written by something else",
            remedy=f"add {' '.join(lacking)} to the kernel command line yourself",
        )
    bare = with_initrd - {entry.release for entry in read_entries(etc) if entry.initrd}
    if bare:
        raise Failed(
            f"{action.tool} left out the initrd of {', '.join(sorted(bare))}",
            details="without it that kernel may not find its root disk",
            remedy=f"add {' '.join(action.words)} to the kernel command line yourself",
        )


def take_file_back(action: RemoveFile, *, etc: Etc, state: Path) -> None:
    """Restore what was before a written file, with the folders that were made for it."""
    made = [row.made for row in read_record(state) if path_of(row.action) == action.path]
    etc.put(action.path, action.prior)
    if action.prior is None:
        for folders in made:
            etc.remove_folders(folders)


def path_of(action: Action) -> str:
    """What a record and the action that takes it back have in common: the file, or the tool."""
    file = file_in(action)
    return subject_of(action) if file is None else file.path


def note(action: WriteFile | SetKernelLine, *, made: tuple[str, ...], state: Path) -> None:
    """Put on record what is going to be written; what was there before all of gpupt's own
    writes stays on record."""
    rows = list(read_record(state))
    for place, row in enumerate(rows):
        if path_of(row.action) == path_of(action) and type(row.action) is type(action):
            rows[place] = Written(same_origin(action, row.action), (*row.made, *made))
            break
    else:
        rows.append(Written(action, made))
    write_record(state, rows)


def same_origin(action: WriteFile | SetKernelLine, earlier: Action) -> Action:
    """The action with the ``prior`` of the earlier one, and the words of both."""
    if isinstance(action, WriteFile) and isinstance(earlier, WriteFile):
        return replace(action, prior=earlier.prior)
    assert isinstance(action, SetKernelLine)
    assert isinstance(earlier, SetKernelLine)
    if action.file is None or earlier.file is None:
        return action
    return replace(action, file=replace(action.file, prior=earlier.file.prior))


def forget(action: RemoveFile | UnsetKernelLine, *, state: Path) -> None:
    """Take off the record what was taken back."""
    rows = read_record(state)
    write_record(state, [row for row in rows if path_of(row.action) != path_of(action)])


def keep(action: Action, *, etc: Etc) -> dict[str, bytes | None]:
    """The bytes of every file that an action may change."""
    file = file_in(action)
    names = {file.path} if file else set()
    if isinstance(action, SetKernelLine | UnsetKernelLine):
        files, folders = entry_files(etc, action.tool)
        names.update(files)
        for folder in folders:
            names.update(etc.names(folder, ending=".conf"))
    return {name: etc.raw(name) for name in sorted(names)}


def put_back(
    kept: Sequence[tuple[Action, Kept, tuple[str, ...]]],
    *,
    etc: Etc,
    state: Path,
    before: Sequence[Written],
) -> list[str]:
    """Every file as it was, last first, and the record too; says what was and was not done."""
    said, whole = [], True
    for action, files, made in reversed(kept):
        now = keep(action, etc=etc)
        for name in sorted({*files, *now}):
            if now.get(name, etc.raw(name)) == files.get(name):
                continue
            try:
                etc.put(name, files.get(name))
                said.append(f"put back as it was: {name}")
            except GpuptError as error:
                whole = False
                said.append(f"could not put back {name}: {error.brief} ({error.details[0]})")
        etc.remove_folders(made)
    try:
        if whole:
            write_record(state, before)
    except GpuptError as error:
        said.append(f"could not put back the record: {error.brief}")
    said.append(
        "nothing of this is left on the host" if whole else "gpupt host prepare --undo tries again"
    )
    return said
