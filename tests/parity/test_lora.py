"""LoRA files in diffusers and here: the same outputs of U-Net and text encoders, whatever the names in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.checkpoints import save_pipeline
from latentdiff.checkpoints.lora import load_lora, save_lora
from latentdiff.checkpoints.lora_names import networks_of, written_names
from latentdiff.models.lora import Factors, LoRA, layers_of
from tests.checkpoints.test_single_file import components_of, tiny
from tests.models.tiny import relative_error

pytest.importorskip("peft")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::UserWarning:(peft|transformers|diffusers)")]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
EVERYTHING = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "fc1", "fc2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
# Family, dialect, ends of the names of layers, and alpha of a layer, counted from 0; ranks are 3.
CASES: dict[str, tuple[str, str, tuple[str, ...], Any]] = {
    "diffusers": ("1.x", "diffusers", EVERYTHING, lambda count: 3.0),
    "diffusers-alpha": ("1.x", "diffusers", EVERYTHING, lambda count: (1.5, 1.5, 6.0)[count % 3]),
    "diffusers-convolutions": ("1.x", "diffusers", EVERYTHING + CONVOLUTIONS, lambda count: 2.0),
    "diffusers-xl": ("XL", "diffusers", EVERYTHING, lambda count: 1.5),
    "kohya": ("1.x", "kohya", EVERYTHING, lambda count: 1.0),
    "kohya-2.x": ("2.x", "kohya", EVERYTHING, lambda count: 1.0),
    "kohya-convolutions": ("1.x", "kohya", EVERYTHING + CONVOLUTIONS, lambda count: 1.0),
    "kohya-xl": ("XL", "kohya", EVERYTHING, lambda count: 1.0),
    "sgm-xl": ("XL", "sgm", EVERYTHING, lambda count: 2.0),
    "sgm-xl-convolutions": ("XL", "sgm", EVERYTHING + CONVOLUTIONS, lambda count: 2.0),
}
IDS = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407, *[49407] * 70]])  # "a photo of a cat"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp("lora") / "model" for family in ("1.x", "2.x", "XL")}
    for family, folder in folders.items():
        save_pipeline(components_of(tiny(f"Stable Diffusion {family}")), folder, dtype=None)
    return folders


def random_lora(pipe: Pipeline, ends: tuple[str, ...], alpha: Any, seed: int = 0) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    networks: dict[str, dict[str, Factors]] = {}
    for network, model in networks_of(pipe.components).items():
        found = {name: layer for name, layer in layers_of(model).items() if name.endswith(ends)}
        for count, (name, layer) in enumerate(found.items()):
            rows, columns, *kernel = layer.weight.shape
            down = 0.3 * torch.randn(3, columns, *kernel, generator=generator)
            up = 0.3 * torch.randn(rows, 3, *(1 for _ in kernel), generator=generator)
            networks.setdefault(network, {})[name] = Factors(down, up, alpha(count) if network == "unet" else alpha(0))
    return LoRA(networks)


def write(pipe: Pipeline, case: str, file: Path, seed: int = 0) -> None:
    _, dialect, ends, alpha = CASES[case]
    lora = random_lora(pipe, ends, alpha, seed)
    save_lora(lora, file, pipe.components, "kohya" if dialect == "sgm" else dialect)
    if dialect == "sgm":  # as sd-scripts names the U-Net of Stable Diffusion XL
        ours, there = (written_names(pipe.components, name) for name in ("kohya", "webui"))
        sgm = {
            ours["unet", name]: f"lora_unet_{there['unet', name].removeprefix('diffusion_model_')}"
            for network, name in ours
            if network == "unet"
        }
        named = {key.partition("."): tensor for key, tensor in load_file(file).items()}
        save_file({f"{sgm.get(layer, layer)}.{half}": tensor for (layer, _, half), tensor in named.items()}, file)


def outputs(pipe: Pipeline) -> dict[str, Tensor]:
    """What the networks make of some input."""
    found = {}
    for name, network in networks_of(pipe.components).items():
        if name != "unet":
            found[name] = network(IDS).last_hidden_state
    sample, context, added = inputs(pipe)
    found["unet"] = pipe.unet(sample, torch.tensor([500]), context, added=added)
    return found


def inputs(pipe: Pipeline) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
    generator = torch.Generator().manual_seed(5)
    config = pipe.unet.config
    sample = torch.randn(1, config.in_channels, 16, 16, generator=generator)
    width: Any = config.cross_attention_dim
    context = torch.randn(1, 7, width, generator=generator)
    if not config.expects_sizes:
        return sample, context, None
    added = {"text_embeds": torch.randn(1, 8, generator=generator), "time_ids": torch.full((1, 6), 32.0)}
    return sample, context, added


@torch.no_grad()
def their_outputs(peer: Any, pipe: Pipeline) -> dict[str, Tensor]:
    names = [name for name in networks_of(pipe.components) if name != "unet"]
    found = {name: getattr(peer, name)(IDS).last_hidden_state for name in names}
    sample, context, added = inputs(pipe)
    found["unet"] = peer.unet(sample, 500, context, added_cond_kwargs=added).sample
    return found


def theirs(folder: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, output in ours.items():
        assert relative_error(output, expected[name]) <= 1e-5, name
        assert relative_error(plain[name], expected[name]) > 0.01, name  # it has a say


@torch.no_grad()
@pytest.mark.parametrize("case", list(CASES))
def test_same_outputs(models: dict[str, Path], case: str, tmp_path: Path) -> None:
    folder = models[CASES[case][0]]
    pipe, file = Pipeline.from_pretrained(folder, device="cpu"), tmp_path / "a.safetensors"
    write(pipe, case, file)
    peer = theirs(folder)
    peer.load_lora_weights(file)
    plain = outputs(pipe)
    assert_same(outputs(pipe.with_loras({file: 1.0})), their_outputs(peer, pipe), plain)


@torch.no_grad()
@pytest.mark.parametrize("weights", [(0.7, -0.4), ((1.0, 0.5), (0.3, 2.0))])
def test_several_with_weights(models: dict[str, Path], tmp_path: Path, weights: Any) -> None:
    folder, files = models["1.x"], [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    pipe, peer = Pipeline.from_pretrained(folder, device="cpu"), theirs(folder)
    for seed, (file, case) in enumerate(zip(files, ("kohya-convolutions", "diffusers-alpha"))):
        write(pipe, case, file, seed)
        peer.load_lora_weights(file, adapter_name="ab"[seed])
    pairs = [weight if isinstance(weight, tuple) else (weight, weight) for weight in weights]
    peer.set_adapters(["a", "b"], [{"unet": unet, "text_encoder": text} for unet, text in pairs])
    ours = outputs(pipe.with_loras(dict(zip(files, weights))))
    assert_same(ours, their_outputs(peer, pipe), outputs(pipe))


@torch.no_grad()
def test_same_latents_from_the_same_seed(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    pipe, peer = Pipeline.from_pretrained(models["1.x"], device="cpu"), theirs(models["1.x"])
    write(pipe, "kohya-convolutions", file)
    peer.load_lora_weights(file, adapter_name="a")
    peer.set_adapters(["a"], [3.0])
    peer.set_progress_bar_config(disable=True)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "height": 32, "width": 32}
    settings["output_type"] = "latent"
    expected = peer("a photo of a red fox", generator=torch.Generator().manual_seed(3), **settings).images
    pipes = (pipe.with_loras({file: 3.0}), pipe)
    drawn, plain = (one("a photo of a red fox", seed=3, sampler="ddim", **settings).images for one in pipes)
    assert relative_error(drawn, expected) < 1e-4
    assert relative_error(plain, expected) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_what_diffusers_and_peft_write(models: dict[str, Path], tmp_path: Path, rank_stabilised: bool) -> None:
    """As its training scripts save: PEFT's weights, and its configuration as metadata."""
    import peft
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe, peer = Pipeline.from_pretrained(models["1.x"], device="cpu"), theirs(models["1.x"])
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "use_rslora": rank_stabilised}
    torch.manual_seed(0)
    peer.unet.add_adapter(
        peft.LoraConfig(target_modules=["to_k", "conv1"], alpha_pattern={"mid_block.resnets.0.conv1": 2}, **options)
    )
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj", "fc1"], **options), peer.text_encoder)
    states = [peft.get_peft_model_state_dict(network) for network in (peer.unet, peer.text_encoder)]
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        *map(convert_state_dict_to_diffusers, states),
        **_collate_lora_metadata({"unet": peer.unet, "text_encoder": peer.text_encoder}),
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert_same(outputs(pipe.with_loras({file: 1.0})), their_outputs(peer, pipe), outputs(pipe))


