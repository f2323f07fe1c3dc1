"""The latent notebook's definitions against oracles, and its promises to the encoder."""
import ast
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import DEFINES, ROOT, awake, code_cells, load_definitions, parse
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.distributions import Normal, kl_divergence

BYTES = (torch.arange(70 * 784) ** 2 // 7 % 256).byte().view(70, 1, 28, 28)


@pytest.fixture(scope="module")
def lat():
    """The definitions of the latent notebook."""
    return load_definitions("latent_diffusion_cab")


@pytest.fixture
def cfg(lat):
    """Small settings."""
    return lat.Config(widths=(8, 16), blocks=1, batch=16, steps=10, warmup=2, T=50)


def pretend(lat, guess):
    """A latent model of 50 noise levels whose denoiser is a given function."""
    coder, some_codes = awake(lat.Autoencoder()), 2 * torch.randn(100, 4, 7, 7) + 1
    return lat.Latent(guess, coder, lat.scale_of(some_codes), lat.make_schedule("cosine", 50))


def test_gates_and_blocks_equal_plain_arithmetic(lat):
    part, h = awake(lat.ChannelAttention(16), 1.0), torch.randn(3, 16, 5, 5)
    assert len(part.squeeze.bias) == 4 and len(lat.ChannelAttention(64).squeeze.bias) == 8
    for picture, gated in zip(h, part(h)):
        means = torch.stack([channel.sum() / 25 for channel in picture])
        low = (part.squeeze.weight @ means + part.squeeze.bias).clamp(min=0)
        factors = 2 / (1 + torch.exp(-(part.excite.weight @ low + part.excite.bias)))
        torch.testing.assert_close(gated, picture * factors[:, None, None])
    gain = awake(lat.Gain(16))
    assert torch.equal(gain(h)[:, 3], h[:, 3] * gain.factor[3])
    for gate in lat.GATES:
        block = awake(lat.CAB(16, gate))
        inner = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1).clamp(min=0)
        inner = F.conv2d(inner, block.conv2.weight, block.conv2.bias, padding=1)
        torch.testing.assert_close(block(h), h + block.gate(inner))


def test_a_new_gate_multiplies_by_exactly_1(lat):
    h, plain = torch.randn(3, 16, 5, 5), lat.CAB(16, "none")
    assert torch.equal(lat.Published(16)(h), h / 2)
    for name, gate in lat.GATES.items() - {("published", lat.Published)}:
        block = lat.CAB(16, name)
        block.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(gate(16)(h), h) and torch.equal(block(h), plain(h)), name


def test_codes_and_pictures_have_their_shapes_and_gradients_reach_all(lat):
    sizes = (4, (24, 48)), (2, (8, 16)), (8, (16, 8)), (1, (8, 8))
    for gate, (code, widths) in zip(lat.GATES, sizes):
        coder, x = awake(lat.Autoencoder(code, widths, gate)), torch.randn(3, 1, 28, 28)
        for name, p in coder.named_parameters():
            p.data += name.endswith("squeeze.bias")  # no relu is shut by chance
        mean, log_var = coder.encode(x)
        assert mean.shape == log_var.shape == (3, code, 7, 7) and log_var.std() > 0
        assert coder.decode(mean).shape == x.shape
        lat.autoencoder_loss(coder, x, torch.randn(mean.shape), 1e-3)[0].backward()
        assert all(p.grad.abs().sum() > 0 for p in coder.parameters()), gate


def test_loss_is_error_plus_divergence_from_the_standard_normal(lat):
    coder, x, eps = awake(lat.Autoencoder()), *map(torch.randn, ((5, 1, 28, 28), (5, 4, 7, 7)))
    with torch.no_grad():
        mean, log_var = coder.encode(x)
        far = kl_divergence(Normal(mean, log_var.exp().sqrt()), Normal(0.0, 1.0)).mean()
        wanted = (coder.decode(mean + log_var.exp().sqrt() * eps) - x).square().mean()
        for kl in (0.0, 0.5):
            found = lat.autoencoder_loss(coder, x, eps, kl)
            torch.testing.assert_close(found, (wanted + kl * far, wanted))


def test_training_of_the_autoencoder_is_a_function_of_its_seed_alone(lat):
    trained = []
    for outside, seed in ((1, 0), (2, 0), (1, 5)):
        coder = awake(lat.Autoencoder(widths=(8, 16)), 0.05)
        torch.manual_seed(outside)
        lat.train_autoencoder(coder, BYTES, 3, seed=seed)
        trained.append(torch.cat([p.flatten() for p in coder.parameters()]))
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_similarity_and_quality_equal_scikit_image(lat, monkeypatch):
    monkeypatch.chdir(ROOT)
    x, real = lat.scale(lat.load_data("MNIST", train=False)[0][:600]), torch.randn(600, 128)
    x_hat = x + torch.linspace(0, 0.3, 600)[:, None, None, None] * lat.draw_noise(x.shape, 0)
    vars(lat).update(yardstick=lat.load_classifier("MNIST"), real_test=real)
    found, a, b = lat.quality(x, x_hat), x[:, 0].numpy(), x_hat[:, 0].numpy()
    oracle = [structural_similarity(p / 2 + 0.5, q / 2 + 0.5, data_range=1, sigma=1.5,
                                    gaussian_weights=True, use_sample_covariance=False)
              for p, q in zip(a, b)]
    assert found["SSIM"] == pytest.approx(sum(oracle) / 600, abs=1e-3)
    assert found["PSNR, dB"] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2))
    fake = lat.features_of(lat.yardstick, lat.to_bytes(x_hat))
    assert found["FID"] == pytest.approx(lat.fid(real, fake))


