"""The network learns what the sheets show, and nothing where there is nothing to learn."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.stack

LEARN = Path(__file__).with_name("learn.py")


def learn(python: Path, *words: str) -> dict[str, float]:
    done = subprocess.run(
        [python, LEARN, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_held_out_specimens_are_told_apart(stack_python: Path, seed: str) -> None:
    found = learn(stack_python, seed, "160", "8")
    assert found["accuracy"] > found["majority"] + 0.15
    assert found["kappa"] > 0.5


def test_shuffled_labels_teach_nothing(stack_python: Path) -> None:
    """The check above can fail: the same training on labels that mean nothing fails it."""
    found = learn(stack_python, "1", "160", "8", "--shuffled")
    assert found["accuracy"] < found["majority"] + 0.05
    assert found["kappa"] < 0.2
