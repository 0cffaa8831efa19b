"""Pure: which rolls a node needs, in what order they are baked, and what the results are
called.  A layer's digest covers everything that goes into it and into the layers below."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from gpupt.errors import BadInput
from gpupt.model.roll import SELF, Ground, Layer, Roll

# Raised when the way of baking changes what a roll with the same files turns into.
BAKE_FORMAT = 1
BASE = "base"
# What a machine that runs nodes is made of; no node is.
HOST = "host"


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers from the base upwards, and the digest of the image made of them."""

    layers: tuple[Layer, ...]
    digest: str

    @property
    def rolls(self) -> tuple[str, ...]:
        return tuple(layer.roll for layer in self.layers)


def closure(wanted: Iterable[str], rolls: Mapping[str, Roll]) -> tuple[Roll, ...]:
    """The wanted rolls and all they need, each after what it needs, the base first.

    The order depends on the set alone, never on the order it was asked for in, so that
    equal sets share an image.  ``tensorflow=cuda`` asks for a variant: whoever needs
    tensorflow gets that.  Raises BadInput for an unknown roll and for a circle.
    """
    return tuple(rolls[key] for key in _keys(wanted, rolls))


def _keys(wanted: Iterable[str], rolls: Mapping[str, Roll]) -> tuple[str, ...]:
    """The keys in ``rolls`` of the closure, in its order."""
    asked = tuple(sorted(set(wanted)))
    chosen: dict[str, str] = {}
    for key in asked:
        name, sign, _ = key.partition("=")
        if sign and chosen.setdefault(name, key) != key:
            raise BadInput(f"two variants of the roll {name} are asked for: {', '.join(asked)}")
    done: dict[str, None] = {}

    def add(name: str, path: tuple[str, ...]) -> None:
        key = chosen.get(name, name)
        if key in done:
            return
        if key in path:
            circle = " → ".join((*path[path.index(key) :], key))
            raise BadInput(f"rolls need each other in a circle: {circle}")
        roll = _known(key, rolls, needed_by=path[-1] if path else None)
        for need in sorted(roll.needs):
            add(need, (*path, key))
        done[key] = None

    for key in (BASE, *asked):
        add(key, ())
    return tuple(done)


def plan_stack(wanted: Iterable[str], rolls: Mapping[str, Roll], *, ground: Ground) -> Stack:
    """The layers to bake for the wanted rolls; raises BadInput as ``closure`` does."""
    layers: list[Layer] = []
    below: str | None = None
    for key in _keys(wanted, rolls):
        roll = rolls[key]
        inputs = [str(BAKE_FORMAT), ground.architecture, ground.suite, below or "", roll.digest]
        if key != roll.name:
            inputs.append(key)
        if roll.name == SELF:
            inputs.append(ground.source_digest)
        digest = short_digest(*inputs)
        layers.append(Layer(key, digest, below))
        below = digest
    return Stack(tuple(layers), short_digest("image", str(BAKE_FORMAT), below or ""))


def is_hosts(name: str, rolls: Mapping[str, Roll]) -> bool:
    """Whether a roll is for machines that run nodes, and not for nodes."""
    return any(roll.name == HOST for roll in closure((name,), rolls))


def current_digests(
    sets: Iterable[Iterable[str]], rolls: Mapping[str, Roll], *, ground: Ground
) -> frozenset[str]:
    """Digests, of images and layers, that today's rolls lead to: for each given set of
    rolls and for each roll alone.  A set with a roll that is gone leads to nothing."""
    found: set[str] = set()
    for wanted in (*(tuple(one) for one in sets), *((name,) for name in rolls)):
        if all(name in rolls for name in wanted):
            stack = plan_stack(wanted, rolls, ground=ground)
            found.add(stack.digest)
            found.update(layer.digest for layer in stack.layers)
    return frozenset(found)


def short_digest(*parts: str) -> str:
    """The first 64 bits of the SHA-256 over the parts, each with its length, in hex."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        total.update(f"{len(raw)}:".encode())
        total.update(raw)
    return total.hexdigest()[:16]


def _known(name: str, rolls: Mapping[str, Roll], *, needed_by: str | None) -> Roll:
    if name in rolls:
        return rolls[name]
    near = get_close_matches(name, rolls, 3)
    raise BadInput(
        f"no roll is called {name!r}" + (f", which {needed_by} needs" if needed_by else ""),
        details="the rolls are " + ", ".join(sorted(rolls)),
        remedy=f"did you mean {' or '.join(near)}?" if near else "gpupt roll list shows them",
    )
