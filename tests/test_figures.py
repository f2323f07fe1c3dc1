"""README's pictures: small, complete, and still telling what the notebooks do."""
import re
import xml.etree.ElementTree as ET

import make_figures
import pytest
import torch
from conftest import ROOT, load_definitions
from PIL import Image

FIGURES = ROOT / "assets/figures"


@pytest.fixture(scope="module")
def latent():
    """The definitions of the latent notebook."""
    return load_definitions("latent_diffusion_cab")


def words(file):
    """All text of an SVG file, and its root."""
    root = ET.parse(file).getroot()
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in texts], root


def without_pictures(svg):
    """The drawing alone, without the small pictures in it."""
    return re.sub(r'href="data:[^"]*"', "", svg)


def test_map_is_what_the_script_draws_from_todays_definitions(nb, latent):
    path = {t: (torch.zeros(4, 1, 28, 28),) * 2 for t in (0, 400, 500, 1000)}
    drawn = make_figures.draw_map(nb, latent, path)
    committed = (FIGURES / "map.svg").read_text()
    assert without_pictures(drawn) == without_pictures(committed)
    assert committed.count("data:image/png") == 6


def test_numbers_of_the_map_are_those_of_the_code(nb, latent):
    shown, _ = words(FIGURES / "map.svg")
    cfg, (space, its) = nb.Config(), latent.make_config("cpu", "MNIST")
    (a, b), (c, d) = cfg.widths, its.widths
    side = space.side // 2 ** space.folds
    assert shown.count(f"{cfg.blocks} ResBlocks") == 4 and f"{cfg.heads} heads" in shown
    assert shown.count(f"{a}x14x14") == 3 and shown.count(f"{b}x7x7") == 2
    assert f"U-Net: {c}x{side}x{side}, {d}x{-(-side // 2)}x{-(-side // 2)}" in shown
    assert f"{space.widths[0]}, {space.widths[1]} channels" in shown
    assert shown.count(f"{space.channels}x{side}x{side}") == 2
    assert f"t = {cfg.T}" in shown and cfg.predict == "v" and cfg.schedule == "cosine"
    for place, net in (("3  U-Net, ", nb.UNet(cfg)), ("", latent.LatentUNet(its, 4)),
                       ("(", latent.Autoencoder(space))):
        count = f"{place}{sum(p.numel() for p in net.parameters()):,} weights"
        assert any(count in line for line in shown), count


def test_map_stands_alone_and_can_be_read_aloud():
    _, root = words(FIGURES / "map.svg")
    kinds = [child.tag.split("}")[1] for child in root]
    assert kinds[:2] == ["title", "desc"] and len(root[1].text) > 100
    assert root.get("role") == "img" and root.get("viewBox") == "0 0 1280 720"
    fonts = {node.get("font-family") for node in root.iter()} - {None}
    assert fonts == {"sans-serif", "monospace"}
    for node in root.iter():
        for name, value in node.attrib.items():
            assert not value.startswith("http") and name != "onload"


def test_hero_goes_from_noise_to_garments_and_rests():
    with Image.open(FIGURES / "hero.gif") as gif:
        frames, pace = [], []
        for number in range(gif.n_frames):
            gif.seek(number)
            pace.append(gif.info["duration"])
            content = bytearray(gif.convert("RGB").tobytes())
            rgb = torch.frombuffer(content, dtype=torch.uint8).view(gif.height, -1, 3)
            assert (rgb[..., 0] == rgb[..., 2]).all(), "greys only"
            frames.append(rgb[..., 0].float())
    jump = [(frame[::2].diff(dim=1).abs()[:, 1::2]).mean() for frame in frames]
    assert jump[-1] < 0.4 * jump[0] and all(a >= b for a, b in zip(jump, jump[1:]))
    assert pace[-1] >= 2000 and sum(pace) <= 12_000
    assert (FIGURES / "hero.gif").stat().st_size <= 700_000


def test_figures_and_results_stay_small():
    files = [file for folder in ("figures", "results")
             for file in (ROOT / "assets" / folder).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 2.5e6
