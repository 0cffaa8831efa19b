"""gpupt as it is really installed: from a wheel, editable, and run from a bare checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

HERE = Path(__file__).resolve().parents[2]
LOOK = """
import json, sys
from gpupt.edges.resources import resource_folder
folders = {kind: resource_folder(kind) for kind in ("rolls", "playbooks", "templates", "examples")}
print(json.dumps({kind: sorted(
    str(path.relative_to(folder)) for path in folder.rglob("*")
    if path.is_file() and path.suffix != ".pyc"
) for kind, folder in folders.items()}))
"""
VERBS = ("list", "doctor", "up", "down", "recover", "lab")


@dataclass(frozen=True)
class Installation:
    """One way to have gpupt: the interpreter that sees it, and the command that runs it."""

    python: Path
    gpupt: Sequence[str | Path]
    folder: Path


def run(argv: Sequence[str | Path], folder: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks here, or of everything where this is no git checkout."""
    target = tmp_path_factory.mktemp("checkout") / "gpupt"
    if (HERE / ".git").exists() and shutil.which("git"):
        archive = target.with_suffix(".tar")
        target.mkdir()
        listed = run(["git", "-c", f"safe.directory={HERE}", "ls-files", "-z"], HERE)
        with tarfile.open(archive, "w") as tar:
            for name in filter(None, listed.split("\0")):
                if (HERE / name).exists():
                    tar.add(HERE / name, name)
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="fully_trusted")
    else:
        shutil.copytree(HERE, target, ignore=shutil.ignore_patterns(".venv", "build", "dist"))
    return target


def environment(folder: Path, *install: str | Path) -> Installation:
    """An environment of its own with that installation in it.

    What gpupt depends on is not installed again: it is seen from the tests' environment, so
    that only the installation of gpupt itself is tried."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin/python"
    mine = [path for path in sys.path if path.endswith("site-packages")]
    site = run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], folder
    ).strip()
    # as a path file, which is read after the environment's own folder: gpupt there wins
    lines = [path for path in mine if path != site]
    Path(site, "zz-tests.pth").write_text("".join(f"{path}\n" for path in lines))
    run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
         "--force-reinstall", "--ignore-installed", *install],
        folder.parent,
    )  # fmt: skip
    return Installation(python, [folder / "bin/gpupt"], folder.parent)


@pytest.fixture(scope="module", params=["wheel", "editable", "quickstart", "checkout"])
def installation(
    request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "checkout":
        yield Installation(Path(sys.executable), [sys.executable, checkout / "cli.py"], folder)
        return
    if request.param == "wheel":
        run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, checkout],
            folder,
        )
        (wheel,) = folder.glob("gpupt-*.whl")
        yield environment(folder / "venv", wheel)
    elif request.param == "editable":
        yield environment(folder / "venv", "-e", checkout)
    else:  # the mode that ./quickstart installs in
        mode = ("--config-settings", "editable_mode=compat")
        yield environment(folder / "venv", *mode, "-e", checkout)


def seen_from(installation: Installation, checkout: Path) -> dict[str, str]:
    """The variables with which the checkout's own code, not this one's, is imported."""
    bare = installation.gpupt[-1] == checkout / "cli.py"
    return {"PYTHONPATH": str(checkout)} if bare else {}


def test_the_package_is_the_installed_one(installation: Installation, checkout: Path) -> None:
    where = run(
        [installation.python, "-c", "import gpupt; print(gpupt.__file__)"],
        installation.folder,
        **seen_from(installation, checkout),
    )
    assert not Path(where.strip()).is_relative_to(HERE)


def test_every_roll_playbook_and_template_is_found(
    installation: Installation, checkout: Path
) -> None:
    printed = run(
        [installation.python, "-c", LOOK],
        installation.folder,
        **seen_from(installation, checkout),
    )
    found = json.loads(printed)
    for kind, names in found.items():
        wanted = sorted(
            str(path.relative_to(checkout / kind))
            for path in (checkout / kind).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        )
        assert names == wanted, kind
        assert wanted, f"{kind}/ is empty"


def test_it_runs(installation: Installation, checkout: Path) -> None:
    shown = run([*installation.gpupt, "--help"], installation.folder)
    assert all(verb in shown for verb in VERBS)
    version = run([*installation.gpupt, "--version"], installation.folder)
    assert version.startswith("gpupt")


def test_it_reads_this_machine(installation: Installation) -> None:
    printed = run([*installation.gpupt, "list", "--json"], installation.folder)
    assert json.loads(printed)["schema"] == 1


def test_the_shell_completes_its_verbs(installation: Installation) -> None:
    """click completes a command found on PATH by name; what it answers the shell with."""
    answered = run(
        installation.gpupt,
        installation.folder,
        _GPUPT_COMPLETE="bash_complete",
        COMP_WORDS="gpupt d",
        COMP_CWORD="1",
    )
    assert {line.partition(",")[2] for line in answered.split()} >= {"doctor", "detach", "down"}
    source = run(installation.gpupt, installation.folder, _GPUPT_COMPLETE="bash_source")
    assert "complete" in source
