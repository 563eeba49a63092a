"""What the tests of the Fisher baseline share: tiny models of each architecture, labelled batches, whole masks."""

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_compress.core.architectures import layers_of
from hf_compress.methods.structured_pruning.fisher import Masks, fisher_information, rearrange_mask, search_masks
from tests.images_and_sounds import WholeInputClassifier, cast, vit, wav2vec2, wav2vec2_stable
from tests.images_and_sounds import batches as other_batches


SEQ_LEN = 13.37
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "num_labels": 3,
}

EXTRA = {
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "llama": {"num_key_value_heads": 2, "head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt post-norm": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
}


OTHERS = {"vit": vit, "wav2vec2": wav2vec2, "wav2vec2-stable": wav2vec2_stable}


def tiny(name="bert", **changes):
    torch.manual_seed(0)
    if name in OTHERS:
        config = OTHERS[name](num_hidden_layers=3, intermediate_size=48, num_labels=3, **changes)
        return WholeInputClassifier.from_config(config).double().eval()
    settings = {**TINY, "initializer_range": 0.2, **EXTRA.get(name, {}), **changes}
    if name.startswith("distilbert"):
        settings = {k: v for k, v in settings.items() if k not in ("hidden_size", "num_hidden_layers")}
    if name == "modernbert":
        settings |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = AutoConfig.for_model(name.split()[0], **settings)
    return AutoModelForSequenceClassification.from_config(config).double().eval()


def batches(count=4, size=6, length=12, seed=1, model=None):
    """Labelled texts, or what `model` reads instead."""
    generator = torch.Generator().manual_seed(seed)
    others = model and other_batches(model.config, count, size, length, generator)
    if others:
        return [{**cast(batch, model), "labels": torch.arange(size) % 3} for batch in others]
    data = []
    for _ in range(count):
        ids = torch.randint(3, 99, (size, length), generator=generator)
        lengths = torch.randint(4, length + 1, (size, 1), generator=generator)
        live = (torch.arange(length) < lengths).long()
        labels = torch.randint(0, 3, (size,), generator=generator)
        data.append({"input_ids": ids * live, "attention_mask": live, "labels": labels})
    return data


def all_true(blocks):
    return Masks(
        [torch.ones(b.num_units, dtype=torch.bool) for b in blocks],
        [torch.ones(b.num_neurons, dtype=torch.bool) for b in blocks],
    )


def searched(model, gradients, ratio):
    blocks = layers_of(model)
    units, neurons = (fisher_information(g) for g in gradients)
    unit_macs = [block.macs_per_unit(SEQ_LEN) for block in blocks]
    return search_masks(units, neurons, unit_macs, [block.macs_per_neuron(SEQ_LEN) for block in blocks], ratio)


def rearranged(gradients, masks):
    units = [rearrange_mask(g, m) for g, m in zip(gradients[0], masks.units, strict=True)]
    return Masks(units, [rearrange_mask(g, m) for g, m in zip(gradients[1], masks.neurons, strict=True)])
