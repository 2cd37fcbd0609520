"""TCP proxies between a client and a daemon of one machine that do to their connections what networks do.

Threads: any; each connection has two of its own.
"""

import random
import socket
import struct
import threading


class Connection:
    """One client's, and the one to the daemon that its bytes go on to."""

    def __init__(self, client, daemon):
        self.client = client
        self.daemon = daemon
        self.frozen = False
        self._lock = threading.Lock()
        self._left = 2  # pumps
        self._ended = threading.Event()

    def end(self, reset=False):
        """Closes both sides: in order, or as a machine that has forgotten the connection does. What is under way is lost.
        The first call counts."""
        if self._ended.is_set():
            return
        for end in (self.client, self.daemon):
            try:
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
            except OSError:
                pass
        self._ended.set()

    def wait(self):
        self._ended.wait()

    def pump_left(self):
        with self._lock:
            self._left -= 1
            if self._left > 0:
                return
        self.client.close()
        self.daemon.close()


class Proxy:
    """Passes bytes on to a port of this machine. target: where it listens."""

    def __init__(self, port):
        self.port = port
        self.connections = []  # guarded by _lock; those that have ended too
        self.cuts = 0  # of connections, by the proxy
        self._up = True
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        """Takes no more connections and ends those that there are."""
        self.down()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()

    def cut(self, reset=False):
        """Ends all connections."""
        with self._lock:
            connections, self.connections = self.connections, []
            self.cuts += len(connections)
        for connection in connections:
            connection.end(reset)

    def freeze(self):
        """From now on nothing passes over the connections that there are, and neither side hears of it."""
        with self._lock:
            for connection in self.connections:
                connection.frozen = True

    def down(self):
        """Ends all connections, and new ones at once."""
        self._up = False
        self.cut()

    def up(self):
        """Lets new connections in again."""
        self._up = True

    def opened(self, connection):
        """For proxies of other kinds: called before the connection's first byte."""

    def passing(self, connection, to_client, piece):
        """For proxies of other kinds: what to pass on of a piece of the stream, and whether to end the connection then."""
        return piece, False

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if not self._up:
                client.close()
                continue
            try:
                daemon = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                client.close()
                continue
            for end in (client, daemon):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(client, daemon)
            self.opened(connection)
            with self._lock:
                self.connections.append(connection)
            for to_client in (False, True):
                threading.Thread(target=self._pump, args=(connection, to_client), daemon=True).start()
            if not self._up:  # it went down meanwhile
                connection.end()

    def _pump(self, connection, to_client):
        source, sink = connection.client, connection.daemon
        if to_client:
            source, sink = sink, source
        try:
            while piece := source.recv(1 << 20):
                if connection.frozen:
                    connection.wait()
                    break
                piece, last = self.passing(connection, to_client, piece)
                if piece:
                    sink.sendall(piece)
                if last:
                    with self._lock:
                        self.cuts += 1
                    connection.end(reset=self.ends_by_reset())
                    break
        except OSError:
            pass
        connection.end()
        connection.pump_left()

    def ends_by_reset(self):
        return False


class CuttingProxy(Proxy):
    """Ends each connection after a random number of bytes of both directions, in the middle of whatever it is.

    between: the least and the most bytes. Only while `armed`.
    """

    def __init__(self, port, between, seed=7):
        self._between = between
        self._random = random.Random(seed)
        self.armed = False
        super().__init__(port)

    def opened(self, connection):
        connection.bytes_left = self._random.randint(*self._between)

    def passing(self, connection, to_client, piece):
        if not self.armed:
            return piece, False
        left = connection.bytes_left  # the two directions' count need not be exact
        connection.bytes_left = left - len(piece)
        return piece[: max(left, 0)], len(piece) >= left

    def ends_by_reset(self):
        return self._random.random() < 0.5


class _AnswerCounter:
    """Finds the ends of answers in what a gRPC server sends down one connection."""

    HEADER, DATA, HEADERS, END_STREAM = 9, 0, 1, 1  # of HTTP/2's frames (RFC 9113, section 4.1)

    def __init__(self):
        self.pending = bytearray()
        self.bytes = 0

    def ended(self, piece):
        """The bytes of each answer that ends in this piece of the stream."""
        self.pending += piece
        sizes = []
        while len(self.pending) >= self.HEADER:
            length, kind, flags = int.from_bytes(self.pending[:3], "big"), self.pending[3], self.pending[4]
            if len(self.pending) < self.HEADER + length:
                break
            del self.pending[: self.HEADER + length]
            if kind == self.DATA:
                self.bytes += length
            elif kind == self.HEADERS and flags & self.END_STREAM:
                sizes.append(self.bytes)
                self.bytes = 0
        return sizes


class AnswerLosingProxy(Proxy):
    """Once an answer of `large` bytes came, it cuts each connection when its first to third answer ends.

    The end of that answer is thrown away, so a call that the daemon ran looks lost to the client, whatever it got of it.
    """

    def __init__(self, port, large, seed=5):
        self._large = large
        self._armed = False
        self._random = random.Random(seed)
        super().__init__(port)

    def opened(self, connection):
        connection.answers_left = self._random.randint(1, 3)
        connection.counter = _AnswerCounter()

    def passing(self, connection, to_client, piece):
        if not to_client:
            return piece, False
        sizes = connection.counter.ended(piece)
        self._armed = self._armed or any(size >= self._large for size in sizes)
        if self._armed:
            connection.answers_left -= len(sizes)
        return (b"", True) if connection.answers_left <= 0 else (piece, False)
