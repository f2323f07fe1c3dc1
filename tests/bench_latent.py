"""Sampling cost of latents, pixels and diffusers' network in one run. By hand, 3 minutes:

    python tests/bench_latent.py

250 pictures each, as many steps for each, labels without guidance, decoding included for
latents. The peer is that of bench_peers.py; its weights are untrained, which costs the same.
"""
import argparse
import json
import os
import subprocess
import time
from pathlib import Path

import torch
from bench_peers import LAYOUTS, Peer
from conftest import ROOT, load_definitions


def main():
    """Time the three in turn, three rounds; print and write the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(ROOT / "assets/results/latent-speed.json"))
    args = parser.parse_args()
    os.chdir(ROOT)
    nb, cpu = load_definitions("latent_diffusion_cab"), torch.device("cpu")
    _, cfg = nb.make_config("cpu", "MNIST")
    latent, its = nb.load_latent(nb.read_checkpoint(
        Path("assets/weights/latent-mnist.pt")), cfg, cpu)
    pixels, pixel_cfg = nb.load_pixels(Path("assets/weights/mnist.pt"), cfg, cpu)
    peer = Peer(cfg).eval()

    def seconds(name, n, steps):
        """Wall time of one draw."""
        started = time.perf_counter()
        if name == "latents":
            nb.draw_latents(latent, n, its, True, 0, steps)
        else:
            nb.draw(peer if name == "peer" else pixels, n, pixel_cfg, cpu, True, 0, steps)
        return time.perf_counter() - started

    layouts = {}  # the faster memory layout for the peer; ours are channels_last
    for layout, value in LAYOUTS.items():
        peer.to(memory_format=value)
        seconds("peer", 50, 1)
        layouts[layout] = seconds("peer", 50, 1)
    peer.to(memory_format=LAYOUTS[min(layouts, key=layouts.get)])
    names = ("peer", "pixels", "latents")
    for name in names:
        seconds(name, 250, 1)
    found = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            found[name].append(1000 * seconds(name, 250, args.steps) / 250)
            print(name, f"{found[name][-1]:.2f} ms a picture", flush=True)
    median = {name: sorted(each)[len(each) // 2] for name, each in found.items()}
    ratios = {f"latents / {name}": round(median["latents"] / median[name], 4)
              for name in ("pixels", "peer")}
    print(median, ratios)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True).stdout.strip()
    Path(args.out).write_text(json.dumps({
        "ms a picture": {name: [round(x, 3) for x in each] for name, each in found.items()},
        "ratios of the medians": ratios, "batch": 250, "steps": args.steps,
        "device": f"{torch.get_num_threads()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()}, 16-bit: {nb.fast_dtype(cpu)}",
        "torch": torch.__version__, "commit": commit}, indent=1))


if __name__ == "__main__":
    main()
