"""Keeps a teacher's outputs on disk: each example is computed once and read from then on.

Every process writes a file of its own, a shard, and reads all of them. On a folder that several machines share, the
file system must support locks (NFS 4, Lustre with flock).

Letters: B batch, S padded length, N live tokens of one example.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.core.batches import live_tokens
from hf_compress.core.processes import process_number
from hf_compress.training.cache_shard import CacheShard, StoredRow
from hf_compress.training.fingerprints import teacher_fingerprint


CACHE_VERSION = 2
# Of the first process, and of a run without others.
_FILE = "outputs.sqlite"
_SHARD = re.compile(r"outputs(-\d+)?\.sqlite")


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
        process: The number of this process among those of its run; each writes a file of its own.

    Raises:
        ValueError: If the directory holds the outputs of another teacher, of another layout or version, is damaged or
            cannot be written; names the directory and the remedy.
    """

    def __init__(self, directory: str, fingerprint: str, layout: Mapping[str, Any], process: int = 0) -> None:
        self.directory = Path(directory)
        self.hits = self.misses = 0
        self._outputs: list[_Output] | None = None
        self._whose = {"version": CACHE_VERSION, "fingerprint": fingerprint, "layout": dict(layout)}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._refuse_other_files()
        except OSError as error:
            raise ValueError(
                f"teacher_cache_dir must be a folder that can be written, got {directory!r}: {error.strerror}."
            ) from error
        self._own = CacheShard(self.directory / (f"outputs-{process}.sqlite" if process else _FILE), self._whose)
        # Those of other processes, by name.
        self._others: dict[str, CacheShard] = {}
        self._find_others()

    def _find_others(self) -> list[CacheShard]:
        """Open the shards that have come since; return them."""
        known = {self._own.path.name, *self._others}
        names = sorted(path.name for path in self.directory.iterdir() if _SHARD.fullmatch(path.name))
        new = {name: CacheShard(self.directory / name, self._whose) for name in names if name not in known}
        self._others.update(new)
        return list(new.values())

    @classmethod
    def of(cls, teacher: PreTrainedModel, directory: str, layout: Mapping[str, Any]) -> TeacherCache:
        """The cache of a teacher; `ValueError` also when the teacher reads something else than one text a row."""
        if teacher.main_input_name != "input_ids" or teacher.config.is_encoder_decoder:
            raise ValueError(
                f"teacher_cache_dir must be unset for {type(teacher).__name__}: outputs are stored for each token of "
                "one text, and it reads something else."
            )
        return cls(directory, teacher_fingerprint(teacher), layout, process_number())

    def _refuse_other_files(self) -> None:
        # Hidden files are not a user's work: left-overs of a crash, of a network file system, of a file manager.
        names = {path.name for path in self.directory.iterdir() if not path.name.startswith(".")}
        if any(_SHARD.fullmatch(name) for name in names) or all(_SHARD.match(name) for name in names):
            return
        if "meta.json" in names:
            raise ValueError(
                f"teacher_cache_dir {str(self.directory)!r} was made with another format; delete it or name another "
                "folder."
            )
        raise ValueError(
            f"teacher_cache_dir must be empty or a teacher cache, got {str(self.directory)!r} with other files."
        )

    def __len__(self) -> int:
        return len(self._own.keys().union(*(shard.keys() for shard in self._others.values())))

    def read(
        self, keys: Sequence[bytes], inputs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """The stored logits and hidden states of a batch, or None when an example is missing.

        Args:
            keys: From `example_keys`.
            inputs: The batch, for its padding.
        """
        found = self._rows(keys)
        if len(found) < len(set(keys)):
            self.misses += len(keys)
            return None
        self.hits += len(keys)
        outputs = self._outputs or []
        live = live_tokens(inputs).cpu().numpy()
        batch = [
            torch.zeros(
                *(live.shape if output["by_token"] else live.shape[:1]), *output["shape"],
                dtype=getattr(torch, output["dtype"]),
            )
            for output in outputs
        ]  # fmt: skip
        raw_batch = [_raw(values) for values in batch]
        for row, key in enumerate(keys):
            (tokens, raw), start = found[key], 0
            positions = _positions(live[row])
            for memory, output in zip(raw_batch, outputs, strict=True):
                shape = (tokens, *memory.shape[2:]) if output["by_token"] else memory.shape[1:]
                count = math.prod(shape)
                # Straight to its position in the batch: these copies are most of a cached step's cost.
                memory[row][positions if output["by_token"] else ...] = raw[start : start + count].reshape(shape)
                start += count
        device = inputs["input_ids"].device
        tensors: dict[str, list[Tensor]] = {"logits": [], "hidden": []}
        for values, output in zip(batch, outputs, strict=True):
            tensors[output["kind"]].append(values.to(device))
        return tuple(tensors["logits"]), tuple(tensors["hidden"])

    def _rows(self, keys: Sequence[bytes]) -> dict[bytes, StoredRow]:
        """What is stored for some examples.

        The own shard comes first, for two processes may compute one example at once: a run that is killed and goes on
        reads what it read before.
        """
        found: dict[bytes, StoredRow] = {}

        def look(shards: Sequence[CacheShard]) -> None:
            for shard in shards:
                missing = [key for key in keys if key not in found]
                if missing and (rows := shard.read(missing)):
                    self._require_outputs(shard)
                    found.update(rows)

        look([self._own, *(self._others[name] for name in sorted(self._others))])
        if len(found) < len(set(keys)):
            look(self._find_others())
        return found

    def _require_outputs(self, shard: CacheShard) -> None:
        outputs = shard.outputs()
        if self._outputs is None:
            self._outputs = outputs
        if outputs != self._outputs:
            shard.refuse("was made with another set of outputs; delete it or name another folder")

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
        known = self._rows(keys)
        for row, key in enumerate(keys):
            if key in known:
                continue
            data = b"".join(
                (array[row][live[row]] if per_token else array[row]).tobytes()
                for array, per_token in zip(arrays, by_token, strict=True)
            )
            rows.append((key, int(live[row].sum()), data))
        self._own.write(rows, outputs)


def _raw(tensor: Tensor) -> np.ndarray:
    """A tensor's memory, one axis of bytes behind its own: numpy does not know every dtype."""
    return tensor.unsqueeze(-1).view(torch.uint8).numpy()


def _positions(live: np.ndarray) -> slice | np.ndarray:
    """Where the live tokens of an example stand; one slice when padding is on one side only."""
    found = np.flatnonzero(live)
    if len(found) and found[-1] - found[0] + 1 == len(found):
        return slice(int(found[0]), int(found[-1]) + 1)
    return found
