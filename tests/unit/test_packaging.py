"""Keeps setup.cfg whole: every package is listed, and what is not Python travels with it."""

from __future__ import annotations

import configparser
from pathlib import Path
from typing import get_args

from gpupt.edges import resources

HERE = Path(__file__).resolve().parents[2]
BESIDE: tuple[resources.Kind, ...] = get_args(resources.Kind)


def metadata() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser()
    parsed.read(HERE / "setup.cfg")
    return parsed


def unlisted(listed: set[str], root: Path) -> set[str]:
    """The packages under ``root`` that setup.cfg's list lacks."""
    found = {
        ".".join(path.parent.relative_to(root).parts)
        for path in (root / "gpupt").rglob("__init__.py")
    }
    return found - listed


def listed() -> set[str]:
    return set(metadata()["options"]["packages"].split())


def test_every_package_is_listed() -> None:
    assert unlisted(listed(), HERE) == set()


def test_an_unlisted_package_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "gpupt/tune").mkdir(parents=True)
    (tmp_path / "gpupt/tune/__init__.py").touch()
    assert unlisted(listed(), tmp_path) == {"gpupt.tune"}


def test_the_folders_beside_the_package_are_carried() -> None:
    data = metadata()["options.package_data"]
    folders = metadata()["options"]["package_dir"]
    for name in BESIDE:
        assert f"gpupt.{name}" in listed()
        assert f"gpupt.{name} = {name}" in folders
        assert data[f"gpupt.{name}"] == "**/*"


def test_files_in_the_package_that_are_not_python_are_carried() -> None:
    patterns = [part.strip() for part in metadata()["options.package_data"]["gpupt"].split(",")]
    package = HERE / "gpupt"
    carried = {path for pattern in patterns for path in package.glob(pattern)}
    others = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and "__pycache__" not in path.parts
    }
    assert others - carried == set()


def test_a_checkout_finds_its_folders() -> None:
    for name in BESIDE:
        assert resources.resource_folder(name) == HERE / name
