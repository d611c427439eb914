"""The page at / and what it consists of: complete, labelled, safe, and nothing from elsewhere. No browser is needed."""

import re
from collections.abc import Callable
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gakernels.server.pages import FOLDER
from gakernels.server.settings import ApiKeys

ROOT = Path(__file__).parents[2]
FILES = sorted(FOLDER.iterdir())
PAGES = {"/": "index.html", "/docs": "docs.html"}


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, {name: value or "" for name, value in attrs}))

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.all if name in attributes]


def elements(name: str) -> Elements:
    return Elements((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PAGES)
def test_a_page_needs_no_key_and_lets_a_browser_load_nothing_from_elsewhere(
    make_client: Callable[..., TestClient], path: str
) -> None:
    client = make_client(keys=ApiKeys(["a-key-of-16-characters"]))
    response = client.get(path)
    assert response.status_code == 200
    assert response.content == (FOLDER / PAGES[path]).read_bytes()
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    policy = dict(rule.strip().split(" ", 1) for rule in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert {policy[kind] for kind in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")


@pytest.mark.parametrize("name", PAGES.values())
def test_what_a_page_names_is_there(client: TestClient, name: str) -> None:
    links = [value for kind in ("src", "href") for value in elements(name).values(kind)]
    assert len(links) > 3
    for link in links:
        assert re.fullmatch(r"[\w#.][\w#./-]*", link), link  # also behind a proxy that gives it another path
        if not link.startswith("#"):
            assert client.get(f"/{link.removeprefix('.')}").status_code == 200, link
        else:
            assert link[1:] in elements(name).values("id")


def test_files_have_their_types_and_other_names_lead_nowhere(client: TestClient) -> None:
    types = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for file in FILES:
        response = client.get(f"/page/{file.name}")
        assert response.content == file.read_bytes()
        assert response.headers["content-type"].split(";")[0] == types[file.suffix]
        assert response.headers["x-content-type-options"] == "nosniff"
    for name in ("pages.py", "..%2fpages.py", "%2e%2e%2fserver.py", "..\\pages.py", "", "%00", "index.html/"):
        response = client.get(f"/page/{name}")
        assert response.status_code == 404, name
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_plain_and_safe(file: Path) -> None:
    text = file.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    for word in ("://", "url(", "@import", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert word not in text, word
    assert not re.search(r"<[^>]*\s(style|on\w+)=", text)  # the browser would refuse them
    for name in re.findall(r'(?:from|import) "\./([\w.]+)"', text):
        assert (FOLDER / name).is_file(), name


@pytest.mark.parametrize(("page", "scripts"), [("index.html", None), ("docs.html", ["docs.js"])])
def test_scripts_find_the_elements_that_they_name(page: str, scripts: list[str] | None) -> None:
    files = scripts or [file.name for file in FILES if file.suffix == ".js" and file.name != "docs.js"]
    named = {name for file in files for name in re.findall(r'byId\("([\w-]+)"\)', (FOLDER / file).read_text("utf-8"))}
    ids = elements(page).values("id")
    assert named
    assert named <= set(ids)
    assert len(ids) == len(set(ids))


def test_every_field_has_a_label_and_every_description_is_there() -> None:
    found = elements("index.html")
    labelled, ids = found.values("for"), found.values("id")
    fields = [attributes["id"] for tag, attributes in found.all if tag in ("input", "textarea", "select")]
    assert len(fields) >= 10
    assert sorted(fields) == sorted(labelled)
    references = [*found.values("aria-describedby"), *found.values("aria-labelledby")]
    assert references
    assert set(references) <= set(ids)


def test_the_package_holds_all_of_it() -> None:
    patterns = re.findall(r'"([^"]+)"', re.search(r"\ngakernels = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1])
    for file in FILES:
        name = file.relative_to(ROOT / "gakernels").as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), name


def test_the_interface_does_not_list_the_pages_and_they_are_counted(client: TestClient) -> None:
    schema: dict[str, Any] = client.get("/openapi.json").json()
    assert not {"/", "/docs", "/page/{name}"} & set(schema["paths"])
    client.get("/page/main.js")
    assert 'route="/page/{name}"' in client.get("/metrics").text
