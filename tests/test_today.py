"""Part 7: pairs for few calls, the transformer, and the bound in bits."""
import json
import math

import pytest
import torch
from conftest import ROOT, awake
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F


@pytest.fixture
def road(nb):
    """A road of 50 steps, and a denoiser of pixels that are normal with deviation 0.25."""
    curves = nb.make_schedule("cosine", 50)
    return curves, nb.normal_denoiser(0.25, curves)


def test_each_picture_of_a_pair_is_what_its_noise_becomes(nb, road, monkeypatch):
    curves, guess = road
    monkeypatch.setattr(nb, "CLASSES", list("abc"), raising=False)
    monkeypatch.setattr(nb, "shape", (1, 4, 4), raising=False)
    x, y, z = nb.draw_pairs(guess, curves, 10, 8, seed=3, at_once=4)
    how = nb.few_step("2M", guess, curves, 8)
    how["x_T"] = z
    again = nb.last(nb.sample(**how))
    torch.testing.assert_close(x, again)
    assert y.tolist() == [0, 1, 2] * 3 + [0]


def test_a_batch_keeps_pairs_together_and_begins_half_of_them_at_T(nb, tiny):
    z = torch.randn(50, 1, 4, 4)
    cfg = nb.replace(tiny, batch=2000)
    x_0, y, t, eps = nb.pair_batch((2 * z, torch.arange(50), z), 7, cfg)
    assert torch.equal(x_0, 2 * eps) and torch.equal(eps, z[y])
    assert 0.45 < (t == cfg.T).float().mean() < 0.58 and t.min() >= 1 and t.max() == cfg.T
    assert len(t.unique()) == cfg.T
    assert torch.equal(t, nb.pair_batch((z, torch.arange(50), z), 7, cfg)[2])


@pytest.mark.parametrize("channels, side, patch", (
    (1, 28, 4), (1, 28, 2), (3, 32, 4), (4, 7, 1)))
def test_the_transformer_puts_patches_back(nb, tiny, channels, side, patch):
    net = awake(nb.DiT(tiny, channels, side, patch, d=16, depth=2))
    x, t = torch.randn(2, channels, side, side), torch.tensor([1, 50])
    assert net(x, t).shape == x.shape
    assert not torch.allclose(net(x, t), net(x, t.flip(0)))
    net.blocks, net.head = torch.nn.ModuleList(), torch.nn.Identity()
    net.stem, net.place.data = torch.nn.Identity(), torch.zeros(1)
    patches = F.unfold(x, patch, stride=patch)  # the oracle's order: channel, row, column
    normal = F.layer_norm(patches.transpose(1, 2), patches.shape[1:2]).transpose(1, 2)
    theirs = F.fold(normal, side, patch, stride=patch)
    torch.testing.assert_close(net.answer(x, torch.zeros(2, 128)).float(), theirs,
                               atol=0.02, rtol=0.02)


def test_a_new_block_of_the_transformer_changes_nothing(nb):
    x = torch.randn(2, 9, 16)
    assert torch.equal(nb.DiTBlock(16, 4)(x, torch.randn(2, 128)), x)


def test_its_attention_is_pytorchs(nb):
    """A block whose gates are open, without its MLP, is MultiheadAttention."""
    block, x, e = awake(nb.DiTBlock(16, 4)), torch.randn(2, 9, 16), torch.zeros(2, 128)
    block.steer.weight.data.zero_()
    block.steer.bias.data = torch.tensor([0.0, 0, 1, 0, 0, 0]).repeat_interleave(16)
    oracle = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    oracle.in_proj_weight.data, oracle.in_proj_bias.data = (
        block.to_qkv.weight.data, block.to_qkv.bias.data)
    oracle.out_proj.load_state_dict(block.out.state_dict())
    h = block.norm(x)
    torch.testing.assert_close(block(x, e), x + oracle(h, h, h)[0], atol=1e-4, rtol=1e-4)


def test_strata_are_an_unbiased_bound(nb, road):
    """One random t for each stratum gives, on average, the sum over all t."""
    curves, guess = road
    torch.manual_seed(1)
    x = nb.to_bytes(0.25 * torch.randn(400, 1, 8, 8))
    whole, few = nb.bits(guess, x, curves, 50), nb.bits(guess, x, curves, 12, seed=5)
    assert whole.shape == (400, 51) and few.shape == (400, 13)
    gap = whole.sum(1) - few.sum(1)
    assert abs(gap.mean()) < 4 * gap.std() / 20
    torch.testing.assert_close(whole[:, 0], few[:, 0])  # the prior has no time


def test_a_term_of_the_bound_is_the_divergence_of_two_bell_curves(nb):
    """The step from t to t - 1, for a network that always answers -0.1."""
    curves, t, x = nb.make_schedule("cosine", 50), 20, torch.full((1, 1, 4, 4), 166).byte()
    found = nb.bits(lambda x_t, t, y: torch.full_like(x_t, -0.1), x, curves, 50)[0, 51 - t]
    signal, noise = curves
    b = noise[t] ** 2 - (signal[t] / signal[t - 1]) ** 2 * noise[t - 1] ** 2
    true, modelled = (Normal(nb.reverse_step(
        torch.zeros(()), value, t, t - 1, curves, 1.0, torch.zeros(())),
        noise[t - 1] / noise[t] * b.sqrt()) for value in (nb.scale(x)[0, 0, 0, 0], -0.1))
    wanted = kl_divergence(true, modelled).item() / math.log(2)
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_the_shipped_student_draws_in_one_call(nb):
    net, cfg = nb.load_net(ROOT / "assets/weights/few-fashionmnist.pt")
    curves = nb.make_schedule(cfg.schedule, cfg.T)
    y, yardstick = nb.random_labels(500, 10, 1), nb.load_classifier("FashionMNIST")
    x = nb.draw(nb.denoiser(net, curves, cfg.predict), curves, y, [cfg.T, 0], (1, 28, 28), 0.0)
    f = nb.features_of(yardstick, nb.to_bytes(x))
    real = nb.features_of(yardstick, nb.load_data("FashionMNIST", train=False)[0])
    assert nb.fid(real, f) < 2.5  # its floor at N = 500 is about 0.3
    assert (yardstick.head(f).argmax(1) == y).float().mean() > 0.85


def test_kept_transformers_are_the_notebooks(nb):
    rows = json.loads((ROOT / "assets/results/transformers.json").read_text())["rows"]
    sizes = {"U-Net": nb.UNet, "DiT, patches of 4": nb.DiT}
    for row in rows:
        if row["space"] == "pixels" and row["network"] in sizes:
            net = sizes[row["network"]](nb.Config())
            assert sum(p.numel() for p in net.parameters()) == row["parameters"]
