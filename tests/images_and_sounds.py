"""Tiny models that read images and sounds, and batches of both, beside the texts of `tests/conftest.py`."""

import pytest
import torch
import transformers


# Releases before image processors of Pillow's own ask for torchvision.
opens_images = pytest.mark.skipif(
    "torchvision" in (getattr(transformers.AutoImageProcessor, "_backends", None) or ()),
    reason="this transformers opens image processors with torchvision only",
)

WIDE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.2}
# What wav2vec2's families call their dropouts, and what else is random in training.
QUIET = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout",
         "layerdrop", "mask_time_prob")  # fmt: skip
# Frames of the feature encoder: ((samples - 10) // 5 + 1 - 3) // 2 + 1.
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}


def vit(**changes):
    """26 tokens: 5 x 5 patches and the class token."""
    pixels = {"image_size": 20, "patch_size": 4, "encoder_stride": 4}
    return transformers.ViTConfig(**{**WIDE, **pixels, "num_hidden_layers": 2, **changes})


def wav2vec2(**changes):
    """Norms of the feature encoder are those of each frame: over time they would mix padding into real frames."""
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    head = {"vocab_size": 12, "num_labels": 2, "classifier_proj_size": 16, "num_hidden_layers": 2}
    return transformers.Wav2Vec2Config(
        **{**WIDE, **CONVOLUTIONS, **positions, **head, **dict.fromkeys(QUIET, 0.0), **changes}
    )


def wav2vec2_stable(**changes):
    return wav2vec2(do_stable_layer_norm=True, **changes)


def images(config, count, size, generator):
    shape = (size, config.num_channels, config.image_size, config.image_size)
    return [{"pixel_values": torch.randn(shape, generator=generator)} for _ in range(count)]


def sounds(config, count, size, length, generator):
    """Sounds of up to `length` frames, padded on the right."""
    result = []
    for _ in range(count):
        frames = torch.randint(length // 2, length + 1, (size,), generator=generator)
        samples = 10 * frames + 10
        mask = torch.arange(10 * length + 10) < samples[:, None]
        values = torch.randn(mask.shape, generator=generator)
        result.append({"input_values": values * mask, "attention_mask": mask.long()})
    return result


def batches(config, count, size, length, generator):
    """Batches for a config that reads images or sounds; None for one that reads tokens."""
    if hasattr(config, "patch_size"):
        return images(config, count, size, generator)
    return sounds(config, count, size, length, generator) if hasattr(config, "conv_kernel") else None


def real_tokens(batch):
    """[B, S] bool: which of the tokens that the layers see are real, counted by hand."""
    if "pixel_values" in batch:
        images = batch["pixel_values"]
        return torch.ones(len(images), (images.shape[-1] // 4) ** 2 + 1, dtype=torch.bool)
    if "input_values" not in batch:
        return batch["attention_mask"].bool()
    frames, width = (
        ((n - 10) // 5 - 2) // 2 + 1 for n in (batch["attention_mask"].sum(1), batch["input_values"].shape[1])
    )
    return torch.arange(width) < frames[:, None]


def cast(batch, model):
    """The batch with images and sounds in the dtype of the model."""
    floats = {name: value for name, value in batch.items() if torch.is_tensor(value) and value.is_floating_point()}
    return {**batch, **{name: value.to(model.dtype) for name, value in floats.items()}}


class WholeInputClassifier:
    """`AutoModelFor...Classification` for whatever the config reads: texts, images or sounds."""

    _kinds = (
        transformers.AutoModelForSequenceClassification,
        transformers.AutoModelForImageClassification,
        transformers.AutoModelForAudioClassification,
    )
    _model_mapping = {config for kind in _kinds for config in kind._model_mapping}

    @classmethod
    def of(cls, config):
        return next(kind for kind in cls._kinds if type(config) in kind._model_mapping)

    @classmethod
    def from_config(cls, config):
        return cls.of(config).from_config(config)

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        return cls.of(transformers.AutoConfig.from_pretrained(folder)).from_pretrained(folder, **kwargs)
