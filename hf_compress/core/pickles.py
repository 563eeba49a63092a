"""Finds pickles, which can run any code when they are read, by what is in a file as well as by its name."""

from __future__ import annotations

import zipfile
from pathlib import Path


# Names that nothing but pickles has. `.bin` is not among them: other runtimes write plain weights under it.
_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".dill"}
_NUMPY = b"\x93NUMPY"
_ARRAY_HEAD = 512


def is_pickle(file: Path) -> bool:
    """Whether a file is a pickle, or holds one: files of `torch.save` and numpy's arrays of objects do.

    Args:
        file: An existing file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     file = Path(place, "pytorch_model.bin")
        ...     _ = file.write_bytes(b"\\x80\\x04K\\x01.")
        ...     is_pickle(file)
        True
    """
    if file.suffix in _SUFFIXES:
        return True
    with file.open("rb") as opened:
        head = opened.read(_ARRAY_HEAD)
    # Protocols 2 to 5 begin with their number; the end of one is a full stop, which no text file beginning so has.
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if head.startswith(_NUMPY):
        return b"'|O'" in head
    if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return False
