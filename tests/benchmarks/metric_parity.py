"""Compare what `latentdiff evaluate` measures with other packages and known answers, and count how intervals cover.

    python tests/benchmarks/metric_parity.py
    python tests/benchmarks/metric_parity.py --runs 200

On one core. Networks have random weights; both sides of a row see the same pictures, features and weights. Coverage is
the share of runs whose 95 % interval contains the truth: a closed form, but for `fid` and `rfid`, biased at each n, the
mean of all runs. Prints three tables and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff.training.losses.lpips import _named

from latentdiff.checkpoints import load_text_encoder
from latentdiff.diffusion import NoiseSchedule, image_generator
from latentdiff.diffusion.likelihood import discretised, ode_likelihood
from latentdiff.diffusion.prediction import Call
from latentdiff.evaluate import Evaluation, Reference, Request, distances, intervals
from latentdiff.evaluate.features import FeatureNetwork
from latentdiff.evaluate.intervals import Estimate, Floats
from latentdiff.evaluate.judge import Judge
from latentdiff.evaluate.matching import NEAREST
from latentdiff.evaluate.memorised import nearest, share_below
from latentdiff.evaluate.pictures import Item
from latentdiff.evaluate.restoration import psnr_inside
from latentdiff.evaluate.run import measure
from latentdiff.images import from_tensor, to_tensor
from latentdiff.models.image_text import ImageTextConfig, ImageTextModel, mean_states
from latentdiff.models.lpips import Lpips
from tests.evaluate.small import images
from tests.training.test_stages import text_folder

N, LABELS = 60, 12
MEASURED = ("fid", "kid", "mmd", "precision_recall", "clip", "retrieval", "neighbours", "rfid", "psnr", "ssim", "lpips")
ALONE = "compose, speed, fid_infinite (below), the shares of memorised (below) and of pixels kept in inpainting"
Row = tuple[str, float, str, float]
"""Metric, ours, whose the other is, and that."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated sets of each coverage")
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of the packages that are compared with
    with tempfile.TemporaryDirectory() as folder:
        rows = [*of_pictures(Path(folder)), *of_numbers()]
    print(f"{'metric':24}{'ours':>16}{'theirs':>16}{'difference':>12}  by")
    for name, ours, by, theirs in rows:
        print(f"{name:24}{ours:16.8g}{theirs:16.8g}{abs(ours - theirs):12.1e}  {by}")
    print(f"no independent implementation here: {ALONE}")
    print(f"\n{'Gaussians, 400 of each':24}{'fid_infinite':>14}{'interval':>22}{'closed form':>14}")
    closed = [gaussians(size, seed) for size in (4, 16, 32) for seed in (0, 1, 2)]
    for name, found, truth in closed:
        print(f"{name:24}{found.value:14.4f}{f'[{found.low:.4f}, {found.high:.4f}]':>22}{truth:14.4f}")
    print(f"\n{f'coverage of {runs} runs':34}{'share':>8}{'truth':>10}")
    covered = {name: coverage(draw, truth, runs) for name, draw, truth in estimators()}
    for name, (value, known) in covered.items():
        print(f"{name:34}{value:8.1%}{known:10.4f}")
    inside = sum(found.low <= truth <= found.high for _, found, truth in closed) / len(closed)
    parts = {"rows": rows, "closed_form_inside": inside, "coverage": {name: one for name, (one, _) in covered.items()}}
    print(json.dumps({"runs": runs, "largest_difference": max(abs(one - other) for _, one, _, other in rows), **parts}))


