"""A full disk, in words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import NoSpace

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def space_for(folder: Path) -> Iterator[None]:
    """Whatever writes into `folder` within raises NoSpace where the disk is full."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise no_space(folder) from error
    except SafetensorError as error:  # it has a type of its own for what the system says
        if not any(os.strerror(code) in str(error) for code in FULL):
            raise
        raise no_space(folder) from error


def no_space(folder: Path) -> NoSpace:
    """The error, of a folder that lies in what the disk holds."""
    return NoSpace(
        f"The disk that holds {folder.parent} is full.", hint="Free some space or set COLLEGIUM_HOME to another disk."
    )
