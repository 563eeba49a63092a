"""Make Hugging Face transformer models smaller and faster; open the result with plain `from_pretrained`.

Public names are imported when first used, so that `import hf_compress` costs next to nothing.
"""

from importlib import import_module

from hf_compress._registration import register_when_needed


_EXPORTS = {
    "METHODS": "hf_compress.methods",
    "Acceleration": "hf_compress.methods.weight_pruning",
    "CompressionConfig": "hf_compress.core.record",
    "CompressionTrainer": "hf_compress.training.trainer",
    "Cost": "hf_compress.core.cost",
    "DistillationArguments": "hf_compress.training.arguments",
    "DistillationTrainer": "hf_compress.training.distillation",
    "HeldZerosCallback": "hf_compress.methods.weight_pruning",
    "JointTeacherArguments": "hf_compress.training.arguments",
    "JointTeacherTrainer": "hf_compress.training.guided",
    "LinformerConfig": "hf_compress.methods.linformer",
    "Latency": "hf_compress.report.latency",
    "SnapshotTeacherArguments": "hf_compress.training.arguments",
    "SnapshotTeacherTrainer": "hf_compress.training.guided",
    "StructuredPruningConfig": "hf_compress.methods.structured_pruning",
    "StageSwitchCallback": "hf_compress.methods.token_pruning.callbacks",
    "TeacherStudentCollator": "hf_compress.training.collator",
    "ThresholdAnnealingCallback": "hf_compress.methods.token_pruning.callbacks",
    "TokenPruningConfig": "hf_compress.methods.token_pruning",
    "WeightPruningCallback": "hf_compress.methods.weight_pruning",
    "WeightPruningConfig": "hf_compress.methods.weight_pruning",
    "accelerate_for_inference": "hf_compress.methods.weight_pruning",
    "compress": "hf_compress.api",
    "count_cost": "hf_compress.core.cost",
    "measure_latency": "hf_compress.report.latency",
    "rebuild": "hf_compress.api",
    "slim": "hf_compress.methods.weight_pruning",
    "steps_of": "hf_compress.api",
    "to_plain": "hf_compress.api",
}

__version__ = "0.1.0.dev0"
__all__ = list(_EXPORTS)  # noqa: PLE0605  (one list of names, kept in one place)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})


register_when_needed()
