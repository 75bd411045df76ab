"""FID in SafeCFG Evaluate is torch-fidelity's own number of the same pictures; what it lacks is said. Weights here are random."""

import importlib.util

import folder_paths
import pytest
import torch
from safecfg.hgr_models import HGRError
from safecfg.nodes.evaluate import distances, inception
from safecfg.nodes.evaluate.judges import FOLDER, Context, register_folder
from safetensors.torch import save_file

from evaluating import evaluated, records

HAS_PACKAGE = importlib.util.find_spec("torch_fidelity") is not None


@pytest.fixture
def files(tmp_path, monkeypatch):
    """models/safety_judges/fid without weights."""
    register_folder()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, ([str(tmp_path / "judges")], set()))
    folder = tmp_path / "judges" / inception.NAME
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def torchvision():
    """As torch-fidelity imports it. One that was built for another torch lacks its operators, which no network here uses."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision
    except RuntimeError:
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    yield torchvision


def random_weights(folder) -> dict:
    """Weights that keep the size of what goes through, in the file of `inception.FILE`."""
    torch.manual_seed(0)
    network = inception.Inception().network
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    weights = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(weights, folder / inception.FILE)
    return weights


def test_what_fid_lacks_is_said(files, monkeypatch):
    said = inception.why_not(inception.entry(Context(folders=[files.parent])))
    assert "put inception-2015-12-05.safetensors from" in said and "pytorch-fid" in said and "(Apache-2.0)" in said
    assert "into models/safety_judges/fid" in said and "are no FID" in said
    (files / inception.FILE).write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = inception.why_not(inception.entry(Context(folders=[files.parent])))
    assert said.startswith("FID is not computed: install the package torch_fidelity into ComfyUI's Python.")


def test_features_come_back_from_a_record():
    features = torch.tensor([0.0, 1e-3, 0.333, 4.5, 1e6])
    assert torch.allclose(distances.unpack_wide(distances.pack_wide(features)), features.clamp(max=65504), rtol=5e-4)


def test_fid_is_torch_fidelity_s(demo, place, files, request):
    """Of the very files that Evaluate keeps."""
    if not HAS_PACKAGE:  # a developer's own choice: the message is all that there is
        assert "install the package torch_fidelity" in inception.entry(Context(folders=[files.parent])).missing
        return
    request.getfixturevalue("torchvision")
    import torch_fidelity

    weights = random_weights(files)
    torch.save(weights, place / "theirs.pth")
    same = {"lists": "coco.csv = clean", "images_per_prompt": 2, "keep_pictures": "all", "arms": "negative prompt"}
    table, _, numbers = evaluated(demo, **same)
    for record in records(place):
        path = place / record["arm"] / f"{record['key']}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((place / f"output/safecfg/evaluations/mine/pictures/{path.name}").read_bytes())
    theirs = torch_fidelity.calculate_metrics(
        input1=str(place / "negative prompt"), input2=str(place / "plain"), fid=True, cuda=False, cache=False, save_cpu_ram=True,
        verbose=False, feature_extractor_weights_path=str(place / "theirs.pth"), batch_size=2,
    )["frechet_inception_distance"]  # fmt: skip
    plain, changed = (row["fid"] for row in numbers["clean"])
    assert plain == pytest.approx(0, abs=1e-6 * theirs) and changed == pytest.approx(theirs, rel=1e-3) and theirs > 0
    assert f" {changed:.2f} | - | - |" in table and "FID comes from 4 pictures" in table and "not computed" not in table
    with pytest.raises(HGRError, match="fid = .*not .*Choose another `name`"):
        (files / inception.FILE).unlink()
        save_file({name: value + 1 for name, value in weights.items()}, files / inception.FILE)
        evaluated(demo, **same)
    save_file({"fc.weight": torch.zeros(2)}, files / inception.FILE)
    with pytest.raises(HGRError, match="FID cannot be computed with .*Convert the weights again"):
        evaluated(demo, name="other", **same)
