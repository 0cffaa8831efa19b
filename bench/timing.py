"""Times whole commands, and says what was compared with what."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs of one command."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The quickest run: the one least disturbed by others.  Ratios are of these."""
        return min(self.seconds)

    def __str__(self) -> str:
        return (
            f"{self.name:<44} best {1000 * self.best:8.1f} ms, median {1000 * self.median:.1f} ms"
        )


def time_command(name: str, argv: Sequence[str | Path], *, repeats: int) -> Timing:
    """Run a command ``repeats`` times after one that does not count; each is a new process."""
    words = [str(word) for word in argv]
    took = []
    for turn in range(repeats + 1):
        began = time.perf_counter()
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        spent = time.perf_counter() - began
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(words)} failed: {done.stderr.decode()[-500:]}")
        if turn:
            took.append(spent)
    return Timing(name, tuple(took))


def gpupt() -> Path:
    """The gpupt of this checkout's environment."""
    found = HERE / ".venv/bin/gpupt"
    if not found.exists():
        raise SystemExit("there is no .venv here: ./quickstart --setup-only dev")
    return found


def machine() -> str:
    """The machine in a line, for the record."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} CPUs ({model}), Linux {platform.release()}, "
        f"Python {platform.python_version()}, load {load:.1f}"
    )


def ratio(name: str, value: float, *, target: str) -> None:
    """Print a ratio, and what it is meant to be."""
    print(f"ratio  {name:<52} {value:6.2f} ×   (goal: {target})")
