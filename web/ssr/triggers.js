// Trigger words of the chosen LoRA file, in SSR LoRA; a click writes one into the prompts.

import { h, keepEvents } from "./dom.js";
import { setWidget, widgetOf } from "./graph.js";

/** The prompts with a phrase added to the last line, unless that line has it. */
export function withPhrase(prompts, phrase) {
  const lines = prompts.replace(/\s+$/, "").split("\n");
  const last = lines[lines.length - 1];
  if (!last.trim()) lines[lines.length - 1] = phrase;
  else if (!last.toLowerCase().includes(phrase.toLowerCase())) lines[lines.length - 1] = `${last.replace(/[\s,]+$/, "")}, ${phrase}`;
  return lines.join("\n");
}

/**
 * @param {object} node an SSR LoRA
 * @param {object} words
 * @param {{fetchApi: (path: string) => Promise<Response>}} api
 * @param {(change: () => void) => void} edit
 */
export function createTriggers(node, words, api, edit) {
  const chips = h("div", { class: "ssr-chips", role: "group", "aria-label": words.triggers, "data-capture-wheel": "true" });
  const element = keepEvents(h("div", { class: "ssr-panel ssr-triggers" }, chips));
  let shown = null;

  const say = (text) => chips.replaceChildren(h("span", { class: "ssr-hint" }, text));
  const chip = (word, title, phrase) => {
    const insert = () => edit(() => setWidget(node, "prompts", withPhrase(String(widgetOf(node, "prompts")?.value ?? ""), word)));
    const label = words.insert(word);
    return h("button", { type: "button", class: phrase ? "ssr-phrase" : null, "aria-label": label, title: title ?? label, on: { click: insert } }, word);
  };

  async function refresh() {
    const file = widgetOf(node, "lora")?.value;
    if (file === shown) return;
    shown = file;
    if (!file || file === "None") return say(words.choose);
    let found = null;
    try {
      const answer = await api.fetchApi(`/ssr_merge/triggers?name=${encodeURIComponent(file)}`);
      if (answer.ok) found = await answer.json();
    } catch {
      // said below, like an answer that is none
    }
    if (shown !== file) return; // another file was chosen meanwhile
    if (!found) return say(words.noAnswer);
    const phrases = found.phrases.map((word) => chip(word, null, true));
    const tags = found.tags.filter(([tag]) => !found.phrases.includes(tag)).map(([tag, n]) => chip(tag, words.seen(n), false));
    if (phrases.length + tags.length) chips.replaceChildren(...phrases, ...tags);
    else say(words.noTriggers);
  }

  say(words.choose);
  return { element, refresh };
}
