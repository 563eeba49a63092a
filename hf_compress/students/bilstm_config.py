"""The settings of a BiLSTM student. Importing this file makes `AutoConfig` know them.

`hf_compress` imports it right after transformers has imported its own table of configs, so it needs no model and no
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_MODES = ("joint", "separate")


class BiLSTMConfig(PretrainedConfig):  # type: ignore[no-untyped-call]  # of transformers
    """Settings of a bidirectional LSTM over word-piece embeddings.

    Args:
        vocab_size: Tokens of the tokenizer, usually the teacher's.
        embedding_size: Width of an embedding.
        hidden_size: Width of one direction; states are twice as wide.
        num_layers: LSTM layers.
        dropout: Probability in 0..1 that an entry of the embeddings, or of the states between two layers, is dropped.
        pair_mode: `joint` reads both texts of a pair as one sequence; `separate` reads each by itself and compares
            the two vectors.
        mask_padding: Ignore padding. False is the published arithmetic: the LSTM reads padding, the maximum is over
            it, and a text's answer depends on the batch that it is in.
        initializer_range: Standard deviation of new embeddings and linear layers.
        pad_token_id: The tokenizer's.
        **kwargs: What every config of transformers takes, `num_labels` and `problem_type` among it.

    Raises:
        ValueError: Names the setting, what was found, and what is allowed.

    Source:
        The student of Shi et al. 2021 (arXiv 2107.09305).

    Example:
        >>> BiLSTMConfig(num_labels=3).hidden_size
        300
    """

    model_type = "bilstm"
    attribute_map = {"num_hidden_layers": "num_layers"}

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 300,
        hidden_size: int = 300,
        num_layers: int = 1,
        dropout: float = 0.4,
        pair_mode: str = "joint",
        mask_padding: bool = True,
        initializer_range: float = 0.02,
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.dropout = dropout
        self.pair_mode = pair_mode
        self.mask_padding = mask_padding
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id
        self._check()

    @property
    def states_width(self) -> int:
        """Width of the states that a layer gives: both directions."""
        return 2 * self.hidden_size

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> BiLSTMConfig:
        """Settings that fit a tokenizer, usually the teacher's.

        Args:
            tokenizer: Gives `vocab_size` and `pad_token_id`.
            **settings: As for the config itself.
        """
        return cls(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **settings)

    def _check(self) -> None:
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in 0..1, 1 excluded, got {self.dropout!r}.")
        if self.pair_mode not in PAIR_MODES:
            raise ValueError(f"pair_mode must be one of {', '.join(PAIR_MODES)}, got {self.pair_mode!r}.")
        if not isinstance(self.mask_padding, bool):
            raise ValueError(f"mask_padding must be true or false, got {self.mask_padding!r}.")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be one of the {self.vocab_size} tokens of the vocabulary, got {self.pad_token_id}."
            )


AutoConfig.register(BiLSTMConfig.model_type, BiLSTMConfig)
