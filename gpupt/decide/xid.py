"""What NVIDIA's Xids ask for: the driver's own advice first, then the catalogue; pure.

Source: NVIDIA's Xid catalogue (docs.nvidia.com/deploy/xid-errors) and nvml.h.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from gpupt.model.health import Verdict
from gpupt.model.kernellog import XidEvent
from gpupt.model.pci import PciAddress

ADVICE_CHANGED = 154


class Recovery(IntEnum):
    """What the driver itself advises (nvmlDeviceGpuRecoveryAction_t, field 230)."""

    NONE = 0
    GPU_RESET = 1
    NODE_REBOOT = 2
    DRAIN_P2P = 3
    DRAIN_AND_RESET = 4
    RECOVER_IMEX_DOMAIN = 5
    BUS_RESET = 6
    SYSTEM_REBOOT = 7


class Action(StrEnum):
    """What the catalogue advises at once."""

    RESTART_APP = "restart the application"
    LOG = "none: it is for the record"
    RESET_GPU = "reset the GPU"
    WORKFLOW = "follow NVIDIA's workflow for it"
    RESTART_HOST = "restart the host"
    RESTART_VM = "restart the guest"
    POWER_CABLE = "check the power cable"
    UPDATE_SOFTWARE = "update the software"
    CONTACT_SUPPORT = "contact the maker"
    DRIVER_ADVICE = "do as the driver advises (field 230)"
    UNKNOWN = "look it up"


_BY_ACTION: Mapping[Action, tuple[int, ...]] = {
    Action.RESTART_APP: (
        *(8, 11, 13, 25, 31, 32, 39, 40, 41, 60),
        *range(68, 73),
        *range(75, 78),
        80,
        *range(82, 87),
        *(88, 89, 94),
        *range(96, 106),
        *range(126, 136),
        139,
    ),
    Action.LOG: (
        *(37, 38, 43, 44, 63, 66, 67, 92, 93, 106, 107, 121, 137, 141, 152, 153, 157, 160, 161),
    ),
    Action.RESET_GPU: (46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),
    Action.WORKFLOW: (45, 48, 74, *range(144, 151)),
    Action.RESTART_HOST: (79,),
    Action.RESTART_VM: (151,),
    Action.POWER_CABLE: (54,),
    Action.UPDATE_SOFTWARE: (78,),
    Action.CONTACT_SUPPORT: (142,),
    Action.DRIVER_ADVICE: (ADVICE_CHANGED,),
}
CATALOGUE: Mapping[int, Action] = {
    number: action for action, numbers in _BY_ACTION.items() for number in numbers
}
VERDICTS: Mapping[Action, Verdict] = {
    Action.RESTART_APP: Verdict.WARN,
    Action.LOG: Verdict.OK,
    Action.RESET_GPU: Verdict.FAIL,
    Action.WORKFLOW: Verdict.FAIL,
    Action.RESTART_HOST: Verdict.FAIL,
    Action.RESTART_VM: Verdict.FAIL,
    Action.POWER_CABLE: Verdict.FAIL,
    Action.UPDATE_SOFTWARE: Verdict.WARN,
    Action.CONTACT_SUPPORT: Verdict.FAIL,
    Action.DRIVER_ADVICE: Verdict.FAIL,
    Action.UNKNOWN: Verdict.WARN,
}
# What may have been done since, in the same boot, so that the driver is content again.
CURABLE = frozenset({Action.RESTART_APP, Action.RESET_GPU, Action.WORKFLOW})
MILDER = {Verdict.FAIL: Verdict.WARN, Verdict.WARN: Verdict.OK}
# An Xid 45 ends the work of a card after another error, which has an Xid of its own.
CLEANUP = 45
NVLINK5 = range(144, 151)
_NONFATAL = re.compile(r"\bnon-?fatal\b", re.I)
_ADVICE = re.compile(r"\bto 0x(?P<number>[0-9a-f]+)", re.I)


def reset_command(address: PciAddress) -> str:
    """What resets a card that nothing uses."""
    return f"nvidia-smi --gpu-reset -i {address}"


def verdict_of(advice: int) -> Verdict:
    """What the driver's advice makes of a card; one that is not known fails."""
    if advice == Recovery.NONE:
        return Verdict.OK
    return Verdict.WARN if advice == Recovery.DRAIN_P2P else Verdict.FAIL


