"""Which code decides the result of a stage: no less than what it imports when it runs, and not all of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_compress.recipes import sources
from hf_compress.stages.table import STAGES


LOADED = """
import sys
from hf_compress.stages.table import STAGES
stage = STAGES[sys.argv[1]]
stage.function, stage.arguments_class
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
print(*(name for name in sys.modules if name.partition(".")[0] == "hf_compress"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "report", "export", "proximal"])
def test_all_that_a_process_imports_counts(name):
    done = subprocess.run([sys.executable, "-c", LOADED, name], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert len(imported) > 50
    assert imported - sources.modules_of(STAGES[name]) == set()


def test_what_a_stage_cannot_run_does_not_count():
    modules = {name: sources.modules_of(stage) for name, stage in STAGES.items()}
    for name in ("finetune", "distill", "structured_pruning"):
        assert not [
            module for module in modules[name] if module.startswith(("hf_compress.hub.", "hf_compress.recipes."))
        ]
        assert "hf_compress.export.folder" not in modules[name]
        assert "hf_compress.report.page" not in modules[name]
        assert "hf_compress.core.surgery" in modules[name]
    assert "hf_compress.report.page" in modules["report"]
    assert "hf_compress.export.folder" in modules["export"]
    assert "hf_compress.training.proximal" in modules["proximal"]
    assert "hf_compress.training.proximal" not in modules["structured_pruning"]


def test_a_changed_file_changes_the_stages_that_can_run_it(monkeypatch, tmp_path):
    def digests():
        sources._digest.cache_clear()
        return {name: sources.sources_of(STAGES[name]) for name in ("finetune", "report", "export")}

    before, files = digests(), dict(sources._files())
    assert digests() == before
    for module, changed in (("hf_compress.report.page", {"report"}), ("hf_compress.core.surgery", set(before))):
        copy = tmp_path / f"{module}.py"
        copy.write_text(files[module].read_text() + "\n# changed\n")
        monkeypatch.setattr(sources, "_files", lambda module=module, copy=copy: {**files, module: copy})
        now = digests()
        assert {name for name in now if now[name] != before[name]} == changed
    monkeypatch.undo()
    assert digests() == before
