"""The page at / in a real browser: by mouse, by keyboard, on a phone, in dark mode, and when things go wrong."""

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser as installed
import pytest
from demo_users import User
from loopback import served
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from gakernels import GenerativeAdapter
from gakernels.generation import Sampling, generate
from gakernels.server.settings import ApiKeys, Limits

KEYS = ["first-key-of-16-characters", "second-key-of-16-characters"]
PICTURES = os.environ.get("GAKERNELS_PICTURES")  # a folder for the pictures of the documentation
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
# The smallest contrast between a text that is shown and what is behind it.
CONTRAST = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = parse(color).slice(0, 3).map((c) => c / 255).map(
      (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if ((parse(color)[3] ?? 1) === 1) return color;
    }
  };
  const ratios = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || element.disabled || !element.checkVisibility() || element.closest("select")) continue;
    const [low, high] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => a - b);
    ratios.push((high + 0.05) / (low + 0.05));
  }
  return { least: Math.min(...ratios), count: ratios.length };
}"""
# The smallest side of a button or field that can be used.
TARGETS = """() => Math.min(...[...document.querySelectorAll("button, input, select, textarea")]
  .filter((one) => one.checkVisibility()).map((one) => one.getBoundingClientRect())
  .map(({ width, height }) => Math.min(width, height)))"""
DROPPED = """(files) => {
  const data = new DataTransfer();
  for (const [name, text] of files) data.items.add(new File([text], name));
  return data;
}"""
PATIENCE = 30_000  # milliseconds; a busy machine takes its time
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with installed.started() as browser:
        yield browser


class Visits:
    """Opens pages of one server, and watches what they load and complain about."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser, self.url, self._contexts = browser, url, list[BrowserContext]()
        self.loaded: list[str] = []
        self.complaints: list[str] = []

    def open(self, path: str = "/", **options: Any) -> Page:
        """A page in a browser without a past."""
        context = self._browser.new_context(locale="en-GB", timezone_id="UTC", **options)
        self._contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda request: self.loaded.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.goto(self.url + path)
        return page

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def make_visits(chromium: Browser, demo: GenerativeAdapter, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a server with settings; at the end, no page may have loaded anything from elsewhere or complained."""
    running: list[Any] = []

    def make(**settings: Any) -> Visits:
        server = served(demo, tmp_path / "data", **settings)
        visits = Visits(chromium, server.__enter__())
        running.append((server, visits))
        return visits

    yield make
    for server, visits in running:
        visits.close()
        server.__exit__(None, None, None)
        elsewhere = [url for url in visits.loaded if not url.startswith((visits.url, f"blob:{visits.url}"))]
        assert elsewhere == []
        # The console also has a line for every answer that is not a success, and there some are wanted.
        assert [text for text in visits.complaints if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def visits(make_visits: Callable[..., Visits]) -> Visits:
    return make_visits()


@pytest.fixture
def page(visits: Visits) -> Page:
    return visits.open()


def status(page: Page, text: str) -> None:
    expect(page.get_by_role("status")).to_have_text(text)


def error(page: Page, *words: str) -> None:
    for word in words:
        expect(page.get_by_role("alert")).to_contain_text(word)


def read(page: Page, text: str, name: str = "") -> None:
    page.get_by_label("Paste a text").fill(text)
    if name:
        page.get_by_label("Name of the new adapter").fill(name)
    page.get_by_role("button", name="Read the text").click()
    status(page, "The text is read.")


def ask(page: Page, question: str, stop: str = ".") -> list[str]:
    """The two answers."""
    if not page.get_by_label("ends").is_visible():
        page.get_by_text("Settings").click()
    page.get_by_label("ends").fill(stop)
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Send").click()
    status(page, "Both answers are there.")
    return page.locator("article").last.locator(".answer").all_inner_texts()


def asked(user: User) -> str:
    return user.question.removeprefix("Question: ").removesuffix(" Answer:")


def listed(page: Page) -> list[str]:
    return page.locator("#adapters label").all_inner_texts()


def test_a_text_becomes_an_adapter_and_no_prompt_holds_it(
    page: Page, demo: GenerativeAdapter, make_users: Callable[[int], list[User]]
) -> None:
    user = make_users(1)[0]
    text = user.document.text()
    read(page, text, "mine")
    count = user.adapter.tokens_seen
    facts = page.get_by_role("list", name="Texts read").get_by_role("listitem")
    expect(facts).to_contain_text(f"{count} tokens ({len(text):,} bytes)" if len(text) < 1024 else f"{count} tokens (")
    expect(facts).to_contain_text(f"takes {user.adapter.nbytes // 1024} KiB")
    expect(page.get_by_label("Paste a text")).to_have_value("")
    assert listed(page) == ["mine"]
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.post_data) if "/chat/" in request.url else None)
    answers = ask(page, asked(user))
    rows = [generate(demo, [user.question], [one], Sampling(40, stop=(".",)))[0] for one in (user.adapter, None)]
    assert answers == [row.text.strip() for row in rows]
    page.get_by_text("What was sent").click()
    assert page.locator("pre").all_text_contents() == sent
    bodies = [json.loads(body) for body in sent]
    assert [body.pop("model") for body in bodies][1] == "demo"
    assert bodies[0] == bodies[1]
    assert bodies[0]["messages"] == [{"role": "user", "content": asked(user)}]
    assert not any(sentence in body for body in sent for sentence in text.split(". "))
    tokens = len(demo.tokenizer(user.question)["input_ids"])
    for side in range(2):
        hint = page.locator("article .hint").nth(side)
        expect(hint).to_contain_text(f"Prompt: {tokens} tokens. Answer: {len(rows[side].tokens)} tokens")
    # A second question: each side continues its own conversation.
    again = ask(page, asked(user))
    turns = [json.loads(body)["messages"] for body in sent[2:]]
    assert [[turn["content"].strip() for turn in side] for side in turns] == [
        [asked(user), answers[0], asked(user)],
        [asked(user), answers[1], asked(user)],
    ]
    assert len(again) == 2


def tab_to(page: Page, name: str) -> None:
    """Move the focus by the tabulator key alone."""
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate("(e => e.ariaLabel || e.labels?.[0]?.innerText || e.innerText)(document.activeElement)")
        if focused == name:
            shown = "(e => e.matches(':focus-visible') && getComputedStyle(e).outlineStyle)(document.activeElement)"
            assert page.evaluate(shown) == "solid"
            return
    raise AssertionError(f"the tabulator does not lead to {name}")


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    keys = page.keyboard
    expect(page.locator("#base")).to_contain_text("demo")
    tab_to(page, "Use an example")
    keys.press("Enter")
    keys.press("Enter")  # the focus has moved on to the button that reads it
    status(page, "The text is read.")
    tab_to(page, "Question")
    keys.press("Enter")
    status(page, "Both answers are there.")
    expect(page.locator(".answer").first).to_have_text("grey hamster")
    expect(page.locator(".answer").last).not_to_have_text("grey hamster")
    (name,) = listed(page)
    page.reload()
    expect(page.locator("#adapters li")).to_have_count(1)
    tab_to(page, f"Rename {name}")
    keys.press("Enter")
    keys.type("hamsters")  # the old name is selected
    keys.press("Enter")
    status(page, "Renamed to hamsters.")
    expect(page.get_by_role("button", name="Rename hamsters")).to_be_focused()
    for confirm in ("Escape", "Enter"):
        page.get_by_role("button", name="Rename hamsters").focus()
        tab_to(page, "Delete hamsters")
        keys.press("Enter")
        if confirm == "Enter":
            tab_to(page, "Delete")
        keys.press(confirm)
    status(page, "Deleted hamsters.")
    assert listed(page) == []
    expect(page.get_by_role("heading", name="Adapters")).to_be_focused()


def test_files_are_read_into_one_adapter_or_one_each(
    page: Page, demo: GenerativeAdapter, make_users: Callable[[int], list[User]], tmp_path: Path
) -> None:
    users = make_users(2)
    paths = [tmp_path / f"{name}.txt" for name in ("first", "second")]
    for path, user in zip(paths, users, strict=True):
        path.write_text(user.document.text())
    total = sum(user.adapter.tokens_seen for user in users)
    page.get_by_label("Files", exact=True).set_input_files(paths)
    page.get_by_label("Read into").select_option("a new adapter for each text")
    page.get_by_role("button", name="Read the text").click()
    status(page, "All 2 texts are read.")
    assert listed(page) == ["first.txt", "second.txt"]
    facts = page.locator("#adapters .hint")
    expect(facts.last).to_contain_text(f"{users[1].adapter.tokens_seen} tokens in 1 append")
    data = page.evaluate_handle(DROPPED, [*([path.name, path.read_text()] for path in paths), ["not this", "x"]])
    page.get_by_label("Paste a text").dispatch_event("drop", {"dataTransfer": data})
    expect(page.get_by_role("list", name="Files to read").get_by_role("listitem")).to_have_count(3)
    page.get_by_role("button", name="Remove not this").click()
    page.get_by_label("Read into").select_option("a new adapter")
    page.get_by_label("Name of the new adapter").fill("both")
    page.get_by_role("button", name="Read the text").click()
    status(page, "All 2 texts are read.")
    assert listed(page) == ["first.txt", "second.txt", "both"]
    expect(facts.last).to_contain_text(f"{total - 1} tokens in 2 appends")  # one opening token, not two
    stream = demo.stream().append(users[0].document.text()).append(users[1].document.text())
    expected = generate(demo, [users[1].question], [stream.compact()], Sampling(128, stop=(".",)))[0]
    assert ask(page, asked(users[1]))[0] == expected.text.strip()


def test_what_is_not_a_text_is_told_and_the_rest_can_be_read_on(page: Page, tmp_path: Path) -> None:
    for name, content in (("good", b"The pet of the town."), ("bad", b"\xff\xfe\x00"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    read_button = page.get_by_role("button", name="Read the text")
    read_button.click()
    error(page, "nothing to read")
    page.get_by_label("Files", exact=True).set_input_files([tmp_path / name for name in ("good", "bad", "empty")])
    read_button.click()
    error(page, "bad is not a text in UTF-8.")
    expect(page.get_by_role("list", name="Files to read").get_by_role("listitem")).to_have_count(2)
    expect(page.locator("#target option:checked")).to_have_text("good")  # what is left goes there
    page.get_by_role("button", name="Remove bad").click()
    read_button.click()
    error(page, "The server says: ", "at least one token")
    assert listed(page) == ["good"]


def test_contexts_are_extended_composed_and_downloaded(
    page: Page, visits: Visits, demo: GenerativeAdapter, make_users: Callable[[int], list[User]]
) -> None:
    users = make_users(2)
    for user, name in zip(users, ("one", "two"), strict=True):
        read(page, user.document.text(), name)
        page.wait_for_timeout(1000)  # contexts are listed by the second of their making
    page.get_by_role("button", name="Append one").click()
    expect(page.get_by_label("Paste a text")).to_be_focused()
    read(page, "The pet")
    expect(page.locator("#adapters .hint").first).to_contain_text("in 2 appends")
    page.get_by_label("one", exact=True).check()
    expect(page.get_by_role("button", name="Compose")).to_be_disabled()
    page.get_by_label("two", exact=True).check()
    page.get_by_role("button", name="Compose").click()
    status(page, "Composed one + two.")
    assert listed(page) == ["one", "two", "one + two"]
    stream = demo.stream().append(users[0].document.text()).append("The pet")
    stream.add(demo.stream().append(users[1].document.text()))
    expect(page.locator("#adapters .hint").last).to_contain_text(f"{stream.tokens_seen} tokens")
    answers = ask(page, asked(users[0]))
    expected = generate(demo, [users[0].question], [stream.compact()], Sampling(128, stop=(".",)))[0]
    assert answers[0] == expected.text.strip()
    for kind, ending in (("PEFT", "-1.peft.zip"), ("GGUF", "-1.gguf")):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"{kind} one + two").click()
        assert download.value.suggested_filename.endswith(ending)
        path = download.value.path()
        if kind == "PEFT":
            assert zipfile.ZipFile(path).namelist() == ["adapter_config.json", "adapter_model.safetensors"]
        else:
            assert path.read_bytes()[:4] == b"GGUF"
    page.get_by_role("button", name="Chat two").click()
    expect(page.get_by_label("Question")).to_be_focused()
    expect(page.locator("#model option:checked")).to_have_text("two")
    expect(page.locator("article")).to_have_count(0)  # another adapter, another conversation
    other = visits.open()
    expect(other.locator("#adapters li")).to_have_count(3)


def test_nothing_becomes_html(page: Page) -> None:
    """Neither what a user writes nor what a server answers."""
    evil = '<img src="x" onerror="document.title = `evil`"><script>document.title = "evil"</script>'
    event = {"choices": [{"delta": {"content": evil}}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    stream = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    read(page, f"{evil} The pet.", evil)
    assert listed(page) == [evil]
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    assert ask(page, evil) == [evil, evil]
    message = {"error": {"message": evil}}
    page.route("**/v1/contexts/compose", lambda route: route.fulfill(status=400, json=message))
    read(page, "The pet of the town.", "other")
    for name in (evil, "other"):
        page.get_by_label(name, exact=True).check()
    page.get_by_role("button", name="Compose").click()
    error(page, f"The server says: {evil}.")
    page.get_by_role("button", name="Delete").first.click()
    expect(page.get_by_role("dialog")).to_contain_text(evil)
    assert page.title() == "gakernels"
    assert page.locator("img, body script").count() == 0


def test_markup_from_a_script_would_be_refused(visits: Visits, page: Page) -> None:
    """Should a later change put a text in as HTML or run it, the browser stops it."""
    for attack in ("document.body.innerHTML = '<p>'", "document.body.setAttribute('onclick', 'x')"):
        assert page.evaluate(f"() => {{ try {{ {attack} }} catch (error) {{ return error.name }} }}") == "TypeError"
    visits.complaints.clear()


def test_failures_are_told_in_words(make_visits: Callable[..., Visits]) -> None:
    page = make_visits(limits=Limits(append_tokens=50, new_tokens=300)).open()
    page.get_by_label("Paste a text").fill("The pet of the town. " * 40)
    page.get_by_role("button", name="Read the text").click()
    error(page, "The server says: an append may have 50 tokens, but this has ")
    expect(page.get_by_label("Paste a text")).not_to_have_value("")  # it is not lost
    expect(page.get_by_text("not read")).to_be_visible()
    read(page, "The pet of the town.", "mine")
    expect(page.get_by_role("alert")).to_have_text("")

    def failing(answer: Callable[[Route], None], *words: str) -> None:
        page.route("**/v1/chat/completions", answer)
        page.get_by_label("Question").fill("What?")
        page.get_by_role("button", name="Send").click()
        error(page, *words)
        expect(page.locator("article").last.get_by_text("Failed.")).to_have_count(2)
        page.unroute("**/v1/chat/completions")

    def sent(body: str) -> Callable[[Route], None]:
        return lambda route: route.fulfill(body=body, content_type="text/event-stream")

    failing(lambda route: route.abort(), "can't be reached")
    failing(lambda route: route.fulfill(status=502, body="<p>"), "502")
    failing(lambda route: route.fulfill(status=503, json={"error": {"message": "too much"}}), "says: too much.")
    failing(sent('data: {"error": {"message": "too late"}}\n\n'), "says: too late.")
    failing(sent('data: {"choices": [{"delta": {}}]}\n\n'), "broke off")
    page.get_by_text("Settings").click()
    page.get_by_label("Longest").fill("301")
    failing(lambda route: route.continue_(), "max_tokens may be 300, not 301")
    page.get_by_label("Longest").fill("20")
    assert len(ask(page, "What is the pet?")) == 2  # what failed is not part of the conversation


STOP_AT_THE_FIRST_WORD = """() => {
    const observer = new MutationObserver(() => {
        if (document.querySelector(".answer")?.textContent) {
            observer.disconnect();
            document.getElementById("stop").click();
        }
    });
    observer.observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def test_an_answer_can_be_stopped(page: Page) -> None:
    read(page, "The pet of the town is grey hamster.", "mine")
    page.get_by_text("Settings").click()
    page.get_by_label("Longest").fill("900")
    page.get_by_label("Question").fill("What is the pet?")
    page.evaluate(STOP_AT_THE_FIRST_WORD)  # a fast machine would have answered before a click from here
    page.get_by_role("button", name="Send").click()
    status(page, "Stopped.")
    expect(page.locator(".answer").first).not_to_be_empty()
    expect(page.locator("article").get_by_text("Stopped.")).to_have_count(2)
    expect(page.get_by_label("Question")).to_be_focused()
    length = page.locator(".answer").first.inner_text()
    page.wait_for_timeout(300)
    assert page.locator(".answer").first.inner_text() == length
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)


def test_a_server_with_keys_asks_for_one(make_visits: Callable[..., Visits]) -> None:
    visits = make_visits(keys=ApiKeys(KEYS))
    page = visits.open()
    error(page, "This server needs an API key")
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("not-a-key-of-this-server")
    field.press("Enter")
    error(page, "does not accept this API key")
    field.fill(KEYS[0])
    field.press("Enter")
    status(page, "The key is accepted.")
    expect(field).to_have_value("")
    read(page, "The pet of the town.", "mine")
    page.reload()
    expect(page.locator("#adapters li")).to_have_count(1)
    stored = "[...Object.entries(localStorage), document.cookie, location.href].join()"
    assert KEYS[0] not in page.evaluate(stored)
    assert not any(KEYS[0] in url for url in visits.loaded)
    other = visits.open()
    error(other, "needs an API key")
    other.get_by_label("API key").fill(KEYS[1])
    other.get_by_role("button", name="Use this key").click()
    status(other, "The key is accepted.")
    assert listed(other) == []
    page.get_by_role("button", name="Forget it").click()
    error(page, "needs an API key")
    assert page.evaluate("sessionStorage.length") == 0


def test_the_interface_is_written_out(visits: Visits) -> None:
    page = visits.open("/docs")
    operations = page.get_by_role("heading", level=2)
    expect(page.locator("#operations")).to_have_attribute("aria-busy", "false")
    schema = page.request.get(f"{visits.url}/openapi.json").json()
    expected = {f"{method.upper()} {path}" for path, found in schema["paths"].items() for method in found}
    assert set(operations.all_inner_texts()) == expected
    chat = page.locator("section", has=page.get_by_role("heading", name="POST /v1/chat/completions"))
    names = set(chat.locator("td:first-child").all_text_contents())
    shapes = schema["components"]["schemas"]
    assert names >= {*shapes["ChatRequest"]["properties"], *shapes["Message"]["properties"]}
    assert names >= {*shapes["ChatCompletion"]["properties"], *shapes["Usage"]["properties"]}
    page.get_by_role("link", name="Page").click()
    expect(page.get_by_role("heading", name="gakernels")).to_be_visible()


def picture(page: Page, name: str, folder: Path) -> None:
    path = (Path(PICTURES) if PICTURES else folder) / f"page-{name}.png"
    page.screenshot(path=path)
    assert path.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"viewport": {"width": 1280, "height": 860}}),
        ("dark", {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"}),
        ("narrow", PHONE),
    ],
)
def test_it_can_be_read_and_used_on_every_screen(visits: Visits, tmp_path: Path, name: str, options: dict) -> None:
    page = visits.open(**options)
    phone = name == "narrow"
    for text, title in (("The job of Rona Kelden is ship painter.", "Rona"), (None, "Mira")):
        if text is None:
            page.get_by_role("button", name="Use an example").click()
            text = page.get_by_label("Paste a text").input_value()
            question = page.get_by_label("Question").input_value()
        read(page, text, title)
    answers = ask(page, question)
    assert answers[0] == "grey hamster"
    first, second = (one.bounding_box() or {} for one in page.locator(".pair > section").all())
    assert first["x" if phone else "y"] == second["x" if phone else "y"]  # below each other, or side by side
    page.get_by_text("Settings").click()
    if not phone:
        page.get_by_text("What was sent").click()
    contrast = page.evaluate(CONTRAST)
    assert contrast["count"] > 30
    assert contrast["least"] >= 4.5
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 26)" if name == "dark" else "rgb(244, 246, 248)"
    )
    assert page.evaluate(OVERFLOW) == 0
    assert page.evaluate(TARGETS) >= (24 if phone else 18)
    page.get_by_role("heading", name="Chat").scroll_into_view_if_needed()
    if phone:
        page.get_by_role("button", name="New conversation").scroll_into_view_if_needed()
        page.set_viewport_size({"width": 320, "height": 740})  # the narrowest that accessibility rules ask for
        assert page.evaluate(OVERFLOW) == 0
        page.set_viewport_size(options["viewport"])
    else:
        page.evaluate("scrollTo(0, 0)")
    picture(page, name, tmp_path)
