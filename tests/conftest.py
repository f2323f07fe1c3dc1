"""Shared by all tests: the small profile, the notebooks' own definitions, a browser."""
import os
import shutil
import sys
import types
from pathlib import Path

os.environ.setdefault("DIFFUSION_PROFILE", "smoke")  # the notebooks run small under nbval
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # two workers, two cores

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "assets/tools"))
from definitions import DEFINES, ROOT, code_cells, load_definitions, parse  # noqa: E402, F401

os.chdir(ROOT)  # the notebooks name files from there
LONG = ("test_device.py", "test_runs.py", "diffusion_tutorial.ipynb", "test_browser.py",
        "latent_diffusion_cab.ipynb", "test_export.py")
CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
         "--disable-background-networking --disable-component-update --disable-sync").split()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Long files first: a worker that is done early takes from what is left."""
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def nb() -> types.ModuleType:
    """The definitions of the pixel notebook."""
    return load_definitions("diffusion_tutorial")


@pytest.fixture(scope="session")
def lat() -> types.ModuleType:
    """The definitions of the latent notebook."""
    return load_definitions("latent_diffusion_cab")


@pytest.fixture
def tiny(nb):
    """Settings that train in a second."""
    return nb.Config(widths=(8, 16), blocks=1, heads=4, batch=16, steps=10, warmup=2, T=50)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test begins at the same random numbers."""
    torch.manual_seed(0)


def needed(program: str | None, name: str) -> None:
    """Without a program its tests are skipped, but fail where the project's checks run."""
    if not program:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            f"{name} is needed: apt-get install {name.lower()}")


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, driven by Playwright."""
    needed(CHROMIUM, "Chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


def awake(net: torch.nn.Module, deviation: float = 0.1) -> torch.nn.Module:
    """The network with weights that make every part count."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=deviation)
    return net.eval()
