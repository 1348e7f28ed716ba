"""The page in a real browser, Debian's chromium, with a real cloud and a real gateway behind it."""

import base64
import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, Playwright, Route, expect, sync_playwright

from hybridsd.tokens import Quota, add_token
from tests.support.page_stories import (
    JOB_ID,
    drop,
    image_of,
    job_of,
    png,
    problem,
    request_of,
    tell,
    with_capabilities,
)
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
POLL_MS = 10_000
"""After which the page asks again how the cloud is; its clock is set forward, so that no test waits for it."""


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


def generate(page: Page) -> None:
    """Asks for an image and waits until its job is shown: not the one before."""
    with page.expect_response(re.compile(r"/v1/jobs$")) as created:
        page.get_by_test_id("generate").press("Enter")  # a click may miss what moves while an image loads above it
    expect(page.locator("#stage")).to_have_attribute("data-job", created.value.json()["id"])


def draw(page: Page, *, seed: int, prompt: str = PROMPT) -> None:
    """Draws an image of four steps here."""
    fill_in(page, steps=4, cloud_steps=0, seed=seed, prompt=prompt)
    generate(page)
    finish(page)


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
    expect(page.get_by_test_id("compare-note")).to_contain_text("One after the other")
    third, second, first = jobs  # so that none of them slows another down
    assert first["finished_at"] <= second["created_at"] <= second["finished_at"] <= third["created_at"]


def test_the_gallery_survives_a_reload_and_fills_the_form(page: Page) -> None:
    """An image is found again after a reload, with how it was made; "again with this" brings that back."""
    fill_in(page, steps=6, cloud_steps=2, seed=4242)
    page.get_by_test_id("prompt").press("Control+Enter")
    finish(page)
    page.reload()
    page.get_by_test_id("gallery-item").first.click()
    expect(page.get_by_test_id("dialog")).to_be_visible()
    energy = facts(page)["Energy"]
    assert re.fullmatch(r"cloud [\d.]+ k?J \(modelled\), this device [\d.]+ k?J \(modelled\)", energy), energy
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
    draw(page, seed=13)
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
    """No violation of accessibility, in both schemes: the page, its dialogs, all of its form, a failure, a phone."""
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    draw(page, seed=12)
    found = [Axe().run(page)]
    page.get_by_test_id("gallery-item").first.click()
    page.locator("#detail-zoom").click()
    found.append(Axe().run(page))
    page.keyboard.press("Escape")
    drop(page, "photo.png", png(64, 32))
    page.locator("#mask-paint").check()
    page.get_by_role("button", name="Select").click()
    page.get_by_test_id("gallery-item").first.click()
    tell(page, job_of("failed", error=problem("UNAVAILABLE", "no answer", status=502)))
    page.get_by_test_id("steps").fill("4")
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("stage-problem")).to_be_visible()
    page.get_by_test_id("steps").fill("")
    page.get_by_test_id("generate").click()
    found.append(Axe().run(page))
    page.set_viewport_size(PHONE)
    found.append(Axe().run(page))
    drop(page, "known.png", png(8, 8, parameters="a cat\nSteps: 9, Seed: 5"))
    expect(page.get_by_test_id("file-settings")).to_be_visible()
    found.append(Axe().run(page))

    for results in found:
        assert results.violations_count == 0, results.generate_report()


def test_a_phone_shows_all_without_scrolling_sideways(page: Page) -> None:
    """At 360 pixels nothing sticks out, and the page can be used."""
    page.set_viewport_size(PHONE)
    page.reload()
    fill_in(page, steps=4, cloud_steps=2)
    generate(page)
    finish(page)

    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_everything_can_be_reached_by_keyboard(page: Page) -> None:
    """Tab goes through the form in order, with a visible focus, and out of it again."""
    page.get_by_label("random each time").uncheck()
    page.get_by_test_id("prompt").focus()
    names = []
    for _ in range(16):
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
    page.clock.install()
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
    give_up_at = time.monotonic() + HANG_S
    while page.get_by_test_id("banner").inner_text() and time.monotonic() < give_up_at:
        page.clock.fast_forward(POLL_MS)
        page.wait_for_timeout(200)  # the gateway itself asks the cloud every few seconds
    expect(page.get_by_test_id("banner")).to_be_empty()


