"""Writes the saved models and checkpoints beside this file; run with the code of commit 4eb4f0e.

PYTHONPATH=<checkout of 4eb4f0e> python make.py <empty folder>
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, TrainingArguments

import hf_compress as hc


_SIZES = {"vocab_size": 40, "max_position_embeddings": 18, "initializer_range": 0.3}
_WIDE = {**_SIZES, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
_SPECIAL = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
_CONFIGS = {
    "bert": lambda layers: transformers.BertConfig(**_WIDE, num_hidden_layers=layers),
    "roberta": lambda layers: transformers.RobertaConfig(**_WIDE, num_hidden_layers=layers),
    "distilbert": lambda layers: transformers.DistilBertConfig(
        **_SIZES, dim=8, n_heads=2, hidden_dim=12, n_layers=layers
    ),
    "modernbert": lambda layers: transformers.ModernBertConfig(
        **_WIDE, **_SPECIAL, num_hidden_layers=layers, local_attention=8
    ),
    "llama": lambda layers: transformers.LlamaConfig(
        **_WIDE, pad_token_id=0, num_key_value_heads=1, num_hidden_layers=layers
    ),
}


def build(architecture: str = "bert", layers: int = 2, seed: int = 0, **changes: int) -> transformers.PreTrainedModel:
    """A classifier with seeded weights whose biases are not zero."""
    torch.manual_seed(seed)
    config = _CONFIGS[architecture](layers)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model


def batch(seed: int = 9, size: int = 8) -> dict[str, torch.Tensor]:
    """Ids of 5 to 12 tokens, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 13, (size, 1), generator=generator)
    mask = torch.arange(12) < lengths
    ids = torch.randint(3, 40, (size, 12), generator=generator)
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long()}


# Name -> architecture, layers, the steps.
MODELS = {
    "structured": ("bert", 2, [hc.StructuredPruningConfig(mac_ratio=0.55, min_neurons=2)]),
    "structured-neurons": (
        "modernbert", 2, [hc.StructuredPruningConfig(mac_ratio=0.8, min_neurons=2, prune_heads=False)],
    ),
    "structured-llama": ("llama", 2, [hc.StructuredPruningConfig(mac_ratio=0.8, min_neurons=2)]),
    "linformer": ("roberta", 1, [hc.LinformerConfig(projected_length=4)]),
    "linformer-shared": (
        "bert", 2, [hc.LinformerConfig(projected_length=4, share="layer", slot_mask=True, initialization="pooling",
                                       length_scaling=False)],
    ),
    "tokens-thresholds": ("bert", 2, [hc.TokenPruningConfig(final_token_threshold=0.1, score_reference_length=9)]),
    "tokens-topk": ("distilbert", 4, [hc.TokenPruningConfig(prune_mode="topk", token_keep_rate=0.4)]),
    "weights-2of4": ("bert", 1, [hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, criterion="magnitude")]),
    "weights-slim": (
        "bert", 2, [hc.WeightPruningConfig(pattern="1xchannel", target_sparsity=0.4, criterion="magnitude",
                                           op_names=[".*intermediate.dense"])],
    ),
    "chain-tokens-structured": (
        "bert", 2, [hc.TokenPruningConfig(final_token_threshold=0.1, score_reference_length=9),
                    hc.StructuredPruningConfig(mac_ratio=0.7, min_neurons=2)],
    ),
    "chain-structured-linformer": (
        "roberta", 2, [hc.StructuredPruningConfig(mac_ratio=0.7, min_neurons=2),
                       hc.LinformerConfig(projected_length=4)],
    ),
    "chain-structured-weights": (
        "distilbert", 2, [hc.StructuredPruningConfig(mac_ratio=0.7, min_neurons=2),
                          hc.WeightPruningConfig(pattern="1x1", target_sparsity=0.5, criterion="magnitude")],
    ),
}  # fmt: skip


def compressed(name: str) -> transformers.PreTrainedModel:
    architecture, layers, steps = MODELS[name]
    model = build(architecture, layers)
    for step in steps:
        hc.compress(model, step, data=[batch(seed) for seed in range(8)])
    return hc.slim(model) if name.endswith("slim") else model


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


