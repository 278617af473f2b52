"""A call of a U-Net or decoder by diffusers, by ours, by candidates for ours and by OpenVINO, in turns on one input.

The network is the embedded one, or one of Stable Diffusion 1.5's shape with random weights.
Each is timed by the clock and by the processor; with one thread the second is right on a busy machine too. The limit of
the machine stands beside: GFLOP/s of a matrix product and of a 3x3 convolution.

    OMP_NUM_THREADS=1 python tests/benchmarks/engine_speed.py
    python tests/benchmarks/engine_speed.py --batch 8 --rounds 50
    python tests/benchmarks/engine_speed.py --model sd-1.5 --batch 1 --size 64 --rounds 3 --only eager,openvino
    OMP_NUM_THREADS=1 python tests/benchmarks/engine_speed.py --only compile,openvino,diffusers-frozen,optimum-intel
    python tests/benchmarks/engine_speed.py --part decoder --model sd-1.5 --batch 1 --size 64 --rounds 3

`finest` is the finest level alone, `diffusers-frozen` is theirs compiled with its weights in it. Each takes memory of
its own, so of a large network take one or two at a time.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from latentdiff import Pipeline
from latentdiff.devices import device_name
from latentdiff.engine.engines import Reusing
from latentdiff.engine.execution import find_engine
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.layers import Upsample2D
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig

CPU = torch.device("cpu")
USUAL = ("eager", "eager-bfloat16", "openvino", "openvino-bfloat16", "finest", "channels-last", "sub-pixel")
NAMES = (*USUAL, "compile", "diffusers-frozen", "optimum-intel")


class SubPixelUpsample(nn.Module):
    """`Upsample2D` as one 2x2 convolution of the small map with four times the channels, one for each phase.

    Kernel taps that fall on the same pixel of the small map are summed once.
    """

    def __init__(self, plain: Upsample2D) -> None:
        super().__init__()
        weight, bias = plain.conv.weight, plain.conv.bias
        assert bias is not None
        pairs = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (phase, tap of 2, tap of 3)
        phases = torch.einsum("yak,xbl,oikl->yxoiab", pairs, pairs, weight)  # (2, 2, C, C, 2, 2)
        self.weight = nn.Parameter(phases.flatten(0, 2).contiguous(memory_format=torch.channels_last), False)
        self.bias = nn.Parameter(bias.repeat(4), False)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return (B, C, 2H, 2W) for x (B, C, H, W); odd sides cut off the last row or column."""
        height, width = x.shape[2:]
        out = F.conv2d(x, self.weight, self.bias, padding=1)  # (B, 4C, H+1, W+1)
        out = out.unflatten(1, (2, 2, -1))
        rows = []
        for y in range(2):
            columns = [out[:, y, i, :, y : y + height, i : i + width] for i in range(2)]
            rows.append(torch.stack(columns, dim=-1).flatten(-2))  # (B, C, H, 2W)
        joined = torch.stack(rows, dim=-2).flatten(2, 3)  # (B, C, 2H, 2W)
        return joined if size is None else joined[:, :, : size[0], : size[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=["embedded", "sd-1.5"], default="embedded", help="the second: random weights"
    )
    parser.add_argument("--part", choices=["unet", "decoder"], default="unet")
    parser.add_argument("--batch", type=int, default=2, help="rows, two for each guided picture")
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(NAMES)}; the first four alone of a decoder")
    options = parser.parse_args()
    known = candidates(options) if options.part == "unet" else decoders(options)
    names = [name for name in USUAL if name in known] if options.only is None else options.only.split(",")
    runs = {name: known[name]() for name in ("diffusers", *names)}
    expected = runs["diffusers"]()
    figures: dict[str, Any] = {"machine": device_name(CPU), "threads": torch.get_num_threads(), **vars(options)}
    figures |= {"load": os.getloadavg()[0], "limits_gflops": limits()}
    print(f"{figures['machine']}, {figures['threads']} threads, load {figures['load']:.1f}; {figures['limits_gflops']}")
    clock, processor = ({name: list[float]() for name in runs} for _ in range(2))
    for run in runs.values():
        run()
    for _ in range(options.rounds):
        for name, run in runs.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            clock[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - used)
    figures["rows"] = {}
    for name, run in runs.items():
        seconds, used = statistics.median(clock[name]), statistics.median(processor[name])
        first = {"clock": statistics.median(clock["diffusers"]), "processor": statistics.median(processor["diffusers"])}
        apart = ((run() - expected).abs().max() / expected.abs().max()).item()
        row = {"ms": seconds * 1e3, "min_ms": min(clock[name]) * 1e3, "max_ms": max(clock[name]) * 1e3}
        row |= {"cpu_ms": used * 1e3, "faster": first["clock"] / seconds, "faster_cpu": first["processor"] / used}
        figures["rows"][name] = {**row, "difference": apart}
        print(
            f"{name:<26} {row['ms']:7.1f} ms ({row['min_ms']:.1f} to {row['max_ms']:.1f}) {row['faster']:5.2f}x   "
            f"processor {row['cpu_ms']:7.1f} ms {row['faster_cpu']:5.2f}x   differs by {apart:.0e}"
        )
    print(json.dumps(figures))