@torch.no_grad()
def test_what_peft_writes_alone(models: dict[str, Path], tmp_path: Path) -> None:
    """A folder of one network, whose alpha is in a file beside."""
    import peft

    pipe, peer = Pipeline.from_pretrained(models["1.x"], device="cpu"), theirs(models["1.x"])
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_k", "to_out.0"], init_lora_weights=False)
    peft.get_peft_model(peer.unet, config).save_pretrained(str(tmp_path))
    ours = pipe.with_loras({tmp_path / "adapter_model.safetensors": 1.0})
    assert relative_error(outputs(ours)["unet"], their_outputs(peer, pipe)["unet"]) <= 1e-5
    assert relative_error(outputs(ours)["unet"], outputs(pipe)["unet"]) > 0.01
    before = ours.components.loras[0].lora.hash
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 5}')
    assert load_lora(tmp_path / "adapter_model.safetensors", pipe.components).hash != before


@torch.no_grad()
def test_names_of_before_2023_06(models: dict[str, Path], tmp_path: Path) -> None:
    """What diffusers wrote when attention had processors; diffusers still reads it."""
    file = tmp_path / "a.safetensors"
    pipe, peer = Pipeline.from_pretrained(models["1.x"], device="cpu"), theirs(models["1.x"])
    lora, tensors = random_lora(pipe, ATTENTION, lambda count: 3.0), dict[str, Tensor]()
    for network, layers in lora.networks.items():
        for name, factors in layers.items():
            attention, _, layer = name.removesuffix(".0").rpartition(".")
            stem = (
                f"unet.{attention}.processor.{layer}_lora"
                if network == "unet"
                else f"{network}.{name}.lora_linear_layer"
            )
            tensors |= {f"{stem}.down.weight": factors.down, f"{stem}.up.weight": factors.up}
    save_file(tensors, file)
    peer.load_lora_weights(file)
    assert_same(outputs(pipe.with_loras({file: 1.0})), their_outputs(peer, pipe), outputs(pipe))
