"""The settings of an image as people and other tools read them: the "parameters" text of the web UIs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["infotext", "parse_infotext"]

# What the web UIs call samplers.
SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "lms": "LMS",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "plms": "PLMS",
    "lcm": "LCM",
}
NEGATIVE = "Negative prompt:"
FEWEST_PAIRS = 3  # in a last line that is no part of the prompt, as the web UIs count
# "Key: value," or "Key: a JSON string,"
PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
SCHEDULES = {"karras": "Karras", "exponential": "Exponential", "polyexponential": "Polyexponential", "beta": "Beta"}


def infotext(record: Mapping[str, Any]) -> str:
    """Return the settings of one image in the form that other tools write and parse.

    Prompt, "Negative prompt: ..." and one line of "Key: value" pairs, where a value with a comma, a colon or a quote is
    a JSON string. A line of the prompt that could be taken for one of the others is indented.
    """
    lines = [_as_prompt(record["prompt"])]
    if record["negative_prompt"]:
        lines.append(f"{NEGATIVE} {_as_prompt(record['negative_prompt'])}")
    pairs = _pairs(record)
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    return "\n".join(lines)


def parse_infotext(text: str) -> dict[str, str]:
    """Return the settings in a text that this or another tool wrote, as far as it has the form of `infotext`.

    "Prompt" and "Negative prompt" are among them where there are any.
    """
    *lines, last = text.strip().split("\n")
    pairs, place = dict[str, str](), 0
    while found := PAIR.match(last, place):
        pairs[found[1]], place = _unquoted(found[2].strip()), found.end()
    if len(pairs) < FEWEST_PAIRS:
        lines, pairs = [*lines, last], {}
    first = next((number for number, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[first:]).removeprefix(NEGATIVE)
    texts = {"Prompt": "\n".join(lines[:first]).strip(), "Negative prompt": negative.strip()}
    return {name: value for name, value in texts.items() if value} | pairs


def _pairs(record: Mapping[str, Any]) -> dict[str, Any]:
    sampler, schedule = sampler_names(record["sampler"])
    width, height = record["width"], record["height"]
    sides = record.get("outpaint")
    if sides:  # left, top, right, bottom
        width, height = width + sides[0] + sides[2], height + sides[1] + sides[3]
    pairs = {"Steps": record["num_inference_steps"], "Sampler": sampler}
    pairs |= {"Schedule type": schedule} if schedule else {}
    pairs |= {"CFG scale": f"{record['guidance_scale']:g}", "Seed": record["seed"]}
    if width is not None:
        pairs["Size"] = f"{width}x{height}"  # before it was enlarged
    elif record.get("size"):
        pairs["Size"] = "{}x{}".format(*record["size"])
    pairs |= {"Model": record["model"], "Model hash": record["model_hash"][:10]}
    if record.get("loras"):
        pairs["LoRA"] = "; ".join(f"{lora['path'] or 'unsaved'} {lora['weight']}" for lora in record["loras"])
    if record.get("image"):
        pairs["Denoising strength"] = f"{record['strength']:g}"
    if record.get("hires", 1) > 1:
        pairs |= {"Hires upscale": f"{record['hires']:g}", "Hires upscaler": "Latent (bicubic)"}
        pairs["Denoising strength"] = f"{record['hires_strength']:g}"
    if record.get("feather"):
        pairs["Mask blur"] = record["feather"]
    if record.get("clip_skip"):
        pairs["Clip skip"] = record["clip_skip"] + 1  # there, 1 leaves out nothing
    if record.get("eta"):
        pairs["Eta DDIM" if sampler == "DDIM" else "Eta"] = f"{record['eta']:g}"
    if record.get("guidance_rescale"):
        pairs["CFG Rescale phi"] = f"{record['guidance_rescale']:g}"
    if record.get("variation_strength"):
        pairs["Variation seed"] = record["variation_seed"]
        pairs["Variation seed strength"] = f"{record['variation_strength']:g}"
    return pairs | {"Version": f"latentdiff {record['version']}"}


def sampler_names(name: str) -> tuple[str, str | None]:
    """Return what the web UIs call a sampler and its noise levels; None for the usual ones."""
    base, _, spacing = name.rpartition("_")
    if name not in SAMPLERS and base and spacing in SCHEDULES:
        return SAMPLERS.get(base, base), SCHEDULES[spacing]
    return SAMPLERS.get(name, name), None


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:\n"') else text


def _unquoted(text: str) -> str:
    try:
        plain = str(json.loads(text)) if text.startswith('"') else text
    except ValueError:
        return text
    return plain.encode("utf-8", "replace").decode()  # halves of characters, which JSON may hold


def _as_prompt(text: str) -> str:
    taken = (NEGATIVE, "Steps:")
    lines = str(text).encode("utf-8", "backslashreplace").decode().split("\n")
    return "\n".join(f" {line}" if line.startswith(taken) else line for line in lines)
