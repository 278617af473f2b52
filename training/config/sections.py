"""Sections of a training config; an unknown key is an error, and a value of another type too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import Self

from latentdiff.prompts import check_prompt

from .checks import check_colour, check_path, check_schedule, check_texts

TextPath = Annotated[str, AfterValidator(check_path)]
No = BeforeValidator(lambda value: "no" if value is False else value)  # YAML reads a plain no as false


class Section(BaseModel):
    """Part of a config: frozen, and refusing keys it does not know and values that only become what is wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(Section):
    """Captioned pictures, wherever they are kept (`training.data.sources`)."""

    # An imagefolder with metadata.jsonl (columns file_name and text or captions); a .csv, .tsv or .jsonl file of paths
    # and captions; .parquet or .arrow files; webdataset's .tar shards, all of a folder or pattern (in/{000..019}.tar),
    # or remote ones (https://host/{000..019}.tar; s3:// and whatever else fsspec reads); or hub:owner/name.
    folder: TextPath
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
    # How often rows with a value in a metadata column come in an epoch ({"group": {"animals-nature": 4}}); others once.
    repeats: dict[str, dict[str, Annotated[int, Field(ge=1, le=1000)]]] = {}
    # One caption for each picture, drawn anew each time, instead of their own; a folder then needs only pictures.
    captions: list[str] = []
    # Share of the pictures that is never trained on and measured by instead; which they are follows from each file's
    # bytes. 0: the validation split, where there is one.
    held_out: float = Field(0.0, ge=0, lt=1)
    background: Annotated[str, AfterValidator(check_colour)] = "white"
    # Augmented versions of each picture: plain, flip, hue, background, pair (`training.data.augment`).
    variants: list[Literal["plain", "flip", "hue", "background", "pair"]] = Field(["plain"], min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together."""
        check_texts(self.captions, "data.captions", allow_empty=True)
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
    # and columns alone: next to nothing for linear layers, two thirds of one moment for 3x3 convolutions; muon, for
    # matrices and convolutions, with adamw's learning rates (`training.loop.muon`).
    kind: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = "adamw"
    # Of adafactor: relative to the size of each tensor, so that 1e-3 to 1e-2 is usual.
    learning_rate: float = Field(1e-4, gt=0, le=100)
    betas: tuple[Share, Share] = Field((0.9, 0.99), strict=False)
    weight_decay: float = Field(0.0, ge=0, le=1000)
    warmup_steps: int = Field(100, ge=0)
    # Share of all steps, at the end, over which the learning rate falls to zero by a cosine.
    decay_share: float = Field(0.5, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together."""
        if self.kind == "adafactor" and self.betas != type(self).model_fields["betas"].default:
            raise ValueError("optimizer.betas are those of adamw; leave them out with optimizer.kind adafactor")
        return self


class RunConfig(Section):
    """What every stage has: length, batch, precision, seed and how often things are written."""

    out: TextPath
    steps: int = Field(ge=1, le=10**9)
    # Of one optimizer step, over all processes and micro-steps.
    batch_size: int = Field(ge=1, le=2**20)
    # Micro-steps that one optimizer step is split into, to save memory.
    accumulation: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    # Of the autocast; weights, average and optimizer are float32 always. auto: bf16 on a GPU and on CPUs with native
    # bf16 matrix instructions, fp32 elsewhere. fp16 is for GPUs without bf16.
    precision: Annotated[Literal["auto", "no", "bf16", "fp16"], No] = "auto"
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
    def _check(self) -> Self:
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
    # Distance of features (`models.lpips`), and the file of the weights that it needs.
    lpips: float = Field(0.0, ge=0)
    lpips_weights: TextPath | None = None
    # Of what is decoded of latents that are made smaller and turned (`training.losses.equivariance`).
    equivariance: float = Field(0.0, ge=0)
    # Distance of the latents to those of `start_from`, so that a U-Net trained on these can go on.
    latents: float = Field(0.0, ge=0)
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


class UNetTraining(Section):
    """Train the U-Net, or parts of it."""

    kind: Literal["unet"] = "unet"
    # How the names of the weights begin that are trained, as in [conv_in, up_blocks.2]; all of them when empty. The
    # others stay those of start_from, and `latentdiff convert --variant-of` then writes those that differ alone.
    parts: list[str] = []


class UNetAndTextTraining(Section):
    """Train the U-Net and the text encoder; captions are then encoded anew in every step."""

    kind: Literal["unet_and_text"] = "unet_and_text"


class LoraConfig(Section):
    """Train thin layers beside those of a frozen U-Net (`training.networks.lora`) instead of the U-Net itself."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, le=1024)
    # What the layers' outputs are scaled by, times the rank; the rank when null.
    alpha: float | None = Field(None, gt=0, le=1e6)
    # Share of the inputs that is left out while training.
    dropout: float = Field(0.0, ge=0, lt=1)
    layers: list[Literal["attention", "feed_forward", "convolution"]] = Field(["attention"], min_length=1)


class PriorConfig(Section):
    """Train also on pictures that `start_from` draws of the kind of thing, so that it does not forget it (DreamBooth).

    Every second sample of a batch is one of them.
    """

    # What they show: "a dog", where the own pictures are of "sks dog".
    prompt: str = Field(min_length=1)
    pictures: int = Field(100, ge=1, le=100_000)
    # Of their loss beside that of the own pictures.
    weight: float = Field(1.0, gt=0, le=1000)

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what cannot be drawn."""
        check_prompt(self.prompt, what="prior.prompt")
        return self


class TextualInversionConfig(Section):
    """Train the vectors of one new word instead of the U-Net; captions or data.captions use it."""

    kind: Literal["word"] = "word"
    word: str = Field(pattern=r"^\S+$")
    # What its vectors are at first: a word that is known, or several.
    initializer: str
    vectors: int = Field(1, ge=1, le=75)


# What is trained.
TrainConfig = Annotated[
    UNetTraining | LoraConfig | TextualInversionConfig | UNetAndTextTraining, Field(discriminator="kind")
]


class TextToImageTask(Section):
    """Pictures of texts."""

    kind: Literal["text_to_image"] = "text_to_image"


class InpaintTask(Section):
    """Draw part of a picture anew, by the U-Net of any text-to-image model with more input channels."""

    kind: Literal["inpaint"] = "inpaint"
    # Share of samples that are drawn anew as a whole, so that text alone stays enough.
    full_mask: float = Field(0.1, ge=0, le=1)


class UpscaleTask(Section):
    """Draw a picture as many times larger as the autoencoder makes it smaller (`training.data.conditions`)."""

    kind: Literal["upscale"] = "upscale"
    # How strongly small pictures are blurred, noisy and compressed at most, each sample by a strength of its own from 0
    # up (`latentdiff/corruptions/degradation.py`); and how much noise is put on them at most, of which the U-Net is
    # told, in timesteps of low_res_schedule (keys of `latentdiff.diffusion.schedule.NoiseSchedule`).
    degradation: float = Field(1.0, ge=0, le=1)
    max_noise_level: int = Field(350, ge=0, le=999)
    low_res_schedule: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse a schedule that cannot be."""
        check_schedule(self.low_res_schedule, "task.low_res_schedule")
        return self


TaskConfig = Annotated[TextToImageTask | InpaintTask | UpscaleTask, Field(discriminator="kind")]


class ObjectiveConfig(Section):
    """What is minimised, over which timesteps and noise."""

    # simple: squared error; hybrid: with the variational bound for a learned variance (schedule.variance_type
    # learned_range); vlb: the bound alone.
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    # Of the bound, in bits per dimension, in the hybrid loss.
    vlb_weight: float = Field(0.001, ge=0)
    # How the squared error is weighed over timesteps; `training.losses.diffusion.loss_weight` defines each.
    weighting: Literal["min_snr", "p2", "debiased"] = "min_snr"
    # Of weighting: min_snr, the cap of the signal-to-noise ratio; 0 weighs all timesteps alike.
    min_snr_gamma: float = Field(5.0, ge=0)
    # How timesteps are drawn: alike, more often in the middle, or more often where the loss is large (for loss: vlb).
    timesteps: Literal["uniform", "logit_normal", "importance"] = "uniform"
    # Share of noise that is one number for each channel of a sample, so that whole pictures learn to be dark or bright.
    offset_noise: float = Field(0.0, ge=0, le=1)
    # Share of noise that the network sees and is not asked for, which makes up for its own errors while sampling.
    input_perturbation: float = Field(0.0, ge=0, le=1)
    # Give the network its own estimate of the step before, in twice the channels.
    self_conditioning: bool = False
    # Share of samples without their caption, which guidance needs.
    caption_dropout: float = Field(0.1, ge=0, le=1)


class ConsistencyConfig(Section):
    """Distil `start_from` into a model of few calls (`training.losses.consistency`), instead of the plain objective."""

    # Of the model that is distilled, folded into the result, which is drawn without guidance.
    guidance_scale: float = Field(4.0, ge=0, le=50)
    # Calls that the result is drawn in unless it is told otherwise, by the sampler lcm.
    calls: int = Field(4, ge=1, le=32)
    # Timesteps between the two noise levels whose estimates are made equal, at the least.
    skip: int = Field(20, ge=1, le=1000)
    # How often, at even times of the run, the way between the two is halved; at first it is all the way to the end.
    halvings: int = Field(7, ge=0, le=20)


class SamplesConfig(Section):
    """What is drawn every run.sample_every steps, with the averaged weights."""

    # Of tasks that start from a picture, their own examples are drawn instead.
    prompts: list[str] = Field(["a red fox", "a green tree", "a house", "a blue car"], min_length=1, max_length=1000)
    guidance_scale: float = Field(4.0, ge=0, le=50)
