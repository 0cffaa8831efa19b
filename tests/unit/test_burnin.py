"""The burn-in: its logic on devices that lie, its program in real children, what is made of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from gpupt.decide.health_burn import assess_burn, assess_dcgm, least_bandwidth
from gpupt.edges import burnin, burnprogram, process
from gpupt.edges.burnin import PROGRAM, burn_in
from gpupt.edges.burnprogram import Arrays, Burn, Device, signed, walk
from gpupt.edges.dcgm import parse_numbers, parse_tests, read_dcgm
from gpupt.errors import Failed
from gpupt.model.burnin import BurnReading, DcgmReading, DcgmTest, Stage
from gpupt.model.health import CheckResult, DriverReading, GpuReading, Library, Silence, Verdict
from gpupt.model.healthrules import Thresholds
from gpupt.model.pci import PciAddress

HERE = PciAddress.parse("0000:19:00.0")
THERE = PciAddress.parse("0000:2d:00.0")
UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
MEBIBYTE = 1 << 20
# Small enough for a test, large enough for several pieces of memory.
SMALL = ("--copy", "65536", "--rounds", "3", "--most", "262144", "--chunk", "65536",
         "--size", "32", "--batch", "2")  # fmt: skip
NUMPY = ("--framework", "numpy", *SMALL)


# The logic of the program, on devices that lie.


class Said:
    """A voice that keeps what is said."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.stages: list[tuple[str, str]] = []

    def send(self, kind: str, **more: Any) -> None:
        self.stages.append((kind, more["stage"]))

    def say(self, **answers: Any) -> None:
        self.answers.update(answers)


def options(*words: str) -> argparse.Namespace:
    return burnprogram.read_options([*SMALL, "--seconds", "0", *words])


def burn(device: Device, *words: str, clock: Callable[[], float] | None = None) -> Said:
    """What a burn-in of that device says; of no time, so that each stage does its least."""
    said = Said()
    more = {} if clock is None else {"clock": clock}
    Burn(device, said, options(*words), **more).run()  # type: ignore[arg-type]
    return said


def test_a_sound_device_has_no_error() -> None:
    said = burn(Arrays())
    assert [kind for kind, _ in said.stages] == ["stage", "done"] * 3
    assert [stage for kind, stage in said.stages if kind == "done"] == [
        "bandwidth", "memory", "matrix",
    ]  # fmt: skip
    assert said.answers["copy_errors"] == 0
    assert said.answers["memory_errors"] == 0
    assert said.answers["memory_tested"] == 262144
    assert said.answers["memory_patterns"] == 1
    # A batch of each kind, and the product that is proven.
    assert said.answers["products"] == 2 * (1 + 2)
    assert said.answers["wrong_products"] == 0
    assert said.answers["tflops"] > 0
    assert said.answers["tflops_half"] > 0
    assert {"host_to_device", "device_to_host", "device"} <= set(said.answers)


class FlippedBit(Arrays):
    """A bit of one piece of memory reads as 1, whatever was written."""

    def __init__(self, bit: int) -> None:
        super().__init__()
        self.bit, self.made = bit, []  # type: ignore[var-annotated]

    def empty(self, words: int) -> Any:
        self.made.append(super().empty(words))
        return self.made[-1]

    def equal_count(self, target: Any, base: int, step: int) -> int:
        # The pieces of the memory test come after the two buffers of the copies.
        if target is self.made[3]:
            target[7] |= signed(1 << self.bit)
        return super().equal_count(target, base, step)


@pytest.mark.parametrize("bit", [0, 15, 31])
def test_a_stuck_bit_is_found(bit: int) -> None:
    said = burn(FlippedBit(bit), "--seconds", "3600", clock=Ticks(60))
    assert said.answers["memory_patterns"] > 1
    assert said.answers["memory_errors"] > 0
    assert said.answers["wrong_products"] == 0


class Ticks:
    """A clock that goes on by so many seconds at each look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Aliased(Arrays):
    """Two pieces are the same memory: an address line is stuck."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def empty(self, words: int) -> Any:
        self.made.append(self.made[2] if len(self.made) == 4 else super().empty(words))
        return self.made[-1]


def test_a_stuck_address_line_is_found_by_the_first_pattern() -> None:
    said = burn(Aliased())
    assert said.answers["memory_patterns"] == 1
    assert said.answers["memory_errors"] == 65536 // 4


