"""What Spark jobs on a gpupt cluster share: GPUs are counted before they are asked for.

Spark's standalone master answers a request that no worker can meet with silence: no
executor comes, and no error.  So a job reads what the master's workers offer, refuses what
they cannot give, and waits for its executors no longer than it says.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

REFUSED = 3
FAILED = 1


class Refused(Exception):
    """The cluster cannot give what is asked; nothing was submitted."""


class Late(Exception):
    """Something did not come before its deadline."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A living worker, its cores, and the addresses of its GPUs."""

    host: str
    cores: int
    gpus: tuple[str, ...]


def master_page(environment: Mapping[str, str] = os.environ) -> str:
    """Where the master's state is: GPUPT_MASTER_PAGE, or port 8080 of the frontend."""
    given = environment.get("GPUPT_MASTER_PAGE")
    if given:
        return given
    if "GPUPT_FRONTEND" not in environment:
        raise Refused("GPUPT_FRONTEND is not set: run this with the frontend's spark-submit")
    return f"http://{environment['GPUPT_FRONTEND']}:8080/json/"


def read_workers(page: str) -> tuple[Worker, ...]:
    """The living workers that the master knows; raises Refused when it does not answer."""
    try:
        with urllib.request.urlopen(page, timeout=60) as answer:
            state = json.load(answer)
    except (OSError, ValueError) as error:
        raise Refused(f"Spark's master does not answer at {page}: {error}") from None
    return tuple(
        Worker(
            worker["host"],
            worker["cores"],
            tuple(worker.get("resources", {}).get("gpu", {}).get("addresses", ())),
        )
        for worker in state["workers"]
        if worker["state"] == "ALIVE"
    )


def require_gpus(workers: Sequence[Worker], asked: int | None) -> int:
    """How many GPUs to use: those asked for, or all there are.  Raises Refused."""
    offered = sum(len(worker.gpus) for worker in workers)
    offer = ", ".join(f"{w.host} {len(w.gpus)}" for w in workers) or "there is no worker"
    if not offered:
        raise Refused(f"no worker offers a GPU ({offer})")
    if asked is not None and not 1 <= asked <= offered:
        raise Refused(f"{asked} GPUs were asked for and {offered} are offered ({offer})")
    return asked or offered


def cores_for(workers: Sequence[Worker]) -> int:
    """Cores of an executor, so that each worker can start one for each of its GPUs."""
    return max(1, min(worker.cores // len(worker.gpus) for worker in workers if worker.gpus))


def start_session(
    name: str, workers: Sequence[Worker], *, gpus: int, settings: Mapping[str, str] = {}
) -> SparkSession:
    """A session that asks for an executor per GPU, and whose tasks hold one GPU each."""
    from pyspark.sql import SparkSession

    cores = cores_for(workers)
    wanted = {
        "spark.executor.resource.gpu.amount": "1",
        "spark.task.resource.gpu.amount": "1",
        "spark.executor.cores": str(cores),
        "spark.cores.max": str(cores * gpus),
        "spark.executor.heartbeatInterval": "60s",
        "spark.network.timeout": "600s",
        "spark.python.worker.reuse": "true",
        "spark.ui.enabled": "false",
        **settings,
    }
    builder = SparkSession.builder.appName(name)
    for key, value in wanted.items():
        builder = builder.config(key, value)
    return builder.getOrCreate()


def wait_for_executors(spark: SparkSession, count: int, *, deadline: float) -> None:
    """Return when that many executors are there; raises Late after so many seconds."""
    tracker = spark.sparkContext._jsc.sc().statusTracker()
    end = time.monotonic() + deadline
    while True:
        there = [info.host() for info in tracker.getExecutorInfos()]
        if len(there) > count:  # the driver is listed too
            return
        if time.monotonic() > end:
            raise Late(
                f"{len(there) - 1} of {count} executors came within {deadline:g} s;"
                " the workers' logs say why: journalctl -u spark-worker"
            )
        time.sleep(0.5)


def say(line: str) -> None:
    """Progress, for whoever watches; results go to stdout."""
    print(line, file=sys.stderr, flush=True)


def run(job: Callable[[], dict[str, Any]], *, expected: tuple[type[Exception], ...] = ()) -> int:
    """Run a job and print its result as the last line of stdout; the exit status.

    0 done, 1 failed, 3 refused before anything was submitted.
    """
    try:
        result = job()
    except Refused as error:
        say(f"refused: {error}")
        return REFUSED
    except (Late, *expected) as error:
        say(f"failed: {error}")
        return FAILED
    print(json.dumps(result), flush=True)
    return 0
