"""Meta's original layout of Llama, read piece by piece: ``params.json``, ``consolidated.*.pth``, ``tokenizer.model``.

The weights are pickles. They are opened by torch's restricted unpickler, which knows tensors and plain containers, and
memory-mapped; what asks for anything else is refused without being executed. Nothing but ``convert`` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoadingError, UnsafeCheckpointError
from .checks import read_json

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig, PreTrainedTokenizerBase

PARAMS = "params.json"
TOKENIZER = "tokenizer.model"
_SHARDS = "consolidated*.pth"
_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
_PATTERN = _WORDS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 splits a text before it looks for tokens."""
_DERIVED = ("rope.freqs",)
"""Ends of tensors that follow from the configuration."""


class MetaCheckpoint:
    """A folder in Meta's layout.

    Args:
        folder: where it is.
        context_length: how many tokens its positions cover, which Meta's files do not say; by default 131072 for
            Llama 3.1 and later, 8192 for Llama 3, 16384 for Code Llama and 4096 for Llama 2.

    Raises LoadingError for what is missing or damaged, UnsafeCheckpointError for a pickle of more than tensors.
    """

    def __init__(self, folder: Path, context_length: int | None = None) -> None:
        self.folder = folder
        self._params = read_json(folder / PARAMS)
        self._shards = [_open(path) for path in sorted(folder.glob(_SHARDS))]
        names = list(self._shards[0])
        for path, shard in zip(sorted(folder.glob(_SHARDS)), self._shards, strict=True):
            if set(shard) != set(names):
                odd = sorted(set(shard) ^ set(names))
                raise LoadingError(f"{path} does not belong to the other shards: {odd[0]!r} is not in all of them")
        self._names = {_translate(folder, name): name for name in names if not name.endswith(_DERIVED)}
        self.config = self._config(context_length)
        self._shapes = self._expected()
        if self.config.tie_word_embeddings:
            self._names.pop("lm_head.weight", None)
        missing, odd = sorted(set(self._shapes) - set(self._names)), sorted(set(self._names) - set(self._shapes))
        if missing or odd:
            what = f"lacks {missing[0]!r}" if missing else f"holds {odd[0]!r}, which Llama has not"
            raise LoadingError(f"{folder} does not fit its {PARAMS}: it {what}")
        for name in self._names:
            self._axis(name)

    @property
    def dtype(self) -> Any:
        """The dtype of its weights."""
        return self._shards[0][self._names["model.embed_tokens.weight"]].dtype

    def shapes(self) -> Mapping[str, Sequence[int]]:
        """The shape of every tensor, by its name in transformers."""
        return {name: self._shapes[name] for name in self._names}

    def tensor(self, name: str) -> Tensor:
        """A tensor as transformers has it: the shards' pieces put together, q and k in its order of rotary halves."""
        import torch

        pieces = [shard[self._names[name]] for shard in self._shards]
        axis = self._axis(name)
        joined = pieces[0] if axis is None else torch.cat(pieces, axis)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            joined = _halves(joined, self.config.hidden_size // self.config.num_attention_heads)
        return joined.contiguous()

    def _axis(self, name: str) -> int | None:
        """Along which axis the pieces make the whole; None where every shard holds all of it (norms)."""
        pieces = [list(shard[self._names[name]].shape) for shard in self._shards]
        whole, piece = list(self._shapes[name]), pieces[0]
        if all(shape == whole for shape in pieces):
            return None
        for axis in range(len(whole) if all(shape == piece for shape in pieces) else 0):
            if [size * len(pieces) if at == axis else size for at, size in enumerate(piece)] == whole:
                return axis
        raise LoadingError(
            f"{self.folder}: {self._names[name]!r} comes in pieces of {', '.join(map(str, pieces))}, which make no "
            f"{whole}: a shard is missing, or {PARAMS} is another model's"
        )

    def _number(self, name: str, default: Any = None) -> Any:
        value = self._params.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LoadingError(f"{self.folder / PARAMS} says {name}={value!r}: a number is due")
        return value

    def _config(self, context_length: int | None) -> LlamaConfig:
        from transformers import LlamaConfig

        dim, heads = self._number("dim"), self._number("n_heads")
        count = len(self._shards)
        embedding = self._shards[0][self._tensor_name("tok_embeddings.weight")]
        vocabulary = embedding.shape[0] * (count if embedding.shape[1] == dim else 1)
        theta = float(self._number("rope_theta", 10000.0))
        scaled = bool(self._params.get("use_scaled_rope", False))
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if scaled:
            factor = float(self._number("rope_scaling_factor", 32 if dim <= 3072 else 8))  # 3.2's small models: 32
            rope.update(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
            rope["original_max_position_embeddings"] = 8192
        llama3 = vocabulary > 100_000
        covered = 131072 if scaled else 8192 if llama3 else 16384 if theta > 10000 else 4096
        configure: Any = LlamaConfig
        config: LlamaConfig = configure(
            architectures=["LlamaForCausalLM"],
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=self._shards[0][self._tensor_name("layers.0.feed_forward.w1.weight")].shape[0] * count,
            num_hidden_layers=self._number("n_layers"),
            num_attention_heads=heads,
            num_key_value_heads=self._params.get("n_kv_heads") or heads,
            head_dim=dim // heads,
            rms_norm_eps=self._number("norm_eps", 1e-5),
            max_position_embeddings=context_length or covered,
            rope_parameters=rope,
            tie_word_embeddings=self._tied(),
            bos_token_id=128000 if llama3 else 1,
            eos_token_id=128001 if llama3 else 2,
            dtype=embedding.dtype,
        )
        return config

    def _tied(self) -> bool:
        name = "output.weight"
        shards = self._shards
        return name not in shards[0] or all(shard[name].equal(shard["tok_embeddings.weight"]) for shard in shards)

    def _tensor_name(self, name: str) -> str:
        if name not in self._shards[0]:
            raise LoadingError(f"{self.folder} holds no {name!r}: it is not in Meta's layout of Llama")
        return name

    def _expected(self) -> dict[str, tuple[int, ...]]:
        import torch
        from transformers import LlamaForCausalLM

        build: Any = LlamaForCausalLM
        with torch.device("meta"):
            model = build(self.config)
        return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def read_tokenizer(folder: Path, config: LlamaConfig) -> PreTrainedTokenizerBase | None:
    """Llama 3's tokenizer.model as transformers' tokenizer; None where there is none, or it is SentencePiece's.

    Control tokens are named as in Llama 3, or as in 3.1 where the positions are scaled. There is no chat template:
    Meta's files have none.
    """
    path = folder / TOKENIZER
    ranks = _ranks(path) if path.is_file() else {}
    if not ranks:
        return None
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from .attention import rope_types

    class Converter(TikTokenConverter):  # type: ignore[misc, unused-ignore]
        """transformers' own, without the package that it would read the file with."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    control = _control_tokens(config.vocab_size - len(ranks), "llama3" in rope_types(config))
    convert: Any = Converter
    tokenizer = convert(vocab_file=str(path), pattern=_PATTERN).converted()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    begin = (control[0], len(ranks))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]} $B", special_tokens=[begin]
    )
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = wrap(
        tokenizer_object=tokenizer,
        bos_token=control[0],
        eos_token=control[1],
        clean_up_tokenization_spaces=False,
        model_max_length=config.max_position_embeddings,
    )
    return wrapped


def _ranks(path: Path) -> dict[bytes, int]:
    """Tokens and ranks of a file with a base64 token and its rank in each line; {} when it is something else."""
    import base64

    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        return {}
    return ranks


def _control_tokens(count: int, newer: bool) -> list[str]:
    """Llama 3's, in the order of their ids."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    if newer:
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    reserved = (f"reserved_special_token_{number}" for number in range(count))
    return [f"<|{named.get(at) or next(reserved)}|>" for at in range(count)]


def is_meta(folder: Path) -> bool:
    """Whether a folder is in Meta's layout."""
    return (folder / PARAMS).is_file() and any(folder.glob(_SHARDS))


def _open(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped; nothing but tensors is ever made of it."""
    import pickle

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{path} is a pickle of more than tensors, which is refused; nothing of it was executed"
        ) from error
    except Exception as error:  # no zip archive, truncated, or cannot be read
        raise LoadingError(f"{path} is damaged or no file of tensors: download it again") from error
    if not isinstance(found, dict) or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UnsafeCheckpointError(f"{path} holds something else than named tensors, which is refused")
    return found


def _translate(folder: Path, name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    layer = _LAYER.fullmatch(stem)
    known = _NAMES.get(layer[2] if layer else stem)
    if not known or ending != "weight":
        raise LoadingError(
            f"{folder} holds the tensor {name!r}, which is no part of Llama: other models of Meta's "
            "(vision, mixtures of experts) are not converted; get them in transformers' format"
        )
    return f"model.layers.{layer[1]}.{known}.weight" if layer else f"{known}.weight"


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Meta turns neighbouring channels against each other, transformers the two halves of a head."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
