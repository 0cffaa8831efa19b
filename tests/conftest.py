"""Fixtures that every tier may use; the folder of this file is on the import path."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
FIGURE = "figure"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate", action="store_true", help="Write the golden files anew, and fail."
    )


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Have a line printed at the end of the run, and kept in its report."""
    return lambda line: record_property(FIGURE, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures of the tests that passed."""
    reports = terminalreporter.getreports("passed")
    told = [text for each in reports for name, text in each.user_properties if name == FIGURE]
    if told:
        terminalreporter.section("figures")
        for line in told:
            terminalreporter.line(str(line))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], None]]:
    """Hold a text against the golden file of that name; a missing one fails."""
    written = []

    def hold(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--regenerate"):
            if not file.exists() or file.read_text() != text:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                written.append(name)
            return
        assert file.exists(), f"no golden file {name}: pytest --regenerate writes it"
        assert text == file.read_text(), f"{name} differs: pytest --regenerate writes it anew"

    yield hold
    if written:
        pytest.fail(f"written anew: {', '.join(written)}; look at the differences, and run again")


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: for tests that put hundreds of entries on disk."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="gpupt-test-", dir=shared) as folder:
        yield Path(folder)
