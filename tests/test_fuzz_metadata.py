"""Hostile metadata of recordings, training states, LoRAs and their samples: our own errors, and no memory for what a file only claims."""

import json
import struct

import pytest
import torch
from safetensors.torch import save
from torch import nn

from fuzzing import CASES, as_json, damaged, fuzz, header_of, mutated, odd_text, peak_megabytes, safetensors_bytes
from hgr_models import HGR, HGRError, training_state
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig
from hgr_models.hgr import uncalibrated_info
from hgr_models.lora import KEY as LORA_KEY
from hgr_models.lora import LoraSettings, load_lora, lora_from, new_lora
from hgr_models.lora_samples import Samples, read_samples, write_samples
from hgr_models.metadata import check_facts, facts_problem
from hgr_models.recording import Points, Prompts
from hgr_models.shards import HARMFUL, KEY, read_shard, write_runs
from hgr_models.training import Training

FACTS = {
    "categories": ["weapons", "drugs"], "latent_format": "SD15", "latent_channels": 4, "latent_dimensions": 2, "prediction": "EPS",
    "token_width": 5, "pooled_width": 4, "guidance_levels": [-3.5, -1.0, 1.5], "concept_prompts": {"drugs": "pills"}, "prompts": "x",
    "base": "y", "short_width": 3,
}  # fmt: skip
SIZES = [0, -1, 1, 3, 7, 64, 4096, 30000, 65536, 10**6, 10**9, 10**18, 10**400, 1.5, "8", True, None, []]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def shard(folder) -> bytes:
    x, ones = torch.randn(6, 4, 2, 2), torch.ones(2, 2)
    prompts = Prompts(torch.randn(2, 3, 5), None, None, ones, ones, torch.randn(2, 4), torch.ones(2, 3))
    points = Points(x, torch.ones(6), torch.ones(6), x, x, x, torch.zeros(6, 2), torch.arange(6) % 2)
    write_runs(folder / "shard.safetensors", HARMFUL, points, prompts, FACTS)
    return (folder / "shard.safetensors").read_bytes()


def build(facts) -> HGR:
    """What a training builds from a recording's facts."""
    info, k = uncalibrated_info(facts), len(facts["categories"])
    condition = ConditionConfig(info.token_width, k, info.pooled_width, width=8, depth=1, delta_depth=1, heads=1)
    return HGR(info, condition, GuidanceConfig(info.latent_channels, k, info.latent_dimensions, width=8, read_depth=1, heads=1))


def test_facts_of_a_recording(folder, shard):
    """Nothing is built that its columns do not have: 68 KiB once took 3.8 GiB."""
    header, data = header_of(shard)
    good, path = json.loads(header["__metadata__"][KEY]), folder / "facts.safetensors"
    check_facts(FACTS)
    assert facts_problem(FACTS) == "" and build(read_shard(folder / "shard.safetensors").about).info.token_width == 5

    def make(rng):
        changed = json.loads(json.dumps(good))
        if rng.random() < 0.5:
            for _ in range(rng.randint(1, 3)):
                changed["about"][rng.choice(sorted(FACTS))] = rng.choice(SIZES)
        else:
            changed = mutated(rng, changed, rng.choice((0.02, 0.08, 0.3)))
        text = as_json(changed) if rng.random() < 0.97 else "[" * rng.randint(1, 200_000)
        path.write_bytes(safetensors_bytes({**header, "__metadata__": {KEY: text}}, data))
        return lambda: build(read_shard(path).about)

    assert 0 < fuzz("facts", make) < CASES["facts"]


