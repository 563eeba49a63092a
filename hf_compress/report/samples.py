"""What language models write on from the same beginnings, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.core.modes import evaluating
from hf_compress.core.positions import usual_tokens
from hf_compress.report.quality import Measured


# Places of a measured text that models write on from, and tokens of each beginning.
_PLACES, _TOKENS = 3, 16


@dataclass(frozen=True)
class Beginnings:
    """Texts that every model writes on, always with the token that it finds likeliest.

    Args:
        prompts: The texts.
        new_tokens: How many tokens are written at most; a model may end its text earlier.

    Raises:
        ValueError: If a text is empty, or nothing is to be written.
    """

    prompts: tuple[str, ...]
    new_tokens: int

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ValueError(f"sample_tokens must be at least 1 where there are prompts, got {self.new_tokens}.")
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("sample_prompts must be texts, got an empty one.")

    def continued(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
        """`prompt` and `continuation` for each text.

        Raises:
            ValueError: If a text and what follows it are longer than the model takes.
        """
        ends = {name: getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        own = getattr(model, "generation_config", None)
        ends["eos_token_id"] = getattr(own, "eos_token_id", None) or ends["eos_token_id"]
        if ends["pad_token_id"] is None:
            # Nothing is padded, but `generate` warns without one.
            ends["pad_token_id"] = 0
        greedy: Any = {"do_sample": False, "num_beams": 1, "max_new_tokens": self.new_tokens, **ends}
        settings = GenerationConfig(**greedy)  # type: ignore[no-untyped-call]  # of transformers
        return [self._continued(prompt, model, tokenizer, settings) for prompt in self.prompts]

    def _continued(
        self, prompt: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig
    ) -> dict[str, str]:
        ids = torch.tensor([tokenizer(prompt, verbose=False)["input_ids"]], device=model.device)
        length, limit = ids.shape[1], usual_tokens(model)
        if limit is not None and length + self.new_tokens > limit:
            raise ValueError(
                f"sample_prompts must leave room for sample_tokens: {length} and {self.new_tokens} tokens are more "
                f"than the model's {limit} positions ({prompt[:40]!r})."
            )
        with evaluating(model), torch.no_grad():
            written = model.generate(  # type: ignore[operator]  # transformers mixes it in
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
            )
        return {
            "prompt": prompt,
            "continuation": str(tokenizer.decode(written[0, length:], skip_special_tokens=True)),
        }


def places_of(measured: Measured) -> tuple[str, ...]:
    """Some beginnings of the windows in which a language model is measured, spread over the text."""
    rows, tokenizer = measured.rows, measured.processor
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    starts = dict.fromkeys(place * len(rows) // _PLACES for place in range(_PLACES))
    texts: Sequence[str] = [
        str(tokenizer.decode(rows[start]["input_ids"][:_TOKENS], skip_special_tokens=True)).strip() for start in starts
    ]
    return tuple(text for text in texts if text)
