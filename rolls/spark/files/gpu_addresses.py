"""Each task says which GPU addresses Spark gave it; the last line of stdout is one object."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Iterator

from pyspark import BarrierTaskContext, SparkConf
from pyspark.sql import SparkSession


def workers(master: str) -> list[dict]:
    """The living workers that the master of ``spark://HOST:7077`` knows."""
    host = master.removeprefix("spark://").partition(":")[0]
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
    living = workers(SparkConf().get("spark.master"))
    gpus = sum(gpus_of(worker) for worker in living)
    builder = SparkSession.builder.appName("gpu-addresses")
    if gpus:
        builder = builder.config("spark.executor.resource.gpu.amount", "1").config(
            "spark.task.resource.gpu.amount", "1"
        )
    spark = builder.getOrCreate()
    tasks = gpus or len(living)
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
