"""Shell completion: what is proposed, and that real shells ask for it and take it."""

import os
import shutil
import subprocess
import sys

import pytest

from hf_compress.cli.completion import completion_script, proposals
from hf_compress.cli.main import main
from hf_compress.stages.table import STAGES


@pytest.mark.parametrize(("line", "expected"), [
    ("", {"demo", "finetune", "run", "--version"}), ("prune-", {"prune-structure", "prune-tokens", "prune-weights"}),
    ("prune-structure --mac", {"--mac_ratio"}), ("prune-structure --selection ", {"interpolative", "fisher"}),
    ("prune-structure --selection=f", {"fisher"}), ("distill --max_st", {"--max_steps"}), ("run --", {"--dry_run"}),
    ("demo --", {"--dry_run"}),
    ("--completion ", {"bash", "zsh"}), ("finetune --freeze-embeddings ", {"true", "false"}),
])  # fmt: skip
def test_what_is_proposed(line, expected):
    words = line.replace("=", " = ").split(" ") if line else [""]
    found = proposals(words)
    assert expected <= set(found)
    assert all(word.startswith(words[-1]) for word in found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("line", [
    "run ", "finetune ", "finetune --model_name_or_path ", "finetune --output_dir d", "no-such-command --m",
    "prune-structure --freeze_emb", "prune-structure --num_train_ep", "--completion bash ",
])  # fmt: skip
def test_nothing_is_proposed(line):
    """Where a file or a free value comes next, the shell proposes files; flags that a command refuses are left out."""
    assert proposals(line.split(" ")) == []


@pytest.mark.parametrize("name", [stage.command for stage in STAGES.values()])
def test_every_proposed_flag_of_ours_is_in_the_help(name, capsys):
    assert main([name, "--help_all"]) == 0
    text = capsys.readouterr().out
    assert [flag for flag in proposals([name, "--"]) if flag not in text and flag != "--help"] == []


def test_another_shell_is_refused(capsys):
    assert main(["--completion", "tcsh"]) == 2
    assert "completion must be for one of bash, zsh, got 'tcsh'" in capsys.readouterr().err


def completed(shell, line, tmp_path):
    """What a shell offers after a line: its own function fills in the words, ours is the program it asks."""
    program = tmp_path / "hf-compress"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hf_compress "$@"\n')
    program.chmod(0o755)
    words = line.replace("=", " = ").split(" ")
    typed = " ".join(f"'{word}'" for word in ["hf-compress", *words])
    lines = [completion_script(shell), f"COMP_WORDS=({typed})", f"COMP_CWORD={len(words)}", "_hf_compress"]
    if shell == "zsh":
        # As bashcompinit calls functions of bash.
        lines[0] = lines[0].replace("|| compinit", "|| compinit -D -u")
        lines[-1] = "() { emulate -L sh; setopt kshglob noshglob braceexpand kshautoload ksharrays; _hf_compress; }"
    script = "\n".join([*lines, 'printf "%s\\n" "${COMPREPLY[@]}"'])
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(
        [shell, "-c", script], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_takes_them(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert completed(shell, "prune-w", tmp_path) == ["prune-weights"]
    typed = ["magnitude", "gradient", "snip", "snip_momentum", "wanda", "sparsegpt"]
    assert completed(shell, "prune-weights --criterion=", tmp_path) == typed
    assert completed(shell, "finetune --output_dir ", tmp_path) == []
