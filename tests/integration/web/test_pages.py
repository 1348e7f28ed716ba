"""The page's files: kept by browsers as long as they are right, sent compressed, and of one version at a time."""

import re

import httpx
import pytest

from edge_client.web.routes import pages
from tests.integration.web.conftest import finish, pixels


@pytest.fixture
def names(client: httpx.Client) -> list[str]:
    """What the page names."""
    found: list[str] = re.findall(r'"(/static/[^"]+)"', client.get("/").text)
    return found


def test_what_the_page_names_is_kept_forever(client: httpx.Client, names: list[str]) -> None:
    """The names hold a hash of the content, so they may be kept; scripts name each other within that folder."""
    assert names
    for name in names:
        response = client.get(name)
        assert response.status_code == 200, name
        assert response.headers["cache-control"] == pages.FOREVER
        assert name.startswith(f"/static/{pages.version()}/")
    script = client.get(next(name for name in names if name.endswith("/app.js"))).text
    imported = re.findall(r'from "([^"]+)"', script)
    assert imported
    assert all(name.startswith("./") for name in imported)


@pytest.mark.parametrize("path", ["/", "/static/app.js"])
def test_what_has_no_hash_is_asked_for_again(client: httpx.Client, path: str) -> None:
    """It may change with an upgrade; what did not change is not sent again."""
    first = client.get(path)
    second = client.get(path, headers={"If-None-Match": first.headers["etag"]})

    assert first.headers["cache-control"] == pages.REVALIDATE
    assert (second.status_code, second.content) == (304, b"")


def test_text_is_compressed(client: httpx.Client, names: list[str]) -> None:
    """For those who take it; others get it as it is."""
    for name in ("/", *(name for name in names if name.endswith((".js", ".css")))):
        packed = client.get(name, headers={"Accept-Encoding": "gzip"})
        plain = client.get(name, headers={"Accept-Encoding": "identity"})
        assert packed.headers["content-encoding"] == "gzip"
        assert "content-encoding" not in plain.headers
        assert packed.content == plain.content
        assert int(packed.headers["content-length"]) < int(plain.headers["content-length"])


def test_another_version_is_not_there(client: httpx.Client) -> None:
    """A page of before an upgrade does not get files of after it."""
    assert client.get("/static/0123456789abcdef/app.js").status_code == 404


def test_it_can_be_installed(client: httpx.Client, names: list[str]) -> None:
    """The manifest has a name, an address to begin at and icons that exist."""
    address = next(name for name in names if name.endswith(".webmanifest"))
    response = client.get(address)
    manifest = response.json()
    folder = address.rpartition("/")[0]

    assert response.headers["content-type"].startswith("application/manifest+json")
    assert manifest["name"]
    assert client.get(manifest["start_url"]).status_code == 200
    assert {icon["type"] for icon in manifest["icons"]} == {"image/svg+xml", "image/png"}
    for icon in manifest["icons"]:
        assert client.get(f"{folder}/{icon['src']}").headers["content-type"] == icon["type"]


def test_thumbnails(client: httpx.Client) -> None:
    """An image no larger than asked for, in its own shape; never larger than it is."""
    (image,) = finish(client, width=64, height=32)["images"]

    for max_side, shape in ((16, (8, 16, 3)), (4096, (32, 64, 3))):
        small = client.get(image["url"], params={"format": "webp", "max_side": max_side})
        assert pixels(small.content).shape == shape
    assert client.get(image["url"], params={"max_side": 1}).status_code == 422
