"""The pictures of the page in docs/: a real model, the index of Python's documentation, a real answer.

    python -m tests.browser.screenshots RUN [--question TEXT] [--index FILE]

Writes docs/page-desktop.png (1280 x 800), docs/page-phone.png (390 x 844, at twice the density) and the desktop's
docs/page-light.png, each below 200 KB. With --out DIR they and the phone's light one are written there instead.
"""

import argparse
import io
import tempfile
from pathlib import Path

from tests.browser.conftest import ARGUMENTS, Server, find_browser, free_port, until

DOCS = Path(__file__).parent.parent.parent / "docs"
MOST_BYTES = 200_000
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
PICTURES = {"desktop": {**DESKTOP, "color_scheme": "dark"}, "phone": {**PHONE, "color_scheme": "dark"},
            "light": {**DESKTOP, "color_scheme": "light"}, "phone-light": {**PHONE, "color_scheme": "light"}}


def smaller(picture: bytes) -> bytes:
    """The same picture, packed as well as PNG can."""
    from PIL import Image

    packed = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").save(packed, "PNG", optimize=True)
    return packed.getvalue()


def take(server: Server, question: str, out: Path, names: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=ARGUMENTS)
        for name in names:
            page = browser.new_page(**PICTURES[name])
            page.goto(server.url)
            until(page, "document.querySelector('#model .dot').dataset.state === 'ready'")
            for each in ("What does os.path.join return?", question):
                page.evaluate("location.hash = ''")
                page.wait_for_selector("#hero")
                page.fill("#question", each)
                page.press("#question", "Enter")
                page.wait_for_selector(".answer:last-child .actions", timeout=120_000)
            page.evaluate("document.getElementById('scroller').scrollTop = 0; document.activeElement.blur()")
            page.mouse.move(1, 1)
            page.wait_for_timeout(500)
            picture = smaller(page.screenshot())
            assert len(picture) < MOST_BYTES, f"{name}: {len(picture):,} bytes"
            (out / f"page-{name}.png").write_bytes(picture)
            print(f"page-{name}.png: {len(picture):,} bytes")
            page.close()
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder or an exported model that can chat")
    parser.add_argument("--question", default="How does itertools.groupby work?")
    parser.add_argument("--index", help="a passage index; by default that of Python's documentation")
    parser.add_argument("--out", type=Path, help="a folder; by default docs/")
    chosen = parser.parse_args()
    search = "passages" if chosen.index is None else f"{{type: passages, index: '{chosen.index}'}}"
    with tempfile.TemporaryDirectory() as folder:
        server = Server(chosen.run, {"search": search, "conversations": f"{folder}/conversations.sqlite",
                                     "port": free_port()}).start()
        try:
            names = [name for name in PICTURES if chosen.out or name != "phone-light"]
            take(server.wait_until_ready(), chosen.question, chosen.out or DOCS, names)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
