"""How a rank comes by a file without a name that another rank has made.

Which way works depends on what two processes share: a PID namespace (``/proc``), a network namespace (a socket that is
no file), or only a folder in memory, as containers of one machine with ``--ipc=host`` do.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import errno
import fcntl
import hmac
import os
import secrets
import socket
import stat
import threading
from pathlib import Path

from llm_allreduce_plugin.transport import nameless

_NONCE_BYTES = 16
_TOKEN_BYTES = 32
_SOCKET_WAIT_S = 10.0
_STEM = "llm-allreduce-"


@dataclasses.dataclass(frozen=True)
class Offer:
    """What the maker of a file tells its peers.

    Attributes:
        device: of the file, as ``stat`` says; on one kernel the same in every namespace.
        inode: of the file.
        nonce: what it ends with.
        where: where to get it; its meaning depends on the way.
        token: for whoever asks for it.
    """

    device: int
    inode: int
    nonce: bytes
    where: str
    token: bytes = b""


class Way(abc.ABC):
    """One way to pass a file on. An object serves one attempt at a time, and nobody else."""

    text: str  # what a peer cannot do, to follow "rank 1"

    def create(self, size: int) -> int:
        """A descriptor of a new file that can be passed on in this way.

        Raises:
            OSError: with the reason.
        """
        return nameless.create(size)

    def offer(self, descriptor: int) -> Offer:
        """Let peers come by this file; until :meth:`withdraw`."""
        state, nonce = os.fstat(descriptor), secrets.token_bytes(_NONCE_BYTES)
        os.pwrite(descriptor, nonce, state.st_size - _NONCE_BYTES)
        return Offer(state.st_dev, state.st_ino, nonce, *self._serve(descriptor))

    def receive(self, offer: Offer) -> int:
        """A descriptor of the offered file.

        Raises:
            OSError: with the reason.
        """
        descriptor = self._receive(offer)
        state = os.fstat(descriptor)
        is_it = _is_offered(state, offer)
        if not is_it or os.pread(descriptor, _NONCE_BYTES, state.st_size - _NONCE_BYTES) != offer.nonce:
            os.close(descriptor)
            raise OSError(errno.ESTALE, "finds another file there")
        return descriptor

    def withdraw(self) -> None:  # noqa: B027  (most ways have nothing to do)
        """The offer ends. Idempotent."""

    @abc.abstractmethod
    def _serve(self, descriptor: int) -> tuple[str, bytes]: ...

    @abc.abstractmethod
    def _receive(self, offer: Offer) -> int: ...


def _is_offered(state: os.stat_result, offer: Offer) -> bool:
    return stat.S_ISREG(state.st_mode) and (state.st_dev, state.st_ino) == (offer.device, offer.inode)


class ThroughProc(Way):
    """A peer opens the maker's descriptor. The kernel lets it if it could read the maker's memory as well."""

    text = "cannot open the file of rank 0 through /proc"

    def _serve(self, descriptor: int) -> tuple[str, bytes]:
        return f"/proc/{os.getpid()}/fd/{descriptor}", b""

    def _receive(self, offer: Offer) -> int:
        # In another PID namespace that number is somebody else's: nothing else than the file may be opened.
        if not _is_offered(os.stat(offer.where), offer):  # noqa: PTH116  (the same call as fstat's above)
            raise OSError(errno.ESTALE, "finds another file there")
        return os.open(offer.where, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


class ThroughSocket(Way):
    """The maker sends its descriptor over an abstract Unix socket to whoever knows the token."""

    text = "cannot get the file of rank 0 through a socket"

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._over = False

    def _serve(self, descriptor: int) -> tuple[str, bytes]:
        return self.hand_out(descriptor)

    def hand_out(self, descriptor: int) -> tuple[str, bytes]:
        """Send a descriptor, of a file or of anything else, to whoever asks for it; until :meth:`withdraw`.

        Returns:
            What :meth:`fetch` needs. The caller may close its descriptor.

        Raises:
            OSError: with the reason; it has been withdrawn, for one: a step that ranks have given up may come back.
        """
        name, token = f"{_STEM}{secrets.token_hex(8)}", secrets.token_bytes(_TOKEN_BYTES)
        with self._lock:
            if self._over:
                raise OSError(errno.ECANCELED, "this rank has given up before")
            listener = self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(f"\0{name}")
            listener.listen()
            file = os.dup(descriptor)
            try:
                threading.Thread(
                    target=_hand_out, args=(listener, file, token), name="llm-allreduce-passing", daemon=True
                ).start()
            except RuntimeError as error:  # no more threads
                os.close(file)
                raise OSError(errno.EAGAIN, str(error)) from error
        return name, token

    def _receive(self, offer: Offer) -> int:
        return self.fetch(offer.where, offer.token)

    def fetch(self, where: str, token: bytes) -> int:
        """A descriptor of what a peer hands out.

        Raises:
            OSError: with the reason.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.settimeout(_SOCKET_WAIT_S)
            peer.connect(f"\0{where}")
            peer.send(token)
            _, descriptors, _, _ = socket.recv_fds(peer, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not descriptors:
            raise OSError(errno.EACCES, "was sent nothing")
        return descriptors[0]

    def withdraw(self) -> None:
        """Stop listening, which ends the thread; and never begin again."""
        with self._lock:
            self._over = True
            if self._listener is not None:
                with contextlib.suppress(OSError):
                    self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
                self._listener = None


def _hand_out(listener: socket.socket, file: int, token: bytes) -> None:
    """Until ``listener`` is closed. Abstract names have no owner: anyone on the machine may connect."""
    try:
        while True:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                peer.settimeout(1.0)
                if hmac.compare_digest(peer.recv(_TOKEN_BYTES), token):
                    socket.send_fds(peer, [b"\0"], [file])
    except OSError:
        pass  # closed
    finally:
        os.close(file)


class ThroughFolder(Way):
    """The last resort: the file has a name in ``/dev/shm`` from when it is offered to when all have opened it.

    Whoever opens it may take the name away. What a kill of all ranks in between leaves, the next start finds.
    """

    text = "cannot open the file of rank 0 in /dev/shm"

    def __init__(self) -> None:
        self._path: Path | None = None

    def create(self, size: int) -> int:
        """On a file system with names."""
        remove_stale()
        return nameless.create_in_folder(size)

    def _serve(self, descriptor: int) -> tuple[str, bytes]:
        path = nameless.SHM_FOLDER / f"{_STEM}{os.getuid()}-{secrets.token_hex(8)}"
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # says that somebody still wants it
        # With a folder to start from, which an absolute path ignores, Python's link follows the symbolic link.
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)
        self._path = path
        return path.name, b""

    def _receive(self, offer: Offer) -> int:
        path = nameless.SHM_FOLDER / Path(offer.where).name
        if not _is_offered(path.lstat(), offer):
            raise OSError(errno.ESTALE, "finds another file there")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def withdraw(self) -> None:
        """Take the name away."""
        if self._path is not None:
            path, self._path = self._path, None
            path.unlink(missing_ok=True)


def remove_stale() -> None:
    """Take away names of this user's whose makers have ended before they could."""
    for path in nameless.SHM_FOLDER.glob(f"{_STEM}{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.lstat().st_uid == os.getuid():
                    path.unlink()
            finally:
                os.close(descriptor)


def all_ways() -> tuple[Way, ...]:
    """All ways, the one that leaves least behind first."""
    return ThroughProc(), ThroughSocket(), ThroughFolder()
