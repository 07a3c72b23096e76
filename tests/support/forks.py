"""Code that is tried many times, each time in a process of its own: a fork of one that has imported what it needs.

What hangs, takes all memory or ends its process harms no other test, and no process imports the same again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SERVE = """
import json, os, sys, traceback
exec(sys.argv[1])
for line in sys.stdin:
    call = json.loads(line)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            file = os.open(call["output"], os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.environ.update(call["environment"])
            exec(call["code"])
            sys.stdout.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """A process that runs ``setup``, and whose forks run the rest. One call at a time."""

    def __init__(self, setup: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, **environment: Any) -> tuple[int, str]:
        """Exit code and output of a fork that runs ``code``. Waits for it: the test has a deadline."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile() as output:
            call = {"code": code, "output": output.name, "environment": environment}
            self._process.stdin.write(json.dumps(call) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            said = Path(output.name).read_text()
        assert answer, f"the process whose forks run it has ended: {said}"
        return int(answer), said

    def close(self) -> None:
        """End it, and with it nothing else: its forks have ended."""
        self._process.kill()
        self._process.communicate()
