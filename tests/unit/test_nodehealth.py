"""The health of a node's GPUs: gpupt is packed, sent, run there, and believed in what it is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from boards import BOARDS
from clusters import BARE, GPU, machine, node, spec_of
from test_health_report import COUNT, EIGHT, REPORT, SICK, TEMPERATURE, card

from gpupt.cli import healthlook
from gpupt.cli.context import Settings
from gpupt.decide.allocation import allocate
from gpupt.decide.nodehealth import accusing, counted, hosts_of, in_the_node, keeps_back
from gpupt.edges import nodehealth
from gpupt.edges.nodehealth import NEEDED, ask_node, pack, parse_report, read_check
from gpupt.edges.process import Completed
from gpupt.errors import BadInput, DeadlineExceeded, Failed
from gpupt.model.cluster import Placement
from gpupt.model.health import CheckResult, HealthReport, Verdict
from gpupt.model.pci import PciAddress
from gpupt.report.health import health_json

SYSTEM = Path("/usr/bin/python3")
FAILED = CheckResult("remap_failure", Verdict.FAIL, "rows could not be remapped", value="yes")
HERE = tuple(PciAddress.parse(f"0000:{bus:02x}:00.0") for bus in (5, 6, 7))


def newest(python: Path) -> bool:
    """Whether it is a Python that gpupt runs on."""
    words = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    return python.exists() and subprocess.run(words, timeout=60, check=False).returncode == 0


def names(archive: bytes) -> dict[str, int]:
    """What is in an archive, and with which mode."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return {each.name: each.mode for each in opened}


# What is sent


def test_the_archive_is_the_same_twice_and_another_with_other_rules() -> None:
    first = pack(b"")
    pack.cache_clear()
    assert pack(b"") == first
    assert pack(b"expect: {count: 1}\n") != first


def test_it_holds_four_packages_and_the_rules_and_nothing_else() -> None:
    found = names(pack(b""))
    assert {name.split("/")[0].removesuffix(".py") for name in found} == set(NEEDED)
    assert all(name.endswith(".py") for name in found)
    assert not any("/lab/" in name or "__pycache__" in name for name in found)
    assert set(found.values()) == {0o600}
    assert "state/health.yaml" not in found
    assert set(names(pack(b"expect: {}\n"))) - set(found) == {"state/health.yaml"}


def test_nothing_in_it_names_this_machine() -> None:
    with tarfile.open(fileobj=io.BytesIO(pack(b""))) as opened:
        for each in opened:
            assert (each.uid, each.gid, each.uname, each.gname, each.mtime) == (0, 0, "", "", 0)


