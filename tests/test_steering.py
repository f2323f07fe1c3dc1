"""Part 3 of the pixel notebook: guidance, editing, and when a picture is decided."""
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture
def curve(nb):
    """The schedule of 50 steps that the tests walk along."""
    return nb.make_alpha_bar("cosine", 50)


@pytest.fixture
def unet(nb):
    """A small U-Net in which every weight, label and time counts."""
    torch.manual_seed(0)
    net = nb.UNet(nb.make_config("smoke", "FashionMNIST"))
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net.requires_grad_(False)


class Recorder:
    """A model of kind "x_0" that always answers the same and notes what it was shown."""

    def __init__(self, answer):
        self.answer, self.seen = answer, []

    def __call__(self, x_t, t, y=None):
        self.seen.append((int(t[0]), x_t.clone()))
        return self.answer.expand_as(x_t)


def gaussian(alpha_bar, sd):
    """The best model of kind "x_0" when every pixel of the data is N(0, sd^2)."""
    def model(x_t, t, y=None):
        a = alpha_bar[t].to(x_t).reshape(-1, 1, 1, 1)
        return a.sqrt() * sd ** 2 / (a * sd ** 2 + 1 - a) * x_t

    return model


def photos(nb, n=40):
    """Real training images in [-1, 1]."""
    data = nb.load_images("FashionMNIST", True, str(ROOT / "assets/data")).data
    return nb.to_float(data[:n])


# ------------------------------------------------------------------ guidance

@pytest.mark.parametrize("t", [1, 25, 50])
def test_guidance_ends_at_the_two_predictions(nb, unet, t):
    x, y = torch.randn(6, 1, 28, 28), torch.arange(6)
    t = torch.full((6,), t)
    twice = torch.cat([x, x]), torch.cat([t, t])
    none, labelled = unet(*twice)[:6], unet(*twice, torch.cat([y, y]))[:6]
    assert torch.allclose(nb.guided(unet, 0)(x, t, y), none, rtol=0, atol=1e-6)
    assert torch.allclose(nb.guided(unet, 1)(x, t, y), labelled, rtol=0, atol=1e-6)
    assert not torch.allclose(none, labelled, atol=1e-2)


def test_draw_by_equals_draw_when_asked_for_the_same(nb, unet, tiny):
    x, y = nb.draw(unet, 12, tiny, CPU, True, 5, 4)
    way = nb.few_step("DDPM", unet, tiny, 4, "trailing")
    ours = nb.draw_by(way, y, CPU, 5)
    assert list(ours.shape) == [12, 1, 28, 28] and torch.equal(nb.to_uint8(ours), x)
    other = nb.draw_by(way, (y + 1) % 10, CPU, 5)
    assert not torch.equal(nb.to_uint8(other), x)


def test_draw_by_gives_every_part_noise_of_its_own(nb, tiny):
    way = nb.few_step("DDPM", lambda x_t, t, y: x_t * 0.9, tiny, 2, "trailing")
    x = nb.draw_by(way, torch.arange(252) % 10, CPU, 0)
    assert len(x) == 252 and not torch.equal(x[:2], x[250:])


def test_variety_within_ignores_where_the_classes_lie(nb):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    f = torch.randn(300, 5, generator=g) * (1 + y[:, None])
    expected = np.mean([f[y == c].numpy().var(0, ddof=1).sum() for c in range(3)])
    assert nb.variety_within(f, y) == pytest.approx(expected, rel=1e-5)
    moved = f + 100.0 * y[:, None]
    assert nb.variety_within(moved, y) == pytest.approx(expected, rel=1e-3)
    assert nb.variety_within(2 * f, y) == pytest.approx(4 * expected, rel=1e-5)


