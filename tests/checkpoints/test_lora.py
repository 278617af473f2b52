"""LoRA files: every name finds its layer, what was written is read, what does not fit is refused and said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.checkpoints import Components, read_header
from latentdiff.checkpoints.family import families
from latentdiff.checkpoints.lora import apply_loras, describe_lora, load_lora, save_lora
from latentdiff.checkpoints.lora_names import DIALECTS, known_names, networks_of
from latentdiff.checkpoints.textual_inversion import add_embedding
from latentdiff.errors import (
    InputError,
    ModelConfigError,
    ModelFormatError,
    ModelMismatchError,
    ModelValueError,
    UnsafeModelError,
)
from latentdiff.models.clip import CLIPTextConfig, CLIPTextModel
from latentdiff.models.lora import Factors, LoRA, layers_of
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.checkpoints.test_single_file import FAMILIES, components_of, tiny

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{QUERY.replace('.', '_')}"


def lora_of(components: Components, *, seed: int = 0, tucker: bool = False) -> LoRA:
    """Factors for every layer of a model."""
    generator = torch.Generator().manual_seed(seed)
    networks: dict[str, dict[str, Factors]] = {}
    for network, model in networks_of(components).items():
        for name, layer in layers_of(model).items():
            rows, columns, *kernel = layer.weight.shape
            ones = [1] * len(kernel)
            mid = torch.randn(2, 2, *kernel, generator=generator) if tucker and kernel == [3, 3] else None
            down = torch.randn(2, columns, *(kernel if mid is None else ones), generator=generator)
            up = 0.1 * torch.randn(rows, 2, *ones, generator=generator)
            networks.setdefault(network, {})[name] = Factors(down.half(), up.half(), 1.5, mid)
    return LoRA(networks)


def digest(components: Components) -> str:
    """SHA-256 of all weights that a LoRA could change."""
    found = hashlib.sha256()
    for network in networks_of(components).values():
        for name, tensor in sorted(network.state_dict().items()):
            found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def components() -> Components:
    return components_of(tiny("Stable Diffusion 1.x"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path: Path, family: str, dialect: str) -> None:
    components, file = components_of(tiny(family)), tmp_path / "a.safetensors"
    lora = lora_of(components, tucker=dialect != "diffusers")
    save_lora(lora, file, components, dialect)
    loaded = load_lora(file, components)
    assert loaded.networks.keys() == lora.networks.keys()
    for network, layers in lora.networks.items():
        assert loaded.networks[network].keys() == layers.keys()
        for name, factors in layers.items():
            found = loaded.networks[network][name]
            assert torch.equal(found.down, factors.down) and torch.equal(found.up, factors.up)
            assert found.alpha == factors.alpha and found.down.dtype == torch.float16
            assert found.mid is factors.mid is None or torch.equal(found.mid, factors.mid)  # type: ignore[arg-type]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_equal_loras_are_equal_files(components: Components, tmp_path: Path) -> None:
    lora, files = lora_of(components), [tmp_path / f"{number}.safetensors" for number in range(8)]
    for file in files:
        save_lora(lora, file, components)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_layers_share_a_name(family: str) -> None:
    """Full size, on the meta device; only queries, keys and values of OpenCLIP are one tensor."""
    shape = families()[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.from_dict(shape["unet"]))
        encoders: list[Any] = [CLIPTextModel(CLIPTextConfig.from_dict(text["config"])) for text in shape["text"]]
    space = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
    rest: Any = {"autoencoder": space, "tokenizer": None, "schedule": None}
    components = Components(
        unet=unet, text_encoder=encoders[0], text_encoder_2=encoders[1] if encoders[1:] else None, **rest
    )
    names = known_names(components)
    assert all("attn_in_proj" in name and len(layers) == 3 for name, layers in names.items() if len(layers) > 1)
    expected = {(network, name) for network, model in networks_of(components).items() for name in layers_of(model)}
    assert {layer for layers in names.values() for layer in layers} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["Stable Diffusion 1.x", "Stable Diffusion XL"])
def test_taken_out_again_all_weights_are_the_same_bits(family: str, dtype: torch.dtype) -> None:
    components = components_of(tiny(family))
    for network in networks_of(components).values():
        network.to(dtype)
    before = digest(components)
    first, second = lora_of(components, seed=1), lora_of(components, seed=2)
    once = apply_loras(components, {first: 0.7})
    merged = {before, digest(once)}
    chain = once
    for loras in ({first: 0.3, second: -1.2}, {second: (0.0, 2.0)}, {second: 0.5, first: 1e-3}):
        chain = apply_loras(chain, loras)
        merged.add(digest(chain))
    assert len(merged) == 5  # each was another model
    assert digest(apply_loras(chain, {first: 0.7})) == digest(once)
    assert digest(apply_loras(chain, {})) == digest(components) == before
    assert apply_loras(chain, {}).loras == () and apply_loras(chain, {}).base is None
    assert chain.model_hash == components.model_hash


def test_all_but_the_networks_is_that_of_the_model_given(components: Components) -> None:
    """As when a schedule was replaced after a LoRA was put in."""
    merged = apply_loras(components, {lora_of(components): 1.0})
    other = replace(merged, schedule=replace(merged.schedule, prediction_type="v_prediction"))
    assert apply_loras(other, {}).schedule.prediction_type == "v_prediction"
    assert apply_loras(other, {}).base is None and digest(apply_loras(other, {})) == digest(components)


def test_a_weight_for_each_kind_of_network(components: Components) -> None:
    lora = lora_of(components)
    for weight, same in {(0.0, 1.0): "unet", (1.0, 0.0): "text_encoder"}.items():
        merged = apply_loras(components, {lora: weight})
        for name, network in networks_of(components).items():
            found = networks_of(merged)[name].state_dict()
            equal = all(torch.equal(tensor, found[key]) for key, tensor in network.state_dict().items())
            assert equal == (name == same)
        assert merged.loras[0].record() == {"path": None, "hash": "", "weight": list(weight)}
    for bad in (float("nan"), (1.0,), "1", None, (1, 2, 3)):
        with pytest.raises(InputError, match="weight of a LoRA must be a finite number, or two"):
            apply_loras(components, {lora: bad})


def test_what_is_kept_does_not_move(components: Components) -> None:
    model = apply_loras(components, {})  # a copy
    merged = apply_loras(model, {lora_of(components): 1.0})
    for network in networks_of(model).values():
        network.to(torch.float16)
    assert digest(apply_loras(merged, {})) == digest(components)
    for network in networks_of(merged).values():
        network.to(torch.float16)
    assert digest(apply_loras(merged, {})) == digest(model)
    assert networks_of(merged)["unet"].conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_{}.weight",
        "diffusion_model_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_{}.weight",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_{}.weight",
        f"{KOHYA}.lora_{{}}.weight",
        f"unet.{QUERY}.lora.{{}}.weight",
        f"unet.{QUERY.replace('to_q', 'processor.to_q_lora')}.{{}}.weight",
        f"{QUERY.replace('to_q', 'processor.to_q_lora')}.{{}}.weight",
        f"unet.base_model.model.{QUERY}.lora_{{}}.default.weight",
        f"base_model.model.{QUERY}.lora_{{}}.weight",
    ],
)
def test_names_of_one_layer(components: Components, tmp_path: Path, name: str) -> None:
    peft = "base_model" in name
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {name.format("A" if peft else "down"): down, name.format("B" if peft else "up"): up}
    save_file(tensors, tmp_path / "a.safetensors")
    (layers,) = load_lora(tmp_path / "a.safetensors", components).networks.values()
    assert list(layers) == [QUERY] and layers[QUERY].alpha == 2
    merged = networks_of(apply_loras(components, {tmp_path / "a.safetensors": 0.5}))["unet"].state_dict()
    for key, tensor in networks_of(components)["unet"].state_dict().items():
        expected = tensor + 0.5 * up @ down if key == f"{QUERY}.weight" else tensor
        torch.testing.assert_close(merged[key], expected)


TEXTS = {
    "Stable Diffusion 1.x": ("transformer_text_model_encoder_layers_1_self_attn_{}", "text_encoder"),
    "Stable Diffusion 2.x": ("model_transformer_resblocks_1_attn_{}", "text_encoder"),
    "Stable Diffusion XL": ("1_model_transformer_resblocks_1_attn_{}", "text_encoder_2"),
    "Stable Diffusion XL refiner": ("conditioner.embedders.0.model.transformer.resblocks.1.attn.{}", "text_encoder_2"),
}


@pytest.mark.parametrize("family", list(TEXTS))
def test_names_of_text_encoders_in_the_original_layout(tmp_path: Path, family: str) -> None:
    components, (name, network) = components_of(tiny(family)), TEXTS[family]
    weights = {head: torch.randn(16, 2) for head in ("q_proj", "k_proj", "v_proj")}
    down, file = torch.randn(2, 16), tmp_path / "a.safetensors"
    one = {f"{name.format(head)}.lora_up.weight": up for head, up in weights.items()}
    one |= {f"{name.format(head)}.lora_down.weight": down.clone() for head in weights}
    stacked = torch.cat(list(weights.values()))
    whole = {f"{name.format('in_proj')}.lora_up.weight": stacked, f"{name.format('in_proj')}.lora_down.weight": down}
    for tensors in [one] if family == "Stable Diffusion 1.x" else [one, whole]:
        save_file(tensors, file)
        layers = load_lora(file, components).networks[network]
        assert {key[-6:]: value.up.flatten(1).tolist() for key, value in layers.items()} == {
            head: up.tolist() for head, up in weights.items()
        }
        assert all(key.startswith("text_model.encoder.layers.1.self_attn.") for key in layers)
        assert all(torch.equal(factors.down, down) for factors in layers.values())


def pair(name: str = KOHYA, rank: int = 2, width: int = 16) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(rank, width), f"{name}.lora_up.weight": torch.ones(16, rank)}


CONTEXT = KOHYA.replace("attn1_to_q", "attn2_to_k")
DOWN = f"{KOHYA}.lora_down.weight"
ODD: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "other layer": (pair("lora_unet_double_blocks_0"), ModelMismatchError, "lora_unet_double_blocks_0.*is no layer of"),
    "other tensor": (
        pair() | {"emb_params": torch.ones(2)},
        ModelMismatchError,
        "emb_params is no layer of this model",
    ),
    "other width": (pair(width=24), ModelMismatchError, r"\[2, 24\] and \[16, 2\] make no change of \[16, 16\]"),
    "other family": (pair(CONTEXT, width=2048), ModelMismatchError, "by its shapes it is for Stable Diffusion XL"),
    "many": ({f"lora_unet_{i}.alpha": torch.ones(()) for i in range(9)}, ModelMismatchError, "and 4 more; use it with"),
    "half": ({DOWN: torch.ones(2, 16)}, ModelMismatchError, "lora_down.weight has no up beside it"),
    "alpha alone": ({f"{KOHYA}.alpha": torch.ones(())}, ModelMismatchError, "alpha has no down and no up beside it"),
    "twice": (pair() | pair(f"unet.{QUERY}"), ModelMismatchError, "is the same as"),
    "whole numbers": ({k: v.int() for k, v in pair().items()}, ModelMismatchError, "is of I32 and I32, not of F8_E4M3"),
    "alphas": (
        pair() | {f"{KOHYA}.alpha": torch.ones(2)},
        ModelMismatchError,
        r"is F32 \[2\] instead of one number",
    ),
    "NaN": (pair() | {DOWN: torch.full((2, 16), torch.nan)}, ModelValueError, "32 values that are NaN"),
    "alpha NaN": (
        pair() | {f"{KOHYA}.alpha": torch.tensor(torch.inf)},
        ModelValueError,
        "1 values that are NaN or inf",
    ),
    "DoRA": (pair() | {f"{KOHYA}.dora_scale": torch.ones(16)}, ModelConfigError, "expected LoRA, got DoRA"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": torch.ones(16, 2)}, ModelConfigError, "expected LoRA, got LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": torch.ones(4, 4)}, ModelConfigError, "expected LoRA, got LoKr"),
}


@pytest.mark.parametrize("case", list(ODD))
def test_odd_files_are_refused(components: Components, tmp_path: Path, case: str) -> None:
    tensors, error, message = ODD[case]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        load_lora(tmp_path / "a.safetensors", components)


def test_a_layer_by_itself_and_within_a_stack_is_refused(tmp_path: Path) -> None:
    components = components_of(tiny("Stable Diffusion 2.x"))
    stack = {f"model_transformer_resblocks_0_attn_in_proj.lora_{half}.weight" for half in ("up", "down")}
    tensors = dict(zip(sorted(stack), (torch.ones(2, 16), torch.ones(48, 2))))
    save_file(tensors | pair("lora_te_text_model_encoder_layers_0_self_attn_k_proj"), tmp_path / "a.safetensors")
    with pytest.raises(ModelMismatchError, match=r"self_attn\.k_proj of text_encoder is there twice"):
        load_lora(tmp_path / "a.safetensors", components)


def test_pickles_and_broken_settings_are_refused(components: Components, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for settings, message in (("{", "is no JSON"), ('{"unet.lora_alpha": "8"}', "must be a finite number, got '8'")):
        save_file(pair(), file, metadata={"lora_adapter_metadata": settings})
        with pytest.raises(ModelConfigError, match=message):
            load_lora(file, components)
    file.write_bytes(b"PK\x03\x04" + bytes(600))
    with pytest.raises(UnsafeModelError):
        load_lora(file, components)


def test_what_cannot_be_written_is_said(components: Components, tmp_path: Path) -> None:
    file, lora = tmp_path / "a.safetensors", lora_of(components, tucker=True)
    cases: list[tuple[Path, str, str]] = [
        (file, "lycoris", "dialect 'lycoris' is unknown"),
        (tmp_path / "a.pt", "kohya", "must end in .safetensors"),
        (file, "diffusers", "is in Tucker form, which diffusers cannot read"),
    ]
    for path, dialect, message in cases:
        with pytest.raises(InputError, match=message):
            save_lora(lora, path, components, dialect)
    broken = LoRA({"unet": {QUERY: Factors(torch.full((2, 16), torch.inf), torch.ones(16, 2), 1.0)}})
    with pytest.raises(ModelValueError, match=r"is not finite in torch.float32: it has inf"):
        save_lora(broken, file, components)
    assert not list(tmp_path.iterdir())


def test_files_say_what_they_are(components: Components, tmp_path: Path) -> None:
    file, counts = tmp_path / "a.safetensors", {"text_encoder": 12, "unet": 283}
    for dialect in DIALECTS:
        save_lora(lora_of(components), file, components, dialect)
        described = describe_lora(file, read_header(file))
        assert described is not None and json.loads(json.dumps(described)) == described
        assert described["kind"] == "LoRA" and described["dialect"] == dialect
        assert (described["layers"], described["ranks"], described["alphas"]) == (counts, [2], [1.5])
        assert described["convolutions"] == 52
    save_file(pair(CONTEXT, width=768), file)
    described = describe_lora(file, read_header(file))
    assert described is not None and described["family"] == "Stable Diffusion 1.x"
    assert described["alphas"] == "as the ranks"
    for case, kind in {"DoRA": "LoRA with DoRA (not supported)", "LoKr": "LoKr (not supported)"}.items():
        save_file(ODD[case][0], file)
        assert (describe_lora(file, read_header(file)) or {})["kind"] == kind
    save_file({"a": torch.ones(1)}, file)
    assert describe_lora(file, read_header(file)) is None


def test_a_file_of_several_dialects(components: Components, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(pair() | pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj"), file)
    assert load_lora(file, components).networks.keys() == {"unet", "text_encoder"}
    described = describe_lora(file, read_header(file))
    assert described is not None and described["dialect"] == "diffusers and kohya"
    assert load_file(file).keys() == read_header(file).tensors.keys()


@pytest.mark.parametrize("dialect", ["kohya", "webui"])
def test_files_for_other_programs_say_what_model_they_are_for(tmp_path: Path, dialect: str) -> None:
    for family, version in (("Stable Diffusion 1.x", "sd_v1"), ("Stable Diffusion 2.x", "sd_v2_v")):
        components, file = components_of(tiny(family)), tmp_path / "a.safetensors"
        factors = Factors(torch.ones(2, 16), torch.ones(16, 2), 1.0)
        save_lora(LoRA({"text_encoder": {TEXT: factors}}), file, components, dialect)
        header = read_header(file)
        assert header.metadata["ss_base_model_version"] == version
        assert (describe_lora(file, header) or {})["family"] == family


TEXT = "text_model.encoder.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.float64])
def test_alphas_that_are_whole_numbers(components: Components, tmp_path: Path, kind: torch.dtype) -> None:
    """As diffusers writes them in kohya's dialect."""
    save_file(pair() | {f"{KOHYA}.alpha": torch.tensor(3, dtype=kind)}, tmp_path / "a.safetensors")
    assert load_lora(tmp_path / "a.safetensors", components).networks["unet"][QUERY].alpha == 3
    described = describe_lora(tmp_path / "a.safetensors", read_header(tmp_path / "a.safetensors"))
    assert described is not None and described["alphas"] == [3]


