"""What is told of health: to people, to Nagios and to Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpupt.model.health import CheckResult, GpuHealth, HealthReport, Verdict
from gpupt.model.pci import PciAddress
from gpupt.report.health import (
    Reports,
    cluster_json,
    exit_code,
    health_json,
    health_lines,
    nagios_line,
    plain,
    prometheus_text,
)

OK, WARN, FAIL, UNSUPPORTED = Verdict.OK, Verdict.WARN, Verdict.FAIL, Verdict.UNSUPPORTED
ADDRESSES = tuple(
    PciAddress.parse(f"0000:{bus:02x}:00.0")
    for bus in (0x19, 0x2D, 0x3B, 0x4C, 0x9B, 0xAB, 0xBB, 0xCB)
)
TEMPERATURE = CheckResult(
    "temperature", OK, "54 °C below", value="54 °C", threshold="10 °C", number=54, unit="celsius"
)
COUNT = CheckResult("gpu_lost", OK, "the card answers", value="present", number=0)


def card(
    *checks: CheckResult, address: PciAddress = ADDRESSES[0], name: str = "NVIDIA H100 80GB HBM3"
) -> GpuHealth:
    return GpuHealth(address, "GPU-3a1b", name, "nvidia", checks)


def limit(address: PciAddress) -> CheckResult:
    """The check that a card's power limit is low, as it is judged of each card."""
    return CheckResult(
        "power_limit",
        WARN,
        "it may use 650 W of 700 W",
        value="650 W",
        threshold="700 W",
        remedy=f"nvidia-smi -i {address} -pl 700",
        number=650,
        unit="W",
    )


REPORT = HealthReport(
    (card(COUNT, TEMPERATURE),), (CheckResult("nvml", OK, "NVML answers", value="580.95"),)
)
LOST = [
    CheckResult(name, FAIL, "the card is lost to its driver", value="lost", remedy="reseat it")
    for name in ("gpu_lost", "temperature", "ecc_mode")
]
SICK = replace(REPORT, gpus=(card(*LOST), card(COUNT, address=ADDRESSES[1])))
EIGHT = HealthReport(tuple(card(COUNT, limit(each), address=each) for each in ADDRESSES))


def lines(reports: Reports, *, everything: bool = False) -> list[str]:
    return health_lines(reports, everything=everything, colour=False)


# For people


def test_what_is_well_is_a_table_alone() -> None:
    assert lines({"": REPORT}) == [
        "GPU           HEALTH  DRIVER  FAIL  WARN  OK  N/A  NAME",
        "0000:19:00.0  ok      nvidia  –     –     2   –    NVIDIA H100 80GB HBM3",
    ]


def test_what_is_wrong_comes_first_the_worst_before_the_rest() -> None:
    both = HealthReport((card(limit(ADDRESSES[0])), *SICK.gpus[:0], card(*LOST)))
    said = lines({"": both})
    assert said[0].startswith("fail")
    assert [line[:4] for line in said if line[:4] in {"fail", "warn"}] == ["fail", "warn"]
    assert said.index("") < said.index(next(line for line in said if line.startswith("GPU")))


def test_one_cause_that_fails_many_checks_is_told_once() -> None:
    assert lines({"": SICK})[:3] == [
        "fail  0000:19:00.0  gpu_lost and 2 more: the card is lost to its driver",
        "      → reseat it",
        "",
    ]


def test_one_finding_of_many_cards_is_told_once_with_all_of_them() -> None:
    said = lines({"": EIGHT})
    assert said[:6] == [
        "warn  8 GPUs  power_limit: it may use 650 W of 700 W",
        "      0000:19:00.0  0000:2d:00.0  0000:3b:00.0  0000:4c:00.0  0000:9b:00.0",
        "      0000:ab:00.0  0000:bb:00.0  0000:cb:00.0",
        "      rule: 700 W",
        "      → nvidia-smi -i ADDRESS -pl 700",
        "",
    ]


def test_what_differs_is_not_told_as_one() -> None:
    other = replace(limit(ADDRESSES[1]), brief="it may use 300 W of 700 W")
    lower = replace(limit(ADDRESSES[2]), threshold="500 W")
    worse = replace(limit(ADDRESSES[3]), status=FAIL)
    changed = (other, lower, worse)
    cards = [card(check, address=ADDRESSES[n + 1]) for n, check in enumerate(changed)]
    said = lines({"": HealthReport((*EIGHT.gpus[:1], *cards))})
    assert sum(line.startswith("warn") for line in said) == 3
    assert sum(line.startswith("fail") for line in said) == 1
    assert not any("GPUs" in line for line in said)


