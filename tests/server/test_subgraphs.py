"""The blueprint with a SafeCFG Report in it, in the real front ends of the newest host and of those in the middle: promoted widgets reach the
prompt, and meter and report show inside the subgraph. In the classic front end and in Nodes 2.0. Needs a browser (CONTRIBUTING.md).

Every wait has an end of its own: a front end that never answers fails one test, and holds up nothing.
"""

import copy
import json
import time
import uuid

import pytest

from front_end import CONNECT, MADE, open_front_end, use_nodes_2
from templates import FOLDER, read

WAIT = 60_000  # milliseconds
REPORT = 4  # the node's number inside
BLUEPRINT = FOLDER.parent / "subgraphs" / "Safe KSampler.json"
KEPT = (1, 4, 6, 7, 9, 10)  # of the Quickstart: model, prompts, latents, decoder, preview
PROMOTED = ("strength", "categories", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise")
OUTER = "() => app.graph._nodes.find((node) => node.subgraph).widgets.map((widget) => widget.name)"
SET = """(values) => {
  const outer = app.graph._nodes.find((node) => node.subgraph);
  for (const [name, value] of Object.entries(values)) {
    const widget = outer.widgets.find((each) => each.name === name);
    widget.value = value;
    widget.callback?.(value);
  }
}"""
OPEN = """() => {
  const outer = app.graph._nodes.find((node) => node.subgraph);
  app.canvas.openSubgraph(outer.subgraph, outer);
}"""
INSIDE = "() => app.canvas.graph.nodes?.some((node) => node.type === 'SafeCFG_Protect')"
METER = """() => [...document.querySelectorAll(".safecfg-meter-lines")].map((each) => each.textContent).join(" ")"""
SHOWN = """() => {
  const node = app.canvas.graph.nodes.find((each) => each.type === "SafeCFG_Report");
  const element = document.querySelector(`[data-node-id="${node.id}"] img`);
  return Boolean(node.imgs?.some((image) => image.naturalWidth > 0) || (element?.complete && element.naturalWidth > 0));
}"""


def workflow() -> dict:
    """The Quickstart's model and prompts beside the blueprint, whose subgraph has a SafeCFG Report; not connected yet."""
    quickstart, blueprint = read("Quickstart"), json.loads(BLUEPRINT.read_text(encoding="utf-8"))
    nodes = [copy.deepcopy(node) for node in quickstart["nodes"] if node["id"] in KEPT]
    links = [link for link in quickstart["links"] if link[1] in KEPT and link[3] in KEPT]
    for node in nodes:
        for slot in node["inputs"]:
            slot["link"] = slot["link"] if slot["link"] in [link[0] for link in links] else None
        for output in node["outputs"]:
            output["links"] = [number for number in output["links"] or () if number in [link[0] for link in links]]
    (outer,), (graph,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    add_report(graph)
    outer |= {"id": 50, "pos": [900, 300]}
    ends = {"last_node_id": 60, "last_link_id": 200, "groups": [], "id": str(uuid.uuid4())}
    return {**quickstart, **ends, "nodes": [*nodes, outer], "links": links, "definitions": {"subgraphs": [graph]}}


def add_report(graph: dict) -> None:
    """SafeCFG Report behind the subgraph's own SafeCFG Protect and KSampler."""
    protect, sampler = (next(n for n in graph["nodes"] if n["type"] == kind) for kind in ("SafeCFG_Protect", "KSampler"))
    inputs = []
    for number, (name, source, kind) in enumerate((("model", protect, "MODEL"), ("latent", sampler, "LATENT")), 101):
        source["outputs"][0].setdefault("links", []).append(number)
        graph["links"].append({
            "id": number, "origin_id": source["id"], "origin_slot": 0, "target_id": REPORT, "target_slot": len(inputs), "type": kind,
        })  # fmt: skip
        inputs.append({"name": name, "type": kind, "link": number})
    outputs = [{"name": name, "type": kind, "links": []} for name, kind in (("report", "IMAGE"), ("scores", "STRING"))]
    graph["nodes"].append({
        "id": REPORT, "type": "SafeCFG_Report", "pos": [820, 420], "size": [320, 300], "flags": {}, "order": 9, "mode": 0, "inputs": inputs,
        "outputs": outputs, "properties": {}, "widgets_values": [],
    })  # fmt: skip
    graph["state"] |= {"lastNodeId": REPORT, "lastLinkId": 102}


@pytest.fixture(params=["classic", "Nodes 2.0"])
def page(server, browser, request):
    """A front end with the workflow, connected."""
    use_nodes_2(server.url, request.param == "Nodes 2.0")
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    open_front_end(page, server.url)
    page.set_default_timeout(WAIT)
    graph = workflow()
    page.evaluate("workflow => app.loadGraphData(workflow)", graph)
    page.wait_for_function("wanted => app.graph._nodes.length === wanted", arg=len(graph["nodes"]), timeout=WAIT)
    page.evaluate(CONNECT)
    yield page
    page.close()
    use_nodes_2(server.url, False)


def finished(server, known: set) -> dict:
    """The history entry of a run that was not there before."""
    deadline = time.monotonic() + WAIT / 1000 * 3
    while time.monotonic() < deadline:
        if new := [entry for key, entry in server.get("/history").items() if key not in known]:
            return new[0]
        time.sleep(0.2)
    raise TimeoutError("the run did not end")


def test_promoted_widgets_meter_and_report_inside(server, page):
    assert [name for name in page.evaluate(OUTER) if name in PROMOTED] == list(PROMOTED)
    seed = time.time_ns() % 2**31  # else the server remembers the run of the other front end, and nothing is sampled
    page.evaluate(SET, {"steps": 4, "cfg": 4.5, "strength": 0.9, "seed": seed})
    made = page.evaluate(MADE)
    inputs = {node["class_type"]: node["inputs"] for node in made.values()}
    assert (inputs["KSampler"]["steps"], inputs["KSampler"]["cfg"], inputs["KSampler"]["seed"]) == (4, 4.5, seed)
    assert inputs["SafeCFG_Protect"]["strength"] == 0.9
    (report,) = (key for key, node in made.items() if node["class_type"] == "SafeCFG_Report")

    known = set(server.get("/history"))
    page.evaluate(OPEN)
    page.wait_for_function(INSIDE, timeout=WAIT)
    page.evaluate("() => app.queuePrompt(0, 1)")
    entry = finished(server, known)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
    assert entry["outputs"][report]["images"]
    page.wait_for_function(f"() => ({METER})().includes('prompt redirected: weapons')", timeout=WAIT)
    page.wait_for_function(SHOWN, timeout=WAIT)
