"""`up`, `show` and `down` of a cluster of tiny guests against a real libvirtd.

The guests have no SSH: what is tried here is everything up to waiting for it, and the way
back from there.  The emulated tier brings whole clusters up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import CLUSTER, tiny_image
from tinykernel import WORD

from gpupt.edges.clusterfolder import ClusterFolder
from gpupt.edges.hypervisor import Hypervisor
from gpupt.edges.journal import read_ledger

FRONTEND = f"{CLUSTER}-frontend"


@pytest.fixture(autouse=True)
def emulated(state: Path) -> None:
    """Note, as the probe would, that KVM runs no guest here: the same on every machine."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    noted = {"boot": boot, "usable": False, "why": "a test says so"}
    (state / "kvm.json").write_text(json.dumps(noted))


def argv(state: Path, *words: str | Path) -> list[str]:
    return [
        *(sys.executable, "-m", "gpupt.cli.main", "--state", str(state)),
        *(str(word) for word in words),
    ]


def gpupt(state: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv(state, *words),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def nothing_left(hypervisor: Hypervisor, state: Path) -> None:
    assert [d.name for d in hypervisor.domains() if d.name.startswith(CLUSTER)] == []
    assert [n.name for n in hypervisor.networks() if n.name == CLUSTER] == []
    assert not ClusterFolder(state, CLUSTER).exists
    assert read_ledger(state).unfinished == ()


def wait_for_guests(hypervisor: Hypervisor, state: Path, names: Sequence[str]) -> None:
    """Until every guest has said its word on its console."""
    until = time.monotonic() + 90
    for name in names:
        console = ClusterFolder(state, CLUSTER).console(name)
        while not (console.exists() and WORD.strip() in console.read_text()):
            assert time.monotonic() < until, f"{name} never spoke"
            time.sleep(0.2)


def test_node_that_goes_down_is_noticed_and_all_is_undone(
    hypervisor: Hypervisor, state: Path, spec_file: Path
) -> None:
    tiny_image(state, stays=False)
    done = gpupt(state, "up", spec_file, "--yes")
    assert done.returncode == 1, done.stderr
    assert "frontend went down while it was waited for" in done.stderr
    assert WORD.strip() in done.stderr
    console = ClusterFolder(state, CLUSTER).console("frontend")
    assert f"its console, in {console}, ends:" in done.stderr
    assert console.exists()
    assert f"undone: start {CLUSTER}/frontend" in done.stderr
    nothing_left(hypervisor, state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_up_is_undone(
    hypervisor: Hypervisor, state: Path, spec_file: Path, number: signal.Signals
) -> None:
    tiny_image(state, stays=True)
    with subprocess.Popen(
        argv(state, "up", spec_file, "--yes"), stderr=subprocess.PIPE, text=True
    ) as child:
        wait_for_guests(hypervisor, state, ["frontend", "compute-0"])
        os.kill(child.pid, number)
        _, said = child.communicate(timeout=120)
    assert child.returncode not in (0, None), said
    assert "Traceback" not in said
    nothing_left(hypervisor, state)


def test_killed_up_is_found_refused_and_recovered(
    hypervisor: Hypervisor, state: Path, spec_file: Path
) -> None:
    tiny_image(state, stays=True)
    with subprocess.Popen(
        argv(state, "up", spec_file, "--yes"), stderr=subprocess.DEVNULL
    ) as child:
        wait_for_guests(hypervisor, state, ["frontend"])
        child.kill()
    assert len(read_ledger(state).unfinished) == 1
    again = gpupt(state, "up", spec_file, "--yes")
    assert again.returncode == 3, again.stderr
    assert "gpupt recover" in again.stderr
    done = gpupt(state, "recover", "--yes")
    assert done.returncode == 0, done.stderr
    nothing_left(hypervisor, state)


def test_cluster_that_is_up_is_shown_left_alone_and_taken_down(
    hypervisor: Hypervisor, state: Path, spec_file: Path
) -> None:
    tiny_image(state, stays=True)
    with subprocess.Popen(
        argv(state, "up", spec_file, "--yes"), stderr=subprocess.DEVNULL
    ) as child:
        wait_for_guests(hypervisor, state, ["frontend", "compute-0"])
        child.kill()
    # As if it had come up: its guests run, and its run is over.
    import sqlite3

    with sqlite3.connect(state / "journal.sqlite") as journal:
        journal.execute("UPDATE runs SET outcome = 'done'")
    again = gpupt(state, "up", spec_file, "--yes")
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
    changed = spec_file.with_name("changed.yaml")
    changed.write_text(spec_file.read_text().replace("64 MiB}", "65 MiB}", 1))
    refused = gpupt(state, "up", changed, "--yes")
    assert refused.returncode == 3
    assert "frontend: memory 64 MiB → 65 MiB" in refused.stderr
    # Another cluster cannot have its subnet.
    other = spec_file.with_name("other.yaml")
    other.write_text(spec_file.read_text().replace(f"cluster: {CLUSTER}", "cluster: gputest2"))
    refused = gpupt(state, "plan", other)
    assert refused.returncode == 3
    assert "clashes with libvirt's network 'gputest'" in refused.stderr
    assert f"at {other}:3:19" in refused.stderr
    # Its folder lost, it goes by what libvirt says.
    ClusterFolder(state, CLUSTER).remove()
    planned = gpupt(state, "--json", "down", CLUSTER, "--dry-run")
    kinds = [action["kind"] for action in json.loads(planned.stdout)["actions"]]
    assert kinds == ["StopNode", "StopNode", "StopNetwork"]
    asked = gpupt(state, "down", CLUSTER)
    assert asked.returncode == 2
    assert hypervisor.domain(FRONTEND) is not None
    done = gpupt(state, "--json", "down", CLUSTER, "--yes")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["changed"], told["restored"]) == (True, True)
    nothing_left(hypervisor, state)
    second = gpupt(state, "--json", "down", CLUSTER, "--yes")
    assert (second.returncode, json.loads(second.stdout)["changed"]) == (0, False)


def test_secrets_are_readable_by_root_alone(
    hypervisor: Hypervisor, state: Path, spec_file: Path
) -> None:
    tiny_image(state, stays=True)
    folder = ClusterFolder(state, CLUSTER)
    with subprocess.Popen(
        argv(state, "up", spec_file, "--yes"), stderr=subprocess.DEVNULL
    ) as child:
        wait_for_guests(hypervisor, state, ["frontend"])
        readable = [
            str(file.relative_to(folder.path))
            for file in folder.path.rglob("*")
            if file.is_file() and file.stat().st_mode & 0o077
        ]
        key = folder.key.read_text().splitlines()[1]
        said = [
            Path(f"/proc/{entry}/cmdline").read_text()
            for entry in os.listdir("/proc")
            if entry.isdigit() and Path(f"/proc/{entry}/cmdline").exists()
        ]
        os.kill(child.pid, signal.SIGINT)
    assert readable == ["id_ed25519.pub"]
    assert not any(key in line for line in said)


def test_foreign_domain_of_a_nodes_name_is_never_touched(
    hypervisor: Hypervisor, state: Path, spec_file: Path
) -> None:
    tiny_image(state, stays=True)
    xml = f"""\
<domain type="qemu"><name>{FRONTEND}</name><memory unit="MiB">32</memory>
<os><type arch="x86_64">hvm</type></os></domain>"""
    connection = hypervisor._connection
    domain = connection.defineXML(xml)
    try:
        refused = gpupt(state, "up", spec_file, "--yes")
        assert refused.returncode == 3
        assert f"a domain '{FRONTEND}' that is not gpupt's" in refused.stderr
        # No cluster of that name was ever begun here.
        assert gpupt(state, "down", CLUSTER, "--yes").returncode == 2
        assert hypervisor.domain(FRONTEND) is not None
    finally:
        domain.undefine()


def test_bad_input_touches_nothing(state: Path, spec_file: Path) -> None:
    spec_file.write_text(spec_file.read_text().replace("cpus", "cpsu", 1))
    done = gpupt(state, "up", spec_file, "--yes")
    assert done.returncode == 2
    assert f"at {spec_file}:5:38" in done.stderr
    assert "did you mean 'cpus'" in done.stderr
    assert sorted(entry.name for entry in state.iterdir()) == ["kvm.json"]


def test_more_gpus_than_the_machine_has(
    hypervisor: Hypervisor, state: Path, spec_file: Path
) -> None:
    text = spec_file.read_text().replace("memory: 64 MiB}\n", "memory: 64 MiB, gpus: 60}\n", 1)
    spec_file.write_text(text)
    done = gpupt(state, "up", spec_file, "--yes")
    assert done.returncode == 3, done.stderr
    assert "frontend asks for 60 GPUs" in done.stderr
    assert sorted(entry.name for entry in state.iterdir()) == ["kvm.json"]


def test_render_shows_every_file_and_no_secret(state: Path, spec_file: Path) -> None:
    done = gpupt(state, "--json", "render", spec_file)
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)["files"]
    assert files[0]["path"] == f"libvirt/{FRONTEND}.xml"
    assert files[0]["content"].startswith("<domain")
    assert not any("PRIVATE KEY" in each["content"] for each in files)
    assert sorted(entry.name for entry in state.iterdir()) == ["kvm.json"]
