"""The page behind nginx: as people write it first, and under a prefix."""

import shutil
import subprocess
import time
import urllib.request
from types import SimpleNamespace

import pytest

from tests.browser.conftest import free_port
from tests.browser.test_page import DONE, SHORT, ask

pytestmark = pytest.mark.browser

CONFIG = """
worker_processes 1; daemon off; pid {folder}/pid; error_log stderr;
events {{ worker_connections 64; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    server {{
        listen 127.0.0.1:{port};
        location {prefix} {{ proxy_pass {url}/; }}
    }}
}}
"""


@pytest.fixture
def behind(tmp_path, server):
    """`behind(prefix)` -> the address of the page behind nginx's plain proxy_pass."""
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    running = []

    def start(prefix):
        port = free_port()
        (tmp_path / "nginx.conf").write_text(CONFIG.format(folder=tmp_path, port=port, prefix=prefix,
                                                           url=server.url.rstrip("/")))
        running.append(subprocess.Popen([nginx, "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"]))
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{prefix}health", timeout=5)
                break
            except OSError:
                time.sleep(0.05)
        return SimpleNamespace(url=f"http://localhost:{port}")

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("prefix", ["/", "/chat/"])
def test_a_question_is_answered_behind_a_proxy(open_page, behind, prefix):
    page = open_page(behind(prefix), prefix, settings=SHORT)
    assert page.evaluate("document.fonts.ready.then(() => [...document.fonts].map(f => f.status))") == ["loaded"]
    ask(page, "What does os.path.join do with path segments?")
    page.wait_for_selector(DONE)
    assert page.locator(".card").count() > 0
    page.reload()
    page.wait_for_selector(".answer .actions")
    assert page.url.endswith(f"{prefix}#c/{page.evaluate('location.hash.slice(3)')}")
    page.click("#home", force=True)
    assert page.locator("#conversations a").count() > 0
