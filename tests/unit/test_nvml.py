"""NVML through its gate: the real pynvml in real children, on a library that we made."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fakenvml
import pytest
from fakenvml import ABORT, CRASH, DEAF, GIBIBYTE, HANG, Card, error, h200

from gpupt.edges.nvml import read_driver
from gpupt.edges.nvmlread import CONDITION, FIELDS, IDENTITY
from gpupt.model.health import (
    DriverReading,
    Fabric,
    GpuProcess,
    GpuReading,
    Library,
    Modes,
    NvLink,
    RemappedRows,
    RetiredPages,
    Silence,
)
from gpupt.model.pci import PciAddress

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

EIGHT = tuple(f"0000:{bus:02x}:00.0" for bus in (0x19, 0x2D, 0x3B, 0x4C, 0x9B, 0xAB, 0xBB, 0xCB))
HERE = EIGHT[0]
# Seconds that a question may take which is answered at once, on a machine that is busy.
AMPLE = 60.0
# Seconds after which a question that is never answered is given up.
SHORT = 1.5

Play = Callable[..., Path]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakenvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def play(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Sets the scene for what is read next."""
    file = tmp_path / "nvml.ini"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("FAKE_NVML_CONF", str(file))

    def scene(*cards: Card, **values: fakenvml.Value) -> Path:
        return fakenvml.write_scenario(file, cards, **values)

    return scene


def read(*addresses: str, deadline: float = AMPLE) -> DriverReading:
    return read_driver(
        [PciAddress.parse(address) for address in addresses],
        deadline=deadline,
        samples_apart=0.01,
    )


def read_one(play: Play, card: Card, *, deadline: float = AMPLE) -> GpuReading:
    play(card)
    (reading,) = read(card.address, deadline=deadline).gpus
    return reading


def answered(reading: GpuReading) -> set[str]:
    return {name for name in FIELDS if getattr(reading, name) is not None}


