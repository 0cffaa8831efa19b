"""A guest of the emulated host for machines only: Linux, and an init of a few dozen
instructions that says again and again what is on its PCI bus."""

from __future__ import annotations

import base64
import struct
import time
import xml.etree.ElementTree as Xml
from dataclasses import dataclass, field

from emulatedhost import Host

from gpupt.decide.domain import XML_NAMESPACE
from gpupt.model.pci import PciAddress

WORD = "a tiny guest speaks"
FOLDER = "/run/tiny"  # in the host, where QEMU's own user may read
MEMORY = 256  # MiB; Linux unpacks itself into a part of it
ORIGIN = 0x400000
# System calls of Linux on x86-64.
READ, WRITE, OPEN, CLOSE, NANOSLEEP, MOUNT = 0, 1, 2, 3, 35, 165


def init_program() -> bytes:
    """/init: every second it copies /proc/bus/pci/devices to the console, and says WORD."""
    data = {
        "proc": b"proc\0",
        "place": b"/proc\0",
        "list": b"/proc/bus/pci/devices\0",
        "word": f"{WORD}\n".encode(),
        "second": struct.pack("<qq", 1, 0),
    }
    # Two passes: the first finds how long the code is, and so where the data lies.
    places: dict[str, int] = dict.fromkeys(data, 0)
    for _ in range(2):
        start = b"".join(
            (
                bytes((0x48, 0x81, 0xEC, 0x00, 0x20, 0x00, 0x00)),  # sub rsp, 8192
                call(MOUNT, places["proc"], places["place"], places["proc"], 0, 0),
            )
        )
        again = b"".join(
            (
                call(OPEN, places["list"], 0),
                bytes((0x48, 0x89, 0xC3)),  # mov rbx, rax
                bytes((0x48, 0x89, 0xDF, 0x48, 0x89, 0xE6)),  # mov rdi, rbx; mov rsi, rsp
                call(READ, None, None, 8192),
                bytes((0x48, 0x89, 0xC2, 0x48, 0x89, 0xE6)),  # mov rdx, rax; mov rsi, rsp
                call(WRITE, 1),
                bytes((0x48, 0x89, 0xDF)),  # mov rdi, rbx
                call(CLOSE),
                call(WRITE, 1, places["word"], len(data["word"])),
                call(NANOSLEEP, places["second"], 0),
            )
        )
        again += b"\xe9" + struct.pack("<i", -len(again) - 5)  # jmp to its beginning
        at = ORIGIN + 120 + len(start + again)
        for name, content in data.items():
            places[name] = at
            at += len(content)
    whole = start + again + b"".join(data.values())
    size = 120 + len(whole)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        *(2, 62, 1, ORIGIN + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0),
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, ORIGIN, ORIGIN, size, size, 0x1000)
    return header + segment + whole


def call(number: int, *arguments: int | None) -> bytes:
    """A system call; an argument that is None is what its register holds."""
    # mov edi, esi, edx, r10d, r8d, IMMEDIATE
    loads = (b"\xbf", b"\xbe", b"\xba", b"\x41\xba", b"\x41\xb8")
    code = b"".join(
        load + struct.pack("<I", value)
        for load, value in zip(loads, arguments, strict=False)
        if value is not None
    )
    return code + b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"  # mov eax, number; syscall


def initrd() -> bytes:
    """An initramfs that holds /init and nothing else but a folder for proc."""
    entries = (("proc", 0o040755, b""), ("init", 0o100755, init_program()), ("TRAILER!!!", 0, b""))
    whole = b""
    for number, (name, mode, content) in enumerate(entries, 1):
        # newc, of Documentation/driver-api/early-userspace/buffer-format.rst
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % each for each in fields)
        whole += filled(header + name.encode() + b"\0") + filled(content)
    return whole


def filled(content: bytes) -> bytes:
    """The content, and zeros up to a multiple of four."""
    return content + bytes(-len(content) % 4)