def test_seen_by_is_the_classifier_s_choice(nb):
    net = nb.Classifier().eval()
    file = ROOT / "assets/weights/classifier-fashionmnist.pt"
    net.load_state_dict(nb.read_checkpoint(file)["classifier"])
    data = nb.load_images("FashionMNIST", False, str(ROOT / "assets/data"))
    seen = nb.seen_by(net, nb.to_float(data.data[:300]))
    with torch.no_grad():
        assert torch.equal(seen, net.head(net(data.data[:300])).argmax(1))
    assert (seen == data.targets[:300]).float().mean() > 0.85


def test_row_picker_cuts_the_chosen_row(nb):
    torch.manual_seed(0)
    frames = [nb.grid(torch.rand(12, 1, 28, 28) * 2 - 1, 4) for _ in range(2)]
    page = nb.row_picker(nb.frame_slider(frames, ["w = 0", "w = 1"], "w", 560),
                         ["a", "b", "c"], "class", (29, 117)).data
    assert re.findall(r'<option value="(\d)">(\w)<', page) == [
        ("0", "a"), ("1", "b"), ("2", "c")]
    assert page.count("<img") == page.count("object-fit:cover;object-position:0 0%") == 2
    assert page.count("aspect-ratio:117/29") == 2 and "http" not in page
    assert page.count("<div") == page.count("</div>")
    share = float(re.search(r"\* this\.value / ([\d.]+) \+ '%'", page)[1])
    height = len(frames[0])  # CSS: that share of what overflows is cut off above
    for row in range(3):
        assert row / share * (height - 29) == pytest.approx(29 * row, abs=1)


def test_kept_guidance_was_asked_for_random_labels(nb):
    """Its floor has random labels; equal numbers of the classes would flatter FID."""
    kept = json.loads((ROOT / "assets/results/guidance-fashionmnist.json").read_text())
    cfg = nb.make_config("long", "FashionMNIST")
    rows = {(row["seed"], row["w"]): row for row in kept["rows"]}
    assert set(rows) == {(s, w) for s in range(kept["seeds"]) for w in cfg.guide_weights}
    assert all(row["N"] == cfg.n_guide and row["steps"] == cfg.edit_steps
               for row in rows.values())
    for seed in range(kept["seeds"]):  # at w = 4 nearly all are as asked
        y = torch.randint(10, (cfg.n_guide,),
                          generator=torch.Generator().manual_seed(seed + 1))
        rarest = torch.bincount(y, minlength=10).min().item() / cfg.n_guide
        assert rarest < 0.095
        assert rows[seed, 4.0]["rarest class"] == pytest.approx(rarest, abs=0.002)


# -------------------------------------------------------- guidance by a classifier

class Tilt(nn.Module):
    """A "classifier" whose log p(y = 0 | x) is b . x plus a constant."""

    def __init__(self, b):
        super().__init__()
        self.b, self.head = b, nn.Identity()

    def forward(self, x):
        scores = torch.full((len(x), 10), 1000.0, dtype=x.dtype)
        scores[:, 0] = (x.flatten(1) * self.b.flatten()).sum(1)
        return scores


def test_classifier_guidance_is_exact_for_a_tilted_normal(nb, curve):
    """Data N(0, 1) times exp(s b x_0) is N(s b, 1): its best guess has a closed form."""
    b = torch.randn(1, 4, 4, dtype=torch.float64)
    x_t, t = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.tensor([1, 9, 25, 40, 50])
    guide = nb.classifier_guided(gaussian(curve, 1.0), Tilt(b), 0.7, curve, "x_0")
    a = curve[t].reshape(-1, 1, 1, 1)
    expected = a.sqrt() * x_t + (1 - a) * 0.7 * b
    with torch.no_grad():
        found = guide(x_t, t, torch.zeros(5, dtype=torch.long))
    assert torch.allclose(found, expected, rtol=0, atol=1e-9) and not found.requires_grad