def of_pictures(folder: Path) -> Iterator[Row]:
    """Yield the figures of an evaluation of random pictures beside those of other packages."""
    from skimage.metrics import peak_signal_noise_ratio
    from sklearn.metrics import top_k_accuracy_score
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.neighbors import NearestNeighbors
    from torch_fidelity import metric_fid, metric_kid, metric_prc
    from torchmetrics.functional import image as theirs_of_images
    from torchmetrics.functional.multimodal import clip_score
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import maximum_mean_discrepancy

    one = pictures_of(folder)
    one.perceptual, published = perceptual()
    found = {figure.name: figure.estimate.value for figure in measure(one, MEASURED)}
    a, b, returned = (
        one.features("generated", one.generated),
        one.features("real", one.real),
        one.features("returned", one.returned),
    )
    statistics = [metric_fid.fid_features_to_statistics(torch.tensor(x)) for x in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    yield "fid", found["fid"], "torch-fidelity", float(theirs)
    cubic = {
        "kid_kernel": "poly",
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1,
    }
    subsets = {"kid_subsets": 1, "kid_subset_size": N, "rng_seed": 0, "verbose": False}
    theirs = metric_kid.kid_features_to_metric(torch.tensor(a), torch.tensor(b), **cubic, **subsets)
    yield "kid", found["kid"], "torch-fidelity", float(theirs["kernel_inception_distance_mean"])
    gamma = 0.5 / distances.median_distance(b) ** 2
    kernels = (torch.tensor(rbf_kernel(x, y, gamma=gamma)) for x, y in ((a, a), (a, b), (b, b)))
    yield "mmd", found["mmd"], "scikit-learn, torchmetrics", float(maximum_mean_discrepancy(*kernels))
    options = {"prc_neighborhood": 3, "prc_batch_size": 64, "save_cpu_ram": True, "verbose": False}
    theirs = metric_prc.prc_features_to_metric(torch.tensor(a), torch.tensor(b), **options)
    for name in ("precision", "recall"):
        yield name, found[name], "torch-fidelity", theirs[name]
    prompts = [item.prompt for _, item in one.drawn]
    score = clip_score(list(one.generated), prompts, lambda: (unscaled(one.judge), tokens))
    yield "clip", found["clip"], "torchmetrics", float(score)
    labels = sorted({*prompts, *(row["captions"][0] for row in one.reference("test").rows)})
    fits = (one.judge.images(one.generated) @ one.judge.texts(labels).T).numpy()
    for best in (1, 5):
        share = top_k_accuracy_score([labels.index(text) for text in prompts], fits, k=best, labels=range(len(labels)))
        yield f"retrieval_top{best}", found[f"retrieval_top{best}"], "scikit-learn", float(share)
    order = NearestNeighbors(n_neighbors=NEAREST).fit(b).kneighbors(a, return_distance=False)
    hits = [text in {one.captions[place] for place in row} for text, row in zip(prompts, order)]
    yield "neighbours", found["neighbours"], "scikit-learn", float(np.mean(hits))
    moments = [torch.tensor(part) for x in (returned, b) for part in (x.mean(0), np.cov(x, rowvar=False))]
    yield "rfid", found["rfid"], "torchmetrics", float(_compute_fid(*moments))
    levels = [(x.double() + 1) * 127.5 for x in (one.returned, one.real)]
    ratios = theirs_of_images.peak_signal_noise_ratio(*levels, data_range=255.0, reduction="none", dim=(1, 2, 3))
    yield "psnr", found["psnr"], "torchmetrics", float(ratios.mean())
    window = {"sigma": 1.5, "kernel_size": 11, "data_range": 255.0, "return_full_image": True}
    _, whole = theirs_of_images.structural_similarity_index_measure(*levels, **window)
    yield "ssim", found["ssim"], "torchmetrics", float(whole[..., 5:-5, 5:-5].mean())
    with torch.no_grad():
        yield "lpips", found["lpips"], "torchmetrics", float(published(one.returned, one.real).mean())
    hole = torch.zeros(N, 1, 32, 32, dtype=torch.bool)
    hole[:, :, 4:20, 8:24] = True
    inside = [[x[:, 4:20, 8:24].double().numpy() for x in pair] for pair in zip(one.returned, one.real)]
    by_scikit = float(np.mean([peak_signal_noise_ratio(*x, data_range=2) for x in inside]))
    yield "inpainting/psnr", float(psnr_inside(one.returned, one.real, hole).mean()), "scikit-image", by_scikit
    near = nearest({("features", "drawn"): a}, iter([{"features": b}]))["features", "drawn"].distances
    by_scikit = NearestNeighbors(n_neighbors=1).fit(b).kneighbors(a)[0].mean() / np.sqrt(b.shape[1])
    yield "memorised/distance", float(near.mean()), "scikit-learn", float(by_scikit)


def of_numbers() -> Iterator[Row]:
    """Yield what has a known answer."""
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 1, (4000, 2)) * [2, 1] + [3, 0], rng.uniform(0, 1, (4000, 2)) * [4, 1]  # share a part
    overlap = distances.precision_recall(*boxes)
    yield "precision, half shared", overlap.precision.value, "known answer, 4,000 points", 0.5
    yield "recall, quarter shared", overlap.recall.value, "known answer, 4,000 points", 0.25
    values, hits = rng.exponential(size=50), rng.random(50) < 0.9
    student = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    yield "interval of a mean, high", intervals.mean(values).high, "scipy", float(student.high)
    wilson = stats.binomtest(int(hits.sum()), 50).proportion_ci(0.95, method="wilson")
    yield "interval of a share, low", intervals.share(hits).low, "scipy", float(wilson.low)
    x0 = torch.from_numpy(rng.normal(0.1, 0.25, (8, 1, 16, 16)))

    def exact(x: torch.Tensor, call: Call) -> torch.Tensor:
        sigmas = call.sigmas.reshape(-1, 1, 1, 1)
        return 0.1 + 0.25**2 / (0.25**2 + sigmas**2) * (x - 0.1)

    ode = ode_likelihood(exact, NoiseSchedule(), x0, [image_generator(seed) for seed in range(8)], steps=100)
    known = -stats.norm(0.1, 0.25).logpdf(x0.numpy()).mean() / np.log(2)
    yield "nll/ode", float(ode.bits_per_dim().mean()), "scipy, of Gaussian values", float(known)
    levels, center = torch.arange(1.0, 255).double() / 127.5 - 1, torch.tensor(0.1).double()
    found = discretised(levels, center, torch.tensor(0.25**2).log().double())
    above, below = (stats.norm(0.1, 0.25).cdf(levels.numpy() + side / 255) for side in (1, -1))
    yield "nll/bound/L_0", float(found.exp().max()), "scipy", float((above - below).max())


