"""What tasks do: train on one node while the others get ready, then apply on all of them.

Both are functions for Spark's mapInArrow: record batches in, record batches out, and no
pandas.  A Python worker keeps the framework and the model for its next task.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import BarrierTaskContext, TaskContext

from herbarium import images, model
from herbarium.images import Sheet
from herbarium.sources import Source
from herbarium.train import Recipe, train

TRAINING_SCHEMA = "host string, trained boolean, device string, record string, log string"
PREDICTION_SCHEMA = (
    "specimen string, sheet string, label int, score float, prediction int, "
    "red float, green float, blue float, host string, problem string"
)

_PREDICTIONS = pa.schema(
    [
        ("specimen", pa.string()),
        ("sheet", pa.string()),
        ("label", pa.int32()),
        ("score", pa.float32()),
        ("prediction", pa.int32()),
        ("red", pa.float32()),
        ("green", pa.float32()),
        ("blue", pa.float32()),
        ("host", pa.string()),
        ("problem", pa.string()),
    ]
)

_loaded: dict[str, tuple[Any, dict[str, Any]]] = {}
"""Models that this process has, by their folder."""


def held_gpus() -> model.Held:
    """The GPUs that Spark gave the running task."""
    context = TaskContext.get()
    resources = context.resources() if context else {}
    return model.Held(tuple(resources["gpu"].addresses) if "gpu" in resources else ())


@dataclass(frozen=True, slots=True)
class Training:
    """A barrier stage of one task per GPU: the first trains, the others load the framework."""

    source: Source
    specimens: tuple[int, ...]
    recipe: Recipe
    folder: str

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        context, held, log = BarrierTaskContext.get(), held_gpus(), []
        if context.partitionId() == 0:
            folder = Path(self.folder)
            record = train(
                self.source, self.specimens, self.recipe, held=held, folder=folder, say=log.append
            )
            trained, device = True, record["device"]
        else:
            trained, record = False, {}
            start = time.monotonic()
            device = model.describe_device(model.load_framework(held), held)
            log.append(f"Keras imported in {time.monotonic() - start:.1f} s")
        # Spark ends a Python worker that has been idle for a minute, and with it the
        # framework that it has imported.
        context.barrier()
        yield pa.RecordBatch.from_pylist(
            [
                {
                    "host": socket.gethostname(),
                    "trained": trained,
                    "device": device,
                    "record": json.dumps(record),
                    "log": "\n".join(log),
                }
            ]
        )


@dataclass(frozen=True, slots=True)
class Application:
    """Numbers of specimens in, a row per sheet out."""

    source: Source
    specimens: tuple[int, ...]
    folder: str

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        if self.folder not in _loaded:
            warm = "keras" in sys.modules
            print(f"loading the model, Keras imported before: {warm}", file=sys.stderr, flush=True)
            keras = model.load_framework(held_gpus())
            _loaded[self.folder] = model.load(keras, Path(self.folder))
        network, record = _loaded[self.folder]
        for batch in batches:
            numbers = [self.specimens[at] for at in batch.column(0).to_pylist()]
            for sheets in _in_parts(self.source.sheets(numbers), size=model.BATCH):
                yield predict_sheets(network, record, sheets)


def predict_sheets(network: Any, record: dict[str, Any], sheets: Sequence[Sheet]) -> pa.RecordBatch:
    """A row per sheet; score and prediction are null where `problem` says why."""
    pixels, problems = images.decode_all(sheets, height=record["recipe"]["height"])
    scores = model.predict(network, pixels)
    bad = np.array([problem is not None for problem in problems])
    colours = images.mean_colours(pixels)
    columns = [
        pa.array([sheet.specimen for sheet in sheets]),
        pa.array([sheet.sheet for sheet in sheets]),
        pa.array([sheet.label for sheet in sheets], pa.int32()),
        pa.array(scores, mask=bad),
        pa.array((scores >= record["threshold"]).astype(np.int32), mask=bad),
        *(pa.array(np.ascontiguousarray(colours[:, at]), mask=bad) for at in range(3)),
        pa.array([socket.gethostname()] * len(sheets)),
        pa.array(problems, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_PREDICTIONS)


def _in_parts(sheets: Iterator[Sheet], *, size: int) -> Iterator[list[Sheet]]:
    part: list[Sheet] = []
    for sheet in sheets:
        part.append(sheet)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
