"""LoRAs of a folder, in the weights of models: a few sets of them are kept, as each takes memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from weakref import WeakSet

from latentdiff.errors import ModelLoadError
from latentdiff.files import stamp
from latentdiff.lora_tags import Weight, lora_files, take_loras
from latentdiff.models.unet import UNet2DConditionModel
from latentdiff.pipeline import Pipeline
from latentdiff.serve.http.errors import ApiError
from latentdiff.serve.http.limits import Limits

__all__ = ["Loras"]


class Loras:
    """LoRAs that prompts may name.

    Args:
        folder: see `lora_tags.lora_files`; it is looked at anew each time. None where prompts name no LoRAs.
        limits: how many sets are in memory, used or kept.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, folder: Path | None, limits: Limits) -> None:
        self._folder, self._limits, self._lock = folder, limits, threading.Lock()
        self._kept, self._alive = OrderedDict[Hashable, Pipeline](), WeakSet[UNet2DConditionModel]()
        self.files()

    def files(self) -> dict[str, Path]:
        """Return the files by the names that prompts use."""
        return {} if self._folder is None else lora_files(self._folder)

    def applied(self, pipe: Pipeline, prompt: str) -> tuple[str, Pipeline]:
        """Return a prompt without the LoRAs that it names, and a pipeline that has them.

        Raises:
            InputError: it names one that is not there.
            ApiError: a file was refused, is for another model, or too many sets are in use.
        """
        if self._folder is None:
            return prompt, pipe
        (plain,), loras = take_loras([prompt], self._folder)
        if not loras:
            return plain, pipe
        key = (id(pipe), *((file, stamp(file), weight) for file, weight in loras.items()))
        with self._lock:
            if key not in self._kept:
                while self._kept and len(self._alive) >= self._limits.lora_sets:
                    self._kept.popitem(last=False)
                if len(self._alive) >= self._limits.lora_sets:
                    message = f"{self._limits.lora_sets} sets of LoRAs are in use; try later, or name the same ones"
                    raise self._limits.exceeded("lora_sets", message)
                self._kept[key] = self._merged(pipe, loras)
                self._alive.add(self._kept[key].unet)
            self._kept.move_to_end(key)
            return plain, self._kept[key]

    def _merged(self, pipe: Pipeline, loras: dict[Path, Weight]) -> Pipeline:
        try:
            return pipe.with_loras(loras)
        except ModelLoadError as error:  # names the file by its path, which is nobody's business
            message = str(error).replace(f"{self._folder}{os.sep}", "")
            raise ApiError(400, message, "lora_refused", "prompt") from error