class WrongProduct(Arrays):
    """One element of one product is off by one."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self.which, self.made = which, 0

    def matmul(self, left: Any, right: Any) -> Any:
        result = super().matmul(left, right)
        self.made += 1
        if self.made == self.which:
            result[5, 9] += 1
        return result


@pytest.mark.parametrize("which", [1, 2, 3, 6])
def test_one_wrong_element_of_one_product_is_found(which: int) -> None:
    said = burn(WrongProduct(which))
    assert said.answers["wrong_products"] == 1
    assert said.answers["products"] >= 6


class AlwaysWrong(Arrays):
    """Every product is wrong, and always the same."""

    def matmul(self, left: Any, right: Any) -> Any:
        result = super().matmul(left, right)
        result[0, 0] += 1
        return result


def test_a_device_that_is_wrong_each_time_is_not_compared_with_itself() -> None:
    said = burn(AlwaysWrong())
    assert said.answers["wrong_products"] == said.answers["products"] == 2 * burnprogram.TRIES


class NotANumber(Arrays):
    """A product has an element that is no number, and equals nothing."""

    def matmul(self, left: Any, right: Any) -> Any:
        result = super().matmul(left, right)
        result[1, 1] = numpy.nan
        return result


def test_what_is_no_number_is_wrong() -> None:
    assert burn(NotANumber()).answers["wrong_products"] > 0


class LossyCopy(Arrays):
    """A copy to the host leaves out its last word."""

    def download(self, source: Any, target: Any) -> Any:
        target[:-1] = source[:-1]
        return target


def test_a_copy_that_loses_a_word_is_found() -> None:
    said = burn(LossyCopy())
    assert said.answers["copy_errors"] == 1
    assert said.answers["memory_errors"] == 0


class Timed(Arrays):
    """Copies take as long as a clock of ours says."""

    def __init__(self, gigabytes: float) -> None:
        super().__init__()
        self.now, self.gigabytes = 0.0, gigabytes

    def upload(self, source: Any, target: Any) -> Any:
        self.now += source.nbytes / 1e9 / self.gigabytes
        return super().upload(source, target)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("gigabytes", [3.0, 55.0])
def test_the_rate_is_that_of_the_copies(gigabytes: float) -> None:
    device = Timed(gigabytes)
    said = burn(device, "--seconds", "1", clock=clock_of(device, every=1000))
    assert said.answers["host_to_device"] == pytest.approx(gigabytes, rel=0.01)
    assert said.answers["host_to_device_median"] == pytest.approx(gigabytes, rel=0.01)
    # What takes no time on this clock is far faster.
    assert said.answers["device_to_host"] > 1000


def clock_of(device: Timed, *, every: int) -> Callable[[], float]:
    """The device's clock, which jumps ahead after so many looks: it ends what goes on."""
    looks = 0

    def look() -> float:
        nonlocal looks
        looks += 1
        return device.clock() + (3600.0 if looks > every else 0.0)

    return look


class Broken(Arrays):
    """The driver gives up at the memory test."""

    def fill(self, target: Any, base: int, step: int) -> Any:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")


def test_an_error_of_one_stage_is_told_and_the_next_has_its_turn() -> None:
    said = burn(Broken())
    assert ("failed", "memory") in said.stages
    assert ("done", "bandwidth") in said.stages
    assert ("done", "matrix") in said.stages


