"""What amdgpu tells of its cards in sysfs, and what the checks make of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from boards import MI300X
from fakekernel import FakeKernel, plant
from healthhost import machine_at

from gpupt.cli.context import Settings
from gpupt.cli.healthlook import look
from gpupt.decide.health import OF_AMDGPU
from gpupt.edges import amdgpu, replayfile
from gpupt.edges.amdgpu import read_amdgpu
from gpupt.edges.healthfile import health_file
from gpupt.edges.sysfs import read_host
from gpupt.edges.tree import Reader
from gpupt.model.health import CheckResult, GpuReading, RetiredPages, Silence, Verdict

ADDRESS = "0000:05:00.0"
GIB = 1 << 30
# As an MI210 shows itself: three sensors, one monitor, a block of memory and others.
TOLD: Mapping[str, str] = {
    "unique_id": "7a3c1fd2e5b60491",
    "product_name": "AMD Instinct MI210",
    "vbios_version": "113-D67301-059",
    "gpu_busy_percent": "97",
    "mem_info_vram_total": str(64 * GIB),
    "mem_info_vram_used": str(3 * GIB),
    "pcie_replay_count": "4",
    "power/runtime_status": "active",
    "hwmon/hwmon5/name": "amdgpu",
    "hwmon/hwmon5/temp1_input": "41000",
    "hwmon/hwmon5/temp1_crit": "100000",
    "hwmon/hwmon5/temp2_input": "62000",
    "hwmon/hwmon5/temp2_crit": "100000",
    "hwmon/hwmon5/temp3_input": "58000",
    "hwmon/hwmon5/temp3_crit": "94000",
    "hwmon/hwmon5/power1_average": "289000000",
    "hwmon/hwmon5/power1_cap": "300000000",
    "hwmon/hwmon5/power1_cap_default": "300000000",
    "ras/features": "feature mask: 0x1",
    "ras/umc_err_count": "ue: 0\nce: 12",
    "ras/gfx_err_count": "ue: 0\nce: 0",
    "ras/gpu_vram_bad_pages": "0x027f5d43 : 0x00001000 : R",
}


def planted(root: Path, changes: Mapping[str, str | None] = {}, *, lost: bool = False) -> Path:
    """A machine with one card; of what it tells some is otherwise, or None: not there."""
    told = {name: text for name, text in {**TOLD, **changes}.items() if text is not None}
    card = replace(MI300X, address=ADDRESS, group=3, more={**MI300X.more, **told}, lost=lost)
    plant(root, [card], drivers=["amdgpu", "vfio-pci"])
    return root


def reading(root: Path) -> GpuReading:
    (found,) = read_amdgpu(Reader(root), read_host(root).gpus, deadline=5)
    return found


def judged(
    root: Path, changes: Mapping[str, str | None] = {}, *, lending: bool = False
) -> dict[str, CheckResult]:
    machine = planted(root / "machine", changes)
    (gpu,) = look(Settings(root=machine, state=root / "state"), lending=lending).report.gpus
    return {each.id: each for each in gpu.checks}


def test_everything_is_read(tmp_path: Path) -> None:
    found = reading(planted(tmp_path))
    assert (found.uuid, found.name) == ("7a3c1fd2e5b60491", "AMD Instinct MI210")
    # The memory is nearest to what it bears, though the junction is hotter.
    assert (found.temperature_margin, found.temperature, found.temperature_slowdown) == (36, 58, 94)
    assert (found.power, found.power_limit, found.power_default) == (289.0, 300.0, 300.0)
    assert (found.memory_total, found.memory_used) == (64 * GIB, 3 * GIB)
    assert (found.utilization, found.pcie_replays, found.ecc_uncorrected) == (97, 4, 0)
    assert found.retired == RetiredPages(1, 0, pending=False)
    assert set(found.silent.values()) == {Silence.UNSUPPORTED}
    assert {"serial", "pcie_gen", "clock_events", "processes"} <= set(found.silent)
    assert not {"uuid", "temperature", "retired", "power"} & set(found.silent)


def checks(report: Any) -> list[Any]:
    (gpu,) = report["gpus"]
    return list(gpu["checks"])


def test_a_card_that_is_well_passes(tmp_path: Path) -> None:
    found = judged(tmp_path)
    assert set(found) >= OF_AMDGPU
    assert found["driver"].status is Verdict.OK
    told = {each for each in OF_AMDGPU if found[each].status is Verdict.OK}
    # A rate takes two counts.
    assert told == OF_AMDGPU - {"pcie_replay"}
    assert found["pcie_replay"].status is Verdict.UNSUPPORTED
    # Nothing at all is held against it: it can be lent.
    assert {each.status for each in found.values()} == {Verdict.OK, Verdict.UNSUPPORTED}
    assert found["pcie_gen"].status is Verdict.OK
    lending = judged(tmp_path / "again", lending=True)
    assert Verdict.FAIL not in {each.status for each in lending.values()}
    assert not {"remap_failure", "ecc_mode", "inforom"} & set(found)


@pytest.mark.parametrize(
    ("check", "changes", "status", "remedy"),
    [
        ("temperature", {"hwmon/hwmon5/temp3_input": "86000"}, "warn", "hwmon*/temp*_input"),
        ("temperature", {"hwmon/hwmon5/temp2_input": "100000"}, "fail", "fans"),
        (
            "power_limit",
            {"hwmon/hwmon5/power1_cap": "200000000"},
            "warn",
            f"echo 300000000 | tee /sys/bus/pci/devices/{ADDRESS}/hwmon/hwmon*/power1_cap",
        ),
        ("ecc_uncorrected", {"ras/gfx_err_count": "ue: 2\nce: 0"}, "fail", "systemctl reboot"),
        ("retired_pages", {"ras/gpu_vram_bad_pages": "0x1 : 0x1000 : P"}, "warn", "reboot"),
        ("retired_pages", {"ras/gpu_vram_bad_pages": "0x1 : 0x1000 : F"}, "warn", "reboot"),
        (
            "retired_pages",
            {"ras/gpu_vram_bad_pages": "0x1 : 0x1000 : R\n" * 655},
            "fail",
            "have the maker replace the card",
        ),
        (
            "retired_pages",
            {"ras/gpu_vram_bad_pages": "0x1 : 0x1000 : R\n" * 590},
            "warn",
            "amd-smi",
        ),
    ],
)
def test_it_fires(
    tmp_path: Path, check: str, changes: Mapping[str, str], status: str, remedy: str
) -> None:
    found = judged(tmp_path, changes)[check]
    assert found.status == status
    assert remedy in found.remedy
    assert "nvidia" not in found.remedy


def test_pages_that_wait_keep_it_from_being_lent(tmp_path: Path) -> None:
    waiting = {"ras/gpu_vram_bad_pages": "0x1 : 0x1000 : P"}
    assert judged(tmp_path, waiting, lending=True)["retired_pages"].status is Verdict.FAIL


def test_a_few_pages_of_a_large_memory_are_usual(tmp_path: Path) -> None:
    pages = {"ras/gpu_vram_bad_pages": "0x1 : 0x1000 : R\n" * 589}
    assert judged(tmp_path, pages)["retired_pages"].status is Verdict.OK


def test_replays_are_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_at(FakeKernel(planted(tmp_path / "machine"), drivers={}), tmp_path)
    count = tmp_path / f"machine/sys/bus/pci/devices/{ADDRESS}/pcie_replay_count"
    said, clock = [], 1000.0
    for replays in (4, 8, 900_000):
        count.write_text(f"{replays}\n")
        clock += 120
        monkeypatch.setattr(replayfile, "now", lambda at=clock: at)
        _, report = machine.judged()
        said += [each["status"] for each in checks(report) if each["id"] == "pcie_replay"]
    assert said == ["unsupported", "ok", "warn"]


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({f"hwmon/hwmon5/temp{each}_crit": None for each in (1, 2, 3)}, "temperature"),
        ({"hwmon/hwmon5/power1_cap_default": None}, "power_limit"),
        ({"ras/umc_err_count": None, "ras/gfx_err_count": None}, "ecc_uncorrected"),
        ({"ras/gpu_vram_bad_pages": None}, "retired_pages"),
        ({"pcie_replay_count": None}, "pcie_replay"),
    ],
)
def test_what_it_does_not_tell_is_no_verdict(
    tmp_path: Path, changes: Mapping[str, str | None], check: str
) -> None:
    found = judged(tmp_path, changes)[check]
    assert (found.status, found.number) == (Verdict.UNSUPPORTED, None)


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"ras/umc_err_count": "Query currently inaccessible"}, "ecc_uncorrected"),
        ({"ras/gpu_vram_bad_pages": "who knows"}, "retired_pages"),
        ({"hwmon/hwmon5/power1_cap": "a lot"}, "power_limit"),
        ({"hwmon/hwmon5/temp2_input": "hot"}, "temperature"),
        ({"pcie_replay_count": "many"}, "pcie_replay"),
    ],
)
def test_an_answer_that_is_none_fails(
    tmp_path: Path, changes: Mapping[str, str | None], check: str
) -> None:
    assert judged(tmp_path, changes)[check].status is Verdict.FAIL


def test_a_card_that_sleeps_is_not_woken(tmp_path: Path) -> None:
    found = judged(tmp_path, {"power/runtime_status": "suspended"})
    assert found["driver"].status is Verdict.UNSUPPORTED
    assert "sleeps" in found["driver"].brief
    assert not OF_AMDGPU & set(found)


def test_a_card_that_is_lost_is_not_asked(tmp_path: Path) -> None:
    machine = planted(tmp_path / "machine", lost=True)
    (gpu,) = look(Settings(root=machine, state=tmp_path / "state")).report.gpus
    found = {each.id: each for each in gpu.checks}
    assert found["gpu_lost"].status is Verdict.FAIL
    assert "does not answer" in found["driver"].brief
    assert not OF_AMDGPU & set(found)


def live(root: Path) -> Reader:
    """A reader that takes the tree for the running machine's."""
    reader = Reader(root)
    reader.top = None
    return reader


