"""Ansible connection: runs modules in a chroot of the tree that is being baked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from ansible.errors import AnsibleConnectionFailure, AnsibleFileNotFound
from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
    name: gpupt_chroot
    short_description: run tasks in a chroot
    description:
        - Runs commands and copies files in a folder that holds a root file system.
    author: gpupt
    extends_documentation_fragment:
        - connection_pipelining
    options:
        tree:
            description: The folder.
            required: true
            vars:
                - name: gpupt_tree
"""


class Connection(ConnectionBase):
    """A chroot as a host; needs root."""

    transport = "gpupt_chroot"
    has_pipelining = True

    @property
    def tree(self) -> Path:
        return Path(self.get_option("tree"))

    def _connect(self) -> Connection:
        if not (self.tree / "bin/sh").exists():
            raise AnsibleConnectionFailure(f"{self.tree} holds no root file system")
        self._connected = True
        return self

    def exec_command(self, cmd, in_data=None, sudoable=True):
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        done = subprocess.run(
            ["/usr/sbin/chroot", str(self.tree), "/bin/sh", "-c", cmd],
            input=in_data,
            stdin=None if in_data is not None else subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def put_file(self, in_path, out_path):
        super().put_file(in_path, out_path)
        if not Path(in_path).exists():
            raise AnsibleFileNotFound(f"no such file: {in_path}")
        shutil.copyfile(in_path, self.tree / out_path.lstrip("/"))

    def fetch_file(self, in_path, out_path):
        super().fetch_file(in_path, out_path)
        shutil.copyfile(self.tree / in_path.lstrip("/"), out_path)

    def close(self) -> None:
        self._connected = False
