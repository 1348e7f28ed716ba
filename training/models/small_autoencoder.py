"""The small VAE's network: an AutoencoderKL whose decoder is narrower than its encoder.

This one file needs nothing but diffusers. `save_pretrained` puts a copy of it beside the weights and names it in
config.json, so that anybody can load the folder without the package that made it:

    diffusers.AutoModel.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder


class SmallVAE(AutoencoderKL):  # type: ignore[misc]  # diffusers is not typed
    """An AutoencoderKL with widths of its own for encoder and decoder; all else is its parent's.

    Args:
        encoder_block_out_channels: Channels of the encoder's levels, the finest first.
        decoder_block_out_channels: Channels of the decoder's levels, the finest first. Both or neither: without them
            `block_out_channels` holds for both, and afterwards it is the encoder's.

    The other arguments are AutoencoderKL's.

    Raises:
        ValueError: If one is given without the other, or they differ in length.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        encoder_block_out_channels: tuple[int, ...] | None = None,
        decoder_block_out_channels: tuple[int, ...] | None = None,
    ) -> None:
        encoder_widths = encoder_block_out_channels or block_out_channels
        decoder_widths = decoder_block_out_channels or block_out_channels
        if (encoder_block_out_channels is None) != (decoder_block_out_channels is None):
            raise ValueError("give both encoder_block_out_channels and decoder_block_out_channels, or neither")
        if not len(encoder_widths) == len(decoder_widths) == len(up_block_types):
            raise ValueError(
                f"encoder widths are {tuple(encoder_widths)}, decoder widths {tuple(decoder_widths)}, but there are"
                f" {len(up_block_types)} levels; give one width each"
            )
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=encoder_widths,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=up_block_types,
            block_out_channels=decoder_widths,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Saves as every diffusers model does, with this file beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        source = Path(inspect.getfile(type(self)))
        target = Path(save_directory) / source.name
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


SmallVAE.register_for_auto_class("AutoModel")
