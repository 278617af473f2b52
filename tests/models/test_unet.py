"""The U-Net: gradients, the prepared form, memory formats and dtypes, refused configurations and inputs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from latentdiff.errors import InputError, ModelConfigError
from latentdiff.models.unet import UNet2DConditionModel, UNetConfig
from tests.models.tiny import UNETS, randomize, relative_error, unet_inputs


def tiny(name: str = "sd1", **changes: Any) -> UNet2DConditionModel:
    model = UNet2DConditionModel(UNetConfig.from_dict(UNETS[name] | changes))
    randomize(model)
    return model


@pytest.mark.parametrize("name", UNETS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = tiny(name)
    model(**unet_inputs(model.config)).square().mean().backward()
    without = [key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


def test_a_new_network_predicts_zero_and_learns_from_its_last_layer_on() -> None:
    model = UNet2DConditionModel(UNetConfig.from_dict(UNETS["sd1"]))
    inputs = unet_inputs(model.config)
    prediction = model(**inputs)
    assert not prediction.any()
    (prediction - 1).square().mean().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert model(**inputs).any()


@pytest.mark.parametrize("name", UNETS)
def test_the_prepared_form_equals_forward(name: str) -> None:
    model = tiny(name)
    inputs = unet_inputs(model.config)
    with torch.no_grad():
        expected = model(**inputs)
    sample, timesteps = inputs.pop("sample"), inputs.pop("timesteps")
    prepared = model.prepare(torch.tensor([999.0, 801.0, 7.0]), **inputs)
    assert timesteps.tolist() == [7, 801]
    assert relative_error(prepared(sample, torch.tensor([2, 1])), expected) < 1e-6


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_rows_of_the_prepared_form(name: str) -> None:
    model = tiny(name)
    inputs = unet_inputs(model.config) | {"context_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])}
    with torch.no_grad():
        expected = model(**inputs)
    sample, timesteps = inputs.pop("sample"), inputs.pop("timesteps")
    prepared = model.prepare(timesteps, **inputs)
    second = prepared.rows(slice(1, 2))
    assert relative_error(second(sample[1:], torch.tensor([1])), expected[1:]) < 1e-6
    swapped = torch.tensor([1, 0])
    assert relative_error(prepared.rows(swapped)(sample[swapped], swapped), expected[swapped]) < 1e-6


def test_threads_may_prepare_and_call_one_network_at_once() -> None:
    model = tiny()
    inputs = unet_inputs(model.config)

    def run(seed: int) -> torch.Tensor:
        context = torch.randn(inputs["context"].shape, generator=torch.Generator().manual_seed(seed))
        prepared = model.prepare(torch.arange(4), context)
        return torch.stack([prepared(inputs["sample"], torch.full((2,), step)) for step in range(4)])

    alone = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_masked_text_has_no_influence() -> None:
    model = tiny()
    inputs = unet_inputs(model.config)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    with torch.no_grad():
        masked = model(**inputs, context_mask=mask)
        short = model(**inputs | {"context": inputs["context"][:, :3]})
    assert relative_error(masked, short) < 1e-6


def test_text_and_time_matter() -> None:
    model = tiny()
    inputs = unet_inputs(model.config)
    with torch.no_grad():
        expected = model(**inputs)
        assert not torch.allclose(model(**inputs | {"timesteps": torch.tensor([8, 801])}), expected)
        assert not torch.allclose(model(**inputs | {"context": inputs["context"].flip(0)}), expected)


def test_sides_that_do_not_halve() -> None:
    model = tiny()
    assert model(**unet_inputs(model.config, size=(7, 10))).shape == (2, 4, 7, 10)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_channels_last_gives_the_same_prediction(name: str) -> None:
    model = tiny(name)
    inputs = unet_inputs(model.config)
    with torch.no_grad():
        expected = model(**inputs)
        model.to(memory_format=torch.channels_last)
        inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
        assert relative_error(model(**inputs), expected) < 1e-5


@pytest.mark.parametrize("name", ["sd2", "xl"])
def test_half_precision_and_autocast(name: str) -> None:
    model = tiny(name)
    inputs = unet_inputs(model.config)
    with torch.no_grad():
        expected = model(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(**inputs)
    assert relative_error(prediction.float(), expected) < 0.05
    prediction.float().square().mean().backward()
    model.to(torch.bfloat16)
    half = {key: value.bfloat16() for key, value in inputs.items() if key in ("sample", "context")}
    if "added" in inputs:
        half["added"] = inputs["added"] | {"text_embeds": inputs["added"]["text_embeds"].bfloat16()}
    with torch.no_grad():
        assert relative_error(model(**inputs | half).float(), expected) < 0.1


def test_dropout_acts_while_training_only() -> None:
    model = tiny(dropout=0.5)
    inputs = unet_inputs(model.config)
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(model(**inputs), model(**inputs))
        model.eval()
        assert torch.equal(model(**inputs), model(**inputs))


@pytest.mark.parametrize(("name", "missing"), [("x4-upscaler", "class_labels"), ("xl", "text_embeds and time_ids")])
def test_missing_inputs_are_named(name: str, missing: str) -> None:
    model = tiny(name)
    inputs = unet_inputs(model.config)
    inputs.pop("class_labels", None)
    inputs.pop("added", None)
    with pytest.raises(InputError, match=missing):
        model(**inputs)


@pytest.mark.parametrize("name", UNETS)
def test_config_survives_the_way_through_json(name: str) -> None:
    config = UNetConfig.from_dict(UNETS[name])
    written = config.to_dict()
    assert written["_class_name"] == "UNet2DConditionModel"
    assert UNetConfig.from_dict(written) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types must be of CrossAttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, r"up_block_types must have one member per member .* \(2\), got 1"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type must be UNetMidBlock2DCrossAttn or null, got"),
        ({"attention_head_dim": 5}, r"multiples of attention_head_dim, the number of heads \(5\), got 16"),
        ({"attention_head_dim": [4, 5]}, r"the number of heads \(5\), got 32"),
        ({"attention_head_dim": [4, 4, 4]}, r"attention_head_dim must be one value or one per member .* \(2\), got"),
        ({"block_out_channels": [16, 36]}, r"multiples of norm_num_groups \(8\), got 36"),
        ({"transformer_layers_per_block": [1, [2]]}, "transformer_layers_per_block must be of type int"),
        ({"cross_attention_dim": None}, "cross_attention_dim must be of type int"),
        ({"class_embed_type": "identity"}, "class_embed_type must be null, timestep or projection, got 'identity'"),
        ({"class_embed_type": "projection"}, "projection_class_embeddings_input_dim is missing"),
        ({"addition_embed_type": "image"}, "addition_embed_type must be null, text or text_time, got 'image'"),
        (
            {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8},
            "addition_time_embed_dim is missing",
        ),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"time_embedding_type": "fourier"}, "needs time_embedding_type = \"positional\", got 'fourier'"),
        ({"dual_cross_attention": True}, "needs dual_cross_attention = false, got True"),
        ({"layer_per_block": 1}, "has no setting 'layer_per_block'; did you mean 'layers_per_block'"),
    ],
)
def test_refused_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message) as caught:
        UNetConfig.from_dict(UNETS["sd1"] | change)
    assert "\n" not in str(caught.value)
