"""The emulated host's life: up, found again, down.  Its state is a folder, lab/NAME."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gpupt.edges.images import write_image
from gpupt.edges.keys import make_key_pair, write_private
from gpupt.edges.process import end, run, spawn
from gpupt.edges.ssh import Ssh
from gpupt.errors import BadInput, DeadlineExceeded, Failed, Refused
from gpupt.lab import machine as m
from gpupt.lab.emulator import build_disguises, find_emulator
from gpupt.lab.qmp import Qmp
from gpupt.lab.stall import StallWatch
from gpupt.lab.topology import disguises
from gpupt.model.roll import Image

Narrate = Callable[[str], None]
RECORD = "lab.json"
SSH_DEADLINE = 300
READY_DEADLINE = 180
# Its disk is thrown away, so a host that is slow to stop loses nothing.
POWEROFF_DEADLINE = 30
# Ready: this boot's drivers and mounts are there, and libvirt answers.
READY = """
until systemctl -q is-active gpupt-lab.service; do
    if systemctl -q is-failed gpupt-lab.service; then
        systemctl status --no-pager gpupt-lab.service; exit 1
    fi
    sleep 0.3
done
until virsh -q -c qemu:///system uri >/dev/null 2>&1; do sleep 0.5; done
"""


@dataclass(frozen=True, slots=True)
class Lab:
    """An emulated host that was started: QEMU's process and the way in."""

    name: str
    folder: Path
    pid: int
    started: str
    port: int
    image: str
    accelerator: str
    cpus: int
    memory: int
    topology: str
    images: tuple[str, ...]

    @property
    def key(self) -> Path:
        return self.folder / m.KEY

    @property
    def host_key(self) -> str:
        """The public host key it must answer with."""
        return (self.folder / f"{m.HOST_KEY}.pub").read_text(encoding="ascii").strip()

    @property
    def is_running(self) -> bool:
        return process_identity(self.pid) == self.started

    def connect(self, *, deadline: float = 60, watch: Callable[[], None] | None = None) -> Ssh:
        """A connection as root; raises Failed at once when QEMU has ended, and what ``watch``
        raises, which is called all the while."""

        def alive() -> None:
            if not self.is_running:
                raise Failed(f"the emulated host {self.name} has ended", details=tail_of(self))
            if watch is not None:
                watch()

        end_of_wait = time.monotonic() + deadline
        await_banner(self.port, deadline=deadline, alive=alive, name=self.name)
        deadline = max(end_of_wait - time.monotonic(), 5)
        return Ssh.connect(
            "127.0.0.1",
            port=self.port,
            key=self.key,
            host_key=self.host_key,
            deadline=deadline,
            waiting_for=f"the emulated host {self.name}",
            alive=alive,
        )

    def qmp(self, *, deadline: float = 10) -> Qmp:
        """Its QEMU's control socket."""
        return Qmp.connect(self.folder / m.QMP, deadline=deadline)

    def reset(self) -> None:
        """Press its reset button; raises Failed, DeadlineExceeded."""
        with self.qmp() as qmp:
            qmp.command("system_reset")

    def ssh_command(self, *options: str) -> list[str]:
        """OpenSSH's client with the pinned host key and no other."""
        known = self.folder / "known_hosts"
        return [
            "ssh",
            *("-F", "none", "-i", str(self.key), "-p", str(self.port)),
            *("-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes"),
            *("-o", f"UserKnownHostsFile={known}", "-o", "LogLevel=ERROR"),
            *options,
            "root@127.0.0.1",
        ]


def labs_folder(state: Path) -> Path:
    return state / "lab"


def read_labs(state: Path) -> tuple[Lab, ...]:
    """Every emulated host on record, by name."""
    names = sorted(path.parent.name for path in labs_folder(state).glob(f"*/{RECORD}"))
    return tuple(lab for name in names if (lab := find_lab(state, name)) is not None)


def find_lab(state: Path, name: str) -> Lab | None:
    """The emulated host of that name, running or not; None when there is no record of it."""
    folder = labs_folder(state) / check_name(name)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Failed(f"cannot read {folder / RECORD}", details=str(error)) from None
    record.pop("schema")
    return Lab(folder=folder, **{**record, "images": tuple(record["images"])})


def need_lab(state: Path, name: str) -> Lab:
    """The running emulated host of that name; raises Failed when it is not up."""
    lab = find_lab(state, name)
    if lab is None or not lab.is_running:
        raise Failed(
            f"the emulated host {name} is not up",
            remedy="gpupt lab up" + ("" if name == "lab" else f" --name {name}"),
        )
    return lab


