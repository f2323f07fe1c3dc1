"""Ours beside two peers: equal wall time and equal steps. By hand, 75 minutes:

    python assets/tools/bench_peers.py --calls 25 --steps 200

- peer: diffusers' UNet2DModel as in the Hugging Face diffusion course, unit 1 (channels
  32-64-64, attention in the lower two levels), batch 128, Adam's rate 1e-3, eps, linear betas;
- reference: the same library's network at half resolution (widths 32-64, attention at
  7 x 7), v, cosine, batch 128, rate 2e-3, EMA 0.995;
- ours: the notebook's Config.

All three see the same images and labels, with the same share of labels dropped, and get the
same conveniences: the notebook's loop (AdamW, warm-up, cosine decay, clipping, EMA with
warm-up, 16-bit arithmetic where native) and the faster memory layout of two. The peers draw t
evenly and sample by DDIM with trailing steps, ours as in the notebook (eta = 1); labels at
random. Guidance takes two calls a step and gets half the steps; whether a contender is judged
without or with the notebook's guidance is decided by what serves it better in a first draw of a
fifth of the samples, with other noises.
"""
import argparse
import json
import os
import platform
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from definitions import ROOT, load_definitions
from diffusers import UNet2DModel
from torch import nn
from torchvision.utils import save_image

GUIDANCE = (1.0, 2.0)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Peer(nn.Module):
    """UNet2DModel of the Hugging Face course, unit 1, behind the notebook's interface."""

    fold = 1
    sizes = dict(block_out_channels=(32, 64, 64), layers_per_block=2,
                 down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                 up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))

    def __init__(self, cfg, channels=1, dtype=None):
        """As the notebooks' networks; nothing of cfg is used."""
        super().__init__()
        self.dtype = dtype or (torch.bfloat16 if torch.cpu._is_avx512_bf16_supported()
                               else None)
        self.net = UNet2DModel(28 // self.fold, channels * self.fold ** 2,
                               channels * self.fold ** 2, num_class_embeds=11, **self.sizes)

    def forward(self, x_t, t, y=None):
        """The prediction; their timestep is our t - 1."""
        y = torch.full_like(t, 10) if y is None else y
        with torch.autocast(x_t.device.type, self.dtype, enabled=self.dtype is not None):
            h = self.net(F.pixel_unshuffle(x_t, self.fold), t - 1, y).sample
        return F.pixel_shuffle(h, self.fold).float()


class Reference(Peer):
    """The reference recipe's network: half resolution, widths 32-64, attention at 7 x 7."""

    fold = 2
    sizes = dict(block_out_channels=(32, 64), layers_per_block=2,
                 down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                 up_block_types=("AttnUpBlock2D", "UpBlock2D"))


def prepare(nb, network, cfg, data):
    """The faster layout of a network, and its seconds per training step."""
    found = {}
    for name, layout in LAYOUTS.items():
        run = nb.Run(cfg, 1, network)
        run.net.to(memory_format=layout)
        schedule, step, started = nb.make_schedule(cfg.schedule, cfg.T), 0, 0.0
        while step < 4 or time.perf_counter() - started < 10:  # the first is slower
            nb.train_step(run, nb.make_batch(*data, step, cfg), schedule, cfg)
            step += 1
            started = started or time.perf_counter()
        found[name] = (time.perf_counter() - started) / (step - 1)
    return min(found, key=found.get), min(found.values())


