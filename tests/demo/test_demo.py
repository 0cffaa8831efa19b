"""The whole demo, started as a user starts it, judged by the report it leaves."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.demo

HERE = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ./quickstart left its report in, run from another folder."""
    folder = tmp_path_factory.mktemp("demo")
    child = subprocess.Popen(
        [HERE / "quickstart", "--yes", "--report", folder / "report"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
    )
    try:
        assert child.wait(2700) == 0
    finally:
        if child.poll() is None:  # it takes its emulated host down when it is asked to end
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(120)
            child.kill()
    return folder / "report"


@pytest.fixture(scope="module")
def summary(report: Path) -> dict[str, Any]:
    found = json.loads((report / "summary.json").read_text())
    assert isinstance(found, dict)
    return found


def test_it_ended_well(summary: dict[str, Any]) -> None:
    assert (summary["schema"], summary["ok"], summary["restored"]) == (1, True, True)


def test_every_gpu_came_back(summary: dict[str, Any]) -> None:
    gpus = summary["gpus"]
    assert [gpu["before"] for gpu in gpus] == [gpu["after"] for gpu in gpus]
    lent = [gpu for gpu in gpus if gpu["during"] == "vfio-pci"]
    assert len(lent) >= 2
    assert any(gpu not in lent for gpu in gpus), "one GPU stays with the host"


def test_each_compute_node_saw_its_gpu(summary: dict[str, Any]) -> None:
    nodes = {node["name"]: node for node in summary["nodes"]}
    compute = [node for node in nodes.values() if node["role"] == "compute"]
    assert len(compute) == 2
    for node in compute:
        assert [gpu["vendor_id"] for gpu in node["gpus_seen"]] == ["10de"]
    exercised = [done for node in compute for done in node["exercises"]]
    assert {(done["factorial"], done["dma"]) for done in exercised} == {("0x375f00", True)}


def test_spark_gave_its_tasks_gpus(summary: dict[str, Any]) -> None:
    spark = summary["spark"]
    assert spark["workers"] == 2
    given = [task for task in spark["gpu_addresses"] if task["addresses"]]
    assert len({task["host"] for task in given}) == 2


def test_the_classifier_learnt(summary: dict[str, Any]) -> None:
    classifier = summary["classifier"]
    assert classifier["accuracy"] > classifier["majority_baseline"] + 0.15
    assert classifier["kappa"] > 0.5
    assert sum(map(sum, classifier["confusion"])) > 0


def test_the_page_is_whole_and_asks_for_nothing(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert "emulated" in page
    assert "synthetic" in page
    for word in ("<script src", "<link", "@import", 'src="http', "url(http"):
        assert word not in page
