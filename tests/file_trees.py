"""What lies in a folder, so that a test can say that nothing was written."""

from __future__ import annotations

from pathlib import Path


def tree() -> dict[str, tuple[int, int]]:
    """File -> size and time of the last change, of the current folder."""
    files = (path for path in Path().rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
