// Folds advanced widgets away in the classic front end, as Nodes 2.0 does by itself: a button at the node's end shows them.
//
// A widget that is only marked as advanced keeps its place there, and a node would have holes; a hidden one does not.

import { app } from "../../../scripts/app.js";
import { loadTexts, text } from "./texts.js";

const BUTTON = "safecfg_advanced";

const advancedOf = (node) => node.widgets?.filter((widget) => widget.options?.advanced) ?? [];
const linked = (node, widget) => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);

/** Shows or hides a node's advanced widgets; one that is linked stays. */
function fold(node) {
  const shown = Boolean(node.showAdvanced);
  for (const widget of advancedOf(node)) widget.hidden = !shown && !linked(node, widget);
  const button = node.widgets.find((widget) => widget.name === BUTTON);
  if (button) button.label = text("advanced", shown ? "hide" : "show");
}

function addButton(node) {
  const press = () => {
    node.showAdvanced = !node.showAdvanced;
    fold(node);
    node.setSize([node.size[0], node.computeSize()[1]]);
    node.setDirtyCanvas?.(true, true);
  };
  // Nodes 2.0 has a button of its own, and looks at `options.hidden` alone.
  const button = node.addWidget("button", BUTTON, null, press, { serialize: false, hidden: true });
  button.serialize = false;
}

app.registerExtension({
  name: "SafeCFG.Advanced",
  init: loadTexts,
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("SafeCFG_") || !advancedOf(node).length) return;
    addButton(node);
    fold(node);
    node.setSize(node.computeSize()); // it was measured before; a workflow sets its own later
    const configured = node.onConfigure;
    node.onConfigure = function (...args) {
      configured?.apply(this, args);
      fold(this); // a workflow may say that they are shown, or link one of them
    };
  },
});
