"""Loans that outlive a reboot: the udev rule of each, and the actions that put it there; pure.

Why a udev rule, and why this one: docs/decisions/0006-udev-rule-for-persistence.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gpupt.actions import Action, Ledger, PersistLoan, Plan, UnpersistLoan
from gpupt.errors import Refused
from gpupt.model.gpus import VFIO
from gpupt.model.host import FunctionOrigin
from gpupt.model.pci import PciAddress
from gpupt.model.persistence import BootRules

HEAD = """\
# Written by `gpupt detach --persist {gpu}`; `gpupt attach {gpu}` removes it.
# Lets vfio-pci have these functions at boot.  Each must be where it was, and be what it was:
# one that is not, such as a renumbered card, is left to the drivers of the host.
ACTION!="add", GOTO="gpupt_end"
SUBSYSTEM!="pci", GOTO="gpupt_end"
"""
# What stands in the way is dealt with at once, not in RUN: a driver that was loaded for a twin
# of the card, or in the initramfs, has it already when udev comes to it.  `kmod load` is content
# where there is no such module (systemd 252), so the driver is looked for.
TAIL = f"""\
GOTO="gpupt_end"

LABEL="gpupt_take"
IMPORT{{builtin}}="kmod load {VFIO}"
TEST!="/sys/bus/pci/drivers/{VFIO}", GOTO="gpupt_end"
ATTR{{driver_override}}="{VFIO}"
TEST=="driver/unbind", TEST!="/sys/bus/pci/drivers/{VFIO}/%k", ATTR{{driver/unbind}}="%k"
TEST!="driver", ATTR{{subsystem/drivers_probe}}="%k"

LABEL="gpupt_end"
"""


def render_rule(
    gpu: PciAddress, functions: Sequence[FunctionOrigin], *, places: Mapping[PciAddress, str]
) -> str:
    """The udev rule that has a GPU and all that goes with it taken at boot.

    Raises Refused where it is not known in which slot one of them sits."""
    unplaced = [str(origin.address) for origin in functions if origin.address not in places]
    if unplaced:
        raise Refused(
            f"{gpu} cannot be kept detached over a reboot: its place on the bus is not known",
            details=tuple(f"{address} is not in the tree of buses" for address in unplaced),
            remedy="leave --persist out",
        )
    lines = [matching(origin, place=places[origin.address]) for origin in functions]
    return "\n".join([HEAD.format(gpu=gpu), *lines, TAIL])


def matching(origin: FunctionOrigin, *, place: str) -> str:
    """The line that knows a function: by its address, by its slot, and by its ids."""
    identity = origin.identity
    keys = [
        f'KERNEL=="{origin.address}"',
        f'DEVPATH=="{place}"',
        f'ATTR{{vendor}}=="0x{identity.id.vendor:04x}"',
        f'ATTR{{device}}=="0x{identity.id.device:04x}"',
        f'ATTR{{class}}=="0x{identity.class_code:06x}"',
    ]
    if identity.subsystem is not None:
        keys.append(f'ATTR{{subsystem_vendor}}=="0x{identity.subsystem.vendor:04x}"')
        keys.append(f'ATTR{{subsystem_device}}=="0x{identity.subsystem.device:04x}"')
    return ", ".join([*keys, 'GOTO="gpupt_take"'])


def persisting(
    loans: Mapping[PciAddress, Sequence[FunctionOrigin]], *, boot: BootRules
) -> list[Action]:
    """What makes the loans of these GPUs outlive a reboot; raises Refused where it cannot be."""
    actions: list[Action] = []
    for gpu, functions in loans.items():
        rule = render_rule(gpu, functions, places=boot.places)
        before = boot.rules.get(gpu)
        if before != rule:
            why = "a udev rule that takes it again at boot, if it is still this card in this slot"
            actions.append(PersistLoan(gpu, rule, before, why=why))
    if actions and not boot.udev:
        raise Refused(
            "this host has no udev, which is to take the cards at boot",
            remedy="leave --persist out",
        )
    require_writable(actions, boot=boot, otherwise="leave --persist out")
    return actions


def unpersisting(gpus: Collection[PciAddress], *, boot: BootRules) -> list[Action]:
    """What leaves these GPUs to the host's drivers at the next boot; raises Refused where it
    cannot be."""
    actions: list[Action] = [
        UnpersistLoan(gpu, why="no udev rule takes it at boot any more")
        for gpu in sorted(gpus)
        if gpu in boot.rules
    ]
    require_writable(actions, boot=boot)
    return actions


def require_writable(actions: Sequence[Action], *, boot: BootRules, otherwise: str = "") -> None:
    """Raises Refused when rules are to be changed and cannot be."""
    if actions and boot.obstacle is not None:
        why, remedy = boot.obstacle
        remedy = f"{remedy}; or {otherwise}" if otherwise else remedy
        raise Refused("the udev rules cannot be changed", details=why, remedy=remedy)


def plan_stray_rules(ledger: Ledger, *, boot: BootRules) -> Plan:
    """Remove the rules that no loan explains, and no unfinished run is about to remove."""
    handled = {
        entry.action.gpu
        for run in ledger.unfinished
        for entry in run.entries
        if isinstance(entry.action, PersistLoan)
    }
    return Plan(
        "recover",
        "stray boot rules",
        tuple(
            UnpersistLoan(gpu, why="a udev rule of gpupt's, and no loan knows of it")
            for gpu in sorted(boot.rules)
            if gpu not in ledger.loans and gpu not in handled
        ),
    )
