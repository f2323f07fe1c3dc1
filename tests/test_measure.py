"""Part 2 of the pixel notebook: yardstick, figures of quality, ladder, shipped weights."""
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from torch import nn

WEIGHTS = ROOT / "assets/weights"
NAMES = ["FashionMNIST", "MNIST"]


@pytest.fixture
def features():
    """Two sets of correlated features, as a classifier would give them."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(128, 128, generator=g) / 11
    return ((torch.randn(600, 128, generator=g) @ mix).relu(),
            (torch.randn(500, 128, generator=g) @ mix + 0.2).relu())


def yardstick(nb, name):
    """The shipped classifier of a data set."""
    net = nb.Classifier().eval()
    net.load_state_dict(nb.read_checkpoint(
        WEIGHTS / f"classifier-{name.lower()}.pt")["classifier"])
    return net


def test_fid_equals_its_formula(nb, features):
    real, fake = features
    a, b = np.cov(real.double().T.numpy()), np.cov(fake.double().T.numpy())
    root = scipy.linalg.sqrtm(a @ b).real
    expected = (real.mean(0) - fake.mean(0)).square().sum() + np.trace(a + b - 2 * root)
    assert nb.fid(real, fake) == pytest.approx(float(expected), rel=1e-3)
    assert abs(nb.fid(real, real)) < 1e-3


def test_kid_equals_its_formula(nb, features):
    real, fake = (part[:200] for part in features)  # one subset holds all: no randomness

    def kernel(x, y):
        return (x.double() @ y.double().T / 128 + 1) ** 3

    off = (1 - torch.eye(200)).bool()
    expected = (kernel(real, real)[off].mean() + kernel(fake, fake)[off].mean()
                - 2 * kernel(real, fake).mean())
    assert nb.kid(real, fake) == pytest.approx(1000 * expected.item(), rel=1e-3)


def test_fid_of_one_picture_is_refused_with_a_sentence(nb, features):
    with pytest.raises(nb.ReaderError, match="two pictures"):
        nb.fid(features[0], features[1][:1])


def test_floor_falls_with_the_number_of_samples(nb, features):
    few, many = (nb.spread(features[0], features[0], n)[0] for n in (50, 400))
    assert few > 2 * many > 0
    assert nb.spread(features[0], features[0], 600)[1] is None


@pytest.mark.parametrize("name, wanted", zip(NAMES, (0.91, 0.99)))
def test_shipped_classifier_is_accurate_and_its_facts_are_true(nb, name, wanted):
    test = nb.load_images(name, False, str(ROOT / "assets/data"))
    net = yardstick(nb, name)
    with torch.no_grad():
        seen = net.head(nb.features_of(net, test.data)).argmax(1)
    accuracy = (seen == test.targets).float().mean().item()
    facts = json.loads((WEIGHTS / f"classifier-{name.lower()}.json").read_text())
    assert accuracy >= wanted
    assert accuracy == pytest.approx(facts["test accuracy"], abs=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_yardstick_tells_real_from_damaged(nb, name):
    test = nb.load_images(name, False, str(ROOT / "assets/data")).data
    net = yardstick(nb, name)
    real, held = (nb.features_of(net, part) for part in test.split(5000))
    x = nb.to_float(test[5000:])
    faint = nb.to_uint8(x + 0.1 * nb.noise(x.shape, 0))
    heavy = nb.to_uint8(x + 0.5 * nb.noise(x.shape, 0))
    scores = [nb.fid(real, f) for f in (
        held, nb.features_of(net, faint), nb.features_of(net, heavy))]
    assert scores[0] < 0.5 * scores[1] < scores[2]


def test_classifier_learns(nb):
    data = nb.load_images("MNIST", True, str(ROOT / "assets/data"))
    net = nb.train_classifier(data.data[:2000], data.targets[:2000], 60,
                              torch.device("cpu"))
    assert not net.training
    with torch.no_grad():
        seen = net.head(nb.features_of(net, data.data[2000:3000])).argmax(1)
    assert (seen == data.targets[2000:3000]).float().mean() > 0.7


def test_copies_are_found_and_new_images_are_not(nb):
    data = nb.load_images("MNIST", True, str(ROOT / "assets/data")).data
    net = yardstick(nb, "MNIST")
    train = nb.features_of(net, data[:3000])
    new, _ = nb.nearest_features(nb.features_of(net, data[-500:]), train)
    limit = new.quantile(0.01)
    copies, index = nb.nearest_features(nb.features_of(net, data[:100]), train)
    assert (index == torch.arange(100)).float().mean() > 0.95
    assert (copies < limit).float().mean() > 0.95 and (new < limit).float().mean() < 0.03


def test_judge_sees_missing_classes(nb):
    data = nb.load_images("MNIST", True, str(ROOT / "assets/data"))
    net = yardstick(nb, "MNIST")
    real = nb.features_of(net, data.data[:12_000])
    two = data.targets < 2
    for keep, entropy in ((two, math.log(2) / math.log(10)), (data.targets >= 0, 1.0)):
        x, y = data.data[keep][:1000, None], data.targets[keep][:1000]
        found = nb.judge(net, x, y, real, real[:2000], 0.1)
        assert found["entropy"] == pytest.approx(entropy, abs=0.02)
        assert found["as asked"] > 0.97 and found["N"] == 1000
        assert found["variety"] == pytest.approx(1 if keep is not two else 0.6, abs=0.2)
        assert found["too near"] > 0.95, "all of them are training images"
        assert found["floor"] == nb.spread(real[:2000], real[-10_000:], 1000)[0]
        assert (found["rarest class"] == 0) == (keep is two)


def test_no_label_cannot_be_drawn_as_asked(nb):
    data = nb.load_images("MNIST", True, str(ROOT / "assets/data"))
    net = yardstick(nb, "MNIST")
    real = nb.features_of(net, data.data[:12_000])
    found = nb.judge(net, data.data[:300], torch.full((300,), 10), real, real[:2000], 0.1)
    assert found["as asked"] is None and found["floor sd"] > 0


def test_drawn_pictures_depend_on_the_seed_alone(nb, tiny):
    torch.manual_seed(0)
    model, cpu = nb.UNet(tiny), torch.device("cpu")
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    a, y = nb.draw(model, 260, tiny, cpu, True, 1, 2)
    b, none = nb.draw(model, 20, tiny, cpu, False, 2, 2)
    assert a.dtype == torch.uint8 and a.shape == (260, 1, 28, 28)
    assert y.min() >= 0 and y.max() <= 9 and (none == 10).all()
    assert torch.equal(a, nb.draw(model, 260, tiny, cpu, True, 1, 2)[0])
    assert not torch.equal(a[:10], a[250:]), "the parts must differ"


def test_every_part_of_a_draw_has_noise_of_its_own(nb, tiny, monkeypatch):
    seeds, noise = [], nb.noise

    def keep_noise(shape, seed, device="cpu"):
        seeds.append(seed)
        return noise(shape, seed, device)

    def keep_sample(model, x_T, *rest, y, seed):
        seeds.append(seed)
        return iter([(0, x_T, x_T)])

    monkeypatch.setattr(nb, "noise", keep_noise)
    monkeypatch.setattr(nb, "sample", keep_sample)
    nb.draw(None, 600, tiny, torch.device("cpu"), True, 5, 2)
    assert len(seeds) == len(set(seeds)) == 6


def test_guided_draw_follows_the_label_at_the_same_cost(nb, tiny):
    rows = []

    def model(x_t, t, y):
        rows.append(len(x_t))
        return torch.where(y < 10, 0.1, 0.0)[:, None, None, None].expand_as(x_t)

    tiny = nb.replace(tiny, predict="x_0")
    for w, grey in ((1.0, 0.1), (3.0, 0.3), (0.0, 0.0)):
        rows.clear()
        x, _ = nb.draw(model, 4, tiny, torch.device("cpu"), True, 1, 8, w)
        assert sum(rows) == 4 * 8, "8 network calls for each of 4 pictures"
        assert (x == nb.to_uint8(torch.tensor(grey))).all(), f"w = {w}"


@pytest.mark.parametrize(("T", "calls", "band"), [
    (1000, 50, (450, 850)), (1000, 25, (0, 1000)), (50, 200, (10, 20)), (50, 7, (25, 50))])
def test_affordable_steps_use_the_calls_up(nb, T, calls, band):
    def cost(steps):
        return sum(2 if band[0] <= t <= band[1] else 1
                   for t in nb.timesteps(T, steps)[:-1])

    steps = nb.affordable(T, calls, band)
    assert cost(steps) <= calls
    assert steps == T or all(cost(more) > calls for more in range(steps + 1, T + 1))
    assert nb.affordable(T, 1, (0, T)) == 1, "one guided step is the least there is"


def test_draw_guides_in_its_band_alone(nb, tiny):
    seen = []

    def model(x_t, t, y):
        seen.append((int(t[0]), len(x_t)))
        return torch.zeros_like(x_t) + 0.01 * y.view(-1, 1, 1, 1)

    nb.draw(model, 3, tiny, torch.device("cpu"), True, 1, 10, 2.0, 0.5, (0.4, 0.8))
    assert sum(rows for _, rows in seen) <= 3 * 10
    assert {rows for _, rows in seen} == {3, 6}
    assert all((rows == 6) == (0.4 * tiny.T <= t <= 0.8 * tiny.T) for t, rows in seen)


def rungs(nb):
    """The ladder's networks by name."""
    return {name: network for name, (network, _) in nb.ladder().items()}


