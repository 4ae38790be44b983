// The panel inside a merge node: tabs over one area of fixed height, and a line that says what is going on.

import { freshId, h, keepEvents } from "./dom.js";
import { layersView } from "./layers.js";
import { IDLE, advance, previewsOf, withPreview } from "./progress.js";
import { adviceView, progressView, resultView, statusText } from "./result.js";

/**
 * @param {object} options
 * @param {object} options.words see text.js
 * @param {() => Node} options.lorasView draws the LoRAs tab
 */
export function createPanel({ words, lorasView }) {
  let report = null;
  let state = IDLE;
  let tab = "result";
  const body = h("div", { class: "ssr-body", role: "tabpanel", id: freshId("body"), "data-capture-wheel": "true", tabindex: -1 });
  const status = h("div", { class: "ssr-status", role: "status" });
  const names = ["loras", "result", "layers", "advice"];
  const tabs = Object.fromEntries(names.map((name) => [name, tabButton(name)]));
  const bar = h("div", { class: "ssr-tabs", role: "tablist" }, ...Object.values(tabs));
  const element = keepEvents(h("div", { class: "ssr-panel", role: "group", "aria-label": "SSR-Merge" }, bar, body, status));
  bar.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    open(names[(names.indexOf(tab) + by + names.length) % names.length]);
    tabs[tab].focus({ preventScroll: true });
  });

  function tabButton(name) {
    const on = { click: () => open(name) };
    return h("button", { type: "button", role: "tab", id: freshId("tab"), "aria-controls": body.id, dataset: { tab: name }, on }, words[name]);
  }

  function open(name) {
    tab = name;
    draw();
  }

  function draw() {
    for (const [name, button] of Object.entries(tabs)) {
      button.setAttribute("aria-selected", name === tab);
      button.tabIndex = name === tab ? 0 : -1;
    }
    body.setAttribute("aria-labelledby", tabs[tab].id);
    const key = body.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    body.replaceChildren(view());
    if (key) focusAgain(key);
  }

  /** What had the focus before it was drawn anew; else something of the same LoRA, else what adds one, else the tab. */
  function focusAgain(key) {
    const enabled = (selector) => body.querySelector(`${selector}:enabled`);
    const same = enabled(`[data-key="${CSS.escape(key)}"]`) ?? enabled(`[data-key^="${CSS.escape(`${key.split(" ")[0]} `)}"]`);
    (same ?? enabled('[data-key="add"]') ?? tabs[tab]).focus({ preventScroll: true });
  }

  function view() {
    if (tab === "loras") return lorasView();
    if (tab === "result" && state.running) return progressView(state);
    if (!report) return h("p", { class: "ssr-hint" }, words.idle);
    if (tab === "layers") return report.layers ? layersView(report, words) : h("p", { class: "ssr-hint" }, words.notMerged);
    return tab === "advice" ? adviceView(report, words) : resultView(report, words);
  }

  function say(text, share) {
    status.textContent = text;
    status.title = text;
    status.style.setProperty("--ssr-share", `${Math.round(share * 100)}%`);
  }

  function settle(text) {
    const was = state;
    state = IDLE;
    say(text, 0);
    if (tab !== "loras") draw();
    release(previewsOf(was));
  }

  draw();
  return {
    element,
    /** A message of the server about the run. */
    progress(message) {
      const before = state;
      state = advance(state, message);
      if (before.promptId !== state.promptId) release(previewsOf(before));
      say(statusText(state, words), state.share ?? 0);
      if (tab === "result" && drawnDifferently(before, state)) draw();
    },
    /** A latent preview of the run, as a blob. */
    preview(blob) {
      const url = URL.createObjectURL(blob);
      const next = withPreview(state, url);
      state = next.state;
      release([next.replaced]);
      if (tab === "result" && state.running) draw();
    },
    /** The result of a run; `restored` if it is an earlier one. */
    show(newReport, restored = false) {
      report = newReport;
      settle(restored ? words.restored : words.finished);
    },
    /** The run ended without a result. */
    end(failed) {
      if (state.running) settle(failed ? words.failed : words.stopped);
    },
    /** Draws the LoRAs tab anew if it is open. */
    refreshLoras() {
      if (tab === "loras") draw();
    },
    open,
    get running() {
      return state.running ? state.promptId : null;
    },
    destroy() {
      release(previewsOf(state));
    },
  };
}

const drawnDifferently = (a, b) =>
  ["running", "promptId", "stage", "task"].some((key) => a[key] !== b[key]) || a.tasks.length !== b.tasks.length;

function release(urls) {
  for (const url of urls) if (url) URL.revokeObjectURL(url);
}
