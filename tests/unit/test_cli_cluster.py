"""Verbs about clusters and rolls as they are typed, against libvirt's test driver."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from fakekernel import FakeKernel
from machines import MACHINES, emulated_host

from gpupt.actions import Plan, RemoveCluster
from gpupt.cli import context, lab
from gpupt.cli.context import Settings, consent, terminal_width
from gpupt.cli.main import cli, main
from gpupt.decide.layers import is_hosts
from gpupt.edges.hypervisor import Hypervisor, what_to_do
from gpupt.edges.journal import Journal, read_past_clusters
from gpupt.edges.rolls import read_rolls
from gpupt.errors import BadInput, GpuptError
from gpupt.lab.story import Inside

SPEC = """\
cluster: herbarium
rolls: [spark]
nodes:
  - {name: frontend, role: frontend, cpus: 1, memory: 128 MiB}
  - {name: compute-0, role: compute, cpus: 1, memory: 128 MiB, gpus: ["0000:02:00.0"]}
"""


class Said:
    """What a command answered: its exit status as main() gives it, and its streams."""

    def __init__(self, *words: str, settings: Settings) -> None:
        result = CliRunner().invoke(cli, ["--connect", "test:///default", *words], obj=settings)
        error = result.exception
        if error is not None and not isinstance(error, GpuptError | SystemExit):
            raise error
        self.status = error.exit_code if isinstance(error, GpuptError) else result.exit_code
        self.out, self.err = result.stdout, f"{result.stderr}{error or ''}"


@pytest.fixture
def live(tmp_path: Path) -> Settings:
    """A machine with a kernel that reacts."""
    kernel: FakeKernel = emulated_host(tmp_path / "machine")
    return Settings(root=kernel.root, state=tmp_path / "state", kernel=lambda root: kernel)


@pytest.fixture
def spec(tmp_path: Path) -> str:
    file = tmp_path / "c.yaml"
    file.write_text(SPEC)
    return str(file)


def remember(settings: Settings, verb: str, name: str) -> None:
    with Journal(settings.state) as journal:
        journal.end(journal.begin(Plan(verb, name, ())), outcome="undone")


def test_down_of_a_name_never_heard_of_is_bad_input(live: Settings) -> None:
    said = Said("down", "herbarium", "--yes", settings=live)
    assert (said.status, said.out) == (2, "")
    assert "there is no cluster 'herbarium'" in said.err
    assert "there is no cluster at all" in said.err
    remember(live, "detach", "herbarium")
    assert Said("down", "herbarium", "--yes", settings=live).status == 2


def test_down_of_a_name_misspelt_names_the_near_one(live: Settings) -> None:
    record = live.state / "clusters/herbarium/cluster.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    said = Said("down", "herbarum", "--yes", settings=live)
    assert (said.status, "did you mean 'herbarium'?" in said.err) == (2, True)


@pytest.mark.parametrize("verb", ["up", "down"])
def test_down_of_what_is_down_already_is_nothing_to_do(live: Settings, verb: str) -> None:
    remember(live, verb, "herbarium")
    assert read_past_clusters(live.state) == {"herbarium"}
    said = Said("down", "herbarium", "--yes", settings=live)
    assert (said.status, "nothing to do" in said.err) == (0, True)
    assert '"restored": true' in Said("down", "herbarium", "--json", settings=live).out


def test_nothing_is_remembered_where_there_is_no_journal(tmp_path: Path) -> None:
    assert read_past_clusters(tmp_path / "none") == frozenset()


def test_plan_is_data(live: Settings, spec: str) -> None:
    said = Said("plan", spec, settings=live)
    assert said.status == 0, said.err
    assert "start      herbarium/compute-0" in said.out
    assert "start  " not in said.err
    again = Said("up", spec, "--dry-run", settings=live)
    assert again.out == said.out
    asked = Said("up", spec, settings=live)
    assert (asked.status, asked.out, "start  " in asked.err) == (2, "", True)


def test_plan_that_wants_the_boot_display_says_what_can_be_done(live: Settings, spec: str) -> None:
    Path(spec).write_text(SPEC.replace("02:00.0", "03:00.0"))
    said = Said("plan", spec, settings=live)
    assert said.status == 3
    assert "gpupt detach 0000:03:00.0 --boot-gpu" in said.err
    Path(spec).write_text(SPEC.replace("0000:02:00.0", "big"))
    assert f"aliases in {live.state}/aliases.yaml: none" in Said("plan", spec, settings=live).err


@pytest.mark.parametrize("roll", ["gpupt", "emulator", "host"])
def test_rolls_of_hosts_are_refused_for_nodes(live: Settings, spec: str, roll: str) -> None:
    Path(spec).write_text(SPEC.replace("[spark]", f"[{roll}]"))
    said = Said("plan", spec, settings=live)
    assert (said.status, f"roll {roll!r} is not for nodes" in said.err) == (2, True)
    assert read_rolls()[roll].summary in said.err
    assert not is_hosts("spark", read_rolls())


@pytest.mark.parametrize(
    "words",
    [
        ["detach", "02:00.0", "--yes"],
        ["detach", "--all"],
        ["attach", "--all", "--yes"],
        ["recover", "--yes"],
        ["up", "c.yaml", "--yes"],
        ["down", "herbarium", "--yes"],
    ],
)
def test_recorded_tree_is_never_changed(tmp_path: Path, words: list[str]) -> None:
    kernel = emulated_host(tmp_path)
    before = kernel.tree()
    said = Said("--root", str(tmp_path), *words, settings=Settings())
    assert said.status == 2
    assert f"{tmp_path} is a recorded tree" in said.err
    assert kernel.tree() == before


def test_recorded_tree_may_be_planned_for(tmp_path: Path) -> None:
    emulated_host(tmp_path)
    said = Said("--root", str(tmp_path), "detach", "--all", "--dry-run", settings=Settings())
    assert (said.status, "bind  " in said.out) == (0, True)


def test_no_at_the_prompt_is_confirmed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal: Any = SimpleNamespace(isatty=lambda: True, fileno=lambda: 2)
    monkeypatch.setattr(context, "sys", SimpleNamespace(stdin=terminal, stderr=terminal))
    monkeypatch.setattr(click, "confirm", lambda *_, **__: False)
    plan = Plan("down", "herbarium", (RemoveCluster("herbarium", why="its keys"),))
    assert not consent(Settings(), plan, dry_run=False, yes=False)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("nothing was touched\n")


def test_state_that_is_no_folder_is_bad_input(tmp_path: Path, live: Settings) -> None:
    file = tmp_path / "journal"
    file.write_text("")
    for verb in (["list"], ["status"], ["detach", "--all", "--yes"], ["image", "list"]):
        said = Said("--state", str(file), *verb, settings=live)
        assert (said.status, f"{file} is not a folder" in said.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "near"), [(["plna"], "plan"), (["lab", "dmeo"], "demo"), (["roll", "lst"], "list")]
)
def test_verb_misspelt_names_the_near_one(live: Settings, words: list[str], near: str) -> None:
    said = Said(*words, settings=live)
    assert (said.status, f"did you mean '{near}'?" in said.err) == (2, True)


def test_detach_all_with_no_gpu_says_what_was_looked_for(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path, drivers={})
    (tmp_path / "sys/bus/pci/devices").mkdir(parents=True, exist_ok=True)
    bare = Settings(root=tmp_path, state=tmp_path / "state", kernel=lambda root: kernel)
    said = Said("detach", "--all", "--yes", settings=bare)
    assert said.status == 3
    assert "this host has no GPU" in said.err
    assert "→ gpupt lab up" in said.err


def test_unwritable_folders_are_told_and_no_traceback(tmp_path: Path, live: Settings) -> None:
    # As another user's: root, who runs tests too, is denied nothing.
    live.state.mkdir()
    (live.state / "layers").write_text("")
    assert Said("image", "prune", "--dry-run", settings=live).status == 0
    said = Said("image", "prune", settings=live)
    assert (said.status, "layers cannot be written" in said.err) == (1, True)
    said = Said("snapshot", str(live.state / "layers/host.tar.gz"), settings=live)
    assert (said.status, "cannot write" in said.err) == (1, True)


def test_prune_does_not_guess_what_is_in_use(
    live: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    (live.state / "clusters").mkdir(parents=True)
    monkeypatch.setattr("gpupt.edges.leftovers.os.access", lambda *_: False)
    said = Said("image", "prune", "--dry-run", settings=live)
    assert (said.status, "which images are in use is not known" in said.err) == (1, True)


def test_denied_is_told_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "/root/x")

    monkeypatch.setattr(cli, "main", denied)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "gpupt: permission denied: /root/x\n  → run gpupt as root" in capsys.readouterr().err


def test_rolls_are_listed_with_what_they_need(live: Settings) -> None:
    head, *lines = Said("roll", "list", settings=live).out.splitlines()
    assert head.split() == ["ROLL", "VERSION", "NEEDS", "SUMMARY"]
    needs = {line.split()[0]: line for line in lines}
    assert "spark, tensorflow" in needs["classifier"]
    assert needs["tensorflow=cuda"].endswith("(variant cuda)")
    assert Said("roll", "verify", settings=live).out.splitlines()[-1].startswith("ok: ")


@pytest.mark.parametrize("uri", ["bogus", "bogus:///system"])
@pytest.mark.parametrize("verb", [["doctor"], ["down", "herbarium", "--yes"]])
def test_what_is_no_uri_is_bad_usage(uri: str, verb: list[str]) -> None:
    said = Said("--connect", uri, *verb, settings=Settings())
    assert (said.status, f"{uri!r} is no URI" in said.err) == (2, True)
    assert "systemctl" not in said.err


def test_libvirt_not_installed_is_not_libvirt_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    which = "gpupt.edges.hypervisor.shutil.which"
    monkeypatch.setattr(which, lambda *_, **__: None)
    assert "./quickstart --setup-only host" in what_to_do("qemu:///system")
    assert "runs on far" in what_to_do("qemu+ssh://root@far/system")
    monkeypatch.setattr(which, lambda *_, **__: "/usr/sbin/libvirtd")
    assert what_to_do("qemu:///system").startswith("systemctl start libvirtd")
    with pytest.raises(BadInput):
        Hypervisor.connect("nonsense")


def test_demo_with_too_little_memory_is_refused_and_keeps_an_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: Settings
) -> None:
    monkeypatch.setattr(lab, "available_memory", lambda: 8 << 30)
    (tmp_path / "summary.json").write_text("earlier")
    said = Said("lab", "demo", "--report", str(tmp_path), settings=live)
    assert said.status == 3
    assert "needs 10.0 GiB of memory, and 8.0 GiB are available" in said.err
    assert (tmp_path / "summary.json").read_text() == "earlier"
    assert not (tmp_path / "index.html").exists()


def test_accepted_failure_that_prints_nothing_is_no_second_failure() -> None:
    done = SimpleNamespace(status=2, stdout="", stderr="there is no cluster 'herbarium'")
    ssh: Any = SimpleNamespace(run=lambda *_, **__: done)
    inside = Inside(ssh, lambda line: None)
    assert inside.gpupt("down", "herbarium", deadline=1, accept=(0, 2)) == {}
    with pytest.raises(GpuptError, match="status 2"):
        inside.gpupt("down", "herbarium", deadline=1)


@pytest.mark.parametrize("machine", MACHINES)
def test_list_fits_a_terminal_of_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    kernel = MACHINES[machine](tmp_path)
    monkeypatch.setattr("gpupt.cli.host.terminal_width", lambda: 80)
    settings = Settings(root=kernel.root, state=tmp_path / "state")
    lines = Said("list", settings=settings).out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert sum(line.endswith(" (boot display)") for line in lines) == 1
    models = ("RTX 2060 Mobile", "H100 SXM5 80GB", "Tesla T4", "(boot display)")
    assert all(any(model in line for model in models) for line in lines[1:])


def test_a_plan_is_as_wide_as_the_terminal_that_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
    monkeypatch.delenv("COLUMNS", raising=False)
    with os.fdopen(theirs, "w") as terminal:
        assert terminal_width(terminal) == 57
        monkeypatch.setenv("COLUMNS", "99")
        assert terminal_width(terminal) == 99
    os.close(ours)
    with open(os.devnull, "w") as nobody:
        assert terminal_width(nobody) is None
