"""Files appear whole or not at all, also on a disk without room (a real limit of the system) and where no folder can be."""

import os
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from hgr_models import HGRError
from hgr_models.files import STALE, write_whole

resource = pytest.importorskip("resource")


def test_written_with_its_folder_and_replaced(tmp_path):
    path = tmp_path / "a" / "b.safetensors"
    for value in (1.0, 2.0):
        write_whole(path, {"x": torch.full((2, 3), value).t()}, {"key": "text"})
    assert load_file(path)["x"].eq(2.0).all() and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_it_has_the_rights_of_the_users_other_files(tmp_path, mask):
    """Models are shared: by users of a machine, and by containers whose users have other numbers."""
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {})
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


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


def test_writers_of_one_name_do_not_meet(tmp_path):
    """Eight threads, one file: no false error, and what is there is whole at any moment."""
    path, failures = tmp_path / "a.safetensors", []

    def write(value: float):
        try:
            for _ in range(20):
                write_whole(path, {"x": torch.full((2000,), value)}, {})
                found = load_file(path)["x"]
                if not found.eq(found[0]).all():
                    failures.append("torn")
        except HGRError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=write, args=(float(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_removed(tmp_path):
    """After an hour, those of other files too, which nobody may write again; a part that somebody may still be writing stays, and so
    does what is not ours."""
    names = ("a.safetensors.part", ".a.safetensors.1f-0123456789ab.part", ".b.safetensors.1f-0123456789ab.part")
    old = [tmp_path / name for name in names]
    kept = [
        tmp_path / name for name in (".a.safetensors.2f-0123456789ab.part", "b.safetensors.part", ".aa.safetensors.1f-0.part")
    ]
    for file in (*old, *kept):
        file.write_text("x")
    for file in (*old, *kept[1:]):
        os.utime(file, (time.time() - STALE - 60,) * 2)
    write_whole(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.safetensors", *(file.name for file in kept)])
