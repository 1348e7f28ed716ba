"""The page in a real browser, Debian's chromium, with a real cloud and a real gateway behind it."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from tests.support.patience import HANG_S
from tests.support.web_processes import Process, running_cloud_and_gateway, running_gateway

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and os.environ.get("HYBRIDSD_TEST_BROWSER") != "required":
    pytest.skip("there is no chromium on this machine (apt install chromium)", allow_module_level=True)

PROMPT = "a fox to the left of a donut on a yellow background"
PATIENCE_MS = 1e3 * HANG_S
expect.set_options(timeout=PATIENCE_MS)
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    with running_cloud_and_gateway(tmp_path_factory.mktemp("web")) as both:
        yield both


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield opened
    opened.close()


@pytest.fixture
def page(browser: Browser, servers: tuple[Process, Process]) -> Iterator[Page]:
    """The page of a new visitor. No error of its scripts and no request to elsewhere is let pass."""
    address = f"http://127.0.0.1:{servers[1].port}"
    context = browser.new_context(base_url=address, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: is_here(request.url, address) or wrong.append(request.url))
    opened.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    opened.goto("/")
    expect(opened.get_by_test_id("split-text")).not_to_be_empty()
    yield opened
    context.close()
    assert not wrong


def is_here(url: str, address: str) -> bool:
    return url.startswith((f"{address}/", "data:", "blob:"))


def fill_in(page: Page, *, steps: int, cloud_steps: int, seed: int | None = 7, prompt: str = PROMPT) -> None:
    """Fills in the form; moves the slider as a keyboard would."""
    page.get_by_test_id("prompt").fill(prompt)
    page.get_by_test_id("steps").fill(str(steps))
    page.get_by_test_id("split").fill(str(cloud_steps))
    if seed is not None:
        page.get_by_label("random each time").uncheck()
        page.get_by_test_id("seed").fill(str(seed))


def finish(page: Page) -> None:
    """Waits until the image is there."""
    expect(page.get_by_test_id("result")).to_be_visible()
    expect(page.get_by_test_id("status")).to_have_text("Ready")


def facts(page: Page) -> dict[str, str]:
    """Returns what the opened dialog says of its image."""
    rows = page.locator("#detail-facts tr").all()
    return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in rows}


def api(page: Page, path: str) -> Any:
    answer = page.request.get(path)
    assert answer.ok
    return answer.json()


def test_a_picture_comes_with_previews_and_a_timeline(page: Page) -> None:
    """Previews appear while it is drawn, then the image; the timeline has every step in its place."""
    fill_in(page, steps=40, cloud_steps=12)
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("preview")).to_be_visible()
    previewed = page.get_by_test_id("preview").get_attribute("src") or ""
    finish(page)
    (image,) = api(page, "/v1/jobs?limit=1")["jobs"][0]["images"]
    timeline = page.locator("#stage-timeline")

    assert previewed.startswith("data:image/webp")
    assert (image["actual_cloud_steps"], image["seed"], image["num_inference_steps"]) == (12, 7, 40)
    assert timeline.locator(".segment.cloud.done").count() == 12
    assert timeline.locator(".segment.edge.done").count() == 28
    expect(timeline).to_contain_text(re.compile(r"Cloud 12 steps .*edge 28 steps .*decode", re.IGNORECASE))
    natural = "element => element.complete && element.naturalWidth"
    assert page.get_by_test_id("result").evaluate(natural) == 128


def test_the_slider_says_what_runs_where(page: Page) -> None:
    """Both ends and the middle in words; arrow keys move it; the curve is there for eyes and ears."""
    split, text = page.get_by_test_id("split"), page.get_by_test_id("split-text")
    page.get_by_test_id("steps").fill("25")
    split.fill("0")
    expect(text).to_contain_text("This device alone")
    split.focus()
    page.keyboard.press("ArrowRight")
    expect(text).to_contain_text("Cloud: step")
    split.fill("25")
    expect(text).to_contain_text("Cloud alone")

    assert page.get_by_test_id("quality-curve").locator("svg").is_visible()
    assert page.get_by_test_id("quality-curve").get_by_role("img").count() == 1


def test_cancel(page: Page) -> None:
    """Escape, or the button, ends a long job within moments; the gateway agrees."""
    fill_in(page, steps=500, cloud_steps=0)
    page.locator("#scheduler").select_option("ddim")
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("timeline").locator(".segment.done").first).to_be_attached()
    page.get_by_test_id("cancel").click()
    expect(page.get_by_test_id("status")).to_contain_text("ancelled")

    assert api(page, "/v1/jobs?limit=1")["jobs"][0]["state"] == "cancelled"


def test_compare_shows_three_splits_of_one_seed(page: Page) -> None:
    """Large, hybrid and small beside each other, with one seed."""
    fill_in(page, steps=8, cloud_steps=3, seed=11)
    page.get_by_test_id("compare-form").click()
    columns = page.get_by_test_id("compare-view").get_by_test_id("compare-column")
    expect(columns).to_have_count(3)
    expect(columns.locator("img")).to_have_count(3)
    expect(page.locator("#compare-status")).to_have_text("3 of 3 images are ready")
    page.wait_for_function("() => [...document.querySelectorAll('.column img')].every(i => i.naturalWidth === 128)")
    jobs = api(page, "/v1/jobs?limit=3")["jobs"]

    assert {job["images"][0]["actual_cloud_steps"] for job in jobs} == {0, 3, 8}
    assert {job["images"][0]["seed"] for job in jobs} == {11}


def test_the_gallery_survives_a_reload_and_fills_the_form(page: Page) -> None:
    """An image is found again after a reload, with how it was made; "again with this" brings that back."""
    fill_in(page, steps=6, cloud_steps=2, seed=4242)
    page.get_by_test_id("prompt").press("Control+Enter")
    finish(page)
    page.reload()
    page.get_by_test_id("gallery-item").first.click()
    expect(page.get_by_test_id("dialog")).to_be_visible()
    told = " ".join(facts(page).values())
    page.get_by_test_id("steps").evaluate("element => { element.value = '25' }")
    page.get_by_test_id("again").click()

    assert PROMPT in told
    assert "4242" in told
    expect(page.get_by_test_id("steps")).to_have_value("6")
    expect(page.get_by_test_id("seed")).to_have_value("4242")
    expect(page.get_by_test_id("split")).to_have_value("2")


def test_deleting_asks_and_deletes(page: Page) -> None:
    """One image less in the gallery, and on the device."""
    expect(page.get_by_test_id("gallery-item").first).to_be_visible()
    before, shown = len(api(page, "/v1/jobs?state=completed")["jobs"]), page.get_by_test_id("gallery-item").count()
    page.get_by_test_id("gallery-item").first.click()
    page.get_by_test_id("delete").click()
    page.get_by_test_id("confirm-delete").click()
    expect(page.get_by_test_id("gallery-item")).to_have_count(shown - 1)

    assert len(api(page, "/v1/jobs?state=completed")["jobs"]) == before - 1


def test_what_is_wrong_is_said_at_its_field(page: Page) -> None:
    """The gateway's word appears where the field is."""
    fill_in(page, steps=25, cloud_steps=8)
    page.locator("#guidance").fill("99")
    page.get_by_test_id("generate").click()

    expect(page.locator("[data-field=guidance_scale]")).to_contain_text("30")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, scheme: Any) -> None:
    """No violation of accessibility on the page and in its dialog, on a phone as well, in both schemes."""
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.reload()
    expect(page.get_by_test_id("gallery-item").first).to_be_visible()
    found = [Axe().run(page)]
    page.get_by_test_id("gallery-item").first.click()
    expect(page.get_by_test_id("dialog")).to_be_visible()
    found.append(Axe().run(page))
    page.keyboard.press("Escape")
    page.set_viewport_size(PHONE)
    found.append(Axe().run(page))

    for results in found:
        assert results.violations_count == 0, results.generate_report()


