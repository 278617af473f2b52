"""`latentdiff teach`: a text encoder that says, at the words of each thing in a caption, where it is and what like.

A U-Net looks at text states through linear maps, and those of a sentence encoder tell no linear map which of two things
is the left one: it then draws both as something between the two. Of captions of scenes the truth is known
(`datasets.scenes`), so that the encoder can be taught it directly, in minutes: linear read-outs of its states are
trained with it. The states stay near those of before, for the U-Net that knows them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.devices import resolve_device
from latentdiff.errors import InputError
from latentdiff.evaluate.compose.words import COLORS, plural
from latentdiff.models.encoding import TokenEncoder
from latentdiff.models.pixels import LabelEncoder
from latentdiff.models.tokenizer import Tokenizer

from .datasets.rows import read_rows
from .destination import destination
from .loop.run import seeded
from .networks.encoders import inner_tokens, require_one_encoder

LEARNING_RATE, WARMUP = 1e-4, 20
BATCH = {"several": 64, "one": 16, "plain": 48}  # captions of several things, of one, and of no scene
DECAY = 0.4  # share of the iterations at the end in which the learning rate falls to 0
KEEP = 4.0  # weight of how far the states move, relative to their size
KINDS_WEIGHT = 0.2  # of colour, size and number, beside the place
FASTER = 30  # how much the learning rate of the read-outs is higher, which are new
REPORTS, AT_ONCE = 10, 128
FAR = 0.2  # from the middle, of 1, where it is asked on which side something is

COLOR_OF = {color: number for number, color in enumerate((None, *COLORS))}
SIZE_OF = {None: 0, "small": 1, "big": 2}
LARGEST_COUNT = 4
SIDES, KINDS = ("left or right", "above or below"), ("color", "size", "count")


@dataclass(frozen=True)
class Caption:
    """A caption and what it says of each thing in it; of a picture that is no scene, nothing."""

    text: str
    things: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Said:
    """Of tokens that name things, what is to be read out of their states.

    Attributes:
        rows, places: (n,) int64, the captions and the tokens in these.
        center: (n, 2), x and y from -1 to 1.
        several: (n,) bool, whether the caption has other things, so that the place is said.
        color, size, count: (n,) int64.
    """

    rows: Tensor
    places: Tensor
    center: Tensor
    several: Tensor
    color: Tensor
    size: Tensor
    count: Tensor

    def to(self, device: torch.device) -> Said:
        """Return the same on a device."""
        return Said(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class ReadOuts(nn.Module):
    """Linear maps of the state of a token to the place, colour, size and number of the thing that it names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.center = nn.Linear(channels, 2)
        self.color = nn.Linear(channels, len(COLOR_OF))
        self.size = nn.Linear(channels, len(SIZE_OF))
        self.count = nn.Linear(channels, LARGEST_COUNT)

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        """Return the place (n, 2) and the scores of the others (n, kinds), by name, for states (n, D)."""
        return {name: layer(states) for name, layer in self.named_children()}


def captions_of(rows: Sequence[Mapping[str, Any]]) -> list[Caption]:
    """Return the captions of rows of metadata, with what those of scenes say."""
    return [
        Caption(text, tuple(row["truth"]["things"]) if "truth" in row else ())
        for row in rows
        for text in row["captions"]
    ]


def by_kind(captions: Sequence[Caption]) -> dict[str, list[Caption]]:
    """Sort captions by the keys of `BATCH`.

    Raises:
        InputError: no caption is of a scene with several things.
    """
    kinds: dict[str, list[Caption]] = {kind: [] for kind in BATCH}
    for caption in captions:
        kinds["plain" if not caption.things else "one" if len(caption.things) == 1 else "several"].append(caption)
    if not kinds["several"]:
        raise InputError("no caption is of a scene with several things; add some with `latentdiff data emoji --scenes`")
    return kinds


def teach_model(model: str, data: str, out: str, iterations: int) -> dict[str, float]:
    """Write a model with a taught text encoder, print how well it says what held-out captions do, and return that.

    Args:
        model: folder, single file or hub name.
        data: folder of a set with scenes, of `training.datasets`.
        out: folder of the new model.
        iterations: see `teach`.

    Raises:
        InputError: the model has no text encoder, or two; or `data` cannot be read, or has no scenes of several things.
        ModelLoadError: the model cannot be loaded.
        StorageError: `out` cannot be written.
    """
    components = load_pipeline(model)
    require_one_encoder(components, "teach")
    encoder, tokenizer = components.text_encoder, components.tokenizer
    assert tokenizer is not None and not isinstance(encoder, LabelEncoder)
    captions, held_out = (captions_of(read_rows(Path(data) / split)) for split in ("train", "validation"))
    kinds = by_kind(captions)
    folder, _ = destination(model, out)
    heads = teach(encoder.to(resolve_device(None)), tokenizer, kinds, iterations)
    figures = read(encoder, tokenizer, heads, [caption for caption in held_out if caption.things])
    encoder.cpu()
    save_pipeline(components, folder, torch.float16)
    print(f"saved {out};", ", ".join(f"{name} {share:.1%}" for name, share in figures.items()), "of held-out captions")
    return figures


