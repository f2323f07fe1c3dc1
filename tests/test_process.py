"""Noise, the step back and whole trajectories against closed forms, brute force, diffusers."""
import diffusers
import numpy as np
import pytest
import torch
from conftest import awake
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch.nn import functional as F

ROADS = ("linear", "cosine", "sigmoid", "flow")
KINDS = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}
STABLE = (("v", True), ("v", False), ("x_0", True), ("x_0", False), ("eps", True))


def wild(x_t, t, y=None):
    """A network whose answers leave [-1, 1], so that clamping matters."""
    return torch.sin(3 * x_t) + 0.5 * x_t + (t.view(-1, 1, 1, 1) % 7) / 7


def alpha_bar(schedule):
    """The papers' name for the squared signal."""
    return schedule.signal.double() ** 2


def betas(schedule):
    """The betas of a variance-preserving schedule, for diffusers."""
    a = alpha_bar(schedule)
    return (1 - a[1:] / a[:-1]).numpy()


def path_of(trajectory):
    """All x_t of a sampler, stacked."""
    return torch.stack([x_t for _, x_t, _ in trajectory])


@given(T=st.integers(50, 3000), name=st.sampled_from(ROADS))
@settings(max_examples=100, deadline=None)
def test_every_schedule_is_trainable_at_every_T(nb, T, name):
    schedule = nb.make_schedule(name, T)
    for curve in schedule:
        assert curve.shape == (T + 1,) and torch.isfinite(curve).all()
    assert (schedule.signal.diff() < 0).all() and (schedule.noise.diff() > 0).all()
    assert (schedule.signal[0], schedule.noise[0]) == (1, 0)
    assert (nb.log_snr(schedule)[1:].diff() < 0).all()
    if name == "flow":
        assert (schedule.signal[T], schedule.noise[T]) == (0, 1)
        torch.testing.assert_close(schedule.signal + schedule.noise, torch.ones(T + 1).double())
    else:
        assert 1e-5 < schedule.signal[T] ** 2 < 1e-3
        torch.testing.assert_close(schedule.signal ** 2 + schedule.noise ** 2,
                                   torch.ones(T + 1).double())
        assert 0 < betas(schedule).min() and betas(schedule).max() < 1


def test_linear_is_ho_and_cosine_is_nichol_at_1000_steps(nb):
    for name, theirs, close in (("linear", "linear", 2e-3),
                                ("cosine", "squaredcos_cap_v2", 7e-3)):
        oracle = diffusers.DDPMScheduler(beta_schedule=theirs).alphas_cumprod
        ours = alpha_bar(nb.make_schedule(name, 1000))[1:].float()
        assert (ours - oracle).abs().max() < close, name


def test_the_classic_flaw_is_what_we_say(nb):
    for T, left in ((200, 0.1322), (300, 0.0481)):
        ours = alpha_bar(nb.unscaled_linear(T))
        theirs = diffusers.DDPMScheduler(T, beta_schedule="linear").alphas_cumprod
        torch.testing.assert_close(ours[1:].float(), theirs)
        assert ours[-1] == pytest.approx(left, abs=1e-4)


