"""Floor 2: the closed union of things gpupt can do, and the plan made of them.

A plan is data: dry-run, confirmation, journal, recovery and tests share it.  ``why`` is the
reason shown to a person.  No action means nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gpupt.model.cluster import Allocation, Placement
from gpupt.model.host import Fence, FunctionOrigin, Loan
from gpupt.model.pci import DriverBinding, PciAddress


@dataclass(frozen=True, slots=True)
class BindFunction:
    """Move a function from driver ``before`` to ``after``: set driver_override to
    ``override`` (None clears it), unbind, then probe; verified when ``after`` drives it.

    ``after`` None: left driverless, as it was found.  Functions of one ``lane`` (a GPU, with
    all that leaves the host with it) are moved one after another, lanes at the same time."""

    address: PciAddress
    before: str | None
    after: str | None
    override: str | None
    why: str
    lane: PciAddress | None = None


@dataclass(frozen=True, slots=True)
class SetAttribute:
    """Make a file of sysfs hold ``value``, where ``before`` was; verified by reading it."""

    path: str
    value: str
    before: str
    why: str


@dataclass(frozen=True, slots=True)
class ReleaseFramebuffer:
    """Take the firmware's framebuffer from its driver: it writes into the boot GPU's memory.

    It does not come back before the next boot; the GPU's own driver brings another."""

    driver: str
    device: str
    why: str


@dataclass(frozen=True, slots=True)
class ReleaseFunction:
    """Clear the driver_override of a function that no loan knows, and let the kernel choose
    its driver; verified when no override is left."""

    address: PciAddress
    why: str


@dataclass(frozen=True, slots=True)
class RecordLoan:
    """Write down where every function of a GPU's group came from, before the first write."""

    gpu: PciAddress
    origins: tuple[FunctionOrigin, ...]
    why: str


@dataclass(frozen=True, slots=True)
class LendGpu:
    """Note that a detached GPU belongs to a node of a cluster."""

    gpu: PciAddress
    cluster: str
    node: str
    why: str


@dataclass(frozen=True, slots=True)
class ReturnGpu:
    """Note that no node has the GPU any more; it stays detached.

    ``cluster`` had it, and is named by the loan until the GPU is home; None: nobody is."""

    gpu: PciAddress
    why: str
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class EraseLoan:
    """Forget a loan, once every function is verified to be where it came from."""

    gpu: PciAddress
    why: str


@dataclass(frozen=True, slots=True)
class PersistLoan:
    """Have a loan outlive a reboot: write the udev rule that takes the GPU again at boot,
    where ``before`` was (None: no rule)."""

    gpu: PciAddress
    rule: str
    before: str | None
    why: str


@dataclass(frozen=True, slots=True)
class UnpersistLoan:
    """Remove the udev rule that takes a GPU at boot."""

    gpu: PciAddress
    why: str


@dataclass(frozen=True, slots=True)
class ResetGpu:
    """Reset a GPU that a guest had, where the kernel can, and see that it answers.

    One that does not is fenced, and stays where it is."""

    gpu: PciAddress
    why: str


@dataclass(frozen=True, slots=True)
class CheckGpu:
    """Look at the health of a GPU that is back with the host; one that fails is fenced."""

    gpu: PciAddress
    why: str


@dataclass(frozen=True, slots=True)
class FenceGpu:
    """Lend the GPU to nobody from now on; ``before`` is the fence that there was."""

    gpu: PciAddress
    fence: Fence
    before: Fence | None
    why: str


@dataclass(frozen=True, slots=True)
class UnfenceGpu:
    """Let the GPU be lent again; ``fence`` is what kept it from that."""

    gpu: PciAddress
    fence: Fence
    why: str


@dataclass(frozen=True, slots=True)
class BakeImage:
    """Bake the rolls into a bootable image; ``digest`` is what the result will be called."""

    rolls: tuple[str, ...]
    digest: str
    why: str


@dataclass(frozen=True, slots=True)
class MakeCluster:
    """Create the cluster's folder: its SSH key, host keys, known hosts and allocation."""

    allocation: Allocation
    digest: str
    why: str


@dataclass(frozen=True, slots=True)
class RemoveCluster:
    """Remove the cluster's folder, overlays and keys with it."""

    cluster: str
    why: str


@dataclass(frozen=True, slots=True)
class StartNetwork:
    """Create and start the cluster's libvirt network."""

    allocation: Allocation
    why: str


@dataclass(frozen=True, slots=True)
class StopNetwork:
    """Stop the cluster's libvirt network."""

    cluster: str
    why: str


@dataclass(frozen=True, slots=True)
class StartNode:
    """Make the node's disk overlay and start its domain."""

    cluster: str
    placement: Placement
    digest: str
    why: str


@dataclass(frozen=True, slots=True)
class StopNode:
    """Shut the node's domain down, by force after a deadline, and remove its overlay.

    ``together`` names nodes that are asked to power off at the same time; each is waited
    for by a StopNode of its own."""

    cluster: str
    node: str
    why: str
    together: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AwaitNode:
    """Wait until the node answers SSH with its pinned host key and says it is ready:
    right identity, and its GPUs seen by vendor and device id."""

    cluster: str
    placement: Placement
    deadline: int
    why: str


@dataclass(frozen=True, slots=True)
class AwaitRoll:
    """Wait until a roll's checks pass on the cluster (Spark: master up, workers registered)."""

    cluster: str
    roll: str
    deadline: int
    why: str


