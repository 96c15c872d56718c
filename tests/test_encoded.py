"""What is held in 8 bits is what it stands for, to every operation of torch."""

from __future__ import annotations

import pytest
import torch

from llama_infer.cache.int8 import encode_plainly
from llama_infer.encoded import Encoded, decoded


def make(dtype=torch.float32):
    """Encoded, and what it stands for."""
    states = torch.randn(3, 2, 10, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    held = Encoded(*encode_plainly(states))
    return held, held.steps.to(dtype) * held.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_looks_like_what_it_stands_for(dtype):
    held, plain = make(dtype)
    assert (held.shape, held.dtype, held.device, held.stride()) == (plain.shape, dtype, plain.device, plain.stride())
    assert torch.equal(decoded(held), plain) and decoded(plain) is plain


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t + 1,
        lambda t: 2 * t,
        lambda t: t.double(),
        lambda t: t[1],
        lambda t: t[..., :2],
        lambda t: t.transpose(1, 2),
        lambda t: t.repeat_interleave(2, 1),
        lambda t: torch.cat([t, t]),
        lambda t: torch.nn.functional.pad(t, (0, 1)),
        lambda t: t @ t.transpose(-1, -2),
        lambda t: torch.nn.functional.scaled_dot_product_attention(t, t, t),
        lambda t: t.contiguous().view(6, 40),
    ],
)
def test_an_operation_sees_what_it_stands_for(operation):
    held, plain = make()
    found = operation(held)
    assert type(found) is torch.Tensor and torch.equal(found, operation(plain))


@pytest.mark.parametrize(
    "cut",
    [lambda t: t[1:], lambda t: t[:, :, :7], lambda t: t[:], lambda t: t[1:2, :, 2:9:3], lambda t: t.narrow(-2, 1, 3)],
)
def test_what_is_cut_out_stays_encoded(cut):
    held, plain = make()
    found = cut(held)
    assert isinstance(found, Encoded) and found.stride() == found.steps.stride()
    assert torch.equal(decoded(found), cut(plain))
    for part in ("steps", "scale"):
        ours, theirs = (getattr(t, part).untyped_storage().data_ptr() for t in (found, held))
        assert ours == theirs
