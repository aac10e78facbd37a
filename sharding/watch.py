"""Watches the processes of one program: a peer that dies ends this one with a clear message and a retryable exit code.

When a process dies, the others hang in their next collective, or fail in it, and some time later the runtime ends them
with SIGABRT. Here every process keeps a connection to process 0: the system closes it when a process dies, and silence
tells of a machine that is gone. Whoever learns of a loss says which process it was and exits with code 75, so that the
scheduler starts the same command again everywhere. A process that fails by itself tells the others why; a wish to stop
is told to all; and process 0 can send the others data, which they wait for without a collective that could time out.

Stability: experimental.
"""

import atexit
import base64
import ctypes
import dataclasses
import os
import queue
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from jaxinfer.errors import JaxinferError, JobError

EXIT_AGAIN = 75  # EX_TEMPFAIL: the scheduler may start the same command again
_ABORT_WAIT = 3.0  # seconds for the watch to tell what the runtime is about to abort for
_OWN_END = 10.0  # seconds for this process to meet by itself the error that another one reports


@dataclasses.dataclass
class _Link:
    """A connection to a peer. `process` is None until it has said who it is."""

    socket: socket.socket
    process: int | None
    heard: float
    rest: bytearray = dataclasses.field(default_factory=bytearray)
    ended: bool = False


