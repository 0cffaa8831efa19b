"""The kernel's log: read where it may be, and its events found in logs in the real formats."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpupt.decide.kernellog import events
from gpupt.edges import kernellog
from gpupt.edges.kernellog import (
    parse_journal,
    parse_kmsg,
    read_journal,
    read_kernel_log,
    read_kmsg,
)
from gpupt.model.health import Silence
from gpupt.model.kernellog import (
    AerEvent,
    AerSeverity,
    CardEvent,
    CardTrouble,
    Event,
    KernelLog,
    LogLine,
    SxidEvent,
    XidEvent,
)

LOGS = Path(__file__).resolve().parents[1] / "kernellogs"
BOOT = "5b1f0c9e7a3d4c0f9f7c2d8e61b40a57"
XID = "NVRM: Xid (PCI:0000:41:00): 79, GPU has fallen off the bus."
AMPLE = 60.0

Journalctl = Callable[[str], Path]


def recorded(name: str) -> KernelLog:
    raw = (LOGS / f"{name}.txt").read_bytes()
    if raw.startswith(b"{"):
        return parse_journal(raw.decode())
    return parse_kmsg(raw, boot=BOOT)


def found(*texts: str) -> tuple[Event, ...]:
    return events(KernelLog(tuple(LogLine(text) for text in texts)))


def brief(event: Event) -> tuple[str, str]:
    """An event's card, and what it is of."""
    address = str(event.address)
    if isinstance(event, XidEvent):
        return address, f"xid {event.xid}"
    if isinstance(event, SxidEvent):
        return address, f"sxid {event.sxid} {event.fatal}"
    return address, event.severity if isinstance(event, AerEvent) else event.trouble


def entry(message: object, **more: object) -> str:
    return json.dumps({"MESSAGE": message, **more}, ensure_ascii=False)


# What is found.


def test_an_nvidia_node() -> None:
    log = recorded("nvidia-node")
    assert [brief(event) for event in events(log)] == [
        ("0000:05:00.0", "sxid 22013 False"),
        ("0000:19:00.0", "xid 31"),
        ("0000:19:00.0", "xid 43"),
        ("0000:3b:00.0", "xid 63"),
        ("0000:3b:00.0", "xid 95"),
        ("0000:3b:00.0", "xid 154"),
        ("0000:4c:00.0", "xid 48"),
        ("0000:4c:00.0", "xid 45"),
        ("0000:5d:00.0", "xid 149"),
        ("0000:5d:00.0", "xid 144"),
        ("0000:9b:00.0", "xid 79"),
        ("0000:9b:00.0", "xid 154"),
        ("0000:ab:00.0", "xid 94"),
        ("0000:bb:00.0", "xid 54"),
        ("0000:bb:00.0", "xid 142"),
        ("0000:bb:00.0", "xid 78"),
        ("0000:bb:00.0", "xid 151"),
        ("0000:bb:00.0", "xid 999"),
        ("0000:07:00.0", "sxid 24007 True"),
        ("0000:cb:00.0", "corrected"),
        ("0000:cb:00.0", "nonfatal"),
        ("0000:c8:01.0", "fatal"),
        ("10000:9a:00.0", "xid 13"),
    ]
    assert {event.boot_id for event in events(log)} == {BOOT}
    assert log.whole


def test_an_old_workstation() -> None:
    assert [brief(event) for event in events(recorded("workstation"))] == [
        ("0000:03:00.0", "xid 13"),
        ("0000:01:00.0", "xid 31"),
        ("0000:01:00.0", "xid 79"),
        ("0000:04:00.0", "xid 79"),
        ("0000:03:00.0", "init-failed"),
        ("0000:02:00.0", "reset-given-up"),
        ("0000:02:00.1", "reset-given-up"),
        ("0000:02:00.0", "reset-given-up"),
        ("0000:01:00.0", "corrected"),
        ("0000:01:00.1", "nonfatal"),
        ("0000:00:01.0", "fatal"),
        ("0000:03:00.0", "nonfatal"),
    ]


def test_an_amd_node() -> None:
    assert [brief(event) for event in events(recorded("amd-node"))] == [
        ("0000:03:00.0", "ring-timeout"),
        ("0000:c5:00.0", "ring-timeout"),
        ("0000:c5:00.0", "gpu-reset"),
        ("0000:28:00.0", "gpu-reset"),
        ("0000:28:00.0", "gpu-reset-failed"),
        ("0000:de:00.0", "uncorrectable"),
        ("0000:de:00.0", "uncorrectable"),
    ]


