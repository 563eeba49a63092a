"""What is installed: every file that the package needs, and a pin for everything that it asks for."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


def test_a_build_holds_every_file(tmp_path):
    pytest.importorskip("setuptools")
    built = tmp_path / "lib"
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path), "--build-lib", str(built)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]

    def files_of(folder):
        found = (
            path for path in (folder / "hf_compress").rglob("*") if path.suffix in (".py", ".pyi", ".md", ".typed")
        )
        return sorted(str(path.relative_to(folder)) for path in found)

    assert files_of(built) == files_of(ROOT)
    methods = {path.parent.name for path in (built / "hf_compress" / "methods").glob("*/README.md")}
    assert methods == {path.parent.name for path in (ROOT / "hf_compress" / "methods").glob("*/__init__.py")}


def test_every_requirement_is_pinned():
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    wanted = parsed["options"]["install_requires"].splitlines()
    for lines in parsed["options.extras_require"].values():
        wanted += lines.splitlines()
    names = {re.match(r"[\w.-]+", line)[0] for line in wanted if re.match(r"[a-zA-Z]", line)}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {"torch", "transformers", "pytest", "ruff", "optuna"} <= names
    assert sorted(names - set(pins)) == []