def start_lab(machine: m.Machine, *, state: Path, trees: Sequence[Path], narrate: Narrate) -> Lab:
    """Boot the emulated host and return when it is ready for work.

    ``trees`` hold QEMU (topmost first).  Raises Failed or DeadlineExceeded with the end of
    the console; QEMU is ended then, its logs are kept."""
    folder = labs_folder(state) / check_name(machine.name)
    with _only_one(folder):
        known = find_lab(state, machine.name)
        if known is not None and known.is_running:
            raise Refused(f"the emulated host {machine.name} is up already")
        emulator = find_emulator(trees, preload=build_disguises(labs_folder(state)))
        _fill(folder, machine)
        began = time.monotonic()
        with (folder / m.LOG).open("wb") as log:
            child = spawn(
                [*emulator.argv, *m.qemu_arguments(machine)],
                stdout=log,
                stderr=log,
                environment={**dict(emulator.environment), "FAKE_PCI": disguises(machine.topology)},
                folder=folder,
            )
        try:
            lab = Lab(
                name=machine.name,
                folder=folder,
                pid=child.pid,
                started=process_identity(child.pid) or "",
                port=machine.port,
                image=machine.image.digest,
                accelerator=machine.accelerator,
                cpus=machine.cpus,
                memory=machine.memory,
                topology=machine.topology.name,
                images=tuple(image.digest for image in machine.images),
            )
            write_record(lab)
            narrate(f"{lab.name}: QEMU runs as process {lab.pid}; waiting for SSH")
            watch = StallWatch(folder / m.CONSOLE, reset=lab.reset, narrate=narrate)
            with lab.connect(deadline=SSH_DEADLINE, watch=watch) as ssh:
                narrate(
                    f"{lab.name}: SSH after {time.monotonic() - began:.0f} s; waiting for "
                    "its drivers and libvirt"
                )
                await_ready(ssh, name=lab.name)
        except DeadlineExceeded as error:
            end(child)
            _forget(folder)
            shown = (*error.details, *tail_of(lab))
            raise DeadlineExceeded(error.brief, details=shown, remedy=error.remedy) from None
        except BaseException:
            end(child)
            _forget(folder)
            raise
    narrate(f"{lab.name}: ready after {time.monotonic() - began:.0f} s")
    return lab


def await_banner(
    port: int, *, deadline: float, alive: Callable[[], None], name: str, patience: float = 3
) -> None:
    """Wait until an SSH server speaks at the port.

    QEMU accepts a connection long before the guest has a network, and then is silent: a try
    is given up after ``patience`` seconds.  Raises DeadlineExceeded, and what ``alive`` does.
    """
    deadline_at = time.monotonic() + deadline
    while time.monotonic() < deadline_at:
        alive()
        address = ("127.0.0.1", port)
        with suppress(OSError), socket.create_connection(address, timeout=patience) as peer:
            if peer.recv(4) == b"SSH-":
                return
        time.sleep(0.3)
    raise DeadlineExceeded(f"the emulated host {name} did not answer SSH within {deadline:g} s")


