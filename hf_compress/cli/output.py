"""Prints the results of a command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hf_compress.stages.arguments import StageArguments
from hf_compress.stages.table import Stage


def print_results(stage: Stage, arguments: StageArguments, results: Mapping[str, Any]) -> None:
    """Print the main results of a stage.

    Args:
        stage: The stage that was run.
        arguments: Its arguments.
        results: Its results.
    """
    _PRINTERS.get(stage.name, _print_compressed if stage.method else _print_trained)(arguments, results)


def _print_metrics(results: Mapping[str, Any]) -> None:
    for name, value in results.items():
        if isinstance(value, int | float):
            number = f"{value:.4f}" if isinstance(value, float) else str(value)
            of_class = f"  (of the class {results['positive_class']!r})" if _is_f1_of_a_class(name, results) else ""
            print(f"{name:32s} {number}{of_class}")


def _is_f1_of_a_class(name: str, results: Mapping[str, Any]) -> bool:
    return name.removeprefix("eval_") == "f1" and "positive_class" in results


def _print_saved(arguments: StageArguments, hint: str = "") -> None:
    print(f"saved to {arguments.output_dir}{hint}")


def _print_trained(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    _print_metrics(results)
    _print_saved(arguments)


def _print_cost(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    print(f"{'':24s}{'before':>14s}{'after':>14s}")
    print(f"{'parameters':24s}{before['params']:14,d}{after['params']:14,d}")
    # Not counted of a model that is not in memory.
    counted = None not in (before["nonzero_params"], after["nonzero_params"])
    if counted and before["nonzero_params"] - before["params"] != after["nonzero_params"] - after["params"]:
        print(f"{'non-zero parameters':24s}{before['nonzero_params']:14,d}{after['nonzero_params']:14,d}")
    if before["macs"] is not None and after["macs"] is not None:
        print(f"{'multiply-accumulates':24s}{before['macs']:14.4g}{after['macs']:14.4g}")


def _print_sizes(step: Mapping[str, Any]) -> None:
    for title, key in (("heads", "heads_per_layer"), ("neurons", "neurons_per_layer")):
        print(f"{title + ' left by layer':23s}{' '.join(map(str, step[key]))}")


def _print_compressed(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    step = dict(results["step"])
    print(f"{step.pop('method')}: {json.dumps(step)}")
    _print_cost(results["before"], results["after"])
    print(f"{results['seconds']:.1f} s; ", end="")
    _print_saved(arguments)


def _print_quantized(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    step, before, after = dict(results["step"]), results["before"], results["after"]
    print(f"{step.pop('method')}: {json.dumps(step)}")
    print(f"{before['bytes']:,d} bytes of weights became {after['bytes']:,d} ({after['bytes'] / before['bytes']:.3f})")
    print(f"{results['seconds']:.1f} s; ", end="")
    _print_saved(arguments)


def _print_pruned_structure(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    _print_cost(results["before"], results["after"])
    _print_sizes(results["step"])
    print(f"{results['mac_ratio']:.4f} of the arithmetic kept, {results['seconds']:.1f} s; ", end="")
    _print_saved(arguments)


def _print_pruned_vocabulary(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    before, after = results["before"], results["after"]
    print(f"{results['texts']:,d} texts read\n{'':24s}{'before':>14s}{'after':>14s}")
    for title, key in (("tokens", "tokens"), ("parameters", "params"), ("bytes", "bytes")):
        print(f"{title:24s}{before[key]:14,d}{after[key]:14,d}")
    print(f"{results['seconds']:.1f} s; ", end="")
    _print_saved(arguments, " with its tokenizer")


def _print_pruned_weights(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    print(sparsity_line(results["sparsity_by_layer"]))
    _print_metrics(results)
    if "slimmed" in results:
        _print_slimmed(results["slimmed"])
    _print_saved(arguments)


def sparsity_line(by_weight: Mapping[str, float]) -> str:
    """Summarise the sparsity of all prunable weights in one line; `results.json` lists them.

    Example:
        >>> sparsity_line({"query": 0.5, "key": 0.5})
        'sparsity of 2 prunable weights: 0.5000 each (sparsity_by_layer in results.json)'
        >>> sparsity_line({"query": 0.25, "key": 0.75, "value": 0.5})
        'sparsity of 3 prunable weights: 0.2500 to 0.7500, median 0.5000 (sparsity_by_layer in results.json)'
    """
    values = sorted(by_weight.values())
    if not values:
        return "no weight was prunable"
    spread = f"{values[0]:.4f} to {values[-1]:.4f}, median {median(values):.4f}"
    if f"{values[0]:.4f}" == f"{values[-1]:.4f}":
        spread = f"{values[0]:.4f} each"
    return f"sparsity of {len(values)} prunable weights: {spread} (sparsity_by_layer in results.json)"


def _print_slimmed(slimmed: Mapping[str, Any] | None) -> None:
    if slimmed is None:
        print("slim: nothing to remove: no neuron and no whole head is zero; the zeros stay in ordinary weights")
        return
    print("slim:")
    _print_cost(slimmed["before"], slimmed["after"])
    _print_sizes(slimmed)


def _print_linearized(arguments: StageArguments, results: Mapping[str, Any]) -> None:
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
    _print_saved(arguments, "; train it with distill, joint-distill or snapshot-distill")


def _print_proximal(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    _print_metrics({name: value for name, value in results.items() if name != "baselines"})
    if "baselines" in results:
        print(results_table({"proximal": results, **results["baselines"]}))
    _print_saved(arguments)


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the metrics of several trainings on one data set as a table.

    Below it stands which of them answer one class to everything, as far as the metrics of two classes show it.

    Args:
        results: Name -> results of a training.

    Example:
        >>> print(results_table({"proximal": {"eval_accuracy": 0.9, "eval_loss": 0.3}, "hard_labels": {}}))
                              accuracy      loss
        proximal                0.9000    0.3000
        hard_labels                  -         -
    """
    first = next(iter(results.values()))
    left_out = ("runtime", "per_second", "time")
    columns = [
        name
        for name, value in first.items()
        if name.startswith("eval_") and isinstance(value, float) and not name.endswith(left_out) and "/" not in name
        if not name.startswith("eval_teacher_")
    ]
    # What a task is judged by comes first.
    columns.sort(key=lambda name: name == "eval_loss")
    width = max([10, *(len(name) - len("eval_") + 2 for name in columns)])
    lines = [f"{'':20s}" + "".join(f"{name.removeprefix('eval_'):>{width}s}" for name in columns)]
    for title, found in results.items():
        cells = (f"{found[name]:{width}.4f}" if name in found else f"{'-':>{width}s}" for name in columns)
        lines.append(f"{title:20s}" + "".join(cells))
    constant = [title for title, found in results.items() if _answers_one_class(found)]
    if constant:
        lines.append(f"ONE CLASS: all answers (or all right ones) are the same, for {', '.join(constant)}")
    return "\n".join(lines)