def test_a_token_is_asked_for_and_kept(playwright: Playwright, browser: Browser, tmp_path: Path) -> None:
    """With tokens nothing is shown before one is given; a wrong one is said; then images are drawn and shown."""
    (tmp_path / "tokens").write_text("let-me-in\n")
    with running_gateway(tmp_path, "--no-cloud", "--client-tokens", str(tmp_path / "tokens")) as gateway:
        context = browser.new_context(base_url=f"http://127.0.0.1:{gateway.port}")
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto("/")
        expect(page.get_by_test_id("token-error")).to_be_empty()
        page.get_by_test_id("token").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_test_id("token-error")).to_contain_text("refused")
        page.get_by_role("button", name="Not now").click()
        page.get_by_test_id("banner").get_by_role("button").click()
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


def test_limits_of_a_token_are_said(browser: Browser, tmp_path: Path) -> None:
    """What is left, in one line; a refusal with its limit, and when there is room again, second by second."""
    quota = Quota(steps_per_minute=5, pixels=128 * 128)
    token = add_token(tmp_path / "tokens", "alice", quota=quota)
    with running_gateway(tmp_path, "--no-cloud", "--client-tokens", str(tmp_path / "tokens")) as gateway:
        context = browser.new_context(base_url=f"http://127.0.0.1:{gateway.port}")
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto("/")
        page.get_by_test_id("token").fill(token)
        page.keyboard.press("Enter")
        expect(page.get_by_test_id("quota")).to_have_text(
            "Your token has left: 5 of 5 steps a minute, images of up to 16384 pixels."
        )
        page.get_by_test_id("prompt").fill(PROMPT)
        page.get_by_test_id("steps").fill("4")
        page.get_by_test_id("generate").click()
        finish(page)
        page.get_by_test_id("generate").click()
        expect(page.get_by_test_id("form-alert")).to_contain_text("steps_per_minute")
        said = page.get_by_test_id("retry-note")
        expect(said).to_have_text(re.compile(r"Room again in \d+ s\."))
        first = said.inner_text()
        expect(said).not_to_have_text(first)  # it counts
        expect(page.get_by_test_id("quota")).not_to_contain_text("5 of 5")
        context.close()


@pytest.mark.parametrize(("num_steps", "step_s"), [(4, 0.01), (25, 0.02), (1000, 0.2)])
def test_the_timeline_fills_its_width(page: Page, num_steps: int, step_s: float) -> None:
    """For an image in no time, and for one of so many steps that each is less than a pixel."""
    image = image_of(step_s=[step_s] * num_steps)
    tell(page, job_of(images=[image], request=request_of(num_inference_steps=num_steps)), content=png(128, 128))
    page.get_by_test_id("prompt").fill(PROMPT)
    generate(page)
    finish(page)
    page.emulate_media(reduced_motion="reduce")
    row = page.locator("#stage-timeline .segments")
    box, last = row.bounding_box(), row.locator(".segment").last.bounding_box()

    assert box is not None
    assert last is not None
    assert row.locator(".segment").count() == num_steps
    assert abs(last["x"] + last["width"] - box["x"] - box["width"]) < 1.5
    expect(page.locator("#stage-timeline")).to_contain_text("previews 0.01 s")


@pytest.mark.parametrize(("width", "height"), [(64, 512), (512, 64), (128, 128)])
def test_an_image_of_any_shape_is_seen_whole(page: Page, width: int, height: int) -> None:
    """A portrait is bounded by the height of the screen, and no shape is distorted or cut."""
    request = request_of(width=width, height=height)
    tell(page, job_of(images=[image_of(width=width, height=height)], request=request), content=png(width, height))
    page.get_by_test_id("prompt").fill(PROMPT)
    generate(page)
    finish(page)
    box = page.get_by_test_id("result").bounding_box()

    assert box is not None
    assert box["height"] < 900
    assert abs(box["width"] / box["height"] / (width / height) - 1) < 0.02


def test_a_missing_plan_is_said_at_the_stage_with_what_to_do(page: Page) -> None:
    """In the page's words, with the steps that this device does have; one click draws with them."""
    request = request_of(num_inference_steps=7, scheduler="euler")
    error = problem("PLAN_MISSING", "bundle x has no plan euler/7", field="scheduler")
    asked = tell(page, job_of("failed", request=request, error=error))
    page.locator("#scheduler").select_option("euler")
    fill_in(page, steps=7, cloud_steps=2)
    page.get_by_test_id("generate").click()
    said = page.get_by_test_id("stage-problem")
    expect(said).to_contain_text("Alone, this device draws Euler with 4, 8, 15, 20, 25 or 50 steps")
    expect(said).not_to_contain_text("bundle")
    said.get_by_role("button", name="Draw it with 8 steps").click()
    expect(page.get_by_test_id("steps")).to_have_value("8")

    assert [each["num_inference_steps"] for each in asked] == [7, 8]


