"""Grids and sliders: what they show, and what a browser without a kernel gets."""
import base64
import io
import re

import pytest
import torch
from PIL import Image


def test_grid_is_rgb_with_white_lines(nb):
    picture = nb.grid(torch.full((6, 1, 4, 4), -1.0), 3)
    assert picture.shape == (11, 16, 3) and picture.dtype == torch.uint8
    assert picture[0].min() == 255 and picture[1:5, 1:5].max() == 0
    assert nb.grid(torch.zeros(2, 3, 4, 4), 2).shape == (6, 11, 3)


def test_png_keeps_the_picture(nb):
    picture = nb.grid(torch.linspace(-1, 1, 28 * 28).view(1, 1, 28, 28), 1)
    back = Image.open(io.BytesIO(nb.png(picture))).convert("RGB")
    back = torch.frombuffer(bytearray(back.tobytes()), dtype=torch.uint8).view(picture.shape)
    assert (back.int() - picture.int()).abs().max() <= 16


def test_frame_slider_holds_every_frame_and_needs_nothing_else(nb):
    frames = [nb.grid(torch.full((1, 1, 4, 4), v), 1) for v in (-1.0, 0.0, 1.0)]
    html = nb.frame_slider(frames, ["t = 0", "t = 1", "t = 2"], "timestep", 100).data
    assert html.count("<img") == 3 and html.count("display:none") == 2
    assert 'data-lm-suppress-shortcuts="true"' in html and 'aria-label="timestep"' in html
    assert 'max="2"' in html and not re.search(r"https?://", html)
    for data in re.findall(r"base64,([^\"]+)", html):
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert html == nb.frame_slider(frames, ["t = 0", "t = 1", "t = 2"], "timestep", 100).data


def test_frame_slider_speaks_names_its_rows_and_keeps_its_keys(nb):
    frames = [torch.zeros(8, 6, 3, dtype=torch.uint8), torch.ones(8, 6, 3, dtype=torch.uint8)]
    html = nb.frame_slider(frames, ["t = 0", "t = 1"], "timestep", 60, ["up", "down"]).data
    assert "<span>up&emsp;</span><span>down&emsp;</span>" in html
    slider = re.search("<input.*?oninput", html, re.S)[0]
    assert 'aria-valuetext="t = 0"' in slider and 'autocomplete="off"' in slider
    for control in (slider, re.search("<button.*?>", html, re.S)[0]):
        assert 'data-lm-suppress-shortcuts="true"' in control  # Lab's and Notebook's keys
    assert "event.stopPropagation()" in html  # the keys of slides
    assert html.count('width="6" height="8" decoding="sync"') == 2  # no jump, no blink


def test_frame_slider_wants_a_name_for_each_frame(nb):
    with pytest.raises(nb.ReaderError, match="one name for each frame"):
        nb.frame_slider([torch.zeros(4, 4, 3, dtype=torch.uint8)], [], "t", 10)


def test_live_slider_redraws_for_each_control(nb):
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    t, row, view, text = nb.noising_slider(images, 100, 0).children
    schedule, index = row.children
    seen = {bytes(view.value)}
    for control, value in ((t, 90), (schedule, "linear"), (index, 3), (t, 0), (t, 100)):
        control.value = value
        seen.add(bytes(view.value))
    assert len(seen) == 6 and "eps" in text.value


def test_live_slider_agrees_with_the_forward_process(nb):
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    t, row, view, text = nb.noising_slider(images, 100, 0).children
    t.value = 0
    shown = Image.open(io.BytesIO(view.value)).convert("L")
    left, right = shown.crop((0, 0, 170, 170)), shown.crop((338, 0, 508, 170))
    assert left.tobytes() == right.tobytes()  # at t = 0 the mixture is the image


@pytest.fixture
def panel(nb):
    """A sampling panel over an untrained network with T = 50, and its parts by name."""
    its = nb.make_config("smoke", "FashionMNIST")
    torch.manual_seed(0)
    model = nb.UNet(its)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    box = nb.sampling_panel(model, its, torch.device("cpu"), list("abcdefghij"))
    (first, second, seed, view, text) = box.children
    controls = [*first.children, *second.children, seed]
    return {control.description: control for control in controls} | {
        "view": view, "text": text, "model": model, "its": its}


def test_panel_redraws_for_each_control(panel):
    seen = {bytes(panel["view"].value)}
    for name, value in (("class", 3), ("w", 4.0), ("sampler", "DDPM"), ("steps", 5),
                        ("seed", 8), ("sampler", "Heun"), ("sampler", "DDIM")):
        panel[name].value = value
        assert " s, " in panel["text"].value
        seen.add(bytes(panel["view"].value))
    assert len(seen) == 8
    sliders = [panel[name] for name in ("w", "steps", "seed")]
    assert not any(slider.continuous_update for slider in sliders)


def test_panel_answers_wishes_without_sense_in_a_sentence(panel):
    before = panel["view"].value
    panel["class"].value = 10  # no label, but w = 2
    assert "choose a class, or w = 1" in panel["text"].value
    assert panel["view"].layout.visibility == "hidden"  # no old picture under new controls
    panel["w"].value = 1.0
    assert " s, 10 network calls each" in panel["text"].value
    assert panel["view"].value != before
    assert panel["view"].layout.visibility == "visible"
    for sampler in panel["sampler"].options:
        panel["sampler"].value = sampler
        panel["steps"].value = 51  # of 50 timesteps
        assert "only 50 timesteps" in panel["text"].value, sampler
        panel["steps"].value = 1
        assert " s, 1 network calls each" in panel["text"].value, sampler


@pytest.mark.parametrize("w", [1.0, 2.0])
def test_panel_says_how_many_network_calls_a_picture_took(panel, w):
    asked = []
    panel["model"].register_forward_hook(
        lambda module, inputs, out: asked.append(len(inputs[0])))
    panel["w"].value, panel["steps"].value = w, 7
    for sampler in panel["sampler"].options[::-1]:
        asked.clear()
        panel["sampler"].value = sampler
        calls = sum(asked) // 8  # for each of the eight pictures
        assert calls == (13 if sampler == "Heun" else 7) * (2 if w != 1 else 1)
        assert f" s, {calls} network calls each" in panel["text"].value, sampler


def test_panel_shows_what_the_samplers_draw(nb, panel):
    panel["sampler"].value, panel["seed"].value = "DDIM", 6
    y = torch.full((8,), 0)
    x = nb.final(nb.sample(nb.guided(panel["model"], 2), nb.noise((8, 1, 28, 28), 6),
                           nb.make_alpha_bar("cosine", 50), "v", 10, y=y))
    assert panel["view"].value == nb.png(nb.grid(x, 8))
