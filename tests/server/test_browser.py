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

from front_end import ARGUMENTS, NO_BROWSER, find_chromium, open_front_end
from workflow_format import to_prompt

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
MADE = "async () => (await app.graphToPrompt()).output"
EXECUTE = "id => app.extensionManager.command.execute(id)"
# Every state of the meter, as [status, colour and width of the first bar].
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const fill = document.querySelector(".safecfg-meter-fill"), status = document.querySelector(".safecfg-meter-status");
    if (status?.textContent) window.seen.push([status.textContent, fill.style.background, parseFloat(fill.style.width)]);
  }).observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ["style"] });
}"""
CONNECT = """() => {
  const find = (type) => app.graph._nodes.find((node) => node.type === type), safe = app.graph._nodes.find((node) => node.subgraph);
  const text = (title) => app.graph._nodes.find((node) => node.title === title);
  find("SafeCFG_DemoModel").connect(0, safe, 0);
  text("Harmful prompt").connect(0, safe, 1);
  text("Negative prompt").connect(0, safe, 2);
  find("EmptyLatentImage").connect(0, safe, 3);
  safe.connect(0, find("VAEDecode"), 0);
  for (const [name, value] of [["steps", 3], ["cfg", 5]]) safe.widgets.find((widget) => widget.name === name).value = value;
}"""
TITLE = """type => {
  const node = app.graph._nodes.find((each) => each.type === type), canvas = app.canvas;
  canvas.centerOnNode(node);
  canvas.setDirty(true, true);
  const { left, top } = canvas.canvas.getBoundingClientRect(), { scale, offset } = canvas.ds;
  return [left + (node.pos[0] + 90 + offset[0]) * scale, top + (node.pos[1] - 15 + offset[1]) * scale];
}"""


def read(name: str) -> dict:
    """A template; what it trains has a name of its own here."""
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "SafeCFG_TrainHGR":
            node["widgets_values"][0] = "browser"
        if node["type"] == "SafeCFG_RecordGuidance":
            node["widgets_values"][0] = "browser_recording"
    return workflow


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
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason=NO_BROWSER)
    program = find_chromium()
    if program is None:
        pytest.skip(NO_BROWSER)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


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
def newest(server) -> None:
    if not (server.host.path / "app" / "subgraph_manager.py").is_file():
        pytest.skip(f"{server.host.name} has an older user interface")


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
    if "bypass" in info["LoraModelLoader"]["input"]["required"] or name != "safe_lora":  # an older loader lacks that widget
        wanted = to_prompt(workflow, info)
        assert {key: node["class_type"] for key, node in made.items()} == {
            key: node["class_type"] for key, node in wanted.items()
        }
        for key, node in wanted.items():
            assert made[key]["inputs"] == {**made[key]["inputs"], **node["inputs"]}  # older PreviewAny adds a widget of its own
    if any(node["class_type"] == "SafeCFG_DemoModel" for node in made.values()):  # the others need files
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
    page.get_by_test_id("template-workflow-quickstart").click()
    page.wait_for_function("() => app.graph._nodes.filter((node) => node.type === 'KSampler').length === 4")


def test_the_meter_moves(server, page, newest):
    workflow = read("quickstart")
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 3
    load(page, workflow)
    page.evaluate(WATCH)
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_function("() => window.seen.some(([status]) => status.includes('nothing was redirected'))")
    page.wait_for_function("() => window.seen.some(([status]) => status.includes('1 of 1 images'))")
    states = page.evaluate("() => window.seen")
    assert any("weapons" in status and colour == "rgb(226, 76, 62)" and width > 50 for status, colour, width in states)
    assert any(colour == "rgb(88, 166, 120)" and width < 50 for _, colour, width in states)
    drop_everything(server)


def test_search_finds_every_node_by_an_alias(server, page, newest):
    ours = {name: node for name, node in server.object_info().items() if name.startswith("SafeCFG_")}
    for node in ours.values():
        results = search(page, node["search_aliases"][-1])
        results.filter(has_text=node["display_name"]).first.wait_for()
    page.keyboard.press("Escape")


def test_help_opens_with_its_picture(page, newest):
    load(page, read("quickstart"))
    page.mouse.click(*page.evaluate(TITLE, "SafeCFG_Apply"))
    page.get_by_test_id("info-button").click()
    page.get_by_text("condition, guidance, both, concept").wait_for()
    picture = page.locator("img[src*='extensions/safecfg/docs/']").first.element_handle()
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=picture)


def test_the_blueprint_draws(server, page, newest):
    """Found by an alias, put into a graph, and set by its outer widgets."""
    quickstart, kept = read("quickstart"), (1, 4, 6, 7, 9, 10)
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
    assert (kinds["KSampler"]["steps"], kinds["KSampler"]["cfg"], kinds["SafeCFG_LoadHGR"]["hgr_name"]) == (
        3,
        5,
        "demo.safetensors",
    )

    def draw(strength: float) -> np.ndarray:
        kinds["SafeCFG_Apply"]["strength"] = strength
        (file,) = server.files(server.post_prompt(prompt), "10")
        return np.asarray(Image.open(file).convert("RGB"))

    assert not np.array_equal(draw(1.0), draw(0.0))


def test_no_errors_of_ours(page, problems):
    """In everything that the tests before did on this page. The front end looks for a translated help page first: that is no error."""
    ours = [problem for problem in problems if re.search("safecfg", problem, re.IGNORECASE)]
    assert [problem for problem in ours if not re.search(r"404.*/docs/SafeCFG_\w+/\w+\.md", problem)] == []
