"""`SafeCFG Protect` in a real server where things go wrong: a full disk, folders that are links or vanish, a killed server.

Files and graphs are those of `protect_graphs`. `PROTECT=all` kills it in every part of the work.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from comfy_server import Server
from protect_graphs import NONE_YET, graph, made, post, wait_for, write

FEW = {"pairs": 1, "clean": 24, "steps": 2}
MORE = {"pairs": 20, "clean": 200, "steps": 2}
PARTS = {  # what makes a part of the work long, and what the log says of it
    "learning": ({**MORE, "steps": 5000}, "from prompts: step"),
    "checking": ({**MORE, "checked": 500}, "asking the model, run"),
    "encoding": (MORE, "encoding prompts"),
    "calibrating": (MORE, "step 2 of 2"),
}
KILLED = list(PARTS)[: None if os.environ.get("PROTECT") == "all" else 2]


@pytest.fixture(scope="module")
def server(newest_host, tmp_path_factory):
    base = tmp_path_factory.mktemp("trouble")
    write(newest_host, base / "models", ["sd15"])
    server = Server(newest_host, base, [Path(__file__).parent / "small_pack"])
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def empty(server):
    """The server with nothing made or begun, that learns from few prompts."""
    for folder in (server.base / "models" / "hgr", server.base / "shared" / "hgr", recordings(server)):
        for path in folder.glob("*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    forget(server)
    return server


def forget(server) -> None:
    """The server runs every node anew, and learns from few prompts."""
    server.free()  # with the next prompt
    learn(server, FEW)


def learn(server, extent: dict) -> None:
    server.post_prompt({"1": {"class_type": "FewPrompts", "inputs": extent}})


def recordings(server) -> Path:
    return server.base / "output" / "safecfg" / "recordings"


def encoded(server) -> dict[Path, int]:
    """The shards of encoded prompts, and when they were written."""
    return {path: path.stat().st_mtime_ns for path in recordings(server).glob("*/texts-*")}


def begin(server, until: str, seed: int) -> int:
    """Queues a run and waits until the log says something; the log's length before."""
    start = len(server.log())
    post(server, "/prompt", {"prompt": graph("sd15", seed=seed)})
    wait_for(lambda: until in server.log()[start:])
    return start


def end(server) -> None:
    wait_for(lambda: not any(server.get("/queue").values()))


@pytest.fixture
def small_disk():
    """A function that makes a folder a disk of so many bytes, or that disk larger."""
    if os.name == "nt" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root mounts a small disk")
    mounted = []

    def mount(folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        options = f"size={size}" + (",remount" if folder in mounted else "")
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(folder)

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def message(server, prompt: dict, prompt_error) -> str:
    with pytest.raises(prompt_error) as error:
        server.post_prompt(prompt)
    return error.value.details["exception_message"]


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            return folder / "filler"
    raise AssertionError("it took everything")


def test_a_full_disk_is_one_clear_error_and_it_goes_on(empty, small_disk, prompt_error):
    """Full before it begins, for the file and for the prompts; then while prompts are encoded, and when the file is saved."""
    server, folder, shards = empty, empty.base / "models" / "hgr", recordings(empty)
    small_disk(server.base / "shared" / "hgr", 2**16)  # the other folder that it could take
    small_disk(folder, 2**20)
    assert "16 MB of room for an HGR" in message(server, graph("sd15", seed=1), prompt_error)
    small_disk(folder, 2**26)
    small_disk(shards, 2**20)
    assert "but the disk has" in message(server, graph("sd15", seed=2), prompt_error)
    small_disk(shards, 2**28)
    learn(server, {**MORE, "steps": 4})
    start = begin(server, "encoding prompts", 3)
    filler = fill(shards)
    end(server)
    kept = encoded(server)
    assert kept and "cannot be written" in server.log()[start:] and not list(shards.glob("*/.*"))
    filler.unlink()
    start = begin(server, "from prompts: step", 4)
    assert kept.items() <= encoded(server).items()
    filler = fill(folder)
    end(server)
    assert "Free some disk space" in server.log()[start:] and list(folder.iterdir()) == [filler]
    filler.unlink()
    start = len(server.log())
    server.post_prompt(graph("sd15", seed=5))
    assert len(made(server)) == 1 and "from prompts: step" not in server.log()[start:]
    assert not list(shards.glob("*/*"))


def test_models_hgr_may_be_a_link_or_vanish_and_there_may_be_several(empty, tmp_path):
    server, folder, other = empty, empty.base / "models" / "hgr", empty.base / "shared" / "hgr"
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    server.post_prompt(graph("sd15"))
    (name,) = made(server)
    assert (tmp_path / "elsewhere" / name).is_file() and folder.is_symlink()
    folder.unlink()
    forget(server)
    assert "SafeCFG_LoadHGR" in server.object_info()
    start = len(server.log())
    server.post_prompt(graph("sd15", seed=1))
    assert made(server) == [name] and NONE_YET in server.log()[start:]
    other.mkdir(parents=True, exist_ok=True)  # the one of extra_model_paths.yaml
    shutil.move(folder / name, other / name)
    forget(server)
    start = len(server.log())
    server.post_prompt(graph("sd15", seed=2))
    assert made(server) == [] and NONE_YET not in server.log()[start:]


@pytest.mark.parametrize("part", KILLED)
def test_cancelled_and_then_killed_it_goes_on(empty, part):
    """Both in the same part: what was done is kept, and nothing stays behind."""
    server, (extent, words) = empty, PARTS[part]
    learn(server, extent)
    start = begin(server, words, 1)
    post(server, "/interrupt", {})
    end(server)
    kept, steps = encoded(server), steps_in(server.log()[start:])
    assert made(server) == [] and kept
    start = begin(server, words if part in ("learning", "checking") else "takes about", 1)
    log = server.log()[start:]
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    assert made(server) == [] and kept.items() <= encoded(server).items()
    if part == "learning":
        assert min(steps_in(log)) > max(steps)
    elif part != "encoding":
        assert not steps_in(log)
    server.process = server._start()
    server.wait_until_ready()
    learn(server, MORE)
    server.post_prompt(graph("sd15", seed=2))
    assert len(made(server)) == 1 and not list(recordings(server).glob("*/*"))
    assert not list((server.base / "models" / "hgr").glob(".*"))
    assert part == "encoding" or not steps_in(server.log())


def steps_in(log: str) -> list[int]:
    """The steps of learning that a log shows."""
    return [int(step) for step in re.findall(r"from prompts: step (\d+) of", log)]
