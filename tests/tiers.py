"""The tiers of ``./runtests``: what each needs, how it is run, and what became of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as Xml
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BIN = HERE / ".venv/bin"
# What takes long is named, so that it can be cut.
SLOWEST = ("--durations=12", "--durations-min=10")
# What an emulated host of the tests takes of memory, with a little beside it; and how many at
# the most, since there are no more long files than that.
HOST_KIB = 8 << 20
MOST_HOSTS = 4
SLOW = ("libvirt", "packaging", "stack", "emulated", "demo", "gpu")


class NotRun(Exception):
    """This machine cannot run the tier; the text says why."""


@dataclass
class Counts:
    """What became of the checks of a tier; ``skips`` and ``failures`` name them."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)

    def take(self, other: Counts) -> None:
        self.passed += other.passed
        self.failures += other.failures
        self.skips += other.skips


@dataclass
class Result:
    tier: str
    seconds: float
    counts: Counts
    not_run: str = ""

    @property
    def word(self) -> str:
        if self.counts.failures:
            return "FAILED"
        return "NOT RUN" if self.not_run else "passed"


def execute(argv: Sequence[str | Path], *, deadline: float) -> int:
    """Run a command in the checkout, its output shown; its exit status, 124 when it was late."""
    words = [str(word) for word in argv]
    print("$", " ".join(words), flush=True)
    child = subprocess.Popen(words, cwd=HERE, stdin=subprocess.DEVNULL)
    try:
        return child.wait(timeout=deadline)
    except subprocess.TimeoutExpired:
        print(f"did not end within {deadline:g} s", flush=True)
        return 124
    finally:
        end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """End a child that still runs: INT so that it can clean up, then TERM, then KILL."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        child.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=30)


def command(name: str, argv: Sequence[str | Path], *, deadline: float = 600) -> Counts:
    """A command as one check, passed when it exits 0."""
    status = execute(argv, deadline=deadline)
    return Counts(passed=1) if status == 0 else Counts(failures=[f"{name}: exit {status}"])


def pytest(*arguments: str | Path, deadline: float) -> Counts:
    """A pytest run counted from its own report; a run that made none is a failure."""
    with tempfile.TemporaryDirectory(prefix="gpupt-tests-") as folder:
        report = Path(folder) / "report.xml"
        status = execute(
            [BIN / "python", "-m", "pytest", "-q", *SLOWEST, f"--junitxml={report}", *arguments],
            deadline=deadline,
        )
        if not report.exists():
            return Counts(failures=[f"pytest made no report: exit {status}"])
        counts = read_report(report.read_text())
    if status not in (0, 1, 5) or (status == 1 and not counts.failures):
        counts.failures.append(f"pytest: exit {status}")
    return counts


def read_report(text: str) -> Counts:
    """The counts in a JUnit report, with the names and reasons of what did not pass."""
    counts = Counts()
    for case in Xml.fromstring(text).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts.failures.append(name)
        elif skipped is not None:
            counts.skips.append(f"{name}: {skipped.get('message', '')}")
        else:
            counts.passed += 1
    return counts


def set_up(*kinds: str) -> None:
    """Install what these kinds need; raises NotRun when that cannot be done."""
    done = subprocess.run(
        [HERE / "quickstart", "--setup-only", *kinds],
        cwd=HERE,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stderr)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("quickstart: ")]
        raise NotRun(said[-1] if said else f"the set-up failed with status {done.returncode}")


def need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise NotRun(f"{what} needs root")


def need_tests(folder: str) -> Path:
    found = HERE / "tests" / folder
    if not any(found.glob("test_*.py")):
        raise NotRun(f"there are no tests in tests/{folder}")
    return found


def lint() -> Counts:
    set_up("lint")
    counts = Counts()
    scripts = [name for name in ("quickstart", "runtests", ".ci/run") if (HERE / name).exists()]
    for name, argv in (
        ("ruff check", [BIN / "ruff", "check", "."]),
        ("ruff format", [BIN / "ruff", "format", "--check", "."]),
        ("mypy --strict", [BIN / "mypy"]),
        ("shellcheck", ["shellcheck", *scripts]),
    ):
        counts.take(command(name, argv))
    return counts


def unit() -> Counts:
    marks = " and ".join(f"not {name}" for name in SLOW)
    folders = [f"tests/{name}" for name in ("unit", "golden", "hosts")]
    # Some of them wait for a deadline to pass: there is a worker more than there are cores.
    workers = ("-n", str((os.cpu_count() or 1) + 1), "--dist", "worksteal")
    tests = [folder for folder in folders if (HERE / folder).is_dir()]
    return pytest("-m", marks, *workers, *tests, deadline=600)


def packaging() -> Counts:
    return pytest(need_tests("packaging"), deadline=900)


def libvirt() -> Counts:
    need_root("libvirtd's QEMU driver")
    tests = need_tests("libvirt")
    set_up("libvirt")
    with a_libvirtd():
        return pytest(tests, deadline=1200)


def libvirtd_answers() -> bool:
    return (
        subprocess.run(
            ["virsh", "-q", "-c", "qemu:///system", "uri"],
            capture_output=True,
            timeout=30,
            check=False,
        ).returncode
        == 0
    )


@contextmanager
def a_libvirtd() -> Iterator[None]:
    """A libvirtd that answers: this machine's own, or one started here and ended after."""
    if libvirtd_answers():
        yield
        return
    started: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in ("virtlogd", "libvirtd"):
            found = shutil.which(daemon, path=f"{os.environ['PATH']}:/usr/sbin")
            if found is None:
                raise NotRun(f"{daemon} is not installed")
            started.append(
                subprocess.Popen([found], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
        until = time.monotonic() + 60
        while not libvirtd_answers():
            if time.monotonic() > until:
                raise NotRun("libvirtd was started and did not answer within 60 s")
            time.sleep(0.5)
        yield
    finally:
        for child in reversed(started):
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=20)
            if child.poll() is None:
                child.kill()


def stack() -> Counts:
    tests = need_tests("stack")
    set_up("stack")
    return pytest(tests, deadline=1800)


def emulated() -> Counts:
    need_root("baking the images of the emulated host")
    tests = need_tests("emulated")
    set_up("demo")
    # Each worker boots hosts of its own; the longest files come first as they are named.
    workers = hosts_at_a_time(os.cpu_count() or 1, Path("/proc/meminfo").read_text())
    spread = ("-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder")
    return pytest(*(spread if workers > 1 else ()), tests, deadline=2700)


def hosts_at_a_time(cores: int, meminfo: str) -> int:
    """How many emulated hosts the machine can run beside each other, one at the least."""
    (free,) = (int(line.split()[1]) for line in meminfo.splitlines() if "MemAvailable" in line)
    return max(1, min(cores, free // HOST_KIB, MOST_HOSTS))


def demo() -> Counts:
    need_root("./quickstart")
    return pytest(need_tests("demo"), deadline=3000)


def gpu() -> Counts:
    if not any(Path("/proc/driver/nvidia/gpus").glob("*")):
        raise NotRun("this machine has no NVIDIA card with NVIDIA's driver")
    return pytest(need_tests("gpu"), deadline=1800)


TIERS: dict[str, Callable[[], Counts]] = {
    "lint": lint,
    "unit": unit,
    "packaging": packaging,
    "libvirt": libvirt,
    "stack": stack,
    "demo": demo,
    "emulated": emulated,
    "gpu": gpu,
}


def run_tier(name: str) -> Result:
    """Run one tier; one whose every check was skipped counts as not run."""
    print(f"\n=== {name}", flush=True)
    began = time.monotonic()
    try:
        counts, why = TIERS[name](), ""
    except NotRun as reason:
        counts, why = Counts(), str(reason)
    if not why and not counts.passed and not counts.failures:
        why = counts.skips[0] if counts.skips else "it has no tests"
    return Result(name, time.monotonic() - began, counts, why)


def summary(results: Sequence[Result]) -> list[str]:
    """The lines for a person at the end, the totals in the last."""
    lines = []
    for result in results:
        counts = result.counts
        told = f"{counts.passed} passed, {len(counts.failures)} failed, {len(counts.skips)} skipped"
        lines.append(
            f"{result.tier:<10} {result.word:<8} {result.seconds:7.1f} s  {result.not_run or told}"
        )
        lines += [f"    failed   {name}" for name in counts.failures]
        if not result.not_run:
            lines += [f"    skipped  {name}" for name in counts.skips]
    passed = sum(result.counts.passed for result in results)
    failed = sum(len(result.counts.failures) for result in results)
    skipped = sum(len(r.counts.skips) or bool(r.not_run) for r in results)
    return [*lines, f"{passed} passed, {failed} failed, {skipped} skipped"]


def main(arguments: Sequence[str]) -> int:
    unknown = [name for name in arguments if name not in TIERS]
    if unknown:
        print(f"runtests: no tier {unknown[0]!r}; there are {', '.join(TIERS)}", file=sys.stderr)
        return 2
    # A shell starts what runs in the background with Ctrl-C ignored, and children inherit
    # that: tests of interrupts would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results: list[Result] = []
    try:
        for name in arguments or TIERS:
            results.append(run_tier(name))
    except KeyboardInterrupt:
        print("\nruntests: interrupted", file=sys.stderr)
        return 130
    print("\n=== summary")
    print("\n".join(summary(results)), flush=True)
    return 1 if any(result.counts.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
