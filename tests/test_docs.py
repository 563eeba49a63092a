"""The documentation says what is there: its links, commands, messages and options exist, and the site builds."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest
from transformers import TrainingArguments

import hf_compress
from hf_compress.cli.completion import proposals
from hf_compress.cli.help import usage
from hf_compress.cli.options import stage_groups
from hf_compress.stages.table import all_stages
from tests.pages import PAGES, ROOT, anchors, cells, commands, links, text_of


every_page = pytest.mark.parametrize("page", PAGES)
COMMANDS = {stage.command: stage for stage in all_stages().values()}


@every_page
def test_links_lead_somewhere(page):
    for path, part in links(page):
        assert path.exists(), path
        assert not part or path.suffix != ".md" or part in anchors(path), f"{path} has no heading {part!r}"


@every_page
def test_commands_and_flags_exist(page):
    for _, name, *rest in commands(page, inline=True):
        if name.startswith(("-", "<")) or name.isupper():
            continue
        assert re.search(rf"^  {re.escape(name)} ", usage(), re.MULTILINE), name
        if name in COMMANDS:
            known = {*proposals([name, "--"]), "--help_all"}
            assert [word for word in rest if word.startswith("--") and word not in known] == []


def test_their_check_can_fail():
    assert "--mac_ration" not in proposals(["prune-structure", "--"])
    assert anchors(ROOT / "CONTRIBUTING.md") >= {"what-is-equal-to-what", "a-kind-of-task"}
    assert len([words for page in PAGES for words in commands(page)]) > 20


# Messages


def template(node):
    """The text of a message in the source, with `...` for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return None


def test_messages_are_those_of_the_package():
    texts = {
        text
        for path in (ROOT / "hf_compress").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (text := template(node)) and len(text) > 12
    }
    messages = [row[0].strip("`") for row in cells("docs/errors.md")]
    assert len(messages) > 35
    # A message may stop at its first sentence.
    unknown = [m for m in messages if not any(text.startswith(m.removesuffix("...")) for text in texts)]
    assert unknown == []


# Options and names of other packages


def ours():
    """Names that the right column of a table may use as ours: public names, fields, options, commands, methods."""
    options = {
        option.name for stage in all_stages().values() for g in stage_groups(stage).values() for option in g.options
    }
    fields = {name for method in hf_compress.METHODS.values() for name in vars(method.config_class())}
    arguments = set(TrainingArguments.__dataclass_fields__)
    kinds = set(hf_compress.ProximalArguments.__dataclass_fields__)
    return {*hf_compress.__all__, *options, *fields, *arguments, *kinds, *COMMANDS, *hf_compress.METHODS}


@pytest.mark.parametrize("page", ["docs/migration.md", "examples/README.md"])
def test_what_replaces_other_options_exists(page):
    known, named = ours(), set()
    for *_, here in cells(page):
        for span in re.findall(r"`([^`]+)`", here):
            named |= set(re.findall(r"--([a-z_]\w*)", span))
            named |= set(re.findall(r"(?<![\w.\-])([a-z]\w*)=", span))
            named |= set(re.findall(r"\b([A-Z][a-z]+\w*(?:Trainer|Config|Arguments|Callback|Model))\b", span))
    assert len(named) > 25
    # Parameters of functions, arguments of programs in examples/, and a class of transformers.
    others = {
        "config",
        "context",
        "data",
        "groupsize",
        "int8",
        "model",
        "nearest",
        "nproc_per_node",
        "nsamples",
        "out",
        "output",
        "sep_pair",
        "student_reinit",
        "task",
        "TrainerCallback",
        "TrainingArguments",
    }
    assert sorted(named - known - others) == []


# The site


def site_module(name):
    """A module of the site's own programs."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_reference():
    pytest.importorskip("mkdocs")
    pages = site_module("pages").api_pages()
    shown = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), re.MULTILINE)
    assert len(shown) == len(set(shown))
    # A module, whose names have a page.
    assert set(hf_compress.__all__) - {path.rpartition(".")[2] for path in shown} == {"students"}
    assert set(pages) <= {
        f"reference/{line}.md" for line in re.findall(r"reference/(\w+)\.md", text_of(".mkdocs.yml"))
    }


def test_every_page_can_be_reached():
    navigation = set(re.findall(r"([\w/]+\.md)$", text_of(".mkdocs.yml"), re.MULTILINE))
    shown = site_module("pages").SHOWN if importlib.util.find_spec("mkdocs") else {}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} | set(shown.values()) <= navigation


def test_links_are_led_to_pages():
    pytest.importorskip("mkdocs")
    redirected = site_module("pages").redirected
    text = "[a](docs/export.md#x), [b](hf_compress/methods/linformer/README.md), [c](https://d.org), "
    text += "[d](examples/recipes)"
    assert redirected(text, "README.md") == (
        "[a](export.md#x), [b](methods/linformer.md), [c](https://d.org), [d](source/examples/recipes.md)"
    )
    assert redirected("[a](../../../docs/export.md)", "hf_compress/methods/linformer/README.md") == "[a](../export.md)"
    assert redirected("```\n[a](docs/export.md)\n```", "README.md") == "```\n[a](docs/export.md)\n```"


def test_parameters_that_share_a_line_stand_alone():
    pytest.importorskip("griffe")
    rewritten = site_module("docstrings").for_the_reference
    text = "Sum.\n\nArgs:\n    a, b: Numbers\n        to add.\n    c: More.\n\nExample:\n    >>> 1\n    1"
    assert rewritten(text).splitlines() == [
        "Sum.", "", "Args:", "    a: Numbers", "        to add.", "    b: Numbers", "        to add.", "    c: More.",
        "", "Examples:", "    >>> 1", "    1",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocs")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "-f",
        ".mkdocs.yml",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    html = {path.relative_to(tmp_path / "site"): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert len(html) > 40
    for path, text in html.items():
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//[^\s>]+", text), path
        assert not re.findall(r"<link[^>]+rel=\"?stylesheet[^>]+href=\"?(?:https?:)?//[^\s>]+", text), path
    assert "multiply-accumulates" in (tmp_path / "site" / "search" / "search_index.json").read_text()
