"""Loading a checkpoint whose files name tensors differently from the model in memory.

transformers renames the modules of some architectures while a model is opened, and saves them under their published
names again: the files of a ViT speak of `encoder.layer.0.attention.attention.query`, the model of
`layers.0.attention.q_proj`. `Trainer` hands the tensors of a checkpoint to `load_state_dict` under the names of the
files, which skips those that it does not know: training would go on from random layers.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel


# Set on a model that has the hook: one is enough for any number of trainings.
_ACCEPTS = "_hf_compress_accepts_saved_names"


def _translate(model: PreTrainedModel, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Bring tensors under the names that the model has for them, as `from_pretrained` does."""
    known = model.state_dict(keep_vars=True).keys()
    if prefix or state_dict.keys() <= known:
        return
    opener: Any = type(model)
    config: Any = model.config
    opened, info = opener.from_pretrained(
        None,
        # As a file holds it: a record that was read already is none for `from_pretrained`.
        config=type(config).from_dict(config.to_dict()),
        state_dict=dict(state_dict),
        dtype=model.dtype,
        output_loading_info=True,
    )
    # What the files lack is random in `opened`, and must stay missing here.
    lacking = set(info["missing_keys"])
    state_dict.clear()
    state_dict.update({name: value for name, value in opened.state_dict().items() if name not in lacking})


def accept_saved_names_(model: nn.Module) -> None:
    """Let a model's `load_state_dict` take tensors under the names that its `save_pretrained` gives them.

    Args:
        model: A transformers model; nothing is done to others, whose files have their own names.
    """
    if isinstance(model, PreTrainedModel) and not getattr(model, _ACCEPTS, False):
        cast(Any, model).register_load_state_dict_pre_hook(_translate)
        setattr(model, _ACCEPTS, True)