def test_a_sound_machine_has_no_events() -> None:
    log = recorded("sound")
    assert len(log.lines) == 12
    assert events(log) == ()


def test_whose_work_an_xid_ended() -> None:
    by_number = {
        event.xid: event for event in events(recorded("nvidia-node")) if isinstance(event, XidEvent)
    }
    assert by_number[31].process == "python3 (PID 79749)"
    assert by_number[31].message.startswith("Ch 0000000a, intr 00000000. MMU Fault")
    assert by_number[31].seconds == 100.0
    assert by_number[94].process == "jupyter (PID 7194)"
    assert by_number[48].process is None
    assert by_number[48].message.startswith("An uncorrectable double bit error")
    assert by_number[54].process is None


@pytest.mark.parametrize(
    ("text", "process", "message"),
    [
        ("31, pid=1234, Ch 00000008", "PID 1234", "Ch 00000008"),
        ("31, pid='1234', name=, Ch 8", "PID 1234", "Ch 8"),
        ("31, pid=1234, name=<unknown>, Ch 8", "PID 1234", "Ch 8"),
        ("13, pid=1234", "PID 1234", ""),
        ("13", None, ""),
        ("62, 0000(0000) 00000000 00000000", None, "0000(0000) 00000000 00000000"),
    ],
)
def test_forms_of_the_process(text: str, process: str | None, message: str) -> None:
    (event,) = found(f"NVRM: Xid (PCI:0000:41:00): {text}")
    assert isinstance(event, XidEvent)
    assert (event.process, event.message) == (process, message)


def test_a_card_falls_off_the_bus_once() -> None:
    words = "NVRM: GPU 0000:41:00.0: GPU has fallen off the bus."
    for texts in ([XID, words], [words, XID], [words], [words, words]):
        assert [brief(event) for event in found(*texts)] == [("0000:41:00.0", "xid 79")]
    assert len(found(words, words.replace("41", "42"))) == 2


def test_registers_of_a_switch_are_no_event() -> None:
    head = "nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 12028, "
    assert found(f"{head}Severity 1 Engine instance 00", f"{head}Data {{0x000001c0}}") == ()
    (event,) = found(f"{head}Non-fatal, Link 32 egress nonposted PRIV error (First)")
    assert isinstance(event, SxidEvent)
    assert (event.sxid, event.fatal) == (12028, False)
    (event,) = found(f"{head}egress nonposted PRIV error")
    assert isinstance(event, SxidEvent)
    assert event.fatal is None


@pytest.mark.parametrize(
    ("words", "severity"),
    [
        ("Corrected", AerSeverity.CORRECTED),
        ("Correctable", AerSeverity.CORRECTED),
        ("Uncorrected (Non-Fatal)", AerSeverity.NONFATAL),
        ("Uncorrectable (Non-Fatal)", AerSeverity.NONFATAL),
        ("Uncorrected (Fatal)", AerSeverity.FATAL),
        ("Uncorrectable (Fatal)", AerSeverity.FATAL),
    ],
)
@pytest.mark.parametrize("prefix", ["", "AER: "])
def test_severities_old_and_new(words: str, severity: AerSeverity, prefix: str) -> None:
    text = f"nvidia 0000:41:00.0: {prefix}PCIe Bus Error: severity={words}, type=Physical Layer"
    assert [brief(event) for event in found(text)] == [("0000:41:00.0", severity)]


def test_the_announcement_of_an_error_is_not_counted_too() -> None:
    assert found("pcieport 0000:40:01.0: AER: Corrected error message received from 41:00.0") == ()


def test_a_firmwares_record_is_of_the_severity_before_it() -> None:
    device = "{2}[Hardware Error]:   device_id: 0000:41:00.0"
    kinds = {
        kind: [
            brief(event)[1] for event in found(f"[Hardware Error]:  Error 0, type: {kind}", device)
        ]
        for kind in ("corrected", "recoverable", "fatal", "info")
    }
    assert kinds == {
        "corrected": ["corrected"], "recoverable": ["nonfatal"], "fatal": ["fatal"], "info": []
    }  # fmt: skip


@pytest.mark.parametrize("when", ["FLR", "bus reset", "resume", "pm D3cold->D0"])
def test_a_reset_is_given_up(when: str) -> None:
    head = "vfio-pci 0000:41:00.0: not ready"
    (event,) = found(
        f"{head} 32767ms after {when}; waiting", f"{head} 65535ms after {when}; giving up"
    )
    assert isinstance(event, CardEvent)
    assert event.trouble is CardTrouble.RESET_GIVEN_UP


