"""What is known of a group's health: the record that a call leaves, and what ranks say of themselves on the board."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from llm_allreduce_plugin import _C
from llm_allreduce_plugin.errors import AllReduceError
from llm_allreduce_plugin.group.board import Board, Row, State
from llm_allreduce_plugin.runtime.failures import error_of


class Health:
    """Of one communicator. May be asked by several threads.

    Args:
        workspace: whose calls leave the record.
        board: what ranks say of themselves; None: nothing is known of them.
        ranks: of the group, those that share the workspace; empty: all.
        between_hosts: what has broken the exchange between hosts, or None.

    Attributes:
        told: whether the caller has been told what has broken the group.
    """

    def __init__(
        self,
        workspace: _C.Workspace,
        board: Board | None,
        ranks: Sequence[int] = (),
        between_hosts: Callable[[], AllReduceError | None] = lambda: None,
    ) -> None:
        self._workspace = workspace
        self._board = board
        self._ranks = tuple(ranks)
        self._between_hosts = between_hosts
        self._gone: set[int] = set()
        self._has_given_up = False
        self.told = False

    def error(self) -> AllReduceError | None:
        """What has broken the group, or None. Cheap, and safe after the CUDA context has broken."""
        return self._between_hosts() or error_of(self._workspace, self._board, self._ranks)

    def raise_error(self) -> None:
        """Raise what has broken the group, if anything has.

        Raises:
            PeerTimeoutError: a wait has expired.
            RankMismatchError: a peer makes other calls.
            GroupBrokenError: for another reason.
        """
        if (error := self.error()) is not None:
            self.told = True
            self.look()  # peers shall hear of it before this process ends
            raise error

    def look(self) -> None:
        """Tell peers when this rank has given up, and the library which peers will never come: now and then."""
        board = self._board
        if board is None:
            return
        record = self._workspace.failure()
        if record is not None and not self._has_given_up:
            self._has_given_up = True
            _rank, peer, (algorithm, _exchange, wire, _epilogue), phase, _lane, _expected, _seen, waited_s = record
            state = State.GAVE_UP if self._workspace.reason() == _C.REASON_EXPIRED else State.BROKEN
            board.write(Row(board.process, state, time.time(), waited_s, peer, algorithm, phase, wire))
        for peer in range(board.world_size):
            if peer == board.rank or peer in self._gone:
                continue
            row = board.row(peer)
            if row is not None and (row.state > State.OPEN or board.has_ended(peer)):
                self._gone.add(peer)
                self._workspace.mark_gone(peer)
