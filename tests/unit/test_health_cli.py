"""`gpupt health` as it is typed, on NVIDIA's own Python binding and a library that we made."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakenvml
import pytest
from click.testing import CliRunner
from fakenvml import ABORT, CRASH, DEAF, HANG, error
from healthhost import BOOT, QUIET, Machine, eight, hear, some
from test_health_report import REPORT, SICK
from test_nvml import library  # noqa: F401 (a fixture)

from gpupt.cli import health, healthlook
from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.edges.replayfile import FILE
from gpupt.edges.sysfs import read_host
from gpupt.errors import BadInput, DeadlineExceeded
from gpupt.model.health import HealthReport, Library, Silence
from gpupt.model.kernellog import KernelLog
from gpupt.model.pci import PciAddress

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

ONE = "0000:41:00.0"
# Seconds after which a question is given up that is never answered.
SHORT = 1.5
XID = "4,2,3000,-;NVRM: Xid (PCI:0000:41:00): 79, GPU has fallen off the bus.\n"


@pytest.fixture
def lone(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:  # noqa: F811
    """A machine with one H200."""
    return hear(some(tmp_path, ONE), library, monkeypatch)


@pytest.fixture
def hgx(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:  # noqa: F811
    """A machine with eight."""
    return hear(eight(tmp_path), library, monkeypatch)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for NVML."""
    monkeypatch.setattr(healthlook, "NVML_SECONDS", SHORT)


def checks(report: dict[str, Any], address: str = ONE) -> dict[str, dict[str, Any]]:
    (gpu,) = (each for each in report["gpus"] if each["address"] == address)
    return {each["id"]: each for each in gpu["checks"]}


def of_machine(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["id"]: each for each in report["machine"]}


# What the exit status is, and what JSON says


def test_a_card_that_is_well(lone: Machine) -> None:
    status, report = lone.judged()
    assert (status, report["schema"], report["status"]) == (0, 1, "ok")
    (gpu,) = report["gpus"]
    assert (gpu["address"], gpu["name"], gpu["driver"]) == (ONE, "NVIDIA H200", "nvidia")
    assert gpu["uuid"] == "GPU-00000000-0000-0000-0000-000000000041"
    assert checks(report)["temperature"] == {
        "id": "temperature",
        "status": "ok",
        "value": "54 °C margin",
        "threshold": "10 °C warns; 0 °C fails",
        "remedy": "",
        "brief": "54 °C below its slowdown, at 33 °C",
        "number": 54,
        "unit": "celsius",
    }
    assert of_machine(report)["nvml"]["status"] == "ok"
    assert checks(report)["retired_pages"]["status"] == "unsupported"


@pytest.mark.parametrize(
    ("changes", "status", "word", "check"),
    [
        ({"temperature_margin": 4}, 1, "warn", "temperature"),
        ({"remapped": (0, 1, 0, 1)}, 2, "fail", "remap_failure"),
        ({"error": 15}, 2, "fail", "gpu_lost"),
        ({"error": 16}, 2, "fail", "gpu_lost"),
        ({"lost_after": 10}, 2, "fail", "gpu_lost"),
        ({"handle": error(4)}, 2, "fail", "nvml"),
        ({"ecc_volatile": error(4)}, 2, "fail", "ecc_uncorrected"),
    ],
)
def test_a_card_that_is_not(
    lone: Machine, changes: dict[str, fakenvml.Value], status: int, word: str, check: str
) -> None:
    lone.let(ONE, **changes)
    found, report = lone.judged()
    assert (found, report["status"]) == (status, word)
    assert checks(report)[check]["status"] == word
    assert checks(report)[check]["remedy"]


def test_what_the_kernel_s_log_says_counts(lone: Machine) -> None:
    lone.file("dev/kmsg", QUIET + XID)
    status, report = lone.judged()
    assert status == 2
    assert checks(report)["xid"]["status"] == "fail"
    assert checks(report)["xid"]["value"] == "79"


