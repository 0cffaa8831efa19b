"""What the benchmarks stand on: the machines they make, and the floor they compare with."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest

from gpupt.edges.sysfs import read_host

BENCH = Path(__file__).resolve().parents[2] / "bench"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_made_machine_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = read_host(load("list", monkeypatch).make_tree(tmp_path, 8))
    assert len(host.devices) == 8
    assert [gpu.device.binding.driver for gpu in host.gpus] == ["nvidia", "nvidia"]
    assert all(gpu.device.iommu_group is not None for gpu in host.gpus)


def test_the_floor_is_the_same_machine_less_what_libvirt_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = [
        "/usr/bin/qemu-system-x86_64", "-name", "guest=x", "-S",
        "-object", '{"qom-type":"secret","id":"masterKey0"}',
        "-object", '{"qom-type":"memory-backend-ram","id":"pc.ram"}',
        "-chardev", "socket,id=charmonitor,fd=34,server=on,wait=off",
        "-mon", "chardev=charmonitor,id=monitor,mode=control",
        "-netdev", '{"type":"tap","fd":"37","vhost":true,"id":"hostnet0"}',
        "-add-fd", "set=0,fd=36,opaque=serial0-log",
        "-chardev", "pty,id=charserial0,logfile=/dev/fdset/0,logappend=on",
        "-device", '{"driver":"vfio-pci","host":"0000:01:00.0"}',
        "-sandbox", "on,obsolete=deny",
    ]  # fmt: skip
    floor = load("up", monkeypatch).without_libvirt(argv, tap="tap7", console="/tmp/c")
    assert floor == [
        "/usr/bin/qemu-system-x86_64", "-name", "guest=x",
        "-object", '{"qom-type":"memory-backend-ram","id":"pc.ram"}',
        "-netdev", "tap,id=hostnet0,ifname=tap7,script=no,downscript=no,vhost=on",
        "-chardev", "file,id=charserial0,path=/tmp/c",
        "-device", '{"driver":"vfio-pci","host":"0000:01:00.0"}',
    ]  # fmt: skip


def test_a_made_machine_has_the_gpus_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = read_host(load("list", monkeypatch).make_tree(tmp_path, 24, gpus=2))
    assert (len(host.devices), len(host.gpus)) == (24, 2)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (("scan.py", "--sizes", "8", "--repeats", "1"), 3),
        (("detach.py", "--gpus", "1", "--repeats", "1"), 2),
    ],
)
def test_the_benchmarks_run(words: tuple[str, ...], lines: int) -> None:
    argv = [sys.executable, str(BENCH / words[0]), *words[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert len([line for line in said if "µs a function" in line or "0 writes " in line]) == lines
    assert not any(" of 0 files" in line for line in said)


def test_the_floor_of_a_detach_is_its_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detach = load("detach", monkeypatch)
    kernel = detach.make_host(tmp_path / "host", 1)
    before = kernel.tree()
    detach.type_at(kernel, tmp_path / "state", "detach", "--all", "--yes")
    made = kernel.writes.copy()
    assert [PurePosixPath(path).name for path, _ in made] == [
        *("driver_override", "unbind", "drivers_probe") * 2
    ]
    assert {kernel.driver_of(f"0000:01:00.{n}") for n in (0, 1)} == {"vfio-pci"}
    detach.type_at(kernel, tmp_path / "state", "detach", "--all", "--yes")
    assert kernel.writes == made
    bare = detach.make_host(tmp_path / "bare", 1)
    detach.write_bare(bare, made, apart=True)
    assert bare.tree() == kernel.tree() != before
