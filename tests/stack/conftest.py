"""A Python with the rolls' own packages, and a Spark cluster of two workers on the loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from standalone import HERE, Cluster, free_ports, require_java, start, wait_for_workers

ROLLS = ("spark", "tensorflow")


@pytest.fixture(scope="session")
def stack_python() -> Path:
    """The interpreter of an environment with pyspark, Keras and TensorFlow.

    GPUPT_STACK_PYTHON names one that is there; else one is made beside the checkout's own,
    from what the rolls ask for, and kept.
    """
    given = os.environ.get("GPUPT_STACK_PYTHON")
    if given:
        return Path(given)
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not here: ./quickstart --setup-only demo")
    folder = HERE / ".venv/stack"
    asked = [word for roll in ROLLS for word in ("-r", f"rolls/{roll}/files/requirements.in")]
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([uv, "venv", "--python", sys.executable, folder], cwd=HERE, check=True)
    subprocess.run(
        [uv, "pip", "install", "--python", python, *asked], cwd=HERE, check=True, timeout=900
    )
    return python


@pytest.fixture(scope="session")
def cluster(stack_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A master and two workers, each with two cores and a GPU that is but a number."""
    require_java()
    folder = tmp_path_factory.mktemp("spark")
    discover = folder / "discover-gpus"
    discover.write_text('#!/bin/sh\necho \'{"name": "gpu", "addresses": ["0"]}\'\n')
    discover.chmod(0o755)
    (folder / "worker.conf").write_text(
        "spark.worker.resource.gpu.amount 1\n"
        f"spark.worker.resource.gpu.discoveryScript {discover}\n"
    )
    ports = free_ports(4)
    master, page = f"spark://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}/json/"
    found = Cluster(stack_python, master, page, folder / "jobs.log")
    parts = [["Master", "--port", str(ports[0]), "--webui-port", str(ports[1])]]
    for number in (0, 1):
        worker = ["Worker", "--webui-port", str(ports[2 + number]), "--cores", "2"]
        worker += ["--memory", "1g", "--work-dir", str(folder / f"work{number}")]
        parts.append([*worker, "--properties-file", str(folder / "worker.conf"), master])
    running = []
    try:
        for name, *words in parts:
            running.append(start(stack_python, folder, name, words))
        wait_for_workers(page, 2, deadline=120)
        yield found
    finally:
        for child in running:
            child.terminate()
        for child in running:
            child.wait(timeout=30)
