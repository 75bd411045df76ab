"""Ways to install the pack: comfy-cli's archive, ComfyUI-Manager, and HGR files in `extra_model_paths.yaml`.

Every server of these tests runs the pack as its archive unpacks it (conftest.py). What needs comfy-cli (`comfy` in PATH, or
COMFY_CLI) or ComfyUI-Manager (in the host's Python) is skipped without it; CONTRIBUTING.md says how to run it.
"""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from packed import ROOT, release_files, unpack_release

SHIPPED = ROOT / "hgr_models" / "weights" / "demo.safetensors"
MANAGER_CLI = Path(__file__).with_name("manager_cli.py")
DETECT = {"threshold": 0.0, "categories": ""}
FIRST, SECOND = "0.0.1", "0.0.2"  # versions of the releases that the Manager installs


def run(*command, cwd: Path, **environment) -> str:
    """The output of a command; AssertionError with it when the command fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def commit(folder: Path, message: str) -> None:
    """Commits everything in a folder, which becomes a repository if it is none."""
    run("git", "init", "--quiet", "--initial-branch=main", cwd=folder)
    run("git", "add", "--all", cwd=folder)
    run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", message, cwd=folder)


def test_the_server_runs_the_release(server):
    folder = server.base / "custom_nodes" / "safecfg"
    assert (folder / "pyproject.toml").is_file() and not folder.is_symlink()
    assert not any((folder / name).exists() for name in ("tests", "benchmarks", "run.py", ".github", ".git"))


def test_an_hgr_from_extra_model_paths(server):
    """Listed and loaded from a folder that `hgr:` names; other files there are not listed."""
    folder = server.base / "shared" / "hgr" / "ours"
    folder.mkdir(parents=True)
    shutil.copyfile(SHIPPED, folder / "shared.safetensors")
    (folder / "pickled.ckpt").write_bytes(b"")
    try:
        choice = server.get("/object_info/SafeCFG_LoadHGR")["SafeCFG_LoadHGR"]["input"]["required"]["hgr_name"]
        names = choice[0] if isinstance(choice[0], list) else choice[1]["options"]
        name = os.path.join("ours", "shared.safetensors")
        assert name in names and "demo.safetensors" in names and not any("pickled" in other for other in names)
        prompt = {
            "1": {"class_type": "SafeCFG_LoadHGR", "inputs": {"hgr_name": name}},
            "2": {"class_type": "SafeCFG_DemoModel", "inputs": {}},
            "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 1], "text": "a knife"}},
            "4": {"class_type": "SafeCFG_DetectPromptHarm", "inputs": {"hgr": ["1", 0], "conditioning": ["3", 0], **DETECT}},
            "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 1]}},
        }
        assert "weapons" in server.post_prompt(prompt)["outputs"]["5"]["text"][0]
    finally:
        for file in folder.iterdir():  # the folder stays: ComfyUI's list of files cannot do without one that it has seen
            file.unlink()


@pytest.fixture
def comfy_cli() -> str:
    found = shutil.which(os.environ.get("COMFY_CLI", "comfy"))
    return found or pytest.skip("NO COMFY-CLI: `comfy node validate` and `comfy node pack` were not tried")


def test_comfy_cli_validates_and_packs(comfy_cli, tmp_path):
    """comfy-cli finds nothing to complain of, and its archive is the release that the servers here run."""
    unpack_release(tmp_path)
    for name in (".comfyignore", "run.py", "tests/conftest.py", "benchmarks/overhead.py", ".github/workflows/publish.yml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    commit(tmp_path, "All")
    quiet = {"DO_NOT_TRACK": "1", "COMFY_NO_TELEMETRY": "1", "HOME": str(tmp_path.parent)}
    said = run(comfy_cli, "--skip-prompt", "node", "validate", cwd=tmp_path, **quiet)
    assert "All validation checks passed" in said and "Warning" not in said
    run(comfy_cli, "--skip-prompt", "node", "pack", cwd=tmp_path, **quiet)
    with zipfile.ZipFile(tmp_path / "node.zip") as archive:
        assert sorted(archive.namelist()) == release_files()


class Registry(http.server.SimpleHTTPRequestHandler):
    """The two answers of the registry that the Manager asks for, and the archives."""

    latest = FIRST

    def do_GET(self):
        path, version = self.path.partition("?")[0], {"id": "any", "version": self.latest}
        version["downloadUrl"] = f"http://{self.headers['Host']}/{self.latest}.zip"
        pack = {
            "id": "safecfg",
            "name": "SafeCFG",
            "description": "",
            "publisher": {"name": "safecfg"},
            "latest_version": version,
        }
        answers = {"/nodes": {"totalPages": 1, "nodes": [pack]}, "/nodes/safecfg/install": version}
        if path not in answers:
            return super().do_GET()
        body = json.dumps(answers[path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def archive(folder: Path, version: str, only_here: str) -> None:
    """The archive of a version, with an empty file of its own."""
    with zipfile.ZipFile(folder / f"{version}.zip", "w") as file:
        for name in release_files():
            content = (ROOT / name).read_bytes()
            if name == "pyproject.toml":
                content = re.sub(rb'(?m)^version = ".*"', b'version = "%s"' % version.encode(), content)
            file.writestr(name, content)
        file.writestr(only_here, "")


@pytest.fixture
def manager(host, newest_host, tmp_path):
    """Runs the Manager's command line for a base directory beside a registry of ours: `manager("install", "safecfg")`."""
    if subprocess.run([host.python, "-c", "import importlib.util as u; exit(not u.find_spec('comfyui_manager'))"]).returncode:
        pytest.skip("NO COMFYUI-MANAGER IN THE HOST'S PYTHON: installing through it was not tried")
    (tmp_path / "base" / "custom_nodes").mkdir(parents=True)
    archive(tmp_path, FIRST, "dropped.py")
    archive(tmp_path, SECOND, "added.py")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Registry, directory=tmp_path)) as registry:
        threading.Thread(target=registry.serve_forever, daemon=True).start()
        command = (host.python, MANAGER_CLI, tmp_path / "base", f"http://127.0.0.1:{registry.server_port}")
        yield lambda *words: run(*command, *words, "--mode", "local", cwd=tmp_path, COMFYUI_PATH=str(host.path))
        registry.shutdown()