def test_a_failed_cloud_is_said_with_the_way_on(page: Page) -> None:
    """The stage says why, and offers to go on without the cloud; the next image takes its place."""
    error = problem("QUEUE_FULL", "too many jobs wait at `cloud_steps`", status=503)
    asked = tell(page, job_of("failed", error=error))
    fill_in(page, steps=4, cloud_steps=2)
    page.get_by_test_id("generate").click()
    said = page.get_by_test_id("stage-problem")
    expect(said).to_contain_text("The cloud is busy")
    expect(said).to_contain_text("Steps in the cloud")
    tell(page, job_of(images=[image_of()]), content=png(128, 128))
    said.get_by_role("button", name="on this device alone").click()
    finish(page)

    expect(said).to_be_hidden()
    assert asked[0]["hybrid"]["cloud_steps"] == 2


def test_strength_and_split_agree(page: Page) -> None:
    """Of 25 steps a strength of 0.6 draws 15: the slider is of these, and what it says is what runs."""
    page.locator("#image-details summary").click()
    page.locator("#image").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(128, 128)})
    fill_in(page, steps=25, cloud_steps=0)
    page.locator("#strength").fill("0.6")
    expect(page.get_by_test_id("split")).to_have_attribute("max", "15")
    expect(page.locator("#strength-hint")).to_contain_text("15 of 25 steps")
    page.get_by_test_id("split").fill("15")
    expect(page.get_by_test_id("split-text")).to_contain_text("steps 1\u201315, large U-Net")
    page.get_by_test_id("split").fill("9")
    generate(page)
    finish(page)
    (image,) = api(page, "/v1/jobs?limit=1")["jobs"][0]["images"]

    assert (image["num_inference_steps"], image["actual_cloud_steps"]) == (15, 9)


def test_the_curve_says_for_what_it_was_measured(page: Page) -> None:
    """Other steps or another scheduler: it is greyed out and says so."""
    said, quality = page.get_by_test_id("quality-for"), page.locator("#quality")
    page.get_by_test_id("steps").fill("25")
    expect(said).to_have_text("Measured with 25 steps, DPM++ 2M, guidance 4.")
    expect(quality).not_to_have_class(re.compile("stale"))
    page.get_by_test_id("steps").fill("4")
    page.locator("#scheduler").select_option("euler")

    expect(said).to_contain_text("Not measured for what is set here (steps, scheduler)")
    expect(quality).to_have_class(re.compile("stale"))


def test_a_split_says_what_it_takes(page: Page) -> None:
    """Seconds, bytes and cents, learnt from the images of that kind; unknown before the first."""
    with_capabilities(page, lambda document: document["cloud"].update(dollars_per_hour=36))
    page.locator("#size").select_option("custom")
    for name, side in (("width", 96), ("height", 64)):
        page.locator(f"#{name}").fill(str(side))
    page.clock.install()
    page.reload()  # the new price; the form keeps its values
    said = page.get_by_test_id("split-cost")
    expect(said).to_contain_text("after the first image")
    image = image_of(width=96, height=64)
    tell(page, job_of(images=[image], request=request_of(width=96, height=64)), content=png(96, 64))
    fill_in(page, steps=10, cloud_steps=4)
    generate(page)
    finish(page)
    page.clock.fast_forward(POLL_MS)

    expect(said).to_have_text("About 1.7 s: cloud 0.40 s, this device 1.2 s · 40 KB over the network · 0.4 ¢")
    page.get_by_test_id("split").fill("0")
    expect(said).to_have_text("About 2.1 s: this device 2.0 s · nothing over the network · 0 ¢")


