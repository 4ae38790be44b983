"""The lists in a bare page: LoRAs, their files, trigger words; every name in them tries to be markup."""

import json

import pytest

from .conftest import NASTY

LIST = """async () => {
  const [{createPanel}, {wordsFor}] = await Promise.all(['panel', 'text'].map((name) => import(`/web/ssr/${name}.js`)));
  window.keys = [];
  const button = ([key, disabled]) => Object.assign(document.createElement('button'), {textContent: key, disabled});
  const lorasView = () => { const view = document.createElement('div');
    for (const key of keys) { const one = button(key); one.dataset.key = key[0]; view.append(one); }
    return view; };
  window.panel = createPanel({words: wordsFor('en'), lorasView});
  document.getElementById('place').append(panel.element);
  panel.open('loras');
}"""


def test_the_focus_stays_with_the_lora_when_the_list_is_drawn_anew(page):
    page.evaluate(LIST)

    def drawn(*keys):
        page.evaluate("(k) => { keys = k; panel.refreshLoras(); }", keys)
        return page.evaluate("() => document.activeElement.dataset.key ?? document.activeElement.dataset.tab")

    first, second = [["4 on", False], ["4 up", True]], [["7 on", False], ["7 up", False]]
    assert drawn(*first, *second, ["add", False]) is None, "nothing takes the focus by itself"
    page.locator("[data-key='7 up']").focus()
    assert drawn(*first, *second, ["add", False]) == "7 up"
    assert drawn(["7 on", False], ["7 up", True], *first, ["add", False]) == "7 on", "it is the first now"
    assert drawn(*first, ["add", False]) == "add", "it is gone"
    assert drawn(*first) == "loras", "nothing can be added"


PICK = """async (names) => {
  const [{picker}, {wordsFor}] = await Promise.all(['picker', 'text'].map((name) => import(`/web/ssr/${name}.js`)));
  window.picked = [];
  const made = picker({names, words: wordsFor('en'), onPick: (n) => picked.push(n), onClose: () => picked.push(null)});
  document.getElementById('place').append(made.element);
  made.focus();
}"""


def test_what_is_typed_before_the_files_are_known_counts(page):
    page.evaluate(PICK.replace("picker({names", "picker({names: new Promise((r) => { window.arrive = r; })"), [])
    page.keyboard.type("do")
    page.keyboard.press("Enter")
    page.evaluate("() => arrive(['cat.safetensors', 'dog.safetensors'])")
    page.keyboard.press("Enter")
    assert page.evaluate("() => picked") == ["dog.safetensors"]


def test_the_picker_by_keyboard(page):
    page.evaluate(
        PICK, [f"many/file{i}.safetensors" for i in range(400)] + ["x/dog.safetensors", f"{NASTY}.safetensors"]
    )
    assert page.get_by_role("option").count() == 200
    page.keyboard.type("file39")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.evaluate("() => picked") == ["many/file390.safetensors", None]
    page.get_by_role("combobox").fill("img")
    page.get_by_role("option").click()
    assert page.evaluate("() => picked.at(-1)") == f"{NASTY}.safetensors"


TRIGGERS = """async ([answer, prompts]) => {
  const [{createTriggers}, {wordsFor}] = await Promise.all(['triggers', 'text'].map((name) => import(`/web/ssr/${name}.js`)));
  window.node = {widgets: [{name: 'lora', value: 'a b&c.safetensors'}, {name: 'prompts', value: prompts}]};
  const api = {fetchApi: async (path) => { window.asked = path; return {ok: answer !== null, json: async () => answer}; }};
  const made = createTriggers(node, wordsFor('en'), api, (change) => change());
  document.getElementById('place').append(made.element);
  await made.refresh();
}"""


def test_trigger_words_go_into_the_prompts(page):
    answer = {"phrases": ["sks dog", NASTY], "tags": [["sks dog", 12], ["outdoors", 5]], "title": ""}
    page.evaluate(TRIGGERS, [json.loads(json.dumps(answer)), "a photo"])
    assert page.get_by_role("button").all_inner_texts() == ["sks dog", NASTY, "outdoors"]
    assert page.evaluate("() => asked").endswith("name=a%20b%26c.safetensors")
    page.get_by_role("button", name="sks dog").click()
    page.get_by_role("button", name="outdoors").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("() => node.widgets[1].value") == "a photo, sks dog, outdoors"


@pytest.mark.parametrize(
    "answer, said", [(None, "could not be read"), ({"phrases": [], "tags": []}, "no trigger words")]
)
def test_files_without_trigger_words_say_so(page, answer, said):
    page.evaluate(TRIGGERS, [answer, ""])
    assert said in page.locator(".ssr-triggers").inner_text()
