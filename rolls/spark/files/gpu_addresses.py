"""Each task says which GPU addresses Spark gave it; the last line of stdout is one object."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from collections.abc import Iterator

from pyspark import BarrierTaskContext
from pyspark.sql import SparkSession


def workers(host: str) -> list[dict]:
    """The living workers that the master on that host knows."""
    with urllib.request.urlopen(f"http://{host}:8080/json/", timeout=60) as answer:
        found = json.load(answer)["workers"]
    return [worker for worker in found if worker["state"] == "ALIVE"]


def gpus_of(worker: dict) -> int:
    return len(worker.get("resources", {}).get("gpu", {}).get("addresses", []))


def report(_: Iterator[int]) -> Iterator[dict]:
    """What one task was given."""
    context = BarrierTaskContext.get()
    resources = context.resources()
    addresses = list(resources["gpu"].addresses) if "gpu" in resources else []
    yield {"host": socket.gethostname(), "task": context.partitionId(), "addresses": addresses}


def main() -> None:
    start = time.monotonic()
    living = workers(os.environ["GPUPT_FRONTEND"])
    gpus = sum(gpus_of(worker) for worker in living)
    tasks = gpus or len(living)
    # An executor a GPU, so that each task has a GPU of its own; the number of cores that
    # are asked for is what makes Spark wait for all executors before it starts.
    shares = [worker["cores"] // max(1, gpus_of(worker)) for worker in living]
    cores = max(1, min(shares, default=1))
    settings = {
        "spark.executor.cores": cores,
        "spark.cores.max": cores * tasks,
        "spark.task.cpus": cores,
        "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "2s",
    }
    if gpus:
        settings |= {"spark.executor.resource.gpu.amount": 1, "spark.task.resource.gpu.amount": 1}
    builder = SparkSession.builder.appName("gpu-addresses")
    for name, value in settings.items():
        builder = builder.config(name, str(value))
    spark = builder.getOrCreate()
    given = spark.sparkContext.parallelize(range(tasks), tasks).barrier().mapPartitions(report)
    found = sorted(given.collect(), key=lambda one: (one["host"], one["task"]))
    spark.stop()
    print(
        json.dumps(
            {
                "workers": len(living),
                "gpu_addresses": found,
                "job_seconds": round(time.monotonic() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