def test_only_splits_that_this_device_can_finish_are_offered(page: Page) -> None:
    """Of a U-Net for low noise levels: behind the steps that it is not trained for, also of an image to begin with."""

    def change(document: Any) -> None:
        document["edge"]["max_timestep"] = 660
        for each in document["edge"]["offline"]:
            each["least_cloud_steps"] = [-(-steps * 2 // 5) for steps in each["steps"]]

    with_capabilities(page, change)
    page.reload()
    slider, words = page.get_by_test_id("split"), page.get_by_test_id("split-text")
    page.get_by_test_id("steps").fill("12")  # there is no plan of it: as with the nearest, 15
    expect(slider).to_have_attribute("min", "5")
    page.get_by_test_id("steps").fill("20")
    expect(slider).to_have_attribute("min", "8")
    slider.press("Home")
    expect(slider).to_have_value("8")
    expect(words).to_contain_text("not trained for the first 8 steps: the cloud draws them")
    expect(page.locator("#places")).to_contain_text("timesteps up to 660")
    page.locator("#image-details summary").click()
    page.locator("#image").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(128, 128)})
    page.locator("#strength").fill("0.7")
    expect(slider).to_have_attribute("min", "2")
    page.locator("#strength").fill("0.6")
    expect(slider).to_have_attribute("min", "0")


def test_an_untrained_takeover_says_so(page: Page) -> None:
    """While it is drawn, and with the picture."""
    image = image_of(fallback_reason="UNAVAILABLE", fallback_message="lost", untrained_steps=3, actual_cloud_steps=1)
    fallback = {"image_index": 0, "planned": 4, "actual": 1, "reason": "UNAVAILABLE", "message": "lost"}
    phase = page.evaluate(
        """async (data) => {
            const { applyEvent, beginRun } = await import("/static/run.js");
            const run = beginRun({ id: "a", images: [], queue_position: null, request: { n: 1, hybrid: {} } });
            applyEvent(run, "fallback", data);
            return run.phase;
        }""",
        {**fallback, "untrained_steps": 3},
    )
    assert phase.endswith("continues alone, also where its model is not trained")
    tell(page, job_of(images=[image]), content=png(128, 128))
    fill_in(page, steps=4, cloud_steps=2)
    generate(page)
    finish(page)
    page.get_by_test_id("result").click()
    expect(page.locator("#detail-facts")).to_contain_text("3 steps above the noise level")


def test_what_is_left_is_estimated(page: Page) -> None:
    """From the steps that are done, each at its place, and from earlier images where none is done yet."""
    left = page.evaluate(
        """async () => {
            const { remainingS } = await import("/static/estimate.js");
            const steps = new Map([[0, { place: "cloud", elapsedS: 2 }]]);
            const picture = { steps, numSteps: 6, cloudSteps: 3, image: null };
            const run = (state, pictures) => ({ job: { state }, pictures });
            const rates = { cloudStepS: 9, edgeStepS: 5, decodeS: 1 };
            return [
                remainingS(run("running", [picture]), rates), remainingS(run("running", [picture]), null),
                remainingS(run("queued", [picture]), rates),
            ];
        }"""
    )

    assert left == [2 * 2 + 3 * 5 + 1, None, None]


def test_an_image_to_begin_with_shows_what_is_cut_off(page: Page) -> None:
    """The share, and the other ways to fit it; the size can follow the image."""
    page.locator("#image-details summary").click()
    page.locator("#image").set_input_files({"name": "wide.png", "mimeType": "image/png", "buffer": png(256, 128)})
    said = page.get_by_test_id("start-text")
    expect(said).to_have_text("256 \u00d7 128 becomes 128 \u00d7 128. 50 % is cut off: left and right.")
    page.locator("#fit").select_option("pad")
    expect(said).to_contain_text("Grey bars")
    page.get_by_role("button", name="Draw in its shape").click()
    expect(said).to_contain_text("Nothing is cut off")
    expect(page.locator("#size")).to_have_value("custom")
    asked = tell(page, job_of(images=[image_of()]), content=png(128, 128))
    page.get_by_test_id("prompt").fill(PROMPT)
    generate(page)
    finish(page)

    assert asked[0]["fit"] == "pad"
    assert (asked[0]["width"], asked[0]["height"]) == (192, 96)


def test_a_painted_mask_is_what_is_redrawn(page: Page) -> None:
    """White where it was painted, in the image's own coordinates, though the image is cropped on the screen."""
    page.locator("#image-details summary").click()
    page.locator("#image").set_input_files({"name": "wide.png", "mimeType": "image/png", "buffer": png(256, 128)})
    page.locator("#mask-paint").check()
    canvas = page.get_by_test_id("mask-canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])  # the middle half is seen
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.6 * box["height"])
    page.mouse.up()
    asked = tell(page, job_of(images=[image_of()]), content=png(128, 128))
    page.get_by_test_id("prompt").fill(PROMPT)
    generate(page)
    finish(page)
    with Image.open(io.BytesIO(base64.b64decode(asked[0]["mask"].partition(",")[2]))) as mask:
        pixels = mask.convert("L")

    assert pixels.size == (256, 128)
    assert pixels.getpixel((64 + 32, 70)) == 255
    assert [pixels.getpixel(point) for point in ((32, 70), (160, 70), (96, 10))] == [0, 0, 0]