def train(nb, name, network, cfg, data, layout):
    """A Run after cfg.steps, and the seconds it took."""
    run = nb.Run(cfg, 1, network)
    for model in (run.net, run.ema):
        model.to(memory_format=LAYOUTS[layout])
    schedule = nb.make_schedule(cfg.schedule, cfg.T)
    started = time.perf_counter()
    for step in range(cfg.steps):
        loss = nb.train_step(run, nb.make_batch(*data, step, cfg), schedule, cfg)
        if step % max(1, cfg.steps // 5) == 0:
            print(f"  {name}: step {step} of {cfg.steps}, loss {loss:.3f}", flush=True)
    return run, time.perf_counter() - started


def evaluate(nb, run, cfg, eta, args, net, real_test, floor):
    """FID and excess with the better guidance weight, samples per second, 32 pictures."""
    schedule = nb.make_schedule(cfg.schedule, cfg.T)
    plain = nb.denoiser(run.ema, schedule, cfg.predict)

    def draw(n, seed, w):
        """n uint8 images, and their FID; a guided step costs two calls."""
        y = torch.randint(10, (n,), generator=torch.Generator().manual_seed(seed))
        times = nb.timesteps(cfg.T, args.calls if w == 1 else args.calls // 2)
        images = nb.to_bytes(nb.draw(nb.guided(plain, w), schedule, y, times, (1, 28, 28),
                                     eta, seed))
        return images, nb.fid(real_test, nb.features_of(net, images))

    few = max(2, args.samples // 5)
    first = {w: draw(few, 300, w)[1] for w in GUIDANCE}
    best = min(first, key=first.get)
    started = time.perf_counter()
    images, score = draw(args.samples, 100, best)
    seconds = time.perf_counter() - started
    return {f"FID of {few}": {f"w = {w:g}": round(each, 3) for w, each in first.items()},
            "w": best, "FID": round(score, 3), "excess": round(score - floor, 3),
            "sampled images per second": round(args.samples / seconds, 2)}, images[:32]


def ratios_of(results):
    """Ours to the others, of the rows that are there."""
    ratios = {}
    for mode in ("equal time", "equal steps"):
        ours = results.get(f"{mode}, ours")
        for other in ("peer", "reference"):
            row = results.get(f"{mode}, {other}")
            if ours and row:
                ratios[f"excess, {mode}, ours / {other}"] = round(
                    ours["excess"] / row["excess"], 4)
    ours, peer = (results.get(f"equal time, {name}") for name in ("ours", "peer"))
    if ours and peer:
        for what in ("trained images per second", "sampled images per second"):
            ratios[f"{what}, ours / peer"] = round(ours[what] / peer[what], 2)
    return ratios


def main():
    """Train, sample, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--calls", type=int, default=50, help="network calls per sample")
    parser.add_argument("--steps", type=int, help="equal steps (default: the peer's of "
                        "equal time)")
    parser.add_argument("--out", default=str(ROOT / "assets/results/peers.json"))
    args = parser.parse_args()
    os.chdir(ROOT)
    nb = load_definitions("diffusion_tutorial")
    images, labels, _ = nb.load_data("FashionMNIST")
    data, net = (images[:-5000], labels[:-5000]), nb.load_classifier("FashionMNIST")
    real_test = nb.features_of(net, nb.load_data("FashionMNIST", False)[0])
    held = nb.features_of(net, images[-10_000:]).split(args.samples)
    floors = torch.tensor([nb.fid(real_test, part) for part in held[:5]])
    floor, sd = floors.mean().item(), floors.std().item()
    noise = nb.to_bytes(torch.randn(2000, 1, 28, 28))
    ceiling = nb.fid(real_test, nb.features_of(net, noise))
    print(f"N = {args.samples}: floor {floor:.3f} +- {sd:.3f}, ceiling {ceiling:.1f}")

    ours = nb.Config()
    plain = replace(ours, batch=128, t_even=1.0)
    contenders = {
        "peer": (Peer, 0.0, replace(plain, lr=1e-3, schedule="linear", predict="eps",
                                    ema_decay=0.995)),
        "reference": (Reference, 0.0, replace(plain, lr=2e-3, ema_decay=0.995)),
        "ours": (nb.UNet, 1.0, ours)}
    plans = {name: (*prepare(nb, network, cfg, data), cfg)
             for name, (network, _, cfg) in contenders.items()}
    common = args.steps or max(1, int(args.seconds / plans["peer"][1]))
    flags = torch.backends.cpu.get_cpu_capability()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True).stdout.strip()
    facts = {"dataset": "FashionMNIST", "N": args.samples, "calls": args.calls,
             "guidance": GUIDANCE,
             "floor": round(floor, 4), "floor sd": round(sd, 4), "ceiling": round(ceiling, 2),
             "seed": 0, "device": f"{torch.get_num_threads()} threads, {flags}, 16-bit: "
             f"{nb.has_bf16()}", "machine": platform.machine(),
             "torch": torch.__version__, "commit": commit}
    results, pictures, out = {}, [], Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for mode in ("equal time", "equal steps"):
        for name, (network, eta, cfg) in contenders.items():
            layout, per_step, _ = plans[name]
            key = f"{mode}, {name}"
            if mode == "equal steps":
                if name == "peer" and not args.steps:  # it has just made these very steps
                    results[key] = results["equal time, peer"]
                    continue
                cfg = replace(cfg, steps=common, batch=128)
            else:
                cfg = replace(cfg, steps=max(1, int(args.seconds / per_step)))
            run, seconds = train(nb, key, network, cfg, data, layout)
            row, images = evaluate(nb, run, cfg, eta, args, net, real_test, floor)
            results[key] = {
                "steps": cfg.steps, "batch": cfg.batch, "seconds": round(seconds, 1),
                "parameters": sum(p.numel() for p in run.net.parameters()),
                "layout": layout, "trained images per second": round(
                    cfg.steps * cfg.batch / seconds, 1), **row}
            pictures.append(images)
            print(key, results[key], flush=True)
            ratios = ratios_of(results)
            out.write_text(json.dumps({**facts, "results": results, "ratios": ratios},
                                      indent=1))
            save_image(torch.cat(pictures).float() / 255, out.with_suffix(".png"), nrow=32)
    for key, value in ratios.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
