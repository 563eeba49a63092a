"""A bidirectional LSTM that classifies a text or a pair of texts, as a model of transformers.

Importing this file makes `AutoModel` and `AutoModelForSequenceClassification` know it; `hf_compress` does so right
after transformers has imported its own tables of models.

Letters: B rows, S tokens of the first text or of both together, T tokens of the second text, E width of an embedding,
H width of one direction, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForSequenceClassification

from hf_compress.students.bilstm_config import BiLSTMConfig
from hf_compress.students.live_lstm import LiveTokens, run_lstm


class BiLSTMPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]  # of transformers
    """How new weights of a BiLSTM are drawn."""

    config_class = BiLSTMConfig
    config: BiLSTMConfig
    base_model_prefix = "bilstm"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            # As torch draws them; transformers' own rule differs.
            bound = module.hidden_size**-0.5
            for weight in module.parameters():
                initialization.uniform_(weight, -bound, bound)
        elif isinstance(module, nn.Embedding) and not self.config.mask_padding:
            # Here padding is read, and has a vector that no training changes.
            initialization.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]  # of transformers


class BiLSTMModel(BiLSTMPreTrainedModel):  # type: ignore[no-untyped-call]  # of transformers
    """Reads tokens in both directions; the largest value of each state over the tokens is the text's vector.

    Args:
        config: Its settings.

    Example:
        >>> model = BiLSTMModel(BiLSTMConfig(vocab_size=9, embedding_size=4, hidden_size=3)).eval()
        >>> model(torch.tensor([[5, 6, 7]])).pooler_output.shape
        torch.Size([1, 6])
    """

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        widths = [config.embedding_size, *(config.num_layers - 1) * [2 * config.hidden_size]]
        self.layers = nn.ModuleList(
            nn.LSTM(width, config.hidden_size, batch_first=True, bidirectional=True) for width in widths
        )
        self.post_init()  # type: ignore[no-untyped-call]  # of transformers

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Read a batch of texts.

        Args:
            input_ids: [B, S] token ids.
            attention_mask: [B, S] 1 on tokens, 0 on padding, which may stand anywhere; None: no padding. Not read
                with `mask_padding=False`.
            inputs_embeds: [B, S, E] instead of ids.
            output_hidden_states: Also return the embeddings [B, S, E] and the states of each layer [B, S, 2 H].
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` [B, S, 2 H], zero on padding, and `pooler_output` [B, 2 H], zero for an empty text.

        Raises:
            ValueError: If both or none of ids and embeddings are given, or ids are not in the vocabulary.
        """
        states = self._embedded(input_ids, inputs_embeds)
        live = None
        if self.config.mask_padding and attention_mask is not None:
            live = LiveTokens.of(attention_mask)
        collected = [states]
        states = states if live is None else live.to_front(states)
        for layer in self.layers:
            states = run_lstm(cast(nn.LSTM, layer), self.dropout(states), None if live is None else live.lengths)
            collected.append(states if live is None else live.back(states))
        pooled = states.amax(1) if live is None else live.largest(collected[-1])
        outputs = BaseModelOutputWithPooling(
            last_hidden_state=collected[-1],
            pooler_output=pooled,
            hidden_states=tuple(collected)
            if _chosen(output_hidden_states, self.config.output_hidden_states)
            else None,
        )
        return outputs if _chosen(return_dict, self.config.return_dict) else outputs.to_tuple()

    def macs_by_layer(self, tokens: float) -> list[float]:
        """Multiply-accumulates of each layer: four gates a direction, from the token and from the state before it."""
        widths = [(layer.input_size, layer.hidden_size) for layer in self.layers if isinstance(layer, nn.LSTM)]
        return [tokens * 2 * 4 * hidden * (size + hidden) for size, hidden in widths]

    def tokens_read(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B] the tokens that the layers read of each text of a batch; of padding only with `mask_padding=False`."""
        states, mask = batch.get("input_ids", batch.get("inputs_embeds")), batch.get("attention_mask")
        if states is None:
            raise ValueError(f"data must hold dicts with input_ids, got the keys {sorted(batch)}.")
        if mask is None or not self.config.mask_padding:
            mask = torch.ones(states.shape[:2], dtype=torch.int64)
        return mask.bool().sum(1)

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds must be given.")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        try:
            embedded: Tensor = self.embeddings(input_ids)
        except IndexError as error:
            raise ValueError(
                f"input_ids must be below vocab_size {self.embeddings.num_embeddings}, got {int(input_ids.max())}: "
                "the tokenizer has another vocabulary than the model."
            ) from error
        return embedded


def _given(view: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in view.items() if value is not None}


def _chosen(given: bool | None, default: bool | None) -> bool:
    return bool(default) if given is None else given


class BiLSTMForSequenceClassification(BiLSTMPreTrainedModel):  # type: ignore[no-untyped-call]  # of transformers
    """A BiLSTM with a linear classifier; with `pair_mode="separate"` it compares two texts that it reads separately.

    The vectors u and v of two texts become [u; v; |u - v|; u * v], then a linear map, then the classifier.

    Args:
        config: Its settings; `num_labels` and `problem_type` choose the loss, as for other classifiers.

    Source:
        The student of Shi et al. 2021 (arXiv 2107.09305).

    Example:
        >>> model = BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=9, hidden_size=3, pair_mode="separate"))
        >>> first, second = torch.tensor([[5, 6, 7]]), torch.tensor([[8]])
        >>> model(input_ids=first, second_input_ids=second).logits.shape
        torch.Size([1, 2])
    """

    def __init__(self, config: BiLSTMConfig) -> None:
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        self.bilstm = BiLSTMModel(config)
        if config.pair_mode == "separate":
            self.pair_projection = nn.Linear(8 * config.hidden_size, 2 * config.hidden_size)
        self.classifier = nn.Linear(2 * config.hidden_size, self.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]  # of transformers

    # No **kwargs: a Trainer takes them for a sign that the loss divides by the labels of a whole update, which that
    # of scores and of several labels does not.
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        second_input_ids: Tensor | None = None,
        second_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classify a batch of texts or pairs.

        Args:
            input_ids: [B, S] token ids of the text, of both texts (`pair_mode="joint"`), or of the first text.
            attention_mask: [B, S] 1 on tokens, 0 on padding.
            token_type_ids: [B, S] with `pair_mode="separate"` and without `second_input_ids`, 1 on the tokens of the
                second text, which is then read behind the sequence's first token; otherwise not read.
            second_input_ids: [B, T] token ids of the second text, only with `pair_mode="separate"`.
            second_attention_mask: [B, T].
            inputs_embeds: [B, S, E] instead of `input_ids`.
            labels: [B] classes or scores, [B, C] for several labels.
            output_hidden_states: Also return the states, of both texts one behind the other.
            return_dict: False returns a tuple.

        Returns:
            `logits` [B, C], and `loss` with labels.

        Raises:
            ValueError: If the inputs do not fit `pair_mode`.
        """
        first = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if self.config.pair_mode == "separate":
            views = self._views(first, token_type_ids, second_input_ids, second_attention_mask)
        elif second_input_ids is not None:
            raise ValueError(
                "second_input_ids must be left out with pair_mode='joint': encode both texts as one sequence, or make "
                "the model with pair_mode='separate'."
            )
        else:
            views = [first]
        outputs = [self.bilstm(**view, output_hidden_states=output_hidden_states, return_dict=True) for view in views]
        pooled = outputs[0].pooler_output
        if len(outputs) == 2:
            other = outputs[1].pooler_output
            pooled = self.pair_projection(torch.cat([pooled, other, (pooled - other).abs(), pooled * other], dim=-1))
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        states = None
        if outputs[0].hidden_states is not None:
            states = tuple(
                torch.cat(pair, dim=1) for pair in zip(*(each.hidden_states for each in outputs), strict=True)
            )
        result = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)
        return result if _chosen(return_dict, self.config.return_dict) else result.to_tuple()

    def macs_by_layer(self, tokens: float) -> list[float]:
        """Multiply-accumulates of each layer for so many tokens, of both texts together."""
        return self.bilstm.macs_by_layer(tokens)

    def tokens_read(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B] the tokens that the layers read of each text or pair of a batch."""
        views = [{name: batch.get(name) for name in ("input_ids", "attention_mask", "inputs_embeds")}]
        if self.config.pair_mode == "separate":
            second = (batch.get(f"second_{name}") for name in ("input_ids", "attention_mask"))
            views = self._views(views[0], batch.get("token_type_ids"), *second)
        return torch.stack([self.bilstm.tokens_read(_given(view)) for view in views]).sum(0)

    def _views(
        self,
        first: dict[str, Tensor | None],
        token_type_ids: Tensor | None,
        second_input_ids: Tensor | None,
        second_attention_mask: Tensor | None,
    ) -> list[dict[str, Tensor | None]]:
        """What is read of each text."""
        if second_input_ids is not None:
            return [first, {"input_ids": second_input_ids, "attention_mask": second_attention_mask}]
        if token_type_ids is None or not self.config.mask_padding:
            raise ValueError(
                "second_input_ids must be given with pair_mode='separate': encode the texts of a pair one by one "
                "(hf_compress.encode_pairs)."
            )
        second = token_type_ids == 1
        if not torch.compiler.is_exporting() and not bool(second.any(1).all()):
            raise ValueError(
                "Each row must hold two texts with pair_mode='separate', got one by its token_type_ids: use "
                "pair_mode='joint', or encode pairs one by one (hf_compress.encode_pairs)."
            )
        mask = first["attention_mask"]
        live = torch.ones_like(second) if mask is None else mask.bool()
        # The first token opens both texts.
        opening = live & (live.cumsum(1) == 1)
        return [{**first, "attention_mask": live & ~second}, {**first, "attention_mask": live & second | opening}]


AutoModel.register(BiLSTMConfig, BiLSTMModel)
AutoModelForSequenceClassification.register(BiLSTMConfig, BiLSTMForSequenceClassification)
