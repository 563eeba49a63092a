"""Uploads files to a repository of the Hub in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.utils._validators import validate_repo_id

from hf_compress.core.errors import one_line


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        ValueError: Says what is wrong with it.

    Example:
        >>> check_repo_id("me/my--model")
        Traceback (most recent call last):
        ValueError: repo_id must be a name or owner/name as the Hub allows: Cannot have -- or .. in repo_id: ...
    """
    with one_line("repo_id must be a name or owner/name as the Hub allows", ValueError):
        validate_repo_id(repo_id)


def _explained(api: HfApi, doing: str) -> AbstractContextManager[None]:
    """Turn what the client raises into one line that names the endpoint."""
    # Which errors those are depends on its release, which also decides about the library beneath it.
    return one_line(f"{doing} at {api.endpoint} failed", Exception)


def connect() -> tuple[HfApi, str]:
    """Reach the Hub with the user's token, before any work.

    Returns:
        The client, and the user's name.

    Raises:
        ValueError: If there is no token, the Hub does not know it, or it cannot be reached.
    """
    api = HfApi()
    if get_token() is None:
        raise ValueError("push needs a token with write permission: hf auth login, or set HF_TOKEN. Or give dry_run.")
    with _explained(api, "Logging in"):
        return api, str(api.whoami()["name"])


def upload(api: HfApi, repo_id: str, files: Mapping[str, Path | bytes], private: bool, message: str) -> dict[str, Any]:
    """Make the repository unless there is one, and upload files in one commit: all of them or none.

    Args:
        api: Of `connect`.
        repo_id: As `owner/name`.
        files: Name in the repository -> file, or its content.
        private: Whether a new repository is private; one that exists stays as it is.
        message: Of the commit.

    Returns:
        `url` of the repository and the `commit`.

    Raises:
        ValueError: If the Hub refuses, or the connection breaks.
    """
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file) if isinstance(file, Path) else file)
        for name, file in files.items()
    ]
    with _explained(api, f"Making {repo_id}"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
    with _explained(api, f"Uploading to {repo_id}"):
        commit = api.create_commit(repo_id, operations, commit_message=message)
    return {"url": str(url), "commit": commit.oid}
