"""Conditioning for the U-Net: text states, sizes, guidance scale, noise level."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.checkpoints import Components
from latentdiff.engine.engines import Engine
from latentdiff.generation.request import Settings
from latentdiff.models.encoding import Encoded
from latentdiff.models.layers import sinusoidal_embedding

__all__ = ["BatchConditioning", "Conditioning", "TextCache", "encode_texts"]

GUIDANCE_SCALING = 1000.0  # of guidance scales before they are embedded, as consistency models are distilled


@dataclass(frozen=True)
class BatchConditioning:
    """Conditioning of b images, the negative halves first; the arguments of `UNet2DConditionModel.prepare`.

    Attributes:
        context: (2b, n * L, D).
        added: what Stable Diffusion XL and consistency models are told besides, each (2b, ...); may be empty.
        class_labels: (2b,) noise levels of the small picture, where the model enlarges one, or None.
    """

    context: Tensor
    added: dict[str, Tensor]
    class_labels: Tensor | None


class TextCache:
    """The encoded texts of earlier requests, the newest `most` of them; threads may share one."""

    def __init__(self, most: int = 64) -> None:
        self._most, self._lock = most, threading.Lock()
        self._texts = OrderedDict[tuple[int, str, int, bool, str], tuple[weakref.ref[Components], Encoded]]()

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, components: Components, text: str, clip_skip: int, weighted: bool, engine: Engine) -> Encoded:
        """Return what a text is encoded as; it is encoded, by the engine, if it is new."""
        key = (id(components), text, clip_skip, weighted, engine.name)
        with self._lock:
            model, known = self._texts.get(key, (None, None))
            if model is not None and known is not None and model() is components:  # no other that has its place now
                self._texts.move_to_end(key)
                return known
        encoded = engine.encode(components.prompt_encoder)([text], clip_skip=clip_skip, weighted=weighted)[0]
        with self._lock:
            self._texts[key] = weakref.ref(components), encoded
            self._texts.move_to_end(key)
            if len(self._texts) > self._most:
                self._texts.popitem(last=False)
        return encoded


def encode_texts(components: Components, settings: Settings, cache: TextCache, engine: Engine) -> dict[str, Encoded]:
    """Encode every text of a request once: prompts, negative prompt, blend prompt and the empty text."""
    texts = dict.fromkeys(["", settings.negative_prompt, settings.blend_prompt, *settings.prompts])
    # One by one, so that no text has a say in the rounding of another.
    how = settings.clip_skip, settings.prompt_weights
    return {text: cache.get(components, text, *how, engine) for text in texts}


class Conditioning:
    """Conditioning of the images of one pass.

    Args:
        components: of the model.
        settings: of the request.
        encoded: its texts, see `encode_texts`.
        size: height and width of the result in pixels.
        device: where the U-Net runs, and the text encoders are.
    """

    def __init__(
        self,
        components: Components,
        settings: Settings,
        encoded: Mapping[str, Encoded],
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.components, self.settings, self.encoded, self.size = components, settings, encoded, size
        self.config, self.device = components.unet.config, device

    def counts(self, index: int) -> tuple[int, int]:
        """Return how many tokens the prompt of an image has, and in how many windows it was encoded."""
        encoded = self.encoded[self.settings.prompt(index)]
        return encoded.tokens, len(encoded.states)

    def window_count(self, index: int) -> int:
        """Return how many text windows an image needs: as many as the longest of its texts."""
        texts = (self.settings.prompt(index), self.settings.negative_prompt, self.settings.blend_prompt)
        return max(len(self.encoded[text].states) for text in texts)

    def of(self, images: Sequence[int]) -> BatchConditioning:
        """Return the conditions of some images, all of the same `window_count`."""
        wanted, settings = self.window_count(images[0]), self.settings
        positive = [self._blended(self.settings.prompt(index), wanted) for index in images]
        negative = self._encoded(settings.negative_prompt, wanted)
        if self.components.force_zeros and not settings.negative_prompt:
            negative = negative._replace(
                states=torch.zeros_like(negative.states),
                pooled=None if negative.pooled is None else torch.zeros_like(negative.pooled),
            )
        texts = [negative] * len(images) + positive
        labels = None
        if self.components.upscales:
            labels = torch.full((len(texts),), settings.noise_level, device=self.device)
        return BatchConditioning(torch.stack([text.states for text in texts]), self._added(texts), labels)

    def _blended(self, prompt: str, wanted: int) -> Encoded:
        """Return what a prompt is encoded as, on its way to the second one."""
        first, second = self._encoded(prompt, wanted), self._encoded(self.settings.blend_prompt, wanted)
        if not self.settings.blend:
            return first
        states = torch.lerp(first.states, second.states, self.settings.blend)
        if first.pooled is None or second.pooled is None:
            return first._replace(states=states)
        return first._replace(states=states, pooled=torch.lerp(first.pooled, second.pooled, self.settings.blend))

    def _encoded(self, text: str, wanted: int) -> Encoded:
        """Return what a text is encoded as, its states (wanted * L, D) filled up with windows of the empty text."""
        encoded, empty = self.encoded[text], self.encoded[""].states
        states = torch.cat([encoded.states, *[empty] * (wanted - len(encoded.states))])
        return encoded._replace(states=states.flatten(0, 1))

    def _added(self, texts: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return pooled texts and picture sizes (Stable Diffusion XL), or the guidance scale (consistency models).

        Source: Podell et al. 2023, arXiv 2307.01952, section 2.2; Luo et al. 2023, arXiv 2310.04378, section 4.
        """
        config, added = self.config, {}
        if config.time_cond_proj_dim is not None:
            scale = torch.tensor([self.settings.guidance_scale - 1], device=self.device) * GUIDANCE_SCALING
            embedding = sinusoidal_embedding(scale, config.time_cond_proj_dim, cosine_first=False, shift=1)
            added["timestep_cond"] = embedding.to(texts[0].states.dtype).expand(len(texts), -1)  # (2b, G)
        if config.expects_sizes:
            embeds = torch.stack([text.pooled for text in texts if text.pooled is not None])  # (2b, P)
            size = [float(side) for side in self.size]
            width = (config.projection_class_embeddings_input_dim or 0) - embeds.shape[1]
            if width // (config.addition_time_embed_dim or 1) == 6:
                ids = [[*size, 0.0, 0.0, *size]] * len(texts)  # size of the original, its cut, size of the result
            else:  # the refiner: how beautiful the picture is, which the negative half is less
                half = len(texts) // 2
                ids = [[*size, 0.0, 0.0, score] for score in [2.5] * half + [6.0] * half]
            added |= {"text_embeds": embeds, "time_ids": torch.tensor(ids, device=self.device)}
        return added
