"""`gpupt host prepare`: each distribution's way, there and back, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fakekernel import FakeKernel, Function, plant

from gpupt.cli.context import Settings
from gpupt.cli.main import cli
from gpupt.decide.prepare import CMDLINE, GRUB, HEADER, LIMITS, MODULES, SYSCTL
from gpupt.edges.bootentries import grub_lines
from gpupt.edges.etc import Etc
from gpupt.edges.preparation import RECORD
from gpupt.errors import BadInput, GpuptError

CPU = "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx\n"
LIMITS_64K = "Limit Soft Hard Units\nMax locked memory         65536      65536      bytes\n"
# The tools react as the real ones do, on the tree they lie in; `broken` beside one breaks it.
TOOL = """#!/bin/sh
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
echo "$(basename "$0") $*" >> "$root/ran"
[ ! -e "$root/lethal" ] || kill -KILL "$PPID"
"""
UPDATE_GRUB = (
    TOOL
    + """
GRUB_CMDLINE_LINUX_DEFAULT=""
. "$root/etc/default/grub"
for file in "$root"/etc/default/grub.d/*.cfg; do [ ! -e "$file" ] || . "$file"; done
write() {
  echo "### BEGIN /etc/grub.d/10_linux ###"
  echo "  linux /vmlinuz-6.1 root=UUID=1 ro $GRUB_CMDLINE_LINUX_DEFAULT"
  echo "  linux /vmlinuz-6.1 root=UUID=1 ro single"
  echo "### END /etc/grub.d/10_linux ###"
  echo "### BEGIN /etc/grub.d/30_os-prober ###"
  echo "  linux /boot/other root=UUID=2 ro"
}
if [ -e "$root/broken" ]; then echo half > "$root/boot/grub/grub.cfg"; echo no space >&2; exit 1; fi
[ -e "$root/deaf" ] || write > "$root/boot/grub/grub.cfg"
"""
)
GRUBBY = (
    TOOL
    + """
for argument; do
  case $argument in
    --args=*) script="s/^options .*/& ${argument#--args=}/" ;;
    --remove-args=*) script="s/^\\(options .*\\) ${argument#--remove-args=}/\\1/" ;;
  esac