def await_ready(ssh: Ssh, *, name: str, deadline: float = READY_DEADLINE) -> None:
    """Wait until the host's drivers are in place and libvirt answers; also after a reset."""
    script = ["timeout", f"{deadline:.0f}", "sh", "-c", READY]
    done = ssh.run(script, deadline=deadline + 15, check=False)
    if done.status == 124:
        raise DeadlineExceeded(f"libvirt on {name} did not answer within {deadline:g} s")
    if done.status != 0:
        said = tuple((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise Failed(f"{name} did not ready itself", details=said)


def stop_lab(lab: Lab, *, narrate: Narrate) -> None:
    """Power the emulated host off, by force if it must be, and remove its disk and keys."""
    with _only_one(lab.folder):
        if lab.is_running:
            narrate(f"{lab.name}: powering off")
            _power_off(lab, narrate=narrate)
        _forget(lab.folder)
        shutil.rmtree(lab.folder, ignore_errors=True)
    narrate(f"{lab.name}: gone")


def _power_off(lab: Lab, *, narrate: Narrate) -> None:
    """The power button, then QEMU's quit, then SIGKILL: each only if the one before failed."""
    for command, patience in (("system_powerdown", POWEROFF_DEADLINE), ("quit", 10)):
        with suppress(Failed), lab.qmp(deadline=5) as qmp:
            qmp.command(command, deadline=5)
            if _gone(lab, within=patience):
                return
        narrate(f"{lab.name}: it does not end by {command}")
    if lab.is_running:  # asked again: the number could be another's by now
        with suppress(ProcessLookupError):
            os.kill(lab.pid, signal.SIGKILL)
    if not _gone(lab, within=10):
        raise Failed(f"QEMU of {lab.name} does not end", details=f"process {lab.pid}")


def _gone(lab: Lab, *, within: float) -> bool:
    deadline = time.monotonic() + within
    while lab.is_running:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def process_identity(pid: int) -> str | None:
    """What tells this process from a later one of its number: the boot and its start time.

    None when it has ended (a zombie has)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name in parentheses may hold anything; the state and the rest follow the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def write_record(lab: Lab) -> None:
    """Write lab.json: what the next command needs to find this host again."""
    record = {
        "schema": 1,
        "name": lab.name,
        "pid": lab.pid,
        "started": lab.started,
        "port": lab.port,
        "image": lab.image,
        "accelerator": lab.accelerator,
        "cpus": lab.cpus,
        "memory": lab.memory,
        "topology": lab.topology,
        "images": list(lab.images),
    }
    half = lab.folder / f".{RECORD}"
    half.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    half.replace(lab.folder / RECORD)


def tail_of(lab: Lab, *, lines: int = 15) -> tuple[str, ...]:
    """The end of QEMU's log and of the console, for an error."""
    said: list[str] = []
    for name, count in ((m.LOG, 5), (m.CONSOLE, lines)):
        with suppress(OSError):
            text = (lab.folder / name).read_text(encoding="utf-8", errors="replace")
            shown = ["".join(c for c in line if c.isprintable()) for line in text.splitlines()]
            shown = [line for line in shown if line.strip()][-count:]
            if shown:
                said += [f"the end of {lab.folder / name}:", *(f"  {line}" for line in shown)]
    return tuple(said)


def _fill(folder: Path, machine: m.Machine) -> None:
    """Everything QEMU is handed, made anew: keys, credentials, the overlay, the images' share."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    for name in (m.KEY, m.HOST_KEY):
        pair = make_key_pair(f"gpupt-lab-{machine.name}")
        write_private(folder / name, pair.private)
        (folder / f"{name}.pub").write_text(pair.public + "\n", encoding="ascii")
        if name == m.KEY:
            (folder / m.AUTHORIZED).write_text(pair.public + "\n", encoding="ascii")
        else:
            known = f"[127.0.0.1]:{machine.port} {pair.public}\n"
            (folder / "known_hosts").write_text(known, encoding="ascii")
    (folder / m.HOSTS).write_text(f"127.0.0.1 localhost {machine.name}\n::1 localhost\n")
    (folder / m.SETUP).write_text(m.setup_script(machine))
    unit = m.setup_unit()
    credential = f"io.systemd.credential:systemd.extra-unit.{m.UNIT}={unit}"
    (folder / m.UNIT_STRING).write_text(credential)
    for image in machine.images:
        share_image(image, folder / m.IMAGES_SHARE)
    (folder / m.IMAGES_SHARE).mkdir(exist_ok=True)
    base, form = str(machine.image.disk), machine.image.format
    run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", form, folder / m.OVERLAY],
        deadline=60,
    )


def share_image(image: Image, share: Path) -> None:
    """Lay out what the emulated host sees of an image: its record, kernel and initrd; the
    disk it sees as a block device."""
    folder = share / image.digest
    folder.mkdir(parents=True)
    for name, source in (("vmlinuz", image.kernel), ("initrd", image.initrd)):
        try:
            os.link(source, folder / name)
        except OSError:  # another file system, or one with no hard links
            shutil.copyfile(source, folder / name)
    write_image(
        folder,
        digest=image.digest,
        rolls=image.rolls,
        disk=f"/dev/disk/by-id/virtio-{m.serial_of(image)}",
        format="raw",
        virtual_size=image.virtual_size,
    )


def _forget(folder: Path) -> None:
    """Take the record and the disk away; logs stay."""
    for name in (RECORD, m.OVERLAY, m.QMP):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One command at a time changes an emulated host; another is refused at once."""
    path = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise Refused(
            f"cannot write below {folder.parent}",
            details=str(error.strerror),
            remedy="an emulated host is started and stopped by root, or with a --state of your own",
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another gpupt is starting or stopping {folder.name}") from None
        yield


def check_name(name: str) -> str:
    """A name that can be a host's and a folder's; raises BadInput."""
    if not name or len(name) > 32 or not name.replace("-", "").isalnum() or not name.isascii():
        raise BadInput(f"not a host's name: {name!r}", details="letters, digits and dashes")
    if name != name.lower() or name[0] == "-" or name[-1] == "-":
        raise BadInput(f"not a host's name: {name!r}", details="lower case, no dash at an end")
    return name
