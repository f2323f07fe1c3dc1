"""Ours beside two peers, and beside more processes. By hand:

    python assets/tools/bench.py peers         equal wall time, three seeds; 2 hours
    python assets/tools/bench.py processes     one and two, one thread each; 3 minutes

The peers:
- peer: diffusers' UNet2DModel as in the Hugging Face diffusion course, unit 1 (channels
  32-64-64, attention in the lower two levels), batch 128, Adam's rate 1e-3, eps, linear betas;
- reference: the same library's network at half resolution (widths 32-64, attention at
  7 x 7), v, cosine, batch 128, rate 2e-3, EMA 0.995;
- ours: the notebook's Config.

All three see the same images and labels, with the same share of labels dropped, and get the
notebook's loop (AdamW, warm-up, cosine decay, clipping, EMA with warm-up, 16-bit arithmetic
where native) and the faster memory layout of two. The peers draw t evenly and sample by DDIM
with trailing steps, ours as in the notebook (eta = 1); labels at random. Guidance takes two
calls a step and gets half the steps; with it or without, as serves a contender better in a
first draw of a fifth of the samples, with other noises.

The cases of several processes take turns; torchrun starts each. Results go to assets/results.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from definitions import ROOT, keep, load_definitions
from torch import nn

CALLS, SAMPLES, SECONDS = 25, 2000, 300  # calls of the network for one sample
GUIDANCE, SEEDS = (1.0, 2.0), range(3)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CASES, ROUNDS = ((1, 32), (2, 32), (2, 64)), 3  # processes, images a step of all together


# ---------------------------------------------------------------------------- peers

class Peer(nn.Module):
    """UNet2DModel of the Hugging Face course, unit 1, behind the notebook's interface."""

    fold = 1
    sizes = dict(block_out_channels=(32, 64, 64), layers_per_block=2,
                 down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                 up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))

    def __init__(self, cfg: object, channels: int = 1) -> None:
        """As the notebooks' networks; nothing of cfg is used."""
        from diffusers import UNet2DModel
        super().__init__()
        self.net = UNet2DModel(28 // self.fold, channels * self.fold ** 2,
                               channels * self.fold ** 2, num_class_embeds=11, **self.sizes)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None):
        """The prediction; their timestep is our t - 1."""
        y = torch.full_like(t, 10) if y is None else y
        with torch.autocast("cpu", torch.bfloat16, torch.cpu._is_avx512_bf16_supported()):
            h = self.net(F.pixel_unshuffle(x_t, self.fold), t - 1, y).sample
        return F.pixel_shuffle(h, self.fold).float()


class Reference(Peer):
    """The reference recipe's network: half resolution, widths 32-64, attention at 7 x 7."""

    fold = 2
    sizes = dict(block_out_channels=(32, 64), layers_per_block=2,
                 down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                 up_block_types=("AttnUpBlock2D", "UpBlock2D"))


def train(nb: types.ModuleType, network: type, cfg: object, data: tuple, layout: str,
          seconds: float = 0.0) -> tuple:
    """A Run of cfg.steps, or of that many seconds; with it the seconds that it took."""
    run, schedule = nb.Run(cfg, 1, network), nb.make_schedule(cfg.schedule, cfg.T)
    for model in (run.net, run.ema):
        model.to(memory_format=LAYOUTS[layout])
    started = time.perf_counter()
    while len(run.losses) < cfg.steps or time.perf_counter() - started < seconds:
        batch = nb.make_batch(*data, len(run.losses), cfg)
        run.losses.append(float(nb.train_step(run, batch, schedule, cfg)))
    return run, time.perf_counter() - started


