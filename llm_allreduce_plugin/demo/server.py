"""A server that the demo starts, waits for, asks over HTTP, and ends with all of its processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STARTUP_LIMIT_S = 600
STOP_LIMIT_S = 30
PROGRESS_S = 15  # between lines about a start
GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
USUALLY_FIRST_GIVEN_OUT = 32768  # Linux's default
FIRST_PORT = 20000  # below are more services with ports of their own
PORTS_TRIED = 50
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """The demo cannot go on; the text is for the user."""


def say(text: str) -> None:
    """A line of the demo."""
    print(f"[demo] {text}", flush=True)  # noqa: T201  (what a command has to say)


def _first_given_out() -> int:
    """The lowest port that the kernel gives to whoever asks for any."""
    try:
        return int(GIVEN_OUT.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return USUALLY_FIRST_GIVEN_OUT


def free_port() -> int:
    """A port of this machine that nobody listens on.

    None that the kernel gives out, where there are others: a server's own processes ask for such while it starts, and
    one of them might be given this one before the server listens on it.
    """
    others = range(FIRST_PORT, max(FIRST_PORT, _first_given_out()))
    for port in (*random.sample(others, min(len(others), PORTS_TRIED)), 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    message = "no port of this machine is free for the server"
    raise DemoError(message)


def http(url: str, body: dict[str, Any] | None = None, timeout: float = 120) -> Any:  # noqa: ANN401
    """The JSON that a server answers; None for an empty answer. With ``body``, a POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
        text = answer.read().decode()
    return json.loads(text) if text else None


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def group_is_alive(group: int) -> bool:
    """True while any process of the server's session lives: workers outlive their parent for a moment."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the server's whole process group, and end what is left of it after a while."""
    for number, patience in ((signal.SIGINT, STOP_LIMIT_S), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        if process.poll() is None or group_is_alive(process.pid):
            if number == signal.SIGINT:
                process.send_signal(number)  # the front end first: it winds its workers down
            else:
                _signal_group(process, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            process.poll()
            if not group_is_alive(process.pid):
                return
            time.sleep(0.1)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """A second Ctrl-C does not end the end: it has deadlines of its own, and what it left would run on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def server(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that runs inside of the block, and of which no process is left behind it."""
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603
            command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            with signals_held():
                say("stopping the server")
                stop(process)


def last_line(log: Path) -> str:
    """What the server said last, shortened."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1][-100:] if said else "empty"


def end_of(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def _taken_port(url: str, log: Path) -> str | None:
    """The port of ``url`` if the server says that it could not have it."""
    port = str(urllib.parse.urlsplit(url).port)
    said = end_of(log).splitlines()
    return port if any(port in line and "address already in use" in line.lower() for line in said) else None


def wait_for_health(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server answers; meanwhile a line now and then about what it does.

    Raises:
        DemoError: it has ended, cannot have its port (SGLang's server stays there then), or takes too long.
    """
    started = told = time.monotonic()
    while time.monotonic() < started + STARTUP_LIMIT_S:
        if time.monotonic() > told + PROGRESS_S:
            told = time.monotonic()
            say(f"starting for {told - started:.0f} s; its log: {last_line(log)}")
        if process.poll() is not None:
            message = f"the server ended with code {process.returncode}; the end of its log:\n{end_of(log)}"
            raise DemoError(message)
        if port := _taken_port(url, log):
            message = (
                f"port {port} was taken by another process; try again. The end of the server's log:\n{end_of(log)}"
            )
            raise DemoError(message)
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            http(url, timeout=2)
            return
        time.sleep(0.5)
    message = f"the server was not healthy within {STARTUP_LIMIT_S} s; its log is {log}"
    raise DemoError(message)