@pytest.mark.parametrize("kind", ["v", "eps", "x_0"])
def test_classifier_guidance_is_the_gradient_through_the_network(nb, curve, kind):
    torch.manual_seed(0)
    net = nb.Classifier().double().eval()
    inner = nn.Conv2d(1, 1, 3, padding=1).double()

    def model(x_t, t, y):
        assert y is None or bool((y == 10).all()), "the network must not see the label"
        return torch.tanh(inner(x_t))

    x_t, t = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.tensor([20])
    y, a = torch.tensor([3]), curve[20]

    def log_p(x):
        x0_hat = nb.to_x0(model(x, t, None), x, t, curve, kind)
        return torch.log_softmax(net.head(net(x0_hat)), 1)[0, 3]

    with torch.no_grad():
        plain = nb.to_x0(model(x_t, t, None), x_t, t, curve, kind)
        eps_hat = (x_t - a.sqrt() * plain) / (1 - a).sqrt()
        slope = torch.zeros(64, dtype=torch.float64)
        for i in range(64):
            h = torch.zeros(64, dtype=torch.float64)
            h[i] = 1e-5
            h = h.view_as(x_t)
            slope[i] = (log_p(x_t + h) - log_p(x_t - h)) / 2e-5
    eps_hat = eps_hat - 2 * (1 - a).sqrt() * slope.view_as(x_t)  # Dhariwal's line
    expected = (x_t - (1 - a).sqrt() * eps_hat) / a.sqrt()
    found = nb.classifier_guided(model, net, 2, curve, kind)(x_t, t, y)
    assert torch.allclose(found, expected, atol=1e-7)
    assert not torch.allclose(found, plain, atol=1e-6)
    assert all(p.grad is None for p in [*net.parameters(), *inner.parameters()])


# ------------------------------------------------------------------ inpainting

def test_hole_is_where_the_numbers_say(nb):
    mask = nb.hole((2, 5, 3, 20))
    rows, columns = mask[0, 0].nonzero().T
    assert mask.shape == (1, 1, 28, 28) and mask.sum() == 60
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 4, 5, 24)
    assert nb.hole((0, 0, 28, 28)).all() and nb.hole((31, 0, 1, 32), 32, 32).sum() == 32


@pytest.mark.parametrize("box", [(20, 0, 9, 5), (0, 20, 5, 9), (-1, 0, 3, 3), (0, -1, 3, 3),
                                 (0, 0, 0, 5), (0, 0, 5, 0), (0, 0, 5), (0, 0, 5.0, 5),
                                 (0, 0, -2, 5), (1, 2, 3, 4, 5)])
def test_a_box_that_does_not_fit_is_refused_in_one_sentence(nb, box):
    with pytest.raises(nb.ReaderError, match=r"top, left, height, width") as refused:
        nb.hole(box)
    assert str(box) in str(refused.value)


@pytest.mark.parametrize("repeats", [1, 3])
def test_inpainting_keeps_what_is_known_to_the_bit(nb, unet, curve, repeats):
    x_0, mask = photos(nb, 4), nb.hole((4, 6, 12, 9))
    x = nb.inpaint(unet, x_0, mask, curve, "v", 5, repeats)
    outside = ~mask.expand_as(x)
    assert torch.equal(x[outside], x_0[outside]) and x[~outside].ne(x_0[~outside]).any()


def test_inpainting_fills_in_what_belongs_to_the_rest(nb, curve):
    """The ideal denoiser of ten images knows one filling for each surrounding."""
    images, mask = photos(nb, 10), nb.hole((8, 8, 12, 12))
    model = nb.IdealDenoiser(images, curve)
    x_0 = torch.where(mask, 0.3, images)
    x = nb.inpaint(model, x_0, mask, curve, "x_0", 25, 3)
    assert torch.allclose(x, images, atol=1e-3)


