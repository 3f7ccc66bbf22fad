"""Reading of files that anyone may have put in their place."""

import os
import stat
from pathlib import Path


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file.

    Raises OSError for anything else, because opening a named pipe waits for a writer that may never come.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(None, "it is not a regular file", str(path))
        return file.read()
