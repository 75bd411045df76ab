"""The zoo's models of pictures: what core's classes are given, as small as their layers allow."""

import comfy.supported_models
import torch

from zoo_models import Variant

# fmt: off
SMALL, WIDE, ONE_FRAME = (1, 4, 8, 8), (1, 16, 8, 8), (1, 16, 1, 8, 8)
UNET = dict(
    image_size=32, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2], transformer_depth=[1, 1], transformer_depth_output=[1] * 4,
    transformer_depth_middle=1, use_linear_in_transformer=True, use_spatial_transformer=True, legacy=False, use_temporal_attention=False,
    out_channels=4, in_channels=4, context_dim=32,
)
CLASSES = dict(num_classes="sequential")
XL = dict(UNET, **CLASSES, adm_in_channels=2816, context_dim=64)
VIDEO_UNET = dict(
    UNET, **CLASSES, in_channels=8, use_temporal_attention=True, use_temporal_resblock=True, video_kernel_size=[3, 1, 1], extra_ff_mix_layer=True,
    use_spatial_context=True, merge_strategy="learned_with_images", merge_factor=0.0, disable_temporal_crossattention=False,
    max_ddpm_temb_period=10000,
)
FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=24, context_in_dim=32, hidden_size=128, mlp_ratio=2.0, num_heads=1, depth=1,
    depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)
NO_POOLED = dict(guidance_embed=False, vec_in_dim=None)
CHROMA = dict(
    {k: v for k, v in FLUX.items() if k != "guidance_embed"}, image_model="chroma", in_channels=64, out_channels=64, in_dim=64, out_dim=128,
    hidden_dim=64, n_layers=1, vec_in_dim=None,
)
LUMINA = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=96, cap_feat_dim=32, n_layers=1, qk_norm=True, n_heads=1, n_kv_heads=1,
    axes_dims=[32, 32, 32], axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=1.0, n_refiner_layers=1, multiple_of=32,
)
Z_IMAGE = dict(
    LUMINA, dim=256, n_heads=2, n_kv_heads=2, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0, z_image_modulation=True,
    time_scale=1000.0, pad_tokens_multiple=32,
)
PIXART = dict(num_heads=2, patch_size=2, hidden_size=48, in_channels=4, depth=1, caption_channels=32, input_size=64, pe_interpolation=1)
HUNYUAN_DIT = dict(depth=2, hidden_size=64, num_heads=2, text_states_dim=32, text_states_dim_t5=40, text_len_t5=9, text_len=7)
PIXEL_DIT = dict(
    image_model="pixeldit_t2i", num_groups=2, hidden_size=128, pixel_hidden_size=8, pixel_attn_hidden_size=64, pixel_num_groups=2, patch_depth=1,
    pixel_depth=1, txt_embed_dim=32,
)
OMNIGEN = dict(
    image_model="omnigen2", axes_dim_rope=[40, 40, 40], axes_lens=[64, 64, 64], ffn_dim_multiplier=None, hidden_size=120, in_channels=16,
    multiple_of=32, norm_eps=1e-5, num_attention_heads=1, num_kv_heads=1, num_layers=1, num_refiner_layers=1, out_channels=None, patch_size=2,
    text_feat_dim=32, timestep_scale=1000.0,
)
QWEN = dict(image_model="qwen_image", in_channels=64, num_layers=1, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=32)
COSMOS_2 = dict(
    image_model="cosmos_predict2", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
    patch_temporal=1, model_channels=128, concat_padding_mask=True, crossattn_emb_channels=32, pos_emb_cls="rope3d", pos_emb_learnable=True,
    pos_emb_interpolation="crop", min_fps=1, max_fps=30, use_adaln_lora=True, adaln_lora_dim=16, num_blocks=1, num_heads=1,
    extra_per_block_abs_pos_emb=False, rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0,
    rope_enable_fps_modulation=False,
)
KANDINSKY = dict(
    image_model="kandinsky5", model_dim=64, axes_dims=(16, 24, 24), time_dim=32, ff_dim=64, visual_embed_dim=132, num_text_blocks=1,
    num_visual_blocks=1, in_text_dim=32, in_text_dim2=24,
)


def guided(generator, count):
    return {"guidance": 3.5}


def mt5(generator, count):
    return {"conditioning_mt5xl": torch.randn(1, 9, 40, generator=generator), "attention_mask_mt5xl": torch.ones(1, 9)}


def llama(generator, count):
    return {"conditioning_llama3": torch.randn(1, 2, 6, 32, generator=generator)}


def t5_ids(generator, count):
    return {"t5xxl_ids": torch.randint(2, 900, (count,), generator=generator), "t5xxl_weights": torch.ones(count)}


