"""The demo's report: summary.json as the contract has it, the page from the same values."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from demo_values import CLASSIFIER, GIB, HOST_PICTURE, SUMMARY, address, function

from gpupt.decide.facts import SeenGpu as NodeGpu
from gpupt.errors import Failed
from gpupt.model.demo import (
    UNREAD,
    Exercise,
    FunctionKind,
    Holding,
    HostGroup,
    PhaseStatus,
    SeenGpu,
    TimelineEntry,
)
from gpupt.model.pci import PciId
from gpupt.report.cluster import seen_json
from gpupt.report.demo_json import (
    classifier_result,
    exercises,
    seen_gpus,
    spark_result,
    summary_json,
)
from gpupt.report.demo_page import duration, gib, percent, render_demo_page, short_name
from gpupt.report.progress import LiveNarration, Narration, narration
from gpupt.report.tables import GpuName

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Tags(HTMLParser):
    """Notes tags that are not closed in order, and everything that the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"src", "srcset", "poster", "data"} or (name, tag) == ("href", "link"):
                self.fetched.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_summary_has_the_contracts_keys() -> None:
    data = summary_json(SUMMARY)
    assert json.loads(json.dumps(data)) == data
    assert (data["schema"], data["ok"], data["restored"]) == (1, True, True)
    assert data["host"]["emulated"] is True
    assert data["gpus"][0] == {
        "address": "0000:01:00.0",
        "id": "10de:2330",
        "name": "NVIDIA H100 80GB HBM3 (emulated)",
        "before": "uio_pci_generic",
        "during": "vfio-pci",
        "after": "uio_pci_generic",
        "lent_to": "gpu-1",
    }
    assert [gpu["lent_to"] for gpu in data["gpus"]] == ["gpu-1", "gpu-2", None]
    assert set(data["spark"]) == {"workers", "gpu_addresses", "job_seconds"}
    assert data["nodes"][1]["gpus_seen"][0]["device_id"] == "2330"
    assert data["nodes"][1]["exercises"][0]["factorial"] == "0x375f00"
    named = {"trained_on", "applied_to", "accuracy", "kappa", "majority_baseline", "parquet"}
    assert named <= set(data["classifier"])
    assert data["phases"]["classify"] == 263.0


def test_phases_of_one_name_are_added() -> None:
    twice = (TimelineEntry("up", 0, 2), TimelineEntry("up", 5, 6.5))
    assert summary_json(replace(SUMMARY, timeline=twice))["phases"] == {"up": 3.5}


def test_what_was_not_reached_is_null() -> None:
    data = summary_json(replace(SUMMARY, spark=None, classifier=None, ok=False, failure="it broke"))
    assert (data["spark"], data["classifier"], data["failure"]) == (None, None, "it broke")


def test_jobs_are_parsed() -> None:
    job: dict[str, Any] = {
        "workers": 2,
        "gpu_addresses": [{"host": "gpu-1", "task": 0, "addresses": ["0"]}],
        "job_seconds": 3,
    }
    assert spark_result(job).gpu_addresses[0].addresses == ("0",)
    data = summary_json(SUMMARY)["classifier"]
    assert classifier_result(data) == replace(CLASSIFIER, samples=())
    facts = {"gpus": [{"address": "07:00.0", "vendor_id": "10de", "device_id": "2330",
                       "class": "030200"}]}  # fmt: skip
    assert seen_gpus(facts) == (SeenGpu(address("07:00.0"), PciId(0x10DE, 0x2330), 0x030200),)
    shown = {"gpus": [{"address": "07:00.0", "vendor_id": "10de", "device_id": "2330"}]}
    assert seen_gpus(shown) == (SeenGpu(address("07:00.0"), PciId(0x10DE, 0x2330)),)
    for factorial in (0x375F00, "0x375f00", "375f00"):
        printed = {"gpus": [{"address": "07:00.0", "factorial": factorial, "dma": True}]}
        assert exercises(printed) == (Exercise(address("07:00.0"), 3628800, True),)


def test_what_up_prints_of_a_node_is_what_the_demo_reads() -> None:
    told = NodeGpu("0000:07:00.0", PciId(0x10DE, 0x2330))
    assert seen_gpus({"gpus": [seen_json(told)]}) == (
        SeenGpu(address("07:00.0"), PciId(0x10DE, 0x2330)),
    )


