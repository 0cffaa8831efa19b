"""An emulated host whose kernel stalls as it starts: told from its console, reset once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from gpupt.errors import Failed

# The kernel's own word for it, Documentation/RCU/stallwarn.rst: it comes 21 s after a processor
# stopped taking its timer's interrupts, on a console that is quiet otherwise.
STALL = re.compile(r"rcu: INFO: rcu\w* (?:self-)?detected stalls? on CPU")


class StallWatch:
    """Asked again and again while the host starts; ``reset`` is called at the first stall.

    Seen in one of some hundred starts of an emulated machine, which then would wait for ever.
    A host that stalls again is broken: raises Failed with what its kernel said.
    """

    def __init__(
        self, console: Path, *, reset: Callable[[], None], narrate: Callable[[str], None]
    ) -> None:
        self._console = console
        self._reset = reset
        self._narrate = narrate
        self._read = 0
        self._was_reset = False

    def __call__(self) -> None:
        said = self._next_words()
        stalled = STALL.search(said)
        if stalled is None:
            return
        shown = said[stalled.start() :].splitlines()
        if self._was_reset:
            raise Failed("the emulated host's kernel stalls as it starts", details=tuple(shown[:4]))
        self._was_reset = True
        self._narrate(f"its kernel stalls ({shown[0]}): reset, this once")
        self._reset()

    def _next_words(self) -> str:
        """What the console said since the last whole line that was read."""
        try:
            with self._console.open("rb") as console:
                console.seek(self._read)
                said = console.read()
        except OSError:  # QEMU has not made it yet
            return ""
        said = said[: said.rfind(b"\n") + 1]
        self._read += len(said)
        return said.decode(errors="replace")