@pytest.mark.parametrize("repeats", [1, 4])
def test_every_repeat_is_at_the_noise_level_of_its_t(nb, curve, repeats):
    """Data that are all 0: whatever the model is shown at t is N(0, 1 - alpha_bar)."""
    model, steps = Recorder(torch.zeros(1)), 6
    nb.inpaint(model, torch.zeros(40, 1, 28, 28), nb.hole((4, 4, 20, 20)), curve, "x_0",
               steps, repeats)
    times = nb.timesteps(50, steps)[:-1]
    assert [t for t, _ in model.seen] == [t for t in times for _ in range(repeats)]
    for t, x_t in model.seen:
        for part in (x_t[..., 4:24, 4:24], x_t[..., :4, :]):
            assert part.std().item() == pytest.approx(float(1 - curve[t]) ** 0.5, rel=0.03)
    looks = [x_t for t, x_t in model.seen if t == times[1]]
    for a, b in zip(looks, looks[1:]):
        assert not torch.equal(a, b), "a repeat must add fresh noise"


def test_seam_counts_the_border_and_nothing_else(nb):
    mask = nb.hole((4, 5, 6, 7))
    assert nb.seam(mask.float(), mask) == 1
    assert nb.seam(torch.full((2, 1, 28, 28), 0.4), mask) == 0
    x = torch.zeros(1, 1, 28, 28)
    x[..., 6, 8], x[..., 20, 20] = 1.0, 1.0  # neither touches the border
    assert nb.seam(x, mask) == 0
    x[..., 4, 5] = 1.0  # a corner: two of the 2 * (6 + 7) pairs
    assert nb.seam(x, mask) == pytest.approx(2 / 26)


# ------------------------------------------------------- image to image, and between

def test_paint_lays_boxes_on_black(nb):
    x = nb.paint([(0, 0, 4, 28, 0.5), (2, 0, 4, 3, -0.25)])
    assert x.shape == (1, 1, 28, 28) and x[0, 0, 1, 1] == 0.5 and x[0, 0, 3, 1] == -0.25
    assert (x == -1).sum() == 784 - 4 * 28 - 2 * 3
    with pytest.raises(nb.ReaderError, match="does not fit"):
        nb.paint([(20, 0, 20, 5, 0.5)])


@pytest.mark.parametrize("t, steps", [(50, 10), (30, 10), (10, 10), (5, 5), (1, 1)])
def test_finish_is_the_sampler_from_t_on(nb, unet, curve, t, steps):
    """Ten steps from every t, and t of them where t is less."""
    x_t = torch.randn(3, 1, 28, 28)
    seen = []

    def model(x, batch_t, y=None):
        seen.append(int(batch_t[0]))
        return unet(x, batch_t, y)

    found = nb.finish(model, x_t, t, curve, "v", 10, eta=0.0, y=torch.arange(3))
    times = nb.timesteps(t, steps)
    assert seen == times[:-1] and seen[0] == t and len(seen) == steps
    x = x_t
    for a, b in zip(times, times[1:]):
        batch_t = torch.full((3,), a)
        x0_hat = nb.to_x0(unet(x, batch_t, torch.arange(3)), x, batch_t, curve, "v")
        x = nb.reverse_step(x, x0_hat.clamp(-1, 1), a, b, curve, 0.0, torch.zeros(1))
    assert torch.allclose(found, x, atol=1e-5)
    assert not torch.allclose(found, nb.finish(unet, x_t, t, curve, "v", 10, 0.0),
                              atol=1e-5), "the label must reach the network"


def test_finish_makes_fresh_endings(nb, unet, curve):
    x_t = torch.randn(1, 1, 28, 28).repeat(4, 1, 1, 1)
    x = nb.finish(unet, x_t, 30, curve, "v", 10)
    assert x.flatten(1).unique(dim=0).shape[0] == 4
    same = nb.finish(unet, x_t, 30, curve, "v", 10, eta=0.0)
    assert torch.allclose(same, same[:1].expand_as(same), atol=1e-5)
    assert torch.equal(nb.finish(unet, x_t, 0, curve, "v", 10), x_t)


