"""Few-step samplers, spacings and inversion against diffusers and closed forms."""
import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}
SPACINGS = ("trailing", "leading", "quadratic", "log-SNR")


def wild(x_t, t, y=None):
    """A deterministic model whose predictions leave [-1, 1], so that clamping matters."""
    return torch.sin(3 * x_t) + 0.5 * x_t + (t.view(-1, 1, 1, 1) % 7) / 7


class Counted:
    """A model that writes down the t of every call."""

    def __init__(self, model=wild):
        self.model, self.asked = model, []

    def __call__(self, x_t, t, y=None):
        assert t.unique().numel() == 1 and len(t) == len(x_t)
        self.asked.append(int(t[0]))
        return self.model(x_t, t, y)


def normal_data(alpha_bar, c):
    """The best x0_hat when pixels are normal with deviation c, and the curve's end."""
    gain = alpha_bar.sqrt() * c ** 2 / (alpha_bar * c ** 2 + 1 - alpha_bar)
    shrink = c / (alpha_bar[-1] * c ** 2 + 1 - alpha_bar[-1]).sqrt()
    return (lambda x_t, t, y=None: gain[t].view(-1, 1, 1, 1).to(x_t) * x_t), float(shrink)


def multistep_oracle(alpha_bar, kind, clip, noisy=False, order=2):
    """diffusers' DPM-Solver++ under the flags that make it our multistep.

    With sample_max_value=1 its "dynamic thresholding" is a plain clamp to [-1, 1].
    """
    return diffusers.DPMSolverMultistepScheduler(
        len(alpha_bar) - 1, trained_betas=betas(alpha_bar), solver_order=order,
        algorithm_type="sde-dpmsolver++" if noisy else "dpmsolver++",
        solver_type="midpoint", prediction_type=KINDS[kind], thresholding=clip,
        sample_max_value=1.0, lower_order_final=False, euler_at_final=False,
        final_sigmas_type="zero", timestep_spacing="trailing")


def betas(alpha_bar):
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).numpy()


def oracle_path(scheduler, x, times, seed=None, scaled=False):
    """A diffusers scheduler over our times (its timestep is ours minus 1), as x_t."""
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    scheduler.set_timesteps(timesteps=[t - 1 for t in times[:-1]])
    assert int(scheduler.timesteps[0]) == times[0] - 1
    if scaled:
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5  # from x_t to x_t / sqrt(alpha_bar)
    path = []
    for k in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, k)
        if not scaled or scheduler.state_in_first_order:
            path.append(x_t)
        prediction = wild(x_t, torch.full((len(x),), int(k) + 1))
        extra = {} if generator is None else {"generator": generator}
        x = scheduler.step(prediction, k, x, **extra).prev_sample
    return torch.stack([*path, x])