@pytest.mark.parametrize(
    ("parse", "job"),
    [
        (spark_result, {"workers": 2}),
        (spark_result, {"workers": "many", "gpu_addresses": [], "job_seconds": 1}),
        (classifier_result, {"confusion": [[1, 2], [3]]}),
        (seen_gpus, {"gpus": [{"address": "07:00.0"}]}),
        (seen_gpus, {"gpus": None}),
        (exercises, {}),
    ],
)
def test_a_job_that_prints_something_else_is_an_error(parse: Any, job: dict[str, Any]) -> None:
    with pytest.raises(Failed, match="other than its JSON object"):
        parse(job)


def test_the_page_is_whole_and_fetches_nothing() -> None:
    page = render_demo_page(SUMMARY)
    tags = Tags()
    tags.feed(page)
    assert (tags.wrong, tags.open) == ([], [])
    assert all(source.startswith("data:") for source in tags.fetched)
    assert len(tags.fetched) == len(CLASSIFIER.samples)
    assert not re.search(r"@import|url\(|<script", page)


def test_the_page_says_what_is_emulated_and_synthetic() -> None:
    page = render_demo_page(SUMMARY)
    for words in ("emulated host", "synthetic sheets", "Not shown here", "CUDA"):
        assert words in page
    real = replace(SUMMARY, host=replace(HOST_PICTURE, emulated=False, name="box", iommu="VT-d"))
    assert "emulated host</li>" not in render_demo_page(real)


def test_the_page_shows_every_function_at_each_moment() -> None:
    page = render_demo_page(SUMMARY)
    for group in HOST_PICTURE.groups:
        for each in group.functions:
            assert page.count(f">{each.address} {each.id}<") == 3
    assert page.count(">vfio-pci<") == 3  # three functions, during alone
    assert "0x375f00" in page


def test_a_demo_that_failed_says_where_and_what_is_left() -> None:
    failed = TimelineEntry("up", 1, 2, PhaseStatus.FAILED, "gpu-2 did not answer")
    stuck = function("04:00.0", PciId(0x10DE, 1), 0x030200, "stuck", driver="nvidia", after=None)
    groups = (*HOST_PICTURE.groups, HostGroup(14, (stuck,)))
    page = render_demo_page(
        replace(
            SUMMARY,
            ok=False,
            restored=False,
            failure="gpu-2 did not answer",
            timeline=(failed,),
            host=replace(HOST_PICTURE, groups=groups),
            nodes=(),
            spark=None,
            classifier=None,
        )
    )
    assert "not every GPU was given back" in page
    assert "Stopped in the phase “up”" in page
    assert "gpu-2 did not answer" in page
    assert "no driver" in page
    assert '<li class="bad">not restored</li>' in page


def test_text_from_outside_is_escaped() -> None:
    page = render_demo_page(replace(SUMMARY, cluster="<b>&", failure="<script>alert(1)</script>"))
    assert "<script>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_a_page_of_nothing_is_still_a_page() -> None:
    empty = replace(
        SUMMARY, ok=False, timeline=(), host=replace(HOST_PICTURE, groups=()), nodes=(),
        spark=None, classifier=None, seconds=0.0,
    )  # fmt: skip
    tags = Tags()
    page = render_demo_page(empty)
    tags.feed(page)
    assert tags.wrong == []
    assert "stopped before there was a host" in page


def test_the_classifier_is_held_against_simpler_answers() -> None:
    page = render_demo_page(SUMMARY)
    assert "71.0 %" in page
    assert "mean colour" in page
    bare = replace(SUMMARY, classifier=replace(CLASSIFIER, colour_baseline=None))
    assert "mean colour" not in render_demo_page(bare)


def test_a_demo_that_failed_proves_nothing() -> None:
    assert "Shown here, for real" in render_demo_page(SUMMARY)
    page = render_demo_page(replace(SUMMARY, ok=False, failure="it broke"))
    assert "Shown here, for real" not in page


def test_a_function_without_a_name_is_told_by_its_kind() -> None:
    sound = HOST_PICTURE.groups[1].functions[1]
    assert short_name(replace(sound, name="")) == "sound function"
    assert short_name(sound) == "NVIDIA TU104 HD Audio (emulated)"


