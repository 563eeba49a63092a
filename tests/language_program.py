"""Small causal language models, windows of different lengths, and trainings of them that must agree."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hf_compress as hc
from hf_compress.training.trainer import CompressionTrainer
from tests.distributed_program import double_precision, logs_of, weights_of


WORDS = 61
_LLAMA = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "initializer_range": 0.5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def language_model(kind: str, seed: int, words: int = WORDS) -> PreTrainedModel:
    """A model without dropout, whose head is as the kind's class has it."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": words, **_LLAMA}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=words, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    if kind == "llama, tied":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    if kind == "phi":
        # Its head has a bias.
        return transformers.PhiForCausalLM(transformers.PhiConfig(**sizes))
    if kind == "gemma2":
        config = transformers.Gemma2Config(
            **sizes, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0, sliding_window=8, pad_token_id=0
        )
        return transformers.Gemma2ForCausalLM(config)
    if kind == "granite":
        return transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, logits_scaling=4.0))
    if kind == "cohere":
        config = transformers.CohereConfig(**sizes, logit_scale=0.25, pad_token_id=0)
        return transformers.CohereForCausalLM(config)
    if kind == "mixtral":
        # Its loss has a term of its router, too.
        config = transformers.MixtralConfig(
            **sizes, num_key_value_heads=1, num_local_experts=2, output_router_logits=True
        )
        return transformers.MixtralForCausalLM(config)
    assert kind == "llama", kind
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def windows(number: int) -> list[dict[str, Tensor]]:
    """Ragged texts, each with a prompt whose labels do not count."""
    generator, found = torch.Generator().manual_seed(5), []
    for index in range(number):
        ids = torch.randint(3, WORDS, (4 + index * 5 % 13,), generator=generator)
        labels = ids.clone()
        labels[: index % 4] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch with padding."""

    def padded(name: str, value: int) -> Tensor:
        rows = [feature[name] for feature in features]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(feature["input_ids"]) for feature in features], batch_first=True
    )
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}


# Kind of training -> its trainer, arguments and their further fields.
KINDS: dict[str, tuple[type[Trainer], type[TrainingArguments], dict[str, Any]]] = {
    "fine-tuning": (CompressionTrainer, TrainingArguments, {}),
    "fixed": (hc.DistillationTrainer, hc.DistillationArguments, {"alpha_output": 0.5}),
    "joint": (hc.JointTeacherTrainer, hc.JointTeacherArguments, {"teacher_learning_rate": 0.1, "save_teacher": False}),
    "proximal": (
        hc.ProximalTrainer, hc.ProximalArguments,
        {"teacher_learning_rate": 0.1, "save_teacher": False, "zero_init_heads": False, "proximal_weight": 0.3},
    ),
}  # fmt: skip


def trainer_of(kind: str, folder: str, **options: Any) -> Trainer:
    """A trainer of two updates of all windows, in their order."""
    transformers.logging.set_verbosity_error()
    trainer_class, arguments, fields = KINDS[kind]
    models = {"model": language_model("llama", 0)}
    if kind != "fine-tuning":
        models["teacher_model"] = language_model("llama", 1)
    defaults = {
        "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
        "dataloader_pin_memory": False, "train_sampling_strategy": "sequential", "remove_unused_columns": False,
    }  # fmt: skip
    args = arguments(folder, **{**defaults, **fields, **options})
    return trainer_class(**models, args=args, train_dataset=windows(8), data_collator=collate)


def train(kind: str, folder: str, **options: Any) -> dict[str, Any]:
    """Train in double precision, and return what was logged and the weights of student and teacher."""
    with double_precision():
        trainer = trainer_of(kind, folder, **options)
        trainer.train()
    return {"logs": logs_of(trainer), "weights": weights_of(trainer)}
