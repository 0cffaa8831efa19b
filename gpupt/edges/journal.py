"""The gate to SQLite: loans, fences, and the journal of what was begun, in STATE/journal.sqlite.

An intent is on the disk before the write it announces (WAL, synchronous=FULL: each commit
is fsynced).  One gpupt changes a host at a time: a lock on STATE/lock, with the PID in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING

from gpupt.actions import Ledger
from gpupt.errors import Failed, GpuptError, Refused

if TYPE_CHECKING:
    import sqlite3

    from gpupt.actions import JournalEntry, Plan, Run
    from gpupt.model.host import Fence, Loan
    from gpupt.model.pci import PciAddress

FILE = "journal.sqlite"
VERSION = 1
# What a write takes that the kernel does not hold up: an unbind may reset its card first.
ORPHAN_SECONDS = 10.0
TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    plan TEXT NOT NULL,
    pid INTEGER NOT NULL,
    began TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    ended TEXT,
    outcome TEXT CHECK (outcome IN ('done', 'undone', 'failed'))
);
CREATE TABLE IF NOT EXISTS entries (
    run INTEGER NOT NULL REFERENCES runs (number),
    step INTEGER NOT NULL,
    action TEXT NOT NULL,
    prior TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('intent', 'done', 'undone')),
    PRIMARY KEY (run, step)
);
CREATE TABLE IF NOT EXISTS loans (gpu TEXT PRIMARY KEY, loan TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS fences (gpu TEXT PRIMARY KEY, fence TEXT NOT NULL);
PRAGMA user_version = 1;
"""


def read_ledger(state: Path) -> Ledger:
    """The ledger of a state folder, without changing it; empty where there is none yet.

    Raises Failed when it is damaged, or may not be read.
    """
    with reading(state) as connection:
        if connection is None:
            return Ledger()
        return ledger_in(connection)


def read_past_clusters(state: Path) -> frozenset[str]:
    """Every cluster that this state folder ever began an `up` or a `down` of.

    Raises Failed as read_ledger does.
    """
    with reading(state) as connection:
        if connection is None:
            return frozenset()
        rows = connection.execute(
            "SELECT DISTINCT json_extract(plan, '$.subject') FROM runs "
            "WHERE json_extract(plan, '$.verb') IN ('up', 'down')"
        ).fetchall()
    return frozenset(str(name) for (name,) in rows)


@contextmanager
def reading(state: Path) -> Iterator[sqlite3.Connection | None]:
    """The database of a state folder, read-only; None where there is none yet."""
    file = state / FILE
    try:
        there = file.stat().st_size > 0
    except FileNotFoundError:
        there = False
    except OSError as error:
        raise unusable(file, error) from None
    if not there:
        yield None
        return
    with speaking_of(file):
        connection = connect_to_read(file)
        try:
            check_version(connection, file)
            yield connection
        finally:
            connection.close()


