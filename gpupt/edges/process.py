"""The gate to other programs: argv lists only, a deadline on every run, output kept."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import IO

from gpupt.errors import DeadlineExceeded, Failed


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that ended: its exit status and what it wrote."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


def run(
    argv: Sequence[str | Path],
    *,
    deadline: float,
    stdin: str | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    check: bool = True,
) -> Completed:
    """Run a program to its end within ``deadline`` seconds.

    ``environment`` is laid over this process's own.  The program gets a session of its own,
    so that the deadline ends its children too.  Raises Failed when it is missing or, with
    ``check``, exits non-zero; DeadlineExceeded.
    """
    words = tuple(str(word) for word in argv)
    child = spawn(
        words,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        environment=environment,
        folder=folder,
    )
    try:
        out, err = child.communicate(None if stdin is None else stdin.encode(), timeout=deadline)
    except subprocess.TimeoutExpired:
        end(child)
        raise DeadlineExceeded(
            f"{words[0]} did not end within {deadline:g} s", details=" ".join(words)
        ) from None
    except BaseException:
        end(child)
        raise
    done = Completed(words, child.returncode, decode(out), decode(err))
    if check and done.status != 0:
        raise failure(done)
    return done


def stream(
    argv: Sequence[str | Path],
    *,
    deadline: float,
    on_line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> int:
    """Run a program and hand each line of its output (both streams) on as it comes.

    Returns the exit status; raises Failed when it is missing, DeadlineExceeded.
    """
    words = tuple(str(word) for word in argv)
    child = spawn(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        environment=environment,
        folder=folder,
    )
    late = False

    def expire() -> None:
        nonlocal late
        late = True
        end(child)

    timer = Timer(deadline, expire)
    timer.daemon = True
    timer.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            on_line(decode(line).rstrip("\n"))
        status = child.wait()
    except BaseException:
        end(child)
        raise
    finally:
        timer.cancel()
    if late:
        raise DeadlineExceeded(
            f"{words[0]} did not end within {deadline:g} s", details=" ".join(words)
        )
    return status


def spawn(
    argv: Sequence[str | Path],
    *,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    pass_fds: Iterable[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own and return at once; raises Failed if missing."""
    words = [str(word) for word in argv]
    try:
        return subprocess.Popen(
            words,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **environment} if environment else None,
            cwd=folder,
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError as error:
        raise Failed(
            f"{words[0]} is not installed", details=str(error), remedy=f"install {words[0]}"
        ) from None
    except PermissionError as error:
        raise Failed(f"{words[0]} may not be run", details=str(error)) from None


def end(child: subprocess.Popen[bytes], *, patience: float = 5) -> None:
    """End a spawned program with its whole session: TERM, then KILL after ``patience`` s."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=patience)
            return


def decode(raw: bytes) -> str:
    """Text of a program's output; what is not UTF-8 is shown, never fatal."""
    return raw.decode("utf-8", errors="backslashreplace")


def failure(done: Completed) -> Failed:
    """The error for a program that exited non-zero, with the end of what it said."""
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-12:]
    return Failed(
        f"{done.argv[0]} failed with status {done.status}",
        details=(" ".join(done.argv), *said),
    )
