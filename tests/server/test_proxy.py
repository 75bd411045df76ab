"""SECURITY.md's nginx.conf, as it stands there, in front of a real server that enforces SafeCFG; `PROXY=1`, needs nginx and openssl, and root.

Only names that no test has are replaced: the server's address, the certificates' folder, the port.
"""

import base64
import json
import re
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import redteam
from redteam import SAVED, base, ksampler, node

ROOT = Path(__file__).parents[2]
USER, PASSWORD = "anna", "right"
BOUNDARY = "0123456789"


def recipe(name: str) -> str:
    """A file of the recipe in SECURITY.md, which says its name in its first line."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    block = re.search(rf"^    # {re.escape(name)}\n((?:    .*\n|\n(?=    ))*)", text, re.MULTILINE)
    return "\n".join(line[4:] for line in block[1].splitlines())


@pytest.fixture(scope="module")
def service(host, newest_host, tmp_path_factory):
    found = redteam.start(host, tmp_path_factory.mktemp("behind_a_proxy"))
    try:
        yield found
    finally:
        found.stop()


def make_certificates(folder: Path) -> None:
    folder.mkdir()
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "full.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", *files], check=True
    )
    line = subprocess.run(["openssl", "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True).stdout.strip()
    (folder / "users").write_text(f"{USER}:{line}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def proxy(service, tmp_path_factory):
    """The proxy's address."""
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx")
    folder = tmp_path_factory.mktemp("nginx")
    make_certificates(folder / "certificates")
    port = int(service.url.rpartition(":")[2]) + 1
    text = recipe("nginx.conf").replace("http://comfyui:8188", service.url).replace("/certificates/", f"{folder}/certificates/")
    text = text.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    around = f"daemon off; user root; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(f"{around}http {{\naccess_log {folder}/access.log;\n{text}\n}}\n", encoding="utf-8")
    process = subprocess.Popen(["nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder)])
    try:
        for _ in range(100):
            if asked(f"https://127.0.0.1:{port}", "/queue")[0] == 200:
                break
            assert process.poll() is None, (folder / "error.log").read_text()
            time.sleep(0.1)
        else:
            pytest.fail((folder / "error.log").read_text())
        yield f"https://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def asked(url: str, path: str, body: bytes | None = None, kind: str = "application/json", password: str = PASSWORD, method=None):
    """(status, body) of a request with a password; status 0: nobody answers."""
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    request = urllib.request.Request(url + path, body, {"Content-Type": kind}, method=method)
    request.add_header("Authorization", "Basic " + base64.b64encode(f"{USER}:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=60, context=trust) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (urllib.error.URLError, OSError):
        return 0, b""


def form(**fields) -> tuple[bytes, str]:
    """An upload as a browser sends it."""
    parts = [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    file = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="x.safetensors"\r\n\r\nweights\r\n--{BOUNDARY}--\r\n'
    return ("".join(parts) + file).encode(), f"multipart/form-data; boundary={BOUNDARY}"


def test_normal_use_works(service, proxy):
    """Queue a prompt, follow it, fetch its picture."""
    prompt = base(
        n2=node("CLIPTextEncode", clip=["1", 1], text="a frog"),
        n3=node("CLIPTextEncode", clip=["1", 1], text=""),
        n4=node("EmptyLatentImage", width=128, height=128, batch_size=1),
        n8=ksampler(cfg=5.0, steps=3),
    )
    status, said = asked(proxy, "/prompt", json.dumps({"prompt": prompt}).encode())
    assert status == 200
    number = json.loads(said)["prompt_id"]
    for _ in range(600):
        if entry := json.loads(asked(proxy, f"/history/{number}")[1]).get(number):
            break
        time.sleep(0.2)
    assert entry["status"]["status_str"] == "success"
    (picture,) = entry["outputs"][SAVED]["images"]
    status, data = asked(proxy, f"/view?filename={picture['filename']}&type=output&subfolder={picture['subfolder']}")
    assert status == 200 and data.startswith(b"\x89PNG")
    assert asked(proxy, "/object_info/SafeCFG_Enforced")[0] == 200


def test_a_refusal_comes_through_with_its_code(proxy):
    status, said = asked(proxy, "/prompt", json.dumps({"prompt": {"1": node("SafeCFG_TrainHGR", name="demo")}}).encode())
    assert status == 400 and json.loads(said)["error"]["code"] == "node-not-allowed"


@pytest.mark.parametrize(
    "path", ["/upload/image", "/upload/mask", "/api/upload/image", "//upload/image", "/view/../upload/image", "/%75pload/image"]
)
def test_nothing_is_uploaded_through_it(service, proxy, path):
    """Whatever the form says; ComfyUI itself takes it."""
    body, kind = form(type="output", subfolder="loras")
    assert asked(proxy, path, body, kind)[0] in (403, 404, 405)
    assert not (service.base / "output" / "loras").exists()


def test_the_server_alone_takes_such_an_upload(service):
    """What the proxy is for; enforcement then still refuses the file."""
    body, kind = form(type="output", subfolder="loras2")
    assert asked(service.url, "/upload/image", body, kind)[0] == 200 and (service.base / "output" / "loras2").is_dir()


@pytest.mark.parametrize(
    ("path", "method"),
    [("/", "GET"), ("/queue", "POST"), ("/interrupt", "POST"), ("/history/1", "POST"), ("/free", "POST"), ("/userdata/x", "GET"),
     ("/settings", "GET"), ("/system_stats", "GET"), ("/history", "GET"), ("/api/prompt", "POST"), ("/object_info", "POST")],
)  # fmt: skip
def test_everything_else_is_closed(proxy, path, method):
    assert asked(proxy, path, b"{}" if method == "POST" else None, method=method)[0] == 403


def test_without_the_password_nothing_is_answered(proxy):
    assert [asked(proxy, path, password="wrong")[0] for path in ("/queue", "/", "/prompt")] == [401, 403, 401]


def test_the_compose_file_names_what_is_there():
    text = recipe("compose.yaml")
    check = re.search(r'test: \["CMD", "python", "-c", "(.*)"\]', text)[1]
    compile(check, "healthcheck", "exec")
    assert "/object_info/SafeCFG_Enforced" in check and "./nginx.conf:" in text and "SAFECFG_ENFORCE" in text
