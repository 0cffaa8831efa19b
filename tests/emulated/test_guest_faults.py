"""Faults under a guest that has a GPU: its QEMU killed, libvirt killed, the card unbound or
pulled.  What the kernel and libvirt make of each, and that gpupt neither hangs nor crashes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from emulatedhost import Host
from shapes import doctor, gpus, refusal
from test_faults import await_driver, pull, put_in
from tinyguest import TinyGuest

from gpupt.model.pci import PciAddress

pytestmark = pytest.mark.emulated
GPU, CARD = "01:00.0", "02:00.0"
ID = "10de2330"
IsHome = Callable[[], None]
SOCKETS = "libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket"
DAEMONS = (
    f"systemctl unmask --runtime libvirtd.service {SOCKETS};"
    " systemctl reset-failed; systemctl start libvirtd"
)


@pytest.fixture
def guest(host: Host) -> Iterator[TinyGuest]:
    """A guest that runs, and has the first GPU, which gpupt has detached."""
    host.gpupt("detach", GPU, "--yes")
    tiny = TinyGuest(host, "tiny-guest", (PciAddress.parse(GPU),))
    try:
        tiny.start()
        yield tiny
    finally:
        host.sh(DAEMONS, check=False)
        tiny.destroy()
    host.run("gpupt", "attach", GPU, "--yes", check=False)


def reading_verbs_answer(host: Host) -> None:
    """Each of them comes to an end, and not with a traceback; recover finds nothing to do."""
    assert host.gpupt("list")["gpus"] != []
    assert [loan["gpu"][5:] for loan in host.gpupt("status")["loans"]] == [GPU]
    assert host.gpupt("recover", "--yes")["actions"] == []


def test_a_guest_has_its_gpu_and_keeps_it(host: Host, guest: TinyGuest, is_home: IsHome) -> None:
    assert ID in (guest.seen() or ())
    assert guest.state == "running"
    (busy,) = doctor(host)["iommufd-busy"]
    assert any(f"PID {guest.pid}" in line for line in busy["evidence"])
    reading_verbs_answer(host)
    guest.destroy()
    assert host.driver(GPU) == "vfio-pci", "managed='no': libvirt leaves it where it was"
    host.gpupt("attach", GPU, "--yes")
    is_home()


def test_what_a_guest_holds_is_not_given_back_with_libvirtd_killed_or_not(
    host: Host, guest: TinyGuest, is_home: IsHome
) -> None:
    """With libvirtd, and when that is killed."""
    pid = guest.pid
    said = refusal(host, "attach", GPU, "--yes")
    assert f"PID {pid}" in said
    assert "/dev/vfio/" in said
    kill_libvirtd(host)
    assert host.sh(f"test -e /proc/{pid}", check=False).status == 0, "a guest outlives libvirtd"
    assert "libvirt-unreachable" in doctor(host)
    reading_verbs_answer(host)
    assert f"PID {pid}" in refusal(host, "attach", GPU, "--yes")
    host.sh(DAEMONS)
    assert guest.state == "running"
    assert ID in (guest.seen() or ())
    guest.destroy()
    host.gpupt("attach", GPU, "--yes")
    is_home()


def test_qemu_killed(host: Host, guest: TinyGuest, is_home: IsHome) -> None:
    host.sh(f"kill -KILL {guest.pid}; until ! test -e /proc/{guest.pid}; do sleep 0.2; done")
    host.sh(f"until ! virsh -q domstate {guest.name} 2>/dev/null; do sleep 0.5; done")
    assert host.driver(GPU) == "vfio-pci"
    assert gpus(host)[GPU]["state"] == "detached"
    assert "iommufd-busy" not in doctor(host)
    reading_verbs_answer(host)
    host.gpupt("attach", GPU, "--yes")
    is_home()


def kill_libvirtd(host: Host) -> None:
    """End libvirtd, and keep systemd from starting it again."""
    host.sh(f"systemctl mask --runtime libvirtd.service {SOCKETS}")
    host.sh(f"systemctl kill -s KILL libvirtd.service; systemctl stop {SOCKETS}")
    host.sh("while systemctl -q is-active libvirtd.service; do sleep 0.3; done")


def test_both_killed(host: Host, guest: TinyGuest, is_home: IsHome) -> None:
    pid = guest.pid
    kill_libvirtd(host)
    host.sh(f"kill -KILL {pid}; until ! test -e /proc/{pid}; do sleep 0.2; done")
    assert host.driver(GPU) == "vfio-pci"
    reading_verbs_answer(host)
    host.gpupt("attach", GPU, "--yes")
    assert host.driver(GPU) == "uio_pci_generic"
    host.sh(DAEMONS)
    assert guest.state == "", "libvirt finds it gone"
    is_home()


def await_loss(guest: TinyGuest, *, deadline: float = 60) -> None:
    """Return once the guest has its GPU no more."""
    end = time.monotonic() + deadline
    while ID in (guest.seen() or (ID,)):
        assert time.monotonic() < end, "the guest still has its GPU"
        time.sleep(1)


def test_unbound_under_a_guest(host: Host, guest: TinyGuest, is_home: IsHome) -> None:
    """The kernel asks QEMU for the card, QEMU the guest; the domain runs on without it."""
    unbind = f"echo 0000:{GPU} > /sys/bus/pci/drivers/vfio-pci/unbind"
    host.sh(unbind, deadline=60)
    assert host.driver(GPU) is None
    assert guest.state == "running"
    await_loss(guest)
    assert gpus(host)[GPU]["state"] == "driverless"
    reading_verbs_answer(host)
    host.gpupt("attach", GPU, "--yes")
    assert guest.state == "running"
    guest.destroy()
    is_home()


def test_pulled_from_under_a_guest(host: Host, guest: TinyGuest, is_home: IsHome) -> None:
    pull(host)
    try:
        await_loss(guest)
        assert guest.state == "running"
        assert GPU not in gpus(host)
        reading_verbs_answer(host)
        assert [each["kind"] for each in host.gpupt("attach", GPU, "--yes")["actions"]] == [
            "EraseLoan"
        ]
    finally:
        guest.destroy()
        put_in(host)
    await_driver(host, GPU, "uio_pci_generic")
    is_home()


def test_an_unbind_that_does_not_end_keeps_nobody(
    host: Host, guest: TinyGuest, is_home: IsHome
) -> None:
    """QEMU is stopped, and cannot let go: who unbinds its card waits, and the kernel keeps the
    card locked.  Whoever reads that card's files naively is never seen again."""
    pid = guest.pid
    unbind = f"echo 0000:{GPU} > /sys/bus/pci/drivers/vfio-pci/unbind"
    host.sh(f"kill -STOP {pid}; setsid sh -c '{unbind}' > /dev/null 2>&1 & sleep 2")
    try:
        shown = gpus(host)
        assert list(shown) == [GPU, CARD, "03:00.0"]
        assert shown[CARD]["driver_override"] is None
        found = doctor(host)
        assert found["unbind-stuck"]
        assert [loan["gpu"][5:] for loan in host.gpupt("status")["loans"]] == [GPU]
        # The other card moves meanwhile.
        host.gpupt("detach", CARD, "--yes")
        host.gpupt("attach", CARD, "--yes")
        # Refused before anything is written: who has the card is known.
        refused = host.run("gpupt", "attach", GPU, "--yes", check=False, deadline=180)
        assert refused.status == 3
        assert f"PID {pid}" in refused.stderr
    finally:
        host.sh(f"kill -CONT {pid}")
    await_loss(guest)
    guest.destroy()
    host.sh(f"until ! test -e /sys/bus/pci/devices/0000:{GPU}/driver; do sleep 0.5; done")
    host.gpupt("attach", GPU, "--yes")
    is_home()
