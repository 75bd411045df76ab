"""A real ComfyUI server with the pack as its archive installs it."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from packed import unpack_release

START_SECONDS, PROMPT_SECONDS = 300, 900  # slow CI machines, one of two cores


class PromptError(RuntimeError):
    """The server refused a prompt (`node_errors` in `details`) or a node failed in it (`exception_message` in `details`)."""

    def __init__(self, message: str, details: dict):
        super().__init__(f"{message}: {json.dumps(details, indent=1)[:4000]}")
        self.details = details


class Server:
    """main.py of a host on a free port, in a temporary base directory; `packs`: folders of other custom nodes to load as well."""

    def __init__(self, host, base: Path, packs: Sequence[Path] = ()):
        self.host, self.base, self.log_file = host, base, base / "server.log"
        unpack_release(base / "custom_nodes" / "safecfg")
        for pack in packs:  # other people's, beside ours
            (base / "custom_nodes" / pack.name).symlink_to(pack.resolve())
        (base / "extra_model_paths.yaml").write_text(f"shared:\n    base_path: {base}\n    hgr: shared/hgr\n", encoding="utf-8")
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True)
        settings.write_text('{"Comfy.TutorialCompleted": true}', encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        command = [str(self.host.python), "main.py", "--cpu", "--port", self.url.rpartition(":")[2]]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--extra-model-paths-config", str(self.base / "extra_model_paths.yaml")]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment.setdefault("OMP_NUM_THREADS", "1")  # the host tests run beside it: threads that wait for each other are slow
        environment.pop("PYTEST_CURRENT_TEST", None)  # some packs do not load in a test
        with self.log_file.open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.host.path, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self) -> None:
        """Returns when the server answers; raises with its log when it ends or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"{self.host.name} did not start (exit status {self.process.poll()}):\n{self.log()[-6000:]}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        """Everything the server has written so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def free(self) -> None:
        """Makes the server forget what it has computed."""
        body = json.dumps({"unload_models": False, "free_memory": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + "/free", body), timeout=60):
            pass

    def object_info(self) -> dict:
        """Every node the server knows, by id."""
        return self.get("/object_info")

    def post_prompt(self, prompt: dict, seconds: float = PROMPT_SECONDS) -> dict:
        """Runs a prompt (API format) and returns its history entry; raises PromptError when it is refused or fails."""
        body = json.dumps({"prompt": prompt}).encode()
        request = urllib.request.Request(self.url + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptError("The server refused the prompt", json.loads(error.read())) from None
        entry = self._wait_for(number, seconds)
        if entry["status"]["status_str"] != "success":
            events = dict(tuple(message) for message in entry["status"]["messages"])
            raise PromptError("The prompt failed", events.get("execution_error", events))
        return entry

    def _wait_for(self, number: str, seconds: float) -> dict:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.host.name} ended with status {self.process.poll()}:\n{self.log()[-6000:]}")
            if entry := self.get(f"/history/{number}").get(number):
                return entry
            time.sleep(0.2)
        raise TimeoutError(f"The prompt did not end within {seconds:.0f} s:\n{self.log()[-6000:]}")

    def files(self, entry: dict, node: str) -> list[Path]:
        """The files that a node of a run wrote (SaveImage, PreviewImage, SaveLatent), in order."""
        outputs = entry["outputs"].get(node, {}).values()
        files = [item for output in outputs for item in output if isinstance(item, dict) and "filename" in item]
        return [self.base / file["type"] / file["subfolder"] / file["filename"] for file in files]