class Journal:
    """The ledger, held for changing; raises Refused while another gpupt holds it."""

    def __init__(self, state: Path) -> None:
        self.file = state / FILE
        # Cards are moved at the same time, and their steps written one after another.
        self.turn = Lock()
        # The ledger since the last change: nobody else makes one while the lock is held.
        self.known: Ledger | None = None
        self.lock = take_lock(state)
        try:
            with speaking_of(self.file):
                self.connection = connect_to_write(self.file)
        except BaseException:
            os.close(self.lock)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the database and the lock go."""
        self.connection.close()
        os.close(self.lock)

    @property
    def ledger(self) -> Ledger:
        """The ledger as it is now."""
        with self.turn, speaking_of(self.file):
            if self.known is None:
                self.known = ledger_in(self.connection)
            return self.known

    def begin(self, plan: Plan) -> int:
        """Note that a plan is begun; returns the run's number."""
        from gpupt.edges.codec import encode

        return self.put("INSERT INTO runs (plan, pid) VALUES (?, ?)", encode(plan), os.getpid())

    def intend(self, run: int, entry: JournalEntry) -> None:
        """Put an action and what it will change on the disk, before it is performed."""
        from gpupt.edges.codec import encode

        self.put(
            "INSERT INTO entries (run, step, action, prior, state) VALUES (?, ?, ?, ?, 'intent')",
            run,
            entry.step,
            encode(entry.action),
            encode(entry.prior),
        )

    def mark(self, run: int, step: int, *, state: str) -> None:
        """Note that a step is done, or undone."""
        self.put("UPDATE entries SET state = ? WHERE run = ? AND step = ?", state, run, step)

    def end(self, run: int, *, outcome: str) -> None:
        """Note how a run ended: done, undone or failed."""
        self.put(
            "UPDATE runs SET outcome = ?, ended = strftime('%Y-%m-%dT%H:%M:%fZ', 'now') "
            "WHERE number = ?",
            outcome,
            run,
        )

    def record(self, loan: Loan) -> None:
        """Keep a loan, in the place of the one of the same GPU."""
        from gpupt.edges.codec import encode

        self.put("INSERT OR REPLACE INTO loans VALUES (?, ?)", str(loan.gpu), encode(loan))

    def erase(self, gpu: PciAddress) -> None:
        """Forget a GPU's loan."""
        self.put("DELETE FROM loans WHERE gpu = ?", str(gpu))

    def fence(self, fence: Fence) -> None:
        """Keep a fence, in the place of the one of the same GPU."""
        from gpupt.edges.codec import encode

        self.put("INSERT OR REPLACE INTO fences VALUES (?, ?)", str(fence.gpu), encode(fence))

    def unfence(self, gpu: PciAddress) -> None:
        """Forget a GPU's fence."""
        self.put("DELETE FROM fences WHERE gpu = ?", str(gpu))

    def put(self, statement: str, *values: str | int) -> int:
        """One change, on the disk when this returns; the number of the row it made."""
        with self.turn, speaking_of(self.file):
            self.known = None
            return int(self.connection.execute(statement, values).lastrowid or 0)