done
for entry in "$root"/boot/loader/entries/*.conf; do
  sed -i "$script" "$entry"
  if [ -e "$root/broken" ]; then exit 1; fi
done
"""
)
KERNEL_INSTALL = (
    TOOL
    + """
[ -e "$root$3" ]
entry=$root/efi/loader/entries/mid-$2.conf
printf 'title T\\nversion %s\\noptions %s\\nlinux /mid/linux\\n' \\
  "$2" "$(cat "$root/etc/kernel/cmdline")" > "$entry"
[ -e "$root/bare" ] || echo "initrd /mid/initrd" >> "$entry"
if [ -e "$root/broken" ] && [ "$2" = 6.12.2 ]; then echo no room >&2; exit 1; fi
"""
)


class Machine:
    """A planted host that boots in some way, and gpupt typed at it."""

    def __init__(self, root: Path, *, group: int | None = None) -> None:
        self.root, self.state = root, root / "var/lib/gpupt"
        gpu = Function("0000:01:00.0", "10de:2330", 0x030200, driver="nvidia", group=group)
        plant(root, [gpu], drivers=["vfio-pci"])
        self.kernel = FakeKernel(root, drivers={"nvidia": ["10de:2330"], "vfio-pci": []})
        self.have(
            {
                "proc/cpuinfo": CPU,
                "proc/meminfo": "MemTotal: 67108864 kB\nHugepagesize: 2048 kB\n",
                "sys/firmware/acpi/tables/DMAR": "",
                "sys/class/misc/kvm/dev": "10:232\n",
                "etc/hostname": "box\n",
            }
        )

    def have(self, files: Mapping[str, str]) -> None:
        for name, text in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)
            if text.startswith("#!"):
                (self.root / name).chmod(0o755)

    def type(self, *words: str) -> tuple[int, Result]:
        """The exit status as main() gives it, and what was printed."""
        settings = Settings(root=self.root, state=self.state, kernel=lambda root: self.kernel)
        result = CliRunner().invoke(cli, ["host", "prepare", *words], obj=settings)
        if isinstance(result.exception, GpuptError):
            return result.exception.exit_code, result
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result

    def data(self, *words: str) -> Any:
        _, result = self.type(*words, "--json")
        return json.loads(result.stdout)

    def text(self, name: str) -> str | None:
        file = self.root / name.lstrip("/")
        return file.read_text() if file.exists() else None

    def ran(self) -> list[str]:
        return (self.text("ran") or "").splitlines()

    def tree(self) -> dict[str, str]:
        """Every file and folder but those of the kernel and of gpupt's state."""
        return {
            str(path.relative_to(self.root)): path.read_text() if path.is_file() else ""
            for part in ("boot", "efi", "etc")
            for path in sorted((self.root / part).rglob("*"))
        }


def debian(root: Path, **more: Any) -> Machine:
    machine = Machine(root, **more)
    machine.have(
        {
            "usr/sbin/update-grub": UPDATE_GRUB,
            "etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n',
            "boot/grub/grub.cfg": "",
        }
    )
    subprocess.run([root / "usr/sbin/update-grub"], check=True)
    (root / "ran").unlink()
    return machine


def fedora(root: Path) -> Machine:
    machine = Machine(root)
    entry = "title F\nversion {}\noptions root=UUID=1 ro rhgb\nlinux /vmlinuz\ninitrd /i\n"
    machine.have(
        {
            "usr/sbin/grubby": GRUBBY,
            "boot/loader/entries/m-6.8.conf": entry.format("6.8"),
            "boot/loader/entries/m-6.9.conf": entry.format("6.9"),
            "boot/grub2/grubenv": "# GRUB Environment Block\n",
        }
    )
    return machine


def systemd_boot(root: Path) -> Machine:
    machine = Machine(root)
    entry = (
        "title T\nversion {}\noptions root=/dev/sda2 rw\n\nlinux /mid/linux\ninitrd /mid/initrd\n"
    )
    machine.have(
        {
            "usr/bin/kernel-install": KERNEL_INSTALL,
            "etc/kernel/cmdline": "root=/dev/sda2 rw\n",
            "efi/EFI/systemd/systemd-bootx64.efi": "MZ",
            "boot/vmlinuz-6.12.1": "",
            "lib/modules/6.12.2/vmlinuz": "",
            "efi/loader/entries/mid-6.12.1.conf": entry.format("6.12.1"),
            "efi/loader/entries/mid-6.12.2.conf": entry.format("6.12.2"),
        }
    )
    return machine


WAYS = {"update-grub": debian, "grubby": fedora, "kernel-install": systemd_boot}
Way = Callable[[Path], Machine]


def kinds(answer: Any) -> list[tuple[str, str]]:
    return [(action["kind"], action["subject"]) for action in answer["actions"]]


def ids(answer: Any) -> list[str]:
    return [finding["id"] for finding in answer["findings"]]


def booted_lines(machine: Machine) -> list[str]:
    """The kernel lines of this system's entries, as they are on the disk."""
    grub = machine.text("boot/grub/grub.cfg")
    if grub is not None:
        return [" ".join(sorted(words)) for words in grub_lines(grub)]
    return [
        line
        for entry in machine.root.glob("*/loader/entries/*.conf")
        for line in entry.read_text().splitlines()
        if line.startswith("options")
    ]


@pytest.mark.parametrize("tool", WAYS)
def test_each_way_there_and_back(tmp_path: Path, tool: str) -> None:
    machine = WAYS[tool](tmp_path)
    before = machine.tree()
    status, shown = machine.type("--dry-run")
    assert (status, machine.tree()) == (0, before)
    assert "intel_iommu=on" in shown.stdout
    assert not machine.state.exists()

    status, _ = machine.type("--yes")
    assert status == 0
    assert booted_lines(machine)
    assert all("intel_iommu=on" in line for line in booted_lines(machine))
    assert machine.text(MODULES) == f"{HEADER}vfio-pci\n"
    prepared, count = machine.tree(), len(machine.ran())

    answer = machine.data("--yes")
    assert (answer["actions"], ids(answer)) == ([], ["reboot-pending"])
    assert (machine.tree(), len(machine.ran())) == (prepared, count)

    status, _ = machine.type("--undo", "--yes")
    assert status == 0
    assert not any("intel_iommu" in line for line in booted_lines(machine))
    if tool != "kernel-install":
        assert machine.tree() == before
    assert machine.text(CMDLINE) == before.get("etc/kernel/cmdline")
    assert not (machine.state / RECORD).exists()
    assert machine.data("--undo", "--yes")["actions"] == []


def test_the_plan_as_json(tmp_path: Path) -> None:
    answer = debian(tmp_path).data("--dry-run")
    assert kinds(answer) == [("SetKernelLine", "update-grub"), ("WriteFile", MODULES)]
    assert list(answer) == ["schema", "actions", "findings"]
    assert debian(tmp_path / "2").data("--yes") == answer


def test_with_no_terminal_nothing_is_asked(tmp_path: Path) -> None:
    machine = debian(tmp_path)
    before = machine.tree()
    status, result = machine.type()
    assert (status, machine.tree()) == (2, before)
    assert "kernel command line (update-grub)" in result.stderr


def test_a_recorded_tree_is_not_changed(tmp_path: Path) -> None:
    machine = debian(tmp_path)
    before = machine.tree()
    typed = ["--root", str(tmp_path), "host", "prepare"]
    result = CliRunner().invoke(cli, [*typed, "--yes"])
    assert isinstance(result.exception, BadInput)
    assert "recorded tree" in str(result.exception)
    assert CliRunner().invoke(cli, [*typed, "--dry-run"]).exit_code == 0
    assert (machine.tree(), machine.ran(), machine.state.exists()) == (before, [], False)


def test_nothing_lacking(tmp_path: Path) -> None:
    machine = debian(tmp_path, group=1)
    machine.have({"etc/modules-load.d/gpupt.conf": "vfio-pci\n"})
    status, result = machine.type("--yes")
    assert (status, result.stdout) == (0, "")
    assert result.stderr == "host prepare this host: nothing to do\n"
    assert machine.data("--dry-run") == {"schema": 1, "actions": [], "findings": []}


@pytest.mark.parametrize(
    "files",
    [
        {"etc/modules": "# comment\nvfio_pci\n"},
        {"usr/lib/modules-load.d/any.conf": "; no\nvfio-pci\n"},
        {
            "proc/sys/kernel/osrelease": "6.12\n",
            "lib/modules/6.12/modules.builtin": "kernel/drivers/vfio/pci/vfio-pci.ko\n",
        },
    ],
)
def test_vfio_is_loaded_already(tmp_path: Path, files: dict[str, str]) -> None:
    machine = debian(tmp_path, group=1)
    machine.have(files)
    assert machine.data("--dry-run")["actions"] == []


@pytest.mark.parametrize("tool", WAYS)
def test_a_failing_tool_leaves_nothing(tmp_path: Path, tool: str) -> None:
    machine = WAYS[tool](tmp_path)
    before = machine.tree()
    machine.have({"broken": ""})
    status, result = machine.type("--yes")
    assert status == 1
    assert (machine.tree(), (machine.state / RECORD).exists()) == (before, False)
    assert "put back as it was" in str(result.exception)
    assert "nothing of this is left" in str(result.exception)
    if tool == "update-grub":
        assert "no space" in str(result.exception)
        assert f"put back as it was: {GRUB}" in str(result.exception)
    (machine.root / "broken").unlink()
    assert machine.type("--yes")[0] == 0


def test_a_failing_undo_puts_back_too(tmp_path: Path) -> None:
    machine = debian(tmp_path)
    machine.type("--yes")
    prepared = machine.tree()
    machine.have({"broken": ""})
    assert machine.type("--undo", "--yes")[0] == 1
    assert machine.tree() == prepared
    (machine.root / "broken").unlink()
    assert machine.type("--undo", "--yes")[0] == 0
    assert machine.text(GRUB) is None


def test_success_that_changed_nothing_is_no_success(tmp_path: Path) -> None:
    machine = debian(tmp_path)
    before = machine.tree()
    machine.have({"deaf": ""})
    status, result = machine.type("--yes")
    assert (status, machine.tree()) == (1, before)
    assert "boot entries lack intel_iommu=on" in str(result.exception)


def test_an_entry_without_its_initrd_is_put_back(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    before = machine.tree()
    machine.have({"bare": ""})
    status, result = machine.type("--yes")
    assert (status, machine.tree()) == (1, before)
    assert "left out the initrd of 6.12.1, 6.12.2" in str(result.exception)


@pytest.mark.parametrize("name", [GRUB, MODULES])
def test_a_file_that_was_changed_is_kept(tmp_path: Path, name: str) -> None:
    machine = debian(tmp_path)
    machine.type("--yes")
    changed = f"{machine.text(name)}# mine\n"
    machine.have({name.lstrip("/"): changed})
    answer = machine.data("--undo", "--yes")
    assert [(f["id"], f["subject"]) for f in answer["findings"]] == [("file-changed", name)]
    assert len(answer["actions"]) == 1
    assert machine.text(name) == changed
    assert machine.text(MODULES if name == GRUB else GRUB) is None
    # It stays on record, and is told of each time.
    assert ids(machine.data("--undo", "--yes")) == ["file-changed"]


def test_a_kernel_line_that_was_changed_is_kept(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    machine.type("--yes")
    machine.have({"etc/kernel/cmdline": "root=/dev/sda2 rw intel_iommu=on mine\n"})
    answer = machine.data("--undo", "--yes")
    assert kinds(answer) == [("RemoveFile", MODULES)]
    assert ids(answer) == ["file-changed"]
    assert machine.text(CMDLINE) == "root=/dev/sda2 rw intel_iommu=on mine\n"


def test_what_an_admin_removed_needs_no_undoing(tmp_path: Path) -> None:
    machine = debian(tmp_path)
    machine.type("--yes")
    (machine.root / GRUB[1:]).unlink()
    assert kinds(machine.data("--undo", "--yes")) == [("RemoveFile", MODULES)]


def test_what_is_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    machine = debian(tmp_path)
    machine.have({MODULES[1:]: "# an admin's\n"})
    answer = machine.data("--yes")
    assert (kinds(answer), ids(answer)) == ([("SetKernelLine", "update-grub")], ["file-in-the-way"])
    assert machine.text(MODULES) == "# an admin's\n"


def read_quietly(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def wait_for_tool(machine: Machine) -> None:
    """A tool outlives the gpupt that ran it: wait until it ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = [read_quietly(file) for file in Path("/proc").glob("[0-9]*/cmdline")]
        if not any(f"{machine.root}/usr".encode() in line for line in lines):
            return
        time.sleep(0.02)
    raise AssertionError("the tool did not end")


