"""docs/failure-modes.md is held to the code: every id is in it, every test it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from test_doctor import CASES

from gpupt.decide.doctor import CHECKS, ELSEWHERE

HERE = Path(__file__).resolve().parents[2]
PAGE = (HERE / "docs/failure-modes.md").read_text()
CELL = re.compile(r"`([^`]+)`")


def rows(title: str) -> dict[str, list[str]]:
    """The rows of a section's table by their id: the other cells."""
    text = PAGE[PAGE.index(f"## {title}") :].partition("\n## ")[0] + "\n"
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_every_id_of_the_code_is_in_the_table_and_no_other() -> None:
    assert list(rows("What doctor finds")) == list(CHECKS)
    assert list(rows("What doctor leaves to others")) == list(ELSEWHERE)


def test_every_row_says_what_is_read_and_names_a_test_of_each_kind() -> None:
    for name, (read, fires, silent) in rows("What doctor finds").items():
        assert read
        assert CELL.findall(fires) == [f"test_doctor.py::test_fires[{name}-0]"]
        assert CELL.findall(silent) == [f"test_doctor.py::test_is_silent[{name}-0]"]
        assert CASES[name]


def test_every_test_that_is_named_exists() -> None:
    named = {
        test
        for title in ("What doctor finds", "What doctor leaves to others")
        for _, *cells in rows(title).values()
        for test in CELL.findall("".join(cells))
    }
    files = sorted({f"tests/unit/{test.partition('::')[0]}" for test in named})
    asked = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *files],
        cwd=HERE, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    collected = {line.removeprefix("tests/unit/") for line in asked.stdout.splitlines()}
    # A test of several cases is named with or without the case.
    collected |= {line.partition("[")[0] for line in collected}
    assert named <= collected


def test_the_sum_of_the_crash_matrix_is_right() -> None:
    figures = re.findall(r"^\| `\w+` \| \w+ \| (\d+) \| (\d+) \|$", PAGE, re.M)
    tried, recovered = (sum(int(row[column]) for row in figures) for column in (0, 1))
    assert f"Together {recovered} of {tried}." in PAGE
    assert (tried, recovered) != (0, 0)
    assert recovered == tried
