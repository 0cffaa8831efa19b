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
    """Seconds of repeated runs of one command: by the clock, and of processor."""

    name: str
    seconds: tuple[float, ...]
    processor: tuple[float, ...]

    @property
    def best(self) -> float:
        """The quickest run: the one least disturbed by others.  Ratios are of these."""
        return min(self.seconds)

    @property
    def cpu(self) -> float:
        """The least processor time, which a busy machine disturbs less than the clock."""
        return min(self.processor)

    def __str__(self) -> str:
        median = statistics.median(self.seconds)
        return (
            f"{self.name:<44} best {1000 * self.best:7.1f} ms, median {1000 * median:7.1f} ms, "
            f"processor {1000 * self.cpu:7.1f} ms"
        )


def time_command(name: str, argv: Sequence[str | Path], *, repeats: int) -> Timing:
    """Run a command ``repeats`` times after one that does not count; each is a new process.

    The first leaves Python's bytecode behind, as an installation does.
    """
    words = [str(word) for word in argv]
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    checked = subprocess.run(words, capture_output=True, text=True, check=False, env=kept)
    if checked.returncode != 0:
        raise SystemExit(f"{' '.join(words)} failed: {checked.stderr[-500:]}")
    clock, processor = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        child = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=kept
        )
        _, child.returncode, usage = os.wait4(child.pid, 0)
        clock.append(time.perf_counter() - began)
        processor.append(usage.ru_utime + usage.ru_stime)
    return Timing(name, tuple(clock), tuple(processor))


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
