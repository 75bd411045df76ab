"""The real front end in a headless Chromium: templates, search, help, the live meter, the blueprint, and no errors of ours.

Needs Chromium (CHROMIUM, or in PATH) and the package `playwright` in the tests' own environment; skipped without them
(CONTRIBUTING.md). The user interface is that of the newest host; on older ones the templates load and queue.
"""

import json
import re
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from front_end import CONNECT, MADE, open_front_end
from templates import TEMPLATES, path_of, read
from workflow_format import to_prompt

ROOT = Path(__file__).parents[2]
EXECUTE = "id => app.extensionManager.command.execute(id)"
# Every state of the meter, as [lines, colour and width of the first bar].
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const fill = document.querySelector(".safecfg-meter-fill"), status = document.querySelector(".safecfg-meter-lines");
    if (status?.textContent) window.seen.push([status.textContent, fill.style.background, parseFloat(fill.style.width)]);
  }).observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ["style"] });
}"""
# Gives whatever a graph's nodes keep in files a name of its own; returns how many there are.
RENAME = """name => {
  const widgets = app.graph._nodes.flatMap((node) => (node.widgets ?? []).filter((each) => each.name === "name"));
  for (const widget of widgets) widget.value = name;
  return widgets.length;
}"""
TITLE = """type => {
  const node = app.graph._nodes.find((each) => each.type === type), canvas = app.canvas;
  canvas.centerOnNode(node);
  canvas.setDirty(true, true);
  const { left, top } = canvas.canvas.getBoundingClientRect(), { scale, offset } = canvas.ds;
  return [left + (node.pos[0] + 90 + offset[0]) * scale, top + (node.pos[1] - 15 + offset[1]) * scale];
}"""


def post(server, path: str, content: dict) -> None:
    body = json.dumps(content).encode()
    request = urllib.request.Request(server.url + path, body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).close()


def drop_everything(server) -> None:
    """Empties the queue and interrupts what runs; returns when nothing does."""
    while any(server.get("/queue").values()):
        post(server, "/queue", {"clear": True})
        post(server, "/interrupt", {})
        time.sleep(0.2)


@pytest.fixture(scope="module")
def problems() -> list[str]:
    """What the front end reported as an error, with its place."""
    return []


@pytest.fixture(scope="module")
def page(server, browser, problems):
    """The front end of a host, ready; one page for every test."""
    page = browser.new_page(viewport={"width": 1500, "height": 950})
    page.on("pageerror", lambda error: problems.append(f"{error}\n{error.stack}"))
    page.on("console", lambda said: said.type == "error" and problems.append(f"{said.text} {said.location['url']}"))
    open_front_end(page, server.url)
    yield page
    drop_everything(server)
    page.close()


@pytest.fixture
def newest(newest_host) -> None:
    """The user interface is that of the newest host (tests/conftest.py)."""


def load(page, workflow: dict) -> None:
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_function("wanted => app.graph._nodes.length === wanted", arg=len(workflow["nodes"]))


def search(page, words: str):
    """The results of the node search for some words."""
    box = page.get_by_role("combobox", name="Add a node")
    if not box.is_visible():
        page.evaluate(EXECUTE, "Workspace.SearchBox.Toggle")
    box.fill(words)
    return page.get_by_test_id("result-item")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_loads_and_queues(server, page, name):
    workflow, info = read(name), server.object_info()
    load(page, workflow)
    kinds = page.evaluate("() => app.graph._nodes.map((node) => [node.type, node.type in LiteGraph.registered_node_types])")
    assert [kind for kind, known in kinds if not known] == []
    made = page.evaluate(MADE)
    if "bypass" in info["LoraModelLoader"]["input"]["required"] or "safe LoRA" not in name:  # an older loader lacks that widget
        wanted = to_prompt(workflow, info)
        assert {key: node["class_type"] for key, node in made.items()} == {
            key: node["class_type"] for key, node in wanted.items()
        }
        for key, node in wanted.items():
            assert made[key]["inputs"] == {**made[key]["inputs"], **node["inputs"]}  # older PreviewAny adds a widget of its own
    if any(node["class_type"] == "SafeCFG_DemoModel" for node in made.values()):  # the others need files
        page.evaluate(RENAME, f"queued {name[:2]}")  # what it writes before it is interrupted is no other test's
        with page.expect_response(re.compile("/prompt$")) as answer:
            page.evaluate("() => app.queuePrompt(0, 1)")
        assert answer.value.status == 200, answer.value.text()
        drop_everything(server)


def test_the_template_browser_shows_the_pack(page, newest):
    page.evaluate(EXECUTE, "Comfy.BrowseTemplates")
    page.get_by_text("safecfg", exact=True).first.click()
    for name in TEMPLATES:
        card = page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        page.wait_for_function(
            "image => image.complete && image.naturalWidth > 0", arg=card.locator("img").first.element_handle()
        )
    page.get_by_test_id(f"template-workflow-{path_of('Quickstart').stem}").click()
    page.wait_for_function("() => app.graph._nodes.filter((node) => node.type === 'KSampler').length === 4")


def test_the_meter_tells_what_every_sampler_did(server, page):
    """One SafeCFG Apply before two samplers: the knife's is told beside the clean one's."""
    workflow = read("Quickstart")
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 30  # long enough to be seen while it runs: the page draws the meter in a later frame
    load(page, workflow)
    page.evaluate(WATCH)
    page.evaluate("() => app.queuePrompt(0, 1)")
    both = "([lines]) => lines.includes('nothing was redirected') && lines.includes('1 of 1 images')"
    page.wait_for_function(f"() => window.seen.some({both})", timeout=120_000)
    states = page.evaluate("() => window.seen")
    (lines, colour, width) = states[-1]
    titles = [node["title"] for node in workflow["nodes"] if node["type"] == "KSampler" and f"{node['title']}: " in lines]
    assert len(titles) == 2 and "prompt redirected: weapons" in lines and colour == "rgb(226, 76, 62)" and width > 50
    assert any(lines and "step " in lines for lines, *_ in states)  # while it ran
    log = server.log()
    assert "1 of 1 image redirected: weapons (prompt" in log and "nothing redirected in 1 image" in log
    drop_everything(server)


def test_search_finds_every_node_by_an_alias(server, page, newest):
    ours = {name: node for name, node in server.object_info().items() if name.startswith("SafeCFG_")}
    for node in ours.values():
        results = search(page, node["search_aliases"][-1])
        results.filter(has_text=node["display_name"]).first.wait_for()
    page.keyboard.press("Escape")


def test_help_opens_with_its_picture(page, newest):
    load(page, read("Quickstart"))
    page.mouse.click(*page.evaluate(TITLE, "SafeCFG_Apply"))
    page.get_by_test_id("info-button").click()
    page.get_by_text("condition, guidance, both, concept").wait_for()
    picture = page.locator("img[src*='extensions/safecfg/docs/']").first.element_handle()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=picture)


def test_the_blueprint_draws(server, page, newest):
    """Found by an alias, put into a graph, and set by its outer widgets."""
    quickstart, kept = read("Quickstart"), (1, 4, 6, 7, 9, 10)
    nodes = [node for node in quickstart["nodes"] if node["id"] in kept]
    links = [link for link in quickstart["links"] if link[1] in kept and link[3] in kept]
    for node in nodes:
        for slot in node["inputs"]:
            slot["link"] = slot["link"] if slot["link"] in [link[0] for link in links] else None
    load(page, {**quickstart, "nodes": nodes, "links": links, "groups": []})
    search(page, "safe sampler").filter(has_text="Safe KSampler").first.wait_for()
    page.keyboard.press("Enter")
    page.wait_for_function("() => app.graph._nodes.some((node) => node.subgraph)")
    page.mouse.click(1000, 800)  # it hangs on the pointer until then
    page.evaluate(CONNECT)
    prompt = page.evaluate(MADE)
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert (kinds["KSampler"]["steps"], kinds["KSampler"]["cfg"], kinds["SafeCFG_Protect"]["strict"]) == (3, 5, False)

    def draw(strength: float) -> np.ndarray:
        kinds["SafeCFG_Protect"]["strength"] = strength
        (file,) = server.files(server.post_prompt(prompt), "10")
        return np.asarray(Image.open(file).convert("RGB"))

    assert not np.array_equal(draw(1.0), draw(0.0))


def test_no_errors_of_ours(page, problems):
    """In everything that the tests before did on this page. The front end looks for a translated help page first: that is no error."""
    ours = [problem for problem in problems if re.search("safecfg", problem, re.IGNORECASE)]
    assert [problem for problem in ours if not re.search(r"404.*/docs/SafeCFG_\w+/\w+\.md", problem)] == []
