"""Writes folders that are complete or do not load: files are written aside under a lock, then moved, weights last."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


# `Trainer` uploads no files whose name begins like this.
_TRAINING_LOCK = "_training.lock"
_WRITING_LOCK = ".writing.lock"
_STAGED = ".incomplete-model-"
_ASIDE = ".incomplete"
# Name of the file, process and a random number: as `_in_one_step` calls it.
_LEFT = re.compile(rf"\..+\.\d+-[0-9a-f]{{8}}{re.escape(_ASIDE)}")

# The files that weights are read from, in any format, exported ones too, and those that name further files.
_ADAPTER = re.compile(r"adapter_model\.(safetensors|bin)|adapter_config\.json")
_WHOLE_MODEL = re.compile(
    r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|"
    r"model(_int8)?\.onnx|openvino_model\.(xml|bin)|model\.pt2"
)

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
_ALMOST_FULL = 2**20


def _opens_last(file: Path) -> tuple[bool, bool]:
    """Sort key for writing: weights after everything else, and the index of shards after the shards."""
    weights = ".safetensors" in file.suffixes or file.suffix in (".onnx", ".xml", ".pt2")
    return weights, weights and (file.suffix == ".json" or "-of-" not in file.name)


def _opened_first(file: Path) -> tuple[bool, bool, bool]:
    """Sort key for removal: the files that `from_pretrained` prefers go last, so that no older ones open meanwhile."""
    return file.name == "adapter_config.json", ".safetensors" in file.suffixes, "-of-" in file.name


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staged: Path, target: Path) -> None:
    # A folder without weights never opens; one without config.json may, with a class's default sizes.
    adapter = any(_ADAPTER.fullmatch(file.name) for file in staged.iterdir())
    # The model that an adapter changes may lie in the same folder.
    replaced = (_ADAPTER,) if adapter else (_ADAPTER, _WHOLE_MODEL)
    old = [file for file in target.iterdir() if any(pattern.fullmatch(file.name) for pattern in replaced)]
    for file in sorted(old, key=_opened_first):
        file.unlink()
    files = [path for path in staged.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda file: (_opens_last(file), file.name)):
        _sync(path)
        place = target / path.relative_to(staged)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def _disk_trouble(error: BaseException, directory: Path) -> str | None:
    """The operating system's description of a disk error; None for other errors."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _DISK_ERRORS else None
    if isinstance(error, SafetensorError):
        found = re.search(r"I/O error: (.*?)( \(os error \d+\))?$", str(error).strip())
        return found.group(1) if found else None
    # torch's zip writer names the line of its source that failed, but not the reason.
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        full = shutil.disk_usage(directory).free < _ALMOST_FULL
        return os.strerror(errno.ENOSPC) if full else "torch could not write a whole file"
    return None


