"""Cards move at the same time, the functions of one card one after another."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
from clusters import BARE, GPU, SOUND
from fakekernel import FakeKernel, Fault
from machines import emulated_host

from gpupt.actions import Action, BindFunction, EraseLoan, Plan
from gpupt.apply.execute import execute
from gpupt.apply.lanes import in_lanes, run_lanes
from gpupt.apply.world import World
from gpupt.decide.binding import plan_attach, plan_detach
from gpupt.decide.viability import Preflight
from gpupt.edges.journal import Journal, read_ledger
from gpupt.edges.sysfs import read_host
from gpupt.errors import Failed
from gpupt.model.pci import PciAddress

PATIENCE = 20.0


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return emulated_host(tmp_path / "machine")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def plan_for(kernel: FakeKernel, verb: str, state: Path) -> Plan:
    host, loans = read_host(kernel.root, whole=True), read_ledger(state).loans
    if verb == "attach":
        return plan_attach(host, gpus=tuple(loans), loans=loans)
    return plan_detach(host, gpus=[GPU, BARE], loans=loans, preflight=Preflight())


def carry_out(kernel: FakeKernel, verb: str, state: Path, **more: object) -> None:
    with Journal(state) as journal:
        execute(
            plan_for(kernel, verb, state),
            world=World(kernel, journal, lambda line: None, **more),  # type: ignore[arg-type]
        )


def move(address: PciAddress, lane: PciAddress | None) -> BindFunction:
    return BindFunction(address, "nvidia", "vfio-pci", "vfio-pci", why="", lane=lane)


def test_the_functions_of_a_card_keep_their_order_and_nothing_passes_another_action() -> None:
    erase = EraseLoan(GPU, why="")
    actions: list[Action] = [move(SOUND, GPU), move(BARE, BARE), move(GPU, GPU), erase]
    assert list(in_lanes(actions)) == [
        ([(0, actions[0]), (2, actions[2])], [(1, actions[1])]),
        ([(3, erase)],),
    ]


def test_a_move_of_no_lane_goes_with_no_other() -> None:
    actions: list[Action] = [move(SOUND, GPU), move(BARE, None), move(GPU, GPU)]
    assert list(in_lanes(actions)) == [(list(enumerate(actions)),)]


@pytest.mark.parametrize("verb", ["detach", "attach"])
def test_two_cards_move_at_the_same_time(kernel: FakeKernel, state: Path, verb: str) -> None:
    """Each waits, inside its move, for the other to be inside its own."""
    if verb == "attach":
        carry_out(kernel, "detach", state)
    together = threading.Barrier(2, timeout=PATIENCE)

    def meet(point: str, action: Action) -> None:
        if point == "intended" and isinstance(action, BindFunction) and action.address != SOUND:
            together.wait()

    carry_out(kernel, verb, state, boundary=meet)
    assert (kernel.binding(GPU).driver == "vfio-pci") == (verb == "detach")
    assert set(read_ledger(state).loans) == ({GPU, BARE} if verb == "detach" else set())


def test_one_that_fails_stops_the_others_and_all_are_given_back(
    kernel: FakeKernel, state: Path
) -> None:
    before = kernel.tree()
    kernel.faults = [
        Fault("drivers_probe", str(GPU), errno.EIO, times=1),
        Fault("bind", str(GPU), errno.EIO, times=1),
    ]
    with pytest.raises(Failed, match="EIO"):
        carry_out(kernel, "detach", state)
    kernel.faults = []
    ledger = read_ledger(state)
    assert (ledger.loans, ledger.unfinished) == ({}, ())
    assert kernel.tree() == before


def test_on_the_way_home_one_that_fails_stops_no_other(kernel: FakeKernel, state: Path) -> None:
    carry_out(kernel, "detach", state)
    kernel.faults = [Fault("unbind", str(GPU), errno.EIO)]
    with pytest.raises(Failed, match="EIO"):
        carry_out(kernel, "attach", state)
    assert kernel.binding(BARE).driver is None
    assert kernel.binding(SOUND).driver == "snd_hda_intel"
    assert set(read_ledger(state).loans) == {GPU}


def test_nothing_runs_any_more_when_the_error_is_told() -> None:
    inside, ended = threading.Event(), []

    def step(number: int, _action: Action) -> None:
        if number == 0:
            assert inside.wait(PATIENCE)
            raise Failed("the first")
        inside.set()
        threading.Event().wait(0.2)
        ended.append(number)

    lanes = [[(0, move(GPU, GPU))], [(1, move(BARE, BARE)), (2, move(BARE, BARE))]]
    with pytest.raises(Failed, match="the first"):
        run_lanes(lanes, step)
    assert ended == [1]


def test_however_often_one_interrupts_nothing_is_undone_beside_a_step_at_work() -> None:
    """Two Ctrl-C while a lane is in a write that takes its time."""
    inside, together, ended = threading.Event(), threading.Barrier(2, timeout=PATIENCE), []

    def step(number: int, _action: Action) -> None:
        together.wait()
        inside.set()
        threading.Event().wait(0.6)
        ended.append(number)

    def press() -> None:
        assert inside.wait(PATIENCE)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.15)

    lanes = [[(0, move(GPU, GPU)), (2, move(GPU, GPU))], [(1, move(BARE, BARE))]]
    finger = threading.Thread(target=press)
    finger.start()
    with pytest.raises(KeyboardInterrupt):
        run_lanes(lanes, step)
    # Both lanes came to the end of their step, and no other was begun.
    assert sorted(ended) == [0, 1]
    finger.join()
