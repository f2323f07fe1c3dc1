"""The latent notebook's definitions against oracles, and its promises to the encoder."""
import json
import types
import weakref

import pytest
import torch
from conftest import ROOT, load_definitions
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def lat() -> types.ModuleType:
    """The definitions of the latent notebook."""
    return load_definitions("latent_diffusion_cab")


@pytest.fixture
def small(lat, tmp_path, monkeypatch):
    """Both configurations of profile smoke, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lat.make_config("smoke", "MNIST")


def randomised(model):
    """The model with weights that make every part count."""
    torch.manual_seed(3)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def test_block_equals_plain_arithmetic(lat):
    block, x = randomised(lat.CAB(16, "attention", 8)), torch.randn(3, 16, 5, 5)
    h = nn.functional.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1)
    h = nn.functional.conv2d(h.clamp(min=0), block.conv2.weight, block.conv2.bias, padding=1)
    gate = block.gate
    for b in range(3):
        mean = torch.stack([h[b, c].sum() / 25 for c in range(16)])
        low = gate.squeeze.weight[:, :, 0, 0] @ mean + gate.squeeze.bias
        high = gate.excite.weight[:, :, 0, 0] @ low.clamp(min=0) + gate.excite.bias
        factor = 1 / (1 + torch.exp(-high))
        expected = x[b] + factor[:, None, None] * h[b]
        torch.testing.assert_close(block(x)[b], expected, atol=1e-5, rtol=1e-4)
    assert low.shape == (4,), "8-fold reduction of 16 would leave 2: at least 4 are kept"


@pytest.mark.parametrize(("channels", "folds", "code"), [
    (4, 2, (4, 7, 7)), (1, 2, (1, 7, 7)), (8, 3, (8, 4, 4)), (2, 1, (2, 14, 14))])
def test_codes_and_pictures_have_their_shapes(lat, small, channels, folds, code):
    model = lat.Autoencoder(lat.replace(small[0], channels=channels, folds=folds))
    x = torch.randn(3, 1, 28, 28)
    mean, log_var = model.encode(x)
    assert mean.shape == log_var.shape == (3, *code) and model.code == code
    assert model.decode(mean).shape == x.shape
    assert lat.autoencoder_batch(torch.zeros(9, 28, 28, dtype=torch.uint8), 0, lat.replace(
        small[0], channels=channels, folds=folds))[1].shape[1:] == code


def test_gradients_reach_every_parameter(lat, small):
    for gate in ("attention", "gain", "none"):
        model = randomised(lat.Autoencoder(lat.replace(small[0], gate=gate)))
        eps = torch.randn(4, *model.code)
        lat.autoencoder_loss(model, torch.randn(4, 1, 28, 28), eps, 1e-3).backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters()), gate
    model = randomised(lat.LatentUNet(small[1], 4))
    t, y = torch.tensor([1, 20, 30, 50]), torch.arange(4)
    model(torch.randn(4, 4, 7, 7), t, y).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_loss_is_error_plus_divergence_from_the_standard_normal(lat, small):
    model, x = randomised(lat.Autoencoder(small[0])), torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        mean, log_var = model.encode(x)
        eps = torch.randn(mean.shape)
        normal = torch.distributions.Normal
        sd = (0.5 * log_var).exp()
        distance = torch.distributions.kl_divergence(normal(mean, sd), normal(0.0, 1.0))
        error = (model.decode(mean + sd * eps) - x).square().mean()
        for kl in (0.0, 0.5):
            found = lat.autoencoder_loss(model, x, eps, kl)
            torch.testing.assert_close(found, error + kl * distance.mean())


def test_autoencoder_trains_the_same_whole_or_resumed(lat, small, tmp_path):
    images = torch.randint(0, 256, (50, 28, 28), dtype=torch.uint8)
    space, cut = small[0], lat.replace(small[0], save_every=5)
    whole = lat.State(space, 1, CPU, lat.Autoencoder)
    lat.train_autoencoder(whole, images, space, None)

    def stop(state):
        if state.step == 7:
            raise KeyboardInterrupt

    first, second = (lat.State(cut, 1, CPU, lat.Autoencoder) for _ in range(2))
    lat.train_autoencoder(first, images, cut, tmp_path / "run", stop)
    lat.resume(second, cut, tmp_path / "run")
    assert second.step == 5
    lat.train_autoencoder(second, images, cut, tmp_path / "run")
    for a, b in zip(whole.ema.parameters(), second.ema.parameters()):
        assert torch.equal(a, b)


def test_no_gradient_reaches_the_encoder(lat, small):
    space, cfg = small
    coder = lat.Autoencoder(space)
    images = torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8)
    codes = lat.encode_all(coder, images)
    assert not codes.requires_grad
    before = [p.clone() for p in coder.parameters()]
    state = lat.State(cfg, space.channels, CPU, lat.LatentUNet)
    alpha_bar = lat.make_alpha_bar(cfg.schedule, cfg.T)
    batch = lat.make_batch(codes, torch.zeros(40, dtype=torch.long), 0, cfg)
    lat.train_step(state, batch, alpha_bar, cfg)
    assert all(p.grad is None for p in coder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, coder.parameters()))


def test_scale_works_channel_by_channel_and_back(lat):
    z = torch.randn(500, 3, 7, 7) * torch.tensor([0.1, 1.0, 5.0])[:, None, None] + 2
    scale = lat.Scale(z)
    scaled = scale.to(z)
    for c in range(3):
        assert abs(scaled[:, c].mean()) < 1e-4 and abs(scaled[:, c].std() - 1) < 1e-4
    torch.testing.assert_close(scale.back(scaled), z, atol=1e-4, rtol=1e-4)
    again = lat.Scale(statistics=scale.statistics.half())
    torch.testing.assert_close(again.to(z), scaled, atol=2e-2, rtol=2e-2)


def test_quality_equals_scikit_image(lat):
    images = lat.load_images("MNIST", False, str(ROOT / "assets/data")).data[:40]
    x = lat.to_float(images)
    torch.manual_seed(0)
    x_hat = x + 0.2 * torch.rand_like(x) * torch.linspace(0, 2, 40)[:, None, None, None]
    psnr, ssim = lat.quality(x, x_hat)
    a = ((x + 1) / 2)[:, 0].numpy()
    b = ((x_hat.clamp(-1, 1) + 1) / 2)[:, 0].numpy()
    assert psnr == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-3)
    oracle = [structural_similarity(p, q, data_range=1, gaussian_weights=True, sigma=1.5,
                                    use_sample_covariance=False) for p, q in zip(a, b)]
    assert ssim == pytest.approx(sum(oracle) / len(oracle), abs=2e-3)


def test_latent_samples_are_not_clamped(lat, small):
    space, cfg = small
    coder = lat.Autoencoder(space)
    scale = lat.Scale(torch.randn(100, *coder.code))
    big = torch.full((6, *coder.code), 3.0)

    def model(z_t, t, y):
        a = lat.make_alpha_bar(cfg.schedule, cfg.T)[t].float()[:, None, None, None]
        return (a.sqrt() * z_t - big[:len(z_t)]) / (1 - a).sqrt()  # v of z_0 = 3

    seen = []
    coder.decode = lambda z: seen.append(z) or torch.zeros(len(z), 1, 28, 28)
    lat.draw_latents((model, coder, scale), 6, cfg, True, 0, 10)
    torch.testing.assert_close(scale.to(seen[0]), big, atol=1e-3, rtol=1e-3)


def test_latent_draw_depends_on_the_seed_alone(lat, small):
    space, cfg = small
    coder, model = lat.Autoencoder(space), randomised(lat.LatentUNet(cfg, 4)).eval()
    latent = (model, coder, lat.Scale(torch.randn(100, *coder.code)))
    a, y = lat.draw_latents(latent, 260, cfg, True, 1, 3, 2.0)
    assert a.dtype == torch.uint8 and a.shape == (260, 1, 28, 28) and y.max() <= 9
    assert torch.equal(a, lat.draw_latents(latent, 260, cfg, True, 1, 3, 2.0)[0])
    assert (lat.draw_latents(latent, 5, cfg, False, 1, 3)[1] == 10).all()


def test_memory_stays_flat_over_a_thousand_steps(lat, small):
    cfg = lat.replace(small[1], T=1000)
    model = lat.LatentUNet(cfg, 4).eval()
    alpha_bar = lat.make_alpha_bar(cfg.schedule, cfg.T)
    run = lat.sample(model, torch.randn(2, 4, 7, 7), alpha_bar, "v", 1000, 1.0, clip=False,
                     y=torch.zeros(2, dtype=torch.long))
    seen = []
    for _, z_t, z_hat in run:
        assert not z_t.requires_grad and not z_hat.requires_grad
        seen += [weakref.ref(z_t), weakref.ref(z_hat)]
        assert sum(each() is not None for each in seen) < 10, "old codes are kept alive"
    assert len(seen) == 2002


def test_padding_is_black_all_around_and_cut_off_again(lat, small):
    model = lat.Autoencoder(lat.replace(small[0], folds=3))
    padded = []
    model.encoder.forward = lambda x: padded.append(x) or torch.zeros(len(x), 8, 4, 4)
    x = torch.rand(2, 1, 28, 28)
    model.encode(x)
    assert padded[0].shape == (2, 1, 32, 32)
    assert torch.equal(padded[0][..., 2:30, 2:30], x)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert (padded[0][..., border] == -1).all()
    model.decoder.forward = lambda z: padded[0]
    assert torch.equal(model.decode(torch.zeros(2, 4, 4, 4)), x)


@pytest.mark.parametrize(("name", "psnr", "ssim", "asked"), [
    ("mnist", 32, 0.98, 0.95), ("fashionmnist", 27, 0.92, 0.85)])
def test_shipped_latents_decode_and_draw_as_their_facts_say(lat, name, psnr, ssim, asked):
    folder = ROOT / "assets/weights"
    facts = json.loads((folder / f"latent-{name}.json").read_text())
    assert facts["PSNR"] >= psnr and facts["SSIM"] >= ssim
    _, cfg = lat.make_config("cpu", facts["space"]["dataset"])
    latent, its = lat.load_latent(
        lat.read_checkpoint(folder / f"latent-{name}.pt"), cfg, CPU)
    images = lat.load_images(its.dataset, False, str(ROOT / "assets/data")).data[:1000]
    codes = lat.encode_all(latent[1], images)
    found = lat.quality(lat.to_float(images), lat.decode_all(latent[1], codes))
    assert found == pytest.approx((facts["PSNR"], facts["SSIM"]), rel=0.02)
    scaled = latent[2].to(codes)
    assert scaled.mean((0, 2, 3)).abs().max() < 0.1
    assert (scaled.std((0, 2, 3)) - 1).abs().max() < 0.1
    net = lat.Classifier().eval()
    net.load_state_dict(lat.read_checkpoint(folder / f"classifier-{name}.pt")["classifier"])
    x, y = lat.draw_latents(latent, 200, its, True, 0, 40, 2.0)
    with torch.no_grad():
        seen = net.head(lat.features_of(net, x)).argmax(1)
    assert (seen == y).float().mean() >= asked
