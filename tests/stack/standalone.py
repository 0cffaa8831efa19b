"""A standalone Spark on the loopback, and jobs run on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[2]
FLAGS = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"


@dataclass(frozen=True)
class Cluster:
    """A standalone Spark; its master's address and page."""

    python: Path
    master: str
    page: str
    log: Path

    def submit(
        self, script: str, *arguments: str, settings: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a job as the frontend would; five minutes at most."""
        environment = {
            **os.environ,
            "GPUPT_MASTER_PAGE": self.page,
            "GPUPT_SPARK_JOBS": str(HERE / "rolls/spark/files/jobs"),
            "PYSPARK_PYTHON": str(self.python),
            "PATH": f"{self.python.parent}:{os.environ['PATH']}",
            "SPARK_LOCAL_IP": "127.0.0.1",
        }
        words: list[str] = [str(self.python.with_name("spark-submit")), "--master", self.master]
        for setting in (
            "spark.executor.memory=512m",
            f"spark.driver.extraJavaOptions={FLAGS}",
            f"spark.executor.extraJavaOptions={FLAGS}",
            *settings,
        ):
            words += ["--conf", setting]
        with self.log.open("a") as log:
            return subprocess.run(
                [*words, str(HERE / "rolls" / script), *arguments],
                env=environment, text=True, stdout=subprocess.PIPE, stderr=log, timeout=300,
                check=False,
            )  # fmt: skip


def last_object(done: subprocess.CompletedProcess[str]) -> dict:  # type: ignore[type-arg]
    """The result of a job that ended well."""
    assert done.returncode == 0, done.stdout[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def require_java() -> None:
    """Skip, and say why, where Spark cannot run."""
    if not shutil.which("java"):
        pytest.skip("Java is not here: apt install default-jre-headless")
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if not version or int(version[1]) < 17:
        pytest.skip(f"Spark needs Java 17, here is: {said.splitlines()[0] if said else 'nothing'}")


def start(python: Path, folder: Path, name: str, words: list[str]) -> subprocess.Popen[bytes]:
    found = subprocess.run(
        [python, "-c", "import pyspark; print(pyspark.__path__[0])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    home = found.stdout.strip()
    java = ["java", *FLAGS.split(), "-Xmx256m", "-cp", f"{home}/jars/*"]
    kind = f"org.apache.spark.deploy.{name.lower()}.{name}"
    environment = {
        **os.environ, "SPARK_HOME": home, "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_SCALA_VERSION": "2.13",
    }  # fmt: skip
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*java, kind, "--host", "127.0.0.1", *words],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


def wait_for_workers(page: str, count: int, *, deadline: float) -> None:
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        with suppress(OSError, ValueError), urllib.request.urlopen(page, timeout=10) as answer:
            if len(json.load(answer)["workers"]) == count:
                return
        time.sleep(0.3)
    pytest.fail(f"{count} Spark workers did not come within {deadline:g} s")


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
