"""docs/health.md is held to the code: its checks, their rules and tests, and its table of Xids."""

from __future__ import annotations

import re
from pathlib import Path

import test_health_judge
from test_health_judge import FIRES, SILENT

from gpupt.decide.health import CHECKS, ELSEWHERE, OF_CARD, OF_MACHINE
from gpupt.decide.health_memory import BAD_PAGE_COVER
from gpupt.decide.xid import CATALOGUE, CURABLE, VERDICTS, Action
from gpupt.edges.healthfile import health_file, read_rules

PAGE = (Path(__file__).resolve().parents[2] / "docs/health.md").read_text()


def rows(title: str) -> list[list[str]]:
    """The cells of every row of a section's tables, but for their heads."""
    text = PAGE[PAGE.index(f"## {title}\n") :].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in {"id", "asks for"}]


def numbers(cell: str) -> set[int]:
    """The numbers of ``8, 39–41``."""
    found: set[int] = set()
    for part in cell.split(", "):
        first, _, last = part.partition("–")
        found.update(range(int(first), int(last or first) + 1))
    return found


def test_every_check_is_in_the_table_with_its_source_and_rule() -> None:
    table = [row for row in rows("The checks") if len(row) == 5]
    assert [row[0] for row in table] == [f"`{check}`" for check in CHECKS]
    for (_, source, rule, remedy, _), check in zip(table, CHECKS.values(), strict=True):
        assert (source, rule) == (check.source, check.rule)
        assert remedy


def test_every_row_names_a_test_that_exists() -> None:
    for name, *_, fires in (row for row in rows("The checks") if len(row) == 5):
        check = name.strip("`")
        assert fires == f"`test_health_judge.py::test_fires[{check}-0]`"
        assert FIRES[check]
        assert SILENT[check]
    assert hasattr(test_health_judge, "test_fires")
    assert hasattr(test_health_judge, "test_is_silent")


def test_what_is_found_out_elsewhere_is_told() -> None:
    table = [row for row in rows("The checks") if len(row) == 2]
    assert table == [[f"`{check}`", where] for check, where in ELSEWHERE.items()]


def test_every_rule_has_a_check_and_every_check_a_rule() -> None:
    assert set(CHECKS) == set(OF_CARD) | set(OF_MACHINE)
    assert not set(ELSEWHERE) & set(CHECKS)


def test_the_table_of_xids_is_the_catalogue() -> None:
    table = rows("Xids")
    assert [row[0] for row in table] == [action.value for action in Action]
    for (_, xids, verdict, content), action in zip(table, Action, strict=True):
        known = {number for number, asks in CATALOGUE.items() if asks is action}
        assert (numbers(xids) if known else xids) == (known or "any other")
        assert verdict == VERDICTS[action].value
        assert content == ("one milder" if action in CURABLE else "the same")


def test_the_figures_in_the_rules_are_the_thresholds() -> None:
    defaults = test_health_judge.Thresholds()
    said = {check: re.findall(r"\d+(?:\.\d+)?", rule.rule) for check, rule in CHECKS.items()}
    assert said["remap_uncorrectable"][-1] == f"{defaults.remap_uncorrectable_fail:g}"
    assert said["retired_pages"] == [
        f"{defaults.retired_warn:g}",
        f"{defaults.retired_fail:g}",
        f"{defaults.retired_double_most:g}",
        *("0.9", f"{BAD_PAGE_COVER >> 20}", "1"),
    ]
    assert said["temperature"] == [f"{defaults.margin_warn:g}", f"{defaults.margin_fail:g}"]
    assert said["pcie_gen"] == [f"{defaults.busy_utilization:g}"]
    assert said["aer"] == [f"{defaults.aer_corrected_warn:g}"]
    per_lane = defaults.replays_per_lane
    for figure, generation in (("15.4", 4), ("30.7", 5)):
        assert figure in said["pcie_replay"]
        assert round(per_lane[generation] * 16, 1) == float(figure)


def test_the_rules_that_are_shown_are_rules(tmp_path: Path) -> None:
    shown = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert len(shown) == 1
    health_file(tmp_path).write_text(shown[0])
    thresholds, expected = read_rules(tmp_path)
    assert (expected.count, expected.nvlinks, expected.mig) == (8, 18, False)
    assert thresholds.for_model("NVIDIA H100 80GB HBM3").margin_warn == 15
    assert thresholds.for_model("Tesla T4").margin_warn == thresholds.margin_warn == 12
