"""STATE/baseline.json: the lasting facts of every card, as they were recorded."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from gpupt.errors import BadInput, Failed
from gpupt.model.baseline import Baseline, CardBaseline
from gpupt.model.pci import PciAddress


def baseline_file(state: Path) -> Path:
    """Where the baseline of a state folder is."""
    return state / "baseline.json"


def read_baseline(file: Path) -> Baseline:
    """The baseline in a file; raises BadInput when there is none, or it is damaged."""
    remedy = "gpupt health --record records one"
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return Baseline(
            recorded=str(told["recorded"]),
            cards={
                card.address: card
                for card in (
                    CardBaseline(
                        PciAddress.parse(address),
                        {str(name): str(value) for name, value in facts.items()},
                    )
                    for address, facts in told["cards"].items()
                )
            },
        )
    except FileNotFoundError:
        raise BadInput(f"there is no baseline: {file}", remedy=remedy) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadInput) as error:
        why = error.brief if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        raise BadInput(f"{file} is no baseline", details=why, remedy=remedy) from None


def write_baseline(file: Path, baseline: Baseline) -> None:
    """Put the baseline into a file, whole or not at all; raises Failed."""
    told = {
        "schema": 1,
        "recorded": baseline.recorded,
        "cards": {str(card.address): dict(card.facts) for card in baseline.cards.values()},
    }
    write_whole(file, json.dumps(told, indent=2) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Put text into a file so that a reader sees all of it or the file of before; raises Failed."""
    # A device, or a link to another place, is not to be replaced by a file.
    if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
        raise Failed(f"cannot write {file}", details="it is there, and no regular file")
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(text, encoding="utf-8")
        half.chmod(0o644)
        half.replace(file)
    except OSError as error:
        with suppress(OSError):
            half.unlink()
        raise Failed(f"cannot write {file}", details=str(error)) from None
