"""Finds rolls/, playbooks/, templates/ and examples/: inside the package in a wheel, beside
it in a checkout or an editable install (where importlib.resources alone fails)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from gpupt.errors import Failed

Kind = Literal["rolls", "playbooks", "templates", "examples"]


def resource_folder(kind: Kind) -> Path:
    """The folder of that kind; raises Failed when the installation lacks it."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise Failed(
        f"this installation of gpupt has no {kind}/",
        details=f"looked beside and inside {package}",
        remedy="reinstall gpupt from its wheel, or run it from a whole checkout",
    )
