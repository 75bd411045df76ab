"""Every template as it opens in the real front end: can it be read, does nothing lie over anything, is everything in its group?

In the classic front end and in Nodes 2.0, on screens of 1600x900 and 1920x1080, at the zoom that the front end itself chooses.
Every text that a page draws is measured in pixels of the screen. Newest host alone; needs a browser (CONTRIBUTING.md).
"""

import pytest

from front_end import open_front_end, use_nodes_2
from templates import TEMPLATES, read

SCREENS = {"1600x900": 6.8, "1920x1080": 8.2}  # the smallest text that may be drawn, in pixels
MOST_WIDGETS = 12  # in sight on a node
TRIES = 5  # a page on a busy machine draws its frames late
METERS = {"SafeCFG_Apply", "SafeCFG_Protect"}
CATEGORIES = ["nudity", "violence", "weapons", "drugs", "death", "hate", "self-harm"]
BADGES = ("safecfg", "[BETA] safecfg")
PLACE = "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"
# Canvas texts of the next frames: [size on the screen, text].
RECORD = """async () => {
  const texts = new Map(), real = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
    const size = parseFloat(/([\\d.]+)px/.exec(this.font)?.[1] ?? 0) * Math.hypot(this.getTransform().a, this.getTransform().b);
    if (this.canvas === app.canvas.canvas || this.canvas === app.canvas.bgcanvas) texts.set(String(text), size / devicePixelRatio);
    return real.call(this, text, ...rest);
  };
  for (let frame = 0; frame < 4; frame++) {
    app.canvas.setDirty(true, true);
    await new Promise((resolve) => setTimeout(resolve, 120));
  }
  CanvasRenderingContext2D.prototype.fillText = real;
  return [...texts].filter(([text]) => text.trim()).map(([text, size]) => [size, text]);
}"""
# Texts of the page's own elements that lie in nodes; not the labels that the front end puts into fields, nor badges.
DOM_TEXTS = """() => {
  const found = [];
  for (const root of document.querySelectorAll("[data-node-id], .dom-widget")) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement, box = element.getBoundingClientRect(), style = getComputedStyle(element);
      if (walker.currentNode.data.trim() && box.width && style.visibility === "visible" && !element.closest("label, [class*=badge]"))
        found.push([parseFloat(style.fontSize) * app.canvas.ds.scale, walker.currentNode.data.trim()]);
    }
  }
  return found;
}"""
# Every node: [title, type, left, top, right, bottom] with its title, in the graph's pixels, as it is drawn.
BOXES = """() => app.graph._nodes.map((node) => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`), { scale, offset } = app.canvas.ds;
  if (!element) return [node.title, node.type, ...((b) => [b[0], b[1], b[0] + b[2], b[1] + b[3]])(node.boundingRect ?? node.getBounding())];
  const boxes = [element, ...element.querySelectorAll("*")].map((e) => e.getBoundingClientRect()).filter((b) => b.width && b.height);
  const { left, top } = app.canvas.canvas.getBoundingClientRect(), own = element.getBoundingClientRect();
  const bottom = Math.max(own.bottom, ...boxes.map((b) => b.bottom).filter((y) => y < own.bottom + 60 * scale));
  return [node.title, node.type, (own.left - left) / scale - offset[0], (own.top - top) / scale - offset[1],
    (own.right - left) / scale - offset[0], (bottom - top) / scale - offset[1]];
})"""
WIDGETS = """() => app.graph._nodes.map((node) => [node.title, node.type, (node.widgets ?? []).filter((widget) =>
  !widget.hidden && !widget.options?.hidden && !((widget.advanced || widget.options?.advanced) && !node.showAdvanced)).length])"""
# Whether the page's elements have followed the canvas.
SETTLED = """() => app.graph._nodes.every((node) => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`), { scale, offset } = app.canvas.ds;
  const left = app.canvas.canvas.getBoundingClientRect().left;
  return !element || Math.abs((element.getBoundingClientRect().left - left) / scale - offset[0] - node.pos[0]) < 1;
})"""
# The message at the end of a run, for every sampler behind a node that has a meter.
METER = """async (categories) => {
  const { api } = await import("/scripts/api.js");
  for (const node of app.graph._nodes.filter((each) => ["SafeCFG_Apply", "SafeCFG_Protect"].includes(each.type))) {
    for (const link of node.outputs[0].links ?? []) {
      const zeros = categories.map(() => 0.1), limits = categories.map(() => 0.5);
      const detail = { node: String(node.id), run: `run ${link}`, sampler: String(app.graph.links[link]?.target_id), prompt_id: "one",
        categories, steps: 20, images: 1, redirected_images: 1, prompt: zeros, prompt_thresholds: limits, notices: [], done: true,
        prompt_redirected: categories.map(() => true),
        series: [{ step: 20, guidance: zeros, thresholds: limits, redirected: categories.map(() => false) }] };
      api.dispatchEvent(new CustomEvent("safecfg.meter", { detail }));
    }
  }
  await new Promise((resolve) => setTimeout(resolve, 400));
  return document.querySelectorAll(".safecfg-meter-lines").length;
}"""
# In Nodes 2.0 two pictures of curves lie one above the other.
TRAINED = """() => app.graph._nodes.filter((each) => each.type === "SafeCFG_TrainHGR").forEach((each) => each.setSize([each.size[0], 806]))"""
GROUPS = "() => app.graph._groups.map((group) => [group.title, ...group.pos, ...group.size])"
CUT = """() => [...document.querySelectorAll(".comfy-markdown, .comfy-markdown-content, .widget-markdown")]
  .map((e) => [e.scrollHeight, e.clientHeight]).filter(([inner, outer]) => outer > 0 && inner > outer + 4)"""


