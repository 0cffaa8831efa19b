"""Each task says which GPU addresses Spark gave it; the last line of stdout is one object.

    spark-submit gpu_addresses.py [--gpus N] [--deadline SECONDS]

The tasks form a barrier stage, which starts whole or not at all: every executor takes part.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gpupt_job


def report(_: Iterator[int]) -> Iterator[dict[str, Any]]:
    """What one task was given."""
    from pyspark import BarrierTaskContext

    context = BarrierTaskContext.get()
    resources = context.resources()
    addresses = list(resources["gpu"].addresses) if "gpu" in resources else []
    yield {"host": socket.gethostname(), "task": context.partitionId(), "addresses": addresses}


def show_addresses(*, gpus: int | None, deadline: float) -> dict[str, Any]:
    """Run one task per GPU; raises Refused, Late."""
    start = time.monotonic()
    workers = gpupt_job.read_workers(gpupt_job.master_page())
    tasks = gpupt_job.require_gpus(workers, gpus)
    spark = gpupt_job.start_session("gpu-addresses", workers, gpus=tasks)
    try:
        gpupt_job.wait_for_executors(spark, tasks, deadline=deadline)
        gpupt_job.say(f"{tasks} executors are there")
        numbers = spark.sparkContext.parallelize(range(tasks), tasks)
        given = numbers.barrier().mapPartitions(report).collect()
    finally:
        spark.stop()
    return {
        "workers": len(workers),
        "gpu_addresses": sorted(given, key=lambda one: (one["host"], one["task"])),
        "job_seconds": round(time.monotonic() - start, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-addresses", description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, help="tasks, one per GPU (default: all offered)")
    parser.add_argument("--deadline", type=float, default=300, help="seconds for executors to come")
    asked = parser.parse_args(argv)
    return gpupt_job.run(lambda: show_addresses(gpus=asked.gpus, deadline=asked.deadline))


if __name__ == "__main__":
    sys.exit(main())