def test_a_machine_without_gpus_is_of_unknown_health(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = some(tmp_path)
    monkeypatch.setattr(healthlook, "library_there", lambda: False)
    status, report = bare.judged()
    assert (status, report["status"], report["gpus"]) == (3, "unsupported", [])
    status, said = bare.type("health")
    assert (status, said.stdout) == (3, "no GPU was judged: there is none here\n")
    assert bare.type("health", "--nagios")[1].stdout == "GPU UNKNOWN - no GPU here\n"
    # Unless that is what there is to be.
    bare.rules("expect: {count: 0}\n")
    assert bare.type("health")[0] == 0
    bare.rules("expect: {count: 1}\n")
    assert bare.type("health")[0] == 2


def test_switches_without_gpus_are_not_well(hgx: Machine) -> None:
    """All eight gone from the bus, and nothing in the log: what is left says nothing of them."""
    for gpu in read_host(hgx.kernel.root).gpus:
        if str(gpu.address) in hgx.cards:
            (hgx.kernel.root / f"sys/bus/pci/devices/{gpu.address}").unlink()
    status, report = hgx.judged()
    assert (status, report["gpus"], report["status"]) == (3, [], "unsupported")


def test_a_recorded_tree_is_judged_by_its_files_alone(lone: Machine) -> None:
    lone.let(ONE, remapped=(0, 0, 0, 1))
    here = lone.settings
    recorded = Settings(root=here.root, state=here.state)
    done = CliRunner().invoke(cli, ["health", "--json"], obj=recorded)
    report = json.loads(done.stdout)
    # What sysfs alone says of a card is little, and does not pass for well.
    assert done.exit_code == 1
    assert [each["id"] for each in report["machine"] if each["status"] == "warn"] == ["nvml"]
    assert "remap_failure" not in {
        name for name, each in checks(report).items() if each["status"] != "unsupported"
    }
    assert checks(report)["pcie_width"]["status"] == "ok"


# Nothing that goes wrong is health


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"init": CRASH}, Library.CRASHED),
        ({"init": ABORT}, Library.CRASHED),
        ({"init": error(18)}, Library.MISMATCH),
        ({"init": error(9)}, Library.NO_DRIVER),
        ({"init": error(4)}, Library.DENIED),
        ({"init": error(999)}, Library.ERROR),
    ],
)
def test_a_library_that_does_not_serve_fails(
    lone: Machine, changes: dict[str, fakenvml.Value], value: Library
) -> None:
    lone.play(**changes)
    status, report = lone.judged()
    assert (status, of_machine(report)["nvml"]["status"]) == (2, "fail")
    assert of_machine(report)["nvml"]["value"] == value
    assert of_machine(report)["nvml"]["remedy"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("output", [(), ("--nagios",), ("--prometheus",), ("--json",)])
def test_a_library_that_hangs_fails_in_every_output(lone: Machine, output: tuple[str, ...]) -> None:
    lone.play(init=HANG)
    status, said = lone.type("health", *output)
    assert status == 2
    assert "nvml" in said.stdout


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("key", "way"),
    [
        *((key, way) for key in ("handle", "name", "inforom_check") for way in (HANG, CRASH)),
        # What no check asks for where nothing is expected of it.
        ("mig", HANG),
        ("mig", CRASH),
        ("temperature", DEAF),
        ("temperature", ABORT),
    ],
)
def test_a_call_that_never_comes_back_fails_the_card(lone: Machine, key: str, way: str) -> None:
    lone.let(ONE, **{key: way})
    status, report = lone.judged()
    assert (status, report["gpus"][0]["status"]) == (2, "fail")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("way", [HANG, CRASH])
@pytest.mark.parametrize("key", ["driver", "nvml"])
def test_a_library_that_gets_stuck_after_its_start_fails(lone: Machine, key: str, way: str) -> None:
    lone.play(**{key: way})
    status, report = lone.judged()
    assert (status, of_machine(report)["nvml"]["status"]) == (2, "fail")
    assert "in part" in of_machine(report)["nvml"]["brief"]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("way", "value"), [(HANG, "timeout"), (CRASH, "crashed")])
def test_a_library_that_no_card_needs_is_no_sign_of_health(
    library: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    value: str,
) -> None:
    lent = hear(some(tmp_path, ONE, driver="vfio-pci"), library, monkeypatch)
    assert lent.type("health")[0] == 0
    lent.play(init=way)
    status, report = lent.judged()
    assert (status, of_machine(report)["nvml"]["status"]) == (1, "warn")
    assert of_machine(report)["nvml"]["value"] == value


