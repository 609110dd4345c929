"""Whether a process that holds a lock still lives: asked without taking the lock away from anybody."""

import fcntl
import os
from pathlib import Path


def is_held(lock: Path) -> bool:
    """Whether some process, here or on another host of a shared file system, holds this lock file.

    The operating system lets go of a lock when its process dies, however it dies: what was killed is seen
    as killed. Needs no right to write, so another user's sweep can be looked at.
    """
    try:
        file = os.open(lock, os.O_RDONLY)
    except OSError:
        return False  # never taken
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks: docs/cluster.md says which
    finally:
        os.close(file)
    return False
