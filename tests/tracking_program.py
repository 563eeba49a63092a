"""A training whose losses go to a tracker; prints its log as JSON.

python -m tests.tracking_program TRACKER FOLDER
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_compress as hc


ROWS = [{"input_ids": [5 + i % 7, 6, 7], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(16)]


def bert(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    ))  # fmt: skip


def trained(tracker: str, folder: str) -> list[dict]:
    """The log of a student with linear attention under a teacher that learns."""
    student = hc.compress(bert(0), hc.LinformerConfig(projected_length=4))
    args = hc.JointTeacherArguments(
        f"{folder}/out", max_steps=3, logging_steps=1, report_to=tracker, alpha_layer=1.0, use_cpu=True,
        save_strategy="no", save_teacher=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = hc.JointTeacherTrainer(model=student, teacher_model=bert(1), args=args, train_dataset=ROWS)
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    print(json.dumps(trained(*sys.argv[1:])))