@pytest.mark.parametrize("then", ["finish", "undo"])
@pytest.mark.parametrize("tool", WAYS)
def test_a_run_that_was_killed_is_finished_or_undone(tmp_path: Path, tool: str, then: str) -> None:
    """SIGKILL of gpupt while the tool runs, which then does its work or none of it."""
    machine = WAYS[tool](tmp_path)
    before = machine.tree()
    machine.have({"lethal": "", **({"broken": ""} if tool == "update-grub" else {})})
    child = os.fork()
    if child == 0:
        machine.type("--yes")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    wait_for_tool(machine)
    (machine.root / "lethal").unlink()
    (machine.root / "broken").unlink(missing_ok=True)
    assert (machine.state / RECORD).exists()
    if then == "undo":
        assert machine.type("--undo", "--yes")[0] == 0
        assert not any("intel_iommu" in line for line in booted_lines(machine))
        assert machine.text(CMDLINE) == before.get("etc/kernel/cmdline")
        assert machine.text(GRUB) is None
        return

    assert machine.type("--yes")[0] == 0
    assert all("intel_iommu=on" in line for line in booted_lines(machine))
    assert machine.type("--undo", "--yes")[0] == 0
    assert not any("intel_iommu" in line for line in booted_lines(machine))
    assert machine.text(CMDLINE) == before.get("etc/kernel/cmdline")
    assert machine.text(GRUB) is None


