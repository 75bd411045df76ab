"""The training template as it stands, in a real server: half an hour on two cores, so only where it is asked for.

    WHOLE_TRAINING=prompts WHOLE_TRAINING_OUT=FILE python3 run.py test -s tests/server/test_whole_training.py

A value of `train`, on one host (COMFYUI_PATH). Prints the minutes; `python -m benchmarks.main_job --hgr FILE` measures what came out.
"""

import json
import os
import shutil
import time

import pytest

from hgr_models import load_hgr
from templates import path_of
from workflow_format import to_prompt

TEMPLATE = path_of("Train an HGR on the demo")
NETWORKS, OUT = os.environ.get("WHOLE_TRAINING", ""), os.environ.get("WHOLE_TRAINING_OUT", "")


@pytest.mark.skipif(not (NETWORKS and OUT), reason="only with WHOLE_TRAINING and WHOLE_TRAINING_OUT in the environment")
def test_the_template_trains_an_hgr(server, newest_host):
    prompt = to_prompt(json.loads(TEMPLATE.read_text(encoding="utf-8")), server.object_info())
    (train,) = (node for node in prompt.values() if node["class_type"] == "SafeCFG_TrainHGR")
    train["inputs"] |= {"train": NETWORKS, "name": "whole"}
    started = time.monotonic()
    entry = server.post_prompt(prompt, seconds=4 * 3600)
    minutes = (time.monotonic() - started) / 60  # the check and both pictures are in it
    path = server.base / "models" / "hgr" / "whole.safetensors"
    shutil.copyfile(path, OUT)
    texts = [text for output in entry["outputs"].values() for text in output.get("text", [])]
    print(f"\n{NETWORKS}: {minutes:.1f} minutes", *texts, sep="\n")
    assert (load_hgr(path).guidance is not None) == (NETWORKS != "prompts")