class Full(Arrays):
    """Memory for no more than some arrays."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def empty(self, words: int) -> Any:
        self.most -= 1
        if self.most < 0:
            raise MemoryError("out of memory")
        return super().empty(words)


@pytest.mark.parametrize(("most", "tested"), [(5, 2 * 65536), (2, 0)])
def test_what_memory_there_is_is_tested(most: int, tested: int) -> None:
    # Two for the copies; of three pieces, one is left to be worked with.
    said = burn(Full(most))
    assert said.answers["memory_tested"] == tested
    assert ("done", "memory") in said.stages


def test_without_limit_a_part_of_the_free_memory_is_tested() -> None:
    class Little(Arrays):
        def free(self) -> int:
            return 10 * 65536

    said = burn(Little(), "--most", "0", "--fraction", "0.8")
    assert said.answers["memory_tested"] == 8 * 65536


def test_the_patterns_show_each_bit_as_0_and_as_1() -> None:
    device = Arrays()
    ones = zeros = 0
    for base, step in walk()[:4]:
        words = device.fill(device.empty(1 << 16), base, step).astype("int64") & 0xFFFFFFFF
        ones |= int(numpy.bitwise_or.reduce(words))
        zeros |= int(numpy.bitwise_or.reduce(words ^ 0xFFFFFFFF))
    assert ones == zeros == 0xFFFFFFFF
    constants = [base for base, step in walk() if not step]
    assert len(constants) == len(set(constants)) == 68


@pytest.mark.parametrize("size", [64, 1024])
def test_the_products_are_exact_in_the_smaller_kind(size: int) -> None:
    products = burnprogram.Products(Arrays(), "float16", size)
    sums = products.left.astype("float64") @ products.right.astype("float64")
    # bfloat16 knows every integer up to 256.
    assert numpy.abs(sums).max() <= 256


# Frameworks that are not there, or do not start.


def test_the_first_framework_that_sees_a_card_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind() -> Device:
        raise burnprogram.NoDevice("sees no CUDA device")

    def absent() -> Device:
        raise ModuleNotFoundError("No module named 'jax'", name="jax")

    def broken() -> Device:
        raise OSError("libcudart.so.12: cannot open shared object file")

    frameworks = {"torch": blind, "jax": absent, "cupy": broken, "tensorflow": Arrays}
    monkeypatch.setattr(burnprogram, "FRAMEWORKS", frameworks)
    heard: list[dict[str, Any]] = []

    class Listening(Said):
        def send(self, kind: str, **more: Any) -> None:
            heard.append({"kind": kind, **more})

    device = burnprogram.choose(list(frameworks), Listening())  # type: ignore[arg-type]
    assert device is not None
    assert [(each["framework"], each["why"]) for each in heard] == [
        ("torch", "sees no CUDA device"),
        ("jax", "is not installed"),
        ("cupy", "does not start: libcudart.so.12: cannot open shared object file"),
    ]
    assert burnprogram.choose(["torch", "jax"], Listening()) is None  # type: ignore[arg-type]


def test_the_program_imports_nothing_of_gpupt() -> None:
    assert "import gpupt" not in PROGRAM.read_text()
    assert "from gpupt" not in PROGRAM.read_text()


# The program in a child of its own.


def no_look(cards: Sequence[PciAddress]) -> DriverReading:
    return DriverReading(Library.ABSENT)


def run(
    *words: str, python: str | Path = sys.executable, seconds: float = 0.2, **more: Any
) -> BurnReading:
    (reading,) = burn_in(
        [(HERE, UUID)],
        seconds=seconds,
        python=python,
        options=words,
        **{"look": no_look, **more},
    )
    return reading


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a Python that runs these lines instead of the program; ``program`` is the program."""

    def make(source: str) -> Path:
        path = tmp_path / "python"
        path.write_text(
            f"#!{sys.executable}\n"
            "import json, os, signal, sys, time\n"
            f"sys.path.insert(0, {str(PROGRAM.parents[2])!r})\n"
            "from gpupt.edges import burnprogram as program\n"
            "def tell(kind, **more):\n"
            "    os.write(1, (json.dumps({'kind': kind, **more}) + '\\n').encode())\n"
            f"{source}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def lying(body: str) -> str:
    """The program, with a device of which one method is another."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return (
        f"class Lying(program.Arrays):\n{lines}\n"
        "program.WITHOUT_CARD['numpy'] = Lying\n"
        "program.main(sys.argv[2:])"
    )


def test_a_sound_device_in_a_child() -> None:
    reading = run(*NUMPY)
    assert reading.details == ""
    assert reading.silent == {}
    assert reading.framework == "numpy"
    assert reading.pinned is False
    assert reading.memory_tested == 262144
    assert reading.memory_errors == reading.wrong_products == reading.copy_errors == 0
    assert (reading.products or 0) >= 6
    assert reading.seconds > 0


def test_no_framework_is_a_reading_without_one(python: Callable[[str], Path]) -> None:
    reading = run(python=python("program.FRAMEWORKS.clear()\nprogram.main(sys.argv[2:])"))
    assert reading.framework is None
    assert set(reading.silent.values()) == {Silence.UNSUPPORTED}
    assert verdicts(reading) == dict.fromkeys(CHECKS, Verdict.UNSUPPORTED)


def test_what_the_frameworks_lack_is_told(python: Callable[[str], Path]) -> None:
    source = (
        "program.FRAMEWORKS = {'jax': lambda: __import__('jax_of_no_machine')}\n"
        "program.main(sys.argv[2:])"
    )
    reading = run(python=python(source))
    assert reading.framework is None
    assert "jax" in reading.details
    assert "jax_of_no_machine" in reading.details


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("def upload(self, source, target):\n    time.sleep(600)", Stage.BANDWIDTH),
        ("def equal_count(self, target, base, step):\n    time.sleep(600)", Stage.MEMORY),
        ("def matmul(self, left, right):\n    time.sleep(600)", Stage.MATRIX),
    ],
)
def test_a_hang_is_ended_at_the_deadline(
    python: Callable[[str], Path], method: str, stage: Stage
) -> None:
    reading = run(*NUMPY, python=python(lying(method)), deadline=2)
    assert reading.silent[stage] is Silence.TIMEOUT
    assert next(iter(reading.silent)) is stage
    check = checks(reading)["burn_in"]
    assert check.status is Verdict.FAIL
    assert f"it hung under load ({stage})" in check.brief
    # What was measured before is kept.
    assert (reading.host_to_device is not None) is (stage is not Stage.BANDWIDTH)
    assert (reading.memory_errors is not None) is (stage is Stage.MATRIX)


def test_a_hang_that_ends_for_no_signal_but_kill(python: Callable[[str], Path]) -> None:
    deaf = (
        "def upload(self, source, target):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    open(os.environ['PID'], 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)"
    )
    script = python(lying(deaf))
    told = script.with_name("pid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PID", str(told))
        reading = run(*NUMPY, python=script, deadline=2)
    assert reading.silent[Stage.BANDWIDTH] is Silence.TIMEOUT
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_a_crash_is_told_from_a_hang(python: Callable[[str], Path]) -> None:
    method = "def matmul(self, left, right):\n    os.kill(os.getpid(), signal.SIGSEGV)"
    reading = run(*NUMPY, python=python(lying(method)))
    assert reading.silent == {Stage.MATRIX: Silence.CRASHED}
    assert reading.memory_errors == 0
    check = checks(reading)["burn_in"]
    assert check.status is Verdict.FAIL
    assert "it crashed under load (matrix)" in check.brief
    assert f"signal {signal.SIGSEGV.value}" in check.brief
    assert checks(reading)["matrix"].status is Verdict.UNSUPPORTED


def test_an_error_of_the_framework_fails_with_its_words(python: Callable[[str], Path]) -> None:
    method = "def fill(self, target, base, step):\n    raise RuntimeError('CUDA error: ECC')"
    reading = run(*NUMPY, python=python(lying(method)))
    assert reading.silent == {Stage.MEMORY: Silence.ERROR}
    assert reading.details == "memory: CUDA error: ECC"
    assert checks(reading)["burn_in"].status is Verdict.FAIL
    assert (reading.products or 0) > 0


def test_a_mistake_of_the_program_is_an_error_and_no_pass(python: Callable[[str], Path]) -> None:
    method = "def upload(self, source, target):\n    raise KeyError('never caught')"
    reading = run(*NUMPY, python=python(lying(method)))
    assert set(reading.silent.values()) == {Silence.ERROR}
    assert "never caught" in reading.details
    assert checks(reading)["burn_in"].status is Verdict.FAIL


def test_a_framework_that_hangs_at_its_start(
    python: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burnin, "START", 1.0)
    reading = run(python=python("time.sleep(600)"))
    assert reading.silent[Stage.START] is Silence.TIMEOUT
    check = checks(reading)["burn_in"]
    assert check.status is Verdict.FAIL
    assert "did not start in time" in check.brief


def test_a_framework_that_crashes_at_its_start(python: Callable[[str], Path]) -> None:
    reading = run(python=python("os.kill(os.getpid(), signal.SIGSEGV)"))
    assert reading.framework is None
    assert reading.silent[Stage.START] is Silence.CRASHED
    assert checks(reading)["burn_in"].status is Verdict.FAIL


def test_what_else_is_printed_is_no_answer(python: Callable[[str], Path]) -> None:
    noisy = "print('a banner', flush=True)\nprint('[1, 2]', flush=True)\n"
    loud = "def upload(self, source, target):\n    print('{}', flush=True)\n"
    loud += "    return super().upload(source, target)"
    reading = run(*NUMPY, python=python(noisy + lying(loud)))
    assert reading.silent == {}
    assert reading.memory_errors == 0


def test_the_card_is_named_by_its_uuid_and_by_the_bus(python: Callable[[str], Path]) -> None:
    source = (
        "named = os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + os.environ['CUDA_DEVICE_ORDER']\n"
        "tell('skipped', framework='torch', why=named)\n"
        "tell('none')"
    )
    assert run(python=python(source)).details == f"torch {UUID} PCI_BUS_ID"


def test_a_python_that_is_missing_is_refused() -> None:
    with pytest.raises(Failed, match="not installed"):
        run(python="/nowhere/python")


def test_one_of_two_cards_hangs_and_the_other_is_read(
    python: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first holds its turn for as long as it may; the second copies after that.
    monkeypatch.setattr(burnin, "TURN", 0.5)
    method = (
        "def upload(self, source, target):\n"
        "    if os.environ['CUDA_VISIBLE_DEVICES'] == 'GPU-bad':\n"
        "        time.sleep(600)\n"
        "    return super().upload(source, target)"
    )
    bad, good = burn_in(
        [(HERE, "GPU-bad"), (THERE, "GPU-good")],
        seconds=0.2,
        deadline=5,
        python=python(lying(method)),
        options=NUMPY,
        look=no_look,
    )
    assert bad.address == HERE
    assert bad.silent[Stage.BANDWIDTH] is Silence.TIMEOUT
    assert good.address == THERE
    assert good.silent == {}


def test_the_cards_copy_one_after_the_other(python: Callable[[str], Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    method = (
        "def upload(self, source, target):\n"
        "    file = os.open(os.environ['LOG'], os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
        "    os.write(file, os.environ['CUDA_VISIBLE_DEVICES'].encode())\n"
        "    time.sleep(0.02)\n"
        "    return super().upload(source, target)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOG", str(log))
        burn_in(
            [(HERE, "A"), (THERE, "B")],
            seconds=2,
            python=python(lying(method)),
            options=NUMPY,
            look=no_look,
        )
    # Never one between those of the other.
    assert re.fullmatch("A+B+|B+A+", log.read_text())


def test_heat_is_the_worst_that_nvml_said_under_load() -> None:
    temperatures = iter([70, 90])

    def look(cards: Sequence[PciAddress]) -> DriverReading:
        gpu = GpuReading(
            cards[0],
            temperature=next(temperatures, 80),
            temperature_slowdown=100,
            clock_events=(0x24, 0x20),
        )
        return DriverReading(Library.ANSWERED, gpus=(gpu,))

    reading = run(*NUMPY, seconds=1.5, look=look, pause=0.01)
    assert reading.temperature_peak == 90
    assert reading.margin_least == 10
    # What is in both samples only.
    assert reading.clock_events_seen == 0x20


def test_without_nvml_no_heat_is_known() -> None:
    def look(cards: Sequence[PciAddress]) -> DriverReading:
        raise Failed("no NVML")

    reading = run(*NUMPY, look=look, pause=0.01)
    assert reading.silent == {}
    assert reading.temperature_peak is None
    assert checks(reading)["burn_heat"].status is Verdict.UNSUPPORTED


def test_modules_of_gpupt_do_not_stand_in_for_those_of_a_framework() -> None:
    # Beside the program lies a "process"; a framework that wants one finds none there.
    asked = "process"
    assert PROGRAM.with_name(f"{asked}.py").exists()
    code = (
        "import runpy, sys, importlib.util as util\n"
        f"sys.argv = [{str(PROGRAM)!r}, '--framework', 'numpy', '--help']\n"
        f"sys.path.insert(0, {str(PROGRAM.parent)!r})\n"
        f"assert util.find_spec({asked!r}) is not None\n"
        "try:\n"
        f"    runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        f"    sys.exit(7 if util.find_spec({asked!r}) is None else 8)"
    )
    assert process.run([sys.executable, "-c", code], deadline=60, check=False).status == 7


# What is made of it.

CHECKS = ("burn_in", "bandwidth", "memory_pattern", "matrix", "burn_heat")


def checks(reading: BurnReading, **more: Any) -> dict[str, CheckResult]:
    return {check.id: check for check in assess_burn(reading, **more)}


def verdicts(reading: BurnReading, **more: Any) -> dict[str, Verdict]:
    return {name: check.status for name, check in checks(reading, **more).items()}


def sound(**changes: Any) -> BurnReading:
    """What an H200 that is well measures."""
    values: dict[str, Any] = {
        "framework": "torch", "name": "NVIDIA H200", "seconds": 61.2, "pinned": True,
        "host_to_device": 55.3, "host_to_device_median": 55.1, "device_to_host": 55.9,
        "device_to_host_median": 55.6, "device": 3900.0, "copy_errors": 0,
        "memory_tested": 112 << 30, "memory_patterns": 70, "memory_errors": 0,
        "products": 9000, "wrong_products": 0, "tflops": 51.0, "tflops_half": 700.0,
        "temperature_peak": 66, "margin_least": 21, "clock_events_seen": 0x4,
    }  # fmt: skip
    return BurnReading(HERE, **{**values, **changes})


def test_a_sound_card_passes_every_check() -> None:
    assert verdicts(sound()) == dict.fromkeys(CHECKS, Verdict.OK)
    assert all(not check.remedy for check in assess_burn(sound()))


@pytest.mark.parametrize(
    ("changes", "check", "verdict", "words"),
    [
        ({"host_to_device": 47.9}, "bandwidth", Verdict.FAIL, "47.9 GB/s"),
        ({"device_to_host": 24.0}, "bandwidth", Verdict.FAIL, "24 GB/s back"),
        ({"host_to_device": 50.0}, "bandwidth", Verdict.WARN, "50 GB/s"),
        ({"host_to_device": 50.5}, "bandwidth", Verdict.OK, "50.5 GB/s"),
        ({"host_to_device": 20.0, "pinned": False}, "bandwidth", Verdict.UNSUPPORTED, "pinned"),
        ({"pinned": False}, "bandwidth", Verdict.OK, "55.3"),
        ({"name": "NVIDIA L40S"}, "bandwidth", Verdict.UNSUPPORTED, "55.3 GB/s to the card"),
        ({"name": None}, "bandwidth", Verdict.UNSUPPORTED, "not known"),
        ({"copy_errors": 3}, "bandwidth", Verdict.FAIL, "3 words"),
        ({"host_to_device": None}, "bandwidth", Verdict.UNSUPPORTED, "not measured"),
        ({"memory_errors": 1}, "memory_pattern", Verdict.FAIL, "1 wrong words in 112.00 GiB"),
        ({"memory_errors": None}, "memory_pattern", Verdict.UNSUPPORTED, "no memory"),
        ({"memory_tested": 0}, "memory_pattern", Verdict.UNSUPPORTED, "no memory"),
        ({"wrong_products": 2}, "matrix", Verdict.FAIL, "2 of 9000"),
        ({"wrong_products": None}, "matrix", Verdict.UNSUPPORTED, "no product"),
        ({"products": 0}, "matrix", Verdict.UNSUPPORTED, "no product"),
        ({"margin_least": 10}, "burn_heat", Verdict.WARN, "10 °C"),
        ({"margin_least": 0}, "burn_heat", Verdict.FAIL, "0 °C"),
        ({"clock_events_seen": 0x40}, "burn_heat", Verdict.FAIL, "too hot"),
        ({"clock_events_seen": 0x80}, "burn_heat", Verdict.FAIL, "brakes its power"),
        ({"clock_events_seen": 0x8}, "burn_heat", Verdict.FAIL, "slows it down"),
        ({"clock_events_seen": 0x20}, "burn_heat", Verdict.WARN, "hot"),
        ({"clock_events_seen": None, "margin_least": None}, "burn_heat",
         Verdict.UNSUPPORTED, "66 °C"),
    ],
)  # fmt: skip
def test_each_check_fires(
    changes: dict[str, Any], check: str, verdict: Verdict, words: str
) -> None:
    found = checks(sound(**changes))
    assert found[check].status is verdict
    assert words in found[check].brief
    assert bool(found[check].remedy) is (verdict in {Verdict.FAIL, Verdict.WARN})
    others = {each.status for name, each in found.items() if name != check}
    assert others == {Verdict.OK}


@pytest.mark.parametrize("silence", [Silence.TIMEOUT, Silence.CRASHED, Silence.ERROR])
def test_a_stage_that_did_not_end_fails_the_burn_in_and_passes_nothing(silence: Silence) -> None:
    reading = sound(silent={Stage.MEMORY: silence, Stage.MATRIX: silence}, details="words")
    found = checks(reading)
    assert found["burn_in"].status is Verdict.FAIL
    assert "(memory)" in found["burn_in"].brief
    assert "words" in found["burn_in"].brief
    assert found["memory_pattern"].status is Verdict.UNSUPPORTED
    assert found["matrix"].status is Verdict.UNSUPPORTED
    assert found["bandwidth"].status is Verdict.OK


def test_an_error_that_was_found_before_a_hang_still_fails() -> None:
    reading = sound(silent={Stage.MEMORY: Silence.TIMEOUT}, memory_errors=4)
    assert checks(reading)["memory_pattern"].status is Verdict.FAIL


def test_the_thresholds_of_the_model_hold_for_heat() -> None:
    limits = Thresholds(models={"*H200*": {"margin_warn": 30}})
    assert checks(sound(), limits=limits)["burn_heat"].status is Verdict.WARN
    assert checks(sound(), limits=limits, name="NVIDIA A100")["burn_heat"].status is Verdict.OK


@pytest.mark.parametrize(
    ("model", "least"),
    [
        ("NVIDIA H200", 48),
        ("NVIDIA H100 80GB HBM3", 48),
        ("NVIDIA A100-SXM4-40GB", 21),
        ("Tesla V100-PCIE-16GB", 9),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A10", None),
        (None, None),
    ],
)
def test_the_table_is_read_by_whole_words(model: str | None, least: float | None) -> None:
    assert least_bandwidth(model) == least


# DCGM.

DISCOVERY = """\
2 GPUs found.
+--------+----------------------------------------------------------------------+
| GPU ID | Device Information                                                   |
+--------+----------------------------------------------------------------------+
| 0      | Name: NVIDIA H200                                                    |
|        | PCI Bus ID: 00000000:2D:00.0                                         |
|        | Device UUID: GPU-8932f937-d72c-4106-c12f-20bd9faed9f6                |
+--------+----------------------------------------------------------------------+
| 1      | Name: NVIDIA H200                                                    |
|        | PCI Bus ID: 00000000:19:00.0                                         |
|        | Device UUID: GPU-0a3f8d11-1a6f-4c7e-9d55-71b1a7f0c2aa                |
+--------+----------------------------------------------------------------------+
0 NvSwitches found.
"""


def entity(number: int, status: str, *warnings: dict[str, Any]) -> dict[str, Any]:
    found = {"entity_group": "GPU", "entity_group_id": 1, "entity_id": number, "status": status}
    return {**found, "warnings": list(warnings)} if warnings else found


PERSISTENCE = {
    "warning": "Persistence mode for GPU 1 is disabled.",
    "error_category": 8, "error_id": 29, "error_severity": 5,
}  # fmt: skip
MEMORY = {
    "warning": "GPU 1 had uncorrectable memory errors",
    "error_category": 7, "error_id": 48, "error_severity": 2,
}  # fmt: skip
FOUR = {
    "DCGM Diagnostic": {
        "test_categories": [
            {
                "category": "Deployment",
                "tests": [
                    {
                        "name": "software",
                        "results": [entity(0, "Pass"), entity(1, "Fail", PERSISTENCE)],
                        "test_summary": {"status": "Fail"},
                    }
                ],
            },
            {
                "category": "Hardware",
                "tests": [
                    {"name": "memory", "results": [entity(0, "Pass"), entity(1, "Fail", MEMORY)]},
                    {"name": "pcie", "results": [entity(0, "Skip"), entity(1, "Pass")]},
                    {
                        "name": "nvlink",
                        "results": [{"entity_group": "Switch", "entity_id": 1, "status": "Fail"}],
                    },
                ],
            },
        ]
    },
    "entity_groups": [],
}
THREE = {
    "DCGM GPU Diagnostic": {
        "test_categories": [
            {
                "category": "Deployment",
                "tests": [{"name": "NVML Library", "results": [{"status": "Pass"}]}],
            },
            {
                "category": "Integration",
                "tests": [
                    {
                        "name": "PCIe",
                        "results": [
                            {"gpu_ids": "0,10", "status": "Pass"},
                            {"gpu_id": "1", "status": "Warn", "warnings": "replays"},
                        ],
                    }
                ],
            },
        ]
    }
}


def test_dcgm_numbers_its_cards_otherwise_than_the_bus() -> None:
    assert parse_numbers(DISCOVERY) == {THERE: 0, HERE: 1}
    assert parse_numbers("0 GPUs found.") == {}


def test_the_tests_of_dcgm_4() -> None:
    text = "Successfully ran diagnostic for group.\n" + json.dumps(FOUR)
    assert parse_tests(text, 1) == (
        DcgmTest("software", "Fail", (PERSISTENCE["warning"],), (5,)),  # type: ignore[arg-type]
        DcgmTest("memory", "Fail", (MEMORY["warning"],), (2,)),  # type: ignore[arg-type]
        DcgmTest("pcie", "Pass"),
    )
    found = {check.id: check for check in assess_dcgm(DcgmReading(HERE, parse_tests(text, 1)))}
    assert found["dcgm_software"].status is Verdict.WARN
    assert found["dcgm_memory"].status is Verdict.FAIL
    assert "uncorrectable" in found["dcgm_memory"].brief
    assert found["dcgm_pcie"].status is Verdict.OK
    other = {
        check.id: check.status for check in assess_dcgm(DcgmReading(THERE, parse_tests(text, 0)))
    }
    assert other == {
        "dcgm_software": Verdict.OK,
        "dcgm_memory": Verdict.OK,
        "dcgm_pcie": Verdict.UNSUPPORTED,
    }


def test_the_tests_of_dcgm_3() -> None:
    text = json.dumps(THREE)
    assert parse_tests(text, 0) == (DcgmTest("NVML Library", "Pass"), DcgmTest("PCIe", "Pass"))
    assert parse_tests(text, 1)[1] == DcgmTest("PCIe", "Warn", ("replays",))
    (library, pcie) = assess_dcgm(DcgmReading(HERE, parse_tests(text, 1)))
    assert (library.id, library.status) == ("dcgm_nvml_library", Verdict.OK)
    assert (pcie.id, pcie.status) == ("dcgm_pcie", Verdict.WARN)


@pytest.mark.parametrize(
    "text", ["", "Error: unable to connect", "{", "[]", '{"DCGM Diagnostic": []}',
             '{"DCGM Diagnostic": {"test_categories": [{"tests": [{"results": 3}]}, 5]}}'],
)  # fmt: skip
def test_an_answer_that_is_none_has_no_test(text: str) -> None:
    assert parse_tests(text, 0) == ()


def test_a_status_that_is_not_known_fails() -> None:
    (check,) = assess_dcgm(DcgmReading(HERE, (DcgmTest("memory", "Melted"),)))
    assert check.status is Verdict.FAIL
    (check,) = assess_dcgm(DcgmReading(HERE, (DcgmTest("memory", ""),)))
    assert check.status is Verdict.FAIL


@pytest.fixture
def dcgmi(tmp_path: Path) -> Callable[[str], str]:
    """Makes a dcgmi that lists two cards, and runs these lines for its diagnostic."""

    def make(source: str) -> str:
        path = tmp_path / "dcgmi"
        path.write_text(
            f"#!{sys.executable}\nimport json, sys, time\n"
            f"if sys.argv[1] == 'discovery':\n    sys.exit(print({DISCOVERY!r}))\n"
            "assert sys.argv[1:] == ['diag', '-r', '2', '-j', '-i', '1'], sys.argv\n"
            f"{source}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def test_the_answer_of_a_diagnostic_that_failed_is_read(dcgmi: Callable[[str], str]) -> None:
    program = dcgmi(f"print(json.dumps({FOUR!r}))\nsys.exit(226)")
    reading = read_dcgm(HERE, program=program, deadline=60)
    assert reading.silent is None
    assert [test.name for test in reading.tests] == ["software", "memory", "pcie"]


@pytest.mark.parametrize(
    ("source", "silence"),
    [
        ("time.sleep(600)", Silence.TIMEOUT),
        ("sys.exit('the host engine is gone')", Silence.ERROR),
        ("import os\nos.abort()", Silence.CRASHED),
    ],
)
def test_a_diagnostic_without_an_answer_fails(
    dcgmi: Callable[[str], str], source: str, silence: Silence
) -> None:
    reading = read_dcgm(HERE, program=dcgmi(source), deadline=2)
    assert reading.silent is silence
    (check,) = assess_dcgm(reading)
    assert check.status is Verdict.FAIL
    assert check.value == silence


def test_without_dcgm_its_check_is_not_supported(dcgmi: Callable[[str], str]) -> None:
    absent = read_dcgm(HERE, program="/nowhere/dcgmi")
    assert absent.silent is Silence.UNSUPPORTED
    unlisted = read_dcgm(PciAddress.parse("0000:ff:00.0"), program=dcgmi(""), deadline=60)
    assert "does not list" in unlisted.details
    for reading in (absent, unlisted, DcgmReading(HERE)):
        assert [check.status for check in assess_dcgm(reading)] == [Verdict.UNSUPPORTED]