def test_what_was_not_read_is_not_claimed() -> None:
    groups = tuple(
        replace(
            group,
            functions=tuple(replace(each, during=UNREAD, after=UNREAD) for each in group.functions),
        )
        for group in HOST_PICTURE.groups
    )
    failed = replace(
        SUMMARY, ok=False, restored=False, host=replace(HOST_PICTURE, groups=groups), nodes=()
    )
    data = summary_json(failed)
    assert data["proves"] == []
    assert {(gpu["during"], gpu["after"], gpu["lent_to"]) for gpu in data["gpus"]} == {
        (None, None, None)
    }
    assert all(gpu["before"] for gpu in data["gpus"])
    page = render_demo_page(failed)
    assert "not read: nothing is known" in page
    assert "no GPU was lent" in page


def test_groups_without_gpus_are_counted_and_not_drawn() -> None:
    disk = function("00:01.0", PciId(0x1AF4, 0x1001), 0x010000, "", kind=FunctionKind.OTHER,
                    driver="virtio-pci")  # fmt: skip
    own = HostGroup(1, (disk,))
    page = render_demo_page(replace(SUMMARY, host=replace(HOST_PICTURE, groups=(own,))))
    assert "1 further group of the host’s own devices was left alone" in page
    assert "IOMMU group 1<" not in page
    moved = HostGroup(1, (replace(disk, after=Holding(None)),))
    page = render_demo_page(replace(SUMMARY, host=replace(HOST_PICTURE, groups=(moved,))))
    assert page.count("IOMMU group 1<") == 3


def test_a_group_with_several_holders_is_drawn_so() -> None:
    port = function("00:04.0", PciId(0x8086, 1), 0x060400, "port", kind=FunctionKind.BRIDGE)
    one = function("01:00.0", PciId(0x10DE, 1), 0x030200, "one", lent_to="gpu-1")
    other = replace(one, address=address("01:00.1"), during=Holding(None, "gpupt"))
    group = HostGroup(9, (port, one, other))
    page = render_demo_page(replace(SUMMARY, host=replace(HOST_PICTURE, groups=(group,))))
    assert page.count(">several<") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3725, "62 min 05 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_and_shares() -> None:
    assert (gib(2 * GIB), gib(GIB * 5 // 2)) == ("2 GiB", "2.5 GiB")
    assert percent(0.934, 2400) == "93.4 % (92.3 to 94.3)"
    assert percent(1.0, 10) == "100.0 % (72.2 to 100.0)"


def test_phases_are_plain_lines_away_from_a_terminal() -> None:
    out = io.StringIO()
    with narration(out) as told:
        assert type(told) is Narration
        with told.phase("up", "two nodes"):
            told.say("gpu-1 is ready")
        with pytest.raises(ValueError, match="x"), told.phase("down"):
            raise ValueError("x")
    first, second, third, fourth, fifth = out.getvalue().splitlines()
    assert first.endswith("up: two nodes")
    assert second == "gpu-1 is ready"
    assert "up: done after" in third
    assert fourth.endswith("down")
    assert "down: failed after" in fifth
    assert "\x1b" not in out.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_phase_while_it_goes_on() -> None:
    out = Terminal()
    with narration(out) as told:
        assert isinstance(told, LiveNarration)
        with told.phase("up", "two nodes"):
            told.say("[gpu-1] is ready")
    assert "[gpu-1] is ready" in out.getvalue()
    assert "✓ up: done after" in out.getvalue()


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (None, "Advanced Micro Devices [AMD/ATI] Navi 31 [Radeon RX 7900] (boot display)"),
        (40, "AMD/ATI Radeon RX 7900 (boot display)"),
        (30, "AMD/ATI Radeon… (boot display)"),
        (9, "(boot display)"),
    ],
)
def test_name_gives_way_and_its_notes_do_not(room: int | None, said: str) -> None:
    name = "Advanced Micro Devices [AMD/ATI] Navi 31 [Radeon RX 7900]"
    assert GpuName(name, "(boot display)").within(room) == said


def test_name_without_what_it_is_sold_as_is_cut() -> None:
    assert GpuName("ASPEED Graphics Family", "").within(12) == "ASPEED Gra…"
