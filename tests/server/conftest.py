"""A server per host; one process serves every test of a host."""

import pytest

from comfy_server import PromptError, Server
from front_end import ARGUMENTS, NO_BROWSER, find_chromium


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    """The running server of a host; SIGTERM at the end."""
    server = Server(host, tmp_path_factory.mktemp("comfyui"))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def prompt_error() -> type[PromptError]:
    """What `server.post_prompt` raises."""
    return PromptError


@pytest.fixture(scope="session")
def newest_host(host):
    """Tests that ask for it run on the newest host alone (tests/conftest.py)."""
    return host


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window. Skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason=NO_BROWSER)
    if (program := find_chromium()) is None:
        pytest.skip(NO_BROWSER)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()