def alive(file: Path) -> list[str]:
    """Processes that still play this scenario, after a moment in which a killed one ends."""
    until = time.monotonic() + 30
    while (found := playing(file)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def playing(file: Path) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(file).encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return [number for number in found if number != str(os.getpid())]


def test_every_field_of_a_reading_is_asked_for() -> None:
    fields = {each.name for each in dataclasses.fields(GpuReading)}
    assert fields - {"address", "silent"} == set(FIELDS)
    assert len(FIELDS) == len(set(FIELDS))


def test_every_answer_of_a_healthy_card(play: Play) -> None:
    play(h200(HERE), driver="580.95.05", nvml="13.580.95.05")
    reading = read(HERE)
    assert reading.library is Library.ANSWERED
    assert (reading.driver, reading.nvml, reading.details) == ("580.95.05", "13.580.95.05", "")
    links = tuple(
        NvLink(
            number,
            active=True,
            errors=dict.fromkeys(("replay", "recovery", "crc_flit", "crc_data", "ecc_data"), 0),
        )
        for number in range(18)
    )
    assert reading.gpus == (
        GpuReading(
            PciAddress.parse(HERE),
            uuid="GPU-00000000-0000-0000-0000-000000000019",
            name="NVIDIA H200",
            serial="1650000000025",
            vbios="96.00.A0.00.03",
            inforom="G520.0280.00.05",
            gsp="580.95.05",
            recovery_action=0,
            remapped=RemappedRows(0, 0, pending=False, failure=False),
            unrepairable_memory=False,
            ecc=Modes(current=True, pending=True),
            ecc_uncorrected=0,
            sram_exceeded=False,
            pcie_gen=5,
            pcie_gen_max=5,
            pcie_width=16,
            pcie_width_max=16,
            pcie_replays=3,
            clock_events=(1, 1),
            temperature=33,
            temperature_margin=54,
            temperature_slowdown=89,
            power=75.5,
            power_limit=650.0,
            power_default=700.0,
            memory_total=140 * GIBIBYTE,
            memory_used=GIBIBYTE,
            utilization=7,
            sm_clock=330,
            nvlinks=links,
            fabric=Fabric(state=3, status=0, health_mask=0),
            processes=(),
            inforom_valid=True,
            mig=Modes(current=False, pending=False),
            confidential=False,
            # An H200 remaps rows; it retires no pages.
            silent={"retired": Silence.UNSUPPORTED},
        ),
    )


def test_what_a_sick_card_answers(play: Play) -> None:
    card = h200(HERE).but(
        field__230="uint 2",
        remapped=(7, 512, 1, 1),
        retired=(12, 16),
        retired_pending=1,
        unrepairable_memory=1,
        ecc=(1, 0),
        ecc_volatile=(40, 3),
        sram_exceeded=1,
        temperature_margin=-4,
        clock_events="0x48,0x8",
        nvlink="10-1",
        nvlink_errors__1=(5, 4, 3, 2, 1),
        fabric=(2, 15, 0xA),
        compute=(4711, 4712),
        graphics=(900,),
        mig=(0, 1),
        inforom_check=error(14),
    )
    play(card, confidential=1)
    (reading,) = read(HERE).gpus
    assert reading.silent == {}
    assert reading.recovery_action == 2
    assert reading.remapped == RemappedRows(7, 512, pending=True, failure=True)
    assert reading.retired == RetiredPages(12, 16, pending=True)
    assert reading.unrepairable_memory is True
    assert reading.ecc == Modes(current=True, pending=False)
    assert reading.ecc_uncorrected == 3
    assert reading.sram_exceeded is True
    assert reading.temperature_margin == -4
    assert reading.clock_events == (0x48, 0x8)
    assert reading.nvlinks is not None
    assert [(link.number, link.active) for link in reading.nvlinks] == [
        (0, True),
        (1, False),
        (3, True),
    ]
    assert dict(reading.nvlinks[1].errors) == {
        "replay": 5, "recovery": 4, "crc_flit": 3, "crc_data": 2, "ecc_data": 1
    }  # fmt: skip
    assert reading.fabric == Fabric(state=2, status=15, health_mask=0xA)
    assert reading.processes == (
        GpuProcess(4711, "compute"),
        GpuProcess(4712, "compute"),
        GpuProcess(900, "graphics"),
    )
    assert reading.mig == Modes(current=False, pending=True)
    assert reading.inforom_valid is False
    assert reading.confidential is True


@pytest.mark.parametrize(
    ("number", "silence"),
    [
        (2, Silence.ERROR),
        (3, Silence.UNSUPPORTED),
        (4, Silence.DENIED),
        (10, Silence.TIMEOUT),
        (13, Silence.UNSUPPORTED),
        (15, Silence.LOST),
        (16, Silence.NEEDS_RESET),
        (17, Silence.DENIED),
        (25, Silence.UNSUPPORTED),
        (26, Silence.UNSUPPORTED),
        (999, Silence.ERROR),
        (4242, Silence.ERROR),
    ],
)
def test_each_error_is_a_silence(play: Play, number: int, silence: Silence) -> None:
    asked = "pcie_width", "ecc", "remapped", "nvlink", "compute", "inforom_check", "memory"
    reading = read_one(play, h200(HERE).but(**dict.fromkeys(asked, error(number))))
    silent = {"pcie_width", "ecc", "remapped", "nvlinks", "processes", "inforom_valid"}
    silent |= {"memory_total", "memory_used"}
    if silence is Silence.UNSUPPORTED:
        # Of the two kinds of process, the other one is still told.
        silent.remove("processes")
    if number == 2:
        # What NVML says of a link that the card has not: this one has none.
        assert reading.silent["nvlinks"] is Silence.UNSUPPORTED
        silent.remove("nvlinks")
    assert {name: reading.silent[name] for name in silent} == dict.fromkeys(silent, silence)
    assert answered(reading) == set(FIELDS) - set(reading.silent)
    assert "pcie_width_max" in answered(reading)


def test_what_has_no_answer_is_unsupported_and_never_zero(play: Play) -> None:
    reading = read_one(play, Card(HERE))
    # Confidential computing is told of all cards at once.
    assert answered(reading) == {"confidential"}
    silent = set(FIELDS) - {"confidential"}
    assert reading.silent == dict.fromkeys(silent, Silence.UNSUPPORTED)


def test_a_strange_answer_is_an_error_of_its_field_alone(play: Play) -> None:
    reading = read_one(play, h200(HERE).but(name="H\udcff200", field__230="-1"))
    assert reading.silent["name"] is Silence.ERROR
    assert reading.silent["recovery_action"] is Silence.ERROR
    assert answered(reading) == set(FIELDS) - {"name", "recovery_action", "retired"}


@pytest.mark.parametrize(
    ("value", "action"),
    [("3", 3), ("uint 4", 4), ("slong 5", 5), ("sint -6", -6), ("ushort 7", 7), ("double 8", 8)],
)
def test_a_field_value_is_read_by_its_type(play: Play, value: str, action: int) -> None:
    assert read_one(play, h200(HERE).but(field__230=value)).recovery_action == action


def test_a_driver_older_than_a_field_does_not_support_it(play: Play) -> None:
    reading = read_one(play, h200(HERE).but(field__230=error(2)))
    assert reading.silent["recovery_action"] is Silence.UNSUPPORTED


def test_older_and_newer_names_of_one_thing(play: Play) -> None:
    card = h200(HERE).but(
        clock_events=None,
        clock_reasons="0x4",
        temperature=None,
        temperature_v=41,
        power_enforced=None,
        compute=None,
        compute_v2=(77,),
        graphics=None,
    )
    reading = read_one(play, card)
    assert reading.clock_events == (4, 4)
    assert reading.temperature == 41
    assert reading.power_limit == 700.0
    assert reading.processes == (GpuProcess(77, "compute"),)


def test_an_nvlink_whose_counters_are_fields(play: Play) -> None:
    card = h200(HERE).but(
        nvlink="11", nvlink_errors__0=None, nvlink_errors__1=None,
        field__208__0="9", field__208__1="11", field__221__1="uint 2",
    )  # fmt: skip
    reading = read_one(play, card)
    assert reading.nvlinks is not None
    assert [dict(link.errors) for link in reading.nvlinks] == [
        {"received": 9},
        {"received": 11, "symbol": 2},
    ]


def test_a_card_whose_processes_are_not_told_has_not_none(play: Play) -> None:
    reading = read_one(play, h200(HERE).but(graphics=error(4)))
    assert reading.processes is None
    assert reading.silent["processes"] is Silence.DENIED
    reading = read_one(play, h200(HERE).but(compute=None, graphics=None))
    assert reading.silent["processes"] is Silence.UNSUPPORTED


def test_a_card_that_the_library_does_not_know_is_left_out(play: Play) -> None:
    play(h200(EIGHT[0]), h200(EIGHT[2]))
    reading = read(*EIGHT[:3])
    assert reading.library is Library.ANSWERED
    assert [str(gpu.address) for gpu in reading.gpus] == [EIGHT[0], EIGHT[2]]


def test_no_card_is_known_where_all_are_lent(play: Play) -> None:
    play()
    assert read(*EIGHT) == DriverReading(
        Library.ANSWERED, driver="580.95.05", nvml="13.580.95.05", gpus=()
    )
    assert read().library is Library.ANSWERED


@pytest.mark.parametrize(
    ("values", "silence"),
    [
        ({"error": 15}, Silence.LOST),
        ({"error": 16}, Silence.NEEDS_RESET),
        ({"handle": error(4)}, Silence.DENIED),
        ({"handle": error(999)}, Silence.ERROR),
        ({"handle": CRASH}, Silence.CRASHED),
    ],
)
def test_a_card_without_a_handle_is_there(
    play: Play, values: dict[str, fakenvml.Value], silence: Silence
) -> None:
    play(h200(EIGHT[0]).but(**values), h200(EIGHT[1]))
    lost, well = read(*EIGHT[:2]).gpus
    assert lost == GpuReading(PciAddress.parse(EIGHT[0]), silent={"handle": silence})
    assert answered(well) == set(FIELDS) - {"retired"}


def test_a_domain_of_32_bits(play: Play) -> None:
    play(h200("10000:e1:00.0"), h200("00000000:19:00.0"))
    reading = read("10000:e1:00.0", HERE, "0000:e1:00.0")
    assert [gpu.name for gpu in reading.gpus] == ["NVIDIA H200"] * 2
    assert [str(gpu.address) for gpu in reading.gpus] == ["10000:e1:00.0", HERE]


def test_a_card_named_twice_is_read_once(play: Play) -> None:
    play(h200(HERE))
    assert len(read(HERE, HERE).gpus) == 1


def test_a_hanging_card_among_eight(play: Play) -> None:
    cards = [h200(address) for address in EIGHT]
    cards[3] = cards[3].but(remapped=HANG)
    cards[5] = cards[5].but(handle=DEAF)
    file = play(*cards)
    reading = read(*EIGHT, deadline=2 * SHORT)
    assert reading.library is Library.ANSWERED
    assert [str(gpu.address) for gpu in reading.gpus] == list(EIGHT)
    for number, gpu in enumerate(reading.gpus):
        if number not in {3, 5}:
            assert answered(gpu) == set(FIELDS) - {"retired"}
    # It keeps what it answered before.
    assert answered(reading.gpus[3]) == set(IDENTITY)
    rest = set(FIELDS) - set(IDENTITY)
    assert reading.gpus[3].silent == dict.fromkeys(rest, Silence.TIMEOUT)
    assert reading.gpus[5].silent == {"handle": Silence.TIMEOUT}
    assert alive(file) == []


@pytest.mark.parametrize("way", [CRASH, ABORT])
def test_a_crash_inside_the_library(play: Play, way: str) -> None:
    play(h200(EIGHT[0]).but(power=way), h200(EIGHT[1]))
    crashed, well = read(*EIGHT[:2]).gpus
    assert answered(well) == set(FIELDS) - {"retired"}
    before = list(CONDITION)[: list(CONDITION).index("power")]
    assert answered(crashed) == {*IDENTITY, *before} - {"retired"}
    assert crashed.silent["retired"] is Silence.UNSUPPORTED
    rest = set(FIELDS) - answered(crashed) - {"retired"}
    assert {name: crashed.silent[name] for name in rest} == dict.fromkeys(rest, Silence.CRASHED)


def test_a_card_lost_in_mid_check_keeps_what_it_answered(play: Play) -> None:
    reading = read_one(play, h200(HERE).but(lost_after=10))
    # A question for each of the seven of IDENTITY, a sample of clocks; then the memory.
    assert answered(reading) == {*IDENTITY, "remapped", "confidential"}
    assert reading.silent["retired"] is Silence.UNSUPPORTED
    rest = set(FIELDS) - answered(reading) - {"retired"}
    assert {name: reading.silent[name] for name in rest} == dict.fromkeys(rest, Silence.LOST)


@pytest.mark.parametrize(
    ("number", "became"),
    [
        (4, Library.DENIED),
        (9, Library.NO_DRIVER),
        (17, Library.DENIED),
        (18, Library.MISMATCH),
        (999, Library.ERROR),
        (4242, Library.ERROR),
    ],
)
def test_what_an_error_of_init_says_of_the_library(
    play: Play, number: int, became: Library
) -> None:
    play(h200(HERE), init=error(number))
    reading = read(HERE)
    assert (reading.library, reading.gpus) == (became, ())
    assert f"({number})" in reading.details


def test_a_library_that_hangs(play: Play) -> None:
    file = play(h200(HERE), init=HANG)
    reading = read(HERE, deadline=SHORT)
    assert (reading.library, reading.gpus) == (Library.TIMEOUT, ())
    assert reading.details == "nvmlInit did not return within 1.5 s"
    assert alive(file) == []


@pytest.mark.parametrize(("way", "number"), [(CRASH, 11), (ABORT, 6)])
def test_a_library_that_crashes(play: Play, way: str, number: int) -> None:
    play(h200(HERE), init=way)
    reading = read(HERE)
    assert (reading.library, reading.gpus) == (Library.CRASHED, ())
    assert reading.details == f"the library crashed in nvmlInit (signal {number})"


def test_a_library_that_hides_its_version(play: Play) -> None:
    play(h200(HERE), driver=None, nvml=error(999))
    reading = read(HERE)
    assert reading.library is Library.ANSWERED
    assert (reading.driver, reading.nvml) == (None, None)
    assert reading.details == "driver version: unsupported, nvml version: error"
    assert reading.gpus[0].name == "NVIDIA H200"


def test_a_library_that_crashes_after_its_start(play: Play) -> None:
    play(h200(HERE), nvml=CRASH)
    reading = read(HERE)
    assert (reading.library, reading.driver) == (Library.ANSWERED, "580.95.05")
    assert reading.details == "nvml version: crashed"
    assert reading.gpus[0].name == "NVIDIA H200"


def test_no_library(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(h200(HERE))
    # The loader stops at it, so that a library that this machine may have is not found.
    (tmp_path / fakenvml.SONAME).write_text("no library at all")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    reading = read(HERE)
    assert (reading.library, reading.gpus) == (Library.ABSENT, ())
    assert "Not Found" in reading.details


def test_no_pynvml(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(h200(HERE))
    (tmp_path / "pynvml.py").write_text("raise ImportError('not installed here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reading = read(HERE)
    assert (reading.library, reading.gpus) == (Library.ABSENT, ())
    assert reading.details == "nvidia-ml-py: not installed here"


def test_a_pynvml_that_cannot_be_read(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(h200(HERE))
    (tmp_path / "pynvml.py").write_text("1 / 0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reading = read(HERE)
    assert (reading.library, reading.gpus) == (Library.ERROR, ())
    assert "ZeroDivisionError" in reading.details


def test_an_older_pynvml_lacks_functions(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has no name for is unsupported, and nothing else changes."""
    play(h200(HERE))
    gone = "nvmlDeviceGetMarginTemperature", "c_nvmlEccSramErrorStatus_v1_t", "nvmlMemory_v2"
    (tmp_path / "pynvml.py").write_text(
        fakenvml.installed().read_text() + "".join(f"\ndel {name}" for name in gone)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (reading,) = read(HERE).gpus
    assert reading.silent == dict.fromkeys(
        ("retired", "temperature_margin", "sram_exceeded"), Silence.UNSUPPORTED
    )
    # Version 1 counts the reserved memory as used.
    assert reading.memory_used == GIBIBYTE + (512 << 20)


def test_what_a_library_prints_does_not_disturb(play: Play) -> None:
    play(h200(HERE), prints="a warning")
    reading = read(HERE)
    assert (reading.library, reading.details) == (Library.ANSWERED, "")
    assert reading.gpus[0].name == "NVIDIA H200"


def test_the_folder_it_is_started_in_holds_no_modules(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(h200(HERE))
    (tmp_path / "json.py").write_text("raise SystemExit('whose is this?')")
    monkeypatch.chdir(tmp_path)
    assert read(HERE).library is Library.ANSWERED


def test_a_killed_gpupt_leaves_no_child_that_hangs(play: Play) -> None:
    file = play(h200(HERE).but(name=HANG))
    program = (
        "from gpupt.edges.nvml import read_driver; from gpupt.model.pci import PciAddress;"
        f"read_driver([PciAddress.parse({HERE!r})], deadline={SHORT})"
    )
    package = Path(__file__).resolve().parents[2]
    gpupt = subprocess.Popen([sys.executable, "-c", program], cwd=package)
    # Itself, the process that it started, and the child of the card.
    until = time.monotonic() + 30
    while len(found := playing(file)) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    gpupt.kill()
    gpupt.wait()
    assert len(found) >= 3
    limits = Path("/proc", max(found, key=int), "limits").read_text()
    assert re.search(r"Max core file size +0 +0 ", limits)
    assert alive(file) == []


def test_this_process_never_loads_the_library(play: Play) -> None:
    play(h200(HERE))
    assert read(HERE).library is Library.ANSWERED
    assert "libnvidia-ml" not in Path("/proc/self/maps").read_text()


def test_it_is_read_from_several_threads_at_once(play: Play) -> None:
    play(*(h200(address) for address in EIGHT[:2]))
    with ThreadPoolExecutor(4) as pool:
        readings = list(pool.map(lambda _: read(*EIGHT[:2]), range(4)))
    assert all(reading == readings[0] for reading in readings)
    assert len(readings[0].gpus) == 2


def test_from_a_command_line_with_the_library_in_its_path(play: Play, tmp_path: Path) -> None:
    """As a person would try it: nothing but the environment, from any folder."""
    play(h200(HERE))
    program = (
        "from gpupt.edges.nvml import read_driver; from gpupt.model.pci import PciAddress;"
        f"print(read_driver([PciAddress.parse({HERE!r})]).gpus[0].name)"
    )
    package = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "NVIDIA H200\n"
