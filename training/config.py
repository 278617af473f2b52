"""Training configs: one YAML a recipe; an unknown key fails with the closest valid one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from latentdiff.errors import InputError, suggest


class Section(BaseModel):
    """Part of a config: frozen, and refusing keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Captioned pictures, wherever they are kept (`training.data.sources`)."""

    # An imagefolder with metadata.jsonl (columns file_name and text or captions); a .csv, .tsv or .jsonl file of paths
    # and captions; .parquet or .arrow files; webdataset's .tar shards, all of a folder or pattern (in/{000..019}.tar),
    # or remote ones (https://host/{000..019}.tar; s3:// and whatever else fsspec reads); or hub:owner/name.
    folder: str
    # Columns of tables; where null, the only one with a usual name.
    image_column: str | None = None
    caption_column: str | None = None
    size: int = Field(64, ge=8, le=2048, multiple_of=8)
    # Sizes of about the area size x size near each picture's own shape, each batch of one of them; else all are square.
    buckets: bool = False
    # What of a picture that is longer than its frame is kept: its middle, or a window anywhere in it.
    crop: Literal["center", "random"] = "center"
    # Of crop: random, how many times larger than needed pictures are before a window is cut out of them.
    zoom: float = Field(1.0, ge=1, le=16)
    # Of crop: random, how many windows of each picture have their latents in the cache.
    crops: int = Field(4, ge=1, le=64)
    # Keep only the rows whose metadata columns have one of these values ({"group": ["animals-nature"]}) ...
    keep: dict[str, list[str | bool]] = {}
    # ... and none of these.
    drop: dict[str, list[str | bool]] = {}
    # One caption for each picture, drawn anew each time, instead of their own; a folder then needs only pictures.
    captions: list[str] = []
    # Share of the pictures that is never trained on and measured by instead; which they are follows from each file's
    # bytes. 0: the validation split, where there is one.
    held_out: float = Field(0.0, ge=0, lt=1)
    background: str = "white"
    # Augmented versions of each picture: plain, flip, hue, background, pair (`training.data.augment`).
    variants: list[Literal["plain", "flip", "hue", "background", "pair"]] = ["plain"]

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        """Refuse what does not go together."""
        if self.zoom > 1 and self.crop != "random":
            raise ValueError(f"data.zoom {self.zoom:g} leaves most of a picture out; it needs data.crop random")
        if self.buckets and "pair" in self.variants:
            raise ValueError("the variant pair needs squares: set buckets to false, or leave pair out")
        return self

    @property
    def views(self) -> list[tuple[str, int]]:
        """Kind and window of each view of a picture whose latents are in the cache."""
        windows = range(self.crops if self.crop == "random" else 1)
        return [(kind, window) for kind in dict.fromkeys(self.variants) for window in windows]


class OptimizerConfig(Section):
    """An optimizer with linear warm-up, then a constant learning rate, then a cosine fall to zero."""

    # adamw; adamw_8bit, the same with a quarter of its memory (bitsandbytes); adafactor, which keeps the means of rows
    # and columns alone: next to nothing for linear layers, two thirds of one moment for 3x3 convolutions.
    kind: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    # Of adafactor: relative to the size of each tensor, so that 1e-3 to 1e-2 is usual.
    learning_rate: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    # Share of all steps, at the end, over which the learning rate falls to zero by a cosine.
    decay_share: float = Field(0.5, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        """Refuse what does not go together."""
        if self.kind == "adafactor" and self.betas != type(self).model_fields["betas"].default:
            raise ValueError("optimizer.betas are those of adamw; leave them out with optimizer.kind adafactor")
        return self


class RunConfig(Section):
    """What every stage has: length, batch, precision, seed and how often things are written."""

    out: str
    steps: int = Field(ge=1)
    # Of one optimizer step, over all processes and micro-steps.
    batch_size: int = Field(ge=1)
    # Micro-steps that one optimizer step is split into, to save memory.
    accumulation: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    # Of the autocast; weights, average and optimizer are float32 always. auto: bf16 on a GPU and on CPUs with native
    # bf16 matrix instructions, fp32 elsewhere. fp16 is for GPUs without bf16.
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    compile: bool = False
    # Compute activations again in the backward pass instead of keeping them.
    gradient_checkpointing: bool = False
    ema_decay: float = Field(0.999, ge=0, lt=1)
    # Snapshots of averages of two widths, in ema/ of the run, every so many steps and at the end; 0 for none. From some
    # 50 `training.loop.posthoc_ema` makes the average of any width. Each takes 4 bytes a weight on disk, the averages 8
    # in memory and in every checkpoint.
    ema_snapshots: int = Field(0, ge=0)
    log_every: int = Field(50, ge=1)
    sample_every: int = Field(1000, ge=1)
    save_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    # Where scalars and sample grids are written besides the run folder's samples/: TensorBoard files in its logs/,
    # Weights & Biases, Trackio. Nothing leaves this machine but by the last two.
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        """Refuse what does not go together."""
        if len({*self.trackers}) < len(self.trackers):
            raise ValueError("run.trackers names one twice; leave that out")
        return self


class AutoencoderLoss(Section):
    """Weights of the autoencoder's loss terms; `training.losses.image` defines each."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(0.0, ge=0)
    gradient: float = Field(0.5, ge=0)
    ssim: float = Field(0.1, ge=0)
    kl: float = Field(1e-6, ge=0)
    # Distance of features (`training.losses.lpips`), and the file of the weights that it needs.
    lpips: float = Field(0.0, ge=0)
    lpips_weights: str | None = None
    adversarial: float = Field(0.0, ge=0)
    adversarial_start: int = Field(0, ge=0)
    # Gamma of the penalty on the discriminator's slope; 0 for none.
    r1: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together."""
        if not any((self.l1, self.l2, self.gradient, self.ssim, self.kl, self.lpips)):
            raise ValueError("the loss has no term: set loss.l1 above 0")
        if self.lpips and self.lpips_weights is None:
            raise ValueError("loss.lpips needs loss.lpips_weights: `python -m latentdiff.training.losses.lpips FILE`")
        if self.r1 and not self.adversarial:
            raise ValueError("loss.r1 is of the discriminator: set loss.adversarial above 0, or loss.r1 to 0")
        return self


class LoraConfig(Section):
    """Train thin layers beside those of a frozen U-Net (`training.networks.lora`) instead of the U-Net itself."""

    rank: int = Field(16, ge=1, le=1024)
    # What the layers' outputs are scaled by, times the rank; the rank when null.
    alpha: float | None = Field(None, gt=0)
    # Share of the inputs that is left out while training.
    dropout: float = Field(0.0, ge=0, lt=1)
    layers: list[Literal["attention", "feed_forward", "convolution"]] = Field(["attention"], min_length=1)


class PriorConfig(Section):
    """Train also on pictures that `start_from` draws of the kind of thing, so that it does not forget it (DreamBooth).

    Every second sample of a batch is one of them.
    """

    # What they show: "a dog", where the own pictures are of "sks dog".
    prompt: str = Field(min_length=1)
    pictures: int = Field(100, ge=1)
    # Of their loss beside that of the own pictures.
    weight: float = Field(1.0, gt=0)


class TextualInversionConfig(Section):
    """Train the vectors of one new word instead of the U-Net; captions or data.captions use it."""

    word: str = Field(pattern=r"^\S+$")
    # What its vectors are at first: a word that is known, or several.
    initializer: str
    vectors: int = Field(1, ge=1, le=75)


class AutoencoderTraining(Section):
    """`stage: autoencoder`."""

    stage: Literal["autoencoder"]
    data: DataConfig
    run: RunConfig
    # Keys of `latentdiff.models.autoencoder.AutoencoderConfig`.
    model: dict[str, Any]
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: AutoencoderLoss = AutoencoderLoss()

    @model_validator(mode="after")
    def _check(self) -> AutoencoderTraining:
        """Refuse what does not go together."""
        if self.data.buckets:
            raise ValueError("an autoencoder is trained on squares; data.buckets is for stage diffusion")
        if self.run.ema_snapshots:
            raise ValueError("run.ema_snapshots is for stage diffusion; set it to 0")
        if self.loss.lpips and self.data.size < 16:
            raise ValueError(f"loss.lpips needs pictures of 16 pixels or more, got data.size {self.data.size}")
        return self


class DiffusionTraining(Section):
    """`stage: diffusion`: text-to-image in the latent space of a trained autoencoder, or classes, or in pixels."""

    stage: Literal["diffusion"]
    # inpaint: part of a picture is drawn anew, by the U-Net of any text-to-image model with more input channels.
    # upscale: a picture is drawn as many times larger as the autoencoder makes it smaller (`training.data.conditions`).
    task: Literal["text_to_image", "inpaint", "upscale"] = "text_to_image"
    # Of task: inpaint, share of samples that are drawn anew as a whole, so that text alone stays enough.
    full_mask: float = Field(0.1, ge=0, le=1)
    # Of task: upscale, how strongly small pictures are blurred, noisy and compressed at most, each sample by a strength
    # of its own from 0 up (`data/degradation.py`); and how much noise is put on them at most, of which the U-Net is
    # told, in timesteps of low_res_schedule (keys of `latentdiff.diffusion.schedule.NoiseSchedule`).
    degradation: float = Field(1.0, ge=0, le=1)
    max_noise_level: int = Field(350, ge=0, le=999)
    low_res_schedule: dict[str, Any] = {}
    data: DataConfig
    run: RunConfig
    # Run or model folder whose autoencoder is used, or "embedded"; null for diffusion of the pixels themselves.
    autoencoder: str | None = None
    # Of the pixels, where there is no autoencoder: 3 for colour, 1 for shades of grey.
    channels: Literal[1, 3] = 3
    # Folder with text_encoder/ and tokenizer/, or of OpenCLIP's layout; "embedded" takes those of the model that ships
    # with the package, "labels" makes each different caption a class, "none" trains without any condition.
    text_encoder: str = "embedded"
    # Keys of `latentdiff.models.unet.UNetConfig`; in_channels, out_channels and sample_size follow from the latents.
    model: dict[str, Any] = {}
    # Keys of `latentdiff.diffusion.schedule.NoiseSchedule`.
    schedule: dict[str, Any] = {}
    # A model that is trained further, instead of the four keys above: a folder, a single file or "embedded".
    start_from: str | None = None
    # Train thin layers beside those of `start_from` instead of its U-Net.
    lora: LoraConfig | None = None
    # Train the text encoder too; captions are then encoded anew in every step.
    train_text_encoder: bool = False
    prior: PriorConfig | None = None
    textual_inversion: TextualInversionConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    caption_dropout: float = Field(0.1, ge=0, le=1)
    # simple: squared error; hybrid: with the variational bound for a learned variance (schedule.variance_type
    # learned_range); vlb: the bound alone.
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    # Of the bound, in bits per dimension, in the hybrid loss.
    vlb_weight: float = Field(0.001, ge=0)
    # How timesteps are drawn: alike, more often in the middle, or more often where the loss is large (for loss: vlb).
    timesteps: Literal["uniform", "logit_normal", "importance"] = "uniform"
    # Give the network its own estimate of the step before, in twice the channels.
    self_conditioning: bool = False
    # How the squared error is weighed over timesteps; `training.losses.diffusion.loss_weight` defines each.
    weighting: Literal["min_snr", "p2", "debiased"] = "min_snr"
    # Of weighting: min_snr, the cap of the signal-to-noise ratio; 0 weighs all timesteps alike.
    min_snr_gamma: float = Field(5.0, ge=0)
    # Share of noise that is one number for each channel of a sample, so that whole pictures learn to be dark or bright.
    offset_noise: float = Field(0.0, ge=0, le=1)
    # Share of noise that the network sees and is not asked for, which makes up for its own errors while sampling.
    input_perturbation: float = Field(0.0, ge=0, le=1)
    prompts: list[str] = ["a red fox", "a green tree", "a house", "a blue car"]
    guidance_scale: float = Field(4.0, ge=0, le=50)
    cache: str | None = None

    @property
    def encodes_each_step(self) -> bool:
        """Whether text states change while training."""
        return self.train_text_encoder or self.textual_inversion is not None

    @model_validator(mode="after")
    def _what_is_drawn(self) -> Self:
        """Refuse what does not go together with a task."""
        if self.task == "text_to_image":
            return self
        others = {
            "prior": self.prior,
            "textual_inversion": self.textual_inversion,
            "self_conditioning": self.self_conditioning,
            "data.buckets": self.data.buckets,
        }
        other = next((name for name, given in others.items() if given), None)
        if other is not None:
            raise ValueError(f"task: {self.task} does not go with {other}; leave one out")
        if self.start_from is None and self.autoencoder is None:
            raise ValueError(f"task: {self.task} needs latents; name an autoencoder, or a model to start_from")
        return self

    @model_validator(mode="after")
    def _what_is_trained(self) -> Self:
        """Refuse what does not go together."""
        if self.encodes_each_step and self.text_encoder in ("labels", "none"):
            raise ValueError(f"text_encoder: {self.text_encoder} has no words to train; name one with a vocabulary")
        others = {"lora": self.lora, "run.compile": self.run.compile, "run.ema_snapshots": self.run.ema_snapshots}
        other = next((name for name, given in others.items() if given), None)
        if self.encodes_each_step and other is not None:
            raise ValueError(f"train_text_encoder and textual_inversion do not go with {other}; leave one out")
        if self.textual_inversion is not None:
            if self.train_text_encoder or self.prior is not None:
                raise ValueError("textual_inversion trains one word alone; leave train_text_encoder and prior out")
            if not any(self.textual_inversion.word in prompt for prompt in self.prompts):
                raise ValueError(f"prompts: one at least has to use the word {self.textual_inversion.word!r}")
        if self.prior is not None and (self.data.buckets or self.run.batch_size % 2):
            wanted = "data.buckets false" if self.data.buckets else f"an even run.batch_size, got {self.run.batch_size}"
            raise ValueError(f"prior needs {wanted}, for half of each batch is of it")
        if self.start_from is None and (self.prior is not None or self.textual_inversion is not None):
            raise ValueError("prior and textual_inversion are for a model that is there; name it as start_from")
        return self

    @model_validator(mode="after")
    def _one_source_of_the_parts(self) -> Self:
        components: dict[str, Any] = {"autoencoder": None, "text_encoder": "embedded"}
        components |= {"model": {}, "schedule": {}, "low_res_schedule": {}}
        given = [name for name, default in components.items() if getattr(self, name) != default]
        if self.start_from is None:
            missing = [name for name in ("model", "schedule") if name not in given]
            if missing:
                raise ValueError(f"{missing[0]} is missing; describe it, or name a model to start_from")
            if self.lora is not None:
                raise ValueError("lora changes a model that is there; name it as start_from")
        elif self.lora is not None and self.run.compile:
            raise ValueError("run.compile is for whole networks; set it to false with lora")
        elif self.lora is not None and self.run.ema_snapshots:
            raise ValueError("run.ema_snapshots is for whole networks; set it to 0 with lora")
        elif given:
            raise ValueError(f"start_from brings its own {given[0]}; leave that out")
        return self


TrainingConfig = AutoencoderTraining | DiffusionTraining
STAGES: dict[str, type[AutoencoderTraining] | type[DiffusionTraining]] = {
    "autoencoder": AutoencoderTraining,
    "diffusion": DiffusionTraining,
}


def load_config(file: str | Path, overrides: list[str] | None = None) -> TrainingConfig:
    """Read a YAML config and apply `a.b=value` overrides.

    Raises:
        InputError: no such file, not YAML, a key that does not exist (the closest one is offered) or a wrong value.
    """
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read config {file}: {error.strerror}; see configs/ for examples") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file} must hold a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides or []:
        _override(tree, override)
    return parse_config(tree, str(file))


def parse_config(tree: dict[str, Any], name: str = "config") -> TrainingConfig:
    """Check a config tree; see `load_config`."""
    stage = tree.get("stage")
    if stage not in STAGES:
        raise InputError(f"{name}: stage must be one of {', '.join(STAGES)}, got {stage!r}")
    try:
        return STAGES[str(stage)].model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{name}: {_first_problem(error, STAGES[str(stage)])}") from error


def completed(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config that an earlier release saved, with the keys that have come since then at their defaults."""
    try:
        return parse_config(tree).model_dump(mode="json")
    except InputError:  # it has keys that are gone
        return tree


def _first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Say the first thing wrong in one line."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    if problem["type"] == "value_error":  # of several keys together
        return str(problem["ctx"]["error"])
    if problem["type"] != "extra_forbidden":
        return f"{'.'.join(place)}: {problem['msg'].lower()}, got {problem['input']!r}"
    section: Any = model
    for part in place[:-1]:
        kind = section.model_fields[part].annotation
        section = next((choice for choice in get_args(kind) if choice is not type(None)), kind)  # of "X | None"
    return f"unknown key '{'.'.join(place)}'{suggest(place[-1], section.model_fields)}"


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set needs key=value, got {override!r}; for example --set run.steps=100")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override}: '{parent}' is a value, not a section")
        node = child
    node[last] = yaml.safe_load(text)
