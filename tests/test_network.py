"""The network's parts against PyTorch's own and against plain loops."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F


def awake(nb, **changes):
    """A small U-Net whose zero-initialised layers have been given weights."""
    torch.manual_seed(0)
    cfg = nb.replace(nb.make_config("smoke", "FashionMNIST"), **changes.pop("cfg", {}))
    net = nb.UNet(cfg, **changes)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def test_time_embedding_is_close_for_close_times(nb):
    code = nb.time_embedding(torch.arange(1001))
    assert code.shape == (1001, 64) and code.abs().max() <= 1
    alike = F.cosine_similarity(code[500][None], code)
    assert alike[500] == pytest.approx(1) and alike.argmax() == 500
    assert alike[501] > alike[510] > alike[700]
    for t in (0, 1, 37, 1000):  # each pair of components is one clock hand
        assert torch.allclose(code[t, :32] ** 2 + code[t, 32:] ** 2, torch.ones(32), atol=1e-5)
        assert code[t, 0] == pytest.approx(float(torch.tensor(float(t)).sin()), abs=1e-4)


@pytest.mark.parametrize("shape", ((2, 4, 49, 16), (1, 1, 64, 8), (3, 2, 16, 32)))
def test_attention_equals_scaled_dot_product_attention(nb, shape):
    q, k, v = torch.randn(3, *shape).unbind(0)
    torch.testing.assert_close(nb.attention_map(q, k) @ v,
                               F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4)


def test_self_attention_equals_torch_multihead_attention(nb):
    block = nb.SelfAttention(32, 4)
    nn.init.normal_(block.out.weight)
    oracle = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(block.to_qkv.weight[:, :, 0, 0])
        oracle.in_proj_bias.copy_(block.to_qkv.bias)
        oracle.out_proj.weight.copy_(block.out.weight[:, :, 0, 0])
        oracle.out_proj.bias.copy_(block.out.bias)
    x = torch.randn(2, 32, 7, 7)
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    theirs = oracle(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), x + theirs, atol=1e-4, rtol=1e-4)


def test_channel_norm_normalises_each_pixel_over_channels(nb):
    x = 3 + 5 * torch.randn(2, 16, 5, 5)
    out = nb.ChannelNorm(16)(x)
    assert out.mean(1).abs().max() < 1e-4
    assert (out.var(1, correction=0) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("size, channels", ((28, 1), (32, 1), (28, 3), (32, 3)))
def test_sizes_and_channels(nb, size, channels):
    net, x = awake(nb, channels=channels), torch.randn(2, channels, size, size)
    assert net(x, torch.tensor([1, 50])).shape == x.shape


def test_bad_size_gets_one_sentence(nb):
    with pytest.raises(nb.ReaderError, match="multiples of 4"):
        awake(nb)(torch.randn(1, 1, 30, 28), torch.tensor([1]))


def test_time_and_label_matter_per_image(nb):
    net, x = awake(nb), torch.randn(1, 1, 28, 28).expand(3, -1, -1, -1)
    by_time = net(x, torch.tensor([1, 25, 50]))
    by_label = net(x, torch.tensor([9, 9, 9]), torch.tensor([0, 1, 10]))
    for out in (by_time, by_label):
        assert not torch.allclose(out[0], out[1]) and not torch.allclose(out[1], out[2])
    torch.testing.assert_close(by_label[2:], net(x[:1], torch.tensor([9])))  # 10 is no label


def test_images_of_a_batch_do_not_mix(nb):
    net, x, t = awake(nb), torch.randn(4, 1, 28, 28), torch.tensor([1, 9, 30, 50])
    alone = torch.cat([net(x[i:i + 1], t[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(net(x, t), alone, atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_parameter(nb):
    net, x = awake(nb), torch.randn(8, 1, 28, 28)
    net(x, torch.arange(1, 9), torch.arange(3, 11)).square().mean().backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_a_fresh_network_predicts_zero(nb):
    net = nb.UNet(nb.make_config("smoke", "MNIST"))
    assert not net(torch.randn(2, 1, 28, 28), torch.tensor([1, 50])).any()


def test_half_precision_stays_inside(nb):
    net = awake(nb, dtype=torch.bfloat16)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 40])
    fast = net(x, t)
    net.dtype = None
    exact = net(x, t)
    assert fast.dtype == torch.float32 and not torch.equal(fast, exact)
    assert (fast - exact).abs().max() < 0.1 * exact.abs().max()


def test_heads_must_divide_channels(nb):
    with pytest.raises(nb.ReaderError, match="heads"):
        nb.SelfAttention(30, 4)


def test_guidance_at_zero_and_one_is_no_label_and_label(nb):
    net, x, t = awake(nb), torch.randn(4, 1, 28, 28), torch.tensor([3, 9, 20, 50])
    y = torch.tensor([0, 5, 9, 10])
    none, labelled = net(x, t), net(x, t, y)
    torch.testing.assert_close(nb.guided(net, 0.0)(x, t, y), none, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(nb.guided(net, 1.0)(x, t, y), labelled, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(nb.guided(net, 3.0)(x, t, y), 3 * labelled - 2 * none,
                               atol=1e-5, rtol=1e-4)
    assert not torch.allclose(labelled[:3], none[:3])


def test_outside_its_band_guidance_is_the_plain_label(nb):
    net, x, y = awake(nb), torch.randn(4, 1, 28, 28), torch.tensor([0, 5, 9, 3])
    model = nb.guided(net, 3.0, (10, 20))
    for t in (1, 9, 21, 50):
        t = torch.full((4,), t)
        assert torch.equal(model(x, t, y), net(x, t, y))
    for t in (10, 15, 20):
        t = torch.full((4,), t)
        torch.testing.assert_close(model(x, t, y), 3 * net(x, t, y) - 2 * net(x, t),
                                   atol=1e-5, rtol=1e-4)
