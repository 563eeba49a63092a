"""Stages are one table: one signature, one name for each thing, and defaults that depend on other options."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from transformers import TrainingArguments

from hf_compress.cli import commands
from hf_compress.cli.main import main
from hf_compress.cli.options import stage_groups
from hf_compress.cli.output import recovery_hint
from hf_compress.methods import METHODS
from hf_compress.methods.linformer import LinformerConfig
from hf_compress.methods.structured_pruning import measuring
from hf_compress.stages.arguments import DeviceArguments, OutputArguments, StageArguments
from hf_compress.stages.finetune import Finetune
from hf_compress.stages.models import ModelArguments
from hf_compress.stages.report import Report, ReportArguments
from hf_compress.stages.table import STAGES, all_stages
from hf_compress.tasks.arguments import DataArguments
from tests.test_bad_input import write_model


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_stage_is_a_function_of_one_dataclass(stage):
    assert issubclass(stage.arguments_class, StageArguments)
    [parameter] = inspect.signature(stage.function, eval_str=True).parameters.values()
    assert parameter.annotation is stage.arguments_class
    # What help reads from the source is what parsing finds by importing.
    kinds = commands.kinds_of(stage)
    assert list(stage_groups(stage)) == list(kinds)
    options = [field.name for kind in kinds.values() for field in dataclasses.fields(kind)]
    # What uploads files computes nothing.
    assert "device" in options or stage.name == "push"
    assert "output_dir" in options or stage.name == "evaluate"
    assert set(stage.defaults) <= set(options)


def test_every_method_has_a_stage():
    assert set(METHODS) <= set(all_stages())


def test_the_published_start_of_linear_attention_is_the_configs_own():
    [(option, replaced)] = STAGES["linformer"].defaults_when.items()
    published = LinformerConfig()
    assert option == ("initialization", published.initialization)
    assert replaced == {name: getattr(published, name) for name in replaced}
    assert set(replaced) | {"initialization"} == set(STAGES["linformer"].defaults)


def bundle(tmp_path, output="out", **training):
    return Finetune(
        model=ModelArguments(str(tmp_path / "model")), data=DataArguments(), device=DeviceArguments("cpu"),
        training=TrainingArguments(str(tmp_path / output), **training),
    )  # fmt: skip


def test_arguments_are_checked_when_they_are_made(tmp_path):
    (tmp_path / "model").mkdir()
    found = bundle(tmp_path, use_cpu=True, learning_rate=0.5)
    assert found.models_read() == {"model_name_or_path": str(tmp_path / "model")}
    assert {"learning_rate", "device", "output_dir"} <= found.chosen()
    assert "max_length" not in found.chosen()
    with pytest.raises(ValueError, match="is the folder of model_name_or_path"):
        bundle(tmp_path, "model", use_cpu=True)
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        bundle(tmp_path, use_cpu=True, gradient_accumulation_steps=0)
    with pytest.raises(ValueError, match="device must be auto or one of this machine"):
        DeviceArguments("nowhere")


def test_a_report_does_not_replace_a_model(tmp_path):
    comparison = ReportArguments([str(tmp_path)])
    with pytest.raises(ValueError, match="is the folder of the model"):
        Report(comparison=comparison, data=DataArguments(), output=OutputArguments(str(tmp_path)))


@pytest.mark.parametrize("name", ["finetune", "prune-tokens", "joint-distill"])
def test_device_cpu_trains_on_the_cpu(monkeypatch, tmp_path, name):
    seen = []
    monkeypatch.setattr(commands, "run_stage", lambda stage, arguments: seen.append(arguments) or {})
    stage = next(stage for stage in STAGES.values() if stage.command == name)
    teacher = "--teacher_name_or_path b" if name == "joint-distill" else ""
    line = f"--model_name_or_path a --data_dir d --output_dir {tmp_path} --device cpu {teacher}"
    commands.run(stage, line.split())
    assert seen[0].training_arguments.use_cpu
    assert seen[0].training_arguments.device.type == "cpu"


def test_too_few_tokens_are_found_before_the_pass_over_the_data(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "model")
    rows = [f"{'good' if i % 2 else 'bad'} w{i % 9}\t{i % 2}" for i in range(40)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "collect_inputs", None)
    line = "prune-structure --model_name_or_path model --data_dir . --output_dir out --max_length 16 --device cpu"
    assert main([*line.split(), "--calibration_samples", "4"]) == 2
    assert "data must hold at least 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("scores", "error", "said"), [
    ((0.978, 0.972, 0.966), 0.004, True), ((0.978, 0.90, 0.91), 0.02, False), ((0.978, 0.97, 0.99), 0.001, False),
])  # fmt: skip
def test_the_demo_explains_a_recovery_that_does_not_show(scores, error, said):
    models = [{"metrics": {"accuracy": score}, "standard_error": error} for score in scores]
    hint = recovery_hint(models, "accuracy", 320)
    assert ("320 texts (one text is 0.0031)" in hint) == said
    assert bool(hint) == said
