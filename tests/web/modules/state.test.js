import assert from "node:assert/strict";
import { test } from "node:test";
import { step } from "../../../web/ssr/heatmap.js";
import { findNames } from "../../../web/ssr/picker.js";
import { IDLE, advance, previewsOf, taskStates, withPreview } from "../../../web/ssr/progress.js";
import { statusText } from "../../../web/ssr/result.js";
import { WORDS, wordsFor } from "../../../web/ssr/text.js";
import { withPhrase } from "../../../web/ssr/triggers.js";

const message = (more) => ({ prompt_id: "p", stage: "calibrate", tasks: ["a", "b", "c"], task: 1, prompt: 0, prompts: 2, step: 1, steps: 4, share: 0.4, ...more });

test("progress: who waits, runs, is done", () => {
  const states = (more) => taskStates(advance(IDLE, message(more)));
  assert.deepEqual(states({}), ["done", "running", "waiting"]);
  assert.deepEqual(states({ stage: "solve" }), ["done", "done", "done"]);
  assert.deepEqual(states({ stage: "load", task: 0 }), ["waiting", "waiting", "waiting"]);
});

test("previews belong to the LoRA at work and are given back when replaced or when another run begins", () => {
  const first = advance(IDLE, message({ task: 0 }));
  const one = withPreview(first, "u1");
  assert.equal(one.replaced, undefined);
  const two = withPreview(one.state, "u2");
  assert.equal(two.replaced, "u1");
  const later = withPreview(advance(two.state, message({ task: 2 })), "u3").state;
  assert.deepEqual(previewsOf(later), ["u2", "u3"]);
  assert.deepEqual(previewsOf(advance(later, message({ prompt_id: "q" }))), []);
  assert.equal(withPreview(IDLE, "u4").replaced, "u4");
  assert.equal(withPreview(advance(IDLE, message({ stage: "solve" })), "u5").replaced, "u5");
});

test("a message without names keeps those of the run", () => {
  const state = advance(advance(IDLE, message({})), message({ stage: "solve", tasks: [] }));
  assert.deepEqual(state.tasks, ["a", "b", "c"]);
});

test("the line says which LoRA, prompt and step", () => {
  const text = statusText(advance(IDLE, message({ tasks: ["x/a.safetensors", "x/b.safetensors"] })), WORDS.en);
  assert.equal(text, "b (2 of 2), prompt 1 of 2, step 1 of 4");
  const again = advance(IDLE, message({ tasks: ["a", "b"], round: 1, rounds: 2 }));
  assert.equal(statusText(again, WORDS.en), "b (2 of 2), prompt 1 of 2, step 1 of 4, round 2 of 2");
  assert.match(statusText(again, WORDS.zh), /第 2\/2 轮/);
  assert.equal(statusText(advance(IDLE, message({ stage: "solve" })), WORDS.en), "Solving");
  assert.equal(statusText(IDLE, WORDS.en), "");
});

test("arrow keys stay on the matrix", () => {
  assert.deepEqual(step([0, 0], "ArrowUp", 3), [0, 0]);
  assert.deepEqual(step([0, 0], "ArrowDown", 3), [1, 0]);
  assert.deepEqual(step([1, 2], "ArrowRight", 3), [1, 2]);
  assert.deepEqual(step([1, 1], "Home", 3), [1, 0]);
  assert.deepEqual(step([1, 1], "End", 3), [1, 2]);
  assert.equal(step([1, 1], "a", 3), null);
});

test("the picker finds all words and puts file names that begin with the first one ahead", () => {
  const names = ["x/adog.safetensors", "dogs/cat.safetensors", "y/dog_v2.safetensors"];
  assert.deepEqual(findNames(names, "dog"), ["y/dog_v2.safetensors", "x/adog.safetensors", "dogs/cat.safetensors"]);
  assert.deepEqual(findNames(names, "CAT dogs"), ["dogs/cat.safetensors"]);
  assert.deepEqual(findNames(names, " "), names);
});

test("a trigger word goes to the last line, once", () => {
  assert.equal(withPhrase("", "sks dog"), "sks dog");
  assert.equal(withPhrase("a photo", "sks dog"), "a photo, sks dog");
  assert.equal(withPhrase("a photo, ", "sks dog"), "a photo, sks dog");
  assert.equal(withPhrase("one\na photo of SKS dog", "sks dog"), "one\na photo of SKS dog");
  assert.equal(withPhrase("sks dog\nsitting", "sks dog"), "sks dog\nsitting, sks dog");
});

test("both languages have every word, of the same kind, and Chinese is Chinese", () => {
  const walk = (en, zh, path) => {
    assert.deepEqual(Object.keys(zh).sort(), Object.keys(en).sort(), path);
    for (const [key, value] of Object.entries(en)) {
      assert.equal(typeof zh[key], typeof value, `${path}.${key}`);
      if (typeof value === "object") walk(value, zh[key], `${path}.${key}`);
      else if (typeof value === "string" && value !== "LoRAs") assert.match(zh[key], /[\u4e00-\u9fff]/, `${path}.${key}`);
      else if (typeof value === "function") assert.equal(zh[key].length, value.length, `${path}.${key}`);
    }
  };
  walk(WORDS.en, WORDS.zh, "words");
  assert.equal(wordsFor("zh"), WORDS.zh);
  assert.equal(wordsFor("zh-TW"), WORDS.zh);
  for (const other of ["en", "fr", undefined, null]) assert.equal(wordsFor(other), WORDS.en);
});
