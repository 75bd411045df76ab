"""Files appear whole or not at all, also on a disk without room (a real limit of the system) and where no folder can be."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from hgr_models import HGRError
from hgr_models.files import write_whole

resource = pytest.importorskip("resource")


def test_written_with_its_folder_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.safetensors"
    for value in (1.0, 2.0):
        write_whole(path, {"x": torch.full((2, 3), value).t()}, {"key": "text"})
    assert load_file(path)["x"].eq(2.0).all() and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_whole(path, {"x": torch.zeros(10)}, {})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        with pytest.raises(HGRError, match="a.safetensors cannot be written .*Free some disk space"):
            write_whole(path, {"x": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "a").write_text("in the way")
    with pytest.raises(HGRError, match="b.safetensors cannot be written"):
        write_whole(tmp_path / "a" / "b.safetensors", {"x": torch.zeros(1)}, {})
