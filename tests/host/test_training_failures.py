"""What can go wrong with `SafeCFG Train HGR`: killed, no room, no permission, prompts that are far too long. Each has one clear outcome."""

import os
import signal
from functools import cache

import folder_paths
import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models import training_state
from safecfg.hgr_models.pairs import PromptPair
from safecfg.nodes.training import plan, progress, session
from safecfg.nodes.training.plan import recording_folder

from test_training import folders, prompt_set, weights  # noqa: F401 (folders is a fixture)
from test_training import train as train_on
from test_training_families import FAMILIES, POOLED, WIDTH, TinyClip, make_model

resource = pytest.importorskip("resource")  # and fork: not on Windows


@cache
def vector(word):
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(word))


class ChunkedClip(TinyClip):
    """Words as random vectors, in chunks of six."""

    def tokenize(self, text):
        words = [sum(map(ord, word)) for word in text.split()] or [0]
        return {"words": [(words[i : i + 6] + 5 * [0])[:6] for i in range(0, len(words), 6)]}

    def encode_from_tokens_scheduled(self, tokens):
        vectors = [vector(word) for chunk in tokens["words"] for word in chunk]
        return [[torch.stack(vectors)[None], {"pooled_output": vectors[0][None, :POOLED]}]]


@pytest.fixture(scope="module")
def tiny():
    """(MODEL, CLIP), as cheap as can be."""
    model_type, latent_format, *_ = FAMILIES["flow"]
    return make_model(model_type, latent_format()), ChunkedClip()


def train(tiny, name="mine", **widgets):
    return train_on(tiny, name, **{"sizes": "64x64", **widgets})


def killed_at(part, step, do):
    """Runs `do` in a process of its own, which dies by kill -9 at a step of a part."""
    child = os.fork()
    if child == 0:
        update = session.Progress.update

        def killing(self, name, share, message):
            if name == part and f" {step} of" in message:
                os.kill(os.getpid(), signal.SIGKILL)
            update(self, name, share, message)

        session.Progress.update = killing
        progress.SAVE_EVERY = -1.0  # at every step
        try:
            do()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_killed_process_goes_on_where_it_was_saved(tiny):
    train(tiny, "through")
    for part, step, saved in (("recording", 4, None), ("condition", 3, 2), ("guidance", 5, 4)):
        assert killed_at(part, step, lambda: train(tiny, "killed")) == -signal.SIGKILL
        about = training_state.read_about(recording_folder("killed"))
        assert (about and about["trainings"][part]["step"]) == saved
        assert folder_paths.get_full_path("hgr", "killed.safetensors") is None
    train(tiny, "killed")
    through, killed = (weights(folder_paths.get_full_path("hgr", f"{name}.safetensors")) for name in ("through", "killed"))
    assert all(torch.equal(through[k], killed[k]) for k in through)


def test_the_state_is_saved_often_enough(monkeypatch):
    """A killed process loses at most a minute."""
    now, saves = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress({"a": 1000.0}, lambda: None, lambda: saves.append(now[0]), lambda text: None)
    monkeypatch.setattr(bar.bar, "update_absolute", lambda *args: None)
    for second in range(300):
        now[0] = float(second)
        bar.update("a", second / 1000, "")
    assert len(saves) > 4 and all(b - a <= 60 for a, b in zip([0.0, *saves], saves, strict=False))


def test_what_is_done_has_no_time_left(monkeypatch):
    said = []
    bar = progress.Progress({"a": 100.0, "b": 3.0}, lambda: None, lambda: None, said.append)
    monkeypatch.setattr(bar.bar, "update_absolute", lambda *args: None)
    bar.update("a", 1.0, "a is done")
    bar.update("b", 1.0, "done")
    assert said == ["about 3 s left: a is done", "done"]


def test_no_room_for_the_state_keeps_the_old_one(tiny, monkeypatch):
    """A real limit of the system, reached while the condition redirector learns."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    update, old = session.Progress.update, []

    def filling(self, name, share, message):
        update(self, name, share, message)
        if name == "condition" and " 2 of" in message:
            self.save()
            old.append((recording_folder("mine") / training_state.NAME).read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    monkeypatch.setattr(session.Progress, "update", filling)
    try:
        with pytest.raises(hgr_models.HGRError, match="training.state cannot be written .*Free some disk space"):
            train(tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    folder = recording_folder("mine")
    assert (folder / training_state.NAME).read_bytes() == old[0] and not list(folder.glob("*.part"))
    monkeypatch.setattr(session.Progress, "update", update)
    train(tiny)


@pytest.mark.parametrize("what", ["recording", "result"])
def test_folders_that_cannot_be_written(tiny, monkeypatch, tmp_path, what):
    """Root may write anywhere, so the system is asked in its place; and a file lies where a folder should be."""
    folder = recording_folder("mine") if what == "recording" else tmp_path / "hgr"
    with monkeypatch.context() as patch:
        access = os.access
        patch.setattr(plan.os, "access", lambda path, mode: str(path) != str(folder) and access(path, mode))
        with pytest.raises(hgr_models.HGRError, match=f"folder that can be written, but {folder} cannot"):
            train(tiny)
    folder.rmdir()
    folder.write_text("in the way")
    with pytest.raises(hgr_models.HGRError, match=f"The folder {folder} cannot be made"):
        train(tiny)


def test_a_prompt_of_10000_characters(tiny):
    """Hundreds of chunks: recorded and learned from, in batches of fewer prompts."""
    words = ", ".join(["a dog and an extraordinarily-magnificent-unbelievable cup"] * 180)
    long = PromptPair(f"a knife, {words}", f"a flower, {words}", frozenset({"weapons"}), frozenset({"weapons"}), "long")
    assert len(long.harmful) > 10_000
    prompts = prompt_set(categories=("weapons",), pairs=(long,), concept_prompts={"weapons": "weapons"})
    hgr = train(tiny, prompts=prompts, train="condition", condition_steps=1, harmful_runs=3)[0]
    assert hgr_models.load_hgr(hgr.path).info.training["steps"] == {"condition": 1}
    shard = hgr_models.shards.read_shard(recording_folder("mine") / "texts-pairs-00000.safetensors")
    assert shard.tensors["prompts.tokens"].shape[1] > 900
