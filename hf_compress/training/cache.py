"""Keeps a teacher's outputs on disk: each example is computed once and read from then on.

One SQLite file holds the outputs and the identity of their teacher. Its locks and its journal let several processes
share it, and a killed one leaves it whole. Checksums find what a broken disk changed. On a folder that several
machines share, the file system must support locks (NFS 4, Lustre with flock).

Letters: B batch, S padded length, N live tokens of one example.
"""

from __future__ import annotations

import json
import math
import sqlite3
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.batches import live_tokens
from hf_compress.training.fingerprints import teacher_fingerprint


CACHE_VERSION = 2
_FILE = "outputs.sqlite"
# Seconds to wait while another process writes; one batch takes milliseconds.
_PATIENCE = 120
# Rows of hidden states have megabytes: larger pages are read twice as fast.
_SETTINGS = "PRAGMA page_size=65536; PRAGMA synchronous=OFF;"
_TABLES = (
    "CREATE TABLE IF NOT EXISTS identity (name TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE IF NOT EXISTS outputs (key BLOB PRIMARY KEY, tokens INTEGER, checksum INTEGER, data BLOB)",
)
_MEANING = {"version": "format", "fingerprint": "teacher", "layout": "set of outputs", "outputs": "set of outputs"}


class _Output(TypedDict):
    """One of the tensors that are stored for each example."""

    kind: str
    by_token: bool
    shape: list[int]
    dtype: str


