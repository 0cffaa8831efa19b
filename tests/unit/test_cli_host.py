"""The host's verbs as they are typed: text, JSON, exit status, and what is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fakekernel import FakeKernel, Fault
from machines import MACHINES, emulated_host, laptop, unpack

from gpupt.actions import RecordLoan
from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.decide.binding import plan_detach
from gpupt.decide.viability import Preflight
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.sysfs import read_host
from gpupt.errors import GpuptError
from gpupt.model.host import Loan
from gpupt.model.pci import PciAddress

Golden = Callable[[str, str], None]


class Host:
    """A machine with a kernel that reacts, and gpupt typed at it."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.root = kernel.root
        self.state = kernel.root / "var/lib/gpupt"

    def type(self, *words: str) -> tuple[int, Result]:
        """The exit status as main() gives it, and what was printed."""
        settings = Settings(root=self.root, state=self.state, kernel=lambda root: self.kernel)
        result = CliRunner().invoke(cli, words, obj=settings)
        if isinstance(result.exception, GpuptError):
            return result.exception.exit_code, result
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result

    def data(self, *words: str) -> Any:
        status, result = self.type(*words, "--json")
        assert status == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture
def host(quick_path: Path) -> Host:
    return Host(emulated_host(quick_path / "machine"))


@pytest.mark.parametrize("machine", MACHINES)
def test_list_for_people(tmp_path: Path, golden: Golden, machine: str) -> None:
    _, result = Host(MACHINES[machine](tmp_path)).type("list")
    golden(f"machines/list-{machine}.txt", result.stdout)


@pytest.mark.parametrize("machine", MACHINES)
def test_list_for_scripts(tmp_path: Path, golden: Golden, machine: str) -> None:
    _, result = Host(MACHINES[machine](tmp_path)).type("list", "--json")
    golden(f"machines/list-{machine}.json", result.stdout)


@pytest.mark.parametrize("machine", MACHINES)
def test_doctor_for_people(tmp_path: Path, golden: Golden, machine: str) -> None:
    status, result = Host(MACHINES[machine](tmp_path)).type("doctor")
    assert status == 0
    golden(f"machines/doctor-{machine}.txt", result.stdout)


@pytest.mark.parametrize(
    ("machine", "gpu"), [("laptop", "1:0.0"), ("emulated_host", "03:00.0"), ("server", "db:00.0")]
)
def test_info_for_people(tmp_path: Path, golden: Golden, machine: str, gpu: str) -> None:
    _, result = Host(MACHINES[machine](tmp_path)).type("info", gpu)
    golden(f"machines/info-{machine}.txt", result.stdout)


def test_a_program_is_told_what_is_left(host: Host) -> None:
    for words in (["--dry-run"], ["--yes"]):
        status, result = host.type("--json", "detach", "--all", *words)
        (left,) = json.loads(result.stdout)["findings"]
        assert (status, left["id"], left["subject"]) == (0, "left", "0000:03:00.0")
        assert left["brief"] == "it is the boot display"


def test_detach_for_people(host: Host, golden: Golden) -> None:
    status, result = host.type("detach", "--all", "--dry-run")
    assert status == 0
    # The plan that was asked for is the data; what is left alone, and why, is narration.
    golden("machines/detach-dry-run.txt", result.stdout)
    assert result.stderr == "leaving 0000:03:00.0: it is the boot display\n"
    assert host.kernel.writes == []
    assert not host.state.exists()
    host.type("detach", "--all", "--yes")
    _, result = host.type("status")
    golden("machines/status-detached.txt", result.stdout)
    _, result = host.type("list")
    golden("machines/list-detached.txt", result.stdout)


def test_there_and_back(host: Host) -> None:
    before = host.kernel.tree()
    assert host.type("detach", "2:0.0", "0000:01:00.0", "--yes")[0] == 0
    states = {gpu["address"]: gpu["state"] for gpu in host.data("list")["gpus"]}
    assert states == {
        "0000:01:00.0": "detached",
        "0000:02:00.0": "detached",
        "0000:03:00.0": "host",
    }
    status, result = host.type("detach", "02:00.0", "--yes")
    assert (status, "nothing to do" in result.stderr) == (0, True)
    assert host.type("attach", "--all", "--yes")[0] == 0
    for file in sorted(host.state.iterdir()):
        file.unlink()
    for folder in (host.state, host.state.parent, host.state.parent.parent):
        folder.rmdir()
    assert host.kernel.tree() == before


def test_json_of_a_change_is_one_object(host: Host) -> None:
    done = host.data("detach", "02:00.0", "--yes")
    assert done["schema"] == 1
    assert [action["kind"] for action in done["actions"]] == [
        "RecordLoan",
        "BindFunction",
        "BindFunction",
    ]
    assert host.data("detach", "02:00.0", "--yes")["actions"] == []
    assert host.data("attach", "02:00.0", "--dry-run")["actions"][0]["subject"] == "0000:02:00.0"