def test_a_card_that_hangs_is_given_up_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = planted(tmp_path)

    def hangs(paths: list[str], **_: object) -> dict[str, bytes | OSError]:
        """The controller answers no more from the first sensor on."""
        first = next(index for index, path in enumerate(paths) if "hwmon" in path)
        return {path: Path(path).read_bytes() for path in paths[:first]}

    monkeypatch.setattr(amdgpu, "read_apart", hangs)
    (found,) = read_amdgpu(live(root), read_host(root).gpus, deadline=5)
    assert found.memory_total == 64 * GIB
    for name in ("temperature", "power_limit", "ecc_uncorrected", "retired"):
        assert found.silent[name] is Silence.TIMEOUT
    monkeypatch.setattr("gpupt.cli.healthlook.read_amdgpu", lambda *_, **__: [found])
    (gpu,) = look(Settings(root=root, state=tmp_path / "state")).report.gpus
    late = {each.id: each for each in gpu.checks if each.status is Verdict.FAIL}
    assert {"temperature", "power_limit", "ecc_uncorrected", "retired_pages"} <= set(late)
    assert "journalctl -k -b -g amdgpu" in late["temperature"].remedy


def test_the_running_machine_is_asked_in_a_child(tmp_path: Path) -> None:
    pages = "0x1 : 0x1000 : R\n" * 1000
    root = planted(tmp_path, {"ras/gpu_vram_bad_pages": pages})
    (found,) = read_amdgpu(live(root), read_host(root).gpus, deadline=5)
    # A list longer than a page of memory is read to its end.
    assert found.retired == RetiredPages(1000, 0, pending=False)
    assert found.temperature_margin == 36


