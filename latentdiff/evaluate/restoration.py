"""Metrics of models that draw from a picture: how near what they make of its remains is to the whole picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.errors import InputError
from latentdiff.evaluate.evaluation import Evaluation
from latentdiff.evaluate.figure import Figure
from latentdiff.evaluate.intervals import Floats, mean, share
from latentdiff.evaluate.latents import has_latents, reconstruct
from latentdiff.evaluate.pictures import Item, load_pictures
from latentdiff.evaluate.reconstruction import RANGE, SSIM_PROTOCOL, psnr_of, ssim_of
from latentdiff.evaluate.tasks import own_task
from latentdiff.images import from_tensor, sheet, to_tensor, write_png
from latentdiff.marks import COMPOSITE

__all__ = ["inpainting", "upscaler", "upscaling"]

SHOWN = 8  # pictures on the sheet
PICTURES = 200  # unless a request says otherwise
MOST = 20 * math.log10(255)  # in dB: of pixels that are one level apart; a hole in plain white counts no more than that


def inpainting(evaluation: Evaluation) -> list[Figure]:
    """Measure what a model draws into holes of real test pictures, each with a seeded mask.

    `inpainting/psnr` is the peak signal-to-noise ratio of the pixels inside the mask, at most `MOST`. Floor: of what
    the autoencoder makes of the whole picture. Ceiling: of the mean colour of what is kept. `inpainting/kept` is the
    share of pictures of which all other pixels are those given. A model made to draw from texts is measured too: it
    is shown at each step what is kept. Rows of what is given, what is made of it and the truth are drawn into the
    folder of the report.
    """
    numbers = evaluation.sample(PICTURES)
    items = evaluation.spoilt_items("inpaint", numbers)
    paths, made, real = _drawn(evaluation, "inpaint", items, numbers)
    holes = torch.stack([_hole(item) for item in items])  # (N, 1, H, W)
    remains = real * ~holes  # grey holes
    filled = remains + holes * (remains.sum((2, 3), True) / (~holes).sum((2, 3), True))
    values = psnr_inside(made, real, holes)
    kept = ((made == real) | holes).all(dim=3).all(dim=2).all(dim=1).numpy()
    floor = None
    if has_latents(evaluation.model.components):
        floor = float(psnr_inside(reconstruct(evaluation.model.components, real), real, holes).mean())
    ceiling = float(psnr_inside(filled, real, holes).mean())
    _draw_sheet(evaluation, "inpainting", [remains, made, real])
    drawn, protocol = list(zip(paths, items)), {"masks": "seeded"}
    return [
        evaluation.figure(
            "inpainting/psnr",
            mean(values),
            "higher",
            protocol,
            floor=floor,
            ceiling=ceiling,
            unit="dB",
            **evaluation.by_item(drawn, values.tolist()),
        ),
        evaluation.figure("inpainting/kept", share(kept), "higher", protocol),
    ]


def upscaling(evaluation: Evaluation) -> list[Figure]:
    """Measure how near what a model enlarges is to the real test pictures, by PSNR in dB and SSIM.

    They were made small by Lanczos' filter, and blurred, noisy and compressed besides (`degraded`). Floor: of what the
    autoencoder makes of the large picture. Ceiling: of the small one enlarged by Lanczos' filter. Rows of that, of what
    the model makes and of the truth are drawn into the folder of the report.
    """
    numbers = evaluation.sample(PICTURES)
    returned = reconstruct(evaluation.model.components, evaluation.reference("test").load(numbers))
    return [
        figure for task in ("upscale", "upscale_degraded") for figure in _upscaling(evaluation, task, numbers, returned)
    ]


def upscaler(evaluation: Evaluation) -> None:
    """Raise InputError where the model enlarges nothing."""
    if not evaluation.model.components.upscales:
        raise InputError("upscaling is of models that enlarge pictures, got one that draws them; leave it out")


def psnr_inside(images: Tensor, others: Tensor, holes: Tensor) -> Floats:
    """Return the peak signal-to-noise ratio in dB of the pixels in holes, (N,), at most `MOST`.

    Args:
        images, others: (N, 3, H, W) in [-1, 1].
        holes: (N, 1, H, W) bool.
    """
    squares = (((images - others) * holes).double() / 2).square().sum((1, 2, 3)) / (3 * holes.sum((1, 2, 3)))
    return np.minimum(-10 * np.log10(squares.numpy().clip(min=1e-12)), MOST)


def _upscaling(evaluation: Evaluation, task: str, numbers: Sequence[int], returned: Tensor) -> list[Figure]:
    items = evaluation.spoilt_items(task, numbers)
    paths, made, real = _drawn(evaluation, task, items, numbers)
    size = (real.shape[3], real.shape[2])
    plain = to_tensor([item.inputs["image"].resize(size, Image.Resampling.LANCZOS) for item in items])
    _draw_sheet(evaluation, f"upscaling{'' if task == 'upscale' else '-degraded'}", [plain, made, real])
    drawn, found = list(zip(paths, items)), []
    for name, measure, unit in (("psnr", psnr_of, "dB"), ("ssim", ssim_of, "")):
        values, floor, ceiling = (_values(measure, images, real) for images in (made, returned, plain))
        figure = evaluation.figure(
            f"upscaling/{name}" if task == "upscale" else f"upscaling/degraded_{name}",
            mean(values),
            "higher",
            {"input": task, **(SSIM_PROTOCOL if measure is ssim_of else {"data_range": RANGE})},
            floor=float(floor.mean()),
            ceiling=float(ceiling.mean()),
            unit=unit,
            **evaluation.by_item(drawn, values.tolist()),
        )
        found.append(figure)
    return found


def _drawn(
    evaluation: Evaluation, task: str, items: Sequence[Item], numbers: Sequence[int]
) -> tuple[list[Path], Tensor, Tensor]:
    """Return what a model makes of items, files and (N, 3, H, W), and the real pictures, all in [-1, 1]."""
    own = own_task(evaluation.model.components)
    paths = evaluation.draw("captions" if task == own else task, items)  # those of other metrics, if that is its task
    return paths, load_pictures(paths), evaluation.reference("test").load(numbers)


def _draw_sheet(evaluation: Evaluation, name: str, columns: Sequence[Tensor]) -> None:
    """Write some pictures of each column, (N, 3, H, W) in [-1, 1], beside each other into the folder of the report."""
    chosen = torch.linspace(0, len(columns[0]) - 1, min(SHOWN, len(columns[0]))).long()
    rows = torch.stack([column[chosen] for column in columns], dim=1).flatten(0, 1)
    grid = sheet(from_tensor(rows), len(columns), gap=2)
    write_png(evaluation.request.out / f"{name}.png", grid, {}, COMPOSITE)


def _values(measure: Callable[[Tensor, Tensor], Tensor], images: Tensor, others: Tensor) -> Floats:
    """Return what is measured of each pair; pairs that agree count as one level apart."""
    return torch.cat([measure(*pair) for pair in zip(images.split(1), others.split(1))]).clamp(max=MOST).numpy()


def _hole(item: Item) -> Tensor:
    return torch.from_numpy(np.array(item.inputs["mask"])).bool()[None]  # (1, H, W)
