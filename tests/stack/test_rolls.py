"""The rolls' own programs, run as they lie in the image, at this machine's own speed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpupt.decide.layers import plan_stack
from gpupt.edges.bake import read_ground
from gpupt.edges.rolls import read_rolls

pytestmark = pytest.mark.stack

HERE = Path(__file__).resolve().parents[2]
STATE = Path("/var/lib/gpupt")
ROLLS = ("spark", "tensorflow", "classifier")
PYTHON = "/opt/gpupt/env/bin/python"
InImage = Callable[..., str]


@pytest.fixture(scope="module")
def in_image() -> InImage:
    """Runs a command in the image of the demo's rolls, which is baked where it is not there."""
    if os.geteuid() != 0:
        pytest.skip("baking and entering an image needs root")
    words = [str(Path(sys.executable).with_name("gpupt")), "image", "build", *ROLLS]
    subprocess.run(words, check=True, timeout=1500, stdin=subprocess.DEVNULL)
    stack = plan_stack(ROLLS, read_rolls(), ground=read_ground())
    layers = [str(STATE / "layers" / layer.digest / "root") for layer in reversed(stack.layers)]

    def run(*command: str, deadline: float = 300) -> str:
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", sys.executable,
             str(Path(__file__).with_name("in_image.py")), str(HERE), *layers, "--", *command],
            capture_output=True, text=True, timeout=deadline, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run


def test_what_the_rolls_lock_is_what_is_there(in_image: InImage) -> None:
    rolls = read_rolls()
    printed = in_image(
        PYTHON,
        "-c",
        "from importlib.metadata import version as v; print(v('pyspark'), v('tensorflow-cpu'))",
    )
    assert printed.split()[:2] == [rolls["spark"].version, rolls["tensorflow"].version]


def test_spark_counts_on_the_images_java(in_image: InImage) -> None:
    job = (
        "from pyspark.sql import SparkSession as S; "
        "s = S.builder.master('local[1]').config('spark.ui.enabled', 'false').getOrCreate(); "
        "print('counted', s.range(1000).filter('id % 7 = 0').count()); s.stop()"
    )
    assert "counted 143" in in_image(PYTHON, "-c", job)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_classifier_learns_whatever_the_seed(in_image: InImage, seed: int) -> None:
    """Clearly above the majority class on specimens that it never saw; sheets are synthetic."""
    printed = in_image(
        PYTHON, "-B", "/mnt/bench/classifier_seeds.py", "--seeds", str(seed), deadline=600
    )
    row = next(line for line in printed.splitlines() if line.startswith(f"| {seed} |"))
    _, trained, applied, accuracy, kappa, majority, *_ = map(float, row.strip("| ").split("|"))
    assert applied > trained
    assert accuracy > majority + 0.15
    assert kappa > 0.5