@pytest.mark.parametrize(
    ("family", "prefix", "network"),
    [
        ("Stable Diffusion 1.x", "text_encoders.clip_l.transformer", "text_encoder"),
        ("Stable Diffusion 1.x", "clip_l.transformer", "text_encoder"),
        ("Stable Diffusion 2.x", "text_encoders.clip_h.transformer", "text_encoder"),
        ("Stable Diffusion XL", "text_encoders.clip_l.transformer", "text_encoder"),
        ("Stable Diffusion XL", "text_encoders.clip_g.transformer", "text_encoder_2"),
        ("Stable Diffusion 1.x", "lora_te1", "text_encoder"),
        ("Stable Diffusion 2.x", "lora_te1", "text_encoder"),
    ],
)
def test_names_of_text_encoders_in_other_programs(tmp_path: Path, family: str, prefix: str, network: str) -> None:
    name = f"{prefix}.{TEXT}".replace(".", "_") if prefix.startswith("lora") else f"{prefix}.{TEXT}"
    file = tmp_path / "a.safetensors"
    save_file(pair(name) | {"text_model.embeddings.position_ids": torch.arange(77)}, file)
    assert load_lora(file, components_of(tiny(family))).networks.keys() == {network}
    described = describe_lora(file, read_header(file))
    assert described is not None and described["layers"] == {network: 1}


