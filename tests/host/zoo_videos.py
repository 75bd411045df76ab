"""The zoo's models of videos and of sound; and core's classes that draw nothing from a prompt."""

import torch

from zoo_models import Variant
from zoo_pictures import COSMOS_2, KANDINSKY

# fmt: off
VIDEO = (1, 16, 2, 8, 8)
HUNYUAN = dict(
    image_model="hunyuan_video", in_channels=16, out_channels=16, vec_in_dim=24, context_in_dim=32, hidden_size=128, mlp_ratio=2.0, num_heads=1,
    depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=True, byt5=False,
    meanflow=False, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False,
)
HUNYUAN_15 = dict(HUNYUAN, in_channels=65, out_channels=32, vec_in_dim=None, vision_in_dim=16, meanflow_sum=True, byt5=True,
                  use_cond_type_embedding=True, patch_size=[1, 1, 1], guidance_embed=False)
WAN = dict(
    image_model="wan2.1", model_type="t2v", dim=128, out_dim=16, num_heads=1, ffn_dim=64, num_layers=1, patch_size=(1, 2, 2), freq_dim=64,
    window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6, in_dim=16, text_dim=32,
)
COSMOS = dict(
    image_model="cosmos", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
    model_channels=128, block_config="FA-CA-MLP", concat_padding_mask=True, pos_emb_cls="rope3d", pos_emb_learnable=False,
    pos_emb_interpolation="crop", block_x_format="THWBD", affline_emb_norm=True, use_adaln_lora=True, adaln_lora_dim=16, num_blocks=1,
    num_heads=1, crossattn_emb_channels=32, extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable",
)
COG = dict(
    image_model="cogvideox", num_attention_heads=1, attention_head_dim=64, time_embed_dim=32, num_layers=1, in_channels=16, patch_size=2,
    text_embed_dim=32, use_rotary_positional_embeddings=True,
)
LTX = dict(num_layers=1, attention_head_dim=32, num_attention_heads=2, cross_attention_dim=64, caption_channels=32, in_channels=128)
MOCHI = dict(
    image_model="mochi_preview", depth=1, patch_size=2, num_heads=24, hidden_size_x=3072, hidden_size_y=1536, mlp_ratio_x=4.0, mlp_ratio_y=4.0,
    learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0, patch_embed_bias=True,
    posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=32,
    t5_token_length=7, rope_theta=10000.0,
)
ACE = dict(
    audio_model="ace", attention_head_dim=64, in_channels=8, inner_dim=64, max_height=16, max_position=32768, max_width=32768, mlp_ratio=2.5,
    num_attention_heads=1, num_layers=1, out_channels=8, patch_size=[16, 1], rope_theta=1e6, speaker_embedding_dim=512, text_embedding_dim=32,
    ssl_encoder_depths=[1, 1], ssl_latent_dims=[16, 16], ssl_names=["mert", "m-hubert"], lyric_encoder_vocab_size=6693, lyric_hidden_size=1024,
)


def quoted(generator, count):
    return {"conditioning_byt5small": torch.randn(1, 5, 1472, generator=generator)}