def pictures_of(folder: Path) -> Evaluation:
    """Return an evaluation of pictures in a folder by random networks, and by an autoencoder that adds noise."""
    text_encoder, tokenizer = load_text_encoder(text_folder(folder / "text"))
    width = {"image_size": 16, "block_out_channels": (8, 16), "projection_dim": 8}
    model = ImageTextModel(ImageTextConfig(**width, text_dim=text_encoder.config.hidden_size)).eval()
    drawn = images(N, seed=1)
    for number, image in enumerate(from_tensor(drawn)):
        image.save(folder / f"{number}.png")
    items = [(folder / f"{number}.png", Item(thing(number), number)) for number in range(N)]
    captions, pictures = [thing(number) for number in range(N)], images(N)
    rows = [{"captions": [caption]} for caption in captions]
    test = Reference("small", "test", captions, rows, captions, lambda numbers: pictures[list(numbers)])
    one = Evaluation(Request(folder / "out"), None, {"test": test}, items)
    one.judge = Judge(model, text_encoder, tokenizer, "0")
    one.network = FeatureNetwork("quarters", "0", "none", lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1))
    noisy = one.real + 0.05 * torch.randn(one.real.shape)
    one.returned = to_tensor(from_tensor(noisy))
    return one


def thing(number: int) -> str:
    return f"{'abcdefghijkl'[number % LABELS]} fox"