def test_sdedit_starts_from_the_noised_picture(nb, curve):
    x_0 = torch.full((30, 1, 28, 28), 0.6)
    for strength in (0.1, 0.5, 1.0):
        model = Recorder(torch.full((1,), -0.2))
        x = nb.sdedit(model, x_0, strength, curve, "x_0", 10)
        t, x_t = model.seen[0]
        assert len(model.seen) == round(10 * strength), "its share of the ten steps"
        assert t == round(50 * strength) and torch.allclose(x, torch.tensor(-0.2))
        assert x_t.mean().item() == pytest.approx(0.6 * float(curve[t]) ** 0.5, abs=0.02)
        assert x_t.std().item() == pytest.approx(float(1 - curve[t]) ** 0.5, abs=0.02)
    assert torch.equal(nb.sdedit(model, x_0, 0, curve, "x_0", 10), x_0)
    for wrong in (-0.1, 1.5):
        with pytest.raises(nb.ReaderError, match="strength"):
            nb.sdedit(model, x_0, wrong, curve, "x_0", 10)


def test_sdedit_forgets_more_the_stronger_it_is(nb, curve):
    images = photos(nb, 40)
    model = nb.IdealDenoiser(images, curve)
    kept = []
    for strength in (0.1, 0.6, 0.8, 1.0):
        x = nb.sdedit(model, images, strength, curve, "x_0", 25)
        kept.append((nb.nearest(x, images)[1] == torch.arange(40)).float().mean().item())
    assert kept[0] == 1 and kept == sorted(kept, reverse=True) and kept[-1] < 0.3


def test_slerp_walks_along_an_arc_at_even_pace(nb):
    a, b = torch.randn(2, 3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    b = b * a.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / b.flatten(1).norm(dim=1).view(
        -1, 1, 1, 1)
    assert torch.allclose(nb.slerp(a, b, 0.0), a, atol=1e-5)
    assert torch.allclose(nb.slerp(a, b, 1.0), b, atol=1e-5)
    path = [nb.slerp(a, b, k / 4).flatten(1) for k in range(5)]
    for x in path:
        assert torch.allclose(x.norm(dim=1), path[0].norm(dim=1), rtol=1e-4)
    turns = torch.stack([torch.cosine_similarity(x, y).acos()
                         for x, y in zip(path, path[1:])])
    assert turns.std(0).max() < 1e-3 and turns.min() > math.pi / 10
    assert torch.allclose(nb.slerp(a, a, 0.3), a, atol=1e-4)


# ------------------------------------------------------------------ the lower curve

def test_no_denoiser_beats_the_ideal_one_on_its_own_images(nb, curve):
    images, g = photos(nb, 40), torch.Generator().manual_seed(0)
    ideal = nb.IdealDenoiser(images, curve)
    x_0 = images[torch.randint(40, (2000,), generator=g)]
    for t in (40, 43, 46):
        t = torch.full((2000,), t)
        x_t = nb.q_sample(x_0, t, torch.randn(x_0.shape, generator=g), curve)
        guess = ideal(x_t, t)
        error = (guess - x_0).square().mean()
        rivals = {"the mean image": images.mean(0).expand_as(x_0),
                  "the nearest image": images[nb.nearest(
                      x_t, curve[t[0]].sqrt().float() * images)[1]],
                  "a cautious one": 0.8 * guess + 0.2 * images.mean(0),
                  "a bold one": 1.1 * guess - 0.1 * images.mean(0)}
        for name, rival in rivals.items():
            assert error < (rival - x_0).square().mean() + 1e-6, (name, t[0])
    strangers = photos(nb, 80)[40:]
    t = torch.full((40,), 5)
    x_t = nb.q_sample(strangers, t, torch.randn(strangers.shape, generator=g), curve)
    assert (ideal(x_t, t) - strangers).square().mean() > (x_t - strangers).square().mean()