V = Variant
VIDEOS = (
    V("GenmoMochi", MOCHI, (1, 12, 2, 8, 8), masked=True, fixed=True),
    V("LTXV", dict(LTX, image_model="ltxv"), (1, 128, 2, 4, 4), masked=True),
    V("LTXAV", dict(LTX, image_model="ltxav", connector_attention_head_dim=32, connector_num_attention_heads=1, connector_num_layers=1,
                    audio_in_channels=128, audio_cross_attention_dim=64, audio_attention_head_dim=32, audio_num_attention_heads=2),
      ((1, 128, 2, 4, 4), (1, 8, 4, 16)), fixed=True, extras=lambda generator, count: {"unprocessed_ltxav_embeds": True}),
    V("HunyuanVideo", HUNYUAN, VIDEO, 32, 24), V("HunyuanVideoI2V", dict(HUNYUAN, in_channels=33), VIDEO, 32, 24),
    V("HunyuanVideoSkyreelsI2V", dict(HUNYUAN, in_channels=32), VIDEO, 32, 24),
    V("HunyuanVideo15", HUNYUAN_15, (1, 32, 2, 4, 4)),
    V("HunyuanVideo15-quoted", dict(HUNYUAN_15, context_in_dim=2048), (1, 32, 2, 4, 4), 2048, of="HunyuanVideo15", extras=quoted),
    V("HunyuanVideo15_SR_Distilled", dict(HUNYUAN_15, in_channels=98, meanflow=True), (1, 32, 2, 4, 4)),
    V("HunyuanImage21", dict(HUNYUAN, in_channels=64, out_channels=64, axes_dim=[64, 64], vec_in_dim=None, byt5=True, patch_size=[1, 1],
                             guidance_embed=False), (1, 64, 4, 4)),
    V("HunyuanImage21Refiner", dict(HUNYUAN, in_channels=128, out_channels=64, vec_in_dim=None, patch_size=[1, 1, 1], meanflow=True,
                                    guidance_embed=False), (1, 64, 2, 4, 4)),
    V("CosmosT2V", COSMOS, VIDEO, masked=True), V("CosmosI2V", dict(COSMOS, in_channels=17), VIDEO),
    V("CosmosI2VPredict2", dict(COSMOS_2, in_channels=17), VIDEO),
    V("WAN21_T2V", WAN, VIDEO), V("WAN21_CausalAR_T2V", dict(WAN, causal_ar=True), VIDEO),
    V("WAN22_T2V", dict(WAN, in_dim=48, out_dim=48), (1, 48, 2, 8, 8)),
    V("WAN21_I2V", dict(WAN, model_type="i2v", in_dim=36), VIDEO), V("WAN22_I2V_A14B", dict(WAN, in_dim=36), VIDEO, of="WAN21_T2V"),
    V("WAN21_FunControl2V", dict(WAN, model_type="i2v", in_dim=48), VIDEO), V("WAN21_Camera", dict(WAN, model_type="camera", in_dim=32), VIDEO),
    V("WAN22_Camera", dict(WAN, model_type="camera_2.2", in_dim=36), VIDEO),
    V("WAN21_Vace", dict(WAN, model_type="vace", vace_in_dim=96, vace_layers=1), VIDEO),
    V("WAN21_HuMo", dict(WAN, model_type="humo", in_dim=36), VIDEO), V("WAN22_S2V", dict(WAN, model_type="s2v", audio_inject_layers=[0]), VIDEO),
    V("WAN22_Animate", dict(WAN, model_type="animate", in_dim=36), VIDEO), V("WAN_Animate2", dict(WAN, model_type="animate2", in_dim=36), VIDEO),
    V("WAN21_SCAIL", dict(WAN, model_type="scail", in_dim=20), VIDEO), V("WAN21_SCAIL2", dict(WAN, model_type="scail2", in_dim=20), VIDEO),
    V("WAN22_WanDancer", dict(WAN, model_type="wandancer", in_dim=36, audio_inject_layers=[0], music_dim=16, music_heads=1,
                              music_latent_dim=16), VIDEO),
    V("Kandinsky5", KANDINSKY, VIDEO, 32, 24),
    V("CogVideoX_T2V", COG, VIDEO, fixed=True), V("CogVideoX_I2V", dict(COG, in_channels=32), VIDEO, fixed=True),
    V("CogVideoX_Inpaint", dict(COG, in_channels=48), VIDEO, fixed=True),
    V("ACEStep", ACE, (1, 8, 16, 32), extras=lambda generator, count: {"conditioning_lyrics": torch.ones(1, 5, dtype=torch.long)}),
    V("MiniMaxH3", dict(image_model="minimax_h3", hidden_size=128, num_layers=1, token_refiner_num_layers=1, num_attention_heads=1,
                        attention_head_dim=128, ffn_hidden_size=64, text_dim=32, time_embed_hidden_size=64, time_embed_dim=32),
      ((1, 24, 2, 4, 4), (1, 32, 2, 8)), one_by_one=True),
)

# Core's classes that SafeCFG refuses, with what its message must say.
SOUND, SHAPES, PICTURE_TO_PICTURE = "sound", "shapes", "turns one picture into another"
REFUSED = {
    "StableAudio": SOUND, "StableAudio3": SOUND, "ACEStep15": SOUND, "MiniMaxMusic3": SOUND, "Hunyuan3Dv2": SHAPES, "Hunyuan3Dv2mini": SHAPES,
    "Hunyuan3Dv2_1": SHAPES, "TripoSplat": SHAPES, "Trellis2": SHAPES, "LotusD": PICTURE_TO_PICTURE, "WAN21_FlowRVS": PICTURE_TO_PICTURE,
    "SeedVR2": "has no prompt",
}
# Core's classes that are no diffusion models.
NOT_DIFFUSION = frozenset({"RT_DETR_v4", "SAM3", "SAM31", "DepthAnything3"})