ADVICE: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "embedding": ({"emb_params": torch.ones(2, 16)}, {}, "holds learned words; pass it as an embedding"),
    "embedding of XL": ({"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 16)}, {}, "pass it as an embedding"),
    "embedding of diffusers": ({"<fox>": torch.ones(16)}, {}, "pass it as an embedding"),
    "model": ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, {}, "pass it as the model"),
    "VAE": ({"decoder.conv_in.weight": torch.ones(1)}, {}, "it is a VAE"),
    "ControlNet": ({"control_model.a.weight": torch.ones(1)}, {}, "ControlNet, which is not supported"),
    "Flux": (pair("lora_unet_double_blocks_0_img_attn_proj"), {}, "by its names it is for Flux"),
    "SD 3": (pair("lora_unet_joint_blocks_0_x_block_attn_proj"), {}, "for Stable Diffusion 3"),
    "XL": (pair("lora_te2_text_model_encoder_layers_31_mlp_fc1"), {}, "for Stable Diffusion XL"),
    "metadata": (pair("lora_unet_x"), {"ss_base_model_version": "sdxl_base_v1-0"}, "say that it is for .* XL"),
    "architecture": (pair("lora_unet_x"), {"modelspec.architecture": "stable-diffusion-v2-512/lora"}, "for .* 2.x"),
    "nothing": ({"x.position_ids": torch.arange(3)}, {}, "there is no layer among its 1 tensors"),
    "no name": ({"": torch.ones(2)} | pair(), {}, "is no layer of this model"),
}
UNSUPPORTED = {"GLoRA": "a1.weight", "LoRA with biases": "lora_B.bias", "LyCORIS with learned scales": "scalar"}


