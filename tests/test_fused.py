"""Kernels between a model's products: the same numbers as transformers' modules, and hands off what is different."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_infer.models.fused import fuse
from llama_infer.models.native import elementwise
from llama_infer.native import library
from llama_infer.testing import tiny_llama

NATIVE = "models/native/elementwise"
compiled = pytest.mark.skipif(library(NATIVE) is None, reason="no C++ compiler, or no cache folder of one's own")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def draw(*shape, scale=1.0, seed=0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def near(found, exact):
    """Within two roundings to bfloat16."""
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=1e-30)


@compiled
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 900), st.sampled_from([1e-3, 1.0, 100.0]))
def test_norms_are_the_definition(rows, size, scale):
    x, weight = draw(rows, size, scale=scale), draw(size, seed=1)
    wide = x.double()
    exact = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    near(elementwise.rms_norm(x, weight, 1e-6), exact)


@compiled
@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize("dim", [2, 6, 64, 128])
def test_rotations_are_transformers(tokens, dim):
    """Bit for bit: both round in the same places."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (draw(1, tokens, heads, dim, seed=heads).transpose(1, 2) for heads in (6, 2))
    cos, sin = draw(1, tokens, dim, seed=8), draw(1, tokens, dim, seed=9)
    found = elementwise.rotate(q, k, cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(found, apply_rotary_pos_emb(q, k, cos, sin), strict=True))


@compiled
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 20000), st.sampled_from([1e-3, 1.0, 30.0]))
def test_gates_are_the_definition(rows, size, scale):
    gate, x = draw(rows, size, scale=scale), draw(rows, size, seed=1)
    wide = gate.double()
    near(elementwise.gated(gate, x), wide / (1 + (-wide).exp()) * x.double())


@compiled
def test_gates_at_the_ends_are_torchs():
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 100.0, -100.0, 0.0]).bfloat16()
    found = elementwise.gated(gate, torch.ones_like(gate))
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), rtol=0, atol=1e-30, equal_nan=True)


@compiled
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(bad):
    x, weight = draw(3, 40), draw(40, seed=1)
    clean = elementwise.rms_norm(x, weight, 1e-6)
    x[1, 7] = bad
    found = elementwise.rms_norm(x, weight, 1e-6)
    assert torch.equal(found[[0, 2]], clean[[0, 2]]) and not found[1].isfinite().all()


@compiled
def test_what_the_kernels_do_not_take_is_left():
    x, weight = draw(2, 8), draw(8)
    for other in (x.float(), x.T.contiguous().T, x[:0], x.to("meta"), draw(2, 6)):
        assert elementwise.rms_norm(other, weight, 1e-6) is None
        assert elementwise.gated(other, x) is None
    q, k, cos = draw(1, 3, 2, 8).transpose(1, 2), draw(1, 3, 1, 8).transpose(1, 2), draw(1, 3, 8)
    assert elementwise.rotate(q, k, cos, cos) is not None
    for args in ((q.contiguous(), k, cos, cos), (q, k, cos[..., :4], cos[..., :4]), (q, k[:, :, :2], cos, cos)):
        assert elementwise.rotate(*args) is None
    assert elementwise.rotate(q.expand(2, -1, -1, -1), k, cos, cos) is None


def changed(model):
    return {name.rpartition(".")[2] for name, module in model.named_modules() if "forward" in vars(module)}


@compiled
def test_a_fused_model_says_the_same():
    plain = tiny_llama(hidden_size=128, dtype="bfloat16")
    fused = fuse(copy.deepcopy(plain))
    assert changed(fused) == {"norm", "input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}
    assert not changed(plain)
    with torch.no_grad():
        assert torch.allclose(fused(IDS).logits, plain(IDS).logits, rtol=0.02, atol=0.02)
    twice = fuse(fused)
    assert twice is fused and fused.state_dict().keys() == plain.state_dict().keys()
    apart = copy.deepcopy(fused)
    assert apart.model.norm.forward.__self__ is apart.model.norm


@compiled
@pytest.mark.parametrize("kind", ["Gemma", "Qwen3", "Cohere", "Phi3"])
def test_models_that_compute_otherwise_keep_their_own(kind):
    """Norms with 1 + weight or a mean, positions turned in pairs, other gates: all are recognised by what they say."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16().eval()
    fused = fuse(copy.deepcopy(plain))
    expected = {
        "Gemma": {"self_attn"},
        "Qwen3": {"norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "self_attn", "mlp"},
        "Cohere": {"mlp"},
        "Phi3": {"norm", "input_layernorm", "post_attention_layernorm", "self_attn"},
    }
    assert changed(fused) == expected[kind]
    with torch.no_grad():
        assert torch.allclose(fused(IDS).logits, plain(IDS).logits, rtol=0.02, atol=0.02)


@compiled
def test_a_packed_model_is_fused_and_without_a_compiler_is_not(tmp_path, monkeypatch):
    from test_packed_layers import HERE, load

    if HERE is not None:
        pytest.skip(f"packing {HERE}")
    write_checkpoint(tmp_path, hidden_size=128, dtype="bfloat16")
    assert "self_attn" in changed(load(tmp_path))
    assert not changed(load(tmp_path, "none"))
    monkeypatch.setattr(elementwise, "_kernels", lambda: None)
    assert not changed(load(tmp_path))
