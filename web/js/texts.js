// The pack's words for its parts of the front end, in the front end's language: from locales/<language>/main.json.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const texts = {}; // by language: what main.json says under "safecfg"

/** Asks the host for the texts; it reads them from the packs' locales. */
export async function loadTexts() {
  const answer = await api.fetchApi("/i18n");
  for (const [language, { safecfg }] of Object.entries(await answer.json())) texts[language] = safecfg;
}

/** A part's text in the front end's language, its {names} replaced by `values`; in English where we have none in that language. */
export function text(part, key, values = {}) {
  const language = app.extensionManager.setting.get("Comfy.Locale");
  const template = texts[language]?.[part]?.[key] ?? texts.en?.[part]?.[key] ?? key;
  return template.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