def test_no_library_while_a_card_is_on_its_driver(
    lone: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    # The loader stops at it, so that a library that this machine may have is not found.
    (empty / fakenvml.SONAME).write_text("no library at all")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(empty))
    status, report = lone.judged()
    assert (status, of_machine(report)["nvml"]["value"]) == (2, Library.ABSENT)


def test_one_lost_among_eight_leaves_seven_judged(hgx: Machine) -> None:
    bad = list(hgx.cards)[3]
    hgx.let(bad, error=15)
    status, report = hgx.judged()
    assert status == 2
    said = {gpu["address"]: gpu["status"] for gpu in report["gpus"]}
    assert said == {address: "fail" if address == bad else "ok" for address in hgx.cards}
    for address in set(hgx.cards) - {bad}:
        judged = [each for each in checks(report, address).values() if each["status"] == "ok"]
        assert len(judged) > 15


def test_one_that_hangs_among_eight_leaves_seven_judged(
    hgx: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healthlook, "NVML_SECONDS", 5.0)
    bad = next(iter(hgx.cards))
    hgx.let(bad, name=HANG)
    status, report = hgx.judged()
    assert status == 2
    said = {gpu["address"]: gpu["status"] for gpu in report["gpus"]}
    assert said == {address: "fail" if address == bad else "ok" for address in hgx.cards}


@pytest.mark.parametrize("why", [Silence.DENIED, Silence.TIMEOUT, Silence.ERROR])
def test_a_log_that_could_not_be_read_warns(
    lone: Machine, monkeypatch: pytest.MonkeyPatch, why: Silence
) -> None:
    log = KernelLog(silent=why, details="so it was")
    monkeypatch.setattr(healthlook, "read_kernel_log", lambda root, deadline: log)
    status, report = lone.judged()
    assert (status, of_machine(report)["kernel_log"]["status"]) == (1, "warn")
    assert "so it was" in of_machine(report)["kernel_log"]["brief"]
    assert of_machine(report)["kernel_log"]["remedy"]


def test_a_log_that_is_not_there_or_was_read_does_not(lone: Machine) -> None:
    assert "kernel_log" not in of_machine(lone.judged()[1])
    (lone.kernel.root / "dev/kmsg").unlink()
    status, report = lone.judged()
    assert (status, "kernel_log" in of_machine(report)) == (0, False)
    assert checks(report)["xid"]["status"] == "unsupported"


def test_replays_are_counted_from_look_to_look(
    lone: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checks(lone.judged()[1])["pcie_replay"]["status"] == "unsupported"
    kept = json.loads((lone.state / FILE).read_text())
    assert (kept["replays"], kept["boot"]) == ({ONE: 3}, BOOT.replace("-", "").strip())
    # As if it had been a minute ago.
    (lone.state / FILE).write_text(json.dumps({**kept, "at": kept["at"] - 60}))
    assert checks(lone.judged()[1])["pcie_replay"]["status"] == "ok"
    lone.let(ONE, pcie_replays=5003)
    status, report = lone.judged()
    assert (status, checks(report)["pcie_replay"]["status"]) == (1, "warn")
    # Those of another boot are none.
    lone.file("proc/sys/kernel/random/boot_id", BOOT.replace("9", "8"))
    assert checks(lone.judged()[1])["pcie_replay"]["status"] == "unsupported"


# What there is to be, and thresholds of one's own


@pytest.mark.parametrize(
    ("text", "check", "status"),
    [
        ("expect: {count: 1}", "gpu_count", 0),
        ("expect: {count: 2}", "gpu_count", 2),
        ("expect: {mig: false}", "mig_mode", 0),
        ("expect: {mig: true}", "mig_mode", 2),
        ("expect: {confidential: on}", "cc_state", 2),
        ("expect: {nvlinks: 18}", "nvlink", 0),
        ("expect: {nvlinks: 19}", "nvlink", 2),
        ("thresholds: {margin_warn: 60}", "temperature", 1),
        ("thresholds: {margin_fail: 55, margin_warn: 60}", "temperature", 2),
        ('models: {"*h200*": {margin_warn: 60}}', "temperature", 1),
        ('models: {"*H100*": {margin_warn: 60}}', "temperature", 0),
        (
            'thresholds: {margin_warn: 60}\nmodels: {"*H200*": {margin_warn: 5}}',
            "temperature",
            0,
        ),
    ],
)
def test_rules_of_one_s_own(lone: Machine, text: str, check: str, status: int) -> None:
    lone.rules(text + "\n")
    found, report = lone.judged()
    assert found == status
    said = {**of_machine(report), **checks(report)}
    assert said[check]["status"] == ("ok", "warn", "fail")[status]


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("expect:\n  cuont: 8\n", "2:3", "did you mean 'count'"),
        ("expect: {count: many}\n", "1:17", "a whole number"),
        ("expect: {mig: maybe}\n", "1:15", "true or false"),
        ("thresholds: {margin_warn: hot}\n", "1:27", "is no number"),
        ("thresholds: {margin_warn: -1}\n", "1:27", "not negative"),
        ("thresholds: {margin_warn: .inf}\n", "1:27", "no number"),
        ("models: {A: {margin: 1}}\n", "1:14", "unknown key"),
        ("models: {A: {}, A: {}}\n", "1:17", "a second time"),
        ("a: [\n", "2:1", "not YAML"),
    ],
)
def test_a_mistake_in_the_rules_is_told_by_its_place(
    lone: Machine, text: str, place: str, word: str
) -> None:
    file = lone.rules(text)
    status, said = lone.type("health")
    assert (status, said.stdout) == (3, "")
    assert f"{file}:{place}" in said.stderr
    assert word in said.stderr


