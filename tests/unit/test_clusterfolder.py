"""A cluster's folder: made whole, closed to others, and never outside of its place."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from clusters import machine, two_gpus

from gpupt.decide.allocation import allocate
from gpupt.edges.clusterfolder import ClusterFolder, ClusterRecord, read_clusters
from gpupt.errors import BadInput, Failed

ALLOCATION = allocate(two_gpus(), host=machine("emulated_host"))


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    # pytest's own folders are closed to QEMU's user, which ClusterFolder would refuse.
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    return ClusterFolder(tmp_path, "herbarium")


def test_record_is_read_back(folder: ClusterFolder) -> None:
    assert folder.read() is None
    assert not folder.exists
    folder.make(ALLOCATION, image="feed", hosts="127.0.0.1 localhost\n")
    assert folder.read() == ClusterRecord(ALLOCATION, "feed")
    assert list(read_clusters(folder.path.parents[1])) == ["herbarium"]
    folder.remove()
    folder.remove()
    assert not folder.exists
    assert read_clusters(folder.path.parents[1]) == {}


def test_secrets_are_the_owners_alone_and_folders_can_be_passed(folder: ClusterFolder) -> None:
    folder.make(ALLOCATION, image="feed", hosts="hosts\n")
    for path in folder.path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o711, path
        elif path.suffix != ".pub":
            assert mode == 0o600, path


def test_every_node_has_a_host_key_of_its_own_and_the_one_authorized_key(
    folder: ClusterFolder,
) -> None:
    folder.make(ALLOCATION, image="feed", hosts="hosts\n")
    names = [placement.node.name for placement in ALLOCATION.placements]
    keys = {folder.host_key(name) for name in names}
    assert len(keys) == 3
    assert all(key.startswith("ssh-ed25519 ") for key in keys)
    private = {folder.credential(n, "gpupt.ssh_host_ed25519_key").read_text() for n in names}
    assert len(private) == 3
    authorized = {folder.credential(n, "ssh.authorized_keys.root").read_text() for n in names}
    assert authorized == {folder.key.with_suffix(".pub").read_text()}
    with pytest.raises(Failed, match="no host key was made for c9"):
        folder.host_key("c9")


def test_made_again_after_half_a_making(folder: ClusterFolder) -> None:
    folder.make(ALLOCATION, image="feed", hosts="hosts\n")
    (folder.path / "cluster.json").unlink()
    assert folder.read() is None
    folder.make(ALLOCATION, image="feed", hosts="hosts\n")
    assert folder.read() is not None


@pytest.mark.parametrize("text", ["", "{}", '{"image": 3}', '{"allocation": {"$": "Gpu"}}', "[]"])
def test_record_that_cannot_be_read_is_said(folder: ClusterFolder, text: str) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "cluster.json").write_text(text)
    with pytest.raises(Failed, match="the record of cluster herbarium"):
        folder.read()


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-a", "a-", "a" * 64, "a\n", ".hidden"])
def test_names_stay_inside(folder: ClusterFolder, name: str) -> None:
    with pytest.raises(BadInput):
        ClusterFolder(folder.path, name)
    for path in (folder.node, folder.disk, folder.console):
        with pytest.raises(BadInput):
            path(name)


def test_last_words_are_plain_and_say_where_the_rest_is(folder: ClusterFolder) -> None:
    assert folder.last_words("compute-0") == ()
    folder.make_log_folder()
    console = folder.console("compute-0")
    console.write_bytes(b"\x1b[1;31mfirst\x1b[0m\r\n\r\n" + b"\xff\xfe\r\n" + b"panic\r\n" * 30)
    said = folder.last_words("compute-0", lines=3)
    assert said == (f"its console, in {console}, ends:", "  panic", "  panic", "  panic")
    folder.remove_logs()
    assert folder.last_words("compute-0") == ()


def test_place_that_qemu_cannot_reach_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    import os

    if os.geteuid() != 0:
        pytest.skip("only root's QEMU runs as another user")
    with pytest.raises(Failed, match="cannot pass through"):
        ClusterFolder(closed, "herbarium").require_passable()
