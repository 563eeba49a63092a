"""The table of all stages. Command line, help and recipes derive from it.

Nothing here imports what it names: a list of commands must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_compress.stages.arguments import StageArguments


# Packages outside this one announce their methods here; `hf_compress.methods` reads the same group, but imports torch.
METHOD_GROUP = "hf_compress.methods"
_METHOD_FOLDERS = Path(__file__).resolve().parents[1] / "methods"

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
}
# The published codes' own constants, and where a training runs.
_TRAINING_WHEN = {
    ("compat", "cald"): {"weight_decay": 0.0, "train_sampling_strategy": "random"},
    ("compat", "prokt"): {"weight_decay": 0.0, "train_sampling_strategy": "random", "warmup_steps": 0},
    ("compat", "ltp"): {"weight_decay": 0.0, "train_sampling_strategy": "random", "warmup_steps": 0},
    ("device", "cpu"): {"use_cpu": True},
}
# The start of linear attention that kept most accuracy (methods/linformer/README.md).
_LINEAR_START = {"initialization": "pooling", "slot_mask": True, "length_scaling": False}
_READS_LABELS = "linearize reads only the labels of the task"
# What goes with the published random start.
_PUBLISHED_LINEAR_START = {"slot_mask": False, "length_scaling": True}


@dataclass(frozen=True)
class Stage:
    """One thing that can be done with models, by hand or in a recipe.

    Args:
        name: In recipes: the method's name, or what a training is called.
        command: On the command line.
        summary: Half a sentence for the list of commands.
        arguments: Path of the dataclass that `run` takes, as `module.Class`; its fields are the topics of the help.
        run: Path of the function, as `module.function`.
        defaults: Values that replace the dataclasses' own defaults.
        defaults_when: (option, value) -> further defaults while that option has that value.
        note: What a person should know before the options.
        unused: Option of a shared dataclass that would change nothing here -> why. Help leaves it out, and giving it
            is an error.
        saves_model: Whether its folder holds a model that another stage can start from.
        saves_exported: Whether its folder holds a model that other stages can measure, but not start from.
        method: Where the method of a generic stage is, as an entry point names it; the topic `method` is its config.
    """

    name: str
    command: str
    summary: str
    arguments: str
    run: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    defaults_when: Mapping[tuple[str, Any], Mapping[str, Any]] = field(default_factory=dict)
    note: str = ""
    unused: Mapping[str, str] = field(default_factory=dict)
    saves_model: bool = True
    saves_exported: bool = False
    method: str | None = None

    @cached_property
    def function(self) -> Callable[[Any], Mapping[str, Any]]:
        """What `run` names; imports it."""
        function: Callable[[Any], Mapping[str, Any]] = _load(self.run)
        return function

    @cached_property
    def arguments_class(self) -> type[StageArguments]:
        """What `arguments` names; imports it."""
        kind: type[StageArguments] = _load(self.arguments)
        return kind


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _stage(name: str, command: str, summary: str, path: str, **more: Any) -> Stage:
    """A stage of this package.

    Args:
        name, command, summary: Of the stage.
        path: Module within `stages`, and its class of arguments and its function, as `module.Class.function`.
        more: Other fields.
    """
    module, arguments, run = path.split(".")
    place = f"hf_compress.stages.{module}"
    return Stage(name, command, summary, f"{place}.{arguments}", f"{place}.{run}", **more)


def _training(name: str, command: str, summary: str, path: str, **more: Any) -> Stage:
    return _stage(name, command, summary, path, **{"defaults": _TRAINING, "defaults_when": _TRAINING_WHEN, **more})


_OF_TRAINING = ("freeze_embeddings", "dropout", "max_positions")
_IN_ORDER = (
    _training("finetune", "finetune", "train a model on a task", "finetune.Finetune.finetune"),
    _stage(
        "structured_pruning", "prune-structure", "remove attention heads and neurons without retraining",
        "prune_structure.PruneStructure.prune_structure",
        unused={
            **dict.fromkeys(_OF_TRAINING, "prune-structure trains nothing"),
            "max_eval_samples": "prune-structure measures nothing",
        },
    ),
    _training(
        "token_pruning", "prune-tokens", "learn which tokens can be dropped on the way through the layers",
        "prune_tokens.PruneTokens.prune_tokens",
    ),
    _training(
        "weight_pruning", "prune-weights",
        "set weights to zero in a pattern (N:M, blocks, channels): in training, with or without a teacher, or at once",
        "prune_weights.PruneWeights.prune_weights",
    ),
    _stage(
        "vocabulary_pruning", "prune-vocabulary",
        "drop the tokens that a corpus never uses from a model and its tokenizer",
        "prune_vocabulary.PruneVocabulary.prune_model_vocabulary",
        unused=dict.fromkeys(_OF_TRAINING, "prune-vocabulary trains nothing"),
    ),
    _stage(
        "weight_quantization", "quantize", "round weights to 2 to 8 bits (GPTQ) and store them as packed integers",
        "quantize.Quantize.quantize",
        unused={
            **dict.fromkeys(_OF_TRAINING, "quantize trains nothing"),
            "max_eval_samples": "quantize measures nothing",
        },
    ),
    _training(
        "distill", "distill", "train a (compressed) student with a fine-tuned teacher", "distill.Distill.distill"
    ),
    _training(
        "search", "search", "search for the fastest student that loses little: which cut, and how it is trained",
        "search.Search.search",
    ),
    _training(
        "joint_distill", "joint-distill", "train a student with a teacher that is fine-tuned at the same time",
        "distill.JointDistill.joint_distill",
    ),
    _stage(
        "linformer", "linearize", "replace softmax attention by linear attention (Linformer)",
        "linearize.Linearize.linearize", defaults=_LINEAR_START,
        defaults_when={("initialization", "normal"): _PUBLISHED_LINEAR_START},
        note="The defaults are the start that kept most accuracy: 82 points, as the dense model, after training on "
        "short sentences, where the published random start (--initialization normal) reached 64. Linear attention "
        "saves arithmetic only on texts longer than about twice --projected_length; name the task to have them "
        "measured.",
        unused={
            "max_length": f"{_READS_LABELS}; max_tokens says how long inputs may be",
            **dict.fromkeys(("max_train_samples", "max_eval_samples"), _READS_LABELS),
            **dict.fromkeys(("freeze_embeddings", "dropout"), "linearize trains nothing"),
        },
    ),
    _training(
        "snapshot_distill", "snapshot-distill", "train a student with the saved states of a teacher's fine-tuning",
        "distill.SnapshotDistill.snapshot_distill",
    ),
    _training(
        "proximal", "proximal", "train a student and a teacher that stays near it, both from the start (ProKT)",
        "proximal.Proximal.proximal",
        defaults=_TRAINING | {"learning_rate": 1e-4},
        defaults_when=_TRAINING_WHEN | {("model_name_or_path", "bilstm"): {"learning_rate": 1e-3}},
        note="Teacher and student begin with pretrained models that were not yet trained on the task. The student is "
        "a model of its own (--model_name_or_path), some layers of the teacher (--student_layers 6), or a new BiLSTM "
        "(--model_name_or_path bilstm, with a default learning rate of 0.001).",
        unused={
            "alpha_task": "student_ce_weight weighs the student's own loss on the labels",
            "alpha_output": "it is always 1: the other terms are weighed against it",
            "teacher_cache_dir": "a learning teacher's outputs change all the time",
        },
    ),
    _stage("evaluate", "evaluate", "measure saved models on a task", "evaluate.Evaluate.evaluate", saves_model=False),
    _stage(
        "report", "report", "compare dense and compressed models: quality, size, arithmetic, measured latency",
        "report.Report.report", saves_model=False,
    ),
    _stage(
        "export", "export", "export a model to ONNX (also int8), checked against PyTorch and timed beside it",
        "export.Export.export", saves_model=False, saves_exported=True,
        unused={"device": "exported models run in ONNX Runtime on the CPU, and PyTorch is timed beside them"},
    ),
    _stage(
        "push", "push", "write the model card of a saved model and upload both to the Hub", "push.Push.push",
        saves_model=False,
        note="The card comes from the model's record and, where there is one, its report. Nothing that can run code "
        "when it is read (a pickle) is uploaded, nor a teacher that was trained beside the model.",
    ),
)  # fmt: skip
STAGES: dict[str, Stage] = {stage.name: stage for stage in _IN_ORDER}


def _generic(name: str, method: str) -> Stage:
    return _stage(
        name, name.replace("_", "-"), f"apply the method {name} at once, without training",
        "compress.Compress.compress_model", method=method,
        unused=dict.fromkeys(("freeze_embeddings", "dropout"), "nothing is trained"),
    )  # fmt: skip


def stage_of(arguments: type) -> Stage | None:
    """The stage that takes arguments of a class; of the generic stages, which share theirs, the first one."""
    path = f"{arguments.__module__}.{arguments.__qualname__}"
    return next((stage for stage in all_stages().values() if stage.arguments == path), None)


def all_stages() -> dict[str, Stage]:
    """`STAGES`, and a generic stage for each method that has none of its own, in this package or outside it."""
    folders = (path.parent.name for path in _METHOD_FOLDERS.glob("*/__init__.py"))
    methods = {name: f"{METHOD_GROUP}.{name}" for name in sorted(folders)}
    methods |= {point.name: point.value for point in entry_points(group=METHOD_GROUP)}
    return STAGES | {name: _generic(name, place) for name, place in methods.items() if name not in STAGES}
