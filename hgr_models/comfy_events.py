"""What a running ComfyUI says while it works: the texts that nodes show, over its WebSocket. Standard library only."""

import socket
import ssl
import struct
import threading
import urllib.parse
from collections.abc import Callable

CONNECT_SECONDS = 10
CLOSE, BINARY = 8, 2  # kinds of frames
NODE_TEXT = 3  # of core's binary messages: node id and a text
KEY = "AAAAAAAAAAAAAAAAAAAAAA=="  # any; nothing secret is sent


def listen(url: str, client: str, heard: Callable[[str], None]) -> Callable[[], None]:
    """Calls `heard` with every text that a node shows to `client`, from a thread of its own; a function that ends it.

    A server that cannot be listened to is none of the caller's worries: then nothing is heard.
    """
    try:
        stream = _connect(url, client)
    except (OSError, ValueError):
        return lambda: None
    threading.Thread(target=_follow, args=(stream, heard), daemon=True).start()
    return stream.close


def _connect(url: str, client: str) -> socket.socket:
    address = urllib.parse.urlparse(url)
    secure = address.scheme == "https"
    stream = socket.create_connection((address.hostname, address.port or (443 if secure else 80)), timeout=CONNECT_SECONDS)
    if secure:
        stream = ssl.create_default_context().wrap_socket(stream, server_hostname=address.hostname)
    path = f"{address.path.rstrip('/')}/ws?{urllib.parse.urlencode({'clientId': client})}"
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {address.netloc}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {KEY}",
    ]
    stream.sendall("\r\n".join([*lines, "Sec-WebSocket-Version: 13", "", ""]).encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += _exactly(stream, 1)
    if b" 101 " not in head.partition(b"\r\n")[0]:
        raise ValueError("no WebSocket")
    stream.settimeout(None)
    return stream


def _exactly(stream: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = stream.recv(size - len(found))
        if not part:
            raise OSError("closed")
        found += part
    return found


def _follow(stream: socket.socket, heard: Callable[[str], None]) -> None:
    try:
        while True:
            first, size = struct.unpack("!BB", _exactly(stream, 2))
            if size in (126, 127):
                (size,) = struct.unpack("!H" if size == 126 else "!Q", _exactly(stream, 2 if size == 126 else 8))
            body = _exactly(stream, size)
            if first & 15 == CLOSE:
                return
            if first & 15 == BINARY and (text := node_text(body)) is not None:
                heard(text)
    except OSError:
        return  # the server went away, or we did


def node_text(body: bytes) -> str | None:
    """The text of a binary message that shows one on a node; None for another message."""
    if len(body) < 8 or struct.unpack("!I", body[:4])[0] != NODE_TEXT:
        return None
    (length,) = struct.unpack("!I", body[4:8])
    return body[8 + length :].decode("utf-8", errors="replace")
