"""What a host lacks to lend GPUs, and the steps that give it that; pure.

Everything here is for the next boot: files and boot entries are changed, never the kernel
that runs.  What only the firmware can give is a finding with its evidence, never a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gpupt.actions import (
    Action,
    Plan,
    RemoveFile,
    SetKernelLine,
    UnsetKernelLine,
    WriteFile,
)
from gpupt.decide.shortcomings import assess_shortcomings, kernel_words_lacking
from gpupt.decide.sizing import show_size
from gpupt.errors import BadInput
from gpupt.model.host import Finding, Host, Severity
from gpupt.model.preparation import Boot, BootTool, PreparationFacts, Wishes

HEADER = "# Written by `gpupt host prepare`; `gpupt host prepare --undo` takes it away.\n"
# Not gpupt.conf: that one is the roll `host`'s.
MODULES = "/etc/modules-load.d/gpupt-prepare.conf"
GRUB = "/etc/default/grub.d/90-gpupt-prepare.cfg"
CMDLINE = "/etc/kernel/cmdline"
SYSCTL = "/etc/sysctl.d/90-gpupt-prepare.conf"
LIMITS = "/etc/security/limits.d/90-gpupt-prepare.conf"
UNITS = ("libvirtd", "virtqemud")
DROP_INS = {unit: f"/etc/systemd/system/{unit}.service.d/90-gpupt-prepare.conf" for unit in UNITS}
# Files that are gpupt's alone, and all that prepare looks at.
OWN = (MODULES, GRUB, SYSCTL, LIMITS, *DROP_INS.values())
FILES = (*OWN, CMDLINE)
VFIO_MODULE = "vfio-pci"
# What the host itself keeps beside hugepages: an eighth of its memory, and no less than this.
LEAST_FOR_HOST = 2 << 30

VERB = "host prepare"
Written = Sequence[Action]
Decision = tuple[Plan, tuple[Finding, ...]]


def plan_preparation(
    host: Host, *, facts: PreparationFacts, wishes: Wishes, written: Written
) -> Decision:
    """The steps that give the host what it lacks, and findings of what no step can give.

    ``written`` is what gpupt wrote before and has not taken back.  Raises BadInput for
    hugepages that do not fit the host.
    """
    findings = list(assess_shortcomings(host, facts=facts))
    actions: list[Action] = []
    for found in (
        *kernel_line(host, facts=facts, written=written),
        *modules(facts, written=written),
        *hugepages(facts, wishes=wishes, written=written),
        *memlock(facts, wishes=wishes, written=written),
    ):
        if isinstance(found, Finding):
            findings.append(found)
        else:
            actions.append(found)
    return Plan(VERB, "this host", tuple(actions)), in_order(findings)


def plan_undo(*, facts: PreparationFacts, written: Written) -> Decision:
    """The steps that take back what gpupt wrote, last first; a file that was changed since is
    kept, and a finding says so."""
    actions: list[Action] = []
    findings: list[Finding] = []
    for action in reversed(written):
        file = file_of(action)
        now = facts.files.get(file.path) if file else None
        if file is not None and now is None:
            continue
        if file is not None and now != file.text:
            findings.append(kept(file))
        elif isinstance(action, WriteFile):
            actions.append(removal(action))
        elif isinstance(action, SetKernelLine) and (
            file is not None or set(action.words) & (facts.boot.words or frozenset())
        ):
            actions.append(
                UnsetKernelLine(
                    action.tool,
                    action.words,
                    removal(file) if file else None,
                    action.back,
                    why=f"without {' '.join(action.words)}"
                    + (f"; {file.path} as it was before" if file else ""),
                )
            )
    recorded = {file.path for file in map(file_of, written) if file}
    for path in OWN:
        if path not in recorded and (facts.files.get(path) or "").startswith(HEADER):
            findings.append(
                Finding(
                    "file-unrecorded",
                    Severity.WARN,
                    path,
                    "it says that gpupt wrote it, and gpupt has no record of that: kept",
                    ("the record is prepared.json in the state folder",),
                    f"look at it, and remove it yourself: rm {path}",
                )
            )
    return Plan(f"{VERB} --undo", "this host", tuple(actions)), in_order(findings)


def in_order(findings: list[Finding]) -> tuple[Finding, ...]:
    """The findings, worst first."""
    order = (Severity.FAIL, Severity.WARN, Severity.INFO)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def file_of(action: Action) -> WriteFile | None:
    """The file that an action of prepare writes, if it writes one."""
    if isinstance(action, SetKernelLine):
        return action.file
    return action if isinstance(action, WriteFile) else None


def removal(file: WriteFile) -> RemoveFile:
    """What takes a written file back."""
    why = "gpupt wrote it" if file.prior is None else "as it was before gpupt changed it"
    return RemoveFile(file.path, file.text, file.prior, why=why)


def kept(file: WriteFile) -> Finding:
    """A file that somebody changed after gpupt wrote it."""
    return Finding(
        "file-changed",
        Severity.WARN,
        file.path,
        "it was changed since gpupt wrote it: kept",
        tuple(f"gpupt wrote: {line}" for line in file.text.splitlines() if line[:1] != "#"),
        "take out what you do not want; a file that is removed needs no undoing"
        if file.prior is None
        else f"take out what you do not want; before gpupt it was: {file.prior.strip()}",
    )


def write(
    path: str, text: str, *, why: str, facts: PreparationFacts, written: Written
) -> WriteFile | Finding:
    """The step that writes a file of gpupt's own, or the finding that another's is there."""
    now = facts.files.get(path)
    mine = next((file for file in map(file_of, written) if file and file.path == path), None)
    if now is None or now == text:
        # With the very text it is gpupt's, whether or not there is a record of it.
        return WriteFile(path, text, None, why=why)
    if mine is not None and now == mine.text:
        return WriteFile(path, text, now, why=why)
    return Finding(
        "file-in-the-way",
        Severity.WARN,
        path,
        "it is not as gpupt writes it, and is not overwritten",
        tuple(now.splitlines()[:5]),
        f"add to it what is wanted, or move it away and prepare again: {text.splitlines()[-1]}",
    )


def kernel_line(
    host: Host, *, facts: PreparationFacts, written: Written
) -> Iterator[Action | Finding]:
    """The kernel's command line, by the distribution's own tool."""
    wanted = kernel_words_lacking(host, facts=facts)
    if not wanted:
        return
    boot, line = facts.boot, " ".join(wanted)
    if boot.tool is None or boot.words is None:
        yield Finding(
            "kernel-line",
            Severity.FAIL,
            "host",
            f"the kernel command line lacks {line}, and gpupt does not know how to add it here",
            (boot.why, f"kernel command line: {host.kernel_cmdline or '(not readable)'}"),
            f"add {line} to the kernel command line in your boot loader's own way; reboot",
        )
        return
    if set(wanted) <= boot.words:
        yield Finding(
            "reboot-pending",
            Severity.INFO,
            "host",
            f"the next boot's kernel line has {line}, the running one has not",
            (boot.why, f"kernel command line: {host.kernel_cmdline}"),
            "reboot",
        )
        return
    yield set_kernel_line(boot, wanted, facts=facts, written=written)


def set_kernel_line(
    boot: Boot, wanted: tuple[str, ...], *, facts: PreparationFacts, written: Written
) -> Action | Finding:
    """The step that adds words to the kernel's command line; see docs/host-prepare.md."""
    line = " ".join(wanted)
    why = f"add {line} to the kernel line of the next boot ({boot.why})"
    match boot.tool:
        case BootTool.GRUBBY:
            both = (boot.program, "--update-kernel=ALL")
            return SetKernelLine(
                "grubby", wanted, None, ((*both, f"--args={line}"),),
                ((*both, f"--remove-args={line}"),), why,
            )  # fmt: skip
        case BootTool.UPDATE_GRUB:
            text = f'{HEADER}GRUB_CMDLINE_LINUX_DEFAULT="$GRUB_CMDLINE_LINUX_DEFAULT {line}"\n'
            file = write(GRUB, text, why=why, facts=facts, written=written)
            again: tuple[tuple[str, ...], ...] = ((boot.program,),)
        case _:
            before = facts.files.get(CMDLINE) or ""
            missing = [word for word in wanted if word not in before.split()]
            text = f"{before.strip()} {' '.join(missing)}".strip() + "\n" if missing else before
            # A run that was cut short wrote it already: what was there before is on record.
            mine = next((f for f in map(file_of, written) if f and f.path == CMDLINE), None)
            prior = mine.prior if mine and mine.text == before else before
            file = WriteFile(CMDLINE, text, prior, why=why)
            again = tuple(
                (boot.program, "add", kernel.release, kernel.image) for kernel in boot.kernels
            )
    if isinstance(file, Finding):
        return file
    return SetKernelLine(str(boot.tool), wanted, file, again, again, why=f"{why}, in {file.path}")