def test_eight_cards_fit_a_terminal_of_80_columns() -> None:
    said = health_lines({"": EIGHT}, colour=False, width=80)
    assert max(map(len, said)) <= 80
    assert sum("NVIDIA H100 80GB HBM3" in line for line in said) == 8
    whole = health_lines({"": EIGHT}, everything=True, colour=False, width=80)
    assert max(map(len, whole)) <= 80


def test_a_name_of_pci_ids_is_what_the_card_is_sold_as() -> None:
    named = card(COUNT, name="NVIDIA Corporation GH100 [H100 SXM5 80GB]")
    assert lines({"": HealthReport((named,))})[-1].endswith("  NVIDIA H100 SXM5 80GB")


def test_nodes_stand_by_their_names() -> None:
    gone = HealthReport((), (CheckResult("node", FAIL, "compute-1 did not answer SSH"),))
    said = lines({"compute-0": REPORT, "compute-1": gone})
    assert said[0] == "fail  compute-1  node: compute-1 did not answer SSH"
    assert said[-2].split()[:2] == ["NODE", "GPU"]
    assert said[-1].split()[:2] == ["compute-0", "0000:19:00.0"]
    both = lines({"compute-0": SICK, "compute-1": SICK})
    assert both[0].startswith("fail  2 GPUs  gpu_lost and 2 more")
    assert both[1].split() == ["compute-0/0000:19:00.0", "compute-1/0000:19:00.0"]


def test_every_check_has_a_line_where_all_is_wanted() -> None:
    said = lines({"": REPORT}, everything=True)
    assert [line.split()[:3] for line in said[-3:]] == [
        ["machine", "nvml", "ok"],
        ["0000:19:00.0", "gpu_lost", "ok"],
        ["0000:19:00.0", "temperature", "ok"],
    ]


# What programs read


@pytest.mark.parametrize(
    ("reports", "status"),
    [
        ({"": REPORT}, 0),
        ({"": EIGHT}, 1),
        ({"": SICK}, 2),
        ({"a": REPORT, "b": SICK}, 2),
        ({"": HealthReport(())}, 3),
        ({}, 3),
        # What is well of a machine says nothing of GPUs that are not there.
        ({"": HealthReport((), REPORT.machine)}, 3),
        ({"": HealthReport((), (CheckResult("gpu_count", OK, "0 GPUs"),))}, 0),
        ({"": HealthReport((card(CheckResult("xid", UNSUPPORTED, "")),))}, 3),
    ],
)
def test_the_exit_status_is_nagios_s(reports: Reports, status: int) -> None:
    assert exit_code(reports) == status


def test_json_of_a_machine_and_of_a_cluster() -> None:
    told = health_json(REPORT)
    assert (told["status"], told["gpus"][0]["address"]) == ("ok", "0000:19:00.0")
    assert health_json(HealthReport((), REPORT.machine))["status"] == "unsupported"
    both = cluster_json("herbarium", {"compute-0": REPORT, "compute-1": SICK})
    assert (both["cluster"], both["status"]) == ("herbarium", "fail")
    assert both["nodes"]["compute-0"] == told


# https://nagios-plugins.org/doc/guidelines.html, 2.6: 'label'=value[UOM]
DATUM = re.compile(r"'([^'=]+)'=(-?[0-9.]+)(s|us|ms|%|B|KB|MB|GB|TB|c)?")


@pytest.mark.parametrize("reports", [{"": REPORT}, {"": SICK}, {"": EIGHT}, {"": HealthReport(())}])
def test_nagios_gets_one_line(reports: Reports) -> None:
    line = nagios_line(reports)
    assert "\n" not in line
    text, bar, data = line.partition(" | ")
    assert re.match(r"GPU (OK|WARNING|CRITICAL|UNKNOWN) - \S", text)
    assert "|" not in text
    rest = data
    while rest:
        found = DATUM.match(rest)
        assert found, rest
        rest = rest[found.end() :].lstrip(" ")
    assert bool(bar) == bool(data)