WRONG = [
    ("latent_channels", 30000), ("token_width", 65536), ("categories", ["x"] * 2), ("categories", ["a", "b", "c"]), ("pooled_width", 0),
    ("latent_dimensions", 3), ("short_width", 5), ("guidance_levels", [True]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_facts_that_are_not_the_columns_are_refused(folder, shard, name, value):
    header, data = header_of(shard)
    about = json.loads(header["__metadata__"][KEY])
    about["about"][name] = value
    path, before = folder / "claim.safetensors", peak_megabytes()
    path.write_bytes(safetensors_bytes({**header, "__metadata__": {KEY: json.dumps(about)}}, data))
    with pytest.raises(HGRError, match="claim.safetensors is damaged"):
        read_shard(path)
    assert peak_megabytes() - before < 16


def test_facts_of_prompts_alone():
    alone = {**FACTS, "latent_format": "", "latent_channels": 0, "prediction": ""}
    check_facts(alone)
    assert uncalibrated_info({**alone, "short_width": 0}).of_prompts
    with pytest.raises(HGRError, match="channels of SD15 latents"):
        check_facts({**FACTS, "latent_channels": 0})


def test_facts_that_are_missing():
    for name in ("categories", "latent_channels", "prediction", "guidance_levels"):
        with pytest.raises(HGRError, match=f"does not say its {name}"):
            uncalibrated_info({key: value for key, value in FACTS.items() if key != name})
    with pytest.raises(HGRError, match="an object"):
        uncalibrated_info([])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def stepped(steps: int = 2) -> Training:
    training = Training(network(), 9, 1e-3, 0.9, 1)
    for _ in range(steps):
        training.advance(training.network(torch.ones(1, 3)).sum())
    return training


def test_states_of_trainings(folder):
    training_state.save_state(folder, {"guidance": stepped()}, {"digest": "d", "history": [{"loss": 1.0}], "facts": FACTS})
    path = folder / training_state.NAME
    good = path.read_bytes()
    header, data = header_of(good)
    about = json.loads(header["__metadata__"][training_state.KEY])
    names = [name for name in header if name != "__metadata__"]

    def use():
        found = training_state.read_about(folder)
        assert isinstance(found["digest"], str) and isinstance(found["history"], list)
        training = stepped(0)
        training_state.load_state(folder, "guidance", training, found)
        training.advance(training.network(torch.ones(1, 3)).sum())
        assert all(p.isfinite().all() for p in training.network.parameters())

    def make(rng):
        kind = rng.random()
        if kind < 0.3:
            path.write_bytes(damaged(rng, good, struct.unpack("<Q", good[:8])[0] + 8))
        elif kind < 0.7:
            text = as_json(mutated(rng, about, rng.choice((0.02, 0.1, 0.3))))
            path.write_bytes(safetensors_bytes({**header, "__metadata__": {training_state.KEY: text}}, data))
        else:
            path.write_bytes(safetensors_bytes(_other_tensors(rng, header, names, len(data)), data))
        return use

    try:
        assert 0 < fuzz("states", make) < CASES["states"]
    finally:
        path.write_bytes(good)
    use()


def _other_tensors(rng, header: dict, names: list[str], size: int) -> dict:
    changed = {name: dict(entry) if name != "__metadata__" else entry for name, entry in header.items()}
    for name in rng.sample(names, min(len(names), rng.randint(1, 3))):
        what = rng.randrange(5)
        if what == 0:
            changed[name]["dtype"] = rng.choice(["F16", "F32", "F64", "I64", "U8", "BOOL", "x"])
        elif what == 1:
            changed[name]["shape"] = rng.choice(
                [[], [0], [2**40, 2**40], [10**12], [-1], [1, 1], list(reversed(changed[name]["shape"]))]
            )
        elif what == 2:
            changed[name]["data_offsets"] = rng.choice([[0, 2**62], [5, 3], [size, size], [0, size]])
        elif what == 3:
            changed.pop(name)
        else:
            changed[odd_text(rng) or "x"] = changed[name]
    return changed


def test_loras(folder):
    net = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 3, 3))
    tensors = new_lora(net, LoraSettings(2, 2.0, "linear and conv"), 1).tensors()
    good = save(
        {k: v.contiguous() for k, v in tensors.items()}, {"format": "pt", LORA_KEY: json.dumps({"digest": "d", "steps": 3})}
    )
    header, data = header_of(good)
    path, names = folder / "lora.safetensors", list(tensors)

    def use():
        found, about = load_lora(path)
        assert isinstance(about, dict)
        lora = lora_from(found)
        for adapter in lora.adapters:
            assert adapter.up.isfinite().all() and adapter.down.isfinite().all()

    def make(rng):
        kind = rng.random()
        if kind < 0.3:
            path.write_bytes(damaged(rng, good, struct.unpack("<Q", good[:8])[0] + 8))
        elif kind < 0.5:
            text = as_json(mutated(rng, {"digest": "d", "steps": 3}, 0.3))
            path.write_bytes(safetensors_bytes({**header, "__metadata__": {"format": "pt", LORA_KEY: text}}, data))
        else:
            path.write_bytes(safetensors_bytes(_other_tensors(rng, header, names, len(data)), data))
        return use

    assert 0 < fuzz("LoRAs", make) < CASES["LoRAs"]


@pytest.mark.parametrize(("up", "down", "alpha"), [
    (torch.zeros(4, 2), torch.zeros(3, 3), torch.ones(())), (torch.zeros(4, 2), torch.zeros(2, 3, 1), torch.ones(())),
    (torch.zeros(4, 0), torch.zeros(0, 3), torch.ones(())), (torch.zeros(4, 2), torch.zeros(2, 3), torch.ones(2)),
    (torch.zeros(4, 2).long(), torch.zeros(2, 3), torch.ones(())), (torch.full((4, 2), float("nan")), torch.zeros(2, 3), torch.ones(())),
])  # fmt: skip
def test_adapters_that_cannot_be(up, down, alpha):
    prefix = "diffusion_model.x"
    with pytest.raises(HGRError, match="impossible adapter"):
        lora_from({f"{prefix}.lora_up.weight": up, f"{prefix}.lora_down.weight": down, f"{prefix}.alpha": alpha})


def test_samples(folder):
    x = torch.randn(6, 4, 2, 2)
    path = folder / "samples.safetensors"
    write_samples(
        path, Samples(x, torch.ones(6), torch.ones(6), 0.5 * x, torch.randn(4, 3, 5), torch.randn(4, 2), torch.ones(4, 3))
    )
    good = path.read_bytes()
    header, data = header_of(good)
    names = [name for name in header if name != "__metadata__"]

    def use():
        samples = read_samples(path)
        assert len(samples.x) % samples.prompts == 0 and samples.x.isfinite().all()

    def make(rng):
        if rng.random() < 0.4:
            path.write_bytes(damaged(rng, good, struct.unpack("<Q", good[:8])[0] + 8))
        else:
            path.write_bytes(safetensors_bytes(_other_tensors(rng, header, names, len(data)), data))
        return use

    use()
    assert fuzz("samples", make) < CASES["samples"]
