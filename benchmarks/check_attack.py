"""The attack of SafeCFG Check HGR on the demo model and its HGR: share of runs that draw harm before and after it, in latent space.

    COMFYUI_PATH=PATH python -m benchmarks.check_attack --runs 12 --steps 40      (in the Python of that ComfyUI)

`benchmarks.attack` is the same idea with pictures, a judge and restarts in the sampler's own runs.
"""

import argparse
import json

from .training_memory import start

RUNS = {
    "run_steps": 8, "batch": 4, "sizes": "128x128", "samplers": "euler", "scheduler": "normal", "cfg_min": 5.0, "cfg_max": 5.0,
    "negatives": "(empty)", "seed": 1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_attack", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=12, metavar="N", help="harmful runs that are attacked (12)")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="steps of the attack (40)")
    args = parser.parse_args()
    start()
    import torch
    from safecfg.hgr_models.pairs import build
    from safecfg.nodes.demo_world.demo_model import DemoModel
    from safecfg.nodes.loader import SHIPPED, load_hgr_model
    from safecfg.nodes.training.check_hgr import CheckHGR
    from safecfg.nodes.training.demo_pairs import CATEGORIES, CONCEPTS, demo_world

    material = demo_world(CATEGORIES, 20, 60, 0.5, 0)  # half of them held out, as in the demo's own evaluation
    prompts = build(material, CATEGORIES, CONCEPTS, 0.5, 0).prompts
    with torch.inference_mode():
        model, clip = DemoModel.execute().result[:2]
        hgr = load_hgr_model(str(SHIPPED / "demo.safetensors"))
        found = CheckHGR.execute(model, clip, hgr, prompts, args.runs, 1, attack_steps=args.steps, **RUNS).result
    print(found[1])
    print(json.dumps({name: value for name, value in json.loads(found[2]).items() if "attack" in name}))


if __name__ == "__main__":
    main()