def test_json_is_the_result_alone_when_a_person_is_asked(host: Host) -> None:
    status, result = host.type("detach", "02:00.0", "--json")  # nobody there to be asked
    assert (status, result.stdout) == (2, "")
    assert "record     0000:02:00.0" in result.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["detach"], 2, "name the GPUs"),
        (["detach", "--all", "01:00.0"], 2, "not both"),
        (["detach", "7f:00.0", "--yes"], 2, "0000:02:00.0  10de:1eb8"),
        (["detach", "02:00.1", "--yes"], 2, "companion of 0000:02:00.0"),
        (["detach", "nonsense", "--yes"], 2, "not a PCI address"),
        (["detach", "nonsense", "--yes"], 2, "lib/gpupt/aliases.yaml: none"),
        (["detach", "02:00.0"], 2, "no terminal"),
        (["detach", "03:00.0", "--yes"], 3, "gpupt detach 0000:03:00.0 --boot-gpu"),
        (["detach", "02:00.0", "03:00.0", "--yes"], 3, "boot display"),
        (["attach", "02:00.0", "--yes"], 0, "nothing to do"),
        (["info", "7f:00.0"], 2, "no GPU at"),
        (["--root", "/nonexistent", "list"], 2, "no PCI bus"),
    ],
)
def test_bad_input_and_refusals_touch_nothing(
    host: Host, words: list[str], status: int, said: str
) -> None:
    before = host.kernel.tree()
    found, result = host.type(*words)
    assert found == status
    assert said in f"{result.stderr}{result.exception}"
    assert host.kernel.writes == []
    assert host.kernel.tree() == before


def test_a_failed_detach(host: Host) -> None:
    host.kernel.faults = [Fault("unbind", "0000:02:00.0", "stuck")]
    status, result = host.type("detach", "--all", "--yes")
    assert status == 1
    assert "did not finish unbind" in str(result.exception)
    assert "undone: bind 0000:01:00.0" in str(result.exception)
    assert {gpu["state"] for gpu in host.data("list")["gpus"]} == {"host", "driverless"}


def test_aliases(host: Host) -> None:
    host.state.mkdir(parents=True)
    (host.state / "aliases.yaml").write_text("left: 0000:01:00.0\nright: 02:00.0\n")
    assert host.data("detach", "right", "--dry-run")["actions"][0]["subject"] == "0000:02:00.0"
    status, result = host.type("detach", "middle", "--dry-run")
    assert status == 2
    assert "left, right" in str(result.exception)
    (host.state / "aliases.yaml").write_text("left: 0000:01:00.0\nright: over there\n")
    status, result = host.type("info", "right")
    assert status == 2
    assert "aliases.yaml:2:8" in str(result.exception)


def test_a_lent_gpu(host: Host) -> None:
    reading = read_host(host.root, whole=True)
    gpu = PciAddress.parse("01:00.0")
    plan = plan_detach(reading, gpus=[gpu], loans={}, preflight=Preflight())
    record = plan.actions[0]
    assert isinstance(record, RecordLoan)
    with Journal(host.state) as journal:
        journal.record(Loan(gpu, record.origins, "lab", "n1"))
    card = host.data("list")["gpus"][0]
    assert (card["state"], card["lease"]) == ("lent", {"cluster": "lab", "node": "n1"})
    assert host.data("status")["loans"][0]["node"] == "n1"
    for verb in ("detach", "attach"):
        status, result = host.type(verb, "01:00.0", "--yes")
        assert status == 3
        assert "lent to lab/n1" in str(result.exception)
    assert "lent to lab/n1" in host.type("attach", "--all")[1].stderr


def test_recover_after_a_kill(host: Host) -> None:
    before = host.kernel.tree()
    reading = read_host(host.root, whole=True)
    gpu = PciAddress.parse("02:00.0")
    plan = plan_detach(reading, gpus=[gpu], loans={}, preflight=Preflight())
    # As a kill after the first function leaves it: begun, one moved, no end.
    from gpupt.apply.execute import one_step
    from gpupt.apply.world import World

    with Journal(host.state) as journal:
        world = World(host.kernel, journal, lambda line: None)
        run = journal.begin(plan)
        for step in (0, 1):
            from gpupt.actions import JournalEntry

            entry = JournalEntry(step, plan.actions[step], None, False)
            one_step(entry, run=run, world=world, reached=[])
    assert host.data("status")["unfinished"][0]["done"] == 2
    assert host.type("doctor")[0] == 1
    status, result = host.type("detach", "01:00.0", "--yes")
    assert (status, "cut short" in str(result.exception)) == (3, True)
    status, result = host.type("recover")
    assert (status, "bind  " in result.stderr) == (2, True)
    done = host.data("recover", "--yes")
    assert [action["kind"] for action in done["actions"]] == ["BindFunction", "EraseLoan"]
    assert read_ledger(host.state).unfinished == ()
    after = {name: text for name, text in host.kernel.tree().items() if "var/lib" not in name}
    assert after == before
    assert host.data("recover", "--yes")["actions"] == []


