"""TextBrewer: a student of three of the six layers learns the dense model's logits and hidden states."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.peers.setting import DECAY, WARMUP, Setting
from hf_compress.stages.models import freeze_embeddings_
from hf_compress.tasks.inputs import row_lengths


# Every second layer, up to the last.
LAYERS = (1, 3, 5)
# The presets of its examples: the logits at temperature 8, and the hidden states below, between and above the layers.
TEMPERATURE = 8
MATCHES = [
    {"layer_T": teacher, "layer_S": student, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    for student, teacher in enumerate((0, *(layer + 1 for layer in LAYERS)))
]
SETTINGS = (
    f"GeneralDistiller, layers {LAYERS} of the dense model, temperature {TEMPERATURE}, hidden_mse of {len(MATCHES)} "
    "states, AdamW with a linear schedule, embeddings frozen"
)
EXPORTED = True


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    student = copy.deepcopy(teacher)
    student.bert.encoder.layer = nn.ModuleList(student.bert.encoder.layer[index] for index in LAYERS)
    student.config.num_hidden_layers = len(LAYERS)
    freeze_embeddings_(student)
    return student


def signals(batch: dict[str, Tensor], outputs: Any) -> dict[str, Any]:
    return {"logits": outputs.logits, "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}


def make(setting: Setting, folder: Path) -> PreTrainedModel:
    args, teacher = setting.args, setting.open()
    student = student_of(teacher)
    collate = setting.task.collator(setting.tokenizer)
    loader = DataLoader(
        list(setting.train),
        args.batch_size,
        sampler=LengthGroupedSampler(args.batch_size, lengths=row_lengths(setting.train)),
        # It asks for a plain dict.
        collate_fn=lambda rows: {k: v for k, v in collate(rows).items() if k != "labels"},
    )
    distiller = GeneralDistiller(
        TrainingConfig(device="cpu", output_dir=str(folder / "training"), log_dir=str(folder / "training")),
        DistillationConfig(temperature=TEMPERATURE, intermediate_matches=MATCHES),
        teacher,
        student,
        signals,
        signals,
    )
    learning = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.learning_rate, weight_decay=DECAY)
    steps = args.epochs * len(loader)
    # Its own mixed precision needs apex. Around a whole training, rounded weights must not be kept from step to step.
    mixed = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if args.bf16 else nullcontext()
    student.train()
    with distiller, mixed:
        distiller.train(
            optimizer,
            loader,
            args.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": int(WARMUP * steps), "num_training_steps": steps},
            max_grad_norm=1.0,
            output_hidden_states=True,
        )
    student.save_pretrained(folder / "model")
    setting.tokenizer.save_pretrained(folder / "model")
    return student.eval()


def opened(setting: Setting, folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    return setting.opened(folder / "model", model)