class TeacherCache:
    """The stored outputs of one teacher, which any number of processes may read and extend at once.

    Args:
        directory: Created when absent.
        fingerprint: Of the teacher, see `teacher_fingerprint`.
        layout: What is stored for each example, e.g. which hidden states.

    Raises:
        ValueError: If the directory holds the outputs of another teacher, of another layout or version, is damaged or
            cannot be written; names the directory and the remedy.
    """

    def __init__(self, directory: str, fingerprint: str, layout: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.hits = self.misses = 0
        self._verified: set[bytes] = set()
        self._outputs: list[_Output] | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._refuse_other_files()
        except OSError as error:
            raise ValueError(
                f"teacher_cache_dir must be a folder that can be written, got {directory!r}: {error.strerror}."
            ) from error
        with self._plain_errors():
            self._database = sqlite3.connect(
                self.directory / _FILE, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
            )
            # Python 3.13 warns of connections that are not closed.
            weakref.finalize(self, self._database.close)
            self._database.executescript(_SETTINGS)
        with self._writing():
            for table in _TABLES:
                self._database.execute(table)
            self._agree("version", CACHE_VERSION)
            self._agree("fingerprint", fingerprint)
            self._agree("layout", dict(layout))

    @classmethod
    def of(cls, teacher: PreTrainedModel, directory: str, layout: Mapping[str, Any]) -> TeacherCache:
        """The cache of a teacher; `ValueError` also when the teacher reads something else than one text a row."""
        if teacher.main_input_name != "input_ids" or teacher.config.is_encoder_decoder:
            raise ValueError(
                f"teacher_cache_dir must be unset for {type(teacher).__name__}: outputs are stored for each token of "
                "one text, and it reads something else."
            )
        return cls(directory, teacher_fingerprint(teacher), layout)

    def _refuse_other_files(self) -> None:
        # Hidden files are not a user's work: left-overs of a crash, of a network file system, of a file manager.
        names = {path.name for path in self.directory.iterdir() if not path.name.startswith((".", _FILE))}
        if (self.directory / _FILE).exists() or not names:
            return
        if "meta.json" in names:
            self._refuse("was made with another format; delete it or name another folder")
        raise ValueError(
            f"teacher_cache_dir must be empty or a teacher cache, got {str(self.directory)!r} with other files."
        )

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"teacher_cache_dir {str(self.directory)!r} {reason}.")

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise ValueError(f"teacher_cache_dir {str(self.directory)!r} cannot be used: {error}.") from error
        except sqlite3.Error as error:
            raise ValueError(f"teacher_cache_dir {str(self.directory)!r} is damaged ({error}); delete it.") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        # As a context, a connection commits at the end and rolls back after an error.
        with self._plain_errors(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield

    def _agree(self, name: str, value: Any) -> None:
        """Store a part of the identity, or refuse another one that is there."""
        text = json.dumps(value, sort_keys=True)
        self._database.execute("INSERT OR IGNORE INTO identity VALUES (?, ?)", (name, text))
        if self._identity(name) != text:
            self._refuse(f"was made with another {_MEANING[name]}; delete it or name another folder")

    def _identity(self, name: str) -> str | None:
        found = self._database.execute("SELECT value FROM identity WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def __len__(self) -> int:
        with self._plain_errors():
            return int(self._database.execute("SELECT count(*) FROM outputs").fetchone()[0])

    def read(
        self, keys: Sequence[bytes], inputs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """The stored logits and hidden states of a batch, or None when an example is missing.

        Args:
            keys: From `example_keys`.
            inputs: The batch, for its padding.
        """
        query = "SELECT tokens, checksum, data FROM outputs WHERE key = ?"
        # One lock for all rows, not one for each.
        with self._plain_errors(), self._database:
            self._database.execute("BEGIN")
            found = [self._database.execute(query, (key,)).fetchone() for key in keys]
            if None in found:
                self.misses += len(keys)
                return None
            if self._outputs is None:
                self._outputs = json.loads(self._identity("outputs") or "[]")
        self.hits += len(keys)
        live = live_tokens(inputs).cpu().numpy()
        batch = [
            torch.zeros(
                *(live.shape if output["by_token"] else live.shape[:1]), *output["shape"],
                dtype=getattr(torch, output["dtype"]),
            )
            for output in self._outputs
        ]  # fmt: skip
        raw_batch = [_raw(values) for values in batch]
        for row, (key, (tokens, checksum, data)) in enumerate(zip(keys, found, strict=True)):
            raw, start = self._checked(key, data, checksum), 0
            positions = _positions(live[row])
            for memory, output in zip(raw_batch, self._outputs, strict=True):
                shape = (tokens, *memory.shape[2:]) if output["by_token"] else memory.shape[1:]
                count = math.prod(shape)
                # Straight to its position in the batch: these copies are most of a cached step's cost.
                memory[row][positions if output["by_token"] else ...] = raw[start : start + count].reshape(shape)
                start += count
        device = inputs["input_ids"].device
        tensors: dict[str, list[Tensor]] = {"logits": [], "hidden": []}
        for values, output in zip(batch, self._outputs, strict=True):
            tensors[output["kind"]].append(values.to(device))
        return tuple(tensors["logits"]), tuple(tensors["hidden"])

    def _checked(self, key: bytes, data: bytes, checksum: int) -> np.ndarray:
        if key not in self._verified:
            if zlib.crc32(data, zlib.crc32(key)) != checksum:
                self._refuse("is damaged (checksum of an example); delete it")
            self._verified.add(key)
        return np.frombuffer(data, np.uint8)

    def write(
        self, keys: Sequence[bytes], inputs: Mapping[str, Any], logits: Sequence[Tensor], hidden: Sequence[Tensor]
    ) -> None:
        """Store the outputs of a batch; examples that are known already stay as they are.

        Raises:
            ValueError: If the disk is full, or the outputs do not have one entry for each input token.
        """
        live = live_tokens(inputs).cpu().numpy()
        named = [("logits", t.detach().cpu()) for t in logits] + [("hidden", t.detach().cpu()) for t in hidden]
        # Sizes cannot tell: a batch may be padded to as many tokens as there are classes.
        by_token = [kind == "hidden" or tensor.ndim == 3 or len(logits) == 2 for kind, tensor in named]
        for (kind, tensor), per_token in zip(named, by_token, strict=True):
            if per_token and tensor.shape[:2] != live.shape:
                raise ValueError(
                    f"teacher_cache_dir must be unset for this teacher: its {kind} have shape {tuple(tensor.shape)} "
                    f"for inputs of shape {live.shape}, and only what belongs to a token can be stored."
                )
        outputs: list[_Output] = [
            {"kind": kind, "by_token": per_token, "shape": list(tensor.shape[1 + per_token :]),
             "dtype": str(tensor.dtype).removeprefix("torch.")}
            for (kind, tensor), per_token in zip(named, by_token, strict=True)
        ]  # fmt: skip
        arrays, rows = [_raw(tensor.contiguous()) for _, tensor in named], []
        for row, key in enumerate(keys):
            data = b"".join(
                (array[row][live[row]] if per_token else array[row]).tobytes()
                for array, per_token in zip(arrays, by_token, strict=True)
            )
            rows.append((key, int(live[row].sum()), zlib.crc32(data, zlib.crc32(key)), data))
        with self._writing():
            self._agree("outputs", outputs)
            self._database.executemany("INSERT OR IGNORE INTO outputs VALUES (?, ?, ?, ?)", rows)


def _raw(tensor: Tensor) -> np.ndarray:
    """A tensor's memory, one axis of bytes behind its own: numpy does not know every dtype."""
    return tensor.unsqueeze(-1).view(torch.uint8).numpy()


def _positions(live: np.ndarray) -> slice | np.ndarray:
    """Where the live tokens of an example stand; one slice when padding is on one side only."""
    found = np.flatnonzero(live)
    if len(found) and found[-1] - found[0] + 1 == len(found):
        return slice(int(found[0]), int(found[-1]) + 1)
    return found