def test_recover_of_a_run_that_changed_nothing(host: Host) -> None:
    reading = read_host(host.root, whole=True)
    gpu = PciAddress.parse("02:00.0")
    with Journal(host.state) as journal:
        journal.begin(plan_detach(reading, gpus=[gpu], loans={}, preflight=Preflight()))
    assert host.type("recover", "--yes")[0] == 0
    assert read_ledger(host.state).unfinished == ()


def test_recover_clears_orphans(host: Host) -> None:
    before = host.kernel.tree()
    host.kernel.set_override(PciAddress.parse("02:00.1"), "vfio-pci")
    assert host.data("status")["overrides"][0]["address"] == "0000:02:00.1"
    assert host.data("recover", "--dry-run")["actions"][0]["kind"] == "ReleaseFunction"
    assert host.type("recover", "--yes")[0] == 0
    after = {name: text for name, text in host.kernel.tree().items() if "var/lib" not in name}
    assert after == before


def test_a_damaged_journal_is_told_and_list_goes_on(host: Host) -> None:
    host.state.mkdir(parents=True)
    (host.state / "journal.sqlite").write_text("not a database, and long enough to be read" * 99)
    status, result = host.type("list")
    assert status == 0
    assert "loans and fences are not shown" in result.stderr
    assert "0000:01:00.0" in result.stdout
    status, result = host.type("detach", "01:00.0", "--yes")
    assert (status, "cannot be used" in str(result.exception)) == (1, True)
    assert host.kernel.writes == []


def test_a_second_gpupt_is_refused(host: Host) -> None:
    with Journal(host.state):
        status, result = host.type("detach", "01:00.0", "--yes")
    assert (status, "another gpupt" in str(result.exception)) == (3, True)
    assert host.kernel.writes == []


@pytest.mark.parametrize("machine", MACHINES)
def test_a_snapshot_reads_like_the_machine(tmp_path: Path, machine: str) -> None:
    there = Host(MACHINES[machine](tmp_path / "there"))
    link = there.root / "sys/devices/pci0000:00/0000:02:00.0/serial_number"
    link.write_text("0123-4567\n")
    with (there.root / "proc/cmdline").open("a") as cmdline:
        cmdline.write("root=UUID=0f0e0d0c-0b0a-0908-0706-050403020100 password=x intel_iommu=on\n")
    file = tmp_path / "host.tar.gz"
    assert there.type("snapshot", str(file))[0] == 0
    unpack(file, tmp_path / "here")
    with tarfile.open(file) as archive:
        held = b"".join(
            found.read()
            for member in archive
            if member.isfile() and (found := archive.extractfile(member)) is not None
        )
    for secret in (b"0123-4567", b"0f0e0d0c", b"password"):
        assert secret not in held
    assert b"intel_iommu=on" in held
    (tmp_path / "here/usr").symlink_to(there.root / "usr")
    here = Host(FakeKernel(tmp_path / "here", drivers={}))
    for verb in ("list", "doctor"):
        assert here.type(verb, "--json")[1].stdout == there.type(verb, "--json")[1].stdout
    # Disks and interfaces get names that say nothing; the functions they are on stay.
    found, real = (read_host(each.root, whole=True).critical for each in (here, there))
    assert [entry.address for entry in found] == [entry.address for entry in real]


def test_list_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, gpupt.cli.main, gpupt.cli.host, gpupt.report.tables\n"
        "heavy = {'rich', 'jinja2', 'libvirt', 'paramiko', 'yaml', 'sqlite3', 'json', "
        "'gpupt.actions', 'asyncio', 'subprocess'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


@pytest.mark.parametrize(
    ("words", "status"), [(["list"], 1), (["doctor"], 1), (["health", "--nagios"], 3)]
)
def test_what_cannot_be_written_is_told_without_a_traceback(
    tmp_path: Path, words: list[str], status: int
) -> None:
    laptop(tmp_path / "machine")
    argv = [sys.executable, "-m", "gpupt.cli.main", "--state", str(tmp_path / "state"), *words]
    argv += ["--root", str(tmp_path / "machine")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == status
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_closed_stdout_is_no_error(tmp_path: Path) -> None:
    laptop(tmp_path / "machine")
    script = 'exec "$0" -m gpupt.cli.main list --root "$1" >&-'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, str(tmp_path / "machine")],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