def test_a_dropped_image_gives_its_settings_back(page: Page) -> None:
    """What this gateway drew comes back whole; AUTOMATIC1111's text as far as it is known here."""
    fill_in(page, steps=6, cloud_steps=2, seed=4711)
    page.locator("#scheduler").select_option("euler")
    page.locator("#schedule").select_option("trailing")
    page.locator("#rescale").fill("0.5")
    generate(page)
    finish(page)
    made = api(page, "/v1/jobs?limit=1")["jobs"][0]["images"][0]
    assert (made["scheduler"], made["guidance_rescale"]) == ("euler+trailing", 0.5)
    page.locator("#schedule").select_option("")
    page.locator("#rescale").fill("0")
    own = page.request.get(api(page, "/v1/jobs?limit=1")["jobs"][0]["images"][0]["url"]).body()
    fill_in(page, steps=25, cloud_steps=8, seed=1, prompt="something else")
    drop(page, "own.png", own)
    page.get_by_test_id("file-settings").click()
    expect(page.get_by_test_id("form-note")).to_contain_text("settings of this image")
    for name, value in {"prompt": PROMPT, "steps": "6", "seed": "4711", "split": "2", "scheduler": "euler"}.items():
        expect(page.locator(f"#{name}")).to_have_value(value)
    expect(page.locator("#schedule")).to_have_value("trailing")
    expect(page.locator("#rescale")).to_have_value("0.5")

    text = (
        "a cat\nNegative prompt: a dog\nSteps: 9, Sampler: Nonsense, CFG scale: 3, Seed: 5, Size: 96x64, Model: other"
    )
    drop(page, "foreign.png", png(96, 64, parameters=text), by="paste")
    page.get_by_test_id("file-settings").click()
    expect(page.get_by_test_id("form-note")).to_contain_text("Its sampler, Nonsense, is not known here.")
    for name, value in {"prompt": "a cat", "negative": "a dog", "steps": "9", "width": "96", "seed": "5"}.items():
        expect(page.locator(f"#{name}")).to_have_value(value)


def test_settings_can_be_taken_without_a_mouse(page: Page) -> None:
    """A file that is chosen does the same as one that is dropped; one that says nothing is said to."""
    page.get_by_text("Take settings from an image").click()
    file = page.locator("#settings-file")
    text = "a cat\nSteps: 9, Sampler: Euler a, CFG scale: 3, Seed: 5, Size: 96x64"
    file.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(96, 64, parameters=text)})
    expect(page.get_by_test_id("prompt")).to_have_value("a cat")
    expect(page.locator("#scheduler")).to_have_value("euler_ancestral")
    text = "a cat\nSteps: 9, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 3, Seed: 5, Size: 96x64"
    file.set_input_files({"name": "c.png", "mimeType": "image/png", "buffer": png(96, 64, parameters=text)})
    expect(page.locator("#schedule")).to_have_value("trailing")
    expect(page.locator("#scheduler")).to_have_value("dpmpp_2m")
    file.set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": png(96, 64)})

    expect(page.locator("[data-field=settings]")).to_contain_text("does not say how it was made")


def test_a_browser_that_keeps_nothing_can_draw(browser: Browser, servers: tuple[Process, Process]) -> None:
    """Where storage is forbidden the page works; a prompt that is too long is said, not cut."""
    context = browser.new_context(base_url=f"http://127.0.0.1:{servers[1].port}")
    context.set_default_timeout(PATIENCE_MS)
    context.add_init_script("""
        for (const name of ["localStorage", "sessionStorage"]) {
            Object.defineProperty(globalThis, name, { get() { throw new DOMException("no", "SecurityError"); } });
        }
    """)
    page = context.new_page()
    page.goto("/")
    expect(page.get_by_test_id("split-text")).not_to_be_empty()
    tell(page, job_of(images=[image_of()]), content=png(128, 128))
    page.get_by_test_id("prompt").fill("\N{FOX FACE}" * 4001)
    page.get_by_test_id("generate").click()
    expect(page.locator("[data-field=prompt]")).to_contain_text("4001 characters; at most 4000")
    page.get_by_test_id("prompt").fill("\N{FOX FACE}" * 4000)
    generate(page)
    finish(page)
    context.close()


