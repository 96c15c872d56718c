"""A tiny random Llama and a tokenizer of bytes, made in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ParameterError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|reserved_special_token_0|>",
)
"""Llama-3's, by their names. Their ids follow the 256 bytes: 256 begins a text, 257 ends one, 260 ends a turn."""

VOCAB_SIZE = 256 + len(CONTROL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama-3's chat template."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes: the id of a byte is its value, then come :data:`CONTROL_TOKENS`.

    It begins every text with ``<|begin_of_text|>``, ends it (eos) with ``<|end_of_text|>`` and has Llama-3's template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    begin = CONTROL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, 256)]
    )
    make: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=CONTROL_TOKENS[1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def tiny_llama(
    vocab_size: int = VOCAB_SIZE,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seed: int = 0,
    dtype: str = "float32",
    **config: Any,
) -> LlamaForCausalLM:
    """A Llama with random weights, in eval mode on the CPU.

    The weights are large enough for greedy outputs that vary with the prompt and do not repeat at once. The same
    arguments give the same weights; the global random state is left alone. Further keywords go to ``LlamaConfig``.
    Positions reach 512. Raises ParameterError for an unknown ``dtype``.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ParameterError(f"unknown dtype {dtype!r}: give the name of a torch dtype, such as 'float32'")
    known = vocab_size >= VOCAB_SIZE
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 512,
        "bos_token_id": 256 if known else None,
        "eos_token_id": 257 if known else None,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(LlamaConfig(**settings))
        for parameter in model.parameters():
            if parameter.dim() == 2:  # of unit gain and a half, so that attention is far from uniform
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    model.to(getattr(torch, dtype)).eval().requires_grad_(False)
    return model  # type: ignore[no-any-return]


def _byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (as in GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = iter(range(256, 512))
    return {chr(byte if byte in printable else next(shifted)): byte for byte in range(256)}