def _answers_one_class(found: Mapping[str, Any]) -> bool:
    """Whether metrics of two classes are those of a constant answer, or of examples of one class."""
    if found.get("eval_matthews_correlation") != 0:
        return False
    right, f1 = found["eval_accuracy"], found["eval_f1"]
    # Nothing of the positive class is found; or nothing of the other one, when F1 follows from the accuracy.
    return bool(f1 == 0 or abs(f1 - 2 * right / (1 + right)) < 1e-9)


def _print_evaluated(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    for name, metrics in results.items():
        print(name)
        _print_metrics(metrics)


def _print_report(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    print_report(arguments.output_dir)


def print_report(folder: str) -> None:
    """Print the table of a report, and the folder of its other files."""
    print(Path(folder, "report.md").read_text(encoding="utf-8"))
    print(f"report.html (one page to show), report.json, the table and plots are in {folder}")


def _print_pushed(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    for name, why in results["left_out"].items():
        print(f"not uploaded: {name}: {why}")
    files = ", ".join(results["files"])
    if "folder" in results:
        print(f"would upload to {results['repo_id']}: {files}\nwritten to {results['folder']}")
        return
    print(f"uploaded: {files}\n{results['url']} (commit {results['commit']})")


def print_demo(folder: Path, report: Mapping[str, Any], reload: Mapping[str, Any]) -> None:
    """Print what the demo made.

    Args:
        folder: Of all its results.
        report: What `report.json` holds.
        reload: How the model differs in a fresh process.
    """
    print_report(str(folder / "report"))
    hint = recovery_hint(report["models"], report["metric"], report["num_examples"])
    if hint:
        print(hint)
    weights = "bit-equal weights" if reload["weights_equal"] else "DIFFERENT weights"
    logits = f"logits {'equal to rounding' if reload['equal'] else 'DIFFERENT'} (by {reload['logits_differ_by']:.1e})"
    print(f"reloaded with plain from_pretrained in a fresh process: {weights}, {logits}")


def recovery_hint(models: Sequence[Mapping[str, Any]], metric: str, num_examples: int) -> str:
    """Explain why the demo's recovered model measures no better than the pruned one; empty if it is better.

    Args:
        models: Of the report: dense, pruned, recovered.
        metric: That the report shows.
        num_examples: That it was computed on.
    """
    if len(models) < 3:
        return ""
    dense, pruned, recovered = (model["metrics"][metric] for model in models[:3])
    error = max(model["standard_error"] or 0.0 for model in models[1:3])
    if recovered - pruned > 2 * error or abs(dense - pruned) > 2 * error:
        return ""
    return (
        f"Pruning lost no more than chance on these {num_examples} texts (one text is {1 / num_examples:.4f}): there "
        "was nothing to recover. A deeper cut shows what recovery does: try --mac_ratio 0.2."
    )


def _print_exported(arguments: StageArguments, results: Mapping[str, Any]) -> None:
    report = results["export"]
    files = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in report["bytes"].items())
    if "checks" in report:
        print(f"within {report['largest_difference']:.1e} of PyTorch on {len(report['checks'])} batches; {files}")
    else:
        print(f"{report['layers']} packed layers, read back bit for bit; {files}")
    if "int8" in report:
        _print_int8(report["int8"])
    for name, metrics in results["metrics"].items():
        shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        print(f"{name:20s} {shown}")
    for timed in results["latency"]:
        print(f"batch size {timed['batch_size']}, times as fast as PyTorch (lowest and highest of the rounds):")
        for entry in timed["latencies"]:
            faster = timed["speedups"][entry["name"]]
            span = f"{faster['low']:.2f} to {faster['high']:.2f}"
            print(f"  {entry['name']:20s} {entry['p50'] * 1e3:8.2f} ms  {faster['median']:6.2f} ({span})")
    _print_saved(arguments)


def _print_int8(found: Mapping[str, Any]) -> None:
    print(
        f"int8 moves the outputs by {found['moved']:.3f} of their spread ({found['moved_without_guard']:.3f} without "
        f"the guard, {found['bound']:g} allowed)"
    )
    kept = ", ".join(found["kept"]) or "none"
    print(f"{found['num_int8']} layers in int8, {found['num_scaled']} of them with scales; left in float: {kept}")


_PRINTERS: dict[str, Callable[[StageArguments, Mapping[str, Any]], None]] = {
    "structured_pruning": _print_pruned_structure,
    "vocabulary_pruning": _print_pruned_vocabulary,
    "weight_quantization": _print_quantized,
    "weight_pruning": _print_pruned_weights,
    "linformer": _print_linearized,
    "evaluate": _print_evaluated,
    "proximal": _print_proximal,
    "report": _print_report,
    "export": _print_exported,
    "push": _print_pushed,
}
