"""What the benchmarks stand on: the machines they make, and the floor they compare with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
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