def test_a_dropped_photograph_is_begun_with(page: Page) -> None:
    """It says nothing of itself, so it is the image to begin with; another file is refused by name."""
    drop(page, "photo.png", png(64, 64))
    expect(page.get_by_test_id("form-note")).to_contain_text("begins with this one")
    expect(page.get_by_test_id("start-text")).to_contain_text("64 \u00d7 64 becomes")
    drop(page, "notes<b>.txt", b"no image", "text/plain")

    expect(page.locator("[data-field=image]")).to_contain_text("notes<b>.txt is no image")


def test_this_image_can_be_begun_with(page: Page) -> None:
    """From its dialog, in the size that it has."""
    draw(page, seed=31)
    page.get_by_test_id("gallery-item").first.click()
    page.get_by_test_id("use").click()

    expect(page.get_by_test_id("dialog")).to_be_hidden()
    expect(page.get_by_test_id("start-text")).to_contain_text("128 \u00d7 128 becomes 128 \u00d7 128")


def test_adapters_and_models_can_be_chosen(page: Page) -> None:
    """Those of the chosen model, with weights; they are said to need the cloud."""

    def change(document: Any) -> None:
        (model,) = document["cloud"]["models"]
        document["cloud"]["models"] = [model | {"loras": ["ink", "snow"]}, model | {"id": "other", "loras": []}]

    with_capabilities(page, change)
    page.reload()
    asked = tell(page, job_of(images=[image_of()]), content=png(128, 128))
    fill_in(page, steps=4, cloud_steps=2)
    page.locator("#adapters summary").click()
    page.get_by_label("snow", exact=True).check()
    page.get_by_label("Weight of snow").fill("0.5")
    generate(page)
    finish(page)
    page.get_by_test_id("split").fill("0")
    expect(page.locator("#adapters-hint")).to_contain_text("give the cloud some steps")
    generate(page)
    finish(page)
    page.get_by_test_id("split").fill("2")
    page.locator("#cloud-model").select_option("other")
    expect(page.locator("#adapters")).to_be_hidden()
    generate(page)
    finish(page)

    assert [each["loras"] for each in asked] == [[{"name": "snow", "weight": 0.5}], [], []]


def test_an_empty_number_is_asked_for(page: Page) -> None:
    """It does not silently become a default; the range is said, and nothing is drawn."""
    asked = tell(page, job_of(images=[image_of()]), content=png(128, 128))
    page.get_by_test_id("prompt").fill(PROMPT)
    page.get_by_test_id("steps").fill("")
    page.locator("#guidance").fill("31")
    page.get_by_test_id("generate").click()

    expect(page.locator("[data-field=num_inference_steps]")).to_contain_text(
        "Steps is empty: choose a whole number from 1 to 1000."
    )
    expect(page.locator("[data-field=guidance_scale]")).to_contain_text("choose a number from 1 to 30")
    expect(page.get_by_test_id("steps")).to_be_focused()
    assert asked == []


def test_each_image_has_an_address(page: Page) -> None:
    """It opens with a reload; Back closes it; one that is gone is said."""
    draw(page, seed=32)
    plain = page.url
    page.get_by_test_id("gallery-item").first.click()
    expect(page).to_have_url(re.compile(r"\?image="))
    address = page.url
    page.reload()
    expect(page.get_by_test_id("dialog")).to_be_visible()
    page.get_by_test_id("dialog").get_by_role("button", name="Close").click()
    expect(page).to_have_url(plain)  # closing goes back, which takes a moment
    page.get_by_test_id("gallery-item").first.click()
    expect(page).to_have_url(address)
    page.go_back()
    expect(page.get_by_test_id("dialog")).to_be_hidden()
    page.go_forward()
    expect(page.get_by_test_id("dialog")).to_be_visible()
    assert page.url == address
    page.goto(f"{plain}?image=nobody.0")

    expect(page.locator("#form-alert")).to_contain_text("not here")


def test_again_with_this_says_what_it_did(page: Page) -> None:
    """The form is in view with its new values, and says so; the next step has the focus."""
    draw(page, seed=33)
    page.get_by_test_id("gallery-item").first.click()
    page.get_by_test_id("again").click()

    expect(page.get_by_test_id("form-note")).to_contain_text("The form has the settings of this image now")
    expect(page.get_by_test_id("prompt")).to_be_in_viewport()
    expect(page.get_by_test_id("generate")).to_be_focused()