def way_of(advice: int, address: PciAddress) -> str:
    """How to do what the driver advises."""
    sysfs = f"/sys/bus/pci/devices/{address}"
    ways: dict[int, str] = {
        Recovery.NONE: "",
        Recovery.GPU_RESET: f"end what uses it; {reset_command(address)}",
        Recovery.NODE_REBOOT: "systemctl reboot",
        Recovery.DRAIN_P2P: "let what moves data between GPUs end, and start no more of it",
        Recovery.DRAIN_AND_RESET: f"let the work on it end; {reset_command(address)}",
        Recovery.RECOVER_IMEX_DOMAIN: "systemctl restart nvidia-imex, on every node of the domain",
        Recovery.BUS_RESET: f"gpupt detach --unhealthy {address} && "
        f"echo bus > {sysfs}/reset_method && echo 1 > {sysfs}/reset; gpupt attach {address}",
        Recovery.SYSTEM_REBOOT: "systemctl poweroff, and power it on again",
    }
    unknown = "newer than this gpupt: see nvmlDeviceGpuRecoveryAction_t in the driver's nvml.h"
    return ways.get(advice, unknown)


def advised(message: str) -> int | None:
    """The advice that an Xid 154 changed to; None where its words are not understood."""
    found = _ADVICE.search(message)
    return None if found is None else int(found["number"], 16)


def remedy_of(action: Action, address: PciAddress) -> str:
    """How to do what the catalogue advises."""
    return {
        Action.RESTART_APP: "start the application again; when it comes back with other "
        "applications: dcgmi diag -r 3",
        Action.LOG: "",
        Action.RESET_GPU: f"end what uses it; {reset_command(address)}",
        Action.WORKFLOW: f"{reset_command(address)}; dcgmi diag -r 3; then as "
        "docs.nvidia.com/deploy/xid-errors says of this number",
        Action.RESTART_HOST: "power the machine off and on; if it stays, reseat the card and check "
        "its power",
        Action.RESTART_VM: "restart the guest that has it: gpupt down and up of its cluster",
        Action.POWER_CABLE: "systemctl poweroff, and seat the card's power cables",
        Action.UPDATE_SOFTWARE: "update NVIDIA's driver, of host and guest to the same branch",
        Action.CONTACT_SUPPORT: "nvidia-bug-report.sh, and send its archive to the maker",
        Action.DRIVER_ADVICE: f"nvidia-smi -q -i {address} | grep -i 'recovery action'",
        Action.UNKNOWN: "look it up at docs.nvidia.com/deploy/xid-errors",
    }[action]


@dataclass(frozen=True, slots=True)
class Weighed:
    """An Xid, what it asks for and what it makes of its card."""

    event: XidEvent
    action: Action
    verdict: Verdict
    remedy: str


def weigh(events: Sequence[XidEvent], *, advice: int | None = None) -> tuple[Weighed, ...]:
    """The Xids of one card in their order, each with its verdict.

    ``advice`` is the driver's own of now (field 230), which comes before any table: when it asks
    for nothing, what a restart of the application or a reset cures is one step milder, as it was
    done since.  Where the driver does not tell, the last Xid 154 does, of all before it.
    """
    last = max((n for n, each in enumerate(events) if each.xid == ADVICE_CHANGED), default=-1)
    told = advised(events[last].message) if last >= 0 and advice is None else None
    weighed = []
    for number, event in enumerate(events):
        if event.xid == ADVICE_CHANGED:
            current = advice is None and number == last
            weighed.append(weigh_advice(event, current=current))
            continue
        content = advice == Recovery.NONE or (number < last and told == Recovery.NONE)
        weighed.append(weigh_one(event, content=content))
    return tuple(weighed)


def weigh_advice(event: XidEvent, *, current: bool) -> Weighed:
    """An Xid 154: the advice it changed to, unless a newer one is known."""
    action = Action.DRIVER_ADVICE
    if not current:
        return Weighed(event, action, Verdict.OK, "")
    advice = advised(event.message)
    if advice is None:
        return Weighed(event, action, VERDICTS[action], remedy_of(action, event.address))
    return Weighed(event, action, verdict_of(advice), way_of(advice, event.address))


def weigh_one(event: XidEvent, *, content: bool) -> Weighed:
    """Any other Xid, by the catalogue; ``content``: the driver asks for nothing."""
    action = CATALOGUE.get(event.xid, Action.UNKNOWN)
    verdict = VERDICTS[action]
    mild = event.xid in NVLINK5 and _NONFATAL.search(event.message) is not None
    if event.xid == CLEANUP or mild:
        verdict = Verdict.WARN
    if content and action in CURABLE:
        verdict = MILDER[verdict]
    remedy = "" if verdict is Verdict.OK else remedy_of(action, event.address)
    return Weighed(event, action, verdict, remedy)
