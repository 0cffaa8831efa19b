"""Spark's jobs on a standalone cluster whose workers offer GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
from standalone import Cluster, last_object

pytestmark = pytest.mark.stack

ADDRESSES = "spark/files/jobs/gpu_addresses.py"
CLASSIFY = "classifier/files/classify.py"


def test_every_worker_is_given_its_gpu(cluster: Cluster) -> None:
    found = last_object(cluster.submit(ADDRESSES))
    assert found["workers"] == 2
    assert [given["addresses"] for given in found["gpu_addresses"]] == [["0"], ["0"]]
    assert sorted(given["task"] for given in found["gpu_addresses"]) == [0, 1]


def test_more_gpus_than_there_are_is_refused_at_once(cluster: Cluster) -> None:
    done = cluster.submit(ADDRESSES, "--gpus", "3")
    assert done.returncode == 3
    assert "refused: 3 GPUs were asked for and 2 are offered" in done.stdout


def test_executors_that_cannot_come_are_not_waited_for_without_end(cluster: Cluster) -> None:
    done = cluster.submit(ADDRESSES, "--deadline", "3", settings=["spark.executor.memory=64g"])
    assert done.returncode == 1
    assert "failed: 0 of 2 executors came within 3 s" in done.stdout


def test_the_classifier_trains_applies_and_writes_parquet(cluster: Cluster, tmp_path: Path) -> None:
    words = ["--home", str(tmp_path), "--run", "one", "--seed", "3"]
    words += ["--train-specimens", "160", "--apply-specimens", "200"]
    found = last_object(cluster.submit(CLASSIFY, *words))
    assert found["synthetic"] is True
    assert found["device"].startswith("cpu (GPU 0 held") or found["device"].startswith("gpu")
    assert found["accuracy"] > found["majority_baseline"] + 0.1
    assert found["accuracy"] > found["colour_baseline"] + 0.1
    assert sum(map(sum, found["confusion"])) == found["applied_to"]
    assert sum(found["hosts"].values()) == found["applied_to"]
    assert 6 <= len(found["samples"]) <= 8
    assert any(one["stained"] != one["predicted"] for one in found["samples"])
    assert Path(found["parquet"]) == tmp_path / "predictions/one"
    assert (tmp_path / "predictions/one/_SUCCESS").exists()
    assert {file.name for file in (tmp_path / "models/one").iterdir()} == {
        "model.json",
        "model.keras",
    }
    again = cluster.submit(CLASSIFY, *words)
    assert again.returncode == 3
    assert "results are never overwritten" in again.stdout
