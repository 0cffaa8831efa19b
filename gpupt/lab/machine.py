"""Pure of effects: the emulated host's description, and QEMU's command line made from it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from gpupt.lab.topology import (
    Topology,
    device_arguments,
    driver_commands,
    iommu_arguments,
    numa_arguments,
)
from gpupt.model.roll import Image

CREDENTIALS = "opt/io.systemd.credentials"  # where systemd looks for them in QEMU's fw_cfg
IMAGES = "/var/lib/gpupt/images"  # in the emulated host
UNIT = "gpupt-lab.service"
SHARE = "/mnt/share"

# nouveau reads past a stand-in's registers and takes the kernel down; the others only cost
# time at boot.
UNWANTED_MODULES = ("nouveau", "cfg80211", "iTCO_wdt", "lpc_ich", "pcspkr")
# No part of the chipset whose driver only costs time.
MACHINE = "q35,sata=off,smbus=off,i8042=off,vmport=off"
# All that QEMU can emulate (AMD's virtualisation with it, so that guests in the emulated host
# run on KVM), but for what makes it slow: string instructions are carried out byte by byte,
# a fifth level of page tables is walked a fifth time (and in a guest for each of the other
# levels), and guarding user memory ends a translated block at each copy.
TCG_CPU = "max,erms=off,fsrm=off,la57=off,smap=off,smep=off,pku=off"

# What the names below the lab's folder are for.
OVERLAY, CONSOLE, QMP, LOG = "overlay.qcow2", "console.log", "qmp.sock", "qemu.log"
KEY, HOST_KEY = "key", "host_key"
IMAGES_SHARE = "images"
AUTHORIZED, HOSTS, SETUP, UNIT_STRING = "authorized_keys", "hosts", "setup", "unit"


@dataclass(frozen=True, slots=True)
class Machine:
    """The emulated host to boot; ``memory`` in bytes, ``port`` on the loopback leads to its
    SSH.  ``images`` are what its own gpupt finds already built; ``accelerator`` is kvm or
    tcg."""

    name: str
    image: Image
    topology: Topology
    cpus: int
    memory: int
    port: int
    accelerator: str
    images: tuple[Image, ...] = ()
    share: Path | None = None


def kernel_line(machine: Machine) -> str:
    """The emulated host's kernel command line."""
    words = [
        "root=/dev/vda rw console=ttyS0 quiet",
        f"systemd.hostname={machine.name} systemd.wants={UNIT} gpupt.lab={machine.name}",
        # Also where the firmware has the IOMMU off, as people write it there: it does not help.
        "intel_iommu=on",
        f"module_blacklist={','.join(UNWANTED_MODULES)}",
        # A guest's guests are nobody's wish.
        "mitigations=off nokaslr kvm_amd.nested=0 systemd.ssh_auto=no",
    ]
    if machine.accelerator == "tcg":
        # An emulated timer is late at times; the kernel must not think it broken.
        words.append("tsc=reliable no_timer_check")
    return " ".join(words)