def pictures(nb: types.ModuleType, run: object, cfg: object, eta: float, n: int, seed: int,
             w: float) -> torch.Tensor:
    """n pictures with labels at random; a guided step costs two calls and counts as two."""
    schedule = nb.make_schedule(cfg.schedule, cfg.T)
    times = nb.timesteps(cfg.T, CALLS if w == 1 else CALLS // 2)
    model = nb.guided(nb.denoiser(run.ema, schedule, cfg.predict), w)
    return nb.to_bytes(nb.draw(model, schedule, nb.random_labels(n, 10, seed), times,
                               (1, 28, 28), eta, seed))


def peers() -> None:
    """Train all, undisturbed, each for the same time; then draw and judge, which may be."""
    nb = load_definitions("diffusion_tutorial")
    images, labels, _ = nb.load_data("FashionMNIST")
    data, net = (images[:-5000], labels[:-5000]), nb.load_classifier("FashionMNIST")
    real = nb.features_of(net, nb.load_data("FashionMNIST", False)[0])
    floor = statistics.mean(nb.fid(real, part) for part in nb.features_of(
        net, images[-10_000:]).split(SAMPLES))
    plain = replace(nb.Config(), batch=128, t_even=1.0)
    contenders = {
        "peer": (Peer, 0.0, replace(plain, lr=1e-3, schedule="linear", predict="eps",
                                    ema_decay=0.995)),
        "reference": (Reference, 0.0, replace(plain, lr=2e-3, ema_decay=0.995)),
        "ours": (nb.UNet, 1.0, nb.Config())}
    trained, rows = [], []
    for name, (network, eta, cfg) in contenders.items():
        pace = {}  # seconds a step, by layout
        for layout in LAYOUTS:
            run, seconds = train(nb, network, replace(cfg, steps=4), data, layout, 20)
            pace[layout] = seconds / len(run.losses)
        layout = min(pace, key=pace.get)
        for seed in SEEDS:
            cfg = replace(cfg, steps=max(1, round(SECONDS / pace[layout])), seed=seed)
            run, seconds = train(nb, network, cfg, data, layout)
            started = time.perf_counter()
            pictures(nb, run, cfg, eta, 64, 200, 1.0)
            row = {"network": name, "seed": seed, "steps": cfg.steps, "batch": cfg.batch,
                   "seconds": round(seconds, 1), "layout": layout,
                   "trained images per second": round(cfg.steps * cfg.batch / seconds, 1),
                   "sampled images per second": round(
                       64 / (time.perf_counter() - started), 1), "N": SAMPLES}
            print(row, flush=True)
            trained.append((run, cfg, eta, row))
    for run, cfg, eta, row in trained:
        def judge(n: int, seed: int, w: float) -> float:
            return nb.fid(real, nb.features_of(
                net, pictures(nb, run, cfg, eta, n, seed, w)))

        first = {w: judge(SAMPLES // 5, 300 + cfg.seed, w) for w in GUIDANCE}
        best = min(first, key=first.get)
        fid = judge(SAMPLES, 100 + cfg.seed, best)
        rows.append(row | {"w": best, "FID": round(fid, 3), "excess": round(fid - floor, 3)})
        print(rows[-1], flush=True)
        keep("peers", rows, {"calls": CALLS, "floor": round(floor, 4)})


# ------------------------------------------------------------------------ processes

def work(file: str, batch: int, steps: int = 40) -> None:
    """One case, in each process: five steps to warm up, then those that count."""
    nb = load_definitions("diffusion_tutorial")
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    cfg = replace(nb.Config(), batch=batch)
    images, labels, _ = nb.load_data(cfg.dataset)
    run, schedule = nb.Run(cfg, 1), nb.make_schedule(cfg.schedule, cfg.T)
    if count > 1:
        run.net = torch.nn.parallel.DistributedDataParallel(run.net)
    for step in range(5 + steps):
        if step == 5:
            started = time.perf_counter()
        share = tuple(part[rank::count] for part in nb.make_batch(images, labels, step, cfg))
        nb.train_step(run, share, schedule, cfg)
    if rank == 0:
        Path(file).write_text(str(steps * batch / (time.perf_counter() - started)))
    torch.distributed.destroy_process_group()


def processes() -> None:
    """Images a second in training by one process and by two."""
    torch.set_num_threads(1)
    load, found = os.getloadavg()[0], {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for count, batch in CASES * ROUNDS:
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", str(count), __file__, "work", f"{folder}/rate",
                 str(batch)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
            found[count, batch].append(round(float(Path(folder, "rate").read_text()), 1))
    one = statistics.median(found[CASES[0]])
    keep("scaling", [{
        "processes": count, "batch": batch, "cores": os.cpu_count(), "steps": 40,
        "load average before": round(load, 1), "images a second": rates,
        "median": statistics.median(rates), "times one": round(
            statistics.median(rates) / one, 2)} for (count, batch), rates in found.items()])
    print(json.dumps({str(case): rates for case, rates in found.items()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("peers", "processes", "work"))
    parser.add_argument("case", nargs="*", help="of work, which torchrun starts")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.kind == "work":
        work(args.case[0], int(args.case[1]))
    else:
        globals()[args.kind]()