def connect_to_write(file: Path) -> sqlite3.Connection:
    """The database with its tables; every statement is a transaction of its own."""
    import sqlite3

    connection = sqlite3.connect(file, isolation_level=None, timeout=10, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("quick_check finds it damaged")
        if connection.execute("PRAGMA user_version").fetchone()[0] != 0:
            check_version(connection, file)
        connection.executescript(f"BEGIN IMMEDIATE; {TABLES} COMMIT;")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_read(file: Path) -> sqlite3.Connection:
    """The database, read-only."""
    import sqlite3

    # Reading a WAL database makes a -shm file beside it.  Who may not write there can read
    # the file as it lies, which is whole when no gpupt left a -wal.
    beside = file.with_name(f"{file.name}-wal")
    frozen = not beside.exists() and not os.access(file.parent, os.W_OK)
    address = f"{file.absolute().as_uri()}?mode=ro{'&immutable=1' if frozen else ''}"
    return sqlite3.connect(address, uri=True, isolation_level=None, timeout=10)


def check_version(connection: sqlite3.Connection, file: Path) -> None:
    """Raises Failed for a database of another gpupt."""
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found != VERSION:
        raise Failed(
            f"{file} is of version {found}; this gpupt knows version {VERSION}",
            remedy="use the gpupt that wrote it to give its GPUs back first",
        )


def ledger_in(connection: sqlite3.Connection) -> Ledger:
    return Ledger(loans_in(connection), runs_in(connection), fences_in(connection))


def loans_in(connection: sqlite3.Connection) -> dict[PciAddress, Loan]:
    from gpupt.edges.codec import decode

    rows = connection.execute("SELECT loan FROM loans").fetchall()
    loans = (decode(text) for (text,) in rows)
    return {loan.gpu: loan for loan in sorted(loans, key=lambda loan: loan.gpu)}


def fences_in(connection: sqlite3.Connection) -> dict[PciAddress, Fence]:
    from gpupt.edges.codec import decode

    # A database that is read only may be from before there were fences.
    known = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'fences'"
    if not connection.execute(known).fetchone()[0]:
        return {}
    fences = [decode(text) for (text,) in connection.execute("SELECT fence FROM fences")]
    return {fence.gpu: fence for fence in sorted(fences, key=lambda fence: fence.gpu)}


def runs_in(connection: sqlite3.Connection) -> tuple[Run, ...]:
    from gpupt.actions import JournalEntry, Run
    from gpupt.edges.codec import decode

    found = []
    rows = connection.execute(
        "SELECT number, plan, pid FROM runs WHERE outcome IS NULL ORDER BY number"
    ).fetchall()
    for number, plan, pid in rows:
        entries = connection.execute(
            "SELECT step, action, prior, state FROM entries "
            "WHERE run = ? AND state <> 'undone' ORDER BY step",
            (number,),
        ).fetchall()
        reached = tuple(
            JournalEntry(step, decode(action), decode(prior), state == "done")
            for step, action, prior, state in entries
        )
        found.append(Run(number, decode(plan), pid, reached))
    return tuple(found)


def take_lock(state: Path) -> int:
    """The open lock file; raises Refused while another gpupt has it, Failed when it cannot be."""
    file = state / "lock"
    try:
        state.mkdir(parents=True, exist_ok=True)
        number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise unusable(file, error) from None
    try:
        hold(number)
    except BlockingIOError:
        holder = holder_of(number)
        os.close(number)
        if holder.isdigit() and not Path(f"/proc/{holder}").exists():
            # The child that writes to the kernel holds the lock too: what it does must end
            # before anything is read, undone or recovered.
            raise Refused(
                f"a write that gpupt began has not come back from the kernel (PID {holder} ended)",
                details=f"the child that writes still holds {file}",
                remedy="wait; if it stays, stop what holds the device, or reboot; then recover",
            ) from None
        raise Refused(
            f"another gpupt is changing this host (PID {holder})",
            details=f"it holds {file}",
            remedy="wait until it ends; gpupt status shows what it does",
        ) from None
    os.ftruncate(number, 0)
    os.pwrite(number, f"{os.getpid()}\n".encode(), 0)
    return number


def hold(number: int) -> None:
    """Take the lock; a child that outlived its gpupt, and writes to the kernel still, is waited
    for a while.  Raises BlockingIOError while another has it."""
    import fcntl

    end = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = holder_of(number)
            orphaned = holder.isdigit() and not Path(f"/proc/{holder}").exists()
            if not orphaned or time.monotonic() > end:
                raise
        time.sleep(0.05)


def holder_of(number: int) -> str:
    """The PID in the lock file."""
    return os.pread(number, 32, 0).decode("ascii", "replace").strip() or "unknown"


@contextmanager
def speaking_of(file: Path) -> Iterator[None]:
    """Turn SQLite's errors into Failed, naming the file."""
    import sqlite3

    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise unusable(file, error) from None


def unusable(file: Path, error: Exception) -> GpuptError:
    """The error for a state that cannot be used: denied, read-only, or damaged."""
    said = str(error)
    if isinstance(error, PermissionError) or "unable to open" in said:
        remedy = "run gpupt as root, or name a folder of yours with --state"
    elif "readonly" in said or "Read-only" in said:
        remedy = "the state must be writable before anything is changed; --state names another"
    elif "full" in said or "No space" in said:
        remedy = "free some space: nothing is changed that cannot be journalled first"
    else:
        remedy = (
            "move it aside once `gpupt list` shows where each GPU is; "
            "without it, gpupt does not know which drivers they came from"
        )
    return Failed(f"the journal {file} cannot be used", details=said, remedy=remedy)
