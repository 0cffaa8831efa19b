"""What verbs about clusters find out of the machine: routes, KVM's verdict, whether it is a lab."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from machines import emulated_host

from gpupt.cli import clusterworld
from gpupt.cli.clusterworld import aliases_of, is_lab, kvm_verdict, remember, remembered
from gpupt.cli.context import Settings
from gpupt.edges.kvm import KvmVerdict
from gpupt.edges.routes import read_routes
from gpupt.model.cluster import Route
from gpupt.model.pci import PciAddress

WORKS = KvmVerdict(True, "a guest ran")


def test_routes_are_read(tmp_path: Path) -> None:
    emulated_host(tmp_path)
    assert read_routes(tmp_path) == (
        Route("eth0", IPv4Network("0.0.0.0/0")),
        Route("eth0", IPv4Network("10.0.0.0/24")),
    )
    (tmp_path / "proc/net/route").write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "down0\t0000000B\t00000000\t0000\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "gp-x\t0007D50A\t00000000\t0001\t0\t0\t0\tF0FFFFFF\t0\t0\t0\n"
    )
    assert read_routes(tmp_path) == (Route("gp-x", IPv4Network("10.213.7.0/28")),)


def test_routes_that_are_not_shown_are_not_no_routes(tmp_path: Path) -> None:
    assert read_routes(tmp_path) is None


def test_verdict_is_kept_for_one_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remembered(tmp_path) is None
    remember(tmp_path, WORKS)
    assert remembered(tmp_path) == WORKS
    monkeypatch.setattr(clusterworld, "boot_id", lambda: "another boot")
    assert remembered(tmp_path) is None


def test_verdict_is_never_kept_where_boots_cannot_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusterworld, "boot_id", lambda: "")
    remember(tmp_path, WORKS)
    assert remembered(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"boot": 3}', "\x00"])
def test_spoilt_note_is_no_verdict(tmp_path: Path, text: str) -> None:
    (tmp_path / "kvm.json").write_text(text)
    assert remembered(tmp_path) is None


def test_probe_runs_once_and_emulation_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def probe(*, deadline: float) -> KvmVerdict:
        asked.append(deadline)
        return KvmVerdict(False, "it never ran")

    monkeypatch.setattr(clusterworld, "probe_kvm", probe)
    settings = Settings(state=tmp_path)
    first = kvm_verdict(settings)
    assert (first(), first(), kvm_verdict(settings)()) == (False, False, False)
    assert len(asked) == 1
    assert json.loads((tmp_path / "kvm.json").read_text())["usable"] is False
    said = capsys.readouterr().err
    assert said.count("KVM is not used (it never ran): nodes are emulated, and slow") == 2


@pytest.mark.parametrize(
    ("line", "lab"),
    [("quiet gpupt.lab=x rw", True), ("quiet notgpupt.lab=x", False), ("", False), (None, False)],
)
def test_lab_is_known_by_its_command_line(tmp_path: Path, line: str | None, lab: bool) -> None:
    if line is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cmdline").write_text(line)
    assert is_lab(tmp_path) is lab


def test_aliases_are_read_where_there_are_some(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path)
    assert aliases_of(settings) == {}
    (tmp_path / "aliases.yaml").write_text('big: "41:00.0"\n')
    assert aliases_of(settings) == {"big": PciAddress.parse("0000:41:00.0")}
