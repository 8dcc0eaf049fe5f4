"""What is read of large remote files: blocks on the disk of this machine, bounded, the least used dropped."""

import atexit
import collections
import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import shutil
import threading
from pathlib import Path

from zamba2_jax.storage.local import cache_directory
from zamba2_jax.storage.remote import RemoteDirectory

BLOCK = 1 << 18
"""Bytes that are fetched together."""

CACHE_BYTES = 16 << 30
"""Bytes that a process keeps; half of what is free on the disk where that is less."""

_LOCKS = 64


class Blocks:
    """Blocks of remote files in a local directory."""

    def __init__(self, directory: Path, limit: int):
        """Takes up what an earlier process left there.

        Args:
            directory: for nothing and nobody else.
            limit: bytes to keep.
        """
        self._directory, self._limit, self.size = directory, max(limit, BLOCK), 0
        self._sizes: collections.OrderedDict[str, int] = collections.OrderedDict()  # the least used first
        self._lock, self._fetching = threading.Lock(), [threading.Lock() for _ in range(_LOCKS)]
        directory.mkdir(parents=True, exist_ok=True)
        stats = sorted((path.stat().st_mtime_ns, path.name, path.stat().st_size) for path in directory.iterdir())
        for _, name, size in stats:
            self._note(name, size)

    def read(self, remote: RemoteDirectory, version: str, name: str, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` to `stop`, which it must have.

        Args:
            remote: the directory of the file.
            version: changes when the files there do.
            name: of the file.
            start, stop: in bytes.

        Raises:
            OSError: the store refuses, or cannot be reached.
        """
        first, last = start // BLOCK, (stop - 1) // BLOCK
        blocks = [self._block(remote, version, name, index) for index in range(first, last + 1)]
        content = blocks[0] if first == last else b"".join(blocks)
        return content[start - first * BLOCK : stop - first * BLOCK]

    def _block(self, remote: RemoteDirectory, version: str, name: str, index: int) -> bytes:
        key = hashlib.sha256(f"{remote} {version} {name} {index}".encode()).hexdigest()
        path = self._directory / key
        with self._fetching[int(key[:8], 16) % _LOCKS]:
            with contextlib.suppress(FileNotFoundError):
                content = path.read_bytes()
                self._note(key, len(content))
                return content
            content = remote.read(name, index * BLOCK, (index + 1) * BLOCK)
            partial = path.with_name(f"{key}.partial")
            partial.write_bytes(content)
            partial.replace(path)
            self._note(key, len(content))
            return content

    def _note(self, key: str, size: int) -> None:
        """Takes down that a block is used, and drops the least used where there are too many."""
        dropped = []
        with self._lock:
            self.size += size - self._sizes.pop(key, 0)
            self._sizes[key] = size
            while self.size > self._limit:
                other, freed = self._sizes.popitem(last=False)
                self.size -= freed
                dropped.append(other)
        for other in dropped:
            (self._directory / other).unlink(missing_ok=True)


@functools.cache
def blocks() -> Blocks:
    """The cache of this process, which the next one on this machine takes up."""
    home = cache_directory() / "blocks"
    home.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        lock = (home / f"{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        atexit.register(lock.close)
        limit = min(CACHE_BYTES, shutil.disk_usage(home).free // 2)
        return Blocks(home / str(number), int(os.environ.get("ZAMBA2_CACHE_BYTES", limit)))
    raise AssertionError("numbers do not end")
