"""Runs a command in the tree of an image's layers, written to a scratch folder over them.

    unshare --mount --propagation private python in_image.py CHECKOUT LAYER… -- COMMAND…

The topmost layer comes first; the checkout is seen at /mnt, for reading.  Every mount goes
with the namespace, however this ends.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from gpupt.edges.chroot import bind, mount, overlay, ready

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main(checkout: Path, layers: list[Path], command: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="gpupt-stack-") as scratch:
        folder = Path(scratch)
        with mount("tmpfs", folder, kind="tmpfs"):
            upper, work, merged = folder / "upper", folder / "work", folder / "merged"
            for each in (upper, work, merged):
                each.mkdir()
            with (
                overlay(layers, upper=upper, work=work, merged=merged),
                ready(merged),
                bind(checkout, merged / "mnt", read_only=True),
            ):
                words = ["chroot", merged, "env", "-i", "HOME=/root", f"PATH={PATH}", *command]
                return subprocess.run(words, check=False).returncode


if __name__ == "__main__":
    cut = sys.argv.index("--")
    sys.exit(main(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:cut]], sys.argv[cut + 1 :]))