# Nagios, Prometheus, and files


def test_one_line_for_nagios(lone: Machine) -> None:
    status, said = lone.type("health", "--nagios")
    assert status == 0
    assert said.stdout.startswith("GPU OK - 1 GPU well | '0000:41:00.0 remap_uncorrectable'=0 ")
    assert said.stdout.count("\n") == 1
    lone.let(ONE, remapped=(0, 0, 1, 0))
    status, said = lone.type("health", "--nagios")
    assert status == 1
    assert said.stdout.startswith(f"GPU WARNING - {ONE} remap_pending: a row of memory waits")


def test_metrics_go_to_stdout_or_whole_into_a_file(lone: Machine, tmp_path: Path) -> None:
    status, said = lone.type("health", "--prometheus")
    assert status == 0
    assert f'gpupt_health_check{{subject="{ONE}",check="gpu_lost"}} 0\n' in said.stdout
    file = tmp_path / "textfile/gpupt.prom"
    status, quiet = lone.type("health", "--prometheus", "--output", str(file))
    assert (status, quiet.stdout) == (0, "")
    assert without_time(file.read_text()) == without_time(said.stdout)
    assert [each.name for each in file.parent.iterdir()] == ["gpupt.prom"]
    assert file.stat().st_mode & 0o777 == 0o644
    lone.let(ONE, error=15)
    assert lone.type("health", "--prometheus", "--output", str(file))[0] == 2
    assert "gpupt_health_status 2\n" in file.read_text()