def test_the_line_for_nagios_in_words() -> None:
    assert nagios_line({"": REPORT}) == "GPU OK - 1 GPU well | '0000:19:00.0 temperature'=54"
    assert nagios_line({"": SICK}) == (
        "GPU CRITICAL - 0000:19:00.0 gpu_lost and 2 more: the card is lost to its driver"
    )
    assert nagios_line({"": EIGHT}).startswith(
        "GPU WARNING - 8 GPUs (0000:19:00.0, 0000:2d:00.0, 0000:3b:00.0, …) power_limit: it may"
    )
    assert nagios_line({"": HealthReport(())}) == "GPU UNKNOWN - no GPU here"
    blind = HealthReport((card(CheckResult("xid", UNSUPPORTED, "")),))
    assert nagios_line({"": blind}) == "GPU UNKNOWN - nothing could be checked"


def test_neither_a_bar_nor_a_newline_of_a_message_breaks_the_line() -> None:
    told = CheckResult("xid", FAIL, "Xid 13: a | b\nc")
    line = nagios_line({"": HealthReport((card(told, TEMPERATURE),))})
    assert line.count("|") == 1
    assert "a / b c" in line


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (16, "16"), (12345678, "12345678"), (0.96, "0.96"), (-4, "-4"), (1e-9, "0"),
     (100, "100"), (1.0, "1"), (2e12, "2000000000000")],
)  # fmt: skip
def test_a_number_has_all_its_digits_and_no_exponent(number: float, text: str) -> None:
    assert plain(number) == text


# https://prometheus.io/docs/instrumenting/exposition_formats/, the text format
SAMPLE = re.compile(
    r'^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\\\|\\"|\\n)*",?)*)\})? (\S+)$'
)
ODD = 'a "quoted"\\back\nslash'


def samples(text: str) -> dict[tuple[str, str], float]:
    """The file as a strict reader has it: each metric described first, in one piece, and no
    series twice."""
    found: dict[tuple[str, str], float] = {}
    described: list[str] = []
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            described.append(line.split()[2])
        elif line.startswith("# TYPE "):
            assert line.split()[2:] == [described[-1], "gauge"]
        else:
            sample = SAMPLE.match(line)
            assert sample, line
            assert sample[1] == described[-1]
            key = (sample[1], sample[2] or "")
            assert key not in found
            found[key] = float(sample[3])
    assert len(described) == len(set(described))
    return found


def metrics() -> str:
    twice = [CheckResult("baseline", each, "", number=1) for each in (OK, FAIL, WARN)]
    odd = replace(REPORT, gpus=(card(COUNT, TEMPERATURE, name=ODD),), machine=tuple(twice))
    return prometheus_text({"": odd, "compute-0": EIGHT}, seconds=1_700_000_000.4)


def test_metrics_are_read_back() -> None:
    found = samples(metrics())
    gpu = 'node="compute-0",address="0000:2d:00.0",uuid="GPU-3a1b",name="NVIDIA H100 80GB HBM3"'
    assert found[("gpupt_gpu_health", f'{gpu},driver="nvidia"')] == 1
    subject = 'subject="compute-0/0000:2d:00.0"'
    assert found[("gpupt_health_check", f'{subject},check="power_limit"')] == 1
    assert found[("gpupt_health_value", f'{subject},check="power_limit",unit="W"')] == 650
    assert found[("gpupt_health_status", "")] == 2
    assert found[("gpupt_health_time_seconds", "")] == 1_700_000_000
    # Of two results of one name the worst: a series that stands twice spoils the whole file.
    assert found[("gpupt_health_check", 'subject="machine",check="baseline"')] == 2


def test_a_machine_without_gpus_has_metrics_too() -> None:
    found = samples(prometheus_text({"": HealthReport(())}, seconds=1.0))
    assert found == {("gpupt_health_status", ""): 3, ("gpupt_health_time_seconds", ""): 1}


READER = """
import json, sys
from prometheus_client.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    for sample in family.samples:
        print(json.dumps([sample.name, sample.labels, sample.value]))
"""


@pytest.mark.packaging
def test_prometheus_s_own_reader_agrees(tmp_path: Path) -> None:
    made = [[sys.executable, "-m", "venv", str(tmp_path / "v")]]
    made.append([str(tmp_path / "v/bin/pip"), "install", "-q", "prometheus_client"])
    for words in made:
        subprocess.run(words, check=True, timeout=300)
    done = subprocess.run(
        [tmp_path / "v/bin/python", "-c", READER],
        input=metrics(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(samples(metrics()))
    labels = {"node": "", "address": "0000:19:00.0", "uuid": "GPU-3a1b", "driver": "nvidia"}
    assert ["gpupt_gpu_health", {**labels, "name": ODD}, 0.0] in found
    assert ["gpupt_health_check", {"subject": "machine", "check": "baseline"}, 2.0] in found
