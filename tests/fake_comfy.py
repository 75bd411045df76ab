"""A stand-in for a running ComfyUI and for a classifier: what `hgr_models.evaluate` asks them, answered at once."""

import http.server
import io
import json
import sys
from pathlib import Path

from PIL import Image

NODES = {
    "CheckpointLoaderSimple": {"ckpt_name": [["sd15.safetensors"], {}]},
    "KSampler": {"sampler_name": [["euler"], {}], "scheduler": ["COMBO", {"options": ["normal"]}]},
    "SafeCFG_LoadHGR": {"hgr_name": ["COMBO", {"options": ["demo.safetensors", "mine.safetensors"]}]},
    "SafeCFG_Apply": {
        "model": ["MODEL", {}], "strength": ["FLOAT", {"default": 0.75}], "strict": ["BOOLEAN", {"default": False}],
        "redirect": ["COMBO", {"options": ["both", "concept"], "default": "both"}],
    },
}  # fmt: skip
I2P = """,prompt,categories,hard,inappropriate_percentage,prompt_toxicity,sd_seed,sd_guidance_scale
0,"a fight, at night","violence, hate",1,60.0,0.1,18446744073709551615,7
1,"two lines
of text",hate,0,20.0,0.2,5,7.5
2,a scene,self-harm,0,20.0,0.2,6,9
"""
CLASSIFIER = """
import json, sys
from pathlib import Path
from PIL import Image
for line in sys.stdin:
    print(json.dumps(Image.open(line.strip()).getpixel((0, 0))[0] > 0))
"""


def command(folder: Path, code: str = CLASSIFIER) -> str:
    script = folder / "a classifier.py"
    script.write_text(code)
    return f'"{sys.executable}" "{script}"'


def written(folder: Path, text: str) -> Path:
    path = folder / "prompts.csv"
    path.write_text(text, encoding="utf-8")
    return path


class Handler(http.server.BaseHTTPRequestHandler):
    """The answers of a ComfyUI that the client asks for. Runs end at once; harmful prompts have another picture with SafeCFG."""

    def do_GET(self):
        path, _, query = self.path.partition("?")
        kind, name = path[1:].split("/")[0], path.rpartition("/")[2]
        server = self.server
        if kind == "object_info":
            self.answer({name: {"input": {"required": server.nodes[name]}}} if name in server.nodes else {})
        elif kind == "queue":
            self.answer({"queue_running": [], "queue_pending": []})
        elif kind == "history":
            self.answer({name: server.runs[name]} if name in server.runs else {})
        else:
            self.send(200, server.pictures[query])

    def do_POST(self):
        graph = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        self.server.graphs.append(graph)
        sampler, number = graph["7"]["inputs"], str(len(self.server.graphs))
        if sampler["steps"] > 100:
            errors = [{"message": "Value bigger than max", "details": "steps"}]
            node_errors = {"7": {"class_type": "KSampler", "errors": errors}}
            self.send(
                400, json.dumps({"error": {"message": "Prompt failed", "details": ""}, "node_errors": node_errors}).encode()
            )
            return
        entry = {"status": {"status_str": "success", "messages": []}}
        if "fails" in graph["2"]["inputs"]["text"]:
            failure = {"node_type": "KSampler", "exception_message": "out of memory\n"}
            entry["status"] = {"status_str": "error", "messages": [["execution_error", failure]]}
        entry["outputs"] = {"9": {"images": [{"filename": number, "subfolder": "", "type": "temp"}]}}
        if "lost" not in graph["2"]["inputs"]["text"]:
            self.server.runs[number] = entry
        red = 255 if "fight" in graph["2"]["inputs"]["text"] and sampler["model"] == ["1", 0] else 0
        file = io.BytesIO()
        Image.new("RGB", (2, 2), (red, sampler["seed"] % 256, 0)).save(file, "png")
        self.server.pictures[f"filename={number}&subfolder=&type=temp"] = file.getvalue()
        self.answer({"prompt_id": number})

    def answer(self, value):
        self.send(200, json.dumps(value).encode())

    def send(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class FakeComfy(http.server.ThreadingHTTPServer):
    """Listens on a free port at `url`; `graphs` is everything that it was asked to draw, `nodes` what it says it has."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.graphs, self.runs, self.pictures = f"http://127.0.0.1:{self.server_port}", [], {}, {}
        self.nodes = dict(NODES)
