"""Both stages end to end on a few tiny pictures: losses move weights, resume is exact, eight pictures are learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from latentdiff.training.config import load_config, parse_config
from latentdiff.training.data.batches import draw_batch
from latentdiff.training.data.dataset import load_images
from latentdiff.training.loop.checkpointing import load_latest
from latentdiff.training.losses.image import psnr
from latentdiff.training.monitor.reconstructions import fold_statistics
from latentdiff.training.setup import load_components as diffusion_components
from latentdiff.training.setup import network_to_train, prepare_data
from PIL import Image, ImageDraw

from latentdiff import Pipeline
from latentdiff.checkpoints import load_autoencoder, save_model
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import AutoencoderConfig, AutoencoderKL
from latentdiff.models.bert import BertConfig, BertModel
from tests.models.tiny import BERT, randomize, write_bert_vocabulary

PARTS = ("autoencoder", "text_encoder", "model", "schedule")
COLORS = ("red", "green", "blue", "orange", "purple", "gold", "black", "teal")
SIZE = 16


def pictures(folder: Path, count: int) -> Path:
    """Write `count` squares and discs of different colours, each with its own letter as caption."""
    folder.mkdir()
    rows = []
    for index in range(count):
        image = Image.new("RGB", (SIZE, SIZE), "white")
        draw = ImageDraw.Draw(image)
        shape = draw.rectangle if index % 2 else draw.ellipse
        shape((2 + index % 3, 2, 12, 13 - index % 4), fill=COLORS[index % 8])
        image.save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": chr(ord("a") + index)})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def recipe(tmp_path: Path, stage: str, **changes: Any) -> str:
    """Write a tiny config of a stage over tmp_path/pictures; `changes` are "section.key" values with __ for the dot.

    Stage "lora" is one of diffusion that starts from the model of "diffusion" in the same place.
    """
    run = {"out": str(tmp_path / stage), "steps": 4, "batch_size": 4, "precision": "no", "save_every": 2}
    tree: dict[str, Any] = {
        "stage": stage,
        "data": {"folder": str(tmp_path / "pictures"), "size": SIZE},
        "run": run | {"log_every": 2, "sample_every": 1000},
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 5},
    }
    if stage == "autoencoder":
        tree["model"] = {
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": SIZE,
        }
    elif stage == "lora":
        layers = ["attention", "feed_forward", "convolution"]
        tree |= {"stage": "diffusion", "start_from": str(tmp_path / "diffusion/model"), "prompts": ["a"]}
        tree["lora"] = {"rank": 2, "layers": layers, "dropout": 0.2}
    else:
        model = {"block_out_channels": [32, 64], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
        model |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 8, "layers_per_block": 1}
        tree["model"] = model | {"attention_head_dim": 2}
        tree["schedule"] = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
        tree |= {"autoencoder": str(tmp_path / "autoencoder"), "text_encoder": str(text_folder(tmp_path / "text"))}
        tree["prompts"] = ["a", "b"]
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section][key] = value
    file = tmp_path / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)


def text_folder(folder: Path) -> Path:
    """Write a BERT of random weights and a tokenizer that knows letters."""
    if not folder.exists():
        vocabulary = write_bert_vocabulary(folder / "tokenizer")
        size = len((vocabulary / "vocab.txt").read_text(encoding="utf-8").splitlines())
        torch.manual_seed(0)
        encoder = BertModel(BertConfig.from_dict(BERT | {"vocab_size": size, "use_attention_mask": True}))
        torch.nn.init.normal_(encoder.embeddings.word_embeddings.weight)
        save_model(encoder, folder / "text_encoder")
    return folder


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_latest(run)
    assert checkpoint is not None
    return checkpoint.tensors["model"] | {f"ema.{name}": tensor for name, tensor in checkpoint.tensors["ema"].items()}


def check_interrupted(file: str, place: Path) -> None:
    """Run a config of four steps twice, see that the second run ends alike when its last checkpoint is lost.

    The runs are place/unbroken and place/resumed.
    """
    for name in ("unbroken", "resumed"):
        cli_train(file, [], False, str(place / name))
    (place / "resumed/checkpoints/step-00000004/manifest.json").unlink()
    cli_train(file, [], True, str(place / "resumed"))
    unbroken, resumed = weights_of(place / "unbroken"), weights_of(place / "resumed")
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())


def test_adversarial_term_trains_both_sides_after_its_start(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 4)
    file = recipe(tmp_path, "autoencoder", run__save_every=1, run__keep_checkpoints=9)
    overrides = ["loss.adversarial=0.5", "loss.adversarial_start=2"]
    cli_train(file, overrides, False, str(tmp_path / "with"))
    cli_train(file, [], False, str(tmp_path / "without"))

    def at(run: str, step: int, part: str) -> torch.Tensor:
        from safetensors.torch import load_file

        tensors = load_file(tmp_path / run / f"checkpoints/step-{step:08d}" / f"{part}.safetensors")
        return torch.cat([tensor.flatten() for tensor in tensors.values()])

    assert torch.equal(at("with", 2, "model"), at("without", 2, "model"))
    assert not torch.equal(at("with", 3, "model"), at("without", 3, "model"))
    assert torch.equal(at("with", 1, "discriminator"), at("with", 2, "discriminator"))
    assert not torch.equal(at("with", 2, "discriminator"), at("with", 3, "discriminator"))


def test_folded_statistics_normalise_latents_and_leave_pictures_alone() -> None:
    torch.manual_seed(0)
    config = {"block_out_channels": [16], "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 3}
    model = AutoencoderKL(AutoencoderConfig.from_dict(config))
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    before = model.encode(images)
    picture = model.decode(before.mode())
    mean, std = before.mean.mean(dim=(0, 2, 3)).detach(), before.mean.std(dim=(0, 2, 3)).detach()
    fold_statistics(model, mean, std)
    after = model.encode(images)
    assert after.mean.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (after.mean.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4
    assert torch.allclose(after.logvar.exp(), before.logvar.exp() / std[:, None, None] ** 2, rtol=1e-3)
    assert torch.allclose(model.decode(after.mode()), picture, atol=1e-4)


def test_sixteen_pictures_go_through_both_commands_and_resume_is_bitwise(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 16)
    file = recipe(tmp_path, "autoencoder")
    cli_train(file, [], False, None)
    cli_train(file, ["run.steps=2"], False, str(tmp_path / "broken"))
    cli_train(file, ["run.steps=4"], True, str(tmp_path / "broken"))
    unbroken, resumed = weights_of(tmp_path / "autoencoder"), weights_of(tmp_path / "broken")
    # The learning rate falls over run.steps, so only a run with the same number of steps may be compared.
    assert unbroken.keys() == resumed.keys()
    diffusion = recipe(tmp_path, "diffusion")
    cli_train(diffusion, ["run.steps=2"], False, None)
    model = tmp_path / "diffusion" / "model"
    assert Pipeline.from_pretrained(model)("a", num_inference_steps=2).images[0].size == (SIZE, SIZE)
    with pytest.raises(InputError, match="add --resume"):
        cli_train(diffusion, [], False, None)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_interrupted_run_ends_with_the_weights_of_the_unbroken_one(tmp_path: Path, stage: str) -> None:
    pictures(tmp_path / "pictures", 6)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    check_interrupted(recipe(tmp_path, stage), tmp_path)


def test_batches_depend_on_seed_and_step_alone_and_drop_captions(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 6)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    config: Any = load_config(recipe(tmp_path, "diffusion"), ["run.batch_size=60", "caption_dropout=0.5"])
    data = prepare_data(config, diffusion_components(config), Path(config.run.out))
    batch, again = (draw_batch(data, config, 3) for _ in range(2))
    assert torch.equal(batch.latents, again.latents) and torch.equal(batch.context, again.context)
    assert 15 < int(batch.dropped.sum()) < 45
    assert torch.equal(batch.context[batch.dropped][0], data.texts.take([0])[0][0])
    assert batch.latents.shape == (60, 4, 8, 8)


def test_autoencoder_with_other_statistics_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 6)
    torch.manual_seed(0)
    model: Any = yaml.safe_load(Path(recipe(tmp_path, "autoencoder")).read_text())["model"]
    autoencoder = AutoencoderKL(AutoencoderConfig.from_dict(model))
    with torch.no_grad():
        assert autoencoder.quant_conv is not None
        autoencoder.quant_conv.bias += 3
    save_model(autoencoder, tmp_path / "autoencoder" / "vae")
    with pytest.raises(InputError, match="latents must have mean about 0"):
        cli_train(recipe(tmp_path, "diffusion"), [], False, None)


def test_training_goes_on_from_the_weights_of_another_model(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 6)
    cli_train(recipe(tmp_path, "autoencoder"), [], False, None)
    file = recipe(tmp_path, "diffusion")
    cli_train(file, [], False, None)
    tree: Any = yaml.safe_load(Path(file).read_text())
    first = {name: value for name, value in tree.items() if name not in PARTS}
    config: Any = parse_config({**first, "start_from": str(tmp_path / "diffusion/model")})
    components = diffusion_components(config)
    data = prepare_data(config, components, tmp_path / "diffusion")
    unet = network_to_train(config, data, components)
    trained = Pipeline.from_pretrained(tmp_path / "diffusion/model").components.unet
    assert trained is not None
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in unet.state_dict().items())
    assert all(parameter.requires_grad for parameter in unet.parameters())
    with pytest.raises(InputError, match=r"start_from brings its own model\.\w+; leave that out, or start anew"):
        parse_config({**tree, "start_from": "embedded"})
    with pytest.raises(InputError, match="start_from brings its own text_encoder; leave that out"):
        parse_config({**tree, "model": {}, "start_from": "embedded"})
    attended = {f"{way}_block_types": [f"CrossAttn{way.capitalize()}Block2D"] * 2 for way in ("down", "up")}
    config = parse_config({**first, "start_from": str(tmp_path / "diffusion/model"), "model": attended})
    grown: Any = diffusion_components(config)
    assert grown.unet.config.down_block_types == ("CrossAttnDownBlock2D",) * 2
    assert grown.unet.state_dict().keys() > trained.state_dict().keys()
    other = load_autoencoder(tmp_path / "autoencoder/vae")
    randomize(other)
    save_model(other, tmp_path / "other/vae")
    origin = {"start_from": str(tmp_path / "diffusion/model"), "autoencoder": str(tmp_path / "other")}
    config = parse_config({**first, **origin})
    found = diffusion_components(config).autoencoder.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(InputError, match="model is missing; describe it, or name a model to start_from"):
        parse_config(first)
    with pytest.raises(InputError, match=r"train.kind lora is for a model that is there; name it as start_from"):
        parse_config({**tree, "lora": {"rank": 4}})


@pytest.mark.long
def test_eight_pictures_are_reproduced(tmp_path: Path) -> None:
    pictures(tmp_path / "pictures", 8)
    often = {"run__batch_size": 8, "run__save_every": 240, "run__log_every": 240}
    cli_train(recipe(tmp_path, "autoencoder", run__steps=240, **often), [], False, None)
    changes = {"run__steps": 600, "run__batch_size": 16, "run__save_every": 600, "run__log_every": 600}
    changes["run__ema_decay"] = 0.98
    config: Any = load_config(recipe(tmp_path, "diffusion", **changes))
    cli_train(recipe(tmp_path, "diffusion", **changes), ["caption_dropout=0"], False, None)
    truth = torch.from_numpy(load_images(config.data).images[..., :3]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert psnr(load_autoencoder(tmp_path / "autoencoder")(truth)[0], truth).mean() > 20
    pipe = Pipeline.from_pretrained(tmp_path / "diffusion" / "model")
    prompts = [chr(ord("a") + index) for index in range(8)]
    drawn = pipe(prompts, guidance_scale=1.0, num_inference_steps=20, output_type="pt").images * 2 - 1
    distances = (drawn[:, None] - truth[None]).square().mean(dim=(2, 3, 4))
    assert distances.argmin(dim=1).tolist() == list(range(8))
    assert psnr(drawn, truth).mean() > 15
