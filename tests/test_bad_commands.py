"""Every bad command line is one line on standard error and exit code 2, and nothing is written."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest

from hf_compress.cli.main import main
from tests import bad_commands
from tests.file_trees import tree


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    bad_commands.write_place(root)
    return root


@pytest.fixture(scope="module")
def files(place):
    before = os.getcwd()
    os.chdir(place)
    yield tree()
    os.chdir(before)


def first_of_each(lines: list[str], key) -> tuple[list[str], list[str]]:
    """Lines with a new key, and the rest."""
    first = {}
    for line in lines:
        first.setdefault(key(line), line)
    return list(first.values()), [line for line in lines if line not in set(first.values())]


def flag_and_value(line: str) -> str:
    return line[line.rindex(" --") :]


TYPING, MORE_TYPING = first_of_each(bad_commands.typing_errors(), flag_and_value)
VALUES, MORE_VALUES = first_of_each(bad_commands.wrong_values(), flag_and_value)
MODELS = bad_commands.bad_models()
# Flags without their value all end in one place: some of them are enough by default.
BARE = [line for index, line in enumerate(TYPING) if " " not in flag_and_value(line).strip() and index % 8]
QUICK = [
    *(line for line in TYPING if line not in BARE), *VALUES, *bad_commands.wrong_training(), *bad_commands.yamls(),
    *bad_commands.contradictions(), *bad_commands.bad_data(),
    *(line for line in MODELS if line.startswith("evaluate")),
]  # fmt: skip
LONG = [*MORE_TYPING, *BARE, *MORE_VALUES, *(line for line in MODELS if not line.startswith("evaluate"))]


def refused(line: str, files, capsys) -> None:
    assert main(shlex.split(line)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("hf-compress: ")
    assert tree() == files


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", QUICK)
def test_bad_command(line, files, capsys):
    refused(line, files, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", LONG)
def test_more_bad_commands(line, files, capsys):
    refused(line, files, capsys)


def test_there_are_many():
    assert len(set(QUICK)) >= 500
    assert len({*QUICK, *LONG}) >= 1400


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", bad_commands.GOOD)
def test_what_is_made_worse_works(name, place, files, tmp_path):
    """Otherwise a bad line could be refused for another reason."""
    assert main(shlex.split(bad_commands.GOOD[name])) == 0
    for path in set(tree()) - set(files):
        Path(path).unlink()
    shutil.rmtree("out", ignore_errors=True)