def test_the_folders_of_a_wheel_stay_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel has rolls and playbooks inside the package."""
    for name in ("__init__.py", "edges/templates.py", "rolls/spark/files/job.py", "lab/x.py"):
        (tmp_path / "gpupt" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "gpupt" / name).touch()

    class Spec:
        origin = str(tmp_path / "gpupt/__init__.py")

    monkeypatch.setattr(nodehealth, "NEEDED", ("gpupt",))
    monkeypatch.setattr(nodehealth, "find_spec", lambda name: Spec)
    assert set(nodehealth.sources()) == {"gpupt/__init__.py", "gpupt/edges/templates.py"}
    monkeypatch.setattr(nodehealth, "find_spec", lambda name: None)
    with pytest.raises(Failed, match="gpupt is not installed"):
        nodehealth.sources()


@pytest.mark.skipif(not newest(SYSTEM), reason="the system has no Python 3.11")
def test_it_runs_on_a_bare_python(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(pack(b"expect: {count: 8}\n"))) as opened:
        opened.extractall(tmp_path / "x", filter="data")
    BOARDS["hgx"](tmp_path / "tree")
    # Without the modules that are installed there (-S), and without any setting.
    words = [SYSTEM, "-S", "-P", "-m", "gpupt.cli.main", "--root", tmp_path / "tree"]
    words += ["--state", tmp_path / "x/state", "health", "--json"]
    done = subprocess.run(
        words,
        env={"PYTHONPATH": str(tmp_path / "x")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # NVML was not asked of a planted tree, and that does not pass for well.
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    assert len(told["gpus"]) == 8
    assert {each["id"]: each["status"] for each in told["machine"]}["gpu_count"] == "ok"


# How it is asked


class Node:
    """A node that is this machine, whose devices are those of a tree."""

    name = "compute-0"

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.words: list[tuple[str, ...]] = []

    def run(
        self, argv: Sequence[str], *, deadline: float, stdin: str | None = None, check: bool = True
    ) -> Completed:
        self.words.append(tuple(argv))
        at = argv.index("gpupt.cli.main") + 1 if "gpupt.cli.main" in argv else len(argv)
        there = ["--root", str(self.tree)] if at < len(argv) else []
        words = [sys.executable if word == "python3" else word for word in argv]
        done = subprocess.run(
            [*words[:at], *there, *words[at:]],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=deadline,
            check=check,
        )
        return Completed(tuple(argv), done.returncode, done.stdout, done.stderr)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(nodehealth, "PLACE", str(tmp_path / "run/gpupt/health"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    BOARDS["hgx_one_lost"](tmp_path / "tree")
    return Node(tmp_path / "tree")


def ask(node: Any, state: Path, *, lending: bool = False) -> HealthReport:
    return ask_node(node, state=state, lending=lending, deadline=120)


def test_a_node_judges_as_this_machine_would(asked: Node, tmp_path: Path) -> None:
    here = healthlook.look(Settings(root=asked.tree, state=tmp_path / "state")).report
    assert ask(asked, tmp_path / "state") == here
    assert here.status is Verdict.FAIL
    # It is sent once: what is there already is asked only.
    sent = [words for words in asked.words if words[0] == "sh"]
    ask(asked, tmp_path / "state", lending=True)
    assert [words for words in asked.words if words[0] == "sh"] == sent
    assert len(sent) == 1
    assert asked.words[-1][-1] == "--lending"
    folder = next((tmp_path / "run/gpupt/health").iterdir())
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_was_cut_short_is_sent_again(asked: Node, tmp_path: Path) -> None:
    ask(asked, tmp_path / "state")
    folder = next((tmp_path / "run/gpupt/health").iterdir())
    (folder / "whole").unlink()
    (folder / "gpupt/cli/main.py").unlink()
    ask(asked, tmp_path / "state")
    assert (folder / "gpupt/cli/main.py").exists()


def test_an_archive_that_arrives_in_part_is_no_gpupt(tmp_path: Path) -> None:
    words = ["sh", "-c", nodehealth.UNPACK, "gpupt", str(tmp_path / "x")]
    done = subprocess.run(words, input="H4sIAAAA", capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert not (tmp_path / "x/whole").exists()


def test_the_host_s_rules_go_along(asked: Node, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "health.yaml").write_text("expect: {count: 7}\n")
    assert "gpu_count" in {each.id for each in ask(asked, state).machine}
    (state / "health.yaml").write_text("expect: {cuont: 7}\n")
    with pytest.raises(BadInput, match="unknown key") as caught:
        ask(asked, state)
    # By its place on this machine, and before anything is sent.
    assert f"at {state}/health.yaml:1:10" in caught.value.details


def test_a_node_that_does_not_end_in_time(asked: Node, tmp_path: Path) -> None:
    class Hanging(Node):
        def run(self, argv: Sequence[str], **more: Any) -> Completed:
            if argv[0] == "env":
                raise DeadlineExceeded("env on compute-0 did not end within 120 s")
            return super().run(argv, **more)

    with pytest.raises(DeadlineExceeded, match="did not end"):
        ask(Hanging(asked.tree), tmp_path / "state")


# What is believed


def done(stdout: str, *, status: int = 0, stderr: str = "") -> Completed:
    return Completed(("env",), status, stdout, stderr)


@pytest.mark.parametrize("report", [REPORT, SICK, EIGHT, HealthReport(())])
def test_a_report_is_read_back_whole(report: HealthReport) -> None:
    assert parse_report(done(json.dumps(health_json(report))), node="n") == report


def told(**changes: Any) -> str:
    """A report with something else in its first check."""
    made = health_json(REPORT)
    made["gpus"][0]["checks"][0] |= changes
    return json.dumps(made)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("", 0),
        ("", 127),
        ("no JSON", 0),
        ("[]", 0),
        ("null", 0),
        ("{}", 0),
        ('{"gpus": {}, "machine": 3}', 0),
        ('{"gpus": ["0000:05:00.0"], "machine": []}', 0),
        ('{"gpus": [{"address": 3}], "machine": []}', 0),
        ('{"gpus": [{"address": "here"}], "machine": []}', 0),
        (json.dumps(health_json(REPORT)), 1000),
        (json.dumps(health_json(REPORT)), -9),
        (told(status="fine"), 0),
        (told(number="many"), 0),
        (told(number=float("nan")), 0),
        (told(value=3), 0),
        (told()[:-5], 0),
    ],
)
def test_what_is_no_report_fails(text: str, status: int) -> None:
    said = done(text, status=status, stderr="Traceback\nso it went\n")
    with pytest.raises(Failed, match="compute-0 did not say how its GPUs are") as caught:
        parse_report(said, node="compute-0")
    assert caught.value.details[-1] == "so it went"
    assert "python3" in caught.value.remedy


# Whose card it is


def two_in_one() -> Placement:
    """A node that has both GPUs."""
    spec = spec_of(node("compute-0", count=2))
    return allocate(spec, host=machine("emulated_host")).of("compute-0")


def seen(*checks: tuple[CheckResult, ...]) -> HealthReport:
    """A node's report of as many GPUs as there are tuples, the last at the first address."""
    cards = [card(*each, address=at) for each, at in zip(checks, HERE, strict=False)]
    return HealthReport(tuple(reversed(cards)))


