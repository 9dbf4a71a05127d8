"""Files that say who is at something, also to other machines that share the folder."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from filelock import SoftFileLease, Timeout

LEASE = 120.0
"""Seconds without a sign of life after which a holder on another machine counts as dead.

Network file systems show what others did to a file up to a minute late.
"""

HEARTBEAT = 15.0
"""Seconds between two signs of life."""

_POLL = 0.25


def lease_at(path: Path) -> SoftFileLease:
    """A lease on `path`, which its holder touches every `HEARTBEAT` seconds, in a thread.

    Not a lock of the operating system, which other machines on the same file system may not see.
    """
    return SoftFileLease(
        path, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, poll_interval=_POLL
    )


def take(lease: SoftFileLease, wait: Callable[[], None]) -> None:
    """Become its holder; `wait` is called each time that somebody else still is, and may raise.

    A holder that died is replaced, at once where its machine is this one, else when its file has
    not been touched for `LEASE` seconds on the clock of whoever waits.
    """
    patience, empty = 0.0, (0, 0.0)
    while True:
        try:
            lease.acquire(timeout=patience)
        except Timeout:
            wait()
            empty = _give_up_empty(Path(lease.lock_file), empty)
            patience = min(1.0, LEASE)
        else:
            return


def holder(lease: SoftFileLease) -> str:
    """In words, such as "process 17 on a-machine"."""
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname}" if owner else "another process"


class Watch:
    """Tells a holder that lives from one that may be dead."""

    def __init__(self, lease: SoftFileLease) -> None:
        self._lease = lease
        self._first: int | None = None

    def lives(self) -> bool:
        """Whether the holder has shown since the first look that it does.

        That is by touching its file, or, on this machine, by not having been replaced.
        """
        owner = self._lease.owner
        try:
            touched = os.stat(self._lease.lock_file).st_mtime_ns
        except OSError:
            return False
        if owner is None or self._first is None:
            self._first = touched
            return False
        return touched != self._first or owner.hostname == socket.gethostname()


def _give_up_empty(path: Path, seen: tuple[int, float]) -> tuple[int, float]:
    """Spoil a lease that says nothing about its holder, after as long as any other would last.

    Its process died between making the file and writing to it. The library leaves such a file
    alone, which to older versions of it means a holder, and replaces one that is spoilt.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size:
                return 0, 0.0
            if status.st_ino != seen[0]:
                return status.st_ino, time.monotonic()
            if time.monotonic() - seen[1] >= LEASE:
                file.write(b"abandoned\n")
    except OSError:
        return 0, 0.0
    return seen
