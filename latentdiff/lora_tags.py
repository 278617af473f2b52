"""LoRAs that a prompt names, as in `a red fox <lora:style:0.8>`: files of a folder that was given beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from latentdiff.errors import InputError, shown, suggest
from latentdiff.files import is_file, is_folder

__all__ = ["Weight", "lora_files", "take_loras"]

TAG = re.compile(r"<(?:lora|lyco):([^<>:]*)((?::[^<>:]*)*)>", re.IGNORECASE)

Weight = float | tuple[float, float]
"""How much of a LoRA: one number, or one for the U-Net and one for the text encoders."""


def lora_files(folder: Path) -> dict[str, Path]:
    """Return the safetensors files of a folder, and of those in it, by their names: `style`, or else `toys/style`.

    Raises:
        InputError: there is no such folder.
    """
    if not is_folder(folder):
        raise InputError(f"LoRAs must be in a folder, got {shown(str(folder))}; check the path")
    files = sorted(file for file in folder.rglob("*.safetensors") if is_file(file))
    found = dict[str, Path]()
    for file in sorted(files, key=lambda one: len(one.parts)):  # those of the folder itself have the short names
        whole = file.relative_to(folder).with_suffix("").as_posix()
        found[file.stem if file.stem not in found else whole] = file
    return found


def take_loras(prompts: Sequence[str], folder: Path) -> tuple[list[str], dict[Path, Weight]]:
    """Take the LoRAs out of prompts that are drawn together, which must name the same ones.

    `<lora:NAME:0.8>` is all of a LoRA at 0.8, `<lora:NAME:0.5:1>` has 0.5 for the text encoders and 1 for the U-Net, as
    in the web UIs; the weight is 1 where there is none.

    Args:
        prompts: with tags or without.
        folder: see `lora_files`; it is looked at only where a prompt has a tag.

    Returns:
        The prompts without tags, and the files with their weights.

    Raises:
        InputError: a tag that cannot be used, a name that is not in the folder, or prompts that name different ones.
    """
    named = [_tags(prompt) for prompt in prompts]
    if any(one != named[0] for one in named):
        raise InputError("prompts that are drawn together must name the same LoRAs, got others; draw them one by one")
    plain = [TAG.sub("", prompt).strip() if tags else prompt for prompt, tags in zip(prompts, named)]
    if not named[0]:
        return plain, {}
    files, found = lora_files(folder), dict[Path, Weight]()
    for name, weight in named[0].items():
        if name not in files:
            raise InputError(f"there is no LoRA {shown(name)} in the folder{suggest(name[:80], files)}")
        found[files[name]] = weight
    return plain, found


def _tags(prompt: str) -> dict[str, Weight]:
    found = dict[str, Weight]()
    for tag in TAG.finditer(prompt):
        name, texts = tag[1].strip(), tag[2].split(":")[1:]
        try:
            numbers = [float(text) for text in texts]
        except ValueError:
            numbers = [1.0] * 3
        if not name or len(numbers) > 2 or name in found:
            raise InputError(
                f"a LoRA in a prompt must be a name and maybe its weight, once, got {shown(tag[0])}; try "
                "<lora:style:0.8>"
            )
        found[name] = (numbers[1], numbers[0]) if numbers[1:] else (numbers or [1.0])[0]
    return found
