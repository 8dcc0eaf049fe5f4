"""A real S3 server on loopback, as a process, and a proxy before it that delays or breaks what passes.

    python -m tests.storage.s3 PORT

serves at PORT until its standard input ends.
"""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def server():
    """The port of a server that is empty."""
    port = free_port()
    command = [sys.executable, "-m", "tests.storage.s3", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.communicate()


class Proxy:
    """Passes connections on to a port; a context manager.

    Attributes:
        port: where it listens.
        seconds: before each piece that a client sends is passed on.
        limit: bytes from clients after which it breaks every connection, and takes no more; None for never.
    """

    def __init__(self, target):
        self.target, self.seconds, self.limit, self.passed = target, 0.0, None, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.listener.close()

    @property
    def broken(self):
        return self.limit is not None and self.passed > self.limit

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.broken:
                    client.close()
                    continue
                remote = socket.create_connection(("127.0.0.1", self.target))
                for ends in ((client, remote, True), (remote, client, False)):
                    threading.Thread(target=self.pump, args=ends, daemon=True).start()

    def pump(self, source, target, request):
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                if request:
                    time.sleep(self.seconds)
                    self.passed += len(piece)
                if self.broken:
                    break
                target.sendall(piece)
        for end in (source, target):  # unlike closing, it wakes who waits for the other
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class ReadOnly(http.server.BaseHTTPRequestHandler):
    """Answers as S3 does for a bucket that is empty and that this user may not write."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200, b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>")

    def do_HEAD(self):
        self.answer(404, b"")

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def read_only_server():
    """The port of one that refuses to be written."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ReadOnly) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def serve(port):
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    moto.start()
    sys.stdin.read()
    moto.stop()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
