"""Text-to-image from scratch with every kind of text encoder: trained, resumed, drawn here and in diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tokenizers
import torch
import transformers
from latentdiff.training.config import load_config
from latentdiff.training.setup import load_components, prepare_data
from safetensors.torch import save_file

from latentdiff import Pipeline
from latentdiff.checkpoints import load_pipeline
from latentdiff.checkpoints.compvis_keys import join, open_clip_keys
from latentdiff.commands.train import train as cli_train
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from tests.models.tiny import randomize, write_bert_vocabulary, write_clip_vocabulary
from tests.training.test_stages import SIZE, pictures, recipe, weights_of

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOW, END = 8, "<|endoftext|>"


def clip_folder(folder: Path, **options: Any) -> None:
    """Write Stable Diffusion 1.x's kind of text encoder."""
    vocabulary = write_clip_vocabulary(folder / "tokenizer", window=WINDOW, pad_token=options.pop("pad_token", END))
    size = len(json.loads((vocabulary / "vocab.json").read_text()))
    shape = {**SHAPE, "vocab_size": size, "max_position_embeddings": WINDOW, "eos_token_id": size - 1, **options}
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape)).save_pretrained(folder / "text_encoder")


def openclip_folder(folder: Path) -> None:
    """Write Stable Diffusion 2.x's: OpenCLIP's with its last layer left out, and its padding."""
    clip_folder(folder, hidden_act="gelu", pad_token="!", num_hidden_layers=3)


def t5_folder(folder: Path) -> None:
    """Write the encoder half of a T5."""
    shape = {"vocab_size": 16, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**shape, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    transformers.T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{sign}", -3.0) for sign in "abcdef")]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    options: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=WINDOW, **options)
    words.save_pretrained(folder / "tokenizer")


def bert_folder(folder: Path) -> None:
    """Write a BERT."""
    vocabulary = write_bert_vocabulary(folder / "tokenizer", window=WINDOW)
    size = len((vocabulary / "vocab.txt").read_text(encoding="utf-8").splitlines())
    config = transformers.BertConfig(**SHAPE, vocab_size=size, max_position_embeddings=WINDOW)
    transformers.BertModel(config).save_pretrained(folder / "text_encoder")


ENCODERS = {
    "clip": (clip_folder, transformers.CLIPTextModel),
    "openclip": (openclip_folder, transformers.CLIPTextModel),
    "t5": (t5_folder, transformers.T5EncoderModel),
    "bert": (bert_folder, transformers.BertModel),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, one of them with a long caption, a trained autoencoder, and the config of a run."""
    folder = tmp_path_factory.mktemp("runs")
    metadata = pictures(folder / "pictures", 6) / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"f"', f'"{" ".join("f" * 20)}"'))
    cli_train(recipe(folder, "autoencoder"), [], False, None)
    recipe(folder, "diffusion")
    return folder


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_network_learns_from_an_encoder_and_its_model_draws_alike_everywhere(
    place: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write, peer_class = ENCODERS[kind]
    torch.manual_seed(0)
    write(place / kind)
    run, broken = place / f"{kind}-run", place / f"{kind}-broken"
    changes = [f"text_encoder={place / kind}", "optimizer.warmup_steps=1", f"run.out={run}"]
    cli_train(str(place / "diffusion.yaml"), changes, False, None)

    config: Any = load_config(place / "diffusion.yaml", changes)
    data = prepare_data(config, load_components(config), run)
    words = transformers.AutoTokenizer.from_pretrained(run / "model/tokenizer")
    batch = words(data.captions, padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = peer_class.from_pretrained(place / kind / "text_encoder").eval()(batch.input_ids).last_hidden_state
    contexts, _ = data.texts.take(range(len(data.captions)))
    torch.testing.assert_close(contexts, expected, rtol=2e-3, atol=2e-3)  # float16 on disk

    shutil.copytree(run, broken)
    (broken / "checkpoints/step-00000004/manifest.json").unlink()
    capsys.readouterr()
    cli_train(str(place / "diffusion.yaml"), changes, True, str(broken))
    told = "1 of 7 captions are longer than the text window of 8 tokens, and only what fits is seen; first 'f f f"
    assert told in capsys.readouterr().err  # though they were encoded before
    unbroken, resumed = weights_of(run), weights_of(broken)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())

    unet = load_pipeline(run / "model").unet
    assert unet is not None and unet.config.cross_attention_dim == 32
    peer = diffusers.StableDiffusionPipeline.from_pretrained(run / "model", torch_dtype=torch.float32)
    peer.scheduler = diffusers.DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "pt"}
    reference = peer("a", height=SIZE, width=SIZE, **options).images
    pipe = Pipeline.from_pretrained(run / "model", device="cpu")
    drawn, other = (pipe(prompt, sampler="ddim", **options).images for prompt in "ab")
    assert (drawn - reference).abs().max() <= 2 / 255
    assert not torch.equal(drawn, other)


def test_openclip_s_own_folder_gives_a_model_of_the_usual_kind(place: Path) -> None:
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    shape = {"num_hidden_layers": 2, "hidden_act": "gelu", "intermediate_size": 128, "projection_dim": 8}
    encoder = CLIPTextModel(CLIPTextConfig(hidden_size=32, num_attention_heads=4, with_projection=True, **shape))
    randomize(encoder)
    (place / "open-clip").mkdir()
    weights = join(open_clip_keys(encoder.state_dict()), encoder.state_dict())
    save_file(weights, place / "open-clip/open_clip_model.safetensors")
    config = {"model_cfg": {"embed_dim": 8, "text_cfg": text}}
    (place / "open-clip/open_clip_config.json").write_text(json.dumps(config))
    run = place / "open-clip-run"
    cli_train(str(place / "diffusion.yaml"), [f"text_encoder={place / 'open-clip'}"], False, str(run))
    peer = diffusers.StableDiffusionPipeline.from_pretrained(run / "model", torch_dtype=torch.float32)
    ours = load_pipeline(run / "model")
    expected, _ = peer.encode_prompt("a red fox", "cpu", 1, False)
    (encoded,) = ours.prompt_encoder(["a red fox"])
    torch.testing.assert_close(encoded.states, expected, rtol=1e-4, atol=1e-4)
