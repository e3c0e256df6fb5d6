"""Take docs/screenshots from the demo, on the free example pictures: `python -m benchmarks.screenshots`.

Needs playwright and a Chromium.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

import zoo
from benchmarks.app import ROOT, demo

EXAMPLES = Path(zoo.__file__).parent / "examples"
DESKTOP, PHONE = (1280, 900), (390, 844)


def picture(page: Any, name: str = "ship") -> None:
    page.get_by_role("button", name=f"Example: {name}").click()
    page.locator(".best").nth(1).wait_for()


def prior(page: Any) -> None:
    picture(page, "horse")
    page.locator("#prior input[type=range]").focus()
    page.keyboard.press("End")
    page.get_by_text("as in training.").wait_for()


def tab(name: str, ready: str) -> Callable[[Any], None]:
    def opened(page: Any) -> None:
        picture(page)
        page.get_by_role("tab", name=name).click()
        page.locator(ready).first.wait_for()

    return opened


def held_out(page: Any) -> None:
    tab("Directions", ".direction")(page)
    page.locator("#whose input").click()
    page.get_by_role("option", name="heldout-cifar10-lt", exact=True).click()
    page.get_by_text("Held-out augmentation measures").wait_for()


def folder(page: Any) -> None:
    tab("Folder", "#many")(page)
    files = [*sorted(EXAMPLES.glob("*.jpg")), EXAMPLES / "README.md"]
    page.locator("#files input[type=file]").set_input_files(files)
    page.locator("#files").get_by_text("truck").first.wait_for()
    page.get_by_role("button", name="Classify").click()
    page.locator(".folder h2").wait_for()


SHOTS: dict[str, tuple[tuple[int, int], Any, Callable[[Any], None]]] = {
    "desktop-light": (DESKTOP, "light", picture),
    "desktop-dark": (DESKTOP, "dark", picture),
    "phone-light": (PHONE, "light", picture),
    "phone-dark": (PHONE, "dark", picture),
    "prior": (DESKTOP, "light", prior),
    "folder": (DESKTOP, "light", folder),
    "folder-phone": (PHONE, "dark", folder),
    "long-tail": (DESKTOP, "light", tab("Long tail", "table.classes")),
    "long-tail-phone": (PHONE, "light", tab("Long tail", "table.classes")),
    "directions": (DESKTOP, "light", tab("Directions", ".direction")),
    "directions-dark": (DESKTOP, "dark", tab("Directions", ".direction")),
    "directions-phone": (PHONE, "light", tab("Directions", ".direction")),
    "directions-heldout": (DESKTOP, "light", held_out),
    "models": (DESKTOP, "dark", tab("Models", "#card h3")),
}


def main(out: Path = ROOT / "docs" / "screenshots", only: tuple[str, ...] = ()) -> None:
    """Take the screenshots.

    Args:
        out: Folder for the screenshots.
        only: Take only these, by name.
    """
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    found = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    with demo() as (_, address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        for name, ((width, height), scheme, prepare) in SHOTS.items():
            if only and name not in only:
                continue
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.set_default_timeout(90_000)
            page.goto(address)
            page.locator(".examples button").first.wait_for()
            prepare(page)
            page.mouse.move(0, 0)
            page.wait_for_timeout(800)
            whole = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            whole.convert("RGB").quantize(256).save(out / f"{name}.png", optimize=True)
            page.close()
            print(out / f"{name}.png", flush=True)
        browser.close()


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.screenshots")
