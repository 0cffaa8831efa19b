"""Images: their records, the initrd, the wheel, where packages come from, what can go."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpupt.edges import bake, bakery, initrd, leftovers, sources, wheel
from gpupt.edges.images import find_image, layer_trees, read_images, write_image
from gpupt.errors import DeadlineExceeded, Failed
from gpupt.model.roll import Layer, Roll


def make_image(state: Path, digest: str, *, disk: str = "disk.qcow2") -> Path:
    folder = state / "images" / digest
    folder.mkdir(parents=True)
    for name in ("disk.qcow2", "vmlinuz", "initrd"):
        (folder / name).write_text(name)
    write_image(
        folder, digest=digest, rolls=("base",), disk=disk, format="qcow2", virtual_size=1 << 30
    )
    return folder


def test_an_image_is_found_by_its_digest(tmp_path: Path) -> None:
    folder = make_image(tmp_path, "aa")
    image = find_image(tmp_path, "aa")
    assert image is not None
    assert (str(image.disk), image.rolls) == (f"{folder}/disk.qcow2", ("base",))
    assert find_image(tmp_path, "bb") is None


def test_an_images_disk_may_be_elsewhere(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    make_image(tmp_path, "aa", disk=str(device))
    image = find_image(tmp_path, "aa")
    assert image is not None and str(image.disk) == str(device)


def test_an_image_whose_disk_is_gone_is_not_found(tmp_path: Path) -> None:
    (make_image(tmp_path, "aa") / "disk.qcow2").unlink()
    assert find_image(tmp_path, "aa") is None


def test_an_image_without_a_record_is_none(tmp_path: Path) -> None:
    (make_image(tmp_path, "aa") / "image.json").unlink()
    assert read_images(tmp_path) == ()


def test_a_broken_record_is_told_from_an_absent_one(tmp_path: Path) -> None:
    (make_image(tmp_path, "aa") / "image.json").write_text("{")
    with pytest.raises(Failed, match="cannot be read"):
        read_images(tmp_path)


def test_layer_trees_come_topmost_first_and_a_missing_one_is_named(tmp_path: Path) -> None:
    layers = (Layer("base", "b", None), Layer("node", "n", "b"))
    (tmp_path / "layers/b/root").mkdir(parents=True)
    with pytest.raises(Failed, match="roll node has not been baked"):
        layer_trees(tmp_path, layers)
    (tmp_path / "layers/n/root").mkdir(parents=True)
    assert [tree.parent.name for tree in layer_trees(tmp_path, layers)] == ["n", "b"]


def test_half_a_bake_leaves_its_log_and_nothing_else(tmp_path: Path) -> None:
    whole = tmp_path / "layers/aa"
    with pytest.raises(KeyboardInterrupt), bake._half(whole) as half:
        (half / "bake.log").write_text("so far")
        raise KeyboardInterrupt
    assert [path.name for path in whole.parent.iterdir()] == ["aa.failed.log"]


def test_a_whole_bake_takes_its_name_at_the_end(tmp_path: Path) -> None:
    whole = tmp_path / "layers/aa"
    with bake._half(whole) as half:
        (half / "root").mkdir()
        assert not whole.exists()
    assert [path.name for path in whole.parent.iterdir()] == ["aa"]


def test_what_a_killed_bake_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "images/.aa.half/root").mkdir(parents=True)
    (tmp_path / "images/bb").mkdir()
    bake._remove_halves(tmp_path)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["bb"]


def test_a_second_bake_waits_says_for_whom_and_not_for_ever(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        bake.baking(tmp_path, said.append),
        pytest.raises(DeadlineExceeded),
        bake.baking(tmp_path, said.append, patience=0),
    ):
        pass
    assert said == [f"waiting for the bake of process {os.getpid()} to end"]


def test_a_roll_that_changes_while_it_is_baked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "roll.yaml").write_text("version: 1")
    roll = Roll("mine", "1", "", (), (), None, (), (), digest="of other files")
    with pytest.raises(Failed, match="was changed while"):
        bake.check_unchanged(roll, tmp_path)


def test_an_order_survives_its_paper() -> None:
    order = bakery.Order("layer", "spark", "/f", ("/a", "/b"), "/r", packages=("p",), slack=3)
    assert bakery.Order.from_json(order.to_json()) == order


# ---- the initrd

DEPENDENCIES = """\
kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/jbd2/jbd2.ko.xz
kernel/fs/jbd2/jbd2.ko.xz:
kernel/lib/crc16.ko.xz:
kernel/arch/x86/crypto/crc32c-intel.ko.xz:
"""


def test_modules_come_after_what_they_need() -> None:
    order = initrd.module_order(
        ("crc32c-intel", "virtio_pci", "ext4"),
        dependencies=DEPENDENCIES,
        builtin="kernel/drivers/virtio/virtio_pci.ko\n",
    )
    assert [path.rpartition("/")[2] for path in order] == [
        "crc32c-intel.ko.xz",
        "jbd2.ko.xz",
        "crc16.ko.xz",
        "ext4.ko.xz",
    ]


def test_a_module_that_is_nowhere_is_named() -> None:
    with pytest.raises(Failed, match="no module virtio_blk"):
        initrd.module_order(("virtio_blk",), dependencies=DEPENDENCIES, builtin="")


@pytest.mark.parametrize("kind", ["xz", "gz", ""])
def test_modules_are_unpacked(tmp_path: Path, kind: str) -> None:
    packed = {"xz": lzma.compress, "gz": gzip.compress, "": bytes}[kind](b"a module")
    path = tmp_path / ("m.ko" + (f".{kind}" if kind else ""))
    path.write_bytes(packed)
    assert initrd.read_module(path) == b"a module"


def test_a_tree_without_the_shell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no static busybox"):
        initrd.write_initrd(tmp_path, tmp_path / "initrd")


def test_the_archive_is_as_the_kernel_reads_it() -> None:
    """Read back by the rules of buffer-format.rst: header, name, padding, content, padding."""
    entries = [("bin", 0o40755, b""), ("bin/a", 0o100755, b"hello"), ("odd", 0o100644, b"1234567")]
    stream = io.BytesIO(initrd.cpio(entries))
    found = []
    while True:
        header = stream.read(110)
        assert header[:6] == b"070701"
        fields = [int(header[at : at + 8], 16) for at in range(6, 110, 8)]
        name = stream.read(fields[11])[:-1].decode()
        stream.read(-stream.tell() % 4)
        content = stream.read(fields[6])
        stream.read(-stream.tell() % 4)
        if name == "TRAILER!!!":
            break
        found.append((name, fields[1], content))
    assert found == entries


# ---- the wheel


def test_the_wheel_is_the_same_for_the_same_source(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = wheel.pack_wheel(tmp_path / "a"), wheel.pack_wheel(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_the_wheel_holds_rolls_playbooks_and_a_true_record(tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel.pack_wheel(tmp_path)) as archive:
        names = set(archive.namelist())
        record = next(name for name in names if name.endswith("/RECORD"))
        listed = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
        metadata = next(name for name in names if name.endswith("/METADATA"))
        assert b"Name: gpupt" in archive.read(metadata)
    assert listed == names
    assert {"gpupt/cli/main.py", "gpupt/rolls/base/roll.yaml", "gpupt/playbooks/bake.yml"} <= names
    assert not any("__pycache__" in name for name in names)


def test_an_unpacked_wheel_computes_the_same_digests(tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel.pack_wheel(tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "from gpupt.edges.rolls import read_rolls\nfrom gpupt.edges.wheel import source_digest\n"
        "import json\n"
        "print(json.dumps([source_digest(), {n: r.digest for n, r in read_rolls().items()}]))"
    )

    def ask(folder: Path) -> object:
        words = [sys.executable, "-c", program]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, check=True)
        return json.loads(done.stdout)

    assert ask(tmp_path / "site") == ask(Path(wheel.__file__).parents[2])


def test_gpupts_own_lock_names_what_setup_cfg_asks_for() -> None:
    """The roll's list leaves out libvirt-python alone, which is Debian's on a host."""
    import configparser
    import re

    root = Path(__file__).resolve().parents[2]
    parsed = configparser.ConfigParser()
    parsed.read(root / "setup.cfg")
    asked = {line.strip() for line in parsed["options"]["install_requires"].splitlines() if line}
    listed = set((root / "rolls/gpupt/files/requirements.in").read_text().splitlines())
    assert {line for line in asked if not re.match("libvirt-python", line)} == listed


# ---- where packages come from


def test_the_debian_archive_is_taken_and_security_is_not() -> None:
    targets = (
        "http://one.example/debian-security/\tDebian\tDebian-Security\n"
        "http://two.example/other\tThem\tThem\n"
        "http://mirror.example/debian/\tDebian\tDebian\n"
    )
    assert sources.debian_mirror(targets) == "http://mirror.example/debian"


def test_a_machine_that_is_not_debian_has_no_mirror_to_give() -> None:
    assert sources.debian_mirror("http://mirror.example/ubuntu\tUbuntu\tUbuntu\n") is None


def test_a_list_of_mirrors_gives_its_first(tmp_path: Path) -> None:
    listed = tmp_path / "debian.list"
    targets = (
        "cdrom:[Debian 13]/\tDebian\tDebian\n"
        f"mirror+file:{listed}/\tDebian\tDebian\n"
        "http://second.example/debian/\tDebian\tDebian\n"
    )
    assert sources.debian_mirror(targets) == "http://second.example/debian"
    listed.write_text("# ours\n\nhttps://first.example/debian\tpriority:1\n")
    assert sources.debian_mirror(targets) == "https://first.example/debian"


def test_pips_settings_become_uvs() -> None:
    listing = (
        "global.index-url='https://index.example/simple'\n"
        "global.extra-index-url='https://a.example\\nhttps://b.example'\n"
        "global.timeout='180'\n"
    )
    settings = sources.pip_settings(
        listing, {"PIP_FIND_LINKS": "/a '/b c' https://me:pw@c.example/", "HOME": "/"}
    )
    environment, links = sources.uv_sources(settings)
    assert environment == {
        "UV_DEFAULT_INDEX": "https://index.example/simple",
        "UV_INDEX": "https://a.example https://b.example",
        "UV_FIND_LINKS": "https://me:pw@c.example/",
    }
    assert links == ("/a", "/b c")


def test_the_environment_goes_before_pips_file() -> None:
    settings = sources.pip_settings("global.index-url='a'\n", {"PIP_INDEX_URL": "b"})
    assert settings["index-url"] == "b"


def test_apts_proxies_are_apts_alone() -> None:
    dump = 'Acquire::http::Proxy "http://cache.example:3142";\nAcquire::http::Proxy::x "DIRECT";\n'
    found = sources.apt_proxies(dump)
    assert found == {"GPUPT_APT_PROXY_HTTP": "http://cache.example:3142"}
    assert sources.proxies_for_apt({**found, "http_proxy": "other"}) == {
        "http_proxy": "http://cache.example:3142"
    }


def test_a_mirror_with_a_password_is_refused_without_repeating_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(sources.MIRROR_VARIABLE, "http://me:hunter2@mirror.example/debian")
    with pytest.raises(Exception, match="user name or a password") as caught:
        sources.read_sources()
    assert "hunter2" not in str(caught.value)


# ---- what can go


def qcow2(path: Path, backing: str) -> None:
    """A header that names a backing file, as docs/interop/qcow2.txt has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = backing.encode()
    head = b"QFI\xfb" + (3).to_bytes(4, "big")
    path.write_bytes(head + (104).to_bytes(8, "big") + len(raw).to_bytes(4, "big"))
    with path.open("r+b") as file:
        file.seek(104)
        file.write(raw)


def test_what_nothing_leads_to_can_go_and_what_is_in_use_stays(tmp_path: Path) -> None:
    for digest in ("kept", "based", "named", "free"):
        make_image(tmp_path, digest)
    (tmp_path / "layers/old/root").mkdir(parents=True)
    (tmp_path / "layers/.lock").touch()
    qcow2(tmp_path / "clusters/c/nodes/n/disk.qcow2", f"{tmp_path}/images/based/disk.qcow2")
    (tmp_path / "lab/l").mkdir(parents=True)
    (tmp_path / "lab/l/lab.json").write_text('{"images": ["named"]}')
    found = leftovers.find_leftovers(tmp_path, keep=frozenset({"kept"}))
    assert [(one.kind, one.digest) for one in found] == [("image", "free"), ("layer", "old")]
    leftovers.remove_leftover(found[0])
    assert not (tmp_path / "images/free").exists()


def test_a_disk_that_is_no_overlay_stands_on_nothing(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(64))
    assert leftovers.backing_file(tmp_path / "raw") is None
    qcow2(tmp_path / "q", "/below")
    assert leftovers.backing_file(tmp_path / "q") == "/below"