@dataclass(frozen=True, slots=True)
class WriteFile:
    """Make a file of the host's configuration hold ``text``, where ``prior`` was (None: no
    such file)."""

    path: str
    text: str
    prior: str | None
    why: str


@dataclass(frozen=True, slots=True)
class RemoveFile:
    """Take a WriteFile back: ``prior`` again in the place of ``text``, or no file."""

    path: str
    text: str
    prior: str | None
    why: str


@dataclass(frozen=True, slots=True)
class SetKernelLine:
    """Have the kernel booted with ``words`` from the next boot on: write ``file`` if there is
    one, run the boot loader's own ``commands``, see that every entry has the words.

    ``back`` are the commands that take them out, once ``file`` is back as it was."""

    tool: str
    words: tuple[str, ...]
    file: WriteFile | None
    commands: tuple[tuple[str, ...], ...]
    back: tuple[tuple[str, ...], ...]
    why: str


@dataclass(frozen=True, slots=True)
class UnsetKernelLine:
    """Take a SetKernelLine back."""

    tool: str
    words: tuple[str, ...]
    file: RemoveFile | None
    commands: tuple[tuple[str, ...], ...]
    why: str


Action: TypeAlias = (
    BindFunction
    | ReleaseFunction
    | RecordLoan
    | LendGpu
    | ReturnGpu
    | EraseLoan
    | PersistLoan
    | UnpersistLoan
    | ResetGpu
    | CheckGpu
    | FenceGpu
    | UnfenceGpu
    | SetAttribute
    | ReleaseFramebuffer
    | BakeImage
    | MakeCluster
    | RemoveCluster
    | StartNetwork
    | StopNetwork
    | StartNode
    | StopNode
    | AwaitNode
    | AwaitRoll
    | WriteFile
    | RemoveFile
    | SetKernelLine
    | UnsetKernelLine
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Actions in order; ``verb`` and ``subject`` name the sentence they belong to."""

    verb: str
    subject: str
    actions: tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One action of a run.  ``prior`` is the function's binding before a BindFunction;
    ``done`` is False when the run ended between intent and completion."""

    step: int
    action: Action
    prior: DriverBinding | None
    done: bool


@dataclass(frozen=True, slots=True)
class Run:
    """A plan that was begun; ``entries`` are the steps that were reached."""

    number: int
    plan: Plan
    pid: int
    entries: tuple[JournalEntry, ...]


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the journal says: loans and fences by GPU, and runs that neither ended nor were
    recovered."""

    loans: Mapping[PciAddress, Loan] = field(default_factory=dict)
    unfinished: tuple[Run, ...] = ()
    fences: Mapping[PciAddress, Fence] = field(default_factory=dict)


def subject_of(action: Action) -> str:
    """What the action is about, for a person: an address, a node, a cluster, a roll."""
    match action:
        case BindFunction() | ReleaseFunction():
            return str(action.address)
        case RecordLoan() | LendGpu() | ReturnGpu() | EraseLoan():
            return str(action.gpu)
        case PersistLoan() | UnpersistLoan():
            return str(action.gpu)
        case ResetGpu() | CheckGpu() | FenceGpu() | UnfenceGpu():
            return str(action.gpu)
        case SetAttribute():
            return f"/{action.path}"
        case ReleaseFramebuffer():
            return action.device
        case BakeImage():
            return "+".join(action.rolls)
        case MakeCluster() | StartNetwork():
            return action.allocation.spec.name
        case RemoveCluster() | StopNetwork():
            return action.cluster
        case StartNode() | AwaitNode():
            return f"{action.cluster}/{action.placement.node.name}"
        case StopNode():
            return f"{action.cluster}/{action.node}"
        case AwaitRoll():
            return f"{action.cluster}/{action.roll}"
        case WriteFile() | RemoveFile():
            return action.path
        case SetKernelLine() | UnsetKernelLine():
            return action.tool


# What a person is told; the JSON of a plan has the names of the classes.
VERBS: Mapping[type, str] = {
    BindFunction: "bind",
    ReleaseFunction: "release",
    RecordLoan: "record",
    LendGpu: "lend",
    ReturnGpu: "return",
    EraseLoan: "forget",
    PersistLoan: "persist",
    UnpersistLoan: "unpersist",
    ResetGpu: "reset",
    CheckGpu: "check",
    FenceGpu: "fence",
    UnfenceGpu: "unfence",
    SetAttribute: "set",
    ReleaseFramebuffer: "release",
    BakeImage: "bake",
    MakeCluster: "make",
    RemoveCluster: "remove",
    StartNetwork: "start",
    StopNetwork: "stop",
    StartNode: "start",
    StopNode: "stop",
    AwaitNode: "await",
    AwaitRoll: "await",
    WriteFile: "write",
    RemoveFile: "put back",
    SetKernelLine: "set",
    UnsetKernelLine: "unset",
}


def verb_and_subject(action: Action) -> tuple[str, str]:
    """The action in words: what is done, and to what."""
    subject = subject_of(action)
    if isinstance(action, StartNetwork | StopNetwork):
        subject = f"{subject}'s network"
    if isinstance(action, SetKernelLine | UnsetKernelLine):
        subject = f"kernel command line ({subject})"
    return VERBS[type(action)], subject


def told(action: Action) -> str:
    """The action in a few words, for what is narrated."""
    return " ".join(verb_and_subject(action))