def test_scale_works_channel_by_channel_and_back(lat):
    z = torch.randn(500, 3, 7, 7) * torch.tensor([0.1, 1.0, 5.0])[:, None, None] + 2
    scale = lat.scale_of(z)
    for channel in scale.to(z).unbind(1):
        assert abs(channel.mean()) < 1e-4 and abs(channel.std() - 1) < 1e-4
    torch.testing.assert_close(scale.back(scale.to(z)), z, atol=1e-4, rtol=1e-4)


def test_unet_for_codes_keeps_odd_sizes_starts_at_zero_and_learns_everywhere(lat, cfg):
    t, y = torch.tensor([1, 20, 30, 50]), torch.arange(4)
    for size in ((7, 7), (7, 14)):
        net, z = lat.LatentUNet(cfg, 4), torch.randn(4, 4, *size)
        assert torch.equal(net(z, t, y), 0 * z)
        awake(net)(z, t, y).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_no_gradient_reaches_the_encoder_and_codes_are_learned_as_they_are(lat, cfg):
    coder, road = awake(lat.Autoencoder()), lat.make_schedule(cfg.schedule, cfg.T)
    codes = lat.encode_all(coder, BYTES)
    batch = lat.make_batch(codes, torch.arange(70) % 10, 0, cfg)
    assert set(batch[0].flatten().tolist()) <= set(codes.flatten().tolist())
    lat.loss_of(lat.LatentUNet(cfg, 4), *batch, road, "v").mean().backward()
    assert all(p.grad is None for p in coder.parameters())


def test_latent_samples_are_not_clamped(lat):
    latent, seen = pretend(lat, lambda z, t, y: torch.full_like(z, 3.0)), []
    latent.coder.decode = lambda z: seen.append(z) or z[:, :1]
    latent.draw(torch.arange(5), 10)
    torch.testing.assert_close(latent.scale.to(seen[0]), torch.full((5, 4, 7, 7), 3.0))
    clamped = lat.draw(latent.denoise, latent.schedule, torch.arange(5), [50, 0], (4, 7, 7))
    torch.testing.assert_close(clamped, torch.full((5, 4, 7, 7), 1.0))


def test_latent_draw_depends_on_the_seed_alone_and_a_file_draws_the_same(lat, cfg, tmp_path):
    net, y = awake(lat.LatentUNet(cfg, 4)), torch.arange(260) % 10
    latent = pretend(lat, lat.denoiser(net, lat.make_schedule("cosine", 50), "v"))
    torch.save({"coder": latent.coder.state_dict(), "autoencoder": "{}",
                "ema": net.state_dict(), "config": json.dumps(lat.asdict(cfg)),
                **latent.scale._asdict()}, tmp_path / "latent.pt")
    a, b, read, other = (each.draw(y, 3, 2.0, seed=seed) for each, seed in (
        (latent, 1), (latent, 1), (lat.load_latent(tmp_path / "latent.pt"), 1), (latent, 2)))
    assert a.shape == (260, 1, 28, 28) and torch.equal(a, b)
    assert (a - read).abs().mean() < 0.01 < (a - other).abs().mean()


def test_printed_sampler_with_both_parts_is_the_step_with_eta_1(lat):
    latent = pretend(lat, lambda z, t, y: torch.tanh(z + t.view(-1, 1, 1, 1) / 50))
    y, z_T = torch.full((3,), 10), lat.draw_noise((3, 4, 7, 7), 5)
    for noisy in (True, False):
        z = z_T
        for t in range(50, 0, -1):
            guess = latent.denoise(z, 0 * y + t, y)
            fresh = lat.draw_noise(z.shape, 1000 + t) * noisy
            z = lat.reverse_step(z, guess, t, t - 1, latent.schedule, 1.0, fresh)
        found, wrong = (lat.printed_sample(latent, z_T, y, d, noisy) for d in (True, False))
        torch.testing.assert_close(found, z, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(wrong, z, atol=0.1)


def test_what_both_notebooks_define_is_the_same():
    first, second = ({node.name: ast.dump(node) for cell in code_cells(name)
                      for node in parse(cell.source).body if isinstance(node, DEFINES[2:])}
                     for name in ("diffusion_tutorial", "latent_diffusion_cab"))
    both = (first.keys() & second.keys()) - {"load_data"}
    assert len(both) >= 30 and not {name for name in both if first[name] != second[name]}


@pytest.mark.parametrize("name, asked", (("MNIST", 0.95), ("FashionMNIST", 0.85)))
def test_shipped_latents_decode_and_draw_as_their_facts_say(lat, name, asked, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = ROOT / f"assets/weights/latent-{name.lower()}.pt"
    facts, latent = json.loads(file.with_suffix(".json").read_text()), lat.load_latent(file)
    images, y = lat.load_data(name, train=False)[0][::10], torch.arange(200) % 10
    codes, yardstick = lat.encode_all(latent.coder, images), lat.load_classifier(name)
    x, x_hat = lat.scale(images), lat.decode_all(latent.coder, codes)
    psnr = peak_signal_noise_ratio(x.numpy(), x_hat.numpy(), data_range=2)
    assert psnr == pytest.approx(facts["PSNR"], rel=0.02)
    assert lat.similarity(x, x_hat) == pytest.approx(facts["SSIM"], rel=0.02)
    for mean, deviation in zip(*lat.scale_of(latent.scale.to(codes))):
        assert mean.abs().max() < 0.1 and (deviation - 1).abs().max() < 0.1
    drawn = lat.to_bytes(latent.draw(y, 25, w=1.5))
    seen = yardstick.head(lat.features_of(yardstick, drawn)).argmax(1)
    assert (seen == y).float().mean() >= asked