def test_one_sensor_that_does_not_answer_may_be_the_hot_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = planted(tmp_path)
    monkeypatch.setattr(
        amdgpu,
        "read_apart",
        lambda paths, **_: {
            path: Path(path).read_bytes() for path in paths if "temp2_input" not in path
        },
    )
    (found,) = read_amdgpu(live(root), read_host(root).gpus, deadline=5)
    assert found.temperature_margin is None
    assert found.silent["temperature_margin"] is Silence.TIMEOUT


def test_who_may_not_read_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = planted(tmp_path)
    monkeypatch.setattr(
        amdgpu,
        "read_apart",
        lambda paths, **_: {path: PermissionError(errno.EACCES, "") for path in paths},
    )
    (found,) = read_amdgpu(live(root), read_host(root).gpus, deadline=5)
    assert set(found.silent.values()) == {Silence.DENIED, Silence.UNSUPPORTED}
    assert found.silent["power_limit"] is Silence.DENIED


def answering(monkeypatch: pytest.MonkeyPatch, answer: OSError, *names: str) -> None:
    """The running machine's files, of which these answer with an error."""
    monkeypatch.setattr(
        amdgpu,
        "read_apart",
        lambda paths, **_: {
            path: answer if path.rpartition("/")[2] in names else Path(path).read_bytes()
            for path in paths
        },
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIME, errno.EBUSY])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("temp2_input", "temperature_margin"),
        ("umc_err_count", "ecc_uncorrected"),
        ("gpu_vram_bad_pages", "retired"),
        ("power1_cap", "power_limit"),
    ],
)
def test_an_error_is_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str, field: str
) -> None:
    root = planted(tmp_path)
    answering(monkeypatch, OSError(number, ""), name)
    (found,) = read_amdgpu(live(root), read_host(root).gpus, deadline=5)
    assert found.silent[field] is Silence.ERROR


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_sensor_that_the_card_has_not_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    root = planted(tmp_path)
    answering(monkeypatch, OSError(number, ""), "temp3_input", "gfx_err_count")
    (found,) = read_amdgpu(live(root), read_host(root).gpus, deadline=5)
    assert (found.temperature_margin, found.ecc_uncorrected) == (38, 0)


