"""One thing or one word taught to a model: DreamBooth, textual inversion, its text encoder; and models of XL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latentdiff.training.config import DiffusionTraining, TextualInversionConfig, load_config
from latentdiff.training.data.batches import draw_batch, sample_weights
from latentdiff.training.loop.checkpointing import checkpoint_folders
from latentdiff.training.networks.encoders import JointNetwork, add_words, new_words
from latentdiff.training.setup import load_components, prepare_data
from safetensors.torch import load_file
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline, save_pipeline
from latentdiff.checkpoints.textual_inversion import save_embedding
from latentdiff.commands.train import train as cli_train
from latentdiff.errors import InputError
from latentdiff.images import read_texts
from tests.parity.test_pipeline_xl import components as xl_components
from tests.training.test_lora_stage import base
from tests.training.test_lora_stage import file as lora_file  # noqa: F401  (a fixture)
from tests.training.test_stages import SIZE, weights_of

QUICK: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
WORD = ["lora=null", "textual_inversion={word: <it>, initializer: red fox, vectors: 3}", "prompts=[a <it>]"]
WORD += ["data.captions=[<it>, a <it>]"]
THING = ["lora=null", "data.captions=[a red thing]", "prior={prompt: a thing, pictures: 3, weight: 0.5}"]
ENCODER = ["lora=null", "train_text_encoder=true"]


def config_of(file: str, *changes: str) -> DiffusionTraining:
    config = load_config(file, list(changes))
    assert isinstance(config, DiffusionTraining)
    return config


def weights(folder: Path, part: str) -> dict[str, Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("changes", [WORD, THING, ENCODER], ids=["word", "thing", "encoder"])
def test_an_interrupted_run_ends_with_the_same_weights(lora_file: str, tmp_path: Path, changes: list[str]) -> None:  # noqa: F811
    for run in ("unbroken", "resumed"):
        cli_train(lora_file, changes, False, str(tmp_path / run))
    newest = checkpoint_folders(tmp_path / "resumed")[0]
    (newest / "manifest.json").unlink()
    cli_train(lora_file, changes, True, str(tmp_path / "resumed"))
    unbroken, resumed = weights_of(tmp_path / "unbroken"), weights_of(tmp_path / "resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())


def test_a_word_is_learnt_and_nothing_else(lora_file: str, tmp_path: Path) -> None:  # noqa: F811
    before = {path: path.read_bytes() for path in (tmp_path / "diffusion/model").rglob("*") if path.is_file()}
    cli_train(lora_file, WORD, False, str(tmp_path / "run"))
    assert all(path.read_bytes() == content for path, content in before.items())
    assert weights_of(tmp_path / "run").keys() == {"vectors", "ema.vectors"}
    file = tmp_path / "run" / "embedding.safetensors"
    (vectors,) = load_file(file).values()
    assert list(load_file(file)) == ["<it>"] and vectors.shape == (3, 16)
    table = weights(tmp_path / "diffusion/model", "text_encoder")["embeddings.word_embeddings.weight"]
    tokens = load_pipeline(tmp_path / "diffusion/model").tokenizer(["red fox"]).input_ids[0]  # type: ignore[misc]
    start = table[tokens[[1, 2, 1]]]
    assert 0 < float((vectors - start).abs().max()) < 0.1  # a few steps from where it began
    pipe = Pipeline.from_pretrained(tmp_path / "diffusion/model", device="cpu")
    knowing = pipe.with_embedding(file)
    assert torch.equal(knowing("red fox", **QUICK).images, pipe("red fox", **QUICK).images)
    assert not torch.equal(knowing("a <it>", **QUICK).images, pipe("a <it>", **QUICK).images)


def test_the_picture_with_a_word_is_the_same_while_it_is_trained_and_from_its_file(
    lora_file: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = config_of(lora_file, *WORD)
    assert isinstance(config.train, TextualInversionConfig) and config.start_from is not None
    components = add_words(load_pipeline(config.start_from), config.train)
    words = new_words(components, config.train)
    with torch.no_grad():
        words.vectors += 1.0
    changed = Pipeline(components)("a <it>", **QUICK).images
    save_embedding("<it>", words.vectors.detach(), tmp_path / "it.safetensors")
    loaded = Pipeline.from_pretrained(config.start_from, device="cpu").with_embedding(tmp_path / "it.safetensors")
    torch.testing.assert_close(changed, loaded("a <it>", **QUICK).images)
    assert components.unet is not None
    joint = JointNetwork(components.unet, components.text_encoder, words)
    tokens = components.tokenizer(["a <it>"])  # type: ignore[misc]
    rows = torch.stack([tokens.input_ids, tokens.attention_mask], dim=1)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    context = components.prompt_encoder(["a <it>"])[0].states
    torch.testing.assert_close(joint(x, t, rows), components.unet(x, t, context))


def test_a_trained_text_encoder_is_in_the_model(lora_file: str, tmp_path: Path) -> None:  # noqa: F811
    cli_train(lora_file, [*ENCODER, "caption_dropout=0.0"], False, str(tmp_path / "run"))
    before, after = (weights(place, "text_encoder") for place in (tmp_path / "diffusion/model", tmp_path / "run/model"))
    changed = {name for name in before if not torch.allclose(before[name], after[name].float(), atol=2e-3, rtol=1e-3)}
    assert any(name.startswith("encoder.layer.0") for name in changed)
    assert not any(name.startswith("pooler") for name in changed)  # which no U-Net sees
    table = after["embeddings.word_embeddings.weight"].float() - before["embeddings.word_embeddings.weight"]
    moved = table.abs().amax(dim=1) > 2e-3
    assert 0 < int(moved.sum()) < len(moved)  # of the words in captions alone
    assert Pipeline.from_pretrained(tmp_path / "run/model", device="cpu")("a", **QUICK).images.isfinite().all()


def test_pictures_of_a_prior_are_drawn_once_and_are_half_of_each_batch(lora_file: str, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "pictures" / "metadata.jsonl").unlink()  # a folder with nothing but pictures
    config = config_of(lora_file, *THING, "caption_dropout=0.25", "run.batch_size=8")
    data = prepare_data(config, load_components(config), tmp_path / "run")
    assert data.prior is not None and (len(data.samples), len(data.prior.samples)) == (6, 3)
    assert (data.captions, data.prior.captions) == (["", "a red thing"], ["", "a thing"])
    drawn = sorted((tmp_path / "run" / "prior").glob("*.png"))
    assert [json.loads(read_texts(file)["latentdiff"])["prompt"] for file in drawn] == ["a thing"] * 3
    drawn[1].unlink()
    before = {file: file.read_bytes() for file in (drawn[0], drawn[2])}
    again = prepare_data(config, load_components(config), tmp_path / "run")
    assert all(file.read_bytes() == content for file, content in before.items()) and drawn[1].is_file()
    own, others = data.latents.take(range(6)), data.prior.latents.take(range(3))
    for step in range(3):
        whole = draw_batch(data, config, step)
        for place in range(8):
            among = others if place % 2 else own
            assert any(torch.equal(whole.latents[place], one) for one in among)
            share = draw_batch(again, config, step, slice(place, place + 1))
            assert torch.equal(share.latents[0], whole.latents[place]) and share.dropped[0] == whole.dropped[place]
        halves = [draw_batch(data, config, step, part) for part in (slice(0, 3), slice(3, 8))]
        assert torch.equal(halves[0].joined(halves[1]).context, whole.context)
    assert sample_weights(config).tolist() == [2.0, 1.0] * 4


def test_a_model_of_xl_is_trained_with_sizes_and_pooled_text(lora_file: str, tmp_path: Path) -> None:  # noqa: F811
    components = xl_components(tmp_path)
    save_pipeline(components, tmp_path / "xl", dtype=None)
    start = base(tmp_path / "xl", tmp_path / "start", tmp_path / "pictures")
    config = config_of(lora_file, "lora=null", f"start_from={start}", "caption_dropout=0.5", "run.batch_size=16")
    loaded = load_components(config)
    data = prepare_data(config, loaded, tmp_path / "run")
    batch = draw_batch(data, config, 0)
    assert batch.added["time_ids"].tolist() == [[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 16
    encoded = loaded.prompt_encoder([data.captions[1]])[0]
    context, added = data.texts.take([1])
    assert encoded.pooled is not None
    torch.testing.assert_close(context[0], encoded.states[0], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(added["text_embeds"][0], encoded.pooled, atol=2e-3, rtol=1e-3)
    assert batch.dropped.any() and bool(batch.context[batch.dropped].any()) != loaded.force_zeros
    cli_train(lora_file, ["lora=null", f"start_from={start}"], False, str(tmp_path / "run"))
    before, after = (weights(place, "unet") for place in (start, tmp_path / "run/model"))
    assert not torch.allclose(
        before["add_embedding.linear_1.weight"], after["add_embedding.linear_1.weight"].float(), atol=2e-3
    )
    cli_train(lora_file, [f"start_from={start}"], False, str(tmp_path / "thin"))
    styled = Pipeline.from_pretrained(start, device="cpu").with_loras({tmp_path / "thin/lora.safetensors": 1.0})
    assert styled("a", **QUICK).images.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train_text_encoder=true"], "lora and train_text_encoder do not go together"),
        ([*ENCODER, "run.compile=true"], "train.kind unet_and_text does not go with run.compile"),
        ([*ENCODER, "text_encoder=labels"], "has no words to train"),
        ([*WORD, "train_text_encoder=true"], "textual_inversion and train_text_encoder do not go together"),
        ([*WORD, "prompts=[a fox]"], "has to use the word '<it>'"),
        ([*WORD, "textual_inversion.word=two words"], r"train\.word"),
        ([*THING, "run.batch_size=3"], "an even run.batch_size, got 3"),
        ([*THING, "data.buckets=true"], "data.buckets false"),
        (
            [*THING, "start_from=null", "model={sample_size: 8}", "schedule={beta_start: 0.001}"],
            "name it as start_from",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(lora_file: str, changes: list[str], message: str) -> None:  # noqa: F811
    with pytest.raises(InputError, match=message):
        load_config(lora_file, changes)


def test_words_that_are_known_or_empty_are_refused(lora_file: str, tmp_path: Path) -> None:  # noqa: F811
    changes = [*WORD, "textual_inversion.word=red", "prompts=[red]"]
    with pytest.raises(InputError, match="'red' is a word of the vocabulary already"):
        cli_train(lora_file, changes, False, None)
    with pytest.raises(InputError, match="initializer has no word"):
        cli_train(lora_file, [*WORD, "textual_inversion.initializer=''"], False, str(tmp_path / "other"))
