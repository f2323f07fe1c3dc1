"""Noise schedules: trainable at every T, consistent, and near the published ones."""
import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ("linear", "cosine", "sigmoid")


@given(T=st.integers(50, 4000), name=st.sampled_from(NAMES))
@settings(max_examples=150, deadline=None)
def test_every_schedule_is_trainable_at_every_T(nb, T, name):
    alpha_bar = nb.make_alpha_bar(name, T)
    beta = nb.beta_from(alpha_bar)
    assert alpha_bar.dtype == torch.float64 and alpha_bar.shape == (T + 1,)
    assert alpha_bar[0] == 1 and 1e-5 < alpha_bar[T] < 1e-3
    assert torch.isfinite(alpha_bar).all() and (alpha_bar.diff() < 0).all()
    assert beta[0] == 0 and 0 < beta[1:].min() and beta.max() < 1
    torch.testing.assert_close(torch.cumprod(1 - beta, 0), alpha_bar, rtol=1e-9, atol=0)
    assert (nb.log_snr(alpha_bar)[1:].diff() < 0).all()


def test_linear_is_ho_at_1000_steps(nb):
    theirs = diffusers.DDPMScheduler(beta_schedule="linear").alphas_cumprod
    ours = nb.make_alpha_bar("linear", 1000)[1:].float()
    assert (ours - theirs).abs().max() < 2e-3


def test_cosine_is_nichol_away_from_the_end(nb):
    theirs = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    ours = nb.make_alpha_bar("cosine", 1000)[1:].float()
    assert (ours - theirs).abs().max() < 7e-3


def test_the_classic_flaw_is_what_we_say(nb):
    assert nb.unscaled_linear(200)[-1] == pytest.approx(0.1322, abs=1e-4)
    assert nb.unscaled_linear(300)[-1] == pytest.approx(0.0481, abs=1e-4)
    theirs = diffusers.DDPMScheduler(200, beta_schedule="linear").alphas_cumprod
    torch.testing.assert_close(nb.unscaled_linear(200)[1:].float(), theirs)


@pytest.mark.parametrize("name, T, word", [
    ("cosin", 1000, "linear"), ("cosine", 10, "50"), ("cosine", 100.5, "whole"),
    ("cosine", -1, "50")])
def test_bad_schedules_get_one_sentence(nb, name, T, word):
    with pytest.raises(nb.ReaderError, match=word):
        nb.make_alpha_bar(name, T)
