"""`SafeCFG Record Guidance`: sampling runs of a model as shards, from which an HGR learns."""

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ...hgr_models.pairs import PromptSet
from ..host.schema import PROMPTS_TYPE, defaults_of, make_input, make_schema
from ..host.server import show_result
from .inputs import count_inputs, latent_input, run_inputs, train_plan
from .launch import open_session


class RecordGuidance(io.ComfyNode):
    """Records into a folder; several machines with different seeds can record the same prompts into one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_RecordGuidance",
            display_name="SafeCFG Record Guidance",
            description="Samples a model on harmful, safe and clean prompts and keeps what its guidance says, as latents in "
            "output/safecfg/recordings. Nothing is ever decoded. SafeCFG Train HGR does this itself; record apart to use several machines, "
            "or to train somewhere else. Going on where it stopped is automatic.",
            search_aliases=["hgr recording", "safety training data"],
            is_output_node=True,
            inputs=[
                make_input(io.Model, "model", tooltip="The model to record. It is not changed; SafeCFG Apply in it is left out."),
                make_input(io.Clip, "clip", tooltip="The CLIP that belongs to the model."),
                make_input(PROMPTS_TYPE, "prompts", tooltip="From SafeCFG Prompt Pairs."),
                make_input(io.String, "name", default="my_recording", tooltip="Folder below output/safecfg/recordings."),
                *count_inputs(),
                *run_inputs(),
                latent_input(),
            ],
            outputs=[io.String.Output(display_name="recording", tooltip="The recording's name, for SafeCFG Train HGR.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, clip: CLIP, prompts: PromptSet, name: str = "my_recording", **widgets) -> io.NodeOutput:
        plan = train_plan(name, "both", {**defaults_of(cls), **widgets}, model)
        session = open_session(plan, model, clip, prompts)
        session.identify()
        session.prepare(record_only=True)
        recording = session.make_recording()
        counts = ", ".join(f"{recording.count(kind)} {kind}" for kind in recording.kinds())
        return io.NodeOutput(name, ui=show_result(f"recorded in {session.folder}: {counts} samples"))
