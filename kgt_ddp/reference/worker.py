"""The reference process: `python -m kgt_ddp.reference.worker`, started by the launcher, configured by its environment.

KGTRUN_REFERENCE_DIR, KGTRUN_REFERENCE_INDEX, KGTRUN_REFERENCE_PRECISION, KGTRUN_RUN_DIR and KGTRUN_CPUS say where it
listens, how it computes, and where its events go. One thread, one loop: take in what has arrived, then score one submit
of one trainer, then look again. Of several submits of a trainer that wait, the latest is scored.

It ends on SIGTERM or SIGINT, when its parent has gone, and when its socket has been removed (the launcher's last
resort). Nothing that a peer sends ends it: that is refused, recorded, and answered by closing the connection.
"""

from __future__ import annotations

import os
import selectors
import socket
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kgt_ddp.reference.process import ParentWatch, Settings, Stop, StopSignals, precision_of, settle
from kgtrun.contract import environment
from kgtrun.contract.events import EventWriter

if TYPE_CHECKING:
    from kgt_ddp.reference.session import Session

MAX_CONNECTIONS: Final = 256
LOOK_EVERY_S: Final = 1.0


class RefusalLog:
    """Events about refused peers: each of the first ten, then at powers of two, so that a flood fills no disk."""

    def __init__(self, events: EventWriter) -> None:
        self._events = events
        self.count = 0

    def note(self, why: str) -> None:
        self.count += 1
        if self.count <= 10 or self.count & (self.count - 1) == 0:
            self._events.write("reference_refused", reason=why, count=self.count)


def check_directory(directory: Path) -> None:
    """
    Raises:
        ValueError: the directory for the socket is missing, not ours, or open to others.
    """
    try:
        status = os.stat(directory)
    except OSError as error:
        raise ValueError(f"{environment.REFERENCE_DIR}={directory}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ValueError(f"{environment.REFERENCE_DIR}={directory} must be a directory of this user with mode 0700")


def listen(directory: Path, index: int) -> tuple[socket.socket, Path]:
    """The listening socket; it appears under its name only when it can be connected to, over what a killed predecessor
    left.

    Raises:
        ValueError: the path is too long for the system.
    """
    from kgt_ddp.reference import protocol

    path = protocol.socket_path(directory, index)
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(draft))
        listener.listen(MAX_CONNECTIONS)
        os.rename(draft, path)
    except BaseException:
        listener.close()
        draft.unlink(missing_ok=True)
        raise
    return listener, path


class Worker:
    """The loop, its listening socket and its connections."""

    def __init__(self, listener: socket.socket, path: Path, *, precision: str, events: EventWriter) -> None:
        self._listener = listener
        self._path = path
        self._inode = os.stat(path).st_ino
        self._precision = precision
        self._events = events
        self._refusals = RefusalLog(events)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._sessions: dict[socket.socket, Session] = {}

    def run(self, parent: ParentWatch, signals: StopSignals) -> str:
        """Work until there is a reason to end, which is returned."""
        while True:
            self._take_in(0.0 if any(s.has_work for s in self._sessions.values()) else LOOK_EVERY_S)
            if signals.received:
                return signals.received
            if parent.gone():
                return "the parent process has gone"
            if not self._listens():
                return "the socket has been removed"
            for connection, session in list(self._sessions.items()):
                if session.has_work:
                    session.work()
                    if not session.flush():
                        self._drop(connection)
                    self._take_in(0.0)

    def close(self) -> None:
        """Close every connection and remove the socket, if it is still ours."""
        for connection in list(self._sessions):
            self._drop(connection)
        self._selector.close()
        self._listener.close()
        if self._listens():
            self._path.unlink(missing_ok=True)

    def _listens(self) -> bool:
        with suppress(OSError):
            return os.stat(self._path).st_ino == self._inode
        return False

    def _take_in(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is self._listener:
                self._accept()
            elif not self._read(connection):
                self._drop(connection)
        for connection, session in list(self._sessions.items()):
            if not session.flush():
                self._drop(connection)

    def _accept(self) -> None:
        from kgt_ddp.reference import protocol
        from kgt_ddp.reference.session import Session

        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            uid = protocol.peer_uid(connection)
            if uid != os.getuid():
                self._refusals.note(f"a process of user {uid}")
                connection.close()
            elif len(self._sessions) >= MAX_CONNECTIONS:
                self._refusals.note(f"more than {MAX_CONNECTIONS} connections")
                connection.close()
            else:
                connection.setblocking(False)
                self._sessions[connection] = Session(connection, precision=self._precision, events=self._events)
                self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> bool:
        """Take in what has arrived; False if the connection is over."""
        from kgt_ddp.reference.protocol import ProtocolError

        try:
            self._sessions[connection].read()
        except ProtocolError as error:
            self._refusals.note(str(error))
            return False
        except (EOFError, OSError):
            return False
        except Exception as error:  # whatever else a message may bring about ends its connection, not this process
            self._refusals.note(f"{type(error).__name__}: {error}")
            return False
        return True

    def _drop(self, connection: socket.socket) -> None:
        session = self._sessions.pop(connection, None)
        if session is not None:
            self._selector.unregister(connection)
            session.close()


def main(environ: Mapping[str, str] = os.environ) -> int:
    """Run until there is a reason to end; the exit status: 0, or 2 for an environment that makes no sense."""
    parent, signals = ParentWatch(), StopSignals()
    worker, events = None, EventWriter(None, role="reference", index=0)
    try:
        settings = Settings.read(environ)
        check_directory(settings.directory)
        events = EventWriter.for_process(settings.run_dir, role="reference", index=settings.index)
        threads = settle(settings)
        listener, path = listen(settings.directory, settings.index)
        precision = precision_of(settings)
        worker = Worker(listener, path, precision=precision, events=events)
        cores = sorted(os.sched_getaffinity(0))
        events.write("reference_start", precision=precision, threads=threads, cpus=cores)
        events.write("reference_stop", reason=worker.run(parent, signals))
        return 0
    except Stop as stop:
        events.write("reference_stop", reason=str(stop))
        return 0
    except ValueError as error:
        print(f"kgtrun reference: {error}", file=sys.stderr)
        return 2
    finally:
        if worker is not None:
            worker.close()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking torch down in good order takes a process of least priority many seconds on a busy machine
