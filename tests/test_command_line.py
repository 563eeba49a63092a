"""What the command line answers by itself: help, versions, misspelled names, exit codes, whose fault an error is."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
import time
import types

import pytest
import torch

import hf_compress
from hf_compress.cli import commands
from hf_compress.cli.errors import is_bad_input
from hf_compress.cli.help import command_help, topic_title, usage
from hf_compress.cli.main import main
from hf_compress.cli.options import REQUIRED, argument_texts, stage_groups
from hf_compress.cli.parsing import build_parser, parse
from hf_compress.stages.table import STAGES


COMMANDS = {stage.command: stage for stage in STAGES.values()}
OUTPUTS = ("achieved_sparsity", "heads_per_layer", "kept_ids", "neurons_per_layer", "tolerance", "token_prune_stage")


def ours(name):
    """The options of a command that are this package's own, by name."""
    return {option.name: option for group in stage_groups(COMMANDS[name]).values() for option in group.options}


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_ours_is_explained(name):
    for option in ours(name).values():
        assert len(option.help.split()) >= 4, f"--{option.name}: {option.help!r} is no sentence"
        assert not option.help.startswith("Of "), f"--{option.name}: {option.help!r} starts in the middle"
        assert option.help.endswith("."), f"--{option.name}: {option.help!r}"
        unused = option.name in COMMANDS[name].unused
        assert (f"--{option.name} " in command_help(COMMANDS[name])) is not unused
    assert set(COMMANDS[name].unused) <= set(ours(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_from_the_source_agrees_with_the_parser(name):
    kinds = list(commands.kinds_of(COMMANDS[name]).values())
    actions = {action.dest: action for action in reversed(build_parser(kinds)._actions)}
    options = ours(name)
    for option in options.values():
        default = None if option.default is REQUIRED else option.default
        assert actions[option.name].default == default
        assert actions[option.name].required == (option.default is REQUIRED)
    declared = {
        field.name
        for kind in kinds
        for parent in kind.__mro__
        if parent.__module__.startswith("hf_compress.") and dataclasses.is_dataclass(parent)
        for field in dataclasses.fields(parent)
        if field.name in parent.__annotations__ and field.init
    }
    assert declared - set(options) <= set(OUTPUTS)
    assert not set(OUTPUTS) & (set(options) | set(actions))


@pytest.mark.parametrize("line", ["finetune --help", "-h", "prune-weights --seed 1 -h --slim", "--version", "fintune"])
def test_answers_without_importing_torch(line):
    program = (
        "import sys\nfrom hf_compress.cli.main import main\n"
        f"code = main({line.split()!r})\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\nsys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (2 if line == "fintune" else 0), done.stderr
    assert time.perf_counter() - start < 3


def test_help_groups_ours_and_announces_the_rest(capsys):
    assert main(["distill", "--help"]) == 0
    text = capsys.readouterr().out
    topics = [text.index(f"\n{topic_title(topic)}:\n") for topic in stage_groups(COMMANDS["distill"])]
    assert topics == sorted(topics)
    assert text.index("--alpha_output") < text.index("--help_all")
    assert "--adam_beta1" not in text
    assert main(["distill", "--help_all"]) == 0
    assert "--adam_beta1" in capsys.readouterr().out


def test_docstring_entries():
    texts = argument_texts(
        "Sum.\n\nArgs:\n    a, b: Numbers: two\n        of them.\n    c: More.\n\nRaises:\n    X: No."
    )
    assert texts == {"a": "Numbers: two of them.", "b": "Numbers: two of them.", "c": "More."}


@pytest.mark.parametrize("name", ["", *COMMANDS])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_an_answer(name, flag, capsys):
    assert main([*name.split(), flag]) == 0
    assert "usage: hf-compress" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"hf-compress {hf_compress.__version__}"
    done = subprocess.run(
        [sys.executable, "-m", "hf_compress", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"hf-compress {hf_compress.__version__}"


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m hf_compress prune-weights --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("typed", "meant"), [
    ("fintune", "finetune"), ("prune_structure", "prune-structure"), ("prune-weight", "prune-weights"),
    ("evalute", "evaluate"), ("Report", "report"),
])  # fmt: skip
def test_near_commands_are_named(typed, meant, capsys):
    assert main([typed]) == 2
    assert last_line(capsys).endswith(f"Did you mean {meant!r}?")


def test_no_command_shows_the_commands(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.strip() == usage()


# Parsing


@dataclasses.dataclass
class First:
    """One.

    Args:
        seed: Where random numbers start.
    """

    seed: int = 3
    names: list[str] | None = None
    mode: str = "no"
    flag: bool = True
    rate: float = 0.5


@dataclasses.dataclass
class Second:
    seed: float = 0.5


def test_two_classes_with_one_field_are_refused():
    with pytest.raises(TypeError, match="seed is a field of First and of Second"):
        parse((First, Second), ["--seed", "1"], {})


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_has_a_field_twice(name):
    build_parser(list(commands.kinds_of(COMMANDS[name]).values()))


@pytest.mark.parametrize(("line", "expected"), [
    ("--seed=5", {"seed": 5}), ("--no_flag", {"flag": False}), ("--no-flag", {"flag": False}),
    ("--flag", {"flag": True}), ("--flag=false", {"flag": False}), ("--names a b", {"names": ["a", "b"]}),
    ("--rate -1e-3", {"rate": -1e-3}),
])  # fmt: skip
def test_flags(line, expected):
    parsed = parse((First,), line.split(), {})
    assert {name: getattr(parsed.values[0], name) for name in expected} == expected
    assert parsed.given == set(expected)


YAMLS = [
    ("seed: 4\nnames: [x, y]\nflag: no\nmode: 'no'\n", {"seed": 4, "names": ["x", "y"], "flag": False, "mode": "no"}),
    ("names:\n", {"names": None}),
    ("mode: --odd\n", {"mode": "--odd"}),
    ("1: 2\n", "1 is not an option"),
    ("null: 2\n", "None is not an option"),
    ("seed:\n", "seed has no value"),
    ("seed: [1]\n", "seed must be one value"),
    ("seed: {a: 1}\n", "seed must be text, a number"),
    ("names: [[a]]\n", "names must be text, a number"),
    ("names: []\n", "names has no value"),
    ("mode: no\n", "put the word in quotes"),
    ("mode: ''\n", "mode is empty"),
    ("mode: 2020-01-01\n", "mode must be text, a number"),
    ("seed: 1.5\n", "invalid int value"),
    ("sed: 1\n", "Did you mean 'seed'"),
    ("seed: 1\nseed: 2\n", "seed occurs twice"),
    ("config: b.yaml\n", "'config' is not an option"),
    ("a: [1\n", "not valid YAML"),
    ("\tx: 1\n", "not valid YAML"),
    ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ("- 1\n", "'name: value' lines"),
    ("", "'name: value' lines"),
    ("just words\n", "'name: value' lines"),
]


@pytest.mark.parametrize(("content", "expected"), YAMLS)
def test_yaml(tmp_path, content, expected):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            parse((First,), ["--config", str(file)], {"mode": "steps"})
        return
    parsed = parse((First,), ["--config", str(file)], {"mode": "steps"})
    assert {name: getattr(parsed.values[0], name) for name in expected} == expected
    assert parsed.given == set(expected)


def test_flags_win_over_yaml_over_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nmode: yaml\n")
    config = f"--config={tmp_path / 'a.yaml'}"
    values = parse((First,), [config, "--seed", "2"], {"mode": "default", "rate": 0.25}).values[0]
    assert (values.seed, values.mode, values.rate) == (2, "yaml", 0.25)


@pytest.mark.parametrize("line", [
    "--seed", "--seed=", "--seed one", "--seed 1 2", "stray", "-s 1", "--sed 1", "--config", "--config --seed",
    "--config=", "--config nowhere.yaml", "--config .", "--mode ", "--no_seed", "--flag maybe", "--names", "--", "---",
])  # fmt: skip
def test_every_typing_error_is_one_line(line):
    with pytest.raises(ValueError, match="."):
        parse((First,), line.split(" "), {})


# Whose fault


def deliberate():
    hf_compress.StructuredPruningConfig(mac_ratio=7.0)


def unpacking():
    a, b = (1,)
    return a, b


FAULTS = [
    (deliberate, 2),
    (lambda: open("/nowhere/at/all"), 2),  # noqa: SIM115
    (lambda: int("two"), 1),
    (unpacking, 1),
    (lambda: torch.zeros(2).reshape(3), 1),
    (lambda: torch.distributions.Normal(torch.zeros(1), torch.full((1,), -1.0)), 1),
    (lambda: {}["missing"], 1),
    (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 130),
]


@pytest.mark.parametrize(("fault", "code"), FAULTS)
@pytest.mark.parametrize("with_traceback", [False, True])
def test_exit_codes(monkeypatch, capsys, fault, code, with_traceback):
    monkeypatch.setattr(commands, "run_stage", lambda stage, arguments: fault())
    line = ["finetune", "--model_name_or_path", "x", "--output_dir", "y", *["--traceback"] * with_traceback]
    assert main(line) == code
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith("hf-compress: ")
    assert ("Traceback" in err) == (code == 1 or (with_traceback and code == 2))


def test_an_expression_of_our_own_that_fails_is_a_bug(monkeypatch):
    """The innermost frame is ours, but no `raise` statement of ours threw it."""
    monkeypatch.setattr("hf_compress.core.batches.math", None, raising=False)
    with pytest.raises(ValueError, match="invalid literal") as caught:
        exec(compile("int('x')", hf_compress.__file__, "exec"), {})
    assert not is_bad_input(caught.value)
    with pytest.raises(ValueError, match="said") as caught:
        exec(compile("raise ValueError('said')", hf_compress.__file__, "exec"), {})
    assert is_bad_input(caught.value)


def test_methods_of_other_packages_refuse_input_as_ours_do(monkeypatch, tmp_path):
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "__init__.py").write_text(
        "class Config: pass\ndef refuse():\n    raise ValueError('said')\ndef fail():\n    int('x')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    added = importlib.import_module("added")
    for function, expected in ((added.refuse, True), (added.fail, False)):
        with pytest.raises(ValueError, match="said|invalid literal") as caught:
            function()
        assert not is_bad_input(caught.value)
        with monkeypatch.context() as patch:
            patch.setitem(hf_compress.METHODS, "added", types.SimpleNamespace(config_class=added.Config))
            assert is_bad_input(caught.value) == expected
