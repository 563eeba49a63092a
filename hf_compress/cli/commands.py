"""One function a command: parse, run the stage, print what a person wants to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_compress.cli.parsing import parse
from hf_compress.methods.linformer import LinformerConfig
from hf_compress.methods.structured_pruning import StructuredPruningConfig
from hf_compress.methods.weight_pruning import WeightPruningConfig
from hf_compress.stages import demo as demo_stage
from hf_compress.stages import evaluate as evaluate_stage
from hf_compress.stages import finetune as finetune_stage
from hf_compress.stages import linearize as linearize_stage
from hf_compress.stages import prune_structure as prune_stage
from hf_compress.stages import prune_tokens as tokens_stage
from hf_compress.stages import prune_weights as prune_weights_stage
from hf_compress.stages.models import ModelArguments
from hf_compress.tasks.sources import DataArguments
from hf_compress.training.arguments import DistillationArguments, JointTeacherArguments, SnapshotTeacherArguments


# What suits fine-tuning of an encoder better than the defaults of TrainingArguments.
_TRAINING = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_steps": 50,
    "report_to": "none",
    # Pinned memory only exists beside an accelerator; asking for it elsewhere warns at every epoch.
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def _print_metrics(results: Mapping[str, Any]) -> None:
    for name, value in results.items():
        if isinstance(value, int | float):
            print(f"{name:32s} {value:.4f}" if isinstance(value, float) else f"{name:32s} {value}")


def finetune(arguments: Sequence[str]) -> None:
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    model, data, training = parse(kinds, arguments, "hf-compress finetune", _TRAINING)
    _print_metrics(finetune_stage.finetune(model, data, training))
    print(f"saved to {training.output_dir}")


def distill(arguments: Sequence[str]) -> None:
    kinds = (ModelArguments, finetune_stage.TeacherArguments, DataArguments, DistillationArguments)
    model, teacher, data, training = parse(kinds, arguments, "hf-compress distill", _TRAINING)
    _print_metrics(finetune_stage.distill(model, teacher, data, training))
    print(f"saved to {training.output_dir}")


def prune_structure(arguments: Sequence[str]) -> None:
    kinds = (ModelArguments, DataArguments, prune_stage.CalibrationArguments, StructuredPruningConfig)
    model, data, calibration, config = parse(kinds, arguments, "hf-compress prune-structure", {})
    results = prune_stage.prune_structure(model, data, calibration, config)
    before, after = results["before"], results["after"]
    print(f"{'':24s}{'before':>14s}{'after':>14s}")
    print(f"{'parameters':24s}{before['params']:14,d}{after['params']:14,d}")
    print(f"{'multiply-accumulates':24s}{before['macs']:14.4g}{after['macs']:14.4g}")
    for title, key in (("heads", "heads_per_layer"), ("neurons", "neurons_per_layer")):
        print(f"{title + ' left by layer':24s}{' '.join(map(str, results['step'][key]))}")
    print(
        f"{results['mac_ratio']:.4f} of the arithmetic kept, {results['seconds']:.1f} s; "
        f"saved to {calibration.output_dir}"
    )


def prune_weights(arguments: Sequence[str]) -> None:
    pruning = prune_weights_stage.PruningArguments
    kinds = (ModelArguments, pruning, DataArguments, DistillationArguments, WeightPruningConfig)
    model, options, data, training, config = parse(kinds, arguments, "hf-compress prune-weights", _TRAINING)
    results = prune_weights_stage.prune_weights(model, options, data, training, config)
    for name, sparsity in results["sparsity_by_layer"].items():
        print(f"{name:56s} {sparsity:.4f}")
    _print_metrics(results)
    if options.slim:
        _print_slimmed(results["slimmed"])
    print(f"saved to {training.output_dir}")


def _print_slimmed(slimmed: Mapping[str, Any] | None) -> None:
    if slimmed is None:
        print("slim: nothing to remove, no neuron and no whole head is zero; the zeros stay in ordinary weights")
        return
    before, after = slimmed["before"], slimmed["after"]
    print(f"slim: parameters {before['params']:,d} -> {after['params']:,d}, ", end="")
    print(f"multiply-accumulates {before['macs']:.4g} -> {after['macs']:.4g}")
    print(f"heads left by layer    {' '.join(map(str, slimmed['heads_per_layer']))}")
    print(f"neurons left by layer  {' '.join(map(str, slimmed['neurons_per_layer']))}")


def linearize(arguments: Sequence[str]) -> None:
    kinds = (ModelArguments, DataArguments, linearize_stage.OutputArguments, LinformerConfig)
    model, data, output, config = parse(kinds, arguments, "hf-compress linearize", {})
    results = linearize_stage.linearize(model, data, output, config)
    print(f"parameters {results['params']['before']:,d} -> {results['params']['after']:,d}")
    for length, ratio in results["mac_ratio_by_length"].items():
        verdict = "" if ratio < 1 else " (more than dense: too short for this projected_length)"
        print(f"{length:6d} tokens: {ratio:.3f} of the dense arithmetic{verdict}")
    print(f"saved to {output.output_dir}; train it with distill, joint-distill or snapshot-distill")


def joint_distill(arguments: Sequence[str]) -> None:
    kinds = (ModelArguments, finetune_stage.TeacherArguments, DataArguments, JointTeacherArguments)
    model, teacher, data, training = parse(kinds, arguments, "hf-compress joint-distill", _TRAINING)
    _print_metrics(linearize_stage.joint_distill(model, teacher, data, training))
    print(f"saved to {training.output_dir}")


def snapshot_distill(arguments: Sequence[str]) -> None:
    kinds = (ModelArguments, DataArguments, SnapshotTeacherArguments)
    model, data, training = parse(kinds, arguments, "hf-compress snapshot-distill", _TRAINING)
    _print_metrics(linearize_stage.snapshot_distill(model, data, training))
    print(f"saved to {training.output_dir}")


def prune_tokens(arguments: Sequence[str]) -> None:
    kinds = (ModelArguments, tokens_stage.TokenPruningArguments, DataArguments, TrainingArguments)
    model, pruning, data, training = parse(kinds, arguments, "hf-compress prune-tokens", _TRAINING)
    _print_metrics(tokens_stage.prune_tokens(model, pruning, data, training))
    print(f"saved to {training.output_dir}")


def evaluate(arguments: Sequence[str]) -> None:
    args, data = parse((evaluate_stage.EvaluateArguments, DataArguments), arguments, "hf-compress evaluate", {})
    for name, metrics in evaluate_stage.evaluate_models(args, data).items():
        print(name)
        _print_metrics(metrics)


def _print_report(folder: str) -> None:
    print(Path(folder, "report.md").read_text())
    print(f"table, report.json and plots are in {folder}")


def report(arguments: Sequence[str]) -> None:
    args, data = parse((evaluate_stage.ReportArguments, DataArguments), arguments, "hf-compress report", {})
    evaluate_stage.report(args, data)
    _print_report(args.output_dir)


def demo(arguments: Sequence[str]) -> None:
    args, data = parse((demo_stage.DemoArguments, DataArguments), arguments, "hf-compress demo", {})
    result = demo_stage.demo(args, data)
    _print_report(str(Path(args.output_dir) / "report"))
    equal = "bit-equal logits" if result["reload_equal"] else "DIFFERENT logits"
    print(f"reloaded with plain from_pretrained in a fresh process: {equal}")
    print(f"{result['minutes']} minutes")
