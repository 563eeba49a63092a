"""One function a command: parse, run the stage, print what a person wants to know."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_compress.cli.parsing import Parsed, parse
from hf_compress.cli.table import COMMANDS, LINEAR_START, PUBLISHED_TRAINING
from hf_compress.stages import demo as demo_stage
from hf_compress.stages import evaluate as evaluate_stage
from hf_compress.stages import finetune as finetune_stage
from hf_compress.stages import linearize as linearize_stage
from hf_compress.stages import prune_structure as prune_stage
from hf_compress.stages import prune_tokens as tokens_stage
from hf_compress.stages import prune_weights as prune_weights_stage
from hf_compress.training.preflight import check_training


def run(name: str, arguments: Sequence[str]) -> None:
    """Parse what stands after a command and run it.

    Args:
        name: One of `COMMANDS`.
        arguments: Flags and values.
    """
    command = COMMANDS[name]
    defaults = dict(command.defaults)
    if "report_to" in defaults:
        # Pinned memory only exists beside an accelerator; asking for it elsewhere warns at every epoch.
        defaults["dataloader_pin_memory"] = torch.cuda.is_available()
    parsed = parse(dataclasses_of(name), arguments, defaults)
    published = [PUBLISHED_TRAINING.get(getattr(values, "compat", None), {}) for values in parsed.values]
    for values in parsed.values:
        if isinstance(values, TrainingArguments):
            for option, value in (pair for constants in published for pair in constants.items()):
                if option not in parsed.given:
                    setattr(values, option, value)
            check_training(values)
    globals()[name.replace("-", "_")](parsed)


def dataclasses_of(name: str) -> tuple[type, ...]:
    """The dataclasses that a command's flags fill."""
    paths = (kind.rpartition(".") for kind in COMMANDS[name].kinds.values())
    return tuple(getattr(import_module(module), kind) for module, _, kind in paths)


def training_help() -> str:
    """The flags of `transformers.TrainingArguments`."""
    return HfArgumentParser((TrainingArguments,), add_help=False, usage=argparse.SUPPRESS).format_help()


def _print_metrics(results: Mapping[str, Any]) -> None:
    for name, value in results.items():
        if isinstance(value, int | float):
            print(f"{name:32s} {value:.4f}" if isinstance(value, float) else f"{name:32s} {value}")


def finetune(parsed: Parsed) -> None:
    model, data, training = parsed.values
    _print_metrics(finetune_stage.finetune(model, data, training))
    print(f"saved to {training.output_dir}")


def distill(parsed: Parsed) -> None:
    model, teacher, data, training = parsed.values
    _print_metrics(finetune_stage.distill(model, teacher, data, training))
    print(f"saved to {training.output_dir}")


def prune_structure(parsed: Parsed) -> None:
    model, config, calibration, data = parsed.values
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


def prune_weights(parsed: Parsed) -> None:
    model, config, options, data, training = parsed.values
    results = prune_weights_stage.prune_weights(model, options, data, training, config, parsed.given)
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


def linearize(parsed: Parsed) -> None:
    model, config, output, data = parsed.values
    if config.initialization == "normal":
        # The other parts of the best start belong to `pooling`.
        fields = (field for field in dataclasses.fields(config) if field.name in LINEAR_START)
        published = {field.name: field.default for field in fields if field.name not in parsed.given}
        config = dataclasses.replace(config, **published)
    results = linearize_stage.linearize(model, data, output, config)
    print(f"parameters {results['params']['before']:,d} -> {results['params']['after']:,d}")
    if "texts" in results:
        texts = results["texts"]
        print(
            f"texts of this task ({texts['median_tokens']} tokens in the median, {texts['longest_tokens']} at most): "
            f"{texts['mac_ratio']:.3f} of the dense arithmetic"
        )
    for length, ratio in results["mac_ratio_by_length"].items():
        verdict = "" if ratio < 1 else " (more than dense: too short for this projected_length)"
        print(f"{length:6d} tokens: {ratio:.3f} of the dense arithmetic{verdict}")
    print(f"saved to {output.output_dir}; train it with distill, joint-distill or snapshot-distill")


def joint_distill(parsed: Parsed) -> None:
    model, teacher, data, training = parsed.values
    _print_metrics(linearize_stage.joint_distill(model, teacher, data, training))
    print(f"saved to {training.output_dir}")


def snapshot_distill(parsed: Parsed) -> None:
    model, data, training = parsed.values
    _print_metrics(linearize_stage.snapshot_distill(model, data, training))
    print(f"saved to {training.output_dir}")


def prune_tokens(parsed: Parsed) -> None:
    model, pruning, data, training = parsed.values
    _print_metrics(tokens_stage.prune_tokens(model, pruning, data, training, parsed.given))
    print(f"saved to {training.output_dir}")


def evaluate(parsed: Parsed) -> None:
    args, data = parsed.values
    for name, metrics in evaluate_stage.evaluate_models(args, data).items():
        print(name)
        _print_metrics(metrics)


def _print_report(folder: str) -> None:
    print(Path(folder, "report.md").read_text())
    print(f"table, report.json and plots are in {folder}")


def report(parsed: Parsed) -> None:
    args, data = parsed.values
    evaluate_stage.report(args, data)
    _print_report(args.output_dir)


def demo(parsed: Parsed) -> None:
    args, data = parsed.values
    result = demo_stage.demo(args, data)
    _print_report(str(Path(args.output_dir) / "report"))
    reload = result["reload"]
    weights = "bit-equal weights" if reload["weights_equal"] else "DIFFERENT weights"
    logits = f"logits {'equal to rounding' if reload['equal'] else 'DIFFERENT'} (by {reload['logits_differ_by']:.1e})"
    print(f"reloaded with plain from_pretrained in a fresh process: {weights}, {logits}")
    print(f"{result['minutes']} minutes")