@contextmanager
def disk_errors_explained(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of a full, read-only or failing disk into one `ValueError` that names the folder.

    Args:
        directory: An existing folder, which the block writes into.

    Raises:
        ValueError: If writing fails. Other errors are not changed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        trouble = _disk_trouble(error, Path(directory))
        if trouble is None:
            raise
        raise ValueError(f"output_dir {str(directory)!r} cannot be written: {trouble}.") from error


@contextmanager
def _locked(lock: FileLock, directory: Path, timeout: float) -> Iterator[None]:
    try:
        with disk_errors_explained(directory):
            lock.acquire(timeout=timeout)
    except Timeout as error:
        raise ValueError(
            f"output_dir {str(directory)!r} belongs to a training that is still running: name another folder."
        ) from error
    try:
        yield
    finally:
        # A process that waits for the lock notices that the file is gone and makes a new one.
        if lock.lock_counter == 1:
            with suppress(OSError):
                os.unlink(lock.lock_file)
        lock.release()


@contextmanager
def sole_training(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from training in a folder, or saving into it, while the block runs.

    The operating system frees the lock when the process ends, however it ends.

    Raises:
        ValueError: If another process trains in this folder, or it cannot be written.
    """
    target = Path(directory).resolve()
    target.mkdir(parents=True, exist_ok=True)
    # One lock object per process, which may take the lock twice: a training saves into its own folder.
    lock = FileLock(target / _TRAINING_LOCK, thread_local=False, is_singleton=True)
    with _locked(lock, target, timeout=0):
        yield


def _refuse_running(directory: Path) -> None:
    # The first process of a distributed training may take the lock before the others arrive here.
    if os.environ.get("RANK", "0") == "0" and (directory / _TRAINING_LOCK).exists():
        with sole_training(directory):
            pass


def require_own_folder(
    output_dir: str | os.PathLike[str], inputs: Mapping[str, str | os.PathLike[str] | None] | None = None
) -> None:
    """Check, before any work, that results can be written to a folder and overwrite no input.

    Args:
        output_dir: Folder of the results. It need not exist, and is not created here.
        inputs: Name of an argument -> the model folder, or file in one, that it names. Names of the Hub and None are
            allowed.

    Raises:
        ValueError: If `output_dir` is empty, cannot be written, is the folder of an input, or belongs to a training
            that is still running.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     require_own_folder(place, {"model_name_or_path": f"{place}/."})
        Traceback (most recent call last):
            ...
        ValueError: output_dir '...' is the folder of model_name_or_path: saving there would overwrite it...
    """
    if not os.fspath(output_dir):
        raise ValueError("output_dir is empty: name a folder.")
    target = Path(output_dir).absolute()
    for name, value in (inputs or {}).items():
        if value and os.path.isfile(value):
            value = Path(value).absolute().parent
        if value and os.path.isdir(value) and target.is_dir() and os.path.samefile(value, target):
            raise ValueError(
                f"output_dir {str(output_dir)!r} is the folder of {name}: saving there would overwrite it. "
                "Name another folder."
            )
    existing = next(place for place in (target, *target.parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir {str(output_dir)!r} cannot be written: {str(existing)!r} is a file.")
    try:
        # Reading the permissions is not enough: the superuser has all of them, on read-only disks too.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {str(output_dir)!r} cannot be written: {error.strerror}.") from error
    _refuse_running(target)


@contextmanager
def complete_or_absent(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a model directory so that a crash never leaves one that loads but is incomplete.

    A model in the directory is replaced: its weight files in any format are removed, all other files stay. Several
    processes may save into one directory; each waits for its turn.

    Args:
        directory: Folder of the finished files.

    Yields:
        An empty folder inside the target to write into. When the block ends without an error, its files are synced
        and moved, the weights last; after an error they are removed.

    Raises:
        ValueError: If the name is empty, the disk is full or cannot be written, or another process trains there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with complete_or_absent(f"{place}/model") as staged:
        ...         _ = (staged / "config.json").write_text("{}")
        ...     os.listdir(f"{place}/model")
        ['config.json']
    """
    require_own_folder(directory)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with _locked(FileLock(target / _WRITING_LOCK), target, timeout=-1):
        # Files of killed processes: the lock shows that no other process writes here. Versions before 0.1 used
        # the shorter name.
        for leftover in (*target.glob(f"{_STAGED}*"), target / ".incomplete"):
            shutil.rmtree(leftover, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=target))
        try:
            # Measured before the files are removed, while they still fill the disk.
            with disk_errors_explained(target):
                yield staged
                _publish(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def write_json(file: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file in one step: readers see the old or the new content, never a part of it."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: str | os.PathLike[str], text: str) -> None:
    """Write a text file in one step, as `write_json`."""
    with _in_one_step(Path(file)) as aside:
        aside.write_text(text, encoding="utf-8")


def write_tensors(file: str | os.PathLike[str], tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> None:
    """Write a file of safetensors in one step, as `write_json`, so that it is there after a loss of power, too.

    Args:
        file: Its place.
        tensors: Name -> tensor, on any device.
        told: What the file's header says beside names and shapes.
    """
    with _in_one_step(Path(file)) as aside:
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(content, aside, {"format": "pt", **told})
    _sync(Path(file).parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes have left of files that were being written; nobody else may be writing there."""
    for path in Path(folder).rglob(f".*{_ASIDE}"):
        # Hidden files of other programs may end in the same word.
        if _LEFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def _in_one_step(file: Path) -> Iterator[Path]:
    file.parent.mkdir(parents=True, exist_ok=True)
    # A unique name, because two processes may write the same file.
    aside = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}{_ASIDE}")
    try:
        yield aside
        _sync(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
