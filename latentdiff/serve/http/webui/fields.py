"""The fields of the web UI's API that mean something here, and which values of the others mean nothing."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Extra", "Img2Img", "PngInfo", "Txt2Img", "ignored"]

# Values of fields that change nothing here, besides 0, -1 and what is empty.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "s_noise": (1,),
    "initial_noise_multiplier": (1,),
    "image_cfg_scale": (1.5,),
    "do_not_save_samples": (True,),
    "do_not_save_grid": (True,),
    "mask_round": (True,),
    "show_extras_results": (True,),
    "upscaling_crop": (True,),
    "hr_checkpoint_name": ("Use same checkpoint",),
    "hr_sampler_name": ("Use same sampler",),
    "hr_scheduler": ("Use same scheduler",),
}
PARTS = ("alwayson_scripts", "override_settings")  # objects, of which each entry is named


class _Any(BaseModel):
    """Fields, beside which any others may come."""

    model_config = ConfigDict(extra="allow")


class Txt2Img(_Any):
    """A request for pictures of a prompt. Other fields of the web UI are taken too, and named in the answer."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, description="-1 for any.")
    subseed: int = Field(-1, description="Seed of a variation; -1 for any.")
    subseed_strength: float = 0.0
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1, description="There are n_iter times batch_size pictures.")
    steps: int | None = Field(None, description="The model's own without it, as with all that follows.")
    cfg_scale: float | None = None
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    sampler_name: str | None = Field(None, description="A name or alias of GET samplers, maybe with its scheduler.")
    sampler_index: str | None = Field(None, description="The same, where there is no sampler_name.")
    scheduler: str | None = Field(None, description="A name of GET schedulers.")
    eta: float | None = Field(None, description="Of the sampler DDIM.")
    clip_skip: int | None = Field(None, ge=1, description="1 leaves out no layer.")
    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_resize_x: int = Field(0, ge=0)
    hr_resize_y: int = Field(0, ge=0)
    hr_upscaler: str | None = None
    denoising_strength: float | None = None
    override_settings: dict[str, Any] = Field(default_factory=dict, description="As in POST options, for this request.")
    override_settings_restore_afterwards: bool = True
    send_images: bool = True
    force_task_id: str | None = Field(None, max_length=100, description="What GET progress calls the job.")


class Img2Img(Txt2Img):
    """A request for pictures of a picture."""

    init_images: list[str] = Field(default_factory=list, description="One picture in base64.")
    mask: str | None = Field(None, description="A picture in base64, white where something is drawn.")
    mask_blur: int | None = Field(None, ge=0, description="Pixels over which what is drawn fades into what is kept.")
    mask_blur_x: int | None = Field(None, ge=0)
    mask_blur_y: int | None = Field(None, ge=0)
    inpainting_fill: int = Field(0, ge=0, le=3, description="0 fill, 1 original, 2 latent noise, 3 latent nothing.")
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    resize_mode: int = Field(0, ge=0, le=3)


class Extra(_Any):
    """A request for a larger picture."""

    image: str = Field(description="A picture in base64.")
    resize_mode: int = Field(0, ge=0, le=1, description="0: by upscaling_resize; 1: to the size of the other two.")
    upscaling_resize: float = Field(2.0, gt=0, le=8)
    upscaling_resize_w: int = Field(512, ge=1)
    upscaling_resize_h: int = Field(512, ge=1)
    upscaling_crop: bool = Field(True, description="Cut off what stands over the size, instead of fitting into it.")
    upscaler_1: str = "None"


class PngInfo(BaseModel):
    """A request for what a picture says of itself."""

    image: str = Field(description="A picture in base64.")


def ignored(request: _Any) -> list[str]:
    """Return the names of fields that came, are ignored, and say something that matters elsewhere."""
    found = list[str]()
    for name, value in (request.model_extra or {}).items():
        if name.startswith("hr_") and not getattr(request, "enable_hr", False):
            continue
        if not value or value == -1 or value in NEUTRAL.get(name, ()):
            continue
        if name in PARTS and isinstance(value, dict):
            found += [f"{name}.{part}" for part in value]
        else:
            found.append(name)
    return found
