"""A network between a learner and its actors, and what befalls it."""

import contextlib
import socket
import struct
from collections.abc import Callable
from threading import Condition, Thread


class Proxy:
    """Forwards TCP connections to a port of the loopback interface, and does to them what networks do."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        # Guards what is below.
        self._changed = Condition()
        self._stalled = False
        # Both ends of each connection, that of the target second.
        self._connections: list[tuple[socket.socket, socket.socket]] = []
        self._abandoned: list[socket.socket] = []
        # Bytes towards the target after which something happens; None never.
        self._left: int | None = None
        self._then: Callable[[], None] = self.cut
        Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Forwards nothing from now on, and says nothing of it, not even that an end has gone."""
        with self._changed:
            self._stalled = True

    def go_on(self) -> None:
        """Forwards again, also what came in the meantime."""
        with self._changed:
            self._stalled = False
            self._changed.notify_all()

    def cut(self) -> None:
        """Breaks all connections at once."""
        for connection in self._take():
            for end in connection:
                _reset(end)

    def cut_after(self, size: int) -> None:
        """Breaks all connections when so many more bytes have gone to the target."""
        with self._changed:
            self._left, self._then = size, self.cut

    def vanish(self) -> None:
        """Breaks all connections, and the target hears nothing of it: nothing more will ever come from there."""
        broken = self._take()
        with self._changed:
            self._abandoned += [far for _, far in broken]
        for near, _ in broken:
            _reset(near)

    def vanish_after(self, size: int) -> None:
        """The same when so many more bytes have gone to the target."""
        with self._changed:
            self._left, self._then = size, self.vanish

    def close(self) -> None:
        """Ends it."""
        self._listener.close()
        self.go_on()
        self.cut()
        for far in self._abandoned:
            _reset(far)

    def _take(self) -> list[tuple[socket.socket, socket.socket]]:
        with self._changed:
            taken, self._connections, self._left = self._connections, [], None
            self._changed.notify_all()
        return taken

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            with self._changed:
                self._connections.append((near, far))
            for source, sink, towards in ((near, far, True), (far, near, False)):
                Thread(target=self._forward, args=(source, sink, towards), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, towards: bool) -> None:
        try:
            while data := source.recv(4096):
                with self._changed:
                    self._changed.wait_for(lambda: not self._stalled)
                    breaks = towards and self._left is not None and self._left < len(data)
                    data = data[: self._left] if breaks else data
                    if towards and self._left is not None:
                        self._left -= len(data)
                sink.sendall(data)
                if breaks:
                    self._then()
        except OSError:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._stalled)
            if sink in self._abandoned:
                return
        # The other side hears of the end.
        for end in (source, sink):
            end.close()


def _reset(end: socket.socket) -> None:
    """Ends a connection by a reset, whatever has not been read yet."""
    # One that has ended by itself is closed already.
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RDWR)
    end.close()
