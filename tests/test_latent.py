"""The latent notebook's definitions against oracles; words to pictures; shipped weights."""
import ast
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEFINES, ROOT, awake, code_cells, parse
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.distributions import Normal, kl_divergence

BYTES = (torch.arange(70 * 784) ** 2 // 7 % 256).byte().view(70, 1, 28, 28)


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


def test_similarity_and_quality_equal_scikit_image(lat, monkeypatch):
    x, real = lat.scale(lat.load_data("MNIST", train=False)[0][:600]), torch.randn(600, 128)
    x_hat = x + torch.linspace(0, 0.3, 600)[:, None, None, None] * lat.draw_noise(x.shape, 0)
    monkeypatch.setattr(lat, "yardstick", lat.load_classifier("MNIST"), raising=False)
    monkeypatch.setattr(lat, "real_test", real, raising=False)
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
def test_shipped_latents_decode_and_draw_as_their_facts_say(lat, name, asked):
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


@pytest.fixture(scope="module", params=("MNIST", "FashionMNIST"))
def language(request, lat):
    """The words of each data set."""
    return lat.Language(request.param)


def bar(height, width, row=14, col=14):
    """A white bar on black, [1, 1, 28, 28]."""
    x, top, left = torch.full((1, 1, 28, 28), -1.0), row - height // 2, col - width // 2
    x[..., top:top + height, left:left + width] = 1
    return x


def test_ink_moments_equal_numpy(lat):
    ink = torch.rand(3, 1, 28, 28) ** 4
    for picture, *found in zip(ink.numpy()[:, 0], *lat.ink_moments(ink)):
        rows, cols = np.mgrid[:28, :28]
        (across, mixed), (_, down) = np.cov(cols.ravel(), rows.ravel(), bias=True,
                                            aweights=picture.ravel())
        assert np.allclose(found, (across, down, mixed), rtol=1e-4)


def test_measures_of_digits_are_what_they_say(lat):
    for h, w in ((20, 3), (12, 6)):  # area over outline, in closed form
        thickness, slant, width, _ = lat.measure_digits(bar(h, w))[0]
        assert thickness == pytest.approx(h * w / (2 * (h + w)), rel=1e-4)
        assert abs(slant) < 1e-4 and width == pytest.approx(((w * w - 1) / 12) ** 0.5, rel=1e-3)
    leaning = torch.cat([bar(1, 3, row, 14 + (14 - row) // 2) for row in range(4, 25)])
    leaning = leaning.amax(0, keepdim=True)
    straight, slanted, mirrored = (lat.measure_digits(x)[0] for x in (
        bar(21, 3), leaning, leaning.flip(3)))
    assert slanted[1] == pytest.approx(0.5, abs=0.03) == -mirrored[1]
    assert slanted[2] == pytest.approx(straight[2].item(), abs=0.15)  # slant is taken out
    assert lat.measure_digits(bar(14, 3))[0, 3] < straight[3]


def test_measures_of_clothes_are_what_they_say(lat):
    plain, dark = bar(20, 12), bar(20, 12) * 0.5 - 0.5
    striped = plain.clone()
    striped[:, :, 4:24, 8:20][:, :, ::4] = -0.2
    values = [lat.measure_clothes(x)[0] for x in (plain, dark, striped, bar(12, 20))]
    assert values[1][0] < values[0][0] and values[2][3] > 2 * values[0][3]
    assert values[3][1] > values[0][1] and values[3][2] < values[0][2]


def test_thirds_of_each_class_are_thirds(lat):
    kinds = torch.arange(3000) % 10
    values = torch.rand(3000, 4) + kinds[:, None]
    levels = lat.levels_of(values, kinds, lat.thresholds_of(values, kinds))
    for c in range(10):
        for level in range(3):
            assert ((levels[kinds == c] == level).sum(0) - 100).abs().max() <= 1


def test_captions_say_only_what_is_true(lat, language):
    back = {synonym: word for word, synonym in lat.SYNONYMS.items()}
    rng, seen = random.Random(0), set()
    for i in range(2000):
        kind, levels = i % 10, [rng.randrange(3) for _ in range(4)]
        text = language.caption(kind, levels, rng)
        words = [back.get(word, word) for word in lat.split(text)]
        true = {language.nouns[kind], "thing", *lat.split(" ".join(
            said[level] for said, level in zip(language.attributes, levels)))}
        assert set(words) <= true and len(words) <= lat.LENGTH // 2, text
        assert len({language.nouns[kind], "thing"} & set(words)) == 1
        seen |= set(lat.split(text))
    assert seen == {*language.vocabulary} - {"", "and"}


def test_texts_are_read_word_by_word(lat, language):
    assert language.vocabulary[lat.NO_LABEL] == "" and len(set(language.vocabulary)) == len(
        language.vocabulary)
    text = language.text(7, [0, 2, -1, -1])
    y = language.read(f"The {text.upper()}, and a zebra!")
    assert [language.vocabulary[i] for i in y if i != lat.NO_LABEL] == [*lat.split(text), "and"]
    assert (language.read("") == lat.NO_LABEL).all()
    assert language.read("thing " * 99).shape == (lat.LENGTH,)


def test_withheld_combinations_are_found(lat, language):
    kinds, levels = torch.arange(5000) % 10, torch.randint(3, (5000, 4))
    found = language.withheld(kinds, levels)
    for kind, level, withheld in zip(kinds.tolist(), levels.tolist(), found.tolist()):
        assert withheld == any(kind == k and all(w in (-1, v) for w, v in zip(wanted, level))
                               for k, wanted in language.held_out)


def test_prompts_for_two_things_differ_in_the_same_two_attributes(lat, language):
    texts, kinds, levels = lat.ask(language, 50, 3, 2)
    said = levels >= 0
    assert (said.sum(2) == 2).all() and (said[:, 0] == said[:, 1]).all()
    assert not ((levels[:, 0] == levels[:, 1]) & said[:, 0]).any()
    for text, kind, level in zip(texts, kinds.tolist(), levels.tolist()):
        assert text == " and ".join(language.text(*one) for one in zip(kind, level))
        assert len(lat.split(text)) <= lat.LENGTH


def test_batches_are_repeated_and_fit_their_captions(lat, language):
    cfg = lat.Config(batch=200, steps=10, label_drop=0.0)
    kinds, levels = torch.arange(400) % 10, torch.randint(3, (400, 4))
    z = torch.arange(400.0).view(400, 1, 1, 1).expand(400, 4, 7, 7)  # each code is its number
    for things in (1, 2):
        a, b, other = (lat.caption_batch(z, kinds, levels, language, step, cfg, things)
                       for step in (3, 3, 4))
        assert all(torch.equal(one, two) for one, two in zip(a, b))
        assert not torch.equal(a[1], other[1]) and a[0].shape == (200, 4, 7, 7 * things)
        empty = (a[1] == lat.NO_LABEL).all(1)
        assert 5 < empty.sum() < 40
        for z_0, y in zip(a[0][~empty], a[1][~empty]):
            text = " ".join(language.vocabulary[i] for i in y if i != lat.NO_LABEL)
            for half, part in zip(z_0[0, 0].long()[[0, -1]], text.split(" and ")):
                nouns = [word for word in part.split() if word in language.nouns]
                assert nouns in ([], [language.nouns[kinds[half]]]), text


def test_a_bag_forgets_order_and_the_reader_does_not(lat):
    cfg = lat.Config(widths=(8, 16), blocks=1, T=50)
    bag, text = (awake(network(cfg, 4, 29), 0.3) for network in (lat.BagUNet, lat.TextUNet))
    y = torch.full((2, lat.LENGTH), lat.NO_LABEL)
    y[0, :5] = torch.tensor([13, 3, 12, 14, 7])
    y[1, :5] = torch.tensor([14, 3, 12, 13, 7])
    for width in (7, 14):
        z, t = lat.draw_noise((1, 4, 7, width), 0).expand(2, -1, -1, -1), torch.tensor([9, 9])
        one, other = bag(z, t, y)
        assert one.shape == (4, 7, width) and torch.allclose(one, other, atol=1e-2)
        one, other = text(z, t, y)
        assert one.shape == (4, 7, width) and (one - other).abs().mean() > 0.005
        assert torch.allclose(text(z, t, text.read(y)), text(z, t, y), atol=5e-2)
    for network in (lat.BagUNet, lat.TextUNet):
        assert torch.equal(network(cfg, 4, 29)(z, t, y), 0 * z)


def test_cross_attention_equals_pytorchs(lat):
    cross = awake(lat.CrossAttention(16, 12, 4))
    x, words = torch.randn(2, 16, 3, 5), torch.randn(2, 6, 12)
    q = cross.to_q(cross.norm(x)).view(2, 4, 4, 15).transpose(2, 3)
    k, v = cross.to_kv(words).view(2, 6, 2, 4, 4).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(2, 16, 3, 5)
    torch.testing.assert_close(cross(x, words), x + cross.out(h), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cross.maps(x, words)[0].sum(-1), torch.ones(2, 4, 15))


def test_negative_prompts_contain_guidance(lat):
    def guess(z, t, y):
        return z + y.float().mean(1).view(-1, 1, 1, 1)
    z, t = torch.randn(3, 4, 7, 7), torch.full((3,), 9)
    y = torch.randint(20, (3, lat.LENGTH))
    empty, avoid = torch.full((lat.LENGTH,), lat.NO_LABEL), torch.arange(lat.LENGTH)
    for w in (0.0, 1.0, 3.0):
        torch.testing.assert_close(lat.steered(guess, empty, w)(z, t, y),
                                   lat.guided(guess, w)(z, t, y))
    torch.testing.assert_close(lat.steered(guess, avoid, 0.0)(z, t, y),
                               guess(z, t, avoid.expand(3, -1)))


def test_training_with_words_ends_and_its_file_goes_on(lat, language, tmp_path):
    cfg = lat.Config(widths=(8, 16), blocks=1, batch=8, steps=4, T=50, label_drop=0.0)
    runs = [lat.Run(cfg, 4, lambda cfg, c: lat.TextUNet(cfg, c, len(language.vocabulary)))
            for _ in range(3)]
    z, kinds = torch.randn(40, 4, 7, 7), torch.arange(40) % 10
    levels = torch.randint(3, (40, 4))
    for run in runs[:2]:
        lat.train_words(run, z, kinds, levels, language, cfg, tmp_path / "a.pt", pairs=2)
    runs[2].load(tmp_path / "a.pt")
    lat.train_words(runs[2], z, kinds, levels, language, cfg, tmp_path / "a.pt", pairs=2)
    for run in runs[1:]:
        assert len(run.losses) == 4 and all(map(torch.equal, runs[0].net.parameters(),
                                                run.net.parameters()))


@pytest.mark.parametrize("name, least", (("MNIST", 0.8), ("FashionMNIST", 0.5)))
def test_shipped_words_obey_as_their_facts_say(lat, name, least, monkeypatch):
    weights, language = ROOT / "assets/weights", lat.Language(name)
    latent = lat.load_latent(weights / f"latent-{name.lower()}.pt")
    painter = lat.load_words(weights / f"words-{name.lower()}.pt", latent, language)[0]
    x, kinds, _ = lat.load_data(name)
    values = torch.cat([language.measure(lat.scale(part)) for part in x[:6000].split(1000)])
    thresholds = lat.thresholds_of(values, kinds[:6000])
    monkeypatch.setattr(lat, "yardstick", lat.load_classifier(name), raising=False)
    for things in (1, 2):
        found = lat.obeyed(painter, language, thresholds, lat.ask(language, 60, 9, things))
        assert found.pop("class") > 0.85 and min(found.values()) > least, found
