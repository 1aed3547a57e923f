"""Tiny text-to-image and text-to-video pipelines, made of random weights."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, UMT5Config, UMT5EncoderModel

from ud2m.priors.latent import LatentPrior
from ud2m.priors.latent_parts import tokenizer_of

LENGTH, WIDTH, SIZE = 8, 16, 16
KINDS = ("sd", "sd_v", "lcm", "distilled", "sdxl")
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def vae(channels: int = 3) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    )


def unet(**options: object) -> UNet2DConditionModel:
    given = {
        "sample_size": SIZE // 2,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**given | options)


def text_encoder(kind: type = CLIPTextModel) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return kind(config)


def pipeline(kind: str, channels: int = 3, seed: int = 0) -> DiffusionPipeline:
    """Return a pipeline of one of ``KINDS``."""
    torch.manual_seed(seed)
    parts = {"vae": vae(channels), "text_encoder": text_encoder(), "tokenizer": tokenizer_of([], LENGTH)}
    if kind == "sdxl":
        network = unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=WIDTH + 6 * 4,
        )
        second = {"text_encoder_2": text_encoder(CLIPTextModelWithProjection), "tokenizer_2": tokenizer_of([], LENGTH)}
        return StableDiffusionXLPipeline(
            **parts, **second, unet=network, scheduler=EulerDiscreteScheduler(**TABLE), add_watermarker=False
        )
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if kind == "lcm":
        network = unet(time_cond_proj_dim=8)
        return LatentConsistencyModelPipeline(**parts, **rest, unet=network, scheduler=LCMScheduler(**TABLE))
    prediction = "v_prediction" if kind == "sd_v" else "epsilon"
    scheduler = LCMScheduler if kind == "distilled" else DDIMScheduler
    return StableDiffusionPipeline(
        **parts, **rest, unet=unet(), scheduler=scheduler(**TABLE, prediction_type=prediction)
    )


def wan(channels: int = 3, seed: int = 0, shift: float = 1.0) -> WanPipeline:
    """Return a video pipeline: 5 frames of 16 x 16 have latents of 2 x 4 x 4."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=channels,
        out_channels=channels,
        scale_factor_spatial=4,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )
    text = UMT5Config(
        vocab_size=514, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, eos_token_id=1, pad_token_id=1
    )
    return WanPipeline(
        vae=vae,
        text_encoder=UMT5EncoderModel(text).eval(),
        tokenizer=tokenizer_of([], LENGTH),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )


def check_prompt_gradients(prior: LatentPrior, z_t: Tensor, h: float, rtol: float, atol: float) -> None:
    """Compare gradients of the prompt, with and without checkpoints, with each other and with differences of step h."""
    found = []
    prompt = prior.encode_prompt("a cat").expand(2)

    def value(embeds):
        return prior.decode(prior.estimate(z_t, 700, prompt.with_embeds(embeds))).square().sum()

    for attempt in (prior, prior.checkpoint_layers()):
        embeds = prompt.embeds.detach().clone().requires_grad_()
        found.append(torch.autograd.grad(value(embeds), embeds)[0])
        assert attempt is prior
    torch.testing.assert_close(*found)
    direction = torch.randn(prompt.embeds.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    numeric = (value(prompt.embeds + h * direction) - value(prompt.embeds - h * direction)) / (2 * h)
    torch.testing.assert_close((found[0] * direction).sum(), numeric, rtol=rtol, atol=atol)
