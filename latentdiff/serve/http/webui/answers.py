"""Answers as clients of the web UI read them."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from latentdiff.generation.infotext import infotext, sampler_names
from latentdiff.generation.result import GeneratedImage
from latentdiff.serve.http.desk import Taken
from latentdiff.serve.http.webui.fields import Txt2Img
from latentdiff.serve.http.webui.options import FORMATS, Options
from latentdiff.serve.progress import ImageProgress, progress_of

__all__ = ["PicturesAnswer", "pictures_answer", "progress_answer"]

LARGE = ("init_images", "mask")  # fields that are not sent back


class PicturesAnswer(BaseModel):
    """Pictures in base64, the request, and a JSON text of what each was made with."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def pictures_answer(request: Txt2Img, options: Options, pictures: Sequence[GeneratedImage]) -> dict[str, Any]:
    """Return the answer of txt2img and img2img.

    Raises:
        InputError: the settings are too long for a JPEG.
    """
    kind = FORMATS[options.samples_format]
    images = [base64.b64encode(one.encoded(kind)).decode() for one in pictures] if request.send_images else []
    info = json.dumps(_info(request, options, pictures))
    return {"images": images, "parameters": _parameters(request), "info": info}


def _parameters(request: Txt2Img) -> dict[str, Any]:
    """Return the fields of a request that are one value each, as JSON can hold them."""
    values = {**{name: getattr(request, name) for name in type(request).model_fields}, **(request.model_extra or {})}
    plain = {name: value for name, value in values.items() if value is None or isinstance(value, (str, int, float))}
    text = json.dumps({**plain, **dict.fromkeys(LARGE)}, ensure_ascii=False)
    found: dict[str, Any] = json.loads(text.encode("utf-8", "replace"), parse_constant=lambda constant: None)
    return found


def _info(request: Txt2Img, options: Options, pictures: Sequence[GeneratedImage]) -> dict[str, Any]:
    records = [one.record for one in pictures]
    first, count = records[0], len(records)
    subseeds = [record["variation_seed"] for record in records]
    return {
        "prompt": first["prompt"],
        "all_prompts": [record["prompt"] for record in records],
        "negative_prompt": first["negative_prompt"],
        "all_negative_prompts": [first["negative_prompt"]] * count,
        "seed": first["seed"],
        "all_seeds": [record["seed"] for record in records],
        "subseed": subseeds[0],
        "all_subseeds": subseeds,
        "subseed_strength": first["variation_strength"],
        "width": pictures[0].image.width,
        "height": pictures[0].image.height,
        "sampler_name": sampler_names(first["sampler"])[0],
        "cfg_scale": first["guidance_scale"],
        "steps": first["num_inference_steps"],
        "batch_size": request.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": options.model,
        "sd_model_hash": first["model_hash"][:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first["strength"] if first.get("image") else request.denoising_strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [infotext(record) for record in records],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": first["clip_skip"] + 1,
        "is_using_inpainting_conditioning": False,
        "version": f"latentdiff {first['version']}",
        "notes": list(dict.fromkeys(note for one in pictures for note in one.notes)),
    }


def progress_answer(running: Sequence[Taken], with_preview: bool) -> dict[str, Any]:
    """Return how far the oldest of some jobs is, as GET progress does."""
    job = running[0].job if running else None
    images = [] if job is None else progress_of(job)
    share = sum(image.share for image in images) / len(images) if images else 0.0
    steps = max((image.steps for image in images), default=0)
    elapsed = 0.0 if job is None else time.monotonic() - job.submitted
    return {
        "progress": share,
        "eta_relative": elapsed * (1 / share - 1) if share else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": running[0].claim.name if running else "",
            "job_count": len(running),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(time.time() - elapsed)) if running else "0",
            "job_no": 0,
            "sampling_step": int(share * steps),
            "sampling_steps": steps,
        },
        "current_image": _newest(images) if with_preview else None,
        "textinfo": None,
        "current_task": running[0].claim.name if running else None,
    }


def _newest(images: Sequence[ImageProgress]) -> str | None:
    """Return the preview of the first image that has one, in base64."""
    preview = next((image.preview for image in images if image.preview is not None), None)
    if preview is None:
        return None
    buffer = io.BytesIO()
    preview.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
