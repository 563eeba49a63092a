"""`hf compress ...`: the Hub's own command runs ours, as an extension of a repository named hf-compress."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress import __version__


OURS, HF = (Path(sys.executable).parent / name for name in ("hf-compress", "hf"))


@pytest.fixture
def home(tmp_path):
    """What `hf extensions install OWNER/hf-compress` leaves behind, with this environment in place of its own."""
    pytest.importorskip("huggingface_hub.cli.extensions")
    if not (OURS.is_file() and HF.is_file()):
        pytest.skip("the commands of this environment are not installed beside its interpreter")
    folder = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-compress"
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    (programs / OURS.name).symlink_to(OURS)
    (folder / "manifest.json").write_text(json.dumps({
        "owner": "me", "repo": "hf-compress", "repo_id": "me/hf-compress", "short_name": "compress",
        "executable_path": str(programs / OURS.name), "type": "python", "installed_at": "2026-11-26T00:00:00+00:00",
        "description": "Smaller and faster models.", "commit_sha": None,
    }))  # fmt: skip
    return tmp_path


def hf(home, *words):
    environment = {**os.environ, "HOME": str(home), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return subprocess.run([HF, *words], env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_hf_runs_our_command(home):
    done = hf(home, "compress", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"hf-compress {__version__}"), done.stderr
    done = hf(home, "compress", "--nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith("hf-compress: ")


def test_the_name_that_hf_looks_for():
    """It installs a repository `hf-NAME` and runs the script of that name."""
    found = importlib.metadata.entry_points(group="console_scripts", name="hf-compress")
    assert [script.value for script in found] == ["hf_compress.cli.main:entry"]
