"""What a card was, and what changed of it since."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_health_judge import CARD, GEN5, OTHER, WELL, device

from gpupt.decide.baseline import UPDATED, against_baseline, take_baseline
from gpupt.edges.baselinefile import baseline_file, read_baseline, write_baseline, write_whole
from gpupt.errors import BadInput, Failed
from gpupt.model.baseline import Baseline, CardBaseline
from gpupt.model.gpus import find_gpus
from gpupt.model.health import (
    CheckResult,
    DriverReading,
    GpuHealth,
    GpuReading,
    HealthReport,
    Library,
    Silence,
    Verdict,
)
from gpupt.model.host import Host
from gpupt.model.pci import PciDevice

FACTS = {
    "id": "10de:2330",
    "link-width": "16",
    "link-most-speed": "32.0",
    "uuid": "GPU-3a1b",
    "serial": "1320",
    "vbios": "96.00.74",
    "inforom": "G520.0200",
    "gsp": "550.90",
    "driver": "550.90",
    "memory": str(80 << 30),
    "power-limit": "700.0",
    "nvlinks": "18",
}
MEASURED = {CARD: {"host-to-device": 55.0, "device": 2900.0}}


def taken(*devices: PciDevice, readings: tuple[GpuReading, ...] = (WELL,), **more: Any) -> Baseline:
    found = {each.address: each for each in devices or (device(),)}
    return take_baseline(
        Host(devices=found, groups={}, gpus=find_gpus(found)),
        DriverReading(Library.ANSWERED, driver="550.90", gpus=readings),
        recorded="2026-01-01T00:00:00+00:00",
        **more,
    )


def health(*addresses: Any) -> HealthReport:
    """A report in which each card has one check that is well."""
    answers = CheckResult("gpu_lost", Verdict.OK, "the card answers")
    return HealthReport(
        tuple(GpuHealth(each, None, None, "nvidia", (answers,)) for each in addresses or (CARD,))
    )


def compared(then: Baseline, now: Baseline, *addresses: Any) -> CheckResult:
    """What is said of the first card."""
    return against_baseline(health(*addresses), now=now, then=then).gpus[0].checks[-1]


def test_the_facts_of_a_card() -> None:
    facts = taken().cards[CARD].facts
    assert {name: facts[name] for name in FACTS} == FACTS
    assert set(facts) - set(FACTS) <= {"subsystem", "numa-node", "iommu-group"}
    assert "vbios" not in taken(readings=()).cards[CARD].facts


def test_what_does_not_answer_is_not_recorded() -> None:
    assert taken(device(lost=True)).cards == {}
    silent = GpuReading(OTHER, silent={"handle": Silence.LOST})
    assert list(taken(device(), device(OTHER), readings=(WELL, silent)).cards) == [CARD]


def test_nothing_changed() -> None:
    said = compared(taken(), taken())
    assert (said.status, said.value) == (Verdict.OK, "unchanged")
    assert said.brief == "as on 2026-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"vbios": "96.00.75"}, Verdict.WARN),
        ({"inforom": "G520.0201"}, Verdict.WARN),
        ({"gsp": "580.1"}, Verdict.WARN),
        ({"power_limit": 600.0}, Verdict.WARN),
        ({"uuid": "GPU-other"}, Verdict.FAIL),
        ({"serial": "1321"}, Verdict.FAIL),
        ({"nvlinks": WELL.nvlinks and WELL.nvlinks[:17]}, Verdict.FAIL),
        ({"memory_total": 60 << 30}, Verdict.FAIL),
        ({"vbios": "96.00.75", "serial": "1321"}, Verdict.FAIL),
        # As much as a driver keeps for itself, or not even that.
        ({"memory_total": (80 << 30) - (512 << 20)}, Verdict.OK),
        ({"memory_total": 81 << 30}, Verdict.OK),
        ({"temperature": 90, "memory_used": 70 << 30}, Verdict.OK),
    ],
)
def test_what_nvml_tells_otherwise(changes: dict[str, Any], status: Verdict) -> None:
    said = compared(taken(), taken(readings=(replace(WELL, **changes),)))
    assert said.status is status
    if status is not Verdict.OK:
        assert "→" in (said.value or "")
        assert said.remedy.startswith("gpupt health --record")


@pytest.mark.parametrize(
    ("now", "status"),
    [
        (device(link=replace(GEN5, width=8)), Verdict.FAIL),
        (device(link=replace(GEN5, max_speed=16.0)), Verdict.FAIL),
        (device(link=replace(GEN5, speed=2.5)), Verdict.OK),
        (device(device=0x2335), Verdict.FAIL),
        (device(iommu_group=4), Verdict.WARN),
        (device(numa_node=1), Verdict.WARN),
    ],
)
def test_what_sysfs_tells_otherwise(now: PciDevice, status: Verdict) -> None:
    then = taken(device(iommu_group=3, numa_node=0))
    kept = {"iommu_group": 3, "numa_node": 0}
    given = {name: getattr(now, name) for name in kept}
    now = replace(now, **{name: kept[name] if v is None else v for name, v in given.items()})
    assert compared(then, taken(now)).status is status


@pytest.mark.parametrize(
    ("rate", "status"), [(50.0, Verdict.OK), (60.0, Verdict.OK), (49.0, Verdict.FAIL)]
)
def test_a_bandwidth_may_fall_a_little(rate: float, status: Verdict) -> None:
    then = taken(measured=MEASURED)
    now = taken(measured={CARD: {"host-to-device": rate}})
    assert compared(then, now).status is status


def test_what_is_not_told_now_is_said_and_not_judged() -> None:
    then = taken(measured=MEASURED)
    lent = compared(then, taken(device(driver="vfio-pci"), readings=()))
    assert lent.status is Verdict.OK
    assert lent.brief.endswith(
        "not told now: uuid, serial, vbios, inforom, gsp, driver, memory, power-limit, nvlinks"
    )


def test_a_card_that_does_not_answer_cannot_be_compared() -> None:
    said = compared(taken(), taken(device(lost=True)))
    assert (said.status, "does not answer" in said.brief) == (Verdict.FAIL, True)


def test_cards_that_are_gone_are_one_check_of_the_machine() -> None:
    then = taken(device(), device(OTHER))
    found = against_baseline(health(), now=taken(), then=then)
    (gone,) = found.machine
    assert (gone.status, gone.value, gone.number) == (Verdict.FAIL, "1 gone", 1)
    assert str(OTHER) in gone.brief
    assert str(OTHER) in gone.remedy
    assert against_baseline(health(CARD, OTHER), now=then, then=then).machine == ()


def test_a_new_card_warns() -> None:
    both = taken(device(), device(OTHER))
    found = against_baseline(health(CARD, OTHER), now=both, then=taken())
    assert [gpu.checks[-1].status for gpu in found.gpus] == [Verdict.OK, Verdict.WARN]
    assert found.gpus[1].checks[-1].value == "new"


def test_a_figure_written_by_hand_is_compared_as_text() -> None:
    then = Baseline("then", {CARD: CardBaseline(CARD, {"memory": "80 GiB"})})
    assert compared(then, taken()).status is Verdict.FAIL


def test_what_is_updated_is_among_the_facts() -> None:
    known = set(taken(device(iommu_group=3, numa_node=0)).cards[CARD].facts)
    assert known >= UPDATED


# The file


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    baseline = taken(device(), device(OTHER), measured=MEASURED)
    file = baseline_file(tmp_path / "state")
    write_baseline(file, baseline)
    assert read_baseline(file) == baseline
    assert [each.name for each in file.parent.iterdir()] == ["baseline.json"]


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", '{"cards": {}}', '{"recorded": "x", "cards": []}', "\x00",
     '{"recorded": "x", "cards": {"0000:41:00.0": 3}}', '{"recorded": "x", "cards": {"x": {}}}'],
)  # fmt: skip
def test_what_is_damaged_is_no_baseline(tmp_path: Path, text: str) -> None:
    file = tmp_path / "b.json"
    file.write_text(text)
    with pytest.raises(BadInput, match="is no baseline") as caught:
        read_baseline(file)
    assert "--record" in caught.value.remedy


def test_none_is_told_apart_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no baseline"):
        read_baseline(tmp_path / "b.json")
    with pytest.raises(BadInput, match="is no baseline"):
        read_baseline(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a/b.json"
    write_whole(file, "one")
    assert file.read_text() == "one"

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(Failed, match="cannot write") as caught:
        write_whole(file, "two")
    assert "No space left" in caught.value.details[0]
    assert file.read_text() == "one"
    assert [each.name for each in file.parent.iterdir()] == ["b.json"]


@pytest.mark.parametrize("place", ["/dev/null", "/dev/full"])
def test_a_device_is_not_replaced_by_a_file(place: str) -> None:
    with pytest.raises(Failed, match="no regular file"):
        write_whole(Path(place), "text")
    assert not Path(place).is_file() or Path(place).is_symlink()