@torch.no_grad()
def candidates(options: argparse.Namespace) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Return what can be timed: name -> what makes a call of the U-Net, at the last of four timesteps."""
    unet = Pipeline.from_pretrained(device="cpu").unet if options.model == "embedded" else random_unet()
    peer: Any = diffusers.UNet2DConditionModel.from_config(unet.config.to_dict())
    peer.load_state_dict(unet.state_dict(), assign=True)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(options.batch, unet.config.in_channels, options.size, options.size, generator=generator)
    length = (32, 384) if options.model == "embedded" else (77, 768)
    context = torch.randn(options.batch, *length, generator=generator)
    steps, row = torch.tensor([999.0, 700.0, 400.0, 100.0]), torch.full((options.batch,), 3)

    def prepared(unet: UNet2DConditionModel, engine: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it converts
            ready = unet.prepare(steps, context.to(dtype)).run_by(find_engine(engine, CPU, dtype).predict(unet))
        return lambda: ready(sample.to(dtype), row).float()

    def half(engine: str = "eager") -> Any:
        return prepared(copy.deepcopy(unet).bfloat16(), engine, torch.bfloat16)

    def finest() -> Any:
        reusing = unet.prepare(steps, context).run_by(Reusing(unet, 10**9))
        reusing(sample, row)
        return lambda: reusing(sample, row)

    def channels_last() -> Any:
        ready = copy.deepcopy(unet).to(memory_format=torch.channels_last).prepare(steps, context)
        return lambda: ready(sample.contiguous(memory_format=torch.channels_last), row)

    def of_diffusers(network: Any) -> Any:
        def run() -> Tensor:
            with torch.no_grad():
                return network(sample, steps[3], context).sample

        return run

    def frozen() -> Any:
        torch._inductor.config.freezing = True
        return of_diffusers(torch.compile(peer))

    def optimum() -> Any:
        network = optimum_intel(peer)
        return lambda: torch.as_tensor(network(sample, steps[3], context)[0])

    return {
        "diffusers": lambda: of_diffusers(peer),
        "eager": lambda: prepared(unet),
        "finest": finest,
        "eager-bfloat16": half,
        "channels-last": channels_last,
        "sub-pixel": lambda: prepared(with_sub_pixels(copy.deepcopy(unet))),
        "openvino": lambda: prepared(unet, "openvino"),
        "openvino-bfloat16": lambda: half("openvino"),
        "compile": lambda: prepared(unet, "compile"),
        "diffusers-frozen": frozen,
        "optimum-intel": optimum,
    }


@torch.no_grad()
def decoders(options: argparse.Namespace) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """Return what can be timed of a decoder; see `candidates`."""
    torch.manual_seed(0)
    shape = AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    own = Pipeline.from_pretrained(device="cpu").autoencoder if options.model == "embedded" else AutoencoderKL(shape)
    assert isinstance(own, AutoencoderKL)
    own = own.eval()
    peer: Any = diffusers.AutoencoderKL.from_config(own.config.to_dict())
    peer.load_state_dict(own.state_dict(), assign=True)
    latents = torch.randn(options.batch, own.config.latent_channels, options.size, options.size)

    def ours(network: AutoencoderKL, engine: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decode = find_engine(engine, CPU, dtype).decode(network)

        def run() -> Tensor:
            with torch.no_grad():
                return decode(latents.to(dtype)).float()

        return run

    def half(engine: str = "eager") -> Any:
        return ours(copy.deepcopy(own).bfloat16(), engine, torch.bfloat16)

    def theirs() -> Tensor:
        with torch.no_grad():
            return peer.decode(latents).sample

    return {
        "diffusers": lambda: theirs,
        "eager": lambda: ours(own),
        "eager-bfloat16": half,
        "openvino": lambda: ours(own, "openvino"),
        "openvino-bfloat16": lambda: half("openvino"),
    }


def optimum_intel(unet: Any) -> Any:
    """Return a U-Net of diffusers as optimum-intel runs it by OpenVINO, in float32, in a pipeline of tiny parts."""
    from optimum.intel import OVStableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
        (place / "merges.txt").write_text("#version: 0.2\n")
        width = unet.config.cross_attention_dim
        text = CLIPTextConfig(
            vocab_size=3, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4
        )
        pipe = diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=unet.config.in_channels),
            text_encoder=CLIPTextModel(text),
            tokenizer=CLIPTokenizer(str(place / "vocab.json"), str(place / "merges.txt"), model_max_length=32),
            unet=unet,
            scheduler=diffusers.DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(place / "model")
        how = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), "INFERENCE_PRECISION_HINT": "f32"}
        return OVStableDiffusionPipeline.from_pretrained(place / "model", export=True, ov_config=how).unet


def random_unet() -> UNet2DConditionModel:
    """Return a U-Net of Stable Diffusion 1.5's shape with random weights, none of its layers without effect."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(UNetConfig(cross_attention_dim=768)).eval()
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return unet


def with_sub_pixels(network: nn.Module) -> Any:
    """Replace every upsampling of a network, in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Upsample2D):
                setattr(module, name, SubPixelUpsample(child))
    return network


def limits() -> dict[str, float]:
    """Return the GFLOP/s of this machine in a large matrix product and a large 3x3 convolution, the best of five."""
    a, x, weight = torch.randn(1024, 1024), torch.randn(1, 256, 64, 64), torch.randn(256, 256, 3, 3)
    x, weight = (one.contiguous(memory_format=torch.channels_last) for one in (x, weight))
    work = {
        "matrix product": (lambda: a @ a, 2 * 1024**3),
        "convolution": (lambda: F.conv2d(x, weight, padding=1), 2 * 9 * 256 * 256 * 64 * 64),
    }
    found = {}
    for name, (run, operations) in work.items():
        times = []
        for _ in range(6):
            used = time.perf_counter()
            run()
            times.append(time.perf_counter() - used)
        found[name] = round(operations / min(times) / 1e9, 1)
    return found


if __name__ == "__main__":
    main()