@pytest.mark.parametrize("state", ["D3cold", "D3hot", "unknown"])
def test_a_card_that_does_not_wake(state: str) -> None:
    tail = "Unable to change power state from"
    (event,) = found(f"nvidia 0000:41:00.0: {tail} {state} to D0, device inaccessible")
    assert isinstance(event, CardEvent)
    assert event.trouble is CardTrouble.RESET_GIVEN_UP
    assert found(f"nvidia 0000:41:00.0: {tail} D0 to D3hot") == ()


@pytest.mark.parametrize(
    ("words", "bad"),
    [
        ("2 uncorrectable hardware errors detected in umc block", True),
        ("10 uncorrectable hardware errors detected in total in umc block", True),
        ("Total 1 uncorrectable hardware errors detected in gfx block", True),
        ("0 uncorrectable hardware errors detected in umc block", False),
        ("0 new uncorrectable hardware errors detected in umc block", False),
        ("Total 0 uncorrectable hardware errors detected in gfx block", False),
        ("no uncorrectable hardware errors detected in umc block", False),
        ("3 correctable hardware errors detected in umc block", False),
    ],
)
def test_uncorrectable_errors_are_counted_not_named(words: str, bad: bool) -> None:
    assert bool(found(f"amdgpu 0000:de:00.0: amdgpu: {words}")) is bad


def test_what_a_name_says_is_no_event() -> None:
    """Only the beginning of a line is the kernel's own: names are further back."""
    assert found(f"audit: comm={XID}", f"usb 1-1: Product: {XID}", f" {XID}") == ()
    named = "NVRM: Xid (PCI:0000:19:00): 31, pid=7, name=SXid (PCI:0000:41:00.0): 1, Ch 1"
    assert [brief(event) for event in found(named)] == [("0000:19:00.0", "xid 31")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NVRM: Xid",
        "NVRM: Xid (PCI:0000:41:00",
        "NVRM: Xid (PCI:0000:41:00): ",
        "NVRM: Xid (PCI:0000:41:00): abc, pid=2280636",
        "NVRM: Xid (PCI:0000:41:20): 79, no device has this number",
        f"NVRM: Xid (PCI:0000:41:00): {'9' * 5000}",
        "nvidia 0000:41:00.0: PCIe Bus Error: severity=",
        "nvidia 0000:41:00.8: PCIe Bus Error: severity=Corrected",
        "vfio-pci 0000:41:00.0: not ready",
        "\0\ufffd\ud800",
    ],
)
def test_cut_off_lines_are_no_events(text: str) -> None:
    assert found(text) == ()


def test_a_log_that_was_not_read_has_no_events() -> None:
    assert events(KernelLog(silent=Silence.DENIED, details="permission denied")) == ()


# The journal.


def test_entries_of_the_journal() -> None:
    log = recorded("nvidia-node")
    assert (log.boot_id, log.source, log.silent) == (BOOT, "journalctl -k -b", None)
    assert log.lines[1].seconds == 9.0
    assert log.lines[1].message.startswith("NVRM: loading NVIDIA UNIX Open Kernel Module")


def test_the_clock_nearest_to_the_kernels() -> None:
    text = "\n".join(
        (
            entry("a", __MONOTONIC_TIMESTAMP="3000000"),
            entry("b", __MONOTONIC_TIMESTAMP="3000000", _SOURCE_MONOTONIC_TIMESTAMP="2000000"),
            entry("c", _SOURCE_MONOTONIC_TIMESTAMP="2000000", _SOURCE_BOOTTIME_TIMESTAMP="1000000"),
            entry("d", __MONOTONIC_TIMESTAMP="soon"),
            entry("e", __MONOTONIC_TIMESTAMP="9" * 400),
        )
    )
    assert [line.seconds for line in parse_journal(text).lines] == [3.0, 2.0, 1.0, None, None]


def test_messages_that_are_no_text() -> None:
    """Bytes that are not all printable come as numbers, fields of one name as a list."""
    raw = list(b"NVRM: Xid (PCI:0000:41:00): 31, pid=1, name=\xff, Ch 1")
    log = parse_journal("\n".join((entry(raw), entry(["first", "second"]), entry(None), entry({}))))
    assert [line.message for line in log.lines] == [
        "NVRM: Xid (PCI:0000:41:00): 31, pid=1, name=\ufffd, Ch 1",
        "first",
    ]
    assert [brief(event) for event in events(log)] == [("0000:41:00.0", "xid 31")]


