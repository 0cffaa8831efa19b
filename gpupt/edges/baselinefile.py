"""STATE/baseline.json: the lasting facts of every card, as they were recorded."""

from __future__ import annotations

import json
import os
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{file} is no baseline", details=f"{type(error).__name__}: {error}", remedy=remedy
        ) from None


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
    half = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(text, encoding="utf-8")
        half.chmod(0o644)
        half.replace(file)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise Failed(f"cannot write {file}", details=str(error)) from None
