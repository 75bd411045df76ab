"""Models have the names that people give them; an HGR of one is not taken for another; what has no prompt is refused at once."""

from dataclasses import replace
from types import SimpleNamespace

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import pytest
from safecfg import hgr_models
from safecfg.hgr_models.architectures import ARCHITECTURES
from safecfg.nodes.host.architecture import NAMES, architecture_of
from safecfg.nodes.host.families import check_family
from safecfg.nodes.training.plan import recording_folder

from fakes import CPU, make_hgr
from test_training import folders, train  # noqa: F401 (folders is a fixture)
from zoo_models import Encoder, build, info_of
from zoo_pictures import PICTURES
from zoo_videos import NOT_DIFFUSION, REFUSED, VIDEOS

ZOO = {variant.name: variant for variant in (*PICTURES, *VIDEOS)}
MESSAGES = {"sound": "makes sound", "shapes": "makes 3-D shapes"}


def bare(name: str):
    """A MODEL of core's class without its network."""
    config = getattr(comfy.supported_models, name)({"image_model": "", "context_dim": 8})
    config.unet_config = {"disable_unet_model_creation": True}
    prediction = (
        comfy.model_base.ModelType.IMG_TO_IMG if REFUSED.get(name) == REFUSED["LotusD"] else comfy.model_base.ModelType.FLOW
    )
    model = comfy.model_base.BaseModel(config, prediction, device=CPU)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


@pytest.mark.parametrize("name", REFUSED)
def test_what_draws_nothing_from_a_prompt_is_refused_before_anything_is_recorded(name):
    if not hasattr(comfy.supported_models, name):
        pytest.skip("not in this host")
    with pytest.raises(hgr_models.HGRError, match=MESSAGES.get(REFUSED[name], REFUSED[name])):
        train((bare(name), Encoder(ZOO["SD15"])))
    assert not any(recording_folder("mine").glob("*.safetensors"))


@pytest.mark.parametrize(
    "name, called", [("Flux", "Flux.1"), ("QwenImage", "Qwen-Image"), ("SDXL", "SDXL"), ("WAN21_T2V", "Wan 2.1 / 2.2 14B")]
)
def test_models_have_the_names_that_people_give_them(name, called):
    assert architecture_of(bare(name)) == called


def test_core_s_models_have_a_name_that_an_index_of_hgrs_knows():
    """Or are refused: `python -m hgr_models.hgr_index --for` takes these names alone."""
    classes = {core.__name__ for core in comfy.supported_models.models} - NOT_DIFFUSION
    assert len(classes & NAMES.keys()) > 30
    named = {name: SimpleNamespace(model=SimpleNamespace(model_config=type(name, (), {})())) for name in classes}
    assert {name for name, model in named.items() if architecture_of(model) not in ARCHITECTURES} <= REFUSED.keys()


@pytest.mark.skipif(not hasattr(comfy.supported_models, "Chroma"), reason="not in this host")
def test_an_hgr_of_chroma_is_not_taken_for_flux():
    chroma, flux = bare("Chroma"), bare("Flux")
    info = info_of(chroma, ZOO["Chroma"])
    check_family(flux, info)  # a file of before says nothing
    info = replace(info, architecture=architecture_of(chroma))
    check_family(chroma, info)
    with pytest.raises(
        hgr_models.HGRError, match=r"trained for Chroma, but this model is Flux\.1\. Both have Flux latents \(16 channels"
    ):
        check_family(flux, info)


def test_the_architecture_is_in_the_file(tmp_path):
    hgr = make_hgr(info=replace(make_hgr().info, architecture="Flux.1")).patcher.model
    hgr_models.save_hgr(tmp_path / "a.safetensors", hgr)
    assert hgr_models.load_hgr(tmp_path / "a.safetensors").info.architecture == "Flux.1"


def test_the_wrong_clip_is_told_while_training():
    wrong = Encoder(replace(ZOO["SD15"], width=48))
    with pytest.raises(hgr_models.HGRError, match="CLIP that belongs to the model"):
        train((build(ZOO["SD15"]), wrong), train="both")
