"""A server per host; one process serves every test of a host."""

import pytest

from comfy_server import PromptError, Server


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
