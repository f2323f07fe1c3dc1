"""The networks' parts against PyTorch's own, and what the whole must depend on."""
import sys

import pytest
import torch
from conftest import awake, load_definitions
from torch import nn
from torch.nn import functional as F


def test_time_embedding_is_close_for_close_times(nb):
    code = nb.time_embedding(torch.arange(1001))
    assert code.shape == (1001, 64) and code.abs().max() <= 1
    alike = F.cosine_similarity(code[500][None], code)
    assert alike.argmax() == 500 and alike[501] > alike[510] > alike[700]
    for t in (0, 1, 37, 1000):  # each pair of components is one clock hand
        assert torch.allclose(code[t, :32] ** 2 + code[t, 32:] ** 2, torch.ones(32), atol=1e-5)
        assert code[t, 0] == pytest.approx(float(torch.tensor(float(t)).sin()), abs=1e-4)


@pytest.mark.parametrize("c, heads, size", ((32, 4, 7), (8, 1, 8), (48, 3, 4)))
def test_attention_equals_pytorch(nb, c, heads, size):
    """Map times values is scaled_dot_product_attention, the block is MultiheadAttention."""
    block, x = awake(nb.SelfAttention(c, heads)), torch.randn(2, c, size, size)
    oracle = nn.MultiheadAttention(c, heads, batch_first=True)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(block.to_qkv.weight[:, :, 0, 0])
        oracle.in_proj_bias.copy_(block.to_qkv.bias)
        oracle.out_proj.weight.copy_(block.out.weight[:, :, 0, 0])
        oracle.out_proj.bias.copy_(block.out.bias)
    weights, v = block.maps(x)
    assert torch.allclose(weights.sum(-1), torch.ones(()))
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    q, k, _ = (F.linear(tokens, w, b).unflatten(2, (heads, -1)).transpose(1, 2) for w, b in
               zip(oracle.in_proj_weight.chunk(3), oracle.in_proj_bias.chunk(3)))
    torch.testing.assert_close(weights @ v, F.scaled_dot_product_attention(q, k, v),
                               atol=1e-5, rtol=1e-4)
    theirs = oracle(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), x + theirs, atol=1e-4, rtol=1e-4)


def test_channel_norm_is_layer_norm_of_each_pixel(nb):
    norm, x = awake(nb.ChannelNorm(16)), 3 + 5 * torch.randn(2, 16, 5, 5)
    for i, j in ((0, 0), (2, 4)):
        theirs = F.layer_norm(x[:, :, i, j], (16,), norm.weight, norm.bias)
        torch.testing.assert_close(norm(x)[:, :, i, j], theirs, atol=1e-5, rtol=1e-4)


def test_new_blocks_change_nothing_and_a_new_network_answers_zero(nb, tiny):
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(nb.ResBlock(16, 8)(x, torch.randn(2, 8)), x)
    assert torch.equal(nb.SelfAttention(16, 4)(x), x)
    assert not nb.UNet(tiny)(torch.randn(2, 1, 28, 28), torch.tensor([1, 50])).any()


@pytest.mark.parametrize("size, channels", ((28, 1), (32, 1), (28, 3), (32, 3), (64, 3)))
def test_sizes_and_channels(nb, tiny, size, channels):
    x, t = torch.randn(2, channels, size, size), torch.tensor([1, 50])
    assert awake(nb.UNet(tiny, channels))(x, t).shape == x.shape
    assert awake(nb.FirstUNet(channels))(x, t, t % 10).shape == x.shape


def test_time_and_label_matter_for_each_picture(nb, tiny):
    net, x = awake(nb.UNet(tiny)), torch.randn(1, 1, 28, 28).expand(3, -1, -1, -1)
    same, times, first = torch.tensor([9] * 3), torch.tensor([1, 25, 50]), nb.FirstUNet()
    by_label = net(x, same, torch.tensor([0, 1, 10]))
    for out in (by_label, net(x, times), awake(first)(x, times, same),
                first(x, same, torch.arange(3))):
        assert not torch.allclose(out[0], out[1]) and not torch.allclose(out[1], out[2])
    torch.testing.assert_close(by_label[2:], net(x[:1], torch.tensor([9])))  # 10 is no label


def test_gradients_reach_every_parameter(nb, tiny):
    for net, n in ((nb.UNet(tiny), 11), (nb.FirstUNet(), 10)):
        x, y = torch.randn(n, 1, 28, 28), torch.arange(n)
        awake(net)(x, y + 1, y).square().mean().backward()
        assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_half_precision_stays_inside(nb, tiny, monkeypatch):
    x, t, answers = torch.randn(2, 1, 28, 28), torch.tensor([3, 40]), []
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
        answers.append(awake(load_definitions("diffusion_tutorial").UNet(tiny))(x, t))
    sys.modules["diffusion_tutorial"] = nb
    half, exact = answers
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half - exact).abs().max() < 0.1 * exact.abs().max()
