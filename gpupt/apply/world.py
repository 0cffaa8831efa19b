"""The world that a plan is carried out in: every effect goes through one of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpupt.actions import Action
from gpupt.edges.journal import Journal
from gpupt.edges.kernel import Kernel
from gpupt.model.health import GpuHealth
from gpupt.model.pci import PciAddress


def unheard(_point: str, _action: Action) -> None:
    """What happens at a boundary unless a test wants something to."""


@dataclass(frozen=True, slots=True)
class World:
    """The kernel, the journal, whom to tell, who knows how well a GPU is (nobody: it is not
    checked), and (for clusters) a ClusterWorld.

    ``boundary`` is called with ``planned``, ``intended``, ``performed`` and ``done`` as an
    action passes each: where a crash can fall.
    """

    kernel: Kernel
    journal: Journal
    narrate: Callable[[str], None]
    # apply.cluster's ClusterWorld; the host's verbs do without one.
    cluster: Any = None
    boundary: Callable[[str, Action], None] = unheard
    health: Callable[[PciAddress], GpuHealth | None] | None = None
