"""The gate to Ansible: applies one role to one tree, quietly; a failure names its task."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpupt.edges.resources import resource_folder
from gpupt.errors import DeadlineExceeded, Failed


def apply_role(
    roll: str,
    *,
    tree: Path,
    rolls: Path,
    variables: Mapping[str, Any],
    deadline: int,
    log: Callable[[str], None],
) -> int:
    """Apply the role of that roll to ``tree`` through chroot; returns how many tasks changed
    something.  Raises Failed with the task, its file and what it said; DeadlineExceeded.
    """
    try:
        import ansible_runner
    except ImportError:
        raise Failed(
            "Ansible is not installed, and baking images needs it",
            remedy="install gpupt with its extra: pip install 'gpupt[images]'",
        ) from None
    failures: list[Failed] = []
    changed = 0

    def on_event(event: dict[str, Any]) -> bool:
        nonlocal changed
        said = str(event.get("stdout") or "").strip()
        if said:
            log(said)
        kind = event.get("event")
        data = event.get("event_data") or {}
        if kind == "runner_on_ok" and (data.get("res") or {}).get("changed"):
            changed += 1
        failed = kind in {"runner_on_failed", "runner_on_unreachable"}
        if failed and not data.get("ignore_errors"):
            failures.append(_failure(roll, data))
        return False  # keep no event on disk

    playbooks = resource_folder("playbooks")
    with tempfile.TemporaryDirectory(prefix="gpupt-ansible-") as private:
        result = ansible_runner.run(
            private_data_dir=private,
            playbook=str(playbooks / "bake.yml"),
            inventory={"all": {"hosts": {"tree": {"ansible_connection": "gpupt_chroot"}}}},
            extravars={
                "roll": roll,
                "gpupt_tree": str(tree),
                "ansible_python_interpreter": "/usr/bin/python3",
                **variables,
            },
            envvars={
                "ANSIBLE_CONNECTION_PLUGINS": str(playbooks / "connection"),
                "ANSIBLE_ROLES_PATH": str(rolls),
                "ANSIBLE_LOCALHOST_WARNING": "False",
                "ANSIBLE_PIPELINING": "True",
                "ANSIBLE_NOCOWS": "True",
                "ANSIBLE_NOCOLOR": "True",
                "ANSIBLE_RETRY_FILES_ENABLED": "False",
                "ANSIBLE_HOME": str(Path(private) / "home"),
                "ANSIBLE_REMOTE_TEMP": "/tmp/.ansible",
                "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
                "LC_ALL": "C.UTF-8",
            },
            quiet=True,
            event_handler=on_event,
            settings={"suppress_env_files": True},
            timeout=deadline,
        )
        tail = ""
        if result.rc != 0 and result.stdout is not None:
            tail = result.stdout.read()
    if result.status == "timeout":
        raise DeadlineExceeded(f"roll {roll}: its role did not end within {deadline} s")
    if failures:
        raise failures[0]
    if result.rc != 0:
        raise Failed(f"roll {roll}: its role failed", details=tuple(tail.splitlines()[-12:]))
    return changed


def _failure(roll: str, data: Mapping[str, Any]) -> Failed:
    """The error for a failed task, with the end of what it said."""
    result = data.get("res") or {}
    said = [str(result.get(key) or "") for key in ("msg", "stderr", "module_stderr", "stdout")]
    lines = [line for text in said for line in text.splitlines() if line.strip()]
    return Failed(
        f"roll {roll}: the task {data.get('task')!r} failed",
        details=(f"in {data.get('task_path')}", *lines[:1], *lines[1:][-14:]),
    )