def without_time(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("gpupt_health_time")]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda place: place.parent.write_text("a file where the folder is to be"),
        lambda place: place.mkdir(parents=True),
        lambda place: (place.parent.mkdir(), place.symlink_to("/dev/null")),
    ],
    ids=["no folder", "a folder", "a link to a device"],
)
def test_what_cannot_be_written_is_unknown(
    lone: Machine, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    place = tmp_path / "textfile/gpupt.prom"
    spoil(place)
    status, said = lone.type("health", "--prometheus", "--output", str(place))
    assert (status, said.stdout) == (3, "")
    assert str(place) in said.stderr
    assert not list(tmp_path.rglob(".gpupt.prom*"))


@pytest.mark.parametrize(
    "words",
    [
        ("--nagios", "--prometheus"),
        ("--nagios", "--json"),
        ("--prometheus", "--json"),
        ("--output", "x.prom"),
        ("--watch", "2"),
        ("--against", "/nowhere/baseline.json"),
        ("--level", "thorough"),
        ("--no-such-option",),
        ("nobody",),
        ("nobody", "--record"),
        ("nobody", "--level", "long"),
    ],
)
def test_wrong_usage_is_unknown_and_never_a_card_s_fault(
    lone: Machine, words: tuple[str, ...]
) -> None:
    status, said = lone.type("health", *words)
    assert status == 3
    assert said.stdout == "" or (
        said.stdout.startswith("GPU UNKNOWN - ") and said.stdout.count("\n") == 1
    )
    assert ("--nagios" in words) == (said.stdout != "")
    assert said.stderr
    assert not (lone.state / "baseline.json").exists()


# On a terminal


class Terminal:
    """Stdout that calls itself a terminal."""

    def __init__(self) -> None:
        self.said = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.said += text
        return len(text)

    def flush(self) -> None:
        """It is all there."""


def test_it_is_watched_until_ctrl_c_and_ends_as_the_last_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    looks = iter([{"": REPORT}, {"": SICK}])
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    last = health.watch_health(lambda: next(looks), period=5, everything=False)
    assert last == {"": SICK}
    assert terminal.said.count("\x1b[H") == 2
    assert "every 5 s; Ctrl-C ends" in terminal.said
    assert all(0 <= nap <= 5 for nap in naps)
    # What a longer screen left is cleared.
    assert terminal.said.rstrip("\n").endswith("\x1b[J")


@pytest.mark.parametrize(
    ("period", "others", "word"),
    [(0.1, False, "takes 1 s or more"), (float("nan"), False, "or more"), (5, True, "the table")],
)
def test_what_cannot_be_watched_is_refused(
    monkeypatch: pytest.MonkeyPatch, period: float, others: bool, word: str
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    health.require_watchable(Settings(), period=2, others=False)
    with pytest.raises(BadInput, match=word):
        health.require_watchable(Settings(), period=period, others=others)


# What was recorded


def test_what_changed_since_it_was_recorded(lone: Machine) -> None:
    status, said = lone.type("health", "--record")
    assert (status, said.stderr) == (0, f"{lone.state}/baseline.json: 1 of 1 GPUs recorded\n")
    status, report = lone.judged("--against", "baseline")
    assert (status, checks(report)["baseline"]["value"]) == (0, "unchanged")
    lone.let(ONE, vbios="96.00.A5.00.01")
    status, report = lone.judged("--against", "baseline")
    assert (status, checks(report)["baseline"]["status"]) == (1, "warn")
    assert checks(report)["baseline"]["value"] == "vbios 96.00.A0.00.03 → 96.00.A5.00.01"
    assert "--record" in checks(report)["baseline"]["remedy"]
    lone.type("health", "--record")
    assert lone.judged("--against", "baseline")[0] == 0


def test_a_narrower_link_fails_though_the_card_is_content(lone: Machine) -> None:
    lone.type("health", "--record")
    for name in ("current_link_width", "max_link_width"):
        lone.file(f"sys/bus/pci/devices/{ONE}/{name}", "8\n")
    assert lone.type("health")[0] == 0
    status, report = lone.judged("--against", "baseline")
    assert (status, checks(report)["baseline"]["status"]) == (2, "fail")
    assert checks(report)["baseline"]["value"] == "link-width 16 → 8"


def test_a_card_that_is_gone_and_one_that_is_new(hgx: Machine, tmp_path: Path) -> None:
    hgx.type("health", "--record")
    file = tmp_path / "then.json"
    kept = json.loads((hgx.state / "baseline.json").read_text())
    first, second, *_ = hgx.cards
    kept["cards"].pop(first)
    file.write_text(json.dumps(kept))
    status, report = hgx.judged("--against", str(file))
    assert (status, checks(report, first)["baseline"]["value"]) == (1, "new")
    for address in (first, second):
        (hgx.kernel.root / f"sys/bus/pci/devices/{address}").unlink()
    status, report = hgx.judged("--against", "baseline")
    gone = of_machine(report)["baseline"]
    assert (status, gone["status"], gone["number"]) == (2, "fail", 2)
    assert gone["brief"] == f"not there any more: {first}, {second}"


def test_another_card_in_the_same_slot_fails(lone: Machine) -> None:
    lone.type("health", "--record")
    lone.let(ONE, uuid="GPU-of-another", serial="1")
    status, report = lone.judged("--against", "baseline")
    assert (status, checks(report)["baseline"]["status"]) == (2, "fail")
    assert "uuid" in checks(report)["baseline"]["brief"]


def test_a_baseline_is_not_spoilt_by_what_does_not_answer(hgx: Machine) -> None:
    hgx.type("health", "--record")
    before = (hgx.state / "baseline.json").read_text()
    hgx.play(init=error(18))
    status, said = hgx.type("health", "--record")
    assert (status, "not recorded" in said.stderr) == (2, True)
    assert (hgx.state / "baseline.json").read_text() == before
    bad = list(hgx.cards)[2]
    hgx.let(bad, error=15)
    status, said = hgx.type("health", "--record")
    assert (status, "7 of 8 GPUs recorded" in said.stderr) == (2, True)
    status, report = hgx.judged("--against", "baseline")
    assert checks(report, bad)["baseline"]["value"] == "new"


@pytest.mark.parametrize("text", [None, "", "[]", '{"recorded": "x", "cards": {"here": {}}}', "{}"])
def test_no_baseline_is_unknown_with_a_remedy(lone: Machine, text: str | None) -> None:
    if text is not None:
        lone.state.mkdir()
        (lone.state / "baseline.json").write_text(text)
    status, said = lone.type("health", "--against", "baseline")
    assert (status, said.stdout) == (3, "")
    assert "→ gpupt health --record" in said.stderr


# A cluster's nodes


class Cluster:
    """A cluster whose nodes answer with these reports, or not at all; ``asked`` by name."""

    def __init__(self, **answers: HealthReport | Exception) -> None:
        self.answers = answers
        self.asked: list[tuple[str, bool]] = []
        self.together = threading.Barrier(len(answers)) if answers else None
        self.closed = False

    @property
    def allocation(self) -> Any:
        card = SimpleNamespace(gpu=PciAddress.parse(ONE))
        nodes = [*self.answers, "frontend"]
        placed = [
            SimpleNamespace(node=SimpleNamespace(name=name), cards=(card,) * (name != "frontend"))
            for name in nodes
        ]
        return SimpleNamespace(placements=placed)

    def ssh(self, cluster: str, placement: Any, *, deadline: float) -> str:
        assert self.together is not None
        # Nobody passes before all nodes are being asked.
        self.together.wait(timeout=30)
        name: str = placement.node.name
        return name

    def close(self) -> None:
        self.closed = True

    def ask(self, ssh: str, *, state: Path, lending: bool) -> HealthReport:
        self.asked.append((ssh, lending))
        answer = self.answers[ssh]
        if isinstance(answer, Exception):
            raise answer
        return answer


def with_cluster(cluster: Cluster, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("gpupt.cli.nodes.require_cluster", lambda settings, name: cluster)
    patch.setattr("gpupt.cli.clusterworld.cluster_world", lambda settings: cluster)
    patch.setattr("gpupt.edges.nodehealth.ask_node", cluster.ask)


def one_card(report: HealthReport) -> HealthReport:
    return replace(report, gpus=report.gpus[:1])


def test_every_node_that_has_gpus_is_asked_at_the_same_time(
    lone: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = DeadlineExceeded("n2 did not answer SSH within 30 s", details="no route to host")
    cluster = Cluster(n0=one_card(REPORT), n1=one_card(SICK), n2=gone)
    with_cluster(cluster, monkeypatch)
    status, said = lone.type("health", "herbarium", "--json", "--lending")
    told = json.loads(said.stdout)
    assert (status, told["cluster"], told["status"]) == (2, "herbarium", "fail")
    assert {name: node["status"] for name, node in told["nodes"].items()} == {
        "n0": "ok",
        "n1": "fail",
        "n2": "fail",
    }
    (check,) = told["nodes"]["n2"]["machine"]
    assert check["brief"] == "n2 did not answer SSH within 30 s; no route to host"
    assert sorted(cluster.asked) == [("n0", True), ("n1", True), ("n2", True)]
    assert cluster.closed
    status, said = lone.type("health", "herbarium")
    assert status == 2
    assert "fail  n2  node: n2 did not answer SSH" in said.stdout
    assert lone.type("health", "herbarium", "--nagios")[0] == 2


def test_a_node_with_fewer_gpus_than_it_was_lent_fails(
    lone: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cluster(Cluster(n0=one_card(REPORT)), monkeypatch)
    assert lone.type("health", "herbarium")[0] == 0
    with_cluster(Cluster(n0=replace(REPORT, gpus=())), monkeypatch)
    status, said = lone.type("health", "herbarium")
    assert (status, "0 GPUs in the node, 1 were lent to it" in said.stdout) == (2, True)


def test_a_cluster_without_gpus_is_of_unknown_health(
    lone: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cluster(Cluster(), monkeypatch)
    assert lone.type("health", "herbarium")[0] == 3
