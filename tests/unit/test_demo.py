"""The demo's own promises: what failed first is told, nothing old is taken for new."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from gpupt.cli import demo
from gpupt.cli.context import Settings
from gpupt.cli.demostory import afterwards
from gpupt.cli.main import cli
from gpupt.errors import BadInput, DeadlineExceeded, Failed
from gpupt.lab import host
from gpupt.lab.host import labs_folder
from gpupt.lab.machine import CONSOLE


def failing(brief: str) -> None:
    raise Failed(brief, details="evidence of it")


def test_the_first_failure_is_told_and_the_second_below_it() -> None:
    with (
        pytest.raises(DeadlineExceeded, match="up took too long") as caught,
        afterwards(lambda: failing("down was refused")),
    ):
        raise DeadlineExceeded("up took too long", details="the node's console", remedy="wait")
    assert "the node's console" in caught.value.details
    assert "and then: down was refused" in caught.value.details
    assert "evidence of it" in caught.value.details
    assert caught.value.remedy == "wait"


def test_what_fails_only_afterwards_is_told() -> None:
    with pytest.raises(Failed, match="not as it was"), afterwards(lambda: failing("not as it was")):
        pass


def test_an_interrupt_still_tidies_up_and_stays_an_interrupt() -> None:
    tidied = []

    def tidy() -> None:
        tidied.append(True)
        failing("down was refused")

    with pytest.raises(KeyboardInterrupt), afterwards(tidy):
        raise KeyboardInterrupt
    assert tidied


def test_the_console_of_a_demo_that_failed_is_kept(tmp_path: Path) -> None:
    folder = labs_folder(tmp_path) / "demo"
    folder.mkdir(parents=True)
    (folder / CONSOLE).write_text("Kernel panic - not syncing\n")
    ended = host.Lab(
        name="demo",
        folder=folder,
        pid=1,
        started="another boot/1",
        port=1,
        image="aaaa000011112222",
        accelerator="tcg",
        cpus=2,
        memory=8 << 30,
        topology="default",
        images=(),
    )
    host.write_record(ended)
    report = tmp_path / "report"
    with (
        pytest.raises(Failed, match="connection was lost") as caught,
        demo.words_kept(tmp_path, "demo", report),
    ):
        failing("the connection was lost")
    assert any("Kernel panic" in line for line in caught.value.details)
    assert "Kernel panic" in (report / CONSOLE).read_text()


@pytest.mark.parametrize("name", ["../images", "", ".", "two words", "UPPER"])
def test_a_name_that_is_no_folder_of_its_own_touches_nothing(tmp_path: Path, name: str) -> None:
    kept = tmp_path / "state" / "images" / "kept"
    kept.mkdir(parents=True)
    report = tmp_path / "report"
    report.mkdir()
    (report / demo.SUMMARY).write_text("{}")
    words = ["--state", str(tmp_path / "state"), "lab", "demo", "--report", str(report)]
    done = CliRunner().invoke(cli, [*words, "--name", name], obj=Settings())
    assert isinstance(done.exception, BadInput) or done.exit_code == 2, done.output
    assert kept.is_dir()
    assert (report / demo.SUMMARY).read_text() == "{}"
    for action in (host.find_lab, host.need_lab):
        with pytest.raises(BadInput):
            action(tmp_path / "state", name)


def test_an_earlier_success_is_not_left_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_demo(*_: object, report: Path, **__: object) -> None:
        seen.append((report / demo.SUMMARY).exists())
        raise RuntimeError("a defect")

    monkeypatch.setattr(demo, "run_demo", run_demo)
    monkeypatch.setattr(demo, "require_memory", lambda _: None)
    report = tmp_path / "report"
    report.mkdir()
    (report / demo.SUMMARY).write_text('{"ok": true}')
    words = ["--state", str(tmp_path / "state"), "lab", "demo", "--report", str(report)]
    done = CliRunner().invoke(cli, words, obj=Settings())
    assert isinstance(done.exception, RuntimeError)
    assert seen == [False]
    assert not (report / demo.SUMMARY).exists()