def test_a_name_does_not_break_a_line() -> None:
    """A process may have a line separator in its name; journalctl writes it as it is."""
    text = "NVRM: Xid (PCI:0000:41:00): 31, pid=1, name=a\u2028b, Ch 1"
    assert [brief(event) for event in events(parse_journal(entry(text)))] == [
        ("0000:41:00.0", "xid 31")
    ]


def test_garbage_between_entries_is_passed_over() -> None:
    text = "\n".join(("-- no entry --", "[]", "7", "null", entry(XID), '{"MESSAGE":"NVRM: Xi'))
    log = parse_journal(text)
    assert [line.message for line in log.lines] == [XID]


def test_the_newest_lines_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernellog, "MOST_LINES", 2)
    both = [parse_journal("\n".join(entry(word) for word in words)) for words in ("ab", "abc")]
    assert [[line.message for line in log.lines] for log in both] == [["a", "b"], ["b", "c"]]
    assert [log.whole for log in both] == [True, False]
    raw = b"".join(b"6,%d,0,-;%c\n" % (number, 97 + number) for number in range(3))
    log = parse_kmsg(raw, boot=None)
    assert ([line.message for line in log.lines], log.whole) == (["b", "c"], False)


@pytest.mark.parametrize(
    ("said", "silent"),
    [
        ("No journal files were opened due to insufficient permissions.", Silence.DENIED),
        (
            "Hint: You are currently not seeing messages from other users and the system.",
            Silence.DENIED,
        ),
        ("No journal files were found.", Silence.UNSUPPORTED),
        ("", Silence.UNSUPPORTED),
    ],
)
def test_a_journal_without_entries_says_why(said: str, silent: Silence) -> None:
    log = parse_journal("", said=said)
    assert (log.silent, log.lines) == (silent, ())
    assert (said or "no entries") in log.details