def randomised(model):
    """The model in eval mode with weights that make every part count."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.eval()


def test_every_rung_has_the_one_interface(nb, tiny):
    x, t, y = torch.randn(4, 1, 28, 28), torch.tensor([1, 9, 30, 50]), torch.arange(4)
    for name, network in rungs(nb).items():
        model = randomised(network(tiny))
        out = model(x, t, y)
        assert out.shape == x.shape and out.dtype == torch.float32, name
        assert not torch.equal(out, model(x, t)), f"{name} ignores labels"
        same = torch.equal(out, model(x, t.flip(0), y))
        assert same == (name == "no time"), name
        alone = torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(4)])
        assert torch.allclose(out, alone, atol=1e-3 * out.abs().max().item()), f"{name}: batch"


def test_rungs_are_what_the_table_says(nb):
    cfg = nb.make_config("cpu", "FashionMNIST")
    mlp = nb.MLP(cfg)
    assert [m.out_features for m in mlp.modules() if isinstance(m, nn.Linear)
            ][-4:] == [256, 256, 256, 784]
    shapes = []
    plain = nb.PlainUNet(cfg)
    for block in plain.down:
        block.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape[1:])))
    plain.eval()(torch.randn(1, 1, 28, 28), torch.tensor([3]))
    assert shapes == [(64, 28, 28), (128, 14, 14), (256, 7, 7), (512, 4, 4)]
    assert sum(isinstance(m, nn.Conv2d) for m in nb.SimpleCNN(cfg).modules()) == 5
    assert {s for m in nb.ResNet(cfg).modules() if isinstance(m, nn.Conv2d)
            for s in m.stride} == {1}


def test_ablations_remove_one_thing(nb, tiny):
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([5, 40])
    full = randomised(nb.UNet(tiny))
    for network in (nb.NoTime, nb.NoAttention, nb.NoSkips):
        less = network(tiny)
        less.load_state_dict(full.state_dict(), strict=network is not nb.NoAttention)
        assert not torch.allclose(less.eval()(x, t), full(x, t)), network.__name__
    cut = nb.NoSkips(tiny)
    cut.load_state_dict(full.state_dict())
    for p in cut.shrink.parameters():
        nn.init.zeros_(p)  # all that can reach 7 x 7 is now the embedding
    assert torch.allclose(cut(x, t), cut(0 * x, t)), "a path goes round 7 x 7"


def test_averaged_batchnorm_statistics_move(nb, tiny):
    data = nb.load_images("MNIST", True, str(ROOT / "assets/data"))
    state, _, _ = nb.climb(nb.SimpleCNN, tiny, (data.data, data.targets),
                           torch.device("cpu"), 5)
    buffers = dict(state.ema.module.named_buffers())
    assert not state.ema.training and state.model.training
    means = {k: v for k, v in buffers.items() if k.endswith("running_mean")}
    last = dict(state.model.named_buffers())
    assert means and all(value.abs().sum() > 0 for value in means.values())
    assert not any(torch.equal(value, last[k]) for k, value in means.items()), "no average"


def test_climb_spends_steps_or_seconds(nb, tiny):
    data = nb.load_images("MNIST", True, str(ROOT / "assets/data"))
    data = data.data, data.targets
    _, by_steps, _ = nb.climb(nb.MLP, tiny, data, torch.device("cpu"), 7)
    _, short, _ = nb.climb(nb.MLP, tiny, data, torch.device("cpu"), 0.1)
    _, long, _ = nb.climb(nb.MLP, tiny, data, torch.device("cpu"), 1.0)
    assert by_steps.steps == 7 and long.steps > short.steps >= 1


def test_x0_error_is_zero_for_an_oracle(nb, tiny):
    data = nb.load_images("MNIST", True, str(ROOT / "assets/data"))
    val = data.data[:600], data.targets[:600]
    x_0, _, _, eps = nb.make_batch(*val, -1, nb.replace(tiny, T=1000, batch=512))
    for kind in ("v", "eps", "x_0"):
        cfg = nb.replace(tiny, predict=kind, seed=5)
        alpha_bar = nb.make_alpha_bar(cfg.schedule, cfg.T)

        class Oracle(nn.Module):
            def __init__(self):
                super().__init__()
                self.anchor = nn.Parameter(torch.zeros(1))

            def forward(self, x_t, t, y):
                return nb.target(x_0, eps, t, alpha_bar, kind)

        assert nb.x0_error(Oracle(), val, cfg) < 1e-6


def test_x0_error_uses_the_same_noise_levels_for_every_schedule(nb, tiny):
    data = nb.load_images("MNIST", True, str(ROOT / "assets/data"))
    val, seen = (data.data[:600], data.targets[:600]), {}

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def forward(self, x_t, t, y):
            seen["t"] = t
            return x_t

    levels = []
    for schedule, T, seed in (("cosine", 1000, 0), ("linear", 300, 1), ("sigmoid", 400, 2)):
        nb.x0_error(Spy(), val, nb.replace(tiny, schedule=schedule, T=T, seed=seed))
        levels.append(nb.log_snr(nb.make_alpha_bar(schedule, T))[seen["t"]])
    inside = levels[0].abs() < 5  # the ends of the schedules differ
    for level in levels[1:]:
        assert (level - levels[0])[inside].abs().max() < 0.35


def test_exported_weights_come_back_and_a_changed_file_is_refused(nb, tiny, tmp_path):
    model = randomised(nb.UNet(tiny))
    file = tmp_path / "assets/weights/mine.pt"
    file.parent.mkdir(parents=True)
    nb.export({"config": nb.identity(tiny), "ema": nb.half(model)}, {"N": 1}, file)
    loaded, of = nb.load_model("mine", nb.make_config("cpu", "MNIST"), 1,
                               torch.device("cpu"))
    assert of.widths == list(tiny.widths) or of.widths == tiny.widths
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([5, 40])
    loaded.dtype = None
    assert torch.allclose(loaded(x, t), model(x, t), rtol=0.02, atol=0.02)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(nb.ReaderError, match="sha256"):
        nb.read_checkpoint(file)


@pytest.mark.parametrize("file", sorted(WEIGHTS.glob("*.pt")), ids=lambda file: file.stem)
def test_shipped_weights_are_half_precision_and_say_what_they_are(nb, file):
    content = nb.read_checkpoint(file)
    tensors = content.get("ema") or content["classifier"]
    assert {v.dtype for v in tensors.values()} <= {torch.float16, torch.int64}
    facts = json.loads(file.with_suffix(".json").read_text())
    assert {"sha256", "data", "device", "minutes", "torch"} <= facts.keys()


def test_shipped_weights_stay_small():
    assert sum(path.stat().st_size for path in WEIGHTS.glob("*.pt")) <= 8e6
    rest = [*(ROOT / "assets/results").glob("*"), *(ROOT / "assets/figures").glob("*")]
    assert sum(path.stat().st_size for path in rest) <= 2.5e6


@pytest.mark.parametrize("name", NAMES)
def test_shipped_model_draws_what_it_is_asked_for(nb, name):
    cpu, net = torch.device("cpu"), yardstick(nb, name)
    model, of = nb.load_model(name.lower(), nb.make_config("cpu", name), 1, cpu)
    test = nb.load_images(name, False, str(ROOT / "assets/data")).data
    real = nb.features_of(net, test)
    x, y = nb.draw(model, 200, of, cpu, True, 0, 20)
    f = nb.features_of(net, x)
    ceiling = nb.fid(real, nb.features_of(net, nb.to_uint8(torch.randn(2000, 1, 28, 28))))
    floor = nb.spread(real, real, 200)[0]
    with torch.no_grad():
        agreement = (net.head(f).argmax(1) == y).float().mean()
    print(f"{name}: excess {(nb.fid(real, f) - floor) / ceiling:.2%}, as asked {agreement}")
    assert nb.fid(real, f) - floor < 0.05 * ceiling
    assert agreement > 0.75


def test_kept_ladder_was_climbed_by_these_networks(nb):
    kept = json.loads((ROOT / "assets/results/ladder-fashionmnist.json").read_text())
    cfg = nb.make_config("long", "FashionMNIST")
    assert kept["N"] == cfg.n_rung and kept["batch"] == cfg.batch and kept["lr"] == cfg.lr
    for name, (network, changes) in nb.ladder().items():
        plan = nb.replace(cfg, **changes)
        count = sum(p.numel() for p in network(plan).parameters())
        own = [row for row in kept["rows"] if row["rung"] == name]
        assert {row["parameters"] for row in own} == {count}, name
        assert {row["budget"] for row in own} == set(cfg.rung_budgets), name
        assert len(own) == len({(row["budget"], row["seed"]) for row in own}), name
        assert all(row["steps"] == row["budget"] for row in own
                   if isinstance(row["budget"], int)), name
    net = yardstick(nb, "FashionMNIST")
    test, train = (nb.load_images("FashionMNIST", part, str(ROOT / "assets/data")).data
                   for part in (False, True))
    floor, _ = nb.spread(nb.features_of(net, test), nb.features_of(net, train[-10_000:]),
                         cfg.n_rung)
    assert kept["floor"] == pytest.approx(floor, abs=0.01)


def test_ratios_of_the_peers_follow_from_their_rows():
    kept = json.loads((ROOT / "assets/results/peers.json").read_text())
    for mode in ("equal time", "equal steps"):
        ours = kept["results"][f"{mode}, ours"]
        for other in ("peer", "reference"):
            row = kept["results"][f"{mode}, {other}"]
            assert row["excess"] == pytest.approx(row["FID"] - kept["floor"], abs=0.002)
            assert kept["ratios"][f"excess, {mode}, ours / {other}"] == pytest.approx(
                ours["excess"] / row["excess"], abs=0.001)
    rows = [row for key, row in kept["results"].items() if key.startswith("equal steps")]
    assert len({(row["steps"], row["batch"]) for row in rows}) == 1
