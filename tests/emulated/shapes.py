"""Emulated hosts of other shapes than the one that all tests share; small, for a few tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emulatedhost import NAME, STATE, Host, gpupt

from gpupt.lab.host import Lab, find_lab

HERE = Path(__file__).resolve().parent
CROWDED = HERE / "crowded.yaml"


@contextmanager
def a_host(topology: str | Path, *, like: Lab, name: str, memory: str = "2G") -> Iterator[Host]:
    """A host of that topology, booted from the images of ``like``; taken down after."""
    name = f"{NAME}-{name}"
    gpupt("lab", "down", "--name", name)
    images = [word for digest in like.images for word in ("--image", digest)]
    words = ["--topology", str(topology), "--memory", memory, "--host-image", like.image, *images]
    try:
        up = gpupt("lab", "up", "--name", name, *words)
        assert up.returncode == 0, up.stderr
        lab = find_lab(STATE, name)
        assert lab is not None
        host = Host(lab, lab.connect(deadline=60))
        try:
            yield host
        finally:
            host.ssh.close()
    finally:
        down = gpupt("lab", "down", "--name", name)
        assert down.returncode == 0, down.stderr


def doctor(host: Host) -> Mapping[str, list[Mapping[str, Any]]]:
    """What doctor finds, by id; its exit status is held to the severities."""
    done = host.run("gpupt", "--json", "doctor", check=False, deadline=180)
    assert done.status in (0, 1), done.stdout + done.stderr
    found: dict[str, list[Mapping[str, Any]]] = {}
    for each in json.loads(done.stdout)["findings"]:
        found.setdefault(each["id"], []).append(each)
    fails = [each for entries in found.values() for each in entries if each["severity"] == "fail"]
    assert done.status == bool(fails), fails
    return found


def gpus(host: Host) -> dict[str, Mapping[str, Any]]:
    """What list says of each GPU, by its address with no domain."""
    return {gpu["address"][5:]: gpu for gpu in host.gpupt("list")["gpus"]}


def refusal(host: Host, *words: str) -> str:
    """What gpupt says as it refuses, with exit status 3; nothing may have changed."""
    before = host.facts()
    done = host.run("gpupt", *words, check=False, deadline=180)
    assert done.status == 3, f"{words}: {done.status}\n{done.stdout}{done.stderr}"
    assert before.differences(host.facts()) == ()
    return done.stderr