@pytest.fixture
def journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journalctl:
    """Puts a script before the machine's own journalctl; it keeps the words of its call."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(script: str) -> Path:
        words = tmp_path / "words"
        program = tmp_path / "journalctl"
        program.write_text(f'#!/bin/sh\necho "$@" >{words}\n{script}\n')
        program.chmod(0o755)
        return words

    return write


def test_the_journal_is_asked_for_the_kernel_and_this_boot(journalctl: Journalctl) -> None:
    words = journalctl(f"cat {LOGS}/nvidia-node.txt")
    log = read_kernel_log(Path("/"), deadline=AMPLE)
    assert log == recorded("nvidia-node")
    asked = words.read_text().split()
    assert {"-k", "-b", "--no-pager"} < set(asked)
    assert asked[asked.index("-o") + 1] == "json"
    assert any(word.startswith("--output-fields=MESSAGE,") for word in asked)


@pytest.mark.parametrize(
    ("script", "silent"),
    [
        (
            "echo 'No journal files were opened due to insufficient permissions.' >&2",
            Silence.DENIED,
        ),
        ("echo 'Failed to open journal' >&2; exit 1", Silence.UNSUPPORTED),
        ("kill -9 $$", Silence.UNSUPPORTED),
        (r"printf '\377\376{\000\n'", Silence.UNSUPPORTED),
    ],
)
def test_a_journal_that_does_not_answer(
    journalctl: Journalctl, script: str, silent: Silence
) -> None:
    journalctl(script)
    log = read_journal(deadline=AMPLE)
    assert (log.silent, log.lines) == (silent, ())
    whole = read_kernel_log(Path("/"), deadline=AMPLE)
    buffer = read_kmsg(Path("/"))
    if buffer.silent is None:
        assert whole.source == "/dev/kmsg"
    else:
        assert whole.silent is not None
        assert log.details in whole.details
        assert buffer.details in whole.details


def test_bytes_in_an_entry_hide_no_other(journalctl: Journalctl) -> None:
    journalctl(f"printf '\\377\\376\\n'; cat {LOGS}/nvidia-node.txt")
    assert read_journal(deadline=AMPLE) == recorded("nvidia-node")


def test_a_journal_that_broke_off_is_not_whole(journalctl: Journalctl) -> None:
    journalctl(
        f"head -n 2 {LOGS}/nvidia-node.txt; echo 'Failed to iterate: Bad message' >&2; exit 1"
    )
    log = read_journal(deadline=AMPLE)
    assert len(log.lines) == 2
    assert not log.whole


def test_a_journal_that_hangs_is_given_up(journalctl: Journalctl) -> None:
    journalctl("exec sleep 600")
    log = read_journal(deadline=0.5)
    assert (log.silent, log.lines) == (Silence.TIMEOUT, ())
    assert "0.5 s" in log.details


def test_without_journalctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    log = read_journal(deadline=AMPLE)
    assert (log.silent, log.details) == (Silence.UNSUPPORTED, "journalctl is not installed")


# The kernel's own buffer.


def plant(root: Path, raw: bytes) -> Path:
    file = root / "dev/kmsg"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(raw)
    boot = root / "proc/sys/kernel/random/boot_id"
    boot.parent.mkdir(parents=True, exist_ok=True)
    boot.write_text("5b1f0c9e-7a3d-4c0f-9f7c-2d8e61b40a57\n")
    return root


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, where the tests have them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["workstation", "amd-node", "sound"])
def test_a_recorded_buffer_is_read_alike(tmp_path: Path, name: str) -> None:
    log = read_kernel_log(plant(tmp_path, (LOGS / f"{name}.txt").read_bytes()))
    assert log == recorded(name)
    assert (log.source, log.boot_id, log.whole) == ("/dev/kmsg", BOOT, True)


def test_records_of_the_buffer() -> None:
    raw = (
        b"6,339,5140900,-,caller=T1;NET: Registered\n SUBSYSTEM=pci\n DEVICE=+pci:0000:41:00.0\n"
        b"4,340,5690716,c;udevd \\x5c \\xc3\\xa4 \\xff\\x0anext\n"
        b"12,341,5700000,-;written by a process\n"
    )
    log = parse_kmsg(raw, boot=None)
    assert log.lines == (
        LogLine("NET: Registered", 5.1409),
        LogLine("udevd \\ ä \ufffd\nnext", 5.690716),
    )
    # The first record's number tells that 339 before it are gone.
    assert not log.whole


def test_garbage_in_the_buffer_is_passed_over() -> None:
    huge = b"9" * 400
    raw = (
        b"\xff\xfe\x00\n;\n6;no numbers\n6,7;two\na,b,c,-;letters\n6,1,%b,-;never\n"
        b"4,0,1000000,-;%b\n4,2,2000000,-;NVRM: Xi" % (huge, XID.encode())
    )
    log = parse_kmsg(raw, boot=None)
    assert [line.message for line in log.lines if line.seconds] == [XID, "NVRM: Xi"]
    assert [brief(event) for event in events(log)] == [("0000:41:00.0", "xid 79")]


def test_an_empty_buffer_is_not_a_silent_one(tmp_path: Path) -> None:
    log = read_kernel_log(plant(tmp_path, b""))
    assert (log.silent, log.lines) == (None, ())


def test_no_buffer(tmp_path: Path) -> None:
    log = read_kernel_log(tmp_path)
    assert (log.silent, log.details) == (Silence.UNSUPPORTED, "no /dev/kmsg")


def test_a_buffer_that_may_not_be_read(quick_path: Path) -> None:
    plant(quick_path, XID.encode())
    quick_path.chmod(0o755)
    (quick_path / "dev/kmsg").chmod(0)
    with as_nobody():
        log = read_kernel_log(quick_path)
    assert (log.silent, log.lines) == (Silence.DENIED, ())
    assert "permission denied" in log.details


def test_a_buffer_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "dev/kmsg").mkdir(parents=True)
    log = read_kernel_log(tmp_path)
    assert (log.silent, log.lines) == (Silence.ERROR, ())


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    os.mkfifo(tmp_path / "dev/kmsg")
    writer = os.open(tmp_path / "dev/kmsg", os.O_RDWR)
    try:
        assert read_kernel_log(tmp_path).lines == ()
    finally:
        os.close(writer)


def test_another_machines_tree_does_not_ask_this_ones_journal(
    tmp_path: Path, journalctl: Journalctl
) -> None:
    words = journalctl("exit 0")
    assert read_kernel_log(plant(tmp_path, b"6,0,0,-;theirs\n")).source == "/dev/kmsg"
    assert not words.exists()


def test_a_tree_with_this_machines_devices_has_no_log(tmp_path: Path) -> None:
    """A folder of another system, with this one's /dev bound into it: the log is not its own."""
    kmsg = tmp_path / "dev/kmsg"
    kmsg.parent.mkdir()
    try:
        os.mknod(kmsg, 0o600 | 0o020000, os.makedev(1, 11))
        os.close(os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK))
    except PermissionError:
        pytest.skip("no device may be made or opened here")
    log = read_kernel_log(tmp_path)
    assert (log.silent, log.lines) == (Silence.UNSUPPORTED, ())