def qemu_arguments(machine: Machine) -> list[str]:
    """QEMU's arguments; paths below the lab's folder are relative to it."""
    kvm = machine.accelerator == "kvm"
    words = ["-name", f"gpupt-lab-{machine.name}", "-nodefaults", "-no-user-config"]
    words += ["-machine", MACHINE + (",kernel-irqchip=split" if kvm else "")]
    words += ["-accel", "kvm" if kvm else "tcg,thread=multi"]
    words += ["-cpu", "host" if kvm else TCG_CPU, "-smp", str(machine.cpus)]
    words += ["-m", f"{machine.memory >> 20}M", "-display", "none"]
    words += numa_arguments(machine.topology, cpus=machine.cpus, memory=machine.memory)
    words += iommu_arguments(machine.topology)
    words += ["-kernel", str(machine.image.kernel), "-initrd", str(machine.image.initrd)]
    words += ["-append", kernel_line(machine)]
    words += ["-chardev", f"file,id=console,path={CONSOLE},append=on", "-serial", "chardev:console"]
    words += ["-qmp", f"unix:{QMP},server=on,wait=off"]
    words += _disk("root", Path(OVERLAY), form="qcow2", options="cache=unsafe,discard=unmap")
    for image in machine.images:
        words += _disk(
            f"image-{image.digest}",
            Path(image.disk),
            form=image.format,
            options="readonly=on",
            serial=serial_of(image),
        )
    words += ["-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{machine.port}-:22"]
    words += ["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"]
    # A kernel that panics ends QEMU, so that whoever waits for an answer learns it at once.
    words += ["-device", "pvpanic-pci", "-action", "panic=exit-failure"]
    words += _folder("images", Path(IMAGES_SHARE), read_only=True)
    if machine.share is not None:
        words += _folder("share", machine.share, read_only=False)
    words += _credential("ssh.authorized_keys.root", AUTHORIZED)
    words += _credential("gpupt.ssh_host_ed25519_key", HOST_KEY)
    words += _credential("gpupt.hosts", HOSTS)
    words += _credential("gpupt.lab.setup", SETUP)
    # A unit's name is too long for a name in fw_cfg: it comes by the firmware's tables.
    words += ["-smbios", f"type=11,path={UNIT_STRING}"]
    return words + device_arguments(machine.topology)


def serial_of(image: Image) -> str:
    """The serial number of the disk that holds the image; virtio has room for 20 characters."""
    return image.digest[:20]


def setup_unit() -> str:
    """The unit that readies the emulated host at each of its boots."""
    return """[Unit]
Description=What makes this an emulated GPU host: images and host drivers
DefaultDependencies=no
After=systemd-modules-load.service systemd-udevd.service local-fs.target
Before=libvirtd.service
[Service]
Type=oneshot
RemainAfterExit=yes
ImportCredential=gpupt.lab.*
ExecStart=/bin/sh %d/gpupt.lab.setup
"""


def setup_script(machine: Machine) -> str:
    """What that unit runs: the images' mount, nested KVM, the host drivers of every card."""
    lines = [
        "set -eu",
        "modprobe 9pnet_virtio",
        f"mkdir -p {IMAGES}",
        _mount("images", IMAGES, "ro"),
    ]
    if machine.share is not None:
        lines += [f"mkdir -p {SHARE}", _mount("share", SHARE, "rw")]
    lines += [
        "modprobe kvm_amd || modprobe kvm_intel || true",
        # Polling for a guest's next wish burns what the guest itself needs here.
        "echo 0 > /sys/module/kvm/parameters/halt_poll_ns || true",
        *driver_commands(machine.topology),
    ]
    return "\n".join(lines) + "\n"


def _mount(tag: str, where: str, mode: str) -> str:
    """Mount a folder of the machine outside; its device may come after this unit does."""
    options = f"trans=virtio,version=9p2000.L,msize=262144,{mode}"
    mount = shlex.join(["mount", "-t", "9p", "-o", options, tag, where])
    return f"tries=0; until {mount}; do tries=$((tries+1)); test $tries -lt 120; sleep 0.5; done"


def _disk(name: str, path: Path, *, form: str, options: str, serial: str = "") -> list[str]:
    drive = f"if=none,id={name},file={_escaped(path)},format={form},{options}"
    device = f"virtio-blk-pci,drive={name}" + (f",serial={serial}" if serial else "")
    return ["-drive", drive, "-device", device]


def _folder(tag: str, path: Path, *, read_only: bool) -> list[str]:
    fsdev = f"local,id={tag},path={_escaped(path)},security_model=none"
    if read_only:
        fsdev += ",readonly=on"
    return ["-fsdev", fsdev, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


def _credential(name: str, file: str) -> list[str]:
    return ["-fw_cfg", f"name={CREDENTIALS}/{name},file={file}"]


def _escaped(path: Path) -> str:
    """A comma separates QEMU's options; doubled, it stands for itself."""
    return str(path).replace(",", ",,")
