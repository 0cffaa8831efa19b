"""Which QEMU an emulated host runs on: Debian's where KVM runs guests, else roll emulator's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gpupt.cli.context import Settings
from gpupt.lab.emulator import find_emulator

Narrate = Callable[[str], None]


def choose_qemu(
    settings: Settings,
    accelerator: str = "auto",
    *,
    narrate: Narrate,
    mirror: str | None = None,
) -> tuple[str, tuple[Path, ...]]:
    """``kvm`` or ``tcg``, and the trees that hold QEMU for it, topmost first.

    Auto is kvm when a guest really runs on it.  What is not there is baked: the roll emulator
    when it is wanted, which takes some minutes, once; raises as ``bake_layers`` does.
    """
    from gpupt.decide.layers import plan_stack
    from gpupt.edges.bake import bake_layers, read_ground
    from gpupt.edges.rolls import read_rolls
    from gpupt.model.roll import EMULATOR, SELF

    known = read_rolls()

    def trees_of(roll: str, reason: str) -> tuple[Path, ...]:
        layers = plan_stack((roll,), known, ground=read_ground()).layers
        folder = settings.state / "layers"
        trees = tuple(folder / layer.digest / "root" for layer in reversed(layers))
        if not all(tree.is_dir() for tree in trees):
            narrate(reason)
            bake_layers(layers, rolls=known, state=settings.state, narrate=narrate, mirror=mirror)
        return trees

    trees = trees_of(SELF, "the layers that hold the emulated host's QEMU are gone: baking them")
    if accelerator == "auto":
        accelerator = _probe(trees, narrate)
    if accelerator == "tcg":
        trees = trees_of(
            EMULATOR, "QEMU's own emulation fails under guests: building it with that mended, once"
        )
    return accelerator, trees


def _probe(trees: tuple[Path, ...], narrate: Narrate) -> str:
    """kvm when a guest really runs on it, else tcg; said aloud."""
    from gpupt.edges.kvm import probe_kvm

    verdict = probe_kvm(find_emulator(trees).argv)
    if verdict.usable:
        narrate(f"KVM: {verdict.why}")
        return "kvm"
    narrate(f"emulating the processor (TCG): {verdict.why}")
    return "tcg"
