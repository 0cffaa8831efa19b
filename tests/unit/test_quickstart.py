"""./quickstart with the machine's programs replaced by ones that note what they were asked."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpupt.cli.clusterworld import read_cluster_file
from gpupt.cli.demo import EMULATOR_MEMORY, demo_spec, memory_for

HERE = Path(__file__).resolve().parents[2]
NOTE = '#!/bin/sh\necho "$(basename "$0") $*" >>"$NOTES"\n'
VENV_PYTHON = (
    NOTE + '[ "$2 $3" = "pip install" ] && cp "$VENV_GPUPT" "$(dirname "$0")/gpupt"\nexit 0\n'
)


@dataclass
class Machine:
    """A checkout in a folder of its own, and a folder of programs that come first on PATH."""

    checkout: Path
    programs: Path
    notes: Path
    environment: dict[str, str]

    def program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(script)
        path.chmod(0o755)

    def installed(self, *packages: str) -> None:
        """Only these packages are installed here (``*``: all)."""
        names = "|".join(packages)
        self.program(
            "dpkg-query",
            f'#!/bin/sh\nfor last; do :; done\ncase $last in {names}) echo "ii "; esac\n',
        )

    def quickstart(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.checkout / "quickstart"), *arguments],
            env={**self.environment, **environment},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def said(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def said_by(self, program: str) -> list[str]:
        return [line for line in self.said if line.startswith(f"{program} ")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    checkout, programs = tmp_path / "a checkout", tmp_path / "programs"
    checkout.mkdir()
    programs.mkdir()
    for name in ("quickstart", "setup.cfg", "pyproject.toml"):
        shutil.copy2(HERE / name, checkout)
    release = tmp_path / "os-release"
    release.write_text('ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Debian 13"\n')
    (tmp_path / "meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable:   88888888 kB\n")
    gpupt = tmp_path / "gpupt"
    gpupt.write_text(NOTE)
    gpupt.chmod(0o755)
    made = Machine(
        checkout,
        programs,
        tmp_path / "notes",
        {
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "NOTES": str(tmp_path / "notes"),
            "OS_RELEASE": str(release),
            "MEMINFO": str(tmp_path / "meminfo"),
            "VENV_GPUPT": str(gpupt),
            "PYTHON": str(programs / "python3"),
        },
    )
    made.program("apt-get", NOTE)
    made.program("uname", "#!/bin/sh\necho x86_64\n")
    # `python3 -m venv DIR` makes an environment whose python notes what it is asked
    made.program("venv-python", VENV_PYTHON)
    made.program(
        "python3",
        NOTE
        + 'case "$*" in *"-m venv"*) mkdir -p "$3/bin"; echo "command = $3" >"$3/pyvenv.cfg";'
        + f' cp "{programs}/venv-python" "$3/bin/python";; -c*) echo 3.13;; esac\nexit 0\n',
    )
    made.program("sudo", NOTE)
    made.installed("*")
    return made


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="the demo's set-up is root's")


def test_help_says_what_it_does(machine: Machine) -> None:
    done = machine.quickstart("--help")
    assert done.returncode == 0
    assert "--setup-only" in done.stdout
    assert machine.said == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("demo",),
        ("--report",),
        ("--mirror",),
        ("--spec",),
        ("--spec", "/nonexistent.yaml"),
        ("--kep",),
        ("-k",),
        ("--setup-only", "--no-such-option"),
    ],
)
def test_bad_usage_touches_nothing(machine: Machine, arguments: tuple[str, ...]) -> None:
    machine.installed("nothing")
    done = machine.quickstart(*arguments)
    assert (done.returncode, machine.said) == (2, [])


def test_too_little_memory_is_said_before_anything_is_touched(machine: Machine) -> None:
    machine.installed("nothing")
    Path(machine.environment["MEMINFO"]).write_text("MemAvailable:    8388608 kB\n")
    done = machine.quickstart()
    assert (done.returncode, machine.said) == (3, [])
    assert "needs 10240 MiB of memory, and 8192 MiB are available" in done.stderr
    assert machine.quickstart("--setup-only", "dev").returncode != 3


def test_the_memory_it_asks_for_is_the_demos() -> None:
    spec = read_cluster_file(demo_spec())
    needed = (memory_for(spec.spec) + EMULATOR_MEMORY) >> 20
    assert f"demo_mib={needed}\n" in (HERE / "quickstart").read_text()


@as_root
@pytest.mark.parametrize(
    "options",
    [("--keep", "--name=x"), ("--json",), ("--spec", str(HERE / "examples/emulated.yaml"))],
)
def test_the_demos_options_are_known(machine: Machine, options: tuple[str, ...]) -> None:
    assert machine.quickstart(*options).returncode == 0
    (said,) = machine.said_by("gpupt")
    assert said.endswith(" ".join(options))


@as_root
def test_only_what_is_missing_is_installed_and_why_is_said(machine: Machine) -> None:
    machine.installed("gcc", "libc6-dev", "e2fsprogs", "libvirt-dev", "debian-archive-keyring")
    done = machine.quickstart("--setup-only")
    assert done.returncode == 0, done.stderr
    update, install = machine.said_by("apt-get")
    assert update.endswith(" update")
    assert install.split("--no-install-recommends ")[1].split() == [
        "pkg-config",
        "mmdebstrap",
        "gpg",
        "qemu-utils",
    ]
    assert "qemu-utils              makes their disks" in done.stderr
    assert "\n  gcc " not in done.stderr


def test_a_machine_that_has_all_is_left_alone(machine: Machine) -> None:
    assert machine.quickstart("--setup-only").returncode == 0
    assert machine.said_by("apt-get") == []
    assert machine.said_by("sudo") == []


@as_root
def test_kinds_of_set_up_differ_in_what_they_need(machine: Machine) -> None:
    machine.installed("nothing")
    shown = {kind: machine.quickstart("--setup-only", kind).stderr for kind in ("dev", "host")}
    assert "libvirt-dev" in shown["dev"]
    assert "mmdebstrap" not in shown["dev"]
    assert {"mmdebstrap", "libvirt-daemon-system", "qemu-system-x86"} <= set(shown["host"].split())


def test_the_second_time_nothing_is_done_until_the_metadata_changes(machine: Machine) -> None:
    assert machine.quickstart("--setup-only").returncode == 0
    first = [line for line in machine.said if "pip install" in line]
    assert [line.split()[-2:] for line in first] == [["-e", ".[images]"]]
    machine.quickstart("--setup-only")
    assert len([line for line in machine.said if "pip install" in line]) == 1
    with (machine.checkout / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    machine.quickstart("--setup-only")
    assert len([line for line in machine.said if "pip install" in line]) == 2


def test_an_environment_for_development_serves_the_demo_too(machine: Machine) -> None:
    machine.quickstart("--setup-only", "dev")
    machine.quickstart("--setup-only")
    assert [line.split()[-1] for line in machine.said if "pip install" in line] == [".[images,dev]"]


def test_an_environment_that_was_moved_is_made_anew(machine: Machine) -> None:
    machine.quickstart("--setup-only")
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    machine.quickstart("--setup-only")
    assert [line.split()[-1] for line in machine.said_by("python3") if "venv" in line] == [
        "checkout/.venv",
        str(machine.checkout / ".venv"),
    ]


@as_root
def test_the_demo_gets_what_was_asked_for(machine: Machine) -> None:
    done = machine.quickstart("--keep", "--mirror", "http://mirror.example/debian")
    assert done.returncode == 0, done.stderr
    report = machine.checkout / "demo-report"
    assert machine.said_by("gpupt") == [
        f"gpupt lab demo --report {report} --keep --mirror http://mirror.example/debian"
    ]


@as_root
def test_a_failing_apt_ends_it_and_is_shown(machine: Machine) -> None:
    machine.installed("gcc")
    machine.program("apt-get", NOTE + 'echo "E: no such mirror" >&2\nexit 100\n')
    done = machine.quickstart()
    assert done.returncode == 1
    assert "E: no such mirror" in done.stderr
    assert "apt-get update failed with status 100" in done.stderr
    assert [line for line in machine.said if "pip" in line or "lab" in line] == []


@as_root
def test_an_apt_at_work_is_waited_for(machine: Machine) -> None:
    machine.installed("gcc")
    machine.program("sleep", NOTE)
    held = 'case "$*" in *update*) ;; *) exit 0 ;; esac\n'
    held += '[ "$(grep -c "^apt-get.*update" "$NOTES")" -gt 2 ] && exit 0\n'
    held += (
        "echo 'E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7'; exit 100\n"
    )
    machine.program("apt-get", NOTE + held)
    done = machine.quickstart()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("another apt holds the lists") == 1
    assert [" update" in said for said in machine.said_by("apt-get")] == [True] * 3 + [False]


def test_a_failing_pip_ends_it_and_is_tried_again(machine: Machine) -> None:
    failing = '[ "$2 $3" = "pip install" ] && { echo "no index" >&2; exit 3; }\nexit 0\n'
    machine.program("venv-python", NOTE + failing)
    done = machine.quickstart("--setup-only")
    assert done.returncode == 1
    assert "no index" in done.stderr
    assert "pip install failed with status 3" in done.stderr
    machine.quickstart("--setup-only")
    assert len([line for line in machine.said if "pip install" in line]) == 2


def test_an_old_python_is_refused_with_a_remedy(machine: Machine) -> None:
    machine.program("python3", '#!/bin/sh\n[ "$1" = -c ] && { echo 3.9; exit; }\nexit 1\n')
    done = machine.quickstart("--setup-only")
    assert done.returncode == 1
    assert "no Python ≥ 3.11" in done.stderr
    assert "version 3.9" in done.stderr
    assert "PYTHON=python3.12 ./quickstart" in done.stderr


def test_another_distribution_is_refused_with_the_way_by_hand(machine: Machine) -> None:
    Path(machine.environment["OS_RELEASE"]).write_text('ID=fedora\nPRETTY_NAME="Fedora 43"\n')
    done = machine.quickstart("--yes")
    assert done.returncode == 1
    assert "this is Fedora 43" in done.stderr
    assert "python3 -m venv" in done.stderr
    assert machine.said == []


def test_another_processor_is_refused(machine: Machine) -> None:
    machine.program("uname", "#!/bin/sh\necho aarch64\n")
    done = machine.quickstart("--yes")
    assert done.returncode == 1
    assert "this machine is aarch64" in done.stderr


def test_without_root_it_asks_sudo_and_hands_on_package_sources(machine: Machine) -> None:
    tree = machine.checkout.parent
    words = [str(machine.checkout / "quickstart"), "--keep"]
    if os.geteuid() == 0:
        for path in (tree, *tree.rglob("*")):
            os.chown(path, 65534, 65534)
        for parent in list(tree.parents)[:-2]:
            if not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o001)
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *words]
    done = subprocess.run(
        words,
        env=machine.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    asked = machine.said_by("sudo")[-1]
    assert asked.endswith(f"-- {machine.checkout}/quickstart --keep")
    assert "PIP_INDEX_URL" in asked
    assert machine.said_by("gpupt") == []


def on_a_terminal(machine: Machine, answer: bytes, *arguments: str) -> tuple[int, str]:
    """Run it on a pseudo-terminal and answer its question; its status, and what was shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        path = str(machine.checkout / "quickstart")
        os.execve(path, [path, *arguments], machine.environment)
    shown, answered = b"", False
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
        if b"[Y/n]" in shown and not answered:
            os.write(terminal, answer)
            answered = True
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


@as_root
def test_a_terminal_is_asked_once_and_no_means_no(machine: Machine) -> None:
    machine.installed("gcc")
    status, shown = on_a_terminal(machine, b"n\n")
    assert (status, machine.said_by("apt-get")) == (1, [])
    assert "Nothing was touched." in shown
    status, shown = on_a_terminal(machine, b"\n")
    assert (status, shown.count("[Y/n]"), len(machine.said_by("gpupt"))) == (0, 1, 1)


@as_root
def test_yes_asks_nothing_on_a_terminal(machine: Machine) -> None:
    machine.installed("gcc")
    status, shown = on_a_terminal(machine, b"n\n", "--yes")
    assert (status, "[Y/n]" in shown) == (0, False)


@as_root
def test_an_interrupt_is_clean(machine: Machine) -> None:
    machine.installed("gcc")
    machine.program("apt-get", NOTE + "exec sleep 30\n")
    child = subprocess.Popen(
        [str(machine.checkout / "quickstart")],
        env=machine.environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 20
    while not machine.said_by("apt-get") and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "run it again to go on" in said
    assert machine.said_by("gpupt") == []
