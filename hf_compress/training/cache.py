"""A teacher's outputs on disk: computed once for each example, read from then on.

Two append-only files a process: `values-<rank>.bin` holds raw little-endian float32, `index-<rank>.bin` one fixed
record for each example. Values are written and flushed before their record, and a record carries a checksum, so a
crash costs the last examples at most. `meta.json` names the teacher.

Letters: B batch, S padded length, N live tokens of one example.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.batches import live_tokens
from hf_compress.core.saving import write_json


logger = logging.getLogger(__name__)

CACHE_VERSION = 1
# key, offset and size in the values file, rank of the values file, live tokens, checksum of the values
_RECORD = struct.Struct("<16sQQIII")


def teacher_fingerprint(model: PreTrainedModel) -> str:
    """A digest of a model's class, weights and dtype: another teacher has another one."""
    digest = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def example_keys(inputs: Mapping[str, Any]) -> list[bytes]:
    """One 16-byte key for each example of a batch, from its live tokens: padding does not change it.

    Args:
        inputs: Teacher inputs with `input_ids` [B, S].
    """
    live = live_tokens(inputs).cpu()
    columns = {
        name: value.cpu()
        for name, value in sorted(inputs.items())
        if torch.is_tensor(value) and value.shape[:2] == live.shape and name != "attention_mask"
    }
    keys = []
    for row, mask in enumerate(live):
        digest = hashlib.blake2b(digest_size=16)
        for name, value in columns.items():
            digest.update(name.encode())
            digest.update(value[row][mask].contiguous().numpy().tobytes())
        keys.append(digest.digest())
    return keys