def test_again_with_this_is_the_same_request(page: Page) -> None:
    """Also for what other clients ask for: weights, texts in parts, one of several images with a seed."""
    how = {"long_prompt": "chunk", "prompt_weighting": True}
    image = image_of(image_index=2)
    asked = tell(page, job_of(images=[image], request=request_of(**how)), content=png(128, 128))
    page.get_by_test_id("prompt").fill(PROMPT)
    generate(page)
    finish(page)
    page.locator(f"[data-job={JOB_ID}-1] .tile").click()
    page.get_by_test_id("again").click()
    generate(page)
    page.get_by_test_id("dice").click()
    generate(page)

    _, again, other = asked
    for name in (
        "prompt",
        "seed",
        "width",
        "height",
        "scheduler",
        "num_inference_steps",
        "guidance_scale",
        "image_index",
    ):
        assert again[name] == image[name], name
    assert {name: again[name] for name in how} == how
    assert "image_index" not in other


def test_the_gallery_is_searched_starred_and_cleared(page: Page) -> None:
    """Words of the prompt find an image, favourites stay after a reload, several are deleted at once."""
    for seed in (901, 902):
        draw(page, seed=seed, prompt=f"a whale {seed} ☂ below a star")
    items = page.get_by_test_id("gallery-item").locator("visible=true")
    page.get_by_label("Search the gallery").fill("WHALE ☂")
    expect(items).to_have_count(2)
    expect(page.locator("#gallery-count")).to_have_text("2 images")
    items.first.click()
    page.locator("#detail-star").click()
    page.keyboard.press("Escape")
    expect(page).not_to_have_url(re.compile("image="))
    page.reload()
    page.get_by_label("Favourites only").check()
    expect(items).to_have_count(1)
    page.get_by_label("Favourites only").uncheck()
    page.get_by_label("Search the gallery").fill("whale")
    page.get_by_role("button", name="Select").click()
    for item in items.all():
        item.click()
    expect(page.locator("#selected-count")).to_have_text("2 images selected")
    page.locator("#selected-delete").click()
    page.get_by_test_id("confirm-delete").click()

    expect(page.locator("#gallery-empty")).to_be_visible()
    expect(page.locator("#gallery-empty")).to_have_text("No image is like that.")
    prompts = [job["request"]["prompt"] for job in api(page, "/v1/jobs?limit=200")["jobs"]]
    assert not [prompt for prompt in prompts if "whale" in prompt]


def test_zoom_and_formats(page: Page) -> None:
    """A pixel on a pixel, and a download in the format that was chosen."""
    draw(page, seed=34)
    page.get_by_test_id("gallery-item").first.click()
    page.locator("#detail-zoom").click()
    expect(page.locator("#detail-picture")).to_have_js_property("offsetWidth", 128)
    page.locator("#detail-format").select_option("webp")
    with page.expect_download() as download:
        page.get_by_test_id("download").click()

    assert download.value.suggested_filename.endswith("-34.webp")
    assert Path(download.value.path()).read_bytes()[8:12] == b"WEBP"


def test_names_and_prompts_are_text(page: Page) -> None:
    """Markup in prompts, names of models and adapters, messages and file names is shown, never run."""
    evil = "<img src=x onerror=document.title='pwned'>\"'&{{}}" + "🦊" * 50 + "w" * 3000

    def change(document: Any) -> None:
        (model,) = document["cloud"]["models"]
        document["cloud"]["models"] = [model | {"id": evil[:64], "loras": [evil[:60]]}]
        document["cloud"]["message"] = document["edge"]["model"] = evil
        document["cloud"]["reachable"] = False

    with_capabilities(page, change)
    page.set_viewport_size(PHONE)
    page.reload()
    image = image_of(prompt=evil, negative_prompt=evil, cloud_model=evil, fallback_message=evil, fallback_reason=evil)
    job = job_of(images=[image], request=request_of(prompt=evil, loras=[{"name": evil, "weight": 1}]))
    tell(page, job, content=png(128, 128))
    page.get_by_test_id("prompt").fill(evil)
    generate(page)
    finish(page)
    page.get_by_test_id("gallery-item").first.click()
    expect(page.locator("#detail-facts")).to_contain_text("onerror")
    page.keyboard.press("Escape")
    tell(page, job_of("failed", "other", error=problem(evil, evil, field=evil)))
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("stage-problem")).to_contain_text("onerror")

    assert page.title() != "pwned"
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_an_image_that_cannot_be_loaded_is_said(page: Page) -> None:
    """In the stage, the gallery and the dialog, instead of an empty frame."""
    tell(page, job_of(images=[image_of()]))
    page.get_by_test_id("prompt").fill(PROMPT)
    page.get_by_test_id("generate").click()
    page.locator(f"[data-job={JOB_ID}-1] .tile").click()

    for place in (".frame-open", f"[data-job={JOB_ID}-1] .tile", "#detail-frame"):
        expect(page.locator(place)).to_have_attribute("data-problem", "This image could not be loaded")