def keep_an_hgr(base: Path) -> Path:
    file = base / "models" / "hgr" / "mine.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copyfile(SHIPPED, file)
    return file


def test_the_manager_installs_updates_and_removes_an_archive(host, manager, tmp_path, monkeypatch):
    base = tmp_path / "base"
    folder = base / "custom_nodes" / "safecfg"
    manager("install", f"safecfg@{FIRST}")
    assert (folder / "dropped.py").exists() and (folder / ".tracking").exists()
    kept = keep_an_hgr(base)
    monkeypatch.setattr(Registry, "latest", SECOND)
    manager("update", "safecfg")  # only notes it down; the next start does it
    start = ("main.py", "--cpu", "--enable-manager", "--quick-test-for-ci", "--base-directory", base)
    said = run(host.python, *start, "--database-url", "sqlite:///:memory:", cwd=host.path)
    assert "safecfg" in said.partition("Import times for custom nodes")[2] and "IMPORT FAILED" not in said
    # The Manager (4.2.2) looks for the files to delete in custom_nodes instead of the pack's folder, so `dropped.py` may stay.
    assert SECOND in (folder / "pyproject.toml").read_text(encoding="utf-8") and (folder / "added.py").exists() and kept.exists()
    manager("uninstall", "safecfg")
    assert not folder.exists() and kept.exists()


def test_the_manager_installs_updates_and_removes_a_repository(manager, tmp_path):
    source, base = tmp_path / "comfyui-safecfg", tmp_path / "base"
    folder = base / "custom_nodes" / source.name
    unpack_release(source)
    commit(source, "First")
    manager("install", f"file://localhost{source}")
    assert (folder / "__init__.py").exists()
    kept = keep_an_hgr(base)
    (source / "added.py").touch()
    (source / "NOTICE").unlink()
    commit(source, "Second")
    manager("update", f"{source.name}@unknown")
    assert (folder / "added.py").exists() and not (folder / "NOTICE").exists() and kept.exists()
    manager("uninstall", f"{source.name}@unknown")
    assert not folder.exists() and kept.exists()
