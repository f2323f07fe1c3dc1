"""The long measurements of diffusion_tutorial.ipynb, by the notebook's own functions.

    python assets/tools/pixels.py worth     what three choices of training are worth
    python assets/tools/pixels.py more      what 2, 5, 10 and 30 minutes of training give

Both write to assets/results. One thread; half an hour each.
"""
import base64
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from definitions import keep, prepare


def excess(nb: object, net: object, cfg: object, n: int, seed: int) -> float:
    """The excess FID of n pictures: random labels, 25 calls, eta = 0.5."""
    road = nb.make_schedule(cfg.schedule, cfg.T)
    x = nb.draw(nb.denoiser(net, road, cfg.predict), road, nb.random_labels(n, 10, seed),
                nb.timesteps(cfg.T, 25), (1, 28, 28), 0.5, seed)
    eye = nb.Eye(partial(nb.features_of, nb.yardstick), nb.real_test, nb.held_out)
    return nb.excess_fid(eye, nb.to_bytes(x))


def worth(nb: object) -> None:
    """Flow against v, even t against most t from the middle, the average: five seeds."""
    rows = []
    for seed in range(5):
        for name, change in {"v": {}, "flow": dict(schedule="flow", predict="flow"),
                             "uniform t": dict(t_even=1.0)}.items():
            cfg = nb.Config(steps=1500, seed=seed, **change)
            run = nb.Run(cfg, 1)
            nb.train(run, nb.images, nb.labels, cfg, Path(f"runs/worth-{name}-{seed}.pt"),
                     save_every=10**9)
            row = {"variant": name, "seed": seed, "steps": 1500, "N": 1000,
                   "averaged": excess(nb, run.ema, cfg, 1000, 100 + 10 * seed)}
            if name == "v":
                row["last"] = excess(nb, run.net, cfg, 1000, 100 + 10 * seed)
            rows.append(row)
            print(json.dumps(row), flush=True)
    keep("worth-fashionmnist", rows)


def more(nb: object) -> None:
    """Runs of 2000 and 5000 steps, and the second trained on for 5000 and 20,000 more."""
    rows, run = [], None
    for steps, total in ((2000, 2000), (5000, 5000), (5000, 10_000), (20_000, 30_000)):
        cfg = replace(nb.Config(), steps=steps)
        file = Path(f"runs/more-{total}.pt")
        last, run = run, nb.Run(cfg, 1)
        if total > 5000:
            cfg = replace(cfg, lr=2e-3, ema_decay=0.999)
            run = nb.train_on(last, cfg)
        if file.exists():
            run.load(file)
        nb.train(run, nb.images, nb.labels, cfg, file)
        scores = [excess(nb, run.ema, cfg, 1000, seed) for seed in (100, 200, 300)]
        y, road = torch.arange(10), nb.make_schedule(cfg.schedule, cfg.T)
        x = nb.draw(nb.denoiser(run.ema, road, cfg.predict), road, y,
                    nb.timesteps(cfg.T, 50), (1, 28, 28), 0.5, 7)
        rows.append({"steps": total, "N": 1000, "excess": scores,
                     "pictures": base64.b64encode(
                         nb.to_bytes(x).numpy().tobytes()).decode()})
        print(total, scores, flush=True)
        keep("more-fashionmnist", rows)


if __name__ == "__main__":
    globals()[sys.argv[1]](prepare("diffusion_tutorial", "FashionMNIST"))
