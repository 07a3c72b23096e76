"""Names for the parts that processes have in groups, for files that many hosts and runs may share."""

from __future__ import annotations

import functools
import itertools
import os
import re
import secrets
import socket

_members = itertools.count()


def host_word() -> str:
    """What this host is called, in letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40]


@functools.cache
def _token(_pid: int) -> str:
    """Process numbers come again, in other containers and after a while; a process that was forked is another one."""
    return secrets.token_hex(3)


def new_member() -> str:
    """A name for this process's part in one group, that no other process or group has: ``gpu07-4711-9f3a20-0``."""
    return f"{host_word()}-{os.getpid()}-{_token(os.getpid())}-{next(_members)}"