class TeacherCache:
    """The stored outputs of one teacher.

    Args:
        directory: Created when absent.
        fingerprint: Of the teacher, see `teacher_fingerprint`.
        layout: What is stored for each example, e.g. which hidden states.
        rank: Of this process; each writes files of its own and reads those of all that existed at the start.

    Raises:
        ValueError: If the directory holds the outputs of another teacher, of another layout or version, or is
            damaged; names the directory and the remedy.
    """

    def __init__(self, directory: str, fingerprint: str, layout: Mapping[str, Any], rank: int = 0) -> None:
        self.directory = Path(directory)
        self.rank = rank
        self.hits = self.misses = 0
        self._entries: dict[bytes, tuple[int, int, int, int, int]] = {}
        self._verified: set[bytes] = set()
        self._maps: dict[int, np.ndarray] = {}
        self._shapes: list[dict[str, Any]] | None = None
        identity = {"version": CACHE_VERSION, "fingerprint": fingerprint, "layout": dict(layout)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"teacher_cache_dir must be a folder that can be written, got {directory!r}: {error.strerror}."
            ) from error
        self._check_identity(identity)
        for file in sorted(self.directory.glob("index-*.bin")):
            self._load_index(file)
        own = self.directory / f"index-{rank}.bin"
        # A record that a crash cut off must not shift those appended after it.
        with open(own, "ab") as index:
            index.truncate(own.stat().st_size // _RECORD.size * _RECORD.size)

    def _values_file(self, rank: int) -> Path:
        return self.directory / f"values-{rank}.bin"

    def _check_identity(self, identity: dict[str, Any]) -> None:
        meta = self.directory / "meta.json"
        if not meta.exists():
            if any(self.directory.iterdir()):
                raise ValueError(
                    "teacher_cache_dir must be empty or a teacher cache, "
                    f"got {str(self.directory)!r} with other files."
                )
            write_json(meta, identity)
            return
        try:
            found = json.loads(meta.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"teacher_cache_dir {str(self.directory)!r} is unreadable ({error}); delete it."
            ) from error
        for name, meaning in (("version", "format"), ("fingerprint", "teacher"), ("layout", "set of outputs")):
            if not isinstance(found, dict) or found.get(name) != identity[name]:
                raise ValueError(
                    f"teacher_cache_dir {str(self.directory)!r} was made with another {meaning}; "
                    "delete it or name another folder."
                )

    def _load_index(self, file: Path) -> None:
        raw = file.read_bytes()
        sizes: dict[int, int] = {}
        for start in range(0, len(raw) // _RECORD.size * _RECORD.size, _RECORD.size):
            key, offset, size, rank, live, checksum = _RECORD.unpack_from(raw, start)
            if rank not in sizes:
                values = self._values_file(rank)
                sizes[rank] = values.stat().st_size if values.exists() else 0
            if offset + size > sizes[rank]:
                raise ValueError(
                    f"teacher_cache_dir {str(self.directory)!r} is damaged ({file.name} points past its values); "
                    "delete it."
                )
            self._entries[key] = (offset, size, rank, live, checksum)

    def __len__(self) -> int:
        return len(self._entries)

    def _bytes(self, key: bytes) -> np.ndarray:
        offset, size, rank, _, checksum = self._entries[key]
        known = self._maps.get(rank)
        if known is None or len(known) < offset + size:
            # As a plain array: every slice of a memmap would be an object with a costly constructor.
            self._maps[rank] = known = np.asarray(np.memmap(self._values_file(rank), dtype=np.uint8, mode="r"))
        raw = known[offset : offset + size]
        if key not in self._verified:
            if zlib.crc32(raw) != checksum:
                raise ValueError(
                    f"teacher_cache_dir {str(self.directory)!r} is damaged (checksum of an example); delete it."
                )
            self._verified.add(key)
        return raw

    def read(
        self, keys: Sequence[bytes], inputs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """The stored logits and hidden states of a batch, or None when an example is missing.

        Args:
            keys: From `example_keys`.
            inputs: The batch, for its padding.
        """
        if any(key not in self._entries for key in keys):
            self.misses += len(keys)
            return None
        self.hits += len(keys)
        shapes, device = self._known_shapes(), inputs["input_ids"].device
        live = live_tokens(inputs).cpu().numpy()
        places = [_places(row) for row in live]
        batch = [
            np.zeros((*live.shape, *shape["shape"][1:]), np.float32)
            if shape["shape"][0] == "tokens"
            else np.empty((len(live), *shape["shape"]), np.float32)
            for shape in shapes
        ]
        for row, key in enumerate(keys):
            raw, tokens, start = self._bytes(key).view(np.float32), self._entries[key][3], 0
            for values, shape in zip(batch, shapes, strict=True):
                full = [tokens if size == "tokens" else size for size in shape["shape"]]
                count = math.prod(full)
                # Straight from the file to its place in the batch: these copies are most of a cached step's cost.
                place = places[row] if shape["shape"][0] == "tokens" else ...
                values[row][place] = raw[start : start + count].reshape(full)
                start += count
        tensors: dict[str, list[Tensor]] = {"logits": [], "hidden": []}
        for values, shape in zip(batch, shapes, strict=True):
            tensors[shape["kind"]].append(torch.from_numpy(values).to(device))
        return tuple(tensors["logits"]), tuple(tensors["hidden"])

    def _known_shapes(self) -> list[dict[str, Any]]:
        if self._shapes is None:
            try:
                self._shapes = json.loads((self.directory / "shapes.json").read_text())
            except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"teacher_cache_dir {str(self.directory)!r} is unreadable ({error}); delete it."
                ) from error
        return self._shapes

    def write(
        self, keys: Sequence[bytes], inputs: Mapping[str, Any], logits: Sequence[Tensor], hidden: Sequence[Tensor]
    ) -> None:
        """Store the outputs of a batch; examples that are known already stay as they are.

        Raises:
            ValueError: If the disk is full.
        """
        live = live_tokens(inputs).cpu()
        named = [("logits", t) for t in logits] + [("hidden", t) for t in hidden]
        arrays = [(kind, t.detach().float().cpu().numpy()) for kind, t in named]
        # Sizes cannot tell: a batch may be padded to as many tokens as there are classes.
        by_token = [kind == "hidden" or array.ndim == 3 or len(logits) == 2 for kind, array in arrays]
        if self._shapes is None:
            self._shapes = [
                {"kind": kind, "shape": ["tokens", *array.shape[2:]] if per_token else list(array.shape[1:])}
                for (kind, array), per_token in zip(arrays, by_token, strict=True)
            ]
            write_json(self.directory / "shapes.json", self._shapes)
        entries: dict[bytes, tuple[int, int, int, int, int]] = {}
        try:
            with open(self._values_file(self.rank), "ab") as values:
                for row, key in enumerate(keys):
                    if key in self._entries or key in entries:
                        continue
                    mask = live[row].numpy()
                    raw = b"".join(
                        (array[row][mask] if per_token else array[row]).astype("<f4").tobytes()
                        for (_, array), per_token in zip(arrays, by_token, strict=True)
                    )
                    entries[key] = (values.tell(), len(raw), self.rank, int(mask.sum()), zlib.crc32(raw))
                    values.write(raw)
            # Only now: a record must never point at values that are not there.
            with open(self.directory / f"index-{self.rank}.bin", "ab") as index:
                index.write(b"".join(_RECORD.pack(key, *entry) for key, entry in entries.items()))
        except OSError as error:
            raise ValueError(
                f"teacher_cache_dir {str(self.directory)!r} cannot be written: {error.strerror}."
            ) from error
        self._entries.update(entries)
        self._verified.update(entries)


def _places(live: np.ndarray) -> slice | np.ndarray:
    """Where the live tokens of an example stand; one slice when padding is on one side only."""
    found = np.flatnonzero(live)
    if len(found) and found[-1] - found[0] + 1 == len(found):
        return slice(int(found[0]), int(found[-1]) + 1)
    return found
