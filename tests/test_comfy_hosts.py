import pytest

from comfy_hosts import NO_HOST, count_by_host, describe, find_hosts, python_of


def checkout(path, version=None):
    path.mkdir(parents=True)
    (path / "main.py").touch()
    if version:
        (path / "comfyui_version.py").write_text(f'# generated\n__version__ = "{version}"\n', encoding="utf-8")
    return path


def environment(path):
    python = python_of(path)
    python.parent.mkdir(parents=True)
    python.touch()
    return python


def test_every_checkout_under_home_with_the_environment_of_its_suffix(tmp_path):
    new, old = checkout(tmp_path / "comfy/ComfyUI", "9.1.0"), checkout(tmp_path / "comfy/ComfyUI-0.3.64", "0.3.64")
    (tmp_path / "comfy/ComfyUI.log").touch()  # no checkout
    pythons = environment(tmp_path / "comfy/venv"), environment(tmp_path / "comfy/venv-0.3.64")
    found = find_hosts({}, tmp_path)
    assert [(h.path, h.python) for h in found] == [(new, pythons[0]), (old, pythons[1])]
    assert [h.name for h in found] == ["ComfyUI-9.1.0", "ComfyUI-0.3.64"]


def test_comfyui_path_wins_over_home(tmp_path):
    checkout(tmp_path / "comfy/ComfyUI")
    other = checkout(tmp_path / "elsewhere")
    (host,) = find_hosts({"COMFYUI_PATH": str(other), "COMFYUI_PYTHON": "/some/python"}, tmp_path)
    assert (host.path, str(host.python), host.name) == (other, "/some/python", "elsewhere")


@pytest.mark.parametrize("place", ["ui/.venv", "ui/venv"])
def test_environment_inside_the_checkout(tmp_path, place):
    root = checkout(tmp_path / "ui")
    python = environment(tmp_path / place)
    assert find_hosts({"COMFYUI_PATH": str(root)}, tmp_path)[0].python == python


def test_wrong_comfyui_path_is_an_error_and_not_a_skip(tmp_path):
    with pytest.raises(FileNotFoundError, match="main.py"):
        find_hosts({"COMFYUI_PATH": str(tmp_path)}, tmp_path)


class Report:
    def __init__(self, **about):
        self.user_properties = list(about.items())


def test_counts_inner_tests_and_server_tests_per_host():
    reports = [
        ("passed", Report(host="A", inner={"passed": 3, "skipped": 1})),
        ("failed", Report(host="A", inner={"passed": 1, "failed": 2})),
        ("passed", Report(host="B")),
        ("passed", Report()),
        ("skipped", Report()),
    ]
    counts = count_by_host(reports)
    assert counts == {"A": {"passed": 4, "skipped": 1, "failed": 2}, "B": {"passed": 1}}
    line = describe(counts, found=True)
    assert line.startswith("host tests ran: 7 (5 passed, 2 failed, 1 skipped)") and "B: 1 passed" in line


def test_no_host_is_said_loudly():
    assert describe({}, found=False) == f"host tests ran: 0 (none) | {NO_HOST}"
    assert NO_HOST not in describe({}, found=True)
