"""Torch-Pruning: heads and neurons of the feed-forward parts go, by Taylor importance; then the model is fine-tuned.

Its example for BERT prunes the hidden width, too. Here the width stays, as with `--bottleneck` in its examples for
vision transformers, and as in our models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch_pruning
from transformers import PreTrainedModel, Trainer
from transformers.models.bert.modeling_bert import BertSelfAttention

from benchmarks.peers.setting import Setting
from hf_compress.core.cost import cost_of_shapes
from hf_compress.stages.models import freeze_embeddings_


# Fraction of the heads and neurons that go. With it about a fifth of the layers' arithmetic is left, as in ours.
PRUNED = 0.8
# No layer may lose more.
MOST = 0.95
# Batches whose gradients make the importance; its examples for vision transformers take ten.
BATCHES = 10
SETTINGS = (
    f"BasePruner, TaylorImportance of {BATCHES} batches, global and isomorphic, {PRUNED} of whole heads and of "
    "neurons, hidden width kept; fine-tuned on the labels, embeddings frozen"
)
EXPORTED = True


def prune_(model: PreTrainedModel, setting: Setting) -> None:
    """Remove heads and neurons in place."""
    batches = setting.batches(BATCHES * setting.args.batch_size, setting.args.batch_size)
    attentions = [module for module in model.modules() if isinstance(module, BertSelfAttention)]
    widths = [out.dense for layer in model.bert.encoder.layer for out in (layer.attention.output, layer.output)]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {name: value[:2] for name, value in batches[0].items() if name != "labels"},
        importance=torch_pruning.importance.TaylorImportance(),
        global_pruning=True,
        isomorphic=True,
        pruning_ratio=PRUNED,
        head_pruning_ratio=PRUNED,
        max_pruning_ratio=MOST,
        prune_num_heads=True,
        prune_head_dims=False,
        num_heads={each: a.num_attention_heads for a in attentions for each in (a.query, a.key, a.value)},
        ignored_layers=[model.bert.pooler, model.classifier, *widths],
        output_transform=lambda outputs: outputs.logits.sum(),
    )
    for batch in batches:
        model(**batch).loss.backward()
    for group in pruner.step(interactive=True):
        group.prune()
    model.zero_grad()
    for attention in attentions:
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.all_head_size = attention.query.out_features


def make(setting: Setting, folder: Path) -> PreTrainedModel:
    model = setting.open()
    prune_(model, setting)
    freeze_embeddings_(model)
    trainer = Trainer(
        model,
        setting.training(folder),
        setting.task.collator(setting.tokenizer),
        setting.train,
        processing_class=setting.tokenizer,
    )
    trainer.train()
    # `Trainer` leaves mixed precision in the model's forward.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("forward", None)
    # As its documentation says: the module itself, because no config has its shapes.
    torch.save(model.eval(), folder / "model.pt")
    return model


def opened(setting: Setting, folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    model.save_pretrained(folder / "model")
    found = torch.load(folder / "model.pt", weights_only=False)
    dense, pruned = (cost_of_shapes(each, setting.args.max_length).macs for each in (setting.open(), model))
    return {
        **setting.opened(folder / "model", model),
        "torch.load": {"difference": setting.difference(found, model)},
        "mac_ratio": round(pruned / dense, 3),
        "heads": [layer.attention.self.num_attention_heads for layer in model.bert.encoder.layer],
        "neurons": [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer],
    }