def modules(facts: PreparationFacts, *, written: Written) -> Iterator[Action | Finding]:
    """vfio-pci, loaded at boot: where it is no module, or loaded already, nothing is lacking."""
    loaded = {name.replace("_", "-") for name in facts.loaded_at_boot}
    if facts.vfio and not facts.vfio_built_in and VFIO_MODULE not in loaded:
        yield write(
            MODULES,
            f"{HEADER}{VFIO_MODULE}\n",
            why=f"load {VFIO_MODULE} at boot, which lent GPUs are bound to",
            facts=facts,
            written=written,
        )


def hugepages(
    facts: PreparationFacts, *, wishes: Wishes, written: Written
) -> Iterator[Action | Finding]:
    """As many pages of the kernel's default size as were asked for, reserved at boot."""
    size = wishes.hugepages
    if size is None:
        return
    page, memory = facts.page_size, facts.memory
    if page is None or memory is None:
        raise BadInput(
            "hugepages cannot be prepared: the size of a page, or of the memory, is not known",
            details="/proc/meminfo has no Hugepagesize, or no MemTotal",
            remedy="leave --hugepages out; a kernel without hugetlbfs has none",
        )
    if size % page or size < page:
        raise BadInput(
            f"{show_size(size)} is not a whole number of hugepages",
            details=f"a hugepage of this host has {show_size(page)}",
            remedy=f"give --hugepages a multiple of {show_size(page)}",
        )
    most = memory - max(LEAST_FOR_HOST, memory // 8)
    if size > most:
        raise BadInput(
            f"{show_size(size)} of hugepages leave the host too little memory",
            details=f"it has {show_size(memory)}, and keeps an eighth, 2 GiB at least",
            remedy=f"at most {show_size(most // page * page)}"
            if most >= page
            else "this host has no memory to spare for hugepages",
        )
    count = size // page
    setters = facts.reserved_pages
    if setters and setters[-1][1] == count:
        return
    # Files are applied by the order of their names: a later one has the last word.
    name = SYSCTL.rpartition("/")[2]
    later = [(path, n) for path, n in setters if path != SYSCTL and path.rpartition("/")[2] > name]
    if later:
        yield Finding(
            "hugepages",
            Severity.WARN,
            later[-1][0],
            f"it sets vm.nr_hugepages to {later[-1][1]} after any file of gpupt's would",
            (f"asked for: {count} pages of {show_size(page)}",),
            f"set vm.nr_hugepages={count} there",
        )
        return
    yield write(
        SYSCTL,
        f"{HEADER}vm.nr_hugepages = {count}\n",
        why=f"reserve {show_size(size)} at boot: {count} pages of {show_size(page)}",
        facts=facts,
        written=written,
    )


def memlock(
    facts: PreparationFacts, *, wishes: Wishes, written: Written
) -> Iterator[Action | Finding]:
    """A guest with a GPU locks all of its memory.  libvirt sees to that where it may; a daemon
    that may not, and a user's own guests, need the limit raised."""
    for daemon in facts.daemons:
        yield write(
            DROP_INS[daemon.unit],
            f"{HEADER}[Service]\nLimitMEMLOCK=infinity\n",
            why=f"{daemon.unit} (PID {daemon.pid}) may not raise the limit of its guests, "
            f"{show_size(daemon.locked)} of locked memory",
            facts=facts,
            written=written,
        )
    user = wishes.memlock_user
    if user is not None and user not in facts.memlock_users:
        present = facts.files.get(LIMITS)
        mine = any(
            (f := file_of(action)) and f.path == LIMITS and f.text == present for action in written
        )
        base = present if present is not None and mine else HEADER
        yield write(
            LIMITS,
            f"{base}{user} soft memlock unlimited\n{user} hard memlock unlimited\n",
            why=f"let the guests that {user} runs (qemu:///session) lock their memory",
            facts=facts,
            written=written,
        )