@pytest.mark.parametrize("name", ROADS[:3])
def test_add_noise_equals_diffusers(nb, name):
    schedule, t = nb.make_schedule(name, 1000), torch.randint(1, 1001, (64,))
    x_0, eps = torch.randn(2, 64, 3, 8, 8).unbind(0)
    oracle = diffusers.DDPMScheduler(1000, trained_betas=betas(schedule))
    torch.testing.assert_close(nb.add_noise(x_0, t, eps, schedule),
                               oracle.add_noise(x_0, eps, t - 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("t, s", ((2, 1), (50, 49), (80, 40), (99, 3), (100, 99)))
@pytest.mark.parametrize("name", ("cosine", "flow"))
def test_step_with_eta_1_is_bayes_by_integration(nb, name, t, s):
    schedule = nb.make_schedule(name, 100)
    (a, c), (b, d) = ([float(curve[i]) for curve in schedule] for i in (s, t))
    x_t, x_0, zero, one = torch.tensor([1.2 * d - 0.8 * b, -0.8, 0, 1],
                                       dtype=torch.float64)
    mean = float(nb.reverse_step(x_t, x_0, t, s, schedule, 1.0, zero))
    deviation = float(nb.reverse_step(x_t, x_0, t, s, schedule, 1.0, one)) - mean
    r = b / a

    def joint(x):
        return (norm.pdf(float(x_t), r * x, (d ** 2 - r ** 2 * c ** 2) ** 0.5)
                * norm.pdf(x, a * -0.8, c))

    around = mean + np.array([-12, 12]) * deviation
    total, m1, m2 = (quad(lambda x, k=k: x ** k * joint(x), *around)[0] for k in (0, 1, 2))
    assert mean == pytest.approx(m1 / total, abs=1e-6)
    assert deviation ** 2 == pytest.approx(m2 / total - (m1 / total) ** 2, abs=1e-6)


def oracle_path(scheduler, x, times, seed=None, scaled=False, **flags):
    """A diffusers scheduler over our times (its timestep is ours minus 1), as x_t."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(**times)
    if scaled:  # from x_t to x_t / signal
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    path = []
    for k in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, k)
        if not scaled or scheduler.state_in_first_order:
            path.append(x_t)
        answer = wild(x_t, torch.full((len(x),), int(k) + 1))
        if generator is not None:
            flags["generator"] = generator
        x = scheduler.step(answer, k, x, **flags).prev_sample
    return torch.stack([*path, x])


@pytest.mark.parametrize("kind, clip", STABLE)  # "eps" without a clamp grows without bound
@pytest.mark.parametrize("name", ("linear", "cosine"))
def test_ddpm_equals_diffusers_over_a_trajectory(nb, name, kind, clip):
    schedule, x = nb.make_schedule(name, 200), nb.draw_noise((4, 1, 8, 8), 0)
    theirs = oracle_path(diffusers.DDPMScheduler(
        200, trained_betas=betas(schedule), clip_sample=clip, variance_type="fixed_small",
        prediction_type=KINDS[kind]), x, {"num_inference_steps": 200}, 5)
    ours = path_of(nb.sample(nb.denoiser(wild, schedule, kind), x, schedule,
                             nb.timesteps(200, 200), eta=1.0, clip=clip, seed=5))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ("linear", "cosine"))
@pytest.mark.parametrize("steps, eta", ((200, 0.0), (20, 0.0), (20, 0.6), (200, 1.0)))
def test_ddim_equals_diffusers_over_a_trajectory(nb, name, kind, steps, eta):
    schedule, x = nb.make_schedule(name, 200), nb.draw_noise((4, 1, 8, 8), 0)
    theirs = oracle_path(diffusers.DDIMScheduler(
        200, trained_betas=betas(schedule), clip_sample=True, set_alpha_to_one=True,
        timestep_spacing="trailing", prediction_type=KINDS[kind]), x,
        {"num_inference_steps": steps}, 5, eta=eta, use_clipped_model_output=True)
    ours = path_of(nb.sample(nb.denoiser(wild, schedule, kind), x, schedule,
                             nb.timesteps(200, steps), eta=eta, seed=5))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_ddim_on_the_flow_road_is_euler(nb):
    """Every step of dx / d(t / T) = u from noise to picture, to 1e-5."""
    schedule, x = nb.make_schedule("flow", 1000), nb.draw_noise((4, 1, 8, 8), 0)
    times = nb.timesteps(1000, 40)
    ours = path_of(nb.sample(nb.denoiser(wild, schedule, "flow"), x, schedule, times,
                             clip=False))
    for x_t, x_s, t, s in zip(ours, ours[1:], times, times[1:]):
        u = wild(x_t, torch.full((4,), t))
        torch.testing.assert_close(x_s, x_t + (s - t) / 1000 * u, atol=1e-5, rtol=1e-5)


def test_sampling_from_part_1_is_ddpm(nb, monkeypatch):
    """`sample_first` walks the same way as `sample` with eta = 1, under the same noise."""
    schedule, x = nb.make_schedule("cosine", 200), nb.draw_noise((4, 1, 8, 8), 0)
    generator = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch, "randn_like",
                        lambda x: torch.randn(x.shape, generator=generator))
    first = path_of(nb.sample_first(wild, x, torch.arange(4), schedule, 20))
    ours = path_of(nb.sample(nb.denoiser(wild, schedule, "eps"), x, schedule,
                             nb.timesteps(200, 20), eta=1.0, seed=5))
    torch.testing.assert_close(first, ours, atol=1e-3, rtol=1e-3)


def ours_by(nb, rule, schedule, times, x, clip, **kwargs):
    """All x_t of `sample` with a wrapped denoiser, which clamps inside."""
    denoise = nb.denoiser(wild, schedule, "v")
    denoise = rule(nb.clamped(denoise) if clip else denoise, schedule, times)
    return path_of(nb.sample(denoise, x, schedule, times, clip=False, **kwargs))


@pytest.mark.parametrize("noisy", (False, True))
@pytest.mark.parametrize("spaced", ("trailing", "log-SNR"))
@pytest.mark.parametrize("name, clip", (("linear", True), ("cosine", True), ("cosine", False)))
def test_2m_equals_diffusers_over_a_trajectory(nb, name, clip, spaced, noisy):
    schedule, x = nb.make_schedule(name, 200), nb.draw_noise((4, 1, 8, 8), 0)
    times = nb.spacing(spaced, schedule, 20)
    theirs = oracle_path(diffusers.DPMSolverMultistepScheduler(
        200, trained_betas=betas(schedule), solver_order=2, solver_type="midpoint",
        algorithm_type="sde-dpmsolver++" if noisy else "dpmsolver++",
        prediction_type="v_prediction", timestep_spacing="trailing", final_sigmas_type="zero",
        lower_order_final=False, euler_at_final=False,
        thresholding=clip, sample_max_value=1.0),  # with 1.0 a plain clamp to [-1, 1]
        x, {"timesteps": [t - 1 for t in times[:-1]]}, 5 if noisy else None)
    ours = ours_by(nb, nb.second_order, schedule, times, x, clip, eta=float(noisy), seed=5)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("spaced", ("trailing", "log-SNR"))
@pytest.mark.parametrize("name, clip", (("linear", True), ("cosine", True), ("cosine", False)))
def test_heun_equals_diffusers_over_a_trajectory(nb, name, clip, spaced):
    schedule, x = nb.make_schedule(name, 200), nb.draw_noise((4, 1, 8, 8), 0)
    times = nb.spacing(spaced, schedule, 10)
    theirs = oracle_path(diffusers.HeunDiscreteScheduler(
        200, trained_betas=betas(schedule), prediction_type="v_prediction", clip_sample=clip,
        clip_sample_range=1.0), x, {"timesteps": [t - 1 for t in times[:-1]]}, scaled=True)
    ours = ours_by(nb, nb.heun, schedule, times, x, clip)
    close = 1e-3 if clip else 5e-3  # unclamped, `wild` magnifies their float32 tables
    torch.testing.assert_close(ours, theirs, atol=close, rtol=close)


@pytest.mark.parametrize("name, rule, order", (  # 2M would start at log SNR = -infinity
    ("cosine", None, 1), ("cosine", "second_order", 2), ("cosine", "heun", 2),
    ("flow", None, 1), ("flow", "heun", 2)))
def test_error_falls_with_the_order_of_the_rule(nb, name, rule, order):
    """Pixels that are normal with deviation c have an exact curve, on every road."""
    schedule, c, errors = nb.make_schedule(name, 1000), 0.5, []
    signal, noise = (curve.view(-1, 1, 1, 1) for curve in schedule)
    x = nb.draw_noise((4, 1, 2, 2), 0).double()

    def best(x_t, t, y=None):
        return signal[t] * c ** 2 / (signal[t] ** 2 * c ** 2 + noise[t] ** 2) * x_t
    exact = c * x / (signal[-1] ** 2 * c ** 2 + noise[-1] ** 2) ** 0.5
    for steps in (50, 100):
        times = nb.timesteps(1000, steps) if name == "flow" else nb.spacing(
            "log-SNR", schedule, steps)
        denoise = getattr(nb, rule)(best, schedule, times) if rule else best
        x_0 = nb.last(nb.sample(denoise, x, schedule, times, clip=False))
        errors.append(float((x_0 - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2 ** order, rel=0.25)


@given(T=st.integers(50, 1000), share=st.floats(0, 1), schedule=st.sampled_from(ROADS),
       name=st.sampled_from(("trailing", "leading", "quadratic", "log-SNR")))
@settings(max_examples=100, deadline=None)
def test_spacings_fall_without_doubles(nb, T, share, schedule, name):
    steps = max(1, round(share * T))
    times = nb.spacing(name, nb.make_schedule(schedule, T), steps)
    assert len(times) == steps + 1 and times[-1] == 0
    assert times[0] == (1 + T // steps * (steps - 1) if name == "leading" else T)
    assert all(isinstance(t, int) and t > s for t, s in zip(times, times[1:]))


def test_spacings_of_that_name_are_diffusers(nb):
    for name in ("trailing", "leading"):
        for steps in (4, 10, 50, 200):
            scheduler = diffusers.DDIMScheduler(200, timestep_spacing=name)
            scheduler.set_timesteps(steps)
            ours = nb.spacing(name, nb.make_schedule("cosine", 200), steps)
            assert ours[:-1] == (scheduler.timesteps + 1).tolist()


@pytest.mark.parametrize("name, calls", (("DDIM", 10), ("DDPM", 10), ("2M", 10),
                                         ("2M with noise", 10), ("Heun", 9)))
def test_named_rules_keep_to_their_calls_one_step_included(nb, name, calls):
    schedule, x, asked = nb.make_schedule("cosine", 60), nb.draw_noise((3, 1, 8, 8), 1), []

    def counted(x_t, t, y=None):
        asked.append(int(t[0]))
        return nb.denoiser(wild, schedule, "v")(x_t, t)
    for most, wanted in ((10, calls), (1, 1)):
        asked.clear()
        plan = nb.few_step(name, counted, schedule, most, "trailing")
        plan.pop("schedule")
        nb.last(nb.sample(plan.pop("denoise"), x, schedule, **plan))
        assert len(asked) == wanted and min(asked) >= 1


def test_inversion_undoes_ddim_for_a_smooth_denoiser(nb):
    schedule, x_0 = nb.make_schedule("cosine", 200), 1.7 * nb.draw_noise((3, 1, 4, 4), 2)
    denoise, times, errors = nb.normal_denoiser(0.5, schedule), nb.timesteps(200, 25), []
    for repeats in (1, 3, 40):
        x_T = nb.invert(denoise, x_0.double(), schedule, times, repeats=repeats)
        back = nb.last(nb.sample(denoise, x_T, schedule, times, clip=False))
        errors.append(float((back - x_0).abs().max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_another_road_is_matched_by_its_signal_to_noise_ratio(nb):
    """The ideal denoiser of one road, told the other's x_t, is the other's ideal denoiser."""
    own, road = nb.make_schedule("cosine", 1000), nb.make_schedule("flow", 1000)
    data, t = torch.randn(5, 1, 4, 4), torch.tensor([100, 300, 500, 800, 950])
    moved = nb.on_road(nb.ideal_denoiser(data, own), own, road)
    x_t = nb.add_noise(data, t, torch.randn(5, 1, 4, 4), road)
    torch.testing.assert_close(moved(x_t, t), nb.ideal_denoiser(data, road)(x_t, t),
                               atol=0.02, rtol=0.02)


def test_shifted_schedule_multiplies_the_signal_to_noise_ratio(nb):
    usual = nb.make_schedule("cosine", 1000)
    for side in (28, 64):
        curves = nb.shifted(usual, side)
        torch.testing.assert_close(curves.signal ** 2 + curves.noise ** 2,
                                   torch.ones(1001).double())
        ratio = (curves.signal / curves.noise)[1:] / (usual.signal / usual.noise)[1:]
        torch.testing.assert_close(ratio, torch.full_like(ratio, 28 / side))


def test_inpainting_keeps_what_is_known_and_fills_the_hole(nb):
    """With the ideal denoiser the hole holds the one picture that fits."""
    schedule, data = nb.make_schedule("cosine", 100), torch.rand(6, 1, 8, 8) * 2 - 1
    hole = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hole[..., 2:6, 2:6] = True
    denoise = nb.known(nb.ideal_denoiser(data, schedule), data, hole)
    x = nb.repaint(denoise, nb.draw_noise(data.shape, 0), schedule, nb.timesteps(100, 50), 3)
    outside = ~hole.expand_as(data)
    assert torch.equal(x[outside], data[outside])
    assert (x - data).abs().max() < 0.05


def test_sdedit_and_slerp_at_their_ends(nb):
    schedule, data = nb.make_schedule("cosine", 100), torch.rand(6, 1, 8, 8) * 2 - 1
    denoise = nb.ideal_denoiser(data, schedule)
    assert torch.equal(nb.sdedit(denoise, data, 0.0, schedule, 10), data)
    little, much = (nb.nearest(nb.sdedit(denoise, data, u, schedule, 40), data)[1]
                    for u in (0.2, 1.0))
    assert torch.equal(little, torch.arange(6)) and not torch.equal(much, torch.arange(6))
    a, b = torch.randn(2, 3, 1, 8, 8)
    for u, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(nb.slerp(a, b, u), end, atol=1e-5, rtol=1e-4)
    a, b = (x / x.flatten(1).norm(dim=1).view(3, 1, 1, 1) for x in (a, b))
    middle = nb.slerp(a, b, 0.5).flatten(1)
    torch.testing.assert_close(middle.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(F.cosine_similarity(middle, a.flatten(1)),
                               F.cosine_similarity(middle, b.flatten(1)))


@pytest.mark.parametrize("kind", (*KINDS, "flow"))
@pytest.mark.parametrize("name", ROADS)
def test_target_and_denoiser_are_inverse(nb, name, kind):
    schedule = nb.make_schedule(name, 100)
    t = torch.arange(0, 100 if (kind, name) == ("eps", "flow") else 101)
    x_0, eps = torch.randn(2, len(t), 1, 4, 4).double().unbind(0)
    answer = nb.target(x_0, eps, t, schedule, kind)
    back = nb.denoiser(lambda x_t, t, y: answer, schedule, kind)
    x_t = nb.add_noise(x_0, t, eps, schedule)
    torch.testing.assert_close(back(x_t, t), x_0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ("cosine", "flow"))
def test_ideal_denoiser_equals_brute_force(nb, name):
    schedule, data = nb.make_schedule(name, 100), nb.draw_noise((7, 1, 4, 4), 0)
    x_t = nb.draw_noise((3, 1, 4, 4), 1)
    for t in (1, 30, 100):
        signal, noise = (float(curve[t]) for curve in schedule)
        guess = nb.ideal_denoiser(data, schedule)(x_t, torch.full((3,), t))
        for i in range(3):
            logs = np.array([-float((x_t[i] - signal * x).square().sum()) / (2 * noise ** 2)
                             for x in data])
            weight = np.exp(logs - logs.max())
            by_hand = sum(w * x for w, x in zip(weight / weight.sum(), data))
            torch.testing.assert_close(guess[i], by_hand.float(), atol=2e-3, rtol=1e-3)


def test_guidance_at_zero_and_one_is_no_label_and_label(nb, tiny):
    net, schedule = awake(nb.UNet(tiny)), nb.make_schedule("cosine", 50)
    denoise, x = nb.denoiser(net, schedule, "v"), torch.randn(4, 1, 28, 28)
    t, y = torch.tensor([9] * 4), torch.tensor([0, 5, 9, 10])
    with torch.no_grad():
        plain, labelled = denoise(x, t), denoise(x, t, y)
        for w in (0.0, 1.0, 3.0):
            torch.testing.assert_close(nb.guided(denoise, w)(x, t, y),
                                       plain + w * (labelled - plain), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(labelled[:3], plain[:3])
        torch.testing.assert_close(labelled[3], plain[3])  # label 10 is no label
        banded = nb.guided(denoise, 3.0, (10, 20))
        for at, w in ((1, 1.0), (9, 1.0), (15, 3.0), (21, 1.0), (50, 1.0)):
            t = torch.full((4,), at)
            assert torch.equal(banded(x, t, y), nb.guided(denoise, w)(x, t, y)), at
