"""The probe that runs a guest: its program for real, its verdicts on QEMUs that misbehave."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from gpupt.edges.kvm import EXPECTED, boot_sector, probe_command, probe_kvm

QEMU = shutil.which("qemu-system-x86_64")


def script(folder: Path, body: str) -> Path:
    """A stand-in for QEMU."""
    file = folder / "qemu"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


def test_sector_is_bootable() -> None:
    sector = boot_sector()
    assert len(sector) == 512
    assert sector.endswith(b"\x55\xaa")


@pytest.mark.skipif(QEMU is None, reason="no qemu-system-x86_64 on this machine")
def test_its_program_runs_to_its_end_on_an_emulated_processor(tmp_path: Path) -> None:
    assert QEMU is not None
    (tmp_path / "sector").write_bytes(boot_sector())
    words = probe_command([QEMU], tmp_path / "sector")
    words[words.index("kvm")] = "tcg"
    words[words.index("host")] = "max"
    assert subprocess.run(words, timeout=60, check=False).returncode == EXPECTED


def test_no_device() -> None:
    verdict = probe_kvm(device=Path("/nonexistent/kvm"))
    assert not verdict.usable
    assert verdict.why == "there is no /nonexistent/kvm"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_device_that_may_not_be_opened(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=0o000)
    verdict = probe_kvm(device=device)
    assert not verdict.usable
    assert "may not be opened" in verdict.why


def test_no_qemu() -> None:
    verdict = probe_kvm(["/nonexistent/qemu"], device=Path("/dev/null"))
    assert not verdict.usable
    assert "/nonexistent/qemu is not installed" in verdict.why


def test_a_guest_that_ran(tmp_path: Path) -> None:
    verdict = probe_kvm([script(tmp_path, f"exit {EXPECTED}")], device=Path("/dev/null"))
    assert verdict.usable
    assert "ran on it to its end" in verdict.why


def test_a_guest_that_never_runs_ends_with_the_deadline(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    qemu = script(tmp_path, f"echo $$ > {pid}; exec sleep 60")
    start = time.monotonic()
    verdict = probe_kvm([qemu], deadline=0.5, device=Path("/dev/null"))
    assert time.monotonic() - start < 10
    assert not verdict.usable
    assert "did not run within 0.5 s" in verdict.why
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


def test_a_qemu_that_fails_says_why(tmp_path: Path) -> None:
    qemu = script(tmp_path, "echo 'failed to initialize kvm' >&2; exit 1")
    verdict = probe_kvm([qemu], device=Path("/dev/null"))
    assert not verdict.usable
    assert "failed to initialize kvm" in verdict.why


def test_a_guest_that_resets_for_ever_is_none_that_ran(tmp_path: Path) -> None:
    # -no-reboot turns a triple fault into a normal end of QEMU.
    verdict = probe_kvm([script(tmp_path, "exit 0")], device=Path("/dev/null"))
    assert not verdict.usable
    assert "status 0" in verdict.why