@pytest.fixture(scope="module", params=["classic", "Nodes 2.0"])
def page(server, browser, newest_host, request):
    """A front end, ready, at the smaller of the two screens."""
    use_nodes_2(server.url, request.param == "Nodes 2.0")
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    open_front_end(page, server.url)
    yield page
    page.close()
    use_nodes_2(server.url, False)


def opened(page, name: str, screen: str) -> None:
    """A template as the front end opens it."""
    workflow = read(name)
    assert "ds" not in workflow.get("extra", {}), "a template must not say how far it is zoomed"
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_function("wanted => app.graph._nodes.length === wanted", arg=len(workflow["nodes"]))
    show(page, screen)


def show(page, screen: str) -> None:
    """The whole graph in view, as a template is opened on a screen."""
    width, height = map(int, screen.split("x"))
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(200)
    page.evaluate(PLACE)
    page.wait_for_timeout(400)
    page.wait_for_function(SETTLED)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_can_be_read_as_it_opens(page, name):
    opened(page, name, "1600x900")
    check_places(page)
    assert not [each for each in page.evaluate(WIDGETS) if each[2] > MOST_WIDGETS], "too many widgets in sight"
    for screen, least in SCREENS.items():
        show(page, screen)
        for _ in range(TRIES):
            if not (wrong := unreadable(page, least)):
                break
        assert not wrong, f"{screen}: {wrong}"


def unreadable(page, least: float) -> str:
    """What the page does not draw now, or draws smaller than `least` pixels."""
    drawn, elements = page.evaluate(RECORD), page.evaluate(DOM_TEXTS)
    texts = [text for _, text in [*drawn, *elements]]
    missing = [title for title, *_ in page.evaluate(BOXES) if not any(title in text for text in texts)]
    if missing:
        return f"not drawn at all: {missing}"
    smallest = sorted(t for t in [*drawn, *elements] if t[1] not in BADGES)[:4]
    return f"too small: {smallest}" if smallest[0][0] < least else ""


@pytest.mark.parametrize("name", [name for name in TEMPLATES if {n["type"] for n in read(name)["nodes"]} & METERS])
def test_the_meter_has_its_place(page, name):
    """After a run the node is longer: still nothing lies over anything, and everything in its group."""
    opened(page, name, "1600x900")
    demo = any(node["type"] == "SafeCFG_DemoModel" for node in read(name)["nodes"])
    assert page.evaluate(METER, CATEGORIES[:3] if demo else CATEGORIES)
    show(page, "1600x900")
    check_places(page)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "SafeCFG_TrainHGR" in {n["type"] for n in read(name)["nodes"]}])
def test_the_curves_of_a_training_have_their_place(page, name):
    """After a training the node shows them, and is as long as it was seen to be then."""
    opened(page, name, "1600x900")
    page.evaluate(TRAINED)
    show(page, "1600x900")
    assert max(box[3] - box[1] for _, kind, *box in page.evaluate(BOXES) if kind == "SafeCFG_TrainHGR") > 800
    check_places(page)


def check_places(page) -> None:
    """Nothing over anything, every node wholly in a group, the note above the groups and as long as its text."""
    boxes, groups = page.evaluate(BOXES), page.evaluate(GROUPS)
    over = [(a[0], b[0]) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if _overlap(a[2:], b[2:])]
    assert not over, f"over one another: {over}"
    outside = [
        title for title, kind, *box in boxes
        if kind != "MarkdownNote" and not any(_inside(box, (x, y, x + w, y + h)) for _, x, y, w, h in groups)
    ]  # fmt: skip
    assert not outside, f"not wholly in a group: {outside}"
    assert not [g for i, g in enumerate(groups) for h in groups[i + 1 :] if _overlap(_corners(g), _corners(h))]
    (note,) = (box for _, kind, *box in boxes if kind == "MarkdownNote")
    assert note[3] <= min(y for _, _, y, _, _ in groups), "the note is not above the groups"
    assert not page.evaluate(CUT), "the note is longer than its node"


def _corners(group) -> tuple:
    _, x, y, w, h = group
    return x, y, x + w, y + h


def _overlap(a, b) -> bool:
    """Of two boxes (left, top, right, bottom), by more than the shadow's two pixels."""
    return min(a[2], b[2]) - max(a[0], b[0]) > 2 and min(a[3], b[3]) - max(a[1], b[1]) > 2


def _inside(box, outer) -> bool:
    return outer[0] - 1 <= box[0] and outer[1] - 1 <= box[1] and box[2] <= outer[2] + 1 and box[3] <= outer[3] + 1
