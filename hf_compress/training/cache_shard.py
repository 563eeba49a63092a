"""One file of a teacher's stored outputs: its rows, and the identity of what they are the outputs of.

SQLite's locks and journal let several processes read a file while one extends it, and a killed one leaves it whole.
Checksums find what a broken disk changed.
"""

from __future__ import annotations

import json
import sqlite3
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


# Seconds to wait while another process writes; one batch takes milliseconds.
_PATIENCE = 120
# Rows of hidden states have megabytes: larger pages are read twice as fast.
_SETTINGS = "PRAGMA page_size=65536; PRAGMA synchronous=OFF;"
_TABLES = (
    "CREATE TABLE IF NOT EXISTS identity (name TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE IF NOT EXISTS outputs (key BLOB PRIMARY KEY, tokens INTEGER, checksum INTEGER, data BLOB)",
)
_MEANING = {"version": "format", "fingerprint": "teacher", "layout": "set of outputs", "outputs": "set of outputs"}


class StoredRow(NamedTuple):
    """The outputs of one example.

    Args:
        tokens: How many live tokens it has.
        data: [bytes] uint8.
    """

    tokens: int
    data: np.ndarray


def checksum(key: bytes, data: bytes) -> int:
    """Of a row under its key."""
    return zlib.crc32(data, zlib.crc32(key))


class CacheShard:
    """One file, which belongs to the process of that number in every run; every process may read it.

    Args:
        path: Created when absent.
        identity: Whose outputs it holds; see `_MEANING`.

    Raises:
        ValueError: If it holds the outputs of another teacher, of another layout or version, is damaged or cannot be
            written; names the folder and the remedy.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._verified: set[bytes] = set()
        with self._plain_errors():
            self.database = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            # Python 3.13 warns of connections that are not closed.
            weakref.finalize(self, self.database.close)
            self.database.executescript(_SETTINGS)
        with self._writing():
            for table in _TABLES:
                self.database.execute(table)
            for name, value in identity.items():
                self._agree(name, value)

    def refuse(self, reason: str) -> None:
        raise ValueError(f"teacher_cache_dir {str(self.path.parent)!r} {reason}.")

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        folder = str(self.path.parent)
        try:
            yield
        except sqlite3.OperationalError as error:
            raise ValueError(f"teacher_cache_dir {folder!r} cannot be used: {error}.") from error
        except sqlite3.Error as error:
            raise ValueError(f"teacher_cache_dir {folder!r} is damaged ({error}); delete it.") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        # As a context, a connection commits at the end and rolls back after an error.
        with self._plain_errors(), self.database:
            self.database.execute("BEGIN IMMEDIATE")
            yield

    def _agree(self, name: str, value: Any) -> None:
        """Store a part of the identity, or refuse another one that is there."""
        text = json.dumps(value, sort_keys=True)
        self.database.execute("INSERT OR IGNORE INTO identity VALUES (?, ?)", (name, text))
        if self._identity(name) != text:
            self.refuse(f"was made with another {_MEANING[name]}; delete it or name another folder")

    def _identity(self, name: str) -> str | None:
        found = self.database.execute("SELECT value FROM identity WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def keys(self) -> set[bytes]:
        """The keys of all examples."""
        with self._plain_errors():
            return {key for (key,) in self.database.execute("SELECT key FROM outputs")}

    def outputs(self) -> Any:
        """The description of the tensors that each row holds; None if there is no row yet."""
        with self._plain_errors():
            return json.loads(self._identity("outputs") or "null")

    def read(self, keys: Iterable[bytes]) -> dict[bytes, StoredRow]:
        """The rows of those keys that are here."""
        query = "SELECT tokens, checksum, data FROM outputs WHERE key = ?"
        found: dict[bytes, StoredRow] = {}
        # One lock for all rows, not one for each.
        with self._plain_errors(), self.database:
            self.database.execute("BEGIN")
            for key in keys:
                row = self.database.execute(query, (key,)).fetchone()
                if row is not None:
                    found[key] = StoredRow(row[0], self._checked(key, row[2], row[1]))
        return found

    def _checked(self, key: bytes, data: bytes, expected: int) -> np.ndarray:
        if key not in self._verified:
            if checksum(key, data) != expected:
                self.refuse("is damaged (checksum of an example); delete it")
            self._verified.add(key)
        return np.frombuffer(data, np.uint8)

    def write(self, rows: Sequence[tuple[bytes, int, bytes]], outputs: Any) -> None:
        """Store rows of key, live tokens and data; keys that are known stay as they are.

        Args:
            rows: What is new.
            outputs: The description of the tensors that each row holds.

        Raises:
            ValueError: If the disk is full, or other rows hold other tensors.
        """
        with self._writing():
            self._agree("outputs", outputs)
            self.database.executemany(
                "INSERT OR IGNORE INTO outputs VALUES (?, ?, ?, ?)",
                [(key, tokens, checksum(key, data), data) for key, tokens, data in rows],
            )
