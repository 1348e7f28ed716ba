"""`make screenshots`: the images of the page in README and docs, from the real page with the demo models."""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from deploy.run_demo import ROOT
from tests.support.web_processes import running_cloud_and_gateway

FOLDER = ROOT / "docs/images"
PROMPTS = (
    "a cat to the right of a rocket on a blue background",
    "an apple above a car on a pink background",
    "a robot to the left of a tree on a white background",
    "a whale below a star on a purple background",
    "a fox to the left of a donut on a yellow background",
)


def main() -> None:
    """Draws a few images and photographs the page: wide, on a phone, and a comparison."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with running_cloud_and_gateway(Path(folder)) as (_, gateway):
            page = browser.new_page(viewport={"width": 1280, "height": 1290})
            page.goto(f"http://127.0.0.1:{gateway.port}/")
            for seed, prompt in enumerate(PROMPTS):
                _draw(page, prompt, seed)
            page.evaluate("scrollTo(0, 0)")
            _shoot(page, "page")
            page.get_by_test_id("compare-form").click()
            expect(page.locator("#compare-status")).to_have_text("3 of 3 images are ready", timeout=60_000)
            _shoot(page, "page-compare")
            page.keyboard.press("Escape")
            page.emulate_media(color_scheme="dark")
            page.set_viewport_size({"width": 390, "height": 844})
            page.locator("#stage").scroll_into_view_if_needed()
            _shoot(page, "page-phone")
        browser.close()


def _draw(page: Page, prompt: str, seed: int) -> None:
    page.get_by_test_id("prompt").fill(prompt)
    page.get_by_label("random each time").uncheck()
    page.get_by_test_id("seed").fill(str(seed))
    page.get_by_test_id("generate").click()
    expect(page.get_by_test_id("gallery-item")).to_have_count(seed + 1, timeout=60_000)
    expect(page.get_by_test_id("status")).to_have_text("Ready")


def _shoot(page: Page, name: str) -> None:
    page.wait_for_timeout(700)  # what is new fades in
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.convert("RGB").save(FOLDER / f"{name}.webp", quality=88, method=6)


if __name__ == "__main__":
    main()
