"""The job: one Spark session that trains, applies, and says how good the result is.

The last line of stdout is one JSON object; what comes before it is progress.  Each run has an id,
and with it folders of its own: models/ID and predictions/ID.  Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpupt_job
import numpy as np
import pyarrow.parquet
from PIL import Image
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException

from herbarium import metrics
from herbarium.apply import PREDICTION_SCHEMA, TRAINING_SCHEMA, Application, Training
from herbarium.sheets import DEFAULT_HEIGHT
from herbarium.sources import (
    BadCollection,
    Drawn,
    Source,
    Split,
    read_collection,
    split_collection,
    split_drawn,
)
from herbarium.train import Recipe

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SAMPLES = 8
CODE = Path(__file__).resolve().parent.parent


@dataclass(slots=True)
class Watch:
    """Seconds that each part of the job took, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self.since, 1)
        self.since = now


def classify(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the whole job; raises Refused, Late, FileExistsError."""
    watch = Watch()
    workers = gpupt_job.read_workers(gpupt_job.master_page())
    gpus = gpupt_job.require_gpus(workers, asked.gpus)
    source, split = choose(asked)
    run = asked.run or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-seed{asked.seed}"
    model, predictions = asked.home / "models" / run, asked.home / "predictions" / run
    for folder in (model, predictions):
        if folder.exists():
            raise gpupt_job.Refused(f"{folder} exists: results are never overwritten")
    gpupt_job.say(f"run {run}: {gpus} GPUs; sheets are {_origin(source)}")
    settings = {
        "spark.executorEnv.PYTHONPATH": str(CODE),
        "spark.sql.shuffle.partitions": str(gpus),
        "spark.sql.execution.arrow.maxRecordsPerBatch": "256",
    }
    spark = gpupt_job.start_session("classify", workers, gpus=gpus, settings=settings)
    try:
        watch.lap("session")
        gpupt_job.wait_for_executors(spark, gpus, deadline=asked.deadline)
        watch.lap("executors")
        training = Training(source, split.train, asked.recipe, str(model))
        record, nodes = run_training(spark, training, gpus=gpus)
        watch.lap("train")
        application = Application(source, split.apply, str(model))
        run_application(spark, application, predictions, tasks=2 * gpus)
        watch.lap("apply")
    finally:
        spark.stop()
    watch.lap("stop")
    result = judge(predictions, record, source)
    watch.lap("judge")
    return {
        "schema": 1,
        "run": run,
        "trained_on": record["sheets"],
        "trained_on_specimens": len(split.train),
        "applied_to_specimens": len(split.apply),
        **result,
        "parquet": str(predictions),
        "model": str(model),
        "seed": asked.seed,
        "synthetic": source.synthetic,
        "device": record["device"],
        "trained_where": next(node["host"] for node in nodes if node["trained"]),
        "applied_where": sorted(result["hosts"]),
        "devices": {node["host"]: node["device"] for node in nodes},
        "train_seconds": watch.seconds["train"],
        "apply_seconds": watch.seconds["apply"],
        "seconds": {
            **watch.seconds,
            **{f"train {name}": took for name, took in record["seconds"].items()},
            "total": round(sum(watch.seconds.values()), 1),
        },
        "versions": record["versions"],
    }


def choose(asked: argparse.Namespace) -> tuple[Source, Split]:
    """Where the sheets come from and which specimens train; raises Refused."""
    if asked.images is None:
        source = Drawn(asked.seed, asked.sheet_height)
        return source, split_drawn(train=asked.train_specimens, apply=asked.apply_specimens)
    try:
        collection = read_collection(
            asked.images.resolve(), asked.labels, height=asked.recipe.height
        )
        for path, why in collection.unreadable:
            gpupt_job.say(f"left out, unreadable: {path}: {why}")
        if collection.duplicates:
            gpupt_job.say(f"left out, seen before: {len(collection.duplicates)} images")
        split = split_collection(collection, train_share=asked.train_share, seed=asked.seed)
    except BadCollection as error:
        raise gpupt_job.Refused(str(error)) from None
    return collection, split


def run_training(
    spark: SparkSession, training: Training, *, gpus: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record of the model that one task trained, and what each node said."""
    numbers = spark.range(0, gpus, 1, gpus)
    rows = numbers.mapInArrow(training, TRAINING_SCHEMA, barrier=True).collect()
    nodes = [row.asDict() for row in rows]
    for node in nodes:
        for line in node["log"].splitlines():
            gpupt_job.say(f"{node['host']}: {line}")
    return json.loads(next(node["record"] for node in nodes if node["trained"])), nodes


def run_application(
    spark: SparkSession, application: Application, folder: Path, *, tasks: int
) -> None:
    """Predictions for every sheet of every specimen, written to the folder as Parquet."""
    numbers = spark.range(0, len(application.specimens), 1, tasks)
    rows = numbers.mapInArrow(application, PREDICTION_SCHEMA)
    rows.write.mode("errorifexists").parquet(folder.as_uri())


def judge(folder: Path, record: dict[str, Any], source: Source) -> dict[str, Any]:
    """Measures of the predictions as they lie in Parquet, with samples to look at."""
    rows = read_predictions(folder)
    read = [row for row in rows if row["problem"] is None]
    labels = np.array([row["label"] for row in read], np.int64)
    predicted = np.array([row["prediction"] for row in read], np.int64)
    counts = metrics.confusion(labels, predicted)
    colours = np.array([[row["red"], row["green"], row["blue"]] for row in read])
    baseline = metrics.ColourBaseline(**record["colour_baseline"]).predict(colours)
    hosts: dict[str, int] = {}
    for row in rows:
        hosts[row["host"]] = hosts.get(row["host"], 0) + 1
    return {
        "applied_to": len(read),
        "unreadable": len(rows) - len(read),
        "accuracy": round(metrics.accuracy(counts), 4),
        "kappa": round(metrics.quadratic_kappa(counts), 4),
        "majority_baseline": round(metrics.majority(counts), 4),
        "colour_baseline": round(metrics.accuracy(metrics.confusion(labels, baseline)), 4),
        "confusion": counts.tolist(),
        "hosts": hosts,
        "samples": [sample(row, source) for row in pick(read)],
    }


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Every row of every part, in the order of specimen and sheet."""
    rows: list[dict[str, Any]] = []
    for part in sorted(folder.glob("part-*.parquet")):
        rows += pyarrow.parquet.ParquetFile(part).read().to_pylist()
    return sorted(rows, key=lambda row: (row["specimen"], row["sheet"]))


def pick(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows to show: up to half of them mistakes, both kinds, the rest right in both classes.

    The rows come sorted by specimen, so the choice owes nothing to the score.
    """
    kinds: dict[tuple[int, int], list[dict[str, Any]]] = {
        (0, 0): [],
        (1, 1): [],
        (0, 1): [],
        (1, 0): [],
    }
    for row in rows:
        kinds[row["label"], row["prediction"]].append(row)
    chosen = kinds[0, 1][: SAMPLES // 4] + kinds[1, 0][: SAMPLES // 4]
    right = [row for pair in zip(kinds[1, 1], kinds[0, 0], strict=False) for row in pair]
    return right[: SAMPLES - len(chosen)] + chosen


def sample(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A sheet to look at, as a small JPEG in base64, with its label and score."""
    return {
        "specimen": row["specimen"],
        "sheet": row["sheet"],
        "stained": bool(row["label"]),
        "predicted": bool(row["prediction"]),
        "probability": round(row["score"], 4),
        "image": base64.b64encode(thumbnail(source.find(row["specimen"], row["sheet"]))).decode(),
        "media_type": "image/jpeg",
    }


def thumbnail(encoded: bytes, *, height: int = 160) -> bytes:
    """The image itself when it is a small JPEG, else one of at most that height."""
    with Image.open(io.BytesIO(encoded)) as image:
        if image.format == "JPEG" and image.height <= height:
            return encoded
        image.draft("RGB", (height, height))
        small = image.convert("RGB")
        small.thumbnail((height, height))
        jpeg = io.BytesIO()
        small.save(jpeg, "JPEG", quality=85)
        return jpeg.getvalue()


def _origin(source: Source) -> str:
    return "synthetic, drawn from a seed" if source.synthetic else "from a collection"


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What is asked, checked; exits 2 with a word on stderr when it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="classify",
        description="Train a small network on specimen sheets on one GPU, apply it on all.",
    )
    add = parser.add_argument
    add("--train-specimens", type=int, default=240, help="synthetic specimens to train on (240)")
    add("--apply-specimens", type=int, default=600, help="further ones to apply to (600)")
    add("--seed", type=int, default=1, help="of sheets, split and training (1)")
    add("--epochs", type=int, default=8)
    add("--batch", type=int, default=16)
    add("--height", type=int, default=32, help="pixels the network sees, top to bottom (32)")
    add("--sheet-height", type=int, default=DEFAULT_HEIGHT, help="of synthetic sheets (128)")
    add("--images", type=Path, metavar="DIR", help="classify these images, not synthetic sheets")
    add("--labels", type=Path, metavar="CSV", help="columns path, label, specimen; with --images")
    add("--train-share", type=float, default=0.5, help="of a collection's specimens (0.5)")
    add("--gpus", type=int, help="how many to use (default: all that Spark's workers offer)")
    add("--home", type=Path, default=Path("/home/spark"), help="a folder that every node sees")
    add("--run", help="name of this run (default: time and seed)")
    add("--deadline", type=float, default=300, help="seconds for executors to come (300)")
    asked = parser.parse_args(argv)
    for name in ("train_specimens", "apply_specimens", "epochs", "batch"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if asked.height < 16 or asked.height % 8 or asked.sheet_height < 32 or asked.sheet_height % 8:
        parser.error("--height is at least 16, --sheet-height at least 32, both multiples of 8")
    if (asked.images is None) != (asked.labels is None):
        parser.error("--images and --labels go together")
    if asked.run is not None and (not asked.run or "/" in asked.run or asked.run.startswith(".")):
        parser.error("--run is the name of a folder")
    asked.recipe = Recipe(
        seed=asked.seed, height=asked.height, epochs=asked.epochs, batch=asked.batch
    )
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    asked = read_arguments(argv)
    expected = (PySparkException, Py4JError, FileExistsError)
    return gpupt_job.run(lambda: classify(asked), expected=expected)