def test_a_token_that_ends_is_asked_for_and_the_image_drawn(page: Page) -> None:
    """In the middle of a visit the gateway refuses it: the dialog says so, and what was asked goes on."""
    asked: list[str | None] = []

    def refuse(route: Route) -> None:
        authorization = route.request.headers.get("authorization")
        if route.request.method == "POST" and authorization != "Bearer fresh":
            asked.append(authorization)
            route.fulfill(status=401, json=problem("UNAUTHENTICATED", "the token is wrong", status=401))
        else:
            route.fallback()

    page.evaluate("sessionStorage.setItem('hybridsd.token', 'stale')")
    tell(page, job_of(images=[image_of()]), content=png(128, 128))
    page.route(re.compile(r"/v1/jobs$"), refuse)
    page.get_by_test_id("prompt").fill(PROMPT)
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("token-error")).to_contain_text("no longer valid")
    page.get_by_test_id("token").fill("fresh")
    page.keyboard.press("Enter")
    finish(page)

    assert asked == ["Bearer stale"]


def test_two_tabs_agree(page: Page) -> None:
    """What one tab draws or deletes, the other shows when it is looked at again."""
    other = page.context.new_page()
    other.goto("/")
    expect(other.get_by_test_id("split-text")).not_to_be_empty()
    draw(page, seed=35, prompt="a robot of the other tab")
    look = "document.dispatchEvent(new Event('visibilitychange'))"
    other.evaluate(look)
    expect(other.get_by_title("a robot of the other tab")).to_have_count(1)
    page.get_by_test_id("gallery-item").first.click()
    page.get_by_test_id("delete").click()
    page.get_by_test_id("confirm-delete").click()
    expect(page.get_by_title("a robot of the other tab")).to_have_count(0)
    other.evaluate(look)

    expect(other.get_by_title("a robot of the other tab")).to_have_count(0)


def test_a_gateway_that_ends_is_said_and_the_image_comes_after_its_restart(
    page: Page, servers: tuple[Process, Process]
) -> None:
    """The job survives, so the page waits, says so, and shows the image of the second run."""
    _, gateway = servers
    fill_in(page, steps=500, cloud_steps=0)
    page.locator("#scheduler").select_option("ddim")
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("timeline").locator(".segment.done").nth(3)).to_be_attached()
    gateway.end(kill=True)
    try:
        expect(page.get_by_test_id("status")).to_contain_text("The gateway does not answer")
    finally:
        gateway.start()
    expect(page.get_by_test_id("status")).to_contain_text("This device draws")
    page.get_by_test_id("cancel").click()

    expect(page.get_by_test_id("status")).to_have_text("Cancelled")


def test_who_looks_away_is_told(browser: Browser, servers: tuple[Process, Process]) -> None:
    """A notification when the image is done and the page is not in view; none while it is."""
    context = browser.new_context(base_url=f"http://127.0.0.1:{servers[1].port}", permissions=["notifications"])
    context.set_default_timeout(PATIENCE_MS)
    context.add_init_script("""
        window.told = [];
        window.Notification = class extends EventTarget {
            static permission = "granted";
            static requestPermission = async () => "granted";
            constructor(title, { body }) { super(); window.told.push([title, body]); }
        };
        Object.defineProperty(document, "hidden", { get: () => window.isAway ?? false });
    """)
    page = context.new_page()
    page.goto("/")
    expect(page.get_by_test_id("split-text")).not_to_be_empty()
    tell(page, job_of(images=[image_of()], request=request_of(prompt=PROMPT)), content=png(128, 128))
    page.get_by_label("Tell me when an image is done").check()
    page.get_by_test_id("prompt").fill(PROMPT)
    generate(page)
    finish(page)
    told_here = page.evaluate("window.told.length")
    page.evaluate("window.isAway = true")
    generate(page)
    page.wait_for_function("() => window.told.length")

    assert told_here == 0
    assert page.evaluate("window.told") == [["Your image is ready", PROMPT]]
    context.close()