@pytest.mark.parametrize("case", list(ADVICE))
def test_advice_is_for_what_the_file_is(components: Components, tmp_path: Path, case: str) -> None:
    tensors, metadata, message = ADVICE[case]
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ModelMismatchError, match=message):
        load_lora(tmp_path / "a.safetensors", components)


@pytest.mark.parametrize("method", list(UNSUPPORTED))
def test_other_methods_are_named(components: Components, tmp_path: Path, method: str) -> None:
    save_file(pair() | {f"{KOHYA}.{UNSUPPORTED[method]}": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelConfigError, match=f"expected LoRA, got {method}"):
        load_lora(tmp_path / "a.safetensors", components)


def test_learned_words_beside_a_lora(tmp_path: Path) -> None:
    """The LoRA is loaded, its words are told of, and are added from the same file."""
    components, file = components_of(tiny("Stable Diffusion XL")), tmp_path / "a.safetensors"
    layer = pair(f"lora_te1_{TEXT.replace('.', '_')}")
    word = {f"bundle_emb.mytoy.{kind}": torch.ones(2, 16) for kind in ("clip_l", "clip_g")}
    save_file(layer | word, file)
    with pytest.warns(UserWarning, match=r"holds learned words besides \(mytoy\)"):
        lora = load_lora(file, components)
    assert lora.networks.keys() == {"text_encoder"}
    described = describe_lora(file, read_header(file))
    assert described is not None and described["learned words"] == ["mytoy"]
    learned = add_embedding(components, file)
    assert learned.embeddings[0]["word"] == "mytoy" and learned.tokenizer is not None
    assert learned.tokenizer(["a mytoy"]).counts == [5]
    load_lora(file, learned)  # which would warn
    more = {name.replace("mytoy", "othertoy"): torch.ones(1, 16) for name in word}
    save_file(layer | word | more, file)
    assert add_embedding(components, file, "othertoy").tokenizer.knows("othertoy")  # type: ignore[union-attr]
    with pytest.raises(InputError, match="holds 2 words, mytoy, othertoy; say which, got None"):
        add_embedding(components, file)


HUGE = 10**400


def test_numbers_that_no_float_holds(components: Components, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    huge, pattern, null = f'{{"unet.lora_alpha": {HUGE}}}', '{"unet.alpha_pattern": {"to_q": [1]}}', "null"
    for settings in (huge, pattern, f'{{"unet.lora_alpha": {null}}}'):
        save_file(pair(), file, metadata={"lora_adapter_metadata": settings})
        with pytest.raises(ModelConfigError, match="must be a finite number"):
            load_lora(file, components)
        assert describe_lora(file, read_header(file)) is not None
    with pytest.raises(InputError, match="weight of a LoRA must be a finite number"):
        apply_loras(components, {lora_of(components): HUGE})
    for wrong in ([file], file, 3):
        with pytest.raises(InputError, match="LoRAs must be files with their weights"):
            apply_loras(components, wrong)  # type: ignore[arg-type]
    for path in (3, b"a.safetensors", None):
        with pytest.raises(InputError, match="must be given by its path"):
            load_lora(path, components)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="must be given by its path"):
            add_embedding(components, path)  # type: ignore[arg-type]
    for word in (3, "a\ud800", "a\0"):
        save_file({"emb_params": torch.ones(1, 16)}, file)
        with pytest.raises(InputError, match="word for an embedding must be text"):
            add_embedding(components, file, word)  # type: ignore[arg-type]


def test_statistics_of_many_tags_are_no_hindrance(components: Components, tmp_path: Path) -> None:
    tags = json.dumps({"folder": {f"tag {number}": 1 for number in range(530_000)}})
    save_file(pair(), tmp_path / "a.safetensors", metadata={"ss_tag_frequency": tags})
    assert load_lora(tmp_path / "a.safetensors", components).networks.keys() == {"unet"}
    save_file(pair(), tmp_path / "a.safetensors", metadata={"ss_tag_frequency": tags * 2})
    with pytest.raises(ModelFormatError, match="if it is all metadata, save the tensors again without"):
        load_lora(tmp_path / "a.safetensors", components)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_of_float8_are_read(components: Components, tmp_path: Path, dtype: torch.dtype) -> None:
    save_lora(lora_of(components), tmp_path / "a.safetensors", components, "kohya")
    stored = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "a.safetensors").items()}
    save_file(stored, tmp_path / "small.safetensors")
    save_file({name: tensor.half() for name, tensor in stored.items()}, tmp_path / "same.safetensors")
    small, same = (apply_loras(components, {tmp_path / f"{name}.safetensors": 1.0}) for name in ("small", "same"))
    assert digest(small) == digest(same) != digest(components)
