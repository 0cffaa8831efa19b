"""A state folder that QEMU can reach, a tiny image in it, and a clean libvirtd after."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from tinykernel import write_tiny_kernel

from gpupt.cli.clusterworld import stack_of
from gpupt.edges.hypervisor import Hypervisor
from gpupt.edges.images import images_folder, write_image
from gpupt.edges.rolls import read_rolls
from gpupt.errors import GpuptError
from gpupt.model.cluster import ClusterSpec
from gpupt.model.roll import Image

URI = "qemu:///system"
CLUSTER = "gputest"
SUBNET = "10.213.7.0/28"
SPEC = f"""\
cluster: {CLUSTER}
rolls: []
network: {{subnet: {SUBNET}}}
nodes:
  - {{name: frontend, role: frontend, cpus: 1, memory: 64 MiB}}
  - {{name: compute-0, role: compute, cpus: 1, memory: 64 MiB}}
"""
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.libvirt)


@pytest.fixture
def hypervisor() -> Iterator[Hypervisor]:
    """The real libvirtd; nothing of the tests' cluster is on it before or after."""
    try:
        connected = Hypervisor.connect(URI, deadline=20)
    except GpuptError as error:
        pytest.skip(f"no libvirtd to talk to: {error.brief}")
    sweep(connected)
    yield connected
    sweep(connected)
    connected.close()


def sweep(hypervisor: Hypervisor) -> None:
    """Remove what a test that failed left behind."""
    for domain in hypervisor.domains():
        if domain.name.startswith(f"{CLUSTER}-"):
            hypervisor.remove_domain(domain.name, patience=0)
    hypervisor.remove_network(CLUSTER)


@pytest.fixture
def state() -> Iterator[Path]:
    """A state folder that QEMU's own user can pass through: pytest's own is root's alone."""
    folder = Path(tempfile.mkdtemp(prefix="gpupt-test-", dir="/var/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(SPEC)
    return file


def tiny_image(state: Path, *, stays: bool) -> Image:
    """An image whose digest is the one that the tests' cluster asks for."""
    rolls = read_rolls()
    spec = ClusterSpec(CLUSTER, (), IPv4Network(SUBNET), ())
    stack = stack_of(spec, rolls=rolls)
    folder = images_folder(state) / stack.digest
    folder.mkdir(parents=True)
    write_tiny_kernel(folder / "vmlinuz", stays=stays)
    (folder / "initrd").write_bytes(b"\0" * 1024)
    size = 64 << 20
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", folder / "disk.qcow2", str(size)],
        check=True,
        timeout=30,
    )
    return write_image(
        folder,
        digest=stack.digest,
        rolls=stack.rolls,
        disk="disk.qcow2",
        format="qcow2",
        virtual_size=size,
    )