def test_the_node_s_addresses_are_the_host_s_in_their_order() -> None:
    assert hosts_of(seen((COUNT,), (COUNT,)), two_in_one()) == {HERE[0]: BARE, HERE[1]: GPU}
    assert hosts_of(seen((COUNT,)), two_in_one()) == {}
    assert hosts_of(seen((COUNT,), (COUNT,), (COUNT,)), two_in_one()) == {}


def test_a_check_that_fails_is_of_its_own_card() -> None:
    report = seen((COUNT, TEMPERATURE), (COUNT, FAILED))
    assert in_the_node(report, two_in_one()) == ((GPU, FAILED),)
    assert in_the_node(seen((COUNT,), (COUNT,)), two_in_one()) == ()
    assert in_the_node(seen((COUNT,), (replace(FAILED, status=Verdict.WARN),)), two_in_one()) == ()


def test_what_is_of_no_card_accuses_none() -> None:
    dead = CheckResult("nvml", Verdict.FAIL, "NVML is timeout", value="timeout")
    report = replace(seen((COUNT,), (COUNT,)), machine=(dead,))
    assert in_the_node(report, two_in_one()) == ((None, dead),)


def test_fewer_cards_than_were_lent_are_none_to_rely_on() -> None:
    found = in_the_node(seen((COUNT,)), two_in_one())
    assert [(at, check.id) for at, check in found] == [(None, "gpu_count")]


def test_what_a_node_says_cannot_move_the_host_s_cursor() -> None:
    told = {
        "id": "x" * 90, "status": "fail", "brief": "\x1b[2Jboo\nrm -rf", "value": "\x07",
        "threshold": None, "remedy": "y" * 9999, "number": None, "unit": "",
    }  # fmt: skip
    check = read_check(told)
    assert check.brief == "?[2Jboo?rm -rf"
    assert check.value == "?"
    assert (len(check.id), len(check.remedy)) == (40, 400)


def test_how_many_the_host_is_to_have_says_nothing_of_a_node() -> None:
    """What STATE/health.yaml expects is of the host."""
    wrong = CheckResult("gpu_count", Verdict.FAIL, "2 GPUs answer", threshold="8 GPUs")
    report = replace(seen((COUNT,), (COUNT,)), machine=(wrong,))
    assert in_the_node(report, two_in_one()) == ()
    (check,) = counted(report, two_in_one()).machine
    assert (check.status, check.threshold) == (Verdict.OK, "2")
    assert counted(seen((COUNT,)), two_in_one()).status is Verdict.FAIL


@pytest.mark.parametrize(
    ("check", "accused", "kept"),
    [
        (FAILED, True, True),
        (replace(FAILED, status=Verdict.WARN), False, False),
        (CheckResult("nvml", Verdict.FAIL, "", value="timeout"), True, True),
        (CheckResult("nvml", Verdict.FAIL, "", value="crashed"), True, True),
        # What is installed is no card's fault, and no node is ready with it.
        (CheckResult("nvml", Verdict.FAIL, "", value="mismatch"), False, True),
        (CheckResult("nvml", Verdict.FAIL, "", value="absent"), False, True),
        (CheckResult("nvml", Verdict.FAIL, "", value="no-driver"), False, True),
        # Who works on a card does it no harm.
        (CheckResult("processes", Verdict.FAIL, "processes use it: 7"), False, False),
    ],
)
def test_what_accuses_a_card(check: CheckResult, accused: bool, kept: bool) -> None:
    assert (bool(accusing((COUNT, check))), keeps_back(check)) == (accused, kept)


def test_a_card_that_a_broken_library_does_not_know_is_not_accused_of_it() -> None:
    unknown = CheckResult("driver", Verdict.FAIL, "NVML did not answer", value="nvidia")
    library = CheckResult("nvml", Verdict.FAIL, "", value="mismatch")
    assert accusing((unknown, library, FAILED)) == (FAILED,)
    assert accusing((unknown,)) == (unknown,)


def test_the_environment_of_the_tests_is_not_the_node_s(asked: Node, tmp_path: Path) -> None:
    """What runs is what was sent, not what is installed here."""
    ask(asked, tmp_path / "state")
    folder = next((tmp_path / "run/gpupt/health").iterdir())
    shown = subprocess.run(
        [sys.executable, "-P", "-c", "import gpupt; print(gpupt.__file__)"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == str(folder / "gpupt/__init__.py")