def rows(count: int = 32) -> list[dict]:
    """Ids of 4 to 12 tokens; the label says whether the first one is even."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(count):
        length = int(torch.randint(4, 13, (1,), generator=generator))
        ids = torch.randint(5, 40, (length,), generator=generator)
        result.append({"input_ids": ids, "labels": int(ids[0] % 2)})
    return result


def pad(features: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(feature["input_ids"]) for feature in features)
    ids = torch.zeros(len(features), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, feature in enumerate(features):
        ids[row, : len(feature["input_ids"])] = feature["input_ids"]
        mask[row, : len(feature["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([f["labels"] for f in features])}


# 8 updates in 2 epochs, with dropout; the checkpoint is one in the middle of the second epoch.
_SETTINGS = {
    "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_steps": 6, "save_total_limit": 2,
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "logging_steps": 2,
    "seed": 3,
}  # fmt: skip


def _weights(folder: str) -> transformers.Trainer:
    pruning = hc.WeightPruningConfig(pattern="2:4", target_sparsity=0.5, pruning_frequency=2, start_step=1, end_step=7)
    return hc.CompressionTrainer(
        model=build(layers=1), args=TrainingArguments(folder, **_SETTINGS), train_dataset=rows(), data_collator=pad,
        callbacks=[hc.WeightPruningCallback(pruning)],
    )  # fmt: skip


def _distillation(folder: str) -> transformers.Trainer:
    return hc.DistillationTrainer(
        model=build(layers=1), teacher_model=build(layers=2, seed=1, hidden_size=12),
        args=hc.DistillationArguments(folder, **_SETTINGS, alpha_layer=1.0), train_dataset=rows(), data_collator=pad,
    )  # fmt: skip


def _joint(folder: str) -> transformers.Trainer:
    args = hc.JointTeacherArguments(folder, **_SETTINGS, teacher_learning_rate=1e-3, teacher_update_cycle=2)
    return hc.JointTeacherTrainer(
        model=build(layers=1),
        teacher_model=build(layers=1, seed=1),
        args=args,
        train_dataset=rows(),
        data_collator=pad,
    )


def _tokens(folder: str) -> transformers.Trainer:
    config = hc.TokenPruningConfig(masking_mode="soft", final_token_threshold=0.1, score_reference_length=9)
    callbacks = [
        hc.ThresholdAnnealingCallback(temperature_start=0.1, temperature_end=0.01, learning_rate=1e-2),
        hc.StageSwitchCallback(0.9),
    ]
    return hc.CompressionTrainer(
        model=hc.compress(build(layers=2), config), args=TrainingArguments(folder, **_SETTINGS), train_dataset=rows(),
        data_collator=pad, callbacks=callbacks,
    )  # fmt: skip


RUNS = {"weights": _weights, "distillation": _distillation, "joint": _joint, "tokens": _tokens}


def end_of(trainer: transformers.Trainer) -> dict[str, torch.Tensor]:
    """What a finished run holds: weights of the student, of its projectors and of a teacher that learned."""
    found = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    for name in ("projectors", "teacher_model"):
        module = getattr(trainer, name, None)
        if module is not None and (name == "projectors" or isinstance(trainer, hc.JointTeacherTrainer)):
            found.update({f"{name}.{key}": value for key, value in module.state_dict().items()})
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    answers = {}
    for name in MODELS:
        model = compressed(name)
        model.save_pretrained(root / "models" / name)
        answers[name] = logits(model)
    save_file(answers, root / "logits.safetensors")
    for name, run in RUNS.items():
        trainer = run(str(root / name))
        trainer.train()
        place = root / "checkpoints" / name / "checkpoint-6"
        shutil.copytree(root / name / "checkpoint-6", place)
        # Resuming reads none of them.
        for file in ("training_args.bin", "tokenizer.json"):
            (place / file).unlink(missing_ok=True)
        (root / "ends").mkdir(exist_ok=True)
        save_file(end_of(trainer), root / "ends" / f"{name}.safetensors")
        shutil.rmtree(root / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
