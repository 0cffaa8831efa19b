"""The units that keep a Prometheus file fresh: systemd takes them, and they travel in the wheel."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpupt.cli.health import health
from gpupt.edges import resources

HERE = Path(__file__).resolve().parents[2]
SERVICE, TIMER = "gpupt-health.service", "gpupt-health.timer"
FOLDER = HERE / "examples/systemd"
OUTPUT = Path("/var/lib/prometheus/node-exporter/gpupt.prom")


def unit(name: str) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(FOLDER / name)
    return parsed


def words() -> list[str]:
    return unit(SERVICE)["Service"]["ExecStart"].split()


def test_they_travel_with_the_examples() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(HERE / "setup.cfg")
    pattern = metadata["options.package_data"]["gpupt.examples"]
    carried = {path.name for path in (HERE / "examples").glob(pattern)}
    assert carried >= {SERVICE, TIMER}
    assert (resources.resource_folder("examples") / "systemd" / SERVICE).is_file()


def test_what_is_run_is_a_command_that_there_is() -> None:
    assert words() == [
        "/usr/local/bin/gpupt", "health", "--prometheus", "--output", str(OUTPUT)
    ]  # fmt: skip
    # --help is looked at before anything is done, and after every option was understood.
    assert CliRunner().invoke(health, [*words()[2:], "--help"]).exit_code == 0


def test_it_may_write_where_it_writes_and_nowhere_else() -> None:
    service = unit(SERVICE)["Service"]
    assert service["ProtectSystem"] == "strict"
    assert service["ReadWritePaths"].lstrip("-") == str(OUTPUT.parent)
    assert service["StateDirectory"] == "gpupt"


def test_a_card_that_is_not_well_is_no_failure_of_the_unit_and_no_answer_is() -> None:
    assert unit(SERVICE)["Service"]["SuccessExitStatus"].split() == ["1", "2"]


def test_the_page_names_them() -> None:
    assert f"examples/systemd/{SERVICE}" in (HERE / "docs/health.md").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_takes_them(tmp_path: Path) -> None:
    for name in (SERVICE, TIMER):
        # A program that this machine has, for it is looked for.
        text = (FOLDER / name).read_text().replace(words()[0], "/bin/true")
        (tmp_path / name).write_text(text)
    checked = [str(tmp_path / name) for name in (SERVICE, TIMER)]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *checked],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "gpupt-health" in line]
    assert (done.returncode, ours) == (0, [])
    (tmp_path / TIMER).write_text((tmp_path / TIMER).read_text().replace("minutely", "often"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *checked],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # So that its silence above says something.
    assert "gpupt-health.timer" in done.stderr
