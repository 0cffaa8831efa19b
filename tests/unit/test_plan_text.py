"""A plan as a person reads it: every action in words, what is alike said once, lines that fit."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from boards import BOARDS

from gpupt.actions import (
    VERBS,
    Action,
    BindFunction,
    CheckGpu,
    EraseLoan,
    Plan,
    SetAttribute,
    StopNetwork,
    StopNode,
)
from gpupt.decide.binding import choose_all, plan_detach
from gpupt.decide.viability import Preflight
from gpupt.edges.sysfs import read_host
from gpupt.model.pci import PciAddress
from gpupt.report.plan import plan_lines

ONE, TWO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:02:00.0")
HOME = "nvidia → nouveau: where it came from"


def lines(*actions: Action, width: int | None = None) -> list[str]:
    return plan_lines(Plan("do", "it", actions), width=width)


def bind(address: PciAddress, why: str = HOME) -> BindFunction:
    return BindFunction(address, "nvidia", "nouveau", None, why)


def test_every_action_has_a_word() -> None:
    assert set(VERBS) == set(get_args(Action))


def test_one_thing_is_one_line() -> None:
    assert lines(bind(ONE)) == [f"  bind       {ONE}  {HOME}"]
    assert lines(StopNetwork("tiny", "no node uses it")) == [
        "  stop       tiny's network  no node uses it"
    ]
    path = f"sys/bus/pci/devices/{ONE}/d3cold_allowed"
    assert lines(SetAttribute(path, "0", "1", "so it stays")) == [
        f"  set        {ONE}  d3cold_allowed 1 → 0: so it stays"
    ]


def test_what_is_alike_is_said_once_and_order_is_kept() -> None:
    told = lines(bind(ONE), bind(TWO), CheckGpu(ONE, "is it well"), bind(ONE, "again"))
    assert told == [
        f"  bind       {HOME} (2)",
        f"             {ONE}  {TWO}",
        f"  check      {ONE}  is it well",
        f"  bind       {ONE}  again",
    ]


def test_two_reasons_of_one_kind_are_told_apart() -> None:
    told = lines(bind(ONE), bind(TWO, "another"), EraseLoan(ONE, "done"))
    assert [line.split()[0] for line in told] == ["bind", "bind", "forget"]


@pytest.mark.parametrize("width", [40, 80, 132])
@pytest.mark.parametrize("board", BOARDS)
def test_it_fits_the_terminal_and_names_everything(tmp_path: Path, board: str, width: int) -> None:
    BOARDS[board](tmp_path)
    host = read_host(tmp_path, whole=True)
    chosen, _ = choose_all(host, loans={}, preflight=Preflight())
    plan = plan_detach(host, gpus=chosen, loans={}, preflight=Preflight())
    told = plan_lines(plan, width=width)
    assert max(map(len, told), default=0) <= width
    for action in plan.actions:
        if isinstance(action, BindFunction):
            assert any(str(action.address) in line for line in told)
    assert len(told) <= 8 + 2 * len(plan.actions)


def test_a_word_that_is_longer_than_the_line_stays_whole() -> None:
    long = "n" * 90
    told = lines(StopNode("c", long, "its cluster goes"), width=60)
    assert told[0].endswith(long)
    assert "its cluster goes" in told[1]