def degraded(generator, count):
    return {"lq_latent": torch.zeros(1, 16, 2, 2), "degrade_sigma": torch.zeros(1)}


def zero123():
    return {"cc_projection.weight": torch.eye(768, 772), "cc_projection.bias": torch.zeros(768)}


V = Variant
PICTURES = (
    V("SD15", UNET, SMALL), V("SD20", UNET, SMALL),
    V("SD21UnclipL", dict(UNET, **CLASSES, adm_in_channels=1536), SMALL), V("SD21UnclipH", dict(UNET, **CLASSES, adm_in_channels=2048), SMALL),
    *(V(name, XL, SMALL, 64, 1280) for name in ("SDXL", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B")),
    V("SDXLRefiner", dict(XL, adm_in_channels=2560), SMALL, 64, 1280), V("SDXL_instructpix2pix", dict(XL, in_channels=8), SMALL, 64, 1280),
    V("SD15_instructpix2pix", dict(UNET, in_channels=8), SMALL),
    V("Stable_Zero123", dict(UNET, in_channels=8, context_dim=768), SMALL, 768, state=zero123),
    V("SD_X4Upscaler", dict(UNET, in_channels=7, channel_mult=[1] * 4, num_res_blocks=[1] * 4, transformer_depth=[1] * 4,
                            transformer_depth_output=[1] * 8), (1, 4, 16, 16)),
    V("SVD_img2vid", dict(VIDEO_UNET, adm_in_channels=768), (2, 4, 8, 8)), V("SV3D_u", dict(VIDEO_UNET, adm_in_channels=256), (2, 4, 8, 8)),
    V("SV3D_p", dict(VIDEO_UNET, adm_in_channels=1280), (2, 4, 8, 8)),
    V("Stable_Cascade_C", dict(stable_cascade_stage="c", c_r=16, c_cond=32, c_hidden=[32, 32], nhead=[2, 2], blocks=[[1, 1], [1, 1]],
                               c_clip_text=32, c_clip_text_pooled=24), WIDE, 32, 24, fixed=True),
    V("Stable_Cascade_B", dict(stable_cascade_stage="b", c_r=16, c_cond=32, c_hidden=[32] * 4, nhead=[-1, -1, 2, 2], blocks=[[1] * 4] * 2,
                               block_repeat=[[1] * 4] * 2, c_clip=24), (1, 4, 48, 48), 32, 24),
    V("SD3", dict(in_channels=16, pos_embed_scaling_factor=None, depth=1, num_patches=4096, pos_embed_max_size=64, adm_in_channels=24,
                  input_size=None, patch_size=2, context_size=32,
                  context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 64}}), WIDE, 32, 24),
    V("AuraFlow", dict(cond_seq_dim=32, dim=64, n_layers=2, n_double_layers=1, n_heads=1, max_seq=4096), SMALL),
    V("PixArtAlpha", dict(PIXART, image_model="pixart_alpha", model_max_length=120, micro_condition=True), (1, 4, 48, 48)),
    V("PixArtSigma", dict(PIXART, image_model="pixart_sigma", model_max_length=300, micro_condition=False), (1, 4, 48, 48)),
    V("HunyuanDiT", dict(HUNYUAN_DIT, image_model="hydit"), SMALL, masked=True, fixed=True, extras=mt5),
    V("HunyuanDiT1", dict(HUNYUAN_DIT, image_model="hydit1", size_cond=True, use_style_cond=True), SMALL, masked=True, fixed=True, extras=mt5),
    V("Flux", FLUX, WIDE, 32, 24, fixed=True, extras=guided), V("FluxSchnell", dict(FLUX, guidance_embed=False), WIDE, 32, 24),
    V("FluxInpaint", dict(FLUX, in_channels=96), WIDE, 32, 24, extras=guided),
    V("LongCatImage", dict(FLUX, **NO_POOLED, txt_ids_dims=[1, 2]), WIDE),
    V("Ovis", dict(FLUX, **NO_POOLED, txt_ids_dims=[1, 2], yak_mlp=True, txt_norm=True), WIDE, of="FluxSchnell"),
    V("Flux2", dict(FLUX, image_model="flux2", axes_dim=[32] * 4, in_channels=128, out_channels=128, mlp_ratio=3.0, theta=2000,
                    global_modulation=True, mlp_silu_act=True, qkv_bias=False, ops_bias=False, default_ref_method="index", ref_index_scale=10.0,
                    txt_ids_dims=[3], patch_size=1, vec_in_dim=None), (1, 128, 4, 4), extras=guided),
    V("Lens", dict(image_model="lens", in_channels=128, out_channels=32, num_layers=1, num_attention_heads=1, enc_hidden_dim=16,
                   multi_layer_encoder_feature=True, selected_layer_index=(0, 1)), (1, 128, 4, 4), masked=True,
      extras=lambda generator, count: {"num_layers_stacked": 2}),
    V("Chroma", CHROMA, WIDE),
    V("ChromaRadiance", dict(CHROMA, image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=16,
                             nerf_mlp_ratio=2, nerf_depth=1, nerf_max_freqs=4, nerf_tile_size=0, nerf_final_head_type="conv",
                             nerf_embedder_dtype=torch.float32, use_x0=False, use_sequential_txt_ids=False), (1, 3, 32, 32)),
    V("Lumina2", LUMINA, WIDE, masked=True, one_by_one=not hasattr(comfy.supported_models, "ZImage")),
    V("NewBie", dict(LUMINA, clip_text_dim=24), WIDE, 32, 24, masked=True, of="Lumina2"),
    V("ZImage", Z_IMAGE, WIDE),
    V("ZImagePixelSpace", dict(Z_IMAGE, image_model="zimage_pixel", patch_size=4, in_channels=3, decoder_hidden_size=32,
                               decoder_num_res_blocks=1, decoder_max_freqs=4), (1, 3, 32, 32)),
    V("PixelDiTT2I", PIXEL_DIT, (1, 3, 32, 32), masked=True),
    V("PiD", dict(PIXEL_DIT, image_model="pid", lq_hidden_dim=16), (1, 3, 32, 32), masked=True, extras=degraded),
    V("HiDream", dict(image_model="hidream", attention_head_dim=128, axes_dims_rope=[64, 32, 32], caption_channels=[32, 32],
                      max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1], num_attention_heads=1, num_routed_experts=2,
                      num_activated_experts=1, num_layers=1, num_single_layers=1, out_channels=16, patch_size=2, text_emb_dim=24),
      WIDE, 32, 24, fixed=True, extras=llama),
    V("HiDreamO1", dict(image_model="hidream_o1", vision_config_overrides=None, text_config_overrides=dict(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=64,
        vocab_size=1000)), (1, 3, 64, 64), by_prompt=False, one_by_one=True,
      extras=lambda generator, count: {"text_input_ids": torch.randint(2, 900, (1, count), generator=generator)}),
    V("Omnigen2", OMNIGEN, WIDE, masked=True, one_by_one=True),
    V("Boogu", dict({k: v for k, v in OMNIGEN.items() if k != "text_feat_dim"}, image_model="boogu", instruction_feat_dim=32,
                    num_double_stream_layers=1), WIDE, masked=True, one_by_one=True),
    V("QwenImage", QWEN, ONE_FRAME, masked=True),
    V("QwenImage-Edit", QWEN, ONE_FRAME, masked=True, of="QwenImage",
      extras=lambda generator, count: {"reference_latents": [torch.ones(1, 16, 1, 8, 8)]}),
    V("QwenImage-Layered", dict(QWEN, use_additional_t_cond=True, default_ref_method="negative_index"), (1, 16, 2, 8, 8), of="QwenImage"),
    V("MageFlow", dict(QWEN, image_model="mage_flow", in_channels=128), (1, 128, 4, 4)),
    V("JoyImage", dict(image_model="joyimage", in_channels=16, hidden_size=128, patch_size=[1, 2, 2], num_layers=1, num_attention_heads=1,
                       text_dim=32, rope_dim_list=[16, 56, 56]), ONE_FRAME),
    V("Ideogram4", dict(image_model="ideogram4", in_channels=128, num_layers=1, num_attention_heads=1, attention_head_dim=128,
                        intermediate_size=64, adaln_dim=32, llm_features_dim=32, rope_theta=5000000, mrope_section=(24, 20, 20),
                        norm_eps=1e-5), (1, 128, 4, 4), masked=True),
    V("Krea2", dict(image_model="krea2", features=128, channels=16, patch=2, layers=1, heads=1, kvheads=1, txtlayers=2, txtdim=16, txtheads=1,
                    txtkvheads=1, tdim=32), ONE_FRAME),
    V("Kandinsky5Image", dict(KANDINSKY, visual_embed_dim=64), WIDE, 32, 24),
    V("ErnieImage", dict(image_model="ernie", hidden_size=128, num_attention_heads=1, num_layers=1, ffn_hidden_size=64, text_in_dim=32),
      (1, 128, 4, 4)),
    V("CosmosT2IPredict2", COSMOS_2, ONE_FRAME),
    V("Anima", dict(COSMOS_2, image_model="anima", crossattn_emb_channels=1024), ONE_FRAME, 1024, extras=t5_ids),
)