@pytest.mark.parametrize("clip", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_predict_gives_a_pair_that_makes_up_x_t(nb, kind, clip):
    alpha_bar, x_t = nb.make_alpha_bar("cosine", 100), nb.noise((3, 1, 8, 8), 0)
    for t in (1, 50, 100):
        x0_hat, eps_hat = nb.predict(wild, x_t, t, alpha_bar, kind, clip)
        again = nb.q_sample(x0_hat, torch.full((3,), t), eps_hat, alpha_bar)
        torch.testing.assert_close(again, x_t, atol=2e-4, rtol=1e-4)
        batch_t = torch.full((3,), t)
        raw = nb.to_x0(wild(x_t, batch_t), x_t, batch_t, alpha_bar, kind)
        assert raw.abs().max() > 1
        torch.testing.assert_close(x0_hat, raw.clamp(-1, 1) if clip else raw)


@pytest.mark.parametrize("clip", (True, False))
@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_order_one_is_sample_to_the_bit(nb, eta, clip):
    alpha_bar, x = nb.make_alpha_bar("cosine", 60), nb.noise((3, 1, 8, 8), 1)
    ours = nb.multistep(wild, x, alpha_bar, "v", nb.timesteps(60, 17), 1, eta, clip, seed=4)
    known = nb.sample(wild, x, alpha_bar, "v", 17, eta, clip, seed=4)
    for (t, x_t, x0_hat), (u, y_t, y0_hat) in zip(ours, known, strict=True):
        assert t == u and torch.equal(x_t, y_t) and torch.equal(x0_hat, y0_hat)


@pytest.mark.parametrize("spaced", SPACINGS)
@pytest.mark.parametrize("kind, clip", (
    ("v", True), ("v", False), ("x_0", True), ("x_0", False), ("eps", True)))
@pytest.mark.parametrize("name", ("linear", "cosine"))
def test_2m_equals_diffusers_over_a_trajectory(nb, name, kind, clip, spaced):
    alpha_bar, x = nb.make_alpha_bar(name, 200), nb.noise((4, 1, 8, 8), 0)
    times = nb.spacing(spaced, alpha_bar, 20)
    theirs = oracle_path(multistep_oracle(alpha_bar, kind, clip), x, times)
    ours = torch.stack([x_t for _, x_t, _ in nb.multistep(
        wild, x, alpha_bar, kind, times, clip=clip)])
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("order", (1, 2))
@pytest.mark.parametrize("spaced", ("trailing", "log-SNR"))
def test_2m_with_noise_equals_diffusers_stochastic_solver(nb, spaced, order):
    alpha_bar, x = nb.make_alpha_bar("cosine", 200), nb.noise((4, 1, 8, 8), 0)
    times = nb.spacing(spaced, alpha_bar, 20)
    theirs = oracle_path(multistep_oracle(alpha_bar, "v", True, True, order), x, times, 5)
    ours = torch.stack([x_t for _, x_t, _ in nb.multistep(
        wild, x, alpha_bar, "v", times, order, eta=1.0, seed=5)])
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("spaced", SPACINGS)
@pytest.mark.parametrize("kind, clip", (("v", True), ("v", False), ("x_0", True),
                                        ("x_0", False), ("eps", True)))
@pytest.mark.parametrize("name", ("linear", "cosine"))
def test_heun_equals_diffusers_over_a_trajectory(nb, name, kind, clip, spaced):
    alpha_bar, x = nb.make_alpha_bar(name, 200), nb.noise((4, 1, 8, 8), 0)
    times = nb.spacing(spaced, alpha_bar, 10)
    scheduler = diffusers.HeunDiscreteScheduler(
        200, trained_betas=betas(alpha_bar), prediction_type=KINDS[kind], clip_sample=clip,
        clip_sample_range=1.0)
    theirs = oracle_path(scheduler, x, times, scaled=True)
    ours = torch.stack([x_t for _, x_t, _ in nb.heun(
        wild, x, alpha_bar, kind, times, clip=clip)])
    close = 1e-3 if clip else 5e-3  # unclamped, `wild` magnifies their float32 tables
    torch.testing.assert_close(ours, theirs, atol=close, rtol=close)


def test_without_the_rederived_eps_heun_is_another(nb, monkeypatch):
    alpha_bar, x = nb.make_alpha_bar("cosine", 200), nb.noise((4, 1, 8, 8), 0)
    given = wild, x, alpha_bar, "v", nb.timesteps(200, 10)
    right, honest = nb.final(nb.heun(*given)), nb.predict

    def stale(*args):
        args = args + (True,) if len(args) == 5 else args
        return honest(*args)[0], honest(*args[:5], False, *args[6:])[1]
    monkeypatch.setattr(nb, "predict", stale)
    assert (nb.final(nb.heun(*given)) - right).abs().max() > 0.1


@pytest.mark.parametrize("name, order", (("DDIM", 1), ("2M", 2), ("heun", 2)))
def test_error_falls_with_the_order_of_the_rule(nb, name, order):
    alpha_bar, x = nb.make_alpha_bar("cosine", 1000), nb.noise((4, 1, 2, 2), 0).double()
    model, shrink = normal_data(alpha_bar, 0.5)
    errors = []
    for steps in (50, 100):
        given = model, x, alpha_bar, "x_0", nb.spacing("log-SNR", alpha_bar, steps)
        path = (nb.heun(*given, clip=False) if name == "heun"
                else nb.multistep(*given, order, clip=False))
        errors.append(float((nb.final(path) - shrink * x).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2 ** order, rel=0.2)


@pytest.mark.parametrize("spaced", SPACINGS)
def test_calls_are_counted_and_never_at_zero(nb, spaced):
    alpha_bar, x = nb.make_alpha_bar("cosine", 60), nb.noise((2, 1, 8, 8), 1)
    times = nb.spacing(spaced, alpha_bar, 12)
    for sampler, calls in ((nb.multistep, 12), (nb.heun, 23)):
        model = Counted()
        path = list(sampler(model, x, alpha_bar, "v", times))
        assert len(model.asked) == calls and min(model.asked) >= 1
        assert [t for t, _, _ in path] == times
        assert torch.equal(path[0][1], x)
        torch.testing.assert_close(path[-1][1], path[-2][2], atol=1e-6, rtol=0)


def test_samplers_accept_one_step_only(nb):
    alpha_bar, x = nb.make_alpha_bar("cosine", 60), nb.noise((2, 1, 8, 8), 1)
    guess, _ = nb.predict(wild, x, 60, alpha_bar, "v")
    for sampler in (nb.multistep, nb.heun):
        torch.testing.assert_close(nb.final(sampler(wild, x, alpha_bar, "v", [60, 0])), guess)


def test_labels_and_seed_reach_the_model_and_the_noise(nb):
    alpha_bar, x = nb.make_alpha_bar("cosine", 60), nb.noise((2, 1, 8, 8), 1)
    times = nb.timesteps(60, 6)

    def labelled(x_t, t, y):
        return wild(x_t, t) * 0.5 + y.view(-1, 1, 1, 1) / 10
    runs = [nb.final(nb.multistep(labelled, x, alpha_bar, "v", times, eta=eta,
                                  y=torch.full((2,), y), seed=seed))
            for eta, y, seed in ((0, 1, 1), (0, 1, 2), (0, 5, 1), (1, 1, 1), (1, 1, 2))]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
    assert not torch.allclose(runs[3], runs[4])
    one, five = (nb.final(nb.heun(labelled, x, alpha_bar, "v", times,
                                  y=torch.full((2,), y))) for y in (1, 5))
    assert not torch.allclose(one, five)


def test_samplers_keep_no_graph(nb):
    weight = torch.ones(1, requires_grad=True)
    alpha_bar, x = nb.make_alpha_bar("cosine", 50), torch.randn(2, 1, 4, 4)

    def model(x_t, t, y=None):
        return weight * x_t
    for sampler in (nb.multistep, nb.heun):
        for _, x_t, x0_hat in sampler(model, x, alpha_bar, "v", nb.timesteps(50, 5)):
            assert not x_t.requires_grad and not x0_hat.requires_grad
    assert not nb.invert(model, x, alpha_bar, "v", 5).requires_grad


@given(T=st.integers(50, 1000), share=st.floats(0, 1), schedule=st.sampled_from(
    ("linear", "cosine", "sigmoid")), name=st.sampled_from(SPACINGS))
@settings(max_examples=150, deadline=None)
def test_spacings_fall_without_doubles(nb, T, share, schedule, name):
    steps = max(1, round(share * T))
    times = nb.spacing(name, nb.make_alpha_bar(schedule, T), steps)
    assert len(times) == steps + 1 and times[-1] == 0
    assert times[0] == (1 + T // steps * (steps - 1) if name == "leading" else T)
    assert all(isinstance(t, int) and t > s for t, s in zip(times, times[1:]))


@pytest.mark.parametrize("name", ("trailing", "leading"))
@pytest.mark.parametrize("steps", (4, 10, 50, 200))
def test_spacings_of_that_name_are_diffusers(nb, name, steps):
    scheduler = diffusers.DDIMScheduler(200, timestep_spacing=name)
    scheduler.set_timesteps(steps)
    ours = nb.spacing(name, nb.make_alpha_bar("cosine", 200), steps)
    assert ours[:-1] == (scheduler.timesteps + 1).tolist()


def test_quadratic_and_log_snr_follow_their_curves(nb):
    alpha_bar = nb.make_alpha_bar("cosine", 1000)
    quadratic = np.array(nb.spacing("quadratic", alpha_bar, 20))
    assert abs(quadratic - 1000 * (1 - np.arange(21) / 20) ** 2).max() <= 0.5 + 1e-9
    times = nb.spacing("log-SNR", alpha_bar, 10)
    assert times[0] == 1000 and times[-2:] == [1, 0]
    gaps = nb.log_snr(alpha_bar)[times[:-1]].diff()
    assert gaps.std() / gaps.mean() < 0.25  # whole times only, and few of them near 1
    assert nb.log_snr(alpha_bar)[nb.timesteps(1000, 10)[:-1]].diff().std() > gaps.std() * 2


def test_distinct_leaves_distinct_times_alone(nb):
    assert nb.distinct(torch.tensor([9.0, 7, 3, 0])) == [9, 7, 3, 0]
    assert nb.distinct(torch.tensor([9.0, 2, 1, 1, 1, 0])) == [9, 4, 3, 2, 1, 0]
    assert nb.distinct(torch.tensor([9.0, 9, 9, 8, 0])) == [9, 8, 7, 6, 0]


def test_unknown_spacings_and_step_numbers_get_one_sentence(nb):
    alpha_bar = nb.make_alpha_bar("cosine", 60)
    with pytest.raises(nb.ReaderError, match="\"trailing\", \"leading\""):
        nb.spacing("even", alpha_bar, 5)
    for name in SPACINGS:
        with pytest.raises(nb.ReaderError, match="from 1 to 60"):
            nb.spacing(name, alpha_bar, 61)


@pytest.mark.parametrize("name, calls", (("DDIM", 10), ("DDPM", 10), ("2M", 10),
                                         ("2M with noise", 10), ("Heun", 9)))
def test_named_samplers_keep_to_their_calls(nb, name, calls):
    its, model = nb.replace(nb.make_config("smoke", "FashionMNIST")), Counted()
    way = nb.few_step(name, model, its, 10, "trailing")
    x_T, y = nb.noise((3, 1, 28, 28), 100), torch.zeros(3).long()
    alpha_bar = nb.make_alpha_bar(its.schedule, its.T)
    path = list(way(x_T, y, 7))
    assert len(model.asked) == calls
    if name in ("DDIM", "DDPM"):
        known = nb.sample(wild, x_T, alpha_bar, its.predict, 10, float(name == "DDPM"),
                          seed=7)
        assert torch.equal(path[-1][1], nb.final(known))
    elif name == "2M with noise":
        plain = nb.few_step("2M", model, its, 10, "trailing")(x_T, y, 7)
        assert not torch.allclose(path[-1][1], nb.final(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_inversion_undoes_ddim_for_a_smooth_model(nb, kind):
    alpha_bar = nb.make_alpha_bar("cosine", 200)
    best, _ = normal_data(alpha_bar, 0.5)
    x_0 = 1.7 * nb.noise((3, 1, 4, 4), 2).double()  # outside [-1, 1]: nothing may clamp

    def model(x_t, t, y=None):
        x0_hat = best(x_t, t)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        eps = (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()
        return {"x_0": x0_hat, "eps": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * x0_hat}[kind]

    errors = []
    for repeats in (0, 2, 40):
        x_T = nb.invert(model, x_0, alpha_bar, kind, 25, repeats=repeats)
        back = nb.final(nb.sample(model, x_T, alpha_bar, kind, 25, clip=False))
        errors.append(float((back - x_0).abs().max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_inversion_asks_at_one_instead_of_zero(nb):
    alpha_bar, x_0 = nb.make_alpha_bar("cosine", 60), nb.noise((2, 1, 8, 8), 1)
    model = Counted()
    nb.invert(model, x_0, alpha_bar, "v", 6, repeats=0)
    assert model.asked == [1, 10, 20, 30, 40, 50]
    model = Counted()
    nb.invert(model, x_0, alpha_bar, "v", 3, repeats=2)
    assert model.asked == [1, 20, 20, 20, 40, 40, 40, 60, 60]


def test_naive_inversion_is_diffusers(nb):
    alpha_bar, x = nb.make_alpha_bar("cosine", 200), nb.noise((4, 1, 8, 8), 0)
    scheduler = diffusers.DDIMInverseScheduler(  # its t = 0 asks for eps as ours at 1
        200, trained_betas=betas(alpha_bar), clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", prediction_type="epsilon")
    scheduler.set_timesteps(20)
    theirs = x
    for k in scheduler.timesteps.tolist():  # 9, 19, ..., where it arrives; less 10: from
        eps_hat = wild(theirs, torch.full((4,), max(k + 1 - 10, 1)))
        theirs = scheduler.step(eps_hat, k, theirs).prev_sample
    ours = nb.invert(wild, x, alpha_bar, "eps", 20, repeats=0)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