def teach(
    encoder: TokenEncoder,
    tokenizer: Tokenizer,
    kinds: Mapping[str, Sequence[Caption]],
    iterations: int,
    report: Callable[[str], object] = print,
) -> ReadOuts:
    """Train a text encoder in place, all but its table of tokens, and return what reads its states.

    Args:
        kinds: captions of scenes, and others, which show what is to stay as it is, from `by_kind`.
        iterations: of AdamW; the learning rate falls to zero at the end.
        report: is told of the progress, a line at a time.
    """
    before = copy.deepcopy(encoder).requires_grad_(False).eval()
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = ReadOuts(encoder.config.hidden_size).to(device)
    encoder.requires_grad_(True).train()
    for table in (module for module in encoder.modules() if isinstance(module, nn.Embedding)):
        table.requires_grad_(False)
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": trained},
        {"params": [*heads.parameters()], "lr": FASTER * LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_rate(step, iterations))
    for iteration in range(iterations):
        ids, mask, said = tokens_of(_chosen(kinds, iteration), tokenizer)
        states = _states(encoder, ids.to(device), mask.to(device))
        with torch.no_grad():
            own = _states(before, ids.to(device), mask.to(device))
        moved = (states - own).square().mean() / own.square().mean()
        loss = KEEP * moved + _errors(heads, states, said.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        if (iteration + 1) % max(1, iterations // REPORTS) == 0:
            report(f"text encoder: iteration {iteration + 1} of {iterations}, loss {loss.item():.4f}")
    encoder.requires_grad_(False).eval()
    return heads


@torch.no_grad()
def read(encoder: TokenEncoder, tokenizer: Tokenizer, heads: ReadOuts, captions: Sequence[Caption]) -> dict[str, float]:
    """Return how often the read-outs are right: of things in company on which side they are, and the rest of all."""
    right: dict[str, list[Tensor]] = {name: [] for name in (*SIDES, *KINDS)}
    device = next(encoder.parameters()).device
    for first in range(0, len(captions), AT_ONCE):
        ids, mask, said = tokens_of(captions[first : first + AT_ONCE], tokenizer)
        states = _states(encoder, ids.to(device), mask.to(device)).cpu()[said.rows, said.places]
        found = heads.cpu()(states)
        for axis, name in enumerate(SIDES):
            asked = said.several & (said.center[:, axis].abs() > FAR)
            right[name].append((found["center"][:, axis] > 0)[asked] == (said.center[:, axis] > 0)[asked])
        for name in KINDS:
            right[name].append(found[name].argmax(dim=-1) == getattr(said, name))
    return {name: torch.cat(parts).float().mean().item() for name, parts in right.items()}


def tokens_of(captions: Sequence[Caption], tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Said]:
    """Return numbers and mask of tokens (B, L), of long captions the first window, and what is said at which tokens."""
    tokens, length = tokenizer([caption.text for caption in captions]), tokenizer.model_max_length
    ids, mask = tokens.input_ids[:, :length], tokens.attention_mask[:, :length]
    found: list[tuple[int, int, Mapping[str, Any], bool]] = []
    for row, (caption, own) in enumerate(zip(captions, ids.tolist())):
        for thing in caption.things:
            name = thing["concept"] if thing["count"] == 1 else plural(thing["concept"])
            where = _places(own, inner_tokens(tokenizer, name))
            found += [(row, place, thing, len(caption.things) > 1) for place in where]
    things = [thing for _, _, thing, _ in found]
    said = Said(
        rows=torch.tensor([row for row, *_ in found], dtype=torch.long),
        places=torch.tensor([place for _, place, *_ in found], dtype=torch.long),
        center=torch.tensor([_center(thing["boxes"]) for thing in things]).view(-1, 2),
        several=torch.tensor([several for *_, several in found], dtype=torch.bool),
        color=torch.tensor([COLOR_OF[thing["color"]] for thing in things], dtype=torch.long),
        size=torch.tensor([SIZE_OF[thing["size"]] for thing in things], dtype=torch.long),
        count=torch.tensor([thing["count"] - 1 for thing in things], dtype=torch.long),
    )
    return ids, mask, said


def _errors(heads: ReadOuts, states: Tensor, said: Said) -> Tensor:
    found = heads(states[said.rows, said.places])
    place = F.mse_loss(found["center"][said.several], said.center[said.several])
    kinds = torch.stack([F.cross_entropy(found[name], getattr(said, name)) for name in KINDS])
    return place + KINDS_WEIGHT * kinds.sum()


def _states(encoder: TokenEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """Return (B, L, D) as a U-Net is given them."""
    return encoder(ids, mask if encoder.config.use_attention_mask else None).last_hidden_state.float()


def _chosen(kinds: Mapping[str, Sequence[Caption]], iteration: int) -> list[Caption]:
    generator = seeded(0, iteration, 9)
    chosen: list[Caption] = []
    for kind, count in BATCH.items():
        if kinds[kind]:
            places = torch.randint(len(kinds[kind]), (count,), generator=generator).tolist()
            chosen += [kinds[kind][place] for place in places]
    return chosen


def _share_of_rate(step: int, iterations: int) -> float:
    return min(1.0, (step + 1) / WARMUP, (iterations - step) / max(1.0, DECAY * iterations))


def _places(tokens: Sequence[int], words: Sequence[int]) -> range:
    """Return where words stand the first time; nowhere where they do not."""
    starts = (n for n in range(len(tokens) - len(words) + 1) if tokens[n : n + len(words)] == words)
    first = next(starts, None)
    return range(0) if first is None else range(first, first + len(words))


def _center(boxes: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the middle of all boxes, from -1 to 1."""
    across = sum(left + right for left, _, right, _ in boxes) / len(boxes) - 1
    down = sum(top + bottom for _, top, _, bottom in boxes) / len(boxes) - 1
    return across, down