def test_a_phone_shows_all_without_scrolling_sideways(page: Page) -> None:
    """At 360 pixels nothing sticks out, and the page can be used."""
    page.set_viewport_size(PHONE)
    page.reload()
    fill_in(page, steps=4, cloud_steps=2)
    page.get_by_test_id("generate").click()
    finish(page)

    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_everything_can_be_reached_by_keyboard(page: Page) -> None:
    """Tab goes through the form in order, with a visible focus, and out of it again."""
    page.get_by_label("random each time").uncheck()
    page.get_by_test_id("prompt").focus()
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
        style = page.evaluate(
            "(e => e.outlineStyle + e.outlineWidth + e.boxShadow)(getComputedStyle(document.activeElement))"
        )
        assert style != "none0pxnone", names[-1]

    assert [name for name in names if name in ("split", "steps", "seed", "dice")] == ["split", "steps", "seed", "dice"]


def test_a_cloud_that_dies_is_said_and_the_picture_is_finished(page: Page, servers: tuple[Process, Process]) -> None:
    """The cloud is killed in the middle: the device goes on, a banner says so, and goes when the cloud is back."""
    cloud, _ = servers
    fill_in(page, steps=100, cloud_steps=90)
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("timeline").locator(".segment.cloud.done").nth(3)).to_be_attached()
    cloud.end(kill=True)
    try:
        expect(page.get_by_test_id("banner")).to_contain_text("cloud is away")
        finish(page)
        (image,) = api(page, "/v1/jobs?limit=1")["jobs"][0]["images"]

        assert 0 < image["actual_cloud_steps"] < image["planned_cloud_steps"] == 90
        assert image["fallback_reason"] == "UNAVAILABLE"
        assert len(image["steps"]) == 100
    finally:
        cloud.start()
    expect(page.get_by_test_id("banner")).to_be_empty()


def test_a_token_is_asked_for_and_kept(playwright: Playwright, browser: Browser, tmp_path: Path) -> None:
    """With tokens nothing is shown before one is given; then images are drawn and shown."""
    (tmp_path / "tokens").write_text("let-me-in\n")
    with running_gateway(tmp_path, "--no-cloud", "--client-tokens", str(tmp_path / "tokens")) as gateway:
        context = browser.new_context(base_url=f"http://127.0.0.1:{gateway.port}")
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto("/")
        page.get_by_test_id("token").fill("let-me-in")
        page.keyboard.press("Enter")
        page.get_by_test_id("prompt").fill(PROMPT)
        page.get_by_test_id("steps").fill("4")
        expect(page.get_by_test_id("split")).to_be_disabled()  # there is no cloud to split with
        page.get_by_test_id("generate").click()
        finish(page)
        shown = page.get_by_test_id("result").evaluate("element => element.naturalWidth")
        context.close()

    assert shown == 128
