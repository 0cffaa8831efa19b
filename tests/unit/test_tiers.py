"""./runtests tells the truth: what passed, what failed, and what was not run."""

from __future__ import annotations

import pytest
import tiers
from tiers import Counts, NotRun, Result, read_report, run_tier, summary

REPORT = """<testsuites><testsuite>
  <testcase classname="tests.a" name="good"/>
  <testcase classname="tests.a" name="bad"><failure message="no"/></testcase>
  <testcase classname="tests.a" name="broken"><error message="setup"/></testcase>
  <testcase classname="tests.a" name="away"><skipped message="no KVM"/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted_by_name() -> None:
    counts = read_report(REPORT)
    assert counts == Counts(1, ["tests.a::bad", "tests.a::broken"], ["tests.a::away: no KVM"])


def tier_of(monkeypatch: pytest.MonkeyPatch, outcome: Counts | Exception) -> Result:
    def run() -> Counts:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setitem(tiers.TIERS, "unit", run)
    return run_tier("unit")


@pytest.mark.parametrize(
    ("outcome", "word", "why"),
    [
        (Counts(passed=3), "passed", ""),
        (Counts(passed=3, failures=["x"]), "FAILED", ""),
        (Counts(passed=3, skips=["x: why"]), "passed", ""),
        (NotRun("no root here"), "NOT RUN", "no root here"),
        (Counts(skips=["x: no libvirtd", "y"]), "NOT RUN", "x: no libvirtd"),
        (Counts(), "NOT RUN", "it has no tests"),
    ],
)
def test_a_tier_that_did_not_run_is_never_called_passed(
    monkeypatch: pytest.MonkeyPatch, outcome: Counts | Exception, word: str, why: str
) -> None:
    result = tier_of(monkeypatch, outcome)
    assert (result.word, result.not_run) == (word, why)


def test_the_last_line_has_the_totals() -> None:
    lines = summary(
        [
            Result("lint", 1.0, Counts(passed=4)),
            Result("unit", 2.0, Counts(5, ["a::b"], ["c::d: why"])),
            Result("gpu", 0.0, Counts(), "no NVIDIA card"),
        ]
    )
    assert lines[-1] == "9 passed, 1 failed, 2 skipped"
    assert any("NOT RUN" in line and "no NVIDIA card" in line for line in lines)
    assert "    failed   a::b" in lines


@pytest.mark.parametrize(("failures", "status"), [([], 0), (["a::b"], 1)])
def test_the_exit_status_says_whether_anything_failed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failures: list[str],
    status: int,
) -> None:
    monkeypatch.setitem(tiers.TIERS, "unit", lambda: Counts(1, failures))
    assert tiers.main(["unit"]) == status
    assert capsys.readouterr().out.endswith(f"1 passed, {len(failures)} failed, 0 skipped\n")


def test_an_unknown_tier_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiers.main(["units"]) == 2
    assert "there are lint, unit" in capsys.readouterr().err


def test_a_command_that_fails_or_is_late_is_a_failure() -> None:
    assert tiers.command("good", ["true"]) == Counts(passed=1)
    assert tiers.command("bad", ["false"]).failures == ["bad: exit 1"]
    assert tiers.command("late", ["sleep", "5"], deadline=0.05).failures == ["late: exit 124"]


@pytest.mark.parametrize(
    ("cores", "gib", "hosts"), [(1, 64, 1), (2, 4, 1), (2, 23, 2), (8, 23, 2), (64, 500, 4)]
)
def test_as_many_emulated_hosts_as_the_machine_holds(cores: int, gib: int, hosts: int) -> None:
    meminfo = f"MemTotal: 1 kB\nMemAvailable:  {gib << 20} kB\nSwapFree: 0 kB\n"
    assert tiers.hosts_at_a_time(cores, meminfo) == hosts
