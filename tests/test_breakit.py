"""Part 4 of the pixel notebook: each mistake changes what it says, and only that."""
import pytest
import torch

SWITCHES = ("no noise added", "noise at the last step", "t off by one",
            "one entry late", "no clamp", "printed formula")
T, STEPS = 50, 10


class Told(torch.nn.Module):
    """A guess of v that depends on x_t, t and y, and remembers the t it was told."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__()
        self.gain, self.times = gain, []

    def forward(self, x_t, t, y=None):
        self.times.append(t.unique().item())
        return self.gain * x_t.sin() + 0.01 * t[:, None, None, None]


@pytest.fixture
def start(nb):
    """Noise and schedule: x_T [3, 1, 4, 4], alpha_bar [T + 1]."""
    return nb.noise((3, 1, 4, 4), 0), nb.make_alpha_bar("cosine", T)


def path(nb, start, mistake, model=None, steps=STEPS, seed=5):
    """All (t, x_t, x0_hat) of the broken sampler."""
    model = model or Told()
    return list(nb.broken_sample(model, *start, "v", steps, mistake, None, seed))


def correct(nb, start, model=None, steps=STEPS, **changes):
    """The same of sample with eta = 1."""
    return list(nb.sample(model or Told(), *start, "v", steps, 1.0, seed=5, **changes))


def same(a, b):
    """True if two paths agree to the last bit."""
    return len(a) == len(b) and all(
        t == u and torch.equal(x, z) and torch.equal(p, q)
        for (t, x, p), (u, z, q) in zip(a, b))


def test_without_a_mistake_it_is_sample(nb, start):
    for name in ("", "correct", "correct, tuned", "EMA too early"):
        assert same(path(nb, start, name), correct(nb, start))


@pytest.mark.parametrize("mistake", SWITCHES)
def test_every_switch_does_something(nb, start, mistake):
    wide = Told(3.0)  # its guesses leave [-1, 1]
    assert not torch.equal(path(nb, start, mistake, wide)[-1][1],
                           correct(nb, start, wide)[-1][1])


def test_no_clamp_is_clip_false(nb, start):
    wide = Told(3.0)
    assert same(path(nb, start, "no clamp", wide),
                correct(nb, start, wide, clip=False))


def test_off_by_one_tells_the_time_before(nb, start):
    times = nb.timesteps(T, STEPS)
    told = {}
    for mistake in ("", "t off by one", "one entry late"):
        model = Told()
        path(nb, start, mistake, model)
        told[mistake] = model.times
    assert told[""] == times[:-1]
    assert told["t off by one"] == [t - 1 for t in times[:-1]]
    assert told["one entry late"] == times[1:]


def test_no_noise_is_the_posterior_mean(nb, start):
    """At s = t - 1 the step without noise is the mean of Ho et al. 2020, eq. 7."""
    found = path(nb, start, "no noise added", steps=T)
    for (t, x_t, x0_hat), (_, x_s, _) in zip(found, found[1:]):
        mean, _ = nb.posterior(x_t, x0_hat, t, start[1])
        torch.testing.assert_close(x_s, mean, rtol=0, atol=2e-5)
    assert same(found, path(nb, start, "no noise added", steps=T, seed=6))


def test_noise_at_the_last_step_only(nb, start):
    good, bad = correct(nb, start), path(nb, start, "noise at the last step")
    assert same(good[:-1], bad[:-1])
    *_, (t, x_t, x0_hat), (_, x, _) = bad
    other = nb.noise((3, 1, 4, 4), 1)
    ends = [list(nb.broken_sample(Told(), other, start[1], "v", 1, "noise at the last "
                                  "step", None, seed))[-1][1] for seed in (5, 6)]
    assert not torch.equal(*ends), "two calls of the last step must differ"
    # whose deviation is sqrt(beta) of the step from t to 0
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        z = torch.randn(x.shape, generator=generator)
    torch.testing.assert_close(x - x0_hat, (1 - start[1][t]).sqrt().float() * z,
                               rtol=0, atol=1e-5)


def test_printed_formula_by_hand(nb, start):
    alpha_bar = start[1]
    found = path(nb, start, "printed formula", steps=T)
    for (t, x_t, x0_hat), (_, x_s, _) in zip(found, found[1:]):
        x_t, x0_hat = x_t.double(), x0_hat.double()
        alpha = alpha_bar[t] / alpha_bar[t - 1]
        eps_hat = (x_t - alpha_bar[t].sqrt() * x0_hat) / (1 - alpha_bar[t]).sqrt()
        by_hand = (x_t - (1 - alpha) * eps_hat) / alpha.sqrt()
        torch.testing.assert_close(x_s.double(), by_hand, rtol=1e-4, atol=1e-4)


@pytest.fixture
def pictures():
    """Forty random pictures uint8 [40, 28, 28] and labels [40]."""
    g = torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, (40, 28, 28), generator=g, dtype=torch.uint8),
            torch.arange(40) % 10)


def test_each_batch_has_its_mistake_and_no_other(nb, tiny, pictures):
    for step in range(-1, 3):
        x_0, y, t, eps = nb.make_batch(*pictures, step, tiny)
        for name in ("", "correct", "time ignored", "horizontal flip", "[0, 1] data"):
            found = nb.broken_batch(*pictures, step, tiny, name)
            assert all(map(torch.equal, found[1:], (y, t, eps)))
            if name == "horizontal flip":
                assert torch.equal(found[0][1::2], x_0[1::2])
                assert torch.equal(found[0][::2], x_0[::2, :, :, range(27, -1, -1)])
            elif name == "[0, 1] data":
                assert found[0].min() >= 0 and found[0].max() <= 1
                torch.testing.assert_close(2 * found[0] - 1, x_0)
            else:
                assert torch.equal(found[0], x_0)


def test_range_short_by_one_never_draws_T(nb, tiny, pictures):
    few = nb.replace(tiny, batch=512)
    draws = {name: torch.cat([nb.broken_batch(*pictures, step, few, name)[2]
                              for step in range(20)]) for name in ("", "t never T")}
    assert draws[""].max() == few.T and draws["t never T"].max() == few.T - 1
    assert draws["t never T"].min() >= 1


def test_time_ignored_and_only_then(nb, tiny, pictures):
    torch.manual_seed(0)
    model = nb.UNet(tiny)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    x_t = nb.noise((2, 1, 28, 28), 0)
    short = nb.replace(tiny, steps=2)
    before = [p.clone() for p in model.parameters()]
    for name in ("correct, tuned", "time ignored"):
        tuned = nb.fine_tune(model, pictures, short, torch.device("cpu"), name)
        with torch.no_grad():
            a, b = (tuned(x_t, torch.tensor([t, t])) for t in (1, tiny.T))
        assert torch.equal(a, b) == (name == "time ignored")
        moved = [p for p in tuned.module.parameters()]
        assert not all(map(torch.equal, moved, before)), "it must train"
    assert all(map(torch.equal, model.parameters(), before)), "on a copy"


def test_loss_without_a_mistake_is_the_validation_loss(nb, tiny, pictures):
    torch.manual_seed(0)
    model, alpha_bar = nb.UNet(tiny), nb.make_alpha_bar("cosine", tiny.T)
    assert (nb.broken_loss(model, pictures, alpha_bar, tiny, "")
            == nb.validation_loss(model, pictures, alpha_bar, tiny))


def test_early_average_is_the_closed_form(nb, tiny):
    """decay^n of the random weights are left after n updates towards the model."""
    torch.manual_seed(7)
    model, decay, n = nb.UNet(tiny), 0.9, 12
    torch.nn.init.normal_(model.head.weight)
    torch.manual_seed(tiny.seed)
    fresh = nb.UNet(tiny)
    average = nb.early_average(model, tiny, decay, n)
    for a, b, c in zip(average.module.parameters(), fresh.parameters(),
                       model.parameters()):
        torch.testing.assert_close(a, decay ** n * b + (1 - decay ** n) * c,
                                   rtol=1e-4, atol=1e-6)


def test_list_moves_the_slider(nb):
    frames = [torch.full((4, 4, 3), i, dtype=torch.uint8) for i in range(3)]
    names = ["a", "b", "c"]
    page = nb.frame_list(nb.frame_slider(frames, names, "x", 40), names, "mistake").data
    assert page.count("<option ") == 3 and page.count("<select ") == 1
    assert '<option value="2">c</option>' in page
    assert "input[type=range]" in page and 'type="range"' in page


# on the shipped weights: what the part says is worse must be worse

N, CALLS = 100, 24


@pytest.fixture(scope="module")
def judged(nb):
    """Excess FID (N = 100) of the shipped weights by mistake, as a function."""
    device, root = torch.device("cpu"), nb.Path(__file__).resolve().parent.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        cfg = nb.make_config("cpu", "FashionMNIST")
        model, its = nb.load_model("fashionmnist", cfg, 1, device)
        net = nb.Classifier().eval()
        saved = nb.read_checkpoint(nb.Path("assets/weights/classifier-fashionmnist.pt"))
        net.load_state_dict(saved["classifier"])
        real = nb.features_of(net, nb.load_images("FashionMNIST", train=False).data)
    curve = nb.make_alpha_bar(its.schedule, its.T)

    def score(mistake, network=model, alpha_bar=curve):
        """FID of N pictures with a mistake."""
        def way(x_T, y, seed):
            return nb.broken_sample(network, x_T, alpha_bar, its.predict, CALLS,
                                    mistake, y, seed)
        y = torch.randint(10, (N,), generator=torch.Generator().manual_seed(1))
        x = nb.draw_by(way, y, device, 100)
        return nb.fid(real, nb.features_of(net, nb.to_uint8(x)))

    return score, model, its, curve


def test_visible_mistakes_are_worse(nb, judged):
    score, model, its, curve = judged
    good = score("correct")
    for mistake, margin in {"no noise added": 5, "one entry late": 1,
                            "printed formula": 5}.items():
        assert score(mistake) > good + margin, mistake
    for mistake in ("t off by one", "no clamp"):  # the prose says: not visible
        assert abs(score(mistake) - good) < 0.5, mistake
    short = curve[curve > nb.unscaled_linear(200)[-1]]
    assert score("terminal SNR too high", alpha_bar=short) > good + 4
    early = nb.early_average(model, its, 0.999, 1000)
    assert score("EMA too early", early) > good + 10
