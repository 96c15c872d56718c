"""What is known of a transformers model that the caller brought."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..parts import LoadedModel
from .loaders import context_length, end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def describe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, attention: str | None = None
) -> LoadedModel:
    """A model in memory as a loaded one; it is put into eval mode, and its attention is replaced later."""
    generation = {name: value for name, value in model.generation_config.to_dict().items() if value is not None}
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        generation=generation,
        end_token_ids=end_token_ids(generation, model.config, tokenizer),
        context_length=context_length(model.config),
        device=next(model.get_input_embeddings().parameters()).device,
        attention=attention or "sdpa",
    )
