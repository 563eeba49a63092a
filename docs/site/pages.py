"""Pages of the site that are not files of `docs`, and links that work on both sides.

Methods, README and others are shown where they are, not copied: their text stays beside the code. Links in Markdown
are written for readers of the source tree; here they are led to the page that shows the same file. Files without a
page of their own (programs, recipes) get one as soon as a page links to them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from hf_compress.cli.help import command_help, demo_help, recipe_help, usage
from hf_compress.stages.table import all_stages


ROOT = Path(__file__).resolve().parents[2]
# File of the source tree -> page of the site, besides those of `docs`.
SHOWN = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
    "examples/README.md": "examples.md",
    **{
        f"hf_compress/methods/{path.parent.name}/README.md": f"methods/{path.parent.name}.md"
        for path in (ROOT / "hf_compress" / "methods").glob("*/README.md")
    },
}
# Prefix of the module that defines a public name -> page of the API reference, and its title; the longest one counts.
REFERENCE = {
    "": ("verbs", "Verbs and records"),
    "methods": ("configs", "Methods: configs and callbacks"),
    "training": ("trainers", "Trainers and their arguments"),
    "students": ("students", "Students"),
    "tasks": ("tasks", "Tasks and data"),
    "report": ("measures", "Measuring"),
    "core.cost": ("measures", "Measuring"),
    "export": ("export", "Export"),
    "vocabulary": ("configs", "Methods: configs and callbacks"),
}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".cfg": "ini"}


def page_of(source: str) -> str:
    """Where the site shows a file.

    Args:
        source: Its path in the source tree.
    """
    if source in SHOWN:
        return SHOWN[source]
    if source.startswith("docs/") and source.endswith(".md"):
        return source.removeprefix("docs/")
    return f"source/{source}" if _is_image(source) else f"source/{source}.md"


def _is_image(source: str) -> bool:
    return source.endswith((".png", ".svg"))


def linked(markdown: str, source: str) -> dict[str, str]:
    """Links of a page to files -> the file in the source tree.

    Args:
        markdown: The page's text.
        source: The file that holds it, in the source tree.
    """
    folder = posixpath.dirname(source)
    text = _FENCE.sub("", markdown)
    return {match[1]: posixpath.normpath(posixpath.join(folder, match[1])) for match in _LINK.finditer(text)}


def redirected(markdown: str, source: str) -> str:
    """A page's text with its links led to pages of the site."""
    targets = linked(markdown, source)
    here = posixpath.dirname(page_of(source))

    def page(match: re.Match[str]) -> str:
        if match[1] not in targets or not (ROOT / targets[match[1]]).exists():
            # MkDocs says which page has the broken link.
            return match[0]
        return posixpath.relpath(page_of(targets[match[1]]), here or ".") + (match[2] or "")

    return _LINK.sub(page, markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs`."""
    sources = {file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()}
    for source, page in SHOWN.items():
        sources[page] = source
    waiting = [source for source in sources.values() if (ROOT / source).is_file()]
    texts: dict[str, str] = {}
    while waiting:
        source = waiting.pop()
        page, path = page_of(source), ROOT / source
        if _is_image(source):
            if files.get_file_from_path(page) is None:
                files.append(File.generated(config, page, abs_src_path=str(path)))
            continue
        texts[page] = path.read_text(encoding="utf-8") if source.endswith(".md") else _listing(source)
        if source.endswith(".md"):
            targets = set(linked(texts[page], source).values())
            waiting += [t for t in sorted(targets) if (ROOT / t).exists() and page_of(t) not in texts]
        texts[page] = redirected(texts[page], source)
    texts |= api_pages() | {"reference/commands.md": commands_page()}
    for page, text in texts.items():
        known = files.get_file_from_path(page)
        if known is not None:
            files.remove(known)
        files.append(File.generated(config, page, content=text))
    return files


def _listing(source: str) -> str:
    """A file as a page; of a folder, the files in it."""
    path = ROOT / source
    if path.is_dir():
        inside = sorted(item for item in path.iterdir() if item.suffix in _LANGUAGES or item.suffix == ".md")
        return "\n\n".join([f"# {source}", *(_code(f"{source}/{item.name}", 2) for item in inside)])
    return _code(source, 1)


def _code(source: str, level: int) -> str:
    text = (ROOT / source).read_text(encoding="utf-8").rstrip()
    return f"{'#' * level} {source}\n\n````{_LANGUAGES.get(Path(source).suffix, 'text')}\n{text}\n````\n"


def public_names() -> dict[str, str]:
    """Public name -> path of its definition, from the list that the package itself reads."""
    stub = (ROOT / "hf_compress" / "__init__.pyi").read_text(encoding="utf-8")
    found = re.findall(r"^from \.([\w.]*) import (\w+) as \w+$", stub, re.MULTILINE)
    found += [("students." + module, name) for module, name in _of_students()]
    return {name: f"hf_compress.{module}.{name}" for module, name in found if module}


def _of_students() -> list[tuple[str, str]]:
    stub = (ROOT / "hf_compress" / "students" / "__init__.pyi").read_text(encoding="utf-8")
    return re.findall(r"^from \.(\w+) import (\w+) as \w+$", stub, re.MULTILINE)


def api_pages() -> dict[str, str]:
    """The pages of the API reference, from the docstrings of the public names."""
    pages: dict[str, str] = {}
    for path in sorted(set(public_names().values()), key=str.lower):
        place = path.removeprefix("hf_compress.")
        prefix = max((key for key in REFERENCE if not key or f"{place}.".startswith(f"{key}.")), key=len)
        name, title = REFERENCE[prefix]
        page = f"reference/{name}.md"
        pages.setdefault(page, f"# {title}\n")
        pages[page] += f"\n::: {path}\n"
    return pages


def commands_page() -> str:
    """What `--help` of every command prints, and what recipes call it: their stages have the same options."""
    parts = [
        "# Commands and stages of recipes",
        f"```text\n{usage()}\n```",
        "## run",
        f"```text\n{recipe_help()}\n```",
    ]
    parts += ["## demo", f"```text\n{demo_help()}\n```"]
    for stage in all_stages().values():
        parts += [f"## {stage.command}", f"In recipes: `stage: {stage.name}`.", f"```text\n{command_help(stage)}\n```"]
    return "\n\n".join(parts)