def unscaled(judge: Judge) -> SimpleNamespace:
    """Return a judge's networks as torchmetrics calls a CLIP: vectors of any length."""
    model = judge.model

    def of_texts(numbers: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        states = mean_states(judge.encoder, judge.tokenizer, ["".join(map(chr, row)).rstrip("\0") for row in numbers])
        return model.text_projection(F.silu(model.text_hidden(states))).detach()

    def of_images(pictures: torch.Tensor) -> torch.Tensor:
        return model.visual_projection(model.features(pictures)).detach()

    config, to = SimpleNamespace(), lambda device: unscaled(judge)
    return SimpleNamespace(get_image_features=of_images, get_text_features=of_texts, config=config, to=to)


def tokens(
    text: list[str] | None = None, images: list[torch.Tensor] | None = None, **_: object
) -> dict[str, torch.Tensor]:
    """Return pictures as they are, or texts as the numbers of their letters, as torchmetrics asks a processor."""
    if text is None:
        return {"pixel_values": torch.stack(images or [])}
    ids = torch.tensor([list(map(ord, one.ljust(max(map(len, text)), "\0"))) for one in text])
    return {"input_ids": ids, "attention_mask": ids.ne(0)}


def perceptual() -> tuple[Lpips, torch.nn.Module]:
    """Return LPIPS as it is here and as it is in torchmetrics, with its heads and one VGG16 of random weights."""
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs, ours = _LPIPS(pretrained=True, net="vgg", pnet_rand=True), Lpips()
    slices = (getattr(theirs.net, f"slice{number}") for number in range(1, 6))
    vgg16 = {f"features.{name}": tensor for part in slices for name, tensor in part.state_dict().items()}
    heads = {f"lin{block}.model.1.weight": getattr(theirs, f"lin{block}").model[1].weight for block in range(5)}
    ours.load_state_dict(_named(vgg16, heads))
    return ours.eval().requires_grad_(False), theirs


def gaussians(size: int, seed: int) -> tuple[str, Estimate, float]:
    """Return fid_infinite of features of two Gaussians whose covariances commute, and their distance."""
    rng = np.random.default_rng([size, seed])
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    one, other, shift = rng.uniform(0.5, 1.5, size), rng.uniform(0.5, 1.5, size), rng.normal(0, 0.3, size)
    a, b = ((rng.standard_normal((400, size)) * scale) @ basis.T for scale in (one, other))
    truth = float(np.square(shift).sum() + np.square(one - other).sum())
    return f"{size} values, seed {seed}", distances.frechet_extrapolated(a + shift, b), truth


def estimators() -> Iterator[tuple[str, Callable[[], Estimate], float | None]]:
    """Yield each estimator on a fresh sample, and the truth; None for the mean of its runs."""
    rng = np.random.default_rng(0)

    def normal(shift: float = 0.0, scale: float = 1.0, n: int = 100) -> Floats:
        return rng.normal(shift, scale, (n, 3))

    def pair() -> Estimate:
        first = rng.normal(size=60)
        return intervals.paired_difference(first, first + rng.normal(0.3, 0.2, 60)).difference

    def reconstructed() -> Estimate:
        real = normal()
        back = real + normal(0.1, 0.3)
        rows = np.arange(100.0)
        return intervals.grouped_jackknife(
            lambda left: distances.frechet_of(back[left.astype(int)], real[left.astype(int)]), rows, groups=10
        )

    # D = 3, shift m = 1/2: E k under (x.y / D + 1)^3 of N(0, I) and N(m, I), and under exp(-|x - y|^2 / (2 * 1.5^2)).
    width, apart = 1.5**2, 3 * 0.5**2
    gaussian = 2 * (width / (width + 2)) ** 1.5 * (1 - np.exp(-apart / (2 * (width + 2))))
    moments = [(0.0, 3.0), (apart, 3 + 2 * apart + apart**2), (0.0, 3 + apart)]  # E t, E t^2 of t = x.y; 00, mm, 0m
    thirds = (0.0, apart**3 + 3 * apart * (5 + 2 * apart), 0.0)
    cubic = [third / 27 + second / 3 + first + 1 for (first, second), third in zip(moments, thirds)]
    yield "mean, 100 exponential", lambda: intervals.mean(rng.exponential(2.0, 100)), 2.0
    yield "share, 100 of 80 %", lambda: intervals.share(rng.random(100) < 0.8), 0.8
    yield "paired_difference, 60", pair, 0.3
    known = cubic[0] + cubic[1] - 2 * cubic[2]
    yield "kid, 80", lambda: distances.kernel_distance(normal(n=80), normal(0.5, n=80)), known
    yield "kid, 200", lambda: distances.kernel_distance(normal(n=200), normal(0.5, n=200)), known
    yield "mmd, 80", lambda: distances.gaussian_distance(normal(n=80), normal(0.5, n=80), 1.5), float(gaussian)
    yield "fid, 100", lambda: distances.frechet(normal(), normal(0.5, 1.5)), None
    yield "fid_infinite, 100", lambda: distances.frechet_extrapolated(normal(), normal(0.5, 1.5)), 3 * (0.25 + 0.25)
    yield "rfid, 100", reconstructed, None
    yield "share_below, 200 of 5 %", lambda: share_below(rng.random(200), rng.random(200), 0.05), 0.05
    yield "share_below, 200 of 20 %", lambda: share_below(rng.random(200) / 4, rng.random(200), 0.05), 0.2


def coverage(draw: Callable[[], Estimate], truth: float | None, runs: int) -> tuple[float, float]:
    """Return the share of intervals that contain the truth, and that."""
    found = [draw() for _ in range(runs)]
    known = float(np.mean([one.value for one in found])) if truth is None else truth
    return float(np.mean([one.low <= known <= one.high for one in found])), known


if __name__ == "__main__":
    main()
