"""A driver that gets stuck over any question is not well, and a log that is not read is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_health_judge import CARD, OTHER, WELL, Scene, device, report

from gpupt.decide.unsaid import with_unsaid
from gpupt.edges.nvmlread import FIELDS
from gpupt.model.health import (
    CheckResult,
    DriverReading,
    GpuReading,
    HealthReport,
    Library,
    Silence,
    Verdict,
)
from gpupt.model.kernellog import KernelLog


def whole(scene: Scene, *, details: str = "", log: KernelLog | None = None) -> HealthReport:
    driver = DriverReading(scene.library, details, driver="550.90", gpus=scene.readings)
    return with_unsaid(report(scene), driver, log=log or scene.log)


def stuck(name: str, why: Silence) -> GpuReading:
    return replace(WELL, **{name: None}, silent={name: why})


def test_what_is_well_stays_so() -> None:
    assert whole(Scene()) == report(Scene())


@pytest.mark.parametrize("why", [Silence.TIMEOUT, Silence.CRASHED])
@pytest.mark.parametrize("name", FIELDS)
def test_a_driver_that_gets_stuck_over_any_question_fails_the_card(name: str, why: Silence) -> None:
    scene = Scene(
        devices=(device(), device(OTHER)),
        readings=(stuck(name, why), replace(WELL, address=OTHER)),
    )
    here, other = whole(scene).gpus
    assert (here.address, here.status, other.status) == (CARD, Verdict.FAIL, Verdict.OK)
    assert [check for check in here.checks if check.status is Verdict.FAIL][-1].remedy


@pytest.mark.parametrize("name", ["serial", "utilization", "mig", "confidential"])
def test_what_is_not_supported_or_refused_of_no_check_s_questions_is_well(name: str) -> None:
    for why in (Silence.UNSUPPORTED, Silence.DENIED):
        assert whole(Scene(readings=(stuck(name, why),))).status is Verdict.OK


def test_it_is_said_once() -> None:
    lost = replace(WELL, remapped=None, mig=None, silent=dict.fromkeys(("remapped", "mig"), "x"))
    lost = replace(lost, silent=dict.fromkeys(("remapped", "mig"), Silence.TIMEOUT))
    assert whole(Scene(readings=(lost,))) == report(Scene(readings=(lost,)))


def nvml(found: HealthReport) -> CheckResult:
    return next(each for each in found.machine if each.id == "nvml")


@pytest.mark.parametrize(
    ("details", "status"),
    [
        ("driver version: timeout", Verdict.FAIL),
        ("driver version: unsupported, nvml version: crashed", Verdict.FAIL),
        ("driver version: unsupported, nvml version: error", Verdict.OK),
        ("", Verdict.OK),
    ],
)
def test_a_library_that_answers_in_part(details: str, status: Verdict) -> None:
    found = nvml(whole(Scene(), details=details))
    assert found.status is status
    assert bool(found.remedy) == (status is Verdict.FAIL)


@pytest.mark.parametrize(
    ("library", "driver", "status"),
    [
        (Library.TIMEOUT, "vfio-pci", Verdict.WARN),
        (Library.CRASHED, "vfio-pci", Verdict.WARN),
        (Library.NO_DRIVER, "vfio-pci", Verdict.UNSUPPORTED),
        (Library.ABSENT, "vfio-pci", Verdict.UNSUPPORTED),
        (Library.TIMEOUT, "nvidia", Verdict.FAIL),
    ],
)
def test_a_library_that_is_broken(library: Library, driver: str, status: Verdict) -> None:
    scene = Scene(devices=(device(driver=driver),), readings=(), library=library)
    assert nvml(whole(scene)).status is status


@pytest.mark.parametrize(
    ("log", "warns"),
    [
        (KernelLog(), False),
        (KernelLog(silent=Silence.UNSUPPORTED), False),
        (KernelLog(silent=Silence.DENIED), True),
        (KernelLog(silent=Silence.TIMEOUT), True),
        (KernelLog(silent=Silence.ERROR), True),
    ],
)
def test_a_log_that_could_not_be_read(log: KernelLog, warns: bool) -> None:
    found = [each for each in whole(Scene(), log=log).machine if each.id == "kernel_log"]
    assert [each.status for each in found] == [Verdict.WARN] * warns
    # No card, nothing that the log could have told.
    assert not any(each.id == "kernel_log" for each in whole(Scene(devices=()), log=log).machine)
