"""Frozen values of the model to JSON and back, for the journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from gpupt import actions
from gpupt.errors import Failed
from gpupt.model import cluster, host, pci

TAG = "$"


@cache
def known_types() -> Mapping[str, type]:
    """Every dataclass and enumeration of the model, and every action, by name."""
    return {
        name: kind
        for module in (actions, cluster, host, pci)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, StrEnum))
    }


def encode(value: object) -> str:
    """The value as one line of JSON; raises TypeError for what the model does not hold."""
    return json.dumps(to_plain(value), separators=(",", ":"))


def decode(text: str) -> Any:
    """The value that was encoded; raises Failed for text that is none."""
    try:
        return from_plain(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise Failed(
            "the journal holds a value that this gpupt cannot read",
            details=(text[:200], f"{type(error).__name__}: {error}"),
            remedy="was it written by a newer gpupt?",
        ) from None


def to_plain(value: object) -> Any:
    """Dataclasses become tagged objects, tuples lists; text, numbers and None stay."""
    if isinstance(value, StrEnum):
        return {TAG: type(value).__name__, "value": value.value}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, IPv4Address | IPv4Network):
        return {TAG: type(value).__name__, "value": str(value)}
    if is_dataclass(value) and type(value).__name__ in known_types():
        held = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
        return {TAG: type(value).__name__, **held}
    raise TypeError(f"{type(value).__name__} is not a value of the model")


def from_plain(plain: Any) -> Any:
    """The reverse of to_plain."""
    if isinstance(plain, list):
        return tuple(from_plain(item) for item in plain)
    if not isinstance(plain, dict):
        return plain
    held = dict(plain)
    name = held.pop(TAG)
    if name == "IPv4Address":
        return IPv4Address(held["value"])
    if name == "IPv4Network":
        return IPv4Network(held["value"])
    kind = known_types()[name]
    if issubclass(kind, StrEnum):
        return kind(held["value"])
    return kind(**{key: from_plain(item) for key, item in held.items()})