class Watch:
    """The connections of one process, served by a thread. Made by `Watch.start`, in all processes at once.

    `before_exit`: functions to call when a peer is lost, before this process exits: short ones, that need no peer.
    """

    def __init__(
        self, process: int, processes: int, *, silence: float, leave: Callable[[int], None] = os._exit
    ) -> None:
        self.process, self.processes, self.silence = process, processes, silence
        self.before_exit: list[Callable[[], object]] = []
        self._leave = leave
        self._links: list[_Link] = []
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._given_up: tuple[float, str] | None = None
        self._own_end: int | None = None
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="watch", daemon=True)

    @classmethod
    def start(cls, host: str, process: int, processes: int, *, silence: float, timeout: float) -> "Watch":
        """Connects the processes of a joined program (`jax.distributed` is up). `host`: where process 0 is.

        `silence`: after so many seconds without a word a peer counts as lost. Raises `JobError` where process 0 cannot
        be reached within `timeout` seconds.
        """
        from jax.experimental import multihost_utils

        watch = cls(process, processes, silence=silence)
        listener, told = None, np.zeros(2, np.int64)
        if process == 0:
            listener = socket.create_server(("", 0), backlog=processes)
            told = np.array([listener.getsockname()[1], secrets.randbits(31)], np.int64)
        port, token = (int(x) for x in multihost_utils.broadcast_one_to_all(told.astype(np.int32)))
        if listener is not None:
            watch._accept(listener, token, timeout)
        else:
            watch._call(host, port, token, timeout)
        watch._thread.start()
        watch._catch_abort()
        return watch

    @property
    def stop_asked(self) -> bool:
        """Whether any process was asked to stop (`ask_stop`)."""
        return self._stop.is_set()

    def ask_stop(self) -> None:
        """Tells all processes that the program should stop; what that means is theirs to agree on."""
        if not self._stop.is_set():
            self._stop.set()
            self._tell(b"stop")

    def send(self, data: bytes) -> None:
        """Process 0 gives `data` to every other process, in order."""
        self._tell(b"data " + base64.b64encode(data))

    def receive(self, meanwhile: Callable[[], object] = lambda: None) -> bytes:
        """The next data that process 0 sends; calls `meanwhile` once a second while it waits."""
        while True:
            meanwhile()
            try:
                return self._received.get(timeout=1.0)
            except queue.Empty:
                if all(link.ended for link in self._links):
                    raise JobError(f"process {self.process}: process 0 said goodbye while it was waited for") from None

    def failed(self, error: BaseException) -> None:
        """To be called with an exception that ends this process: tells the others, unless a lost peer is behind it, for
        then this process exits here."""
        ours = isinstance(error, JaxinferError)
        self._own_end = 2 if ours else 130 if isinstance(error, KeyboardInterrupt) else 1  # as the command line ends
        atexit.register(self._end)  # before the runtime's own end, which would wait for the others and then abort
        self._lost.wait(0.5 if ours else _ABORT_WAIT)
        if self._given_up is not None and not ours:  # the runtime's complaint of one that failed and told us why
            self._exit(self._given_up[1])
        text = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        self._tell(b"failed %d %s" % (self.process, text.encode()))

    def _end(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._leave(self._own_end or EXIT_AGAIN)

    def close(self) -> None:
        """Says goodbye; from here on the others may go on or end as they like."""
        self._closing.set()
        self._tell(b"bye")
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=2)
        with self._lock:
            for link in self._links:
                link.socket.close()

    def _accept(self, listener: socket.socket, token: int, timeout: float) -> None:
        """Process 0 waits for the others. A stranger that does not know the token is sent away."""
        until = time.monotonic() + timeout
        with listener:
            while len(self._links) < self.processes - 1:
                listener.settimeout(max(0.01, until - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                    connection.settimeout(5)
                    word = connection.makefile("rb").readline(64).split()
                except OSError:
                    if time.monotonic() > until:
                        raise JobError(f"only {len(self._links)} of {self.processes - 1} processes connected") from None
                    continue
                if len(word) == 3 and word[0] == b"hello" and word[2] == b"%d" % token and word[1].isdigit():
                    self._add(connection, int(word[1]))
                else:
                    connection.close()

    def _call(self, host: str, port: int, token: int, timeout: float) -> None:
        try:
            connection = socket.create_connection((host, port), timeout=timeout)
            connection.sendall(b"hello %d %d\n" % (self.process, token))
        except OSError as error:
            raise JobError(f"process {self.process}: cannot reach process 0 at {host}:{port} ({error})") from None
        self._add(connection, 0)

    def _add(self, connection: socket.socket, process: int) -> None:
        connection.settimeout(5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(connection, process, time.monotonic())
        self._links.append(link)
        self._selector.register(connection, selectors.EVENT_READ, link)

    def _tell(self, line: bytes, but: _Link | None = None) -> None:
        with self._lock:
            for link in self._links:
                if link is not but and not link.ended:
                    try:
                        link.socket.sendall(line + b"\n")
                    except OSError:
                        pass  # its end is seen by the thread that reads

    def _serve(self) -> None:
        beat = self.silence / 6
        spoke = 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            if now - spoke >= beat:
                self._tell(b"beat")
                spoke = now
            for key, _ in self._selector.select(timeout=min(beat, 0.25)):
                self._read(key.data)
            now = time.monotonic()
            for link in self._links:
                if not link.ended and now - link.heard > self.silence:
                    self._lose(link.process or 0, f"not heard of for {self.silence:.0f} s")
            if self._given_up is not None and now > self._given_up[0]:
                self._exit(self._given_up[1])

    def _read(self, link: _Link) -> None:
        try:
            data = link.socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(link.socket)
            if not link.ended:
                link.ended = True
                self._lose(link.process or 0, "its connection is closed")
            return
        link.heard = time.monotonic()
        link.rest += data
        if b"\n" in data:
            *lines, rest = bytes(link.rest).split(b"\n")
            link.rest = bytearray(rest)
            for line in lines:
                self._hear(link, line)

    def _hear(self, link: _Link, line: bytes) -> None:
        word, _, rest = line.partition(b" ")
        if word == b"bye":
            link.ended = True
        elif word == b"data":
            self._received.put(base64.b64decode(rest))
        elif word == b"stop" and not self._stop.is_set():
            self._stop.set()
            self._tell(line, but=link)
        elif word == b"lost":
            number, _, why = rest.decode(errors="replace").partition(" ")
            self._exit(self._words(int(number), why))
        elif word == b"failed" and self._given_up is None:
            self._tell(line, but=link)
            number, _, why = rest.decode(errors="replace").partition(" ")
            text = f"process {number} of {self.processes} ended with an error: {why}"
            self._given_up = (time.monotonic() + _OWN_END, text)

    def _lose(self, process: int, why: str) -> None:
        if self._given_up is not None:  # it said why before it went
            self._exit(self._given_up[1])
            return
        self._tell(b"lost %d %s" % (process, why.encode()))
        self._exit(self._words(process, why))

    def _words(self, process: int, why: str) -> str:
        return f"process {process} of {self.processes} is gone ({why})"

    def _exit(self, text: str) -> None:
        if self._closing.is_set() or self._lost.is_set():
            return
        self._lost.set()
        for function in self.before_exit:
            try:
                function()
            except Exception as error:  # whatever it is, this process must end
                sys.stderr.write(f"jaxinfer: {error}\n")
        sys.stderr.write(
            f"jaxinfer: process {self.process}: {text}; stopped. Start the same command again in all processes: "
            "it goes on from what was saved last\n"
        )
        sys.stderr.flush()
        self._leave(EXIT_AGAIN)

    def _catch_abort(self) -> None:
        """Holds up an abort of the runtime until the watch has had time to say what is behind it.

        The runtime aborts at once, from a thread of its own, when process 0 is gone. A handler set by Python would run
        too late, so this one is C's; where no peer was lost it returns, and the abort goes on as it would have.
        """
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: self._on_abort())
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(ctypes.c_int(signal.SIGABRT), self._handler)

    def _on_abort(self) -> None:
        self._lost.wait(_ABORT_WAIT)
        if self._given_up is not None:
            self._exit(self._given_up[1])
        if self._lost.is_set():
            time.sleep(_ABORT_WAIT)  # the thread of the watch is on its way out
