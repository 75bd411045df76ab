"""Makes every weight of the demo again: `python -m demo.train all`, or one part at a time, in the order of PARTS.

CPU or GPU; every part is seeded. The pictogram atlas needs Debian's fonts-noto-color-emoji and the words a sentence
encoder; both are stored in the repository, so only a change of the world needs them.
"""

import argparse
import importlib

import torch

STEPS = {"words": 0, "autoencoder": 2000, "judge": 1500, "diffusion": 6000, "hgr": 2800}
PARTS = tuple(STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--steps", type=int, help="training steps (default: those that made the shipped weights)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for part in PARTS if args.part == "all" else (args.part,):
        module = importlib.import_module(f".training.{part}", __package__)
        module.train(args.steps or STEPS[part], args.device, args.seed)


if __name__ == "__main__":
    main()
