"""Single files with one thing changed, and what the loader owes to them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from safetensors.torch import save
from torch import Tensor

from latentdiff.checkpoints.family import UNET
from latentdiff.errors import ModelLoadError
from tests.checkpoints.header_mutations import MUTATIONS, WORDS, join, recoded, split
from tests.checkpoints.oracle import FLOATS, bitwise_equal, finite, rules, tensor
from tests.checkpoints.small_models import VAE, Weights, weights_of
from tests.checkpoints.test_single_file import components_of, tensors_of, tiny


class SingleFile:
    """A small model of one family as a single file, and how its weights follow from the tensors in it."""

    def __init__(self, family: str) -> None:
        shape = tiny(family)
        unet, levels = shape["unet"], ("block_out_channels", "down_block_types", "up_block_types")
        unet |= {"layers_per_block": 1} | {key: [unet[key][0], unet[key][-1]] for key in levels}
        shape["vae"] = VAE
        self.shape = shape
        components = components_of(shape)
        held = tensors_of(components, shape)
        self.content = save(held)
        # Where each weight lies is found by its bits, which are noise, not by the tables of the loader.
        self.places = {name: _place(value, held) for name, value in weights_of(components).items()}

    def verdict(self, content: bytes, dtype: torch.dtype) -> Weights | type[ModelLoadError]:
        found, first = rules(content), rules(self.content) or {}
        if found is None:
            return ModelLoadError
        for name, (_, shape, _) in first.items():
            if name not in found or found[name][0] not in FLOATS:
                return ModelLoadError
            flat = (name, MATRIX) in self.places.values()
            if found[name][1] != shape and not (flat and len(shape) == 4 and found[name][1] == shape[:2]):
                return ModelLoadError
        if any(name.startswith(UNET) for name in found.keys() - first.keys()):
            return ModelLoadError
        result = {}
        for name, (file, view) in self.places.items():
            kind, shape, raw = found[file]
            whole = tensor(kind, shape, raw).to(dtype)
            result[name] = VIEWS[view](whole.reshape(first[file][1]))
            if not finite(whole):
                return ModelLoadError
        return result

    def changed(self, rng: random.Random) -> bytes:
        """Return the file with one thing changed."""
        entries, data = split(self.content)
        place = rng.randrange(len(entries))
        name, entry = entries[place]
        change = rng.randrange(8)
        if change == 0:
            return recoded(rng, self.content)
        if change == 1:
            other = rng.choice((name + "x", name[1:], name.upper(), "model." + name, name.replace(".", "/")))
            entries[place] = (other, entry)
        elif change == 2:
            more = rng.choice(("model_ema.decay", "x", "alphas_cumprod", f"{name}.lora_up.weight", *WORDS))
            empty = {"dtype": rng.choice(("F32", "I64")), "shape": [0], "data_offsets": [len(data), len(data)]}
            entries.insert(rng.randrange(len(entries)), (more, empty))
        elif change == 3:
            prefix = name.split(".")[0]
            entries = [(f"x{other}" if other.startswith(prefix) else other, held) for other, held in entries]
        elif change == 4:
            entry["shape"] = rng.choice(([*entry["shape"], 1], entry["shape"][:2], [], entry["shape"][::-1], [0]))
        elif change == 5:
            entry["dtype"] = rng.choice(("I32", "U32", "F16", "BF16"))
        else:
            return rng.choice(MUTATIONS)(rng, entries, data)
        return join(entries, data)


MATRIX, TRANSPOSED = 1, 2
VIEWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda held: held,
    lambda held: held[..., 0, 0],
    lambda held: held.T,
    lambda held: held.chunk(3)[0],
    lambda held: held.chunk(3)[1],
    lambda held: held.chunk(3)[2],
)


def _place(value: Tensor, held: Weights) -> tuple[str, int]:
    for name, other in held.items():
        for view, function in enumerate(VIEWS):
            if other.ndim != {MATRIX: 4, TRANSPOSED: 2}.get(view, other.ndim):
                continue
            parts = 3 if view > TRANSPOSED else 1
            if other.numel() == parts * value.numel() and bitwise_equal(function(other), value):
                return name, view
    raise AssertionError("a weight is nowhere in the file")