def test_a_lost_record_is_said(tmp_path: Path) -> None:
    machine = debian(tmp_path)
    machine.type("--yes")
    (machine.state / RECORD).unlink()
    answer = machine.data("--undo", "--yes")
    assert (answer["actions"], ids(answer)) == ([], ["file-unrecorded", "file-unrecorded"])
    (machine.state / RECORD).write_text("{")
    assert machine.type("--undo", "--yes")[0] == 1


@contextmanager
def as_nobody(machine: Machine) -> Iterator[None]:
    """Act as a user who may write the state, and nothing else of the tree."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    machine.state.mkdir(parents=True)
    os.chown(machine.state, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that every user may pass through."""
    folder = Path(tempfile.mkdtemp(prefix="gpupt-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_an_etc_that_may_not_be_written(open_path: Path) -> None:
    machine = debian(open_path)
    before = machine.tree()
    with as_nobody(machine):
        status, result = machine.type("--yes")
    assert status == 1
    assert "cannot write" in str(result.exception)
    assert (machine.tree(), machine.ran()) == (before, [])
    assert not (machine.state / RECORD).exists()


def test_hugepages_only_when_asked(tmp_path: Path) -> None:
    machine = debian(tmp_path, group=1)
    machine.type("--yes")
    before = machine.tree()
    assert machine.type("--hugepages", "8 GiB", "--yes")[0] == 0
    assert machine.text(SYSCTL) == f"{HEADER}vm.nr_hugepages = 4096\n"
    assert machine.data("--hugepages", "8 GiB", "--yes")["actions"] == []
    assert machine.type("--hugepages", "16 GiB", "--yes")[0] == 0
    assert machine.text(SYSCTL) == f"{HEADER}vm.nr_hugepages = 8192\n"
    machine.type("--undo", "--yes")
    assert set(before) - set(machine.tree()) == {MODULES[1:], "etc/modules-load.d"}
    assert machine.text(SYSCTL) is None


@pytest.mark.parametrize(
    ("size", "word"),
    [("60 GiB", "too little memory"), ("1 MiB", "whole number of hugepages"), ("8", "not a size")],
)
def test_hugepages_that_do_not_fit(tmp_path: Path, size: str, word: str) -> None:
    machine = debian(tmp_path)
    before = machine.tree()
    status, result = machine.type("--hugepages", size, "--yes")
    assert (status, machine.tree()) == (2, before)
    assert word in str(result.exception)


def test_a_later_file_has_the_last_word(tmp_path: Path) -> None:
    machine = debian(tmp_path, group=1)
    machine.have({"etc/sysctl.d/99-local.conf": "vm.nr_hugepages=7\n", "etc/modules": "vfio-pci\n"})
    answer = machine.data("--hugepages", "8 GiB", "--yes")
    assert (answer["actions"], ids(answer)) == ([], ["hugepages"])


def test_memlock_of_a_user(tmp_path: Path) -> None:
    machine = debian(tmp_path, group=1)
    machine.have({"etc/modules": "vfio-pci\n"})
    assert kinds(machine.data("--memlock", "ada", "--yes")) == [("WriteFile", LIMITS)]
    assert machine.data("--memlock", "ada", "--yes")["actions"] == []
    machine.type("--memlock", "grace", "--yes")
    lines = (machine.text(LIMITS) or "").splitlines()[1:]
    assert lines == [
        f"{u} {k} memlock unlimited" for u in ("ada", "grace") for k in ("soft", "hard")
    ]
    assert machine.data("--memlock", "ada", "--yes")["actions"] == []
    machine.type("--undo", "--yes")
    assert machine.text(LIMITS) is None
    assert machine.type("--memlock", "a b", "--yes")[0] == 2


@pytest.mark.parametrize(("capabilities", "lacks"), [("0", True), ("1ffffffffff", False)])
def test_memlock_of_a_daemon_that_cannot_raise_it(
    tmp_path: Path, capabilities: str, lacks: bool
) -> None:
    machine = debian(tmp_path, group=1)
    machine.have(
        {
            "etc/modules": "vfio-pci\n",
            "proc/77/comm": "libvirtd\n",
            "proc/77/status": f"Name:\tlibvirtd\nUid:\t0\t0\t0\t0\nCapEff:\t{capabilities}\n",
            "proc/77/limits": LIMITS_64K,
        }
    )
    drop_in = "/etc/systemd/system/libvirtd.service.d/90-gpupt-prepare.conf"
    answer = machine.data("--yes")
    assert kinds(answer) == ([("WriteFile", drop_in)] if lacks else [])
    assert machine.data("--yes")["actions"] == []
    machine.type("--undo", "--yes")
    assert not (tmp_path / "etc/systemd").exists()


@pytest.mark.parametrize(
    ("files", "id", "evidence", "remedy"),
    [
        ({"tables": "FACP"}, "iommu-off", "no ACPI table DMAR", "VT-d"),
        ({"tables": "FACP", "cpu": "AuthenticAMD svm"}, "iommu-off", "IVRS", "AMD-Vi"),
        (
            {"tables": "FACP", "cpu": "GenuineIntel vmx hypervisor"},
            "iommu-off",
            "machine",
            "vIOMMU",
        ),
        ({"tables": "IVRS", "cpu": "AuthenticAMD svm"}, "iommu-off", "command line", "dmesg"),
        ({"cmdline": "quiet intel_iommu=on"}, "iommu-off", "command line", "firmware"),
        ({"cpu": "GenuineIntel fpu"}, "kvm-unusable", "no flag vmx", "VT-x"),
        ({"cpu": "AuthenticAMD svm", "kvm": "no"}, "kvm-unusable", "flag svm", "kvm_amd"),
    ],
)
def test_what_needs_the_firmware_is_explained(
    tmp_path: Path, files: dict[str, str], id: str, evidence: str, remedy: str
) -> None:
    machine = debian(tmp_path)
    machine.have({"etc/modules": "vfio-pci\n"})
    if "tables" in files:
        shutil.rmtree(tmp_path / "sys/firmware/acpi/tables")
        machine.have({f"sys/firmware/acpi/tables/{files['tables']}": ""})
    if "cpu" in files:
        vendor, _, flags = files["cpu"].partition(" ")
        machine.have({"proc/cpuinfo": f"vendor_id : {vendor}\nflags : {flags}\n"})
    if "kvm" in files:
        shutil.rmtree(tmp_path / "sys/class/misc")
    if "cmdline" in files:
        machine.have({"proc/cmdline": files["cmdline"]})
    before = machine.tree()
    status, result = machine.type("--dry-run", "--json")
    answer = json.loads(result.stdout)
    found = next(finding for finding in answer["findings"] if finding["id"] == id)
    assert evidence in " ".join(found["evidence"])
    assert remedy in found["remedy"]
    if id == "iommu-off":
        assert (status, answer["actions"]) == (1, [])
        assert machine.type("--yes")[0] == 1
        assert machine.tree() == before


def test_an_admin_s_word_against_it_is_not_taken_out(tmp_path: Path) -> None:
    machine = debian(tmp_path)
    machine.have(
        {
            "etc/modules": "vfio-pci\n",
            "etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="iommu=off"\n',
        }
    )
    subprocess.run([tmp_path / "usr/sbin/update-grub"], check=True)
    answer = machine.data("--yes")
    assert (answer["actions"], ids(answer)) == ([], ["iommu-off"])
    assert "iommu=off" in answer["findings"][0]["brief"]


@pytest.mark.parametrize(
    ("sign", "word"),
    [
        ("run/ostree-booted", "rpm-ostree kargs"),
        ("etc/kernel/proxmox-boot-uuids", "proxmox-boot-tool"),
        ("etc/NIXOS", "boot.kernelParams"),
    ],
)
def test_other_ways_to_boot_are_explained(tmp_path: Path, sign: str, word: str) -> None:
    machine = debian(tmp_path)
    machine.have({sign: "", "etc/modules": "vfio-pci\n"})
    before = machine.tree()
    status, result = machine.type("--yes", "--json")
    answer = json.loads(result.stdout)
    assert (status, answer["actions"], ids(answer)) == (1, [], ["kernel-line"])
    assert word in " ".join(answer["findings"][0]["evidence"])
    assert machine.tree() == before


def test_no_boot_loader_at_all(tmp_path: Path) -> None:
    answer = Machine(tmp_path).data("--dry-run")
    assert (kinds(answer), ids(answer)) == ([("WriteFile", MODULES)], ["kernel-line"])


def test_the_boot_loader_s_own_account_decides(tmp_path: Path) -> None:
    machine = systemd_boot(tmp_path)
    machine.have({"usr/sbin/update-grub": UPDATE_GRUB, "etc/default/grub": ""})
    machine.have({"boot/grub/grub.cfg": "linux /vmlinuz ro\n"})
    assert kinds(machine.data("--dry-run"))[0] == ("SetKernelLine", "update-grub")
    variable = "sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
    machine.have({variable: ""})
    (tmp_path / variable).write_bytes(b"\6\0\0\0" + "systemd-boot 257\0".encode("utf-16-le"))
    assert kinds(machine.data("--dry-run"))[0] == ("SetKernelLine", "kernel-install")


def test_undo_goes_with_no_other_option(tmp_path: Path) -> None:
    assert debian(tmp_path).type("--undo", "--hugepages", "2 GiB")[0] == 2


def test_no_name_leads_out_of_the_root(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/link").symlink_to("../../outside")
    (root / "etc/inside").symlink_to("real")
    (root / "etc/real").write_text("kept")
    (root / "etc/real").chmod(0o640)
    etc = Etc(root)
    assert [etc.text(name) for name in ("/etc/link", "/../outside", "/etc/inside")] == [
        None,
        None,
        "kept",
    ]
    with pytest.raises(BadInput):
        etc.put("/etc/link", "x")
    assert outside.read_text() == "secret"
    etc.put("/etc/inside", "new")
    assert (root / "etc/inside").is_symlink()
    assert ((root / "etc/real").read_text(), (root / "etc/real").stat().st_mode & 0o777) == (
        "new",
        0o640,
    )
    assert sorted(os.listdir(root / "etc")) == ["inside", "link", "real"]