def test_errors_of_one_block_count_though_another_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = planted(tmp_path, {"ras/gfx_err_count": "ue: 7\nce: 0"})
    answering(monkeypatch, OSError(errno.EIO, ""), "umc_err_count")
    (found,) = read_amdgpu(live(root), read_host(root).gpus, deadline=5)
    assert found.ecc_uncorrected == 7


def test_a_card_that_falls_asleep_meanwhile_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = planted(tmp_path)
    answering(monkeypatch, PermissionError(errno.EPERM, ""), "temp1_input")
    assert read_amdgpu(live(root), read_host(root).gpus, deadline=5) == []


def test_one_that_hangs_keeps_no_other_from_answering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [
        replace(MI300X, address=f"0000:{bus:02x}:00.0", group=bus, more={**MI300X.more, **TOLD})
        for bus in (5, 6, 7)
    ]
    plant(tmp_path, cards, drivers=["amdgpu"])
    monkeypatch.setattr(
        amdgpu,
        "read_apart",
        lambda paths, **_: (
            {} if "0000:05" in paths[0] else {path: Path(path).read_bytes() for path in paths}
        ),
    )
    found = read_amdgpu(live(tmp_path), read_host(tmp_path).gpus, deadline=5)
    assert [each.temperature_margin for each in found] == [None, 36, 36]
    assert found[0].silent["temperature_margin"] is Silence.TIMEOUT


def test_a_list_of_several_pages_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sysfs gives a page at a time."""
    file = tmp_path / "list"
    file.write_text("0x1 : 0x1000 : R\n" * 1000)
    whole = os.read
    monkeypatch.setattr(os, "read", lambda number, most: whole(number, min(most, 4096)))
    assert amdgpu.much_of(str(file)).count(b"R") == 1000


def test_the_owner_s_rule_comes_first(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    health_file(tmp_path / "state").write_text("thresholds: {retired_warn: 1}\n")
    assert judged(tmp_path)["retired_pages"].status is Verdict.WARN


def test_a_look_at_a_recording_keeps_no_counts(tmp_path: Path) -> None:
    judged(tmp_path)
    assert not (tmp_path / "state" / replayfile.FILE).exists()