@dataclass(frozen=True)
class TinyGuest:
    """A domain of the emulated host that has GPUs; of ``cluster`` when it is a node's."""

    host: Host
    name: str
    functions: tuple[PciAddress, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def console(self) -> str:
        return f"{FOLDER}/{self.name}.console"

    def create(self) -> str:
        """Start it; what virsh says of a failure, and nothing of a success."""
        self.host.run("mkdir", "-p", FOLDER)
        self.host.sh(f"base64 -d > {FOLDER}/tiny.initrd <<'END'\n{base64_of(initrd())}END\n")
        file = f"{FOLDER}/{self.name}.xml"
        self.host.ssh.run(["tee", file], stdin=self.xml(), deadline=20)
        self.host.sh(f"rm -f {self.console}")
        done = self.host.run("virsh", "-q", "create", file, check=False, deadline=120)
        return "" if done.status == 0 else done.stderr

    def start(self, *, deadline: float = 120) -> None:
        """Start it, and return once it says what is on its bus."""
        said = self.create()
        assert said == "", said
        end = time.monotonic() + deadline
        while self.seen() is None:
            assert time.monotonic() < end, self.host.sh(f"cat {self.console}", check=False).stdout
            time.sleep(1)

    def seen(self) -> tuple[str, ...] | None:
        """The ids on its bus as it said them last, such as 10de2330; None: it never spoke."""
        said = self.host.sh(f"tail -c 8000 {self.console} 2>/dev/null", check=False).stdout
        whole = said.replace("\r", "").split(f"{WORD}\n")[:-1]
        if not whole:
            return None
        lines = (line.split("\t") for line in whole[-1].splitlines())
        return tuple(words[1] for words in lines if len(words) > 5)

    @property
    def pid(self) -> int:
        """The PID of its QEMU."""
        return int(self.host.run("cat", f"/run/libvirt/qemu/{self.name}.pid").stdout)

    @property
    def state(self) -> str:
        """What virsh domstate says of it; empty: libvirt does not know it."""
        done = self.host.run("virsh", "-q", "domstate", self.name, check=False, deadline=60)
        return done.stdout.strip()

    def destroy(self) -> None:
        """End it, if libvirt knows of it."""
        self.host.run("virsh", "-q", "destroy", self.name, check=False, deadline=60)

    def xml(self) -> str:
        """Its domain: no disk, no network, a serial port, a root port for each function."""
        kernel = self.host.sh("ls /var/lib/gpupt/images/*/vmlinuz | head -n 1").stdout.strip()
        domain = Xml.Element("domain", type="kvm")
        add(domain, "name", self.name)
        if self.metadata:
            node = add(add(domain, "metadata"), f"{{{XML_NAMESPACE}}}node")
            node.attrib.update(self.metadata)
        add(domain, "memory", str(MEMORY), unit="MiB")
        add(domain, "vcpu", "1")
        system = add(domain, "os")
        add(system, "type", "hvm", arch="x86_64", machine="q35")
        add(system, "kernel", kernel)
        add(system, "initrd", f"{FOLDER}/tiny.initrd")
        add(system, "cmdline", "console=ttyS0 quiet mitigations=off nokaslr no_timer_check")
        features = add(domain, "features")
        add(features, "acpi")
        add(features, "apic")
        add(domain, "cpu", mode="host-passthrough", check="none", migratable="off")
        devices = add(domain, "devices")
        add(devices, "controller", type="usb", model="none")
        add(devices, "controller", type="pci", index="0", model="pcie-root")
        for port in range(1, len(self.functions) + 1):
            add(devices, "controller", type="pci", index=str(port), model="pcie-root-port")
        serial = add(devices, "serial", type="file")
        add(serial, "source", path=self.console)
        add(serial, "target", type="isa-serial", port="0")
        for port, address in enumerate(self.functions, 1):
            hostdev = add(devices, "hostdev", mode="subsystem", type="pci", managed="no")
            add(hostdev, "driver", name="vfio")
            add(
                add(hostdev, "source"),
                "address",
                domain=f"{address.domain:#06x}",
                bus=f"{address.bus:#04x}",
                slot=f"{address.device:#04x}",
                function=f"{address.function:#x}",
            )
            place = {"domain": "0", "bus": str(port), "slot": "0", "function": "0"}
            add(hostdev, "address", type="pci", **place)
        add(add(devices, "video"), "model", type="none")
        add(devices, "memballoon", model="none")
        return Xml.tostring(domain, encoding="unicode")


def add(parent: Xml.Element, tag: str, text: str | None = None, **attributes: str) -> Xml.Element:
    child = Xml.SubElement(parent, tag, attributes)
    child.text = text
    return child


def base64_of(content: bytes) -> str:
    return base64.encodebytes(content).decode()


def membership(cluster: str, node: str, *gpus: PciAddress) -> dict[str, str]:
    """What gpupt itself writes into the metadata of a node's domain."""
    return {
        "cluster": cluster,
        "name": node,
        "role": "compute",
        "image": "0" * 16,
        "spec": "0" * 12,
        "gpus": " ".join(str(gpu) for gpu in gpus),
    }
