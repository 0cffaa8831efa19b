"""Which QEMU an emulated host gets, and when one is built for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpupt.cli import qemu
from gpupt.cli.context import Settings
from gpupt.decide.layers import plan_stack
from gpupt.edges import bake, kvm
from gpupt.edges.bake import read_ground
from gpupt.edges.rolls import read_rolls


class Bakery:
    """Stands in for the bake and for the probe; notes what it was asked for."""

    def __init__(self, state: Path, *, kvm_runs: bool) -> None:
        self.state, self.kvm_runs, self.baked = state, kvm_runs, []

    def tree(self, roll: str) -> Path:
        layer = plan_stack((roll,), read_rolls(), ground=read_ground()).layers[-1]
        return self.state / "layers" / layer.digest / "root"

    def bake(self, layers, **_: object) -> tuple[str, ...]:  # type: ignore[no-untyped-def]
        self.baked.append([layer.roll for layer in layers])
        for layer in layers:
            self.tree(layer.roll).mkdir(parents=True, exist_ok=True)
        return ()

    def probe(self, _: object) -> kvm.KvmVerdict:
        return kvm.KvmVerdict(self.kvm_runs, "as the test has it")


@pytest.fixture
def bakery(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Bakery:
    made = Bakery(tmp_path, kvm_runs=request.param)
    monkeypatch.setattr(bake, "bake_layers", made.bake)
    monkeypatch.setattr(kvm, "probe_kvm", made.probe)
    monkeypatch.setattr(qemu, "find_emulator", lambda trees: type("E", (), {"argv": ()}))
    for layer in plan_stack(("gpupt",), read_rolls(), ground=read_ground()).layers:
        made.tree(layer.roll).mkdir(parents=True)
    return made


def choose(bakery: Bakery, accelerator: str = "auto") -> tuple[str, tuple[Path, ...]]:
    return qemu.choose_qemu(Settings(state=bakery.state), accelerator, narrate=lambda _: None)


@pytest.mark.parametrize("bakery", [True], indirect=True)
def test_where_kvm_runs_guests_nothing_is_built(bakery: Bakery) -> None:
    accelerator, trees = choose(bakery)
    assert (accelerator, bakery.baked) == ("kvm", [])
    assert bakery.tree("gpupt") in trees


@pytest.mark.parametrize("bakery", [False], indirect=True)
def test_where_it_does_not_the_emulator_is_built_once(bakery: Bakery) -> None:
    accelerator, trees = choose(bakery)
    assert (accelerator, bakery.baked) == ("tcg", [["base", "host", "emulator"]])
    assert trees[0] == bakery.tree("emulator")
    assert choose(bakery) == (accelerator, trees)
    assert len(bakery.baked) == 1


@pytest.mark.parametrize("bakery", [True], indirect=True)
def test_what_is_asked_for_is_not_probed(bakery: Bakery) -> None:
    assert choose(bakery, "tcg")[0] == "tcg"
    assert bakery.baked == [["base", "host", "emulator"]]


@pytest.mark.parametrize("bakery", [True], indirect=True)
def test_layers_that_were_removed_are_baked_again(bakery: Bakery) -> None:
    bakery.tree("gpupt").rmdir()
    accelerator, trees = choose(bakery)
    assert (accelerator, bakery.baked) == ("kvm", [["base", "host", "gpupt"]])
    assert all(tree.is_dir() for tree in trees)
