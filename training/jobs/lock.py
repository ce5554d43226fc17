"""The lock that the one worker of a home holds: an open file, which a process can hand on to another without letting go.

The kernel lets go of it when the last process that has the file open ends, however that ends. So whoever finds it free knows that
nobody works, and no process number has to be believed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

PATIENCE = 0.2
"""Seconds for which whoever only looks at the lock may have it."""


class WorkerLock:
    """The lock, held."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        os.set_inheritable(descriptor, False)  # only those to whom it is handed have it

    @classmethod
    def take(cls, path: Path) -> WorkerLock | None:
        """The lock, or None where another process has it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        end = time.monotonic() + PATIENCE
        while not _locked(descriptor):
            if time.monotonic() > end:
                os.close(descriptor)
                return None
            time.sleep(PATIENCE / 10)
        return cls(descriptor)

    def release(self) -> None:
        """Let go, whoever else has the file open."""
        import fcntl

        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        os.close(self.descriptor)

    def leave(self) -> None:
        """Close it here: the process that it was handed to holds it now."""
        os.close(self.descriptor)


def is_held(path: Path) -> bool:
    """Whether a process has the lock."""
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        return not _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
