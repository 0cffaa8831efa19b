"""The journal: on disk before the write, one gpupt at a time, and clear when it is damaged."""

from __future__ import annotations

import os
import sqlite3
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pci import ADDRESSES

from gpupt import actions
from gpupt.actions import Action, BindFunction, EraseLoan, JournalEntry, Plan
from gpupt.edges.codec import decode, encode
from gpupt.edges.journal import Journal, read_ledger
from gpupt.errors import Failed, Refused
from gpupt.model.host import FunctionOrigin, Loan
from gpupt.model.pci import DriverBinding, Identity, PciAddress, PciId

GPU = PciAddress.parse("41:00.0")
LOAN = Loan(
    GPU,
    (
        FunctionOrigin(
            GPU, Identity(PciId(0x10DE, 0x2330), None, 0x030200), DriverBinding("nvidia", None)
        ),
    ),
    "c",
    "n1",
)
PLAN = Plan(
    "detach",
    str(GPU),
    (
        BindFunction(GPU, "nvidia", "vfio-pci", "vfio-pci", why="the GPU"),
        EraseLoan(GPU, why="…"),
    ),
)
KINDS = typing.get_args(Action)


@settings(max_examples=300, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.data())
def test_every_action_survives_the_journal(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    action = data.draw(st.from_type(kind))
    assert decode(encode(action)) == action


@given(ADDRESSES, st.text(), st.none() | st.text())
def test_loans_and_plans_survive_too(address: PciAddress, text: str, other: str | None) -> None:
    binding = DriverBinding(other, other)
    loan = Loan(address, (FunctionOrigin(address, LOAN.origins[0].identity, binding),), other, text)
    plan = Plan(text, text, (BindFunction(address, other, other, other, text),))
    assert decode(encode((loan, plan, binding, None))) == (loan, plan, binding, None)


def test_every_kind_of_action_is_in_the_union() -> None:
    declared = {
        kind
        for kind in vars(actions).values()
        if isinstance(kind, type) and "why" in getattr(kind, "__dataclass_fields__", ())
    }
    assert declared == set(KINDS)


@pytest.mark.parametrize("text", ["", "{", '{"$":"Unheard"}', '{"$":"Plan"}', '{"no":"tag"}'])
def test_what_cannot_be_decoded(text: str) -> None:
    with pytest.raises(Failed, match="cannot read"):
        decode(text)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = tmp_path / "state"
    entry = JournalEntry(0, PLAN.actions[0], DriverBinding("nvidia", None), False)
    with Journal(state) as journal:
        journal.record(LOAN)
        run = journal.begin(PLAN)
        journal.intend(run, entry)
    ledger = read_ledger(state)
    assert ledger.loans == {GPU: LOAN}
    (found,) = ledger.unfinished
    assert (found.plan, found.pid, found.entries) == (PLAN, os.getpid(), (entry,))
    with Journal(state) as journal:
        journal.mark(run, 0, state="done")
        assert journal.ledger.unfinished[0].entries[0].done
        journal.end(run, outcome="done")
        journal.erase(GPU)
        assert journal.ledger == read_ledger(tmp_path / "nothing")


def test_every_commit_is_on_the_disk(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        connection = journal.connection
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.isolation_level is None


def test_a_folder_that_is_not_there_is_empty_and_stays_so(tmp_path: Path) -> None:
    assert read_ledger(tmp_path / "state").loans == {}
    assert not (tmp_path / "state").exists()


def test_one_gpupt_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path):
        with pytest.raises(Refused) as error:
            Journal(tmp_path)
        assert f"PID {os.getpid()}" in error.value.brief
        assert read_ledger(tmp_path).loans == {}
    Journal(tmp_path).close()


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        Journal(tmp_path)
        os.write(writer, b"x")
        os.kill(os.getpid(), 9)
    os.read(reader, 1)
    os.waitpid(child, 0)
    Journal(tmp_path).close()


@pytest.mark.parametrize("damage", [b"not a database" * 100, None])
def test_damage_is_told(tmp_path: Path, damage: bytes | None) -> None:
    with Journal(tmp_path) as journal:
        journal.record(LOAN)
    file = tmp_path / "journal.sqlite"
    raw = bytearray(damage or file.read_bytes())
    if damage is None:
        raw[4096:] = b"\xa5" * (len(raw) - 4096)
    file.write_bytes(raw)
    for use in (read_ledger, Journal):
        with pytest.raises(Failed) as error:
            use(tmp_path)
        assert "journal.sqlite cannot be used" in error.value.brief
        assert "move it aside" in error.value.remedy


def test_a_newer_journal_is_not_touched(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "journal.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    for use in (read_ledger, Journal):
        with pytest.raises(Failed, match="version 99"):
            use(tmp_path)


def test_a_state_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed, match="cannot be used"):
        Journal(tmp_path / "file" / "state")


@pytest.mark.skipif(os.geteuid() == 0, reason="root is denied nothing")
def test_a_denied_state_is_told(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    tmp_path.chmod(0o500)
    with pytest.raises(Failed, match="cannot be used") as error:
        Journal(tmp_path)
    assert "--state" in error.value.remedy
    assert read_ledger(tmp_path).loans == {}
