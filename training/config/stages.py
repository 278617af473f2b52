"""The stages that a config can describe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from .checks import check_autoencoder, check_growth, check_image_text, check_schedule, check_texts, check_unet
from .evaluation import OF_AUTOENCODERS, OF_TASKS, EvaluateConfig, check_evaluate
from .sections import (
    AutoencoderLoss,
    ConsistencyConfig,
    DataConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PriorConfig,
    RunConfig,
    SamplesConfig,
    Section,
    TaskConfig,
    TextPath,
    TextToImageTask,
    TextualInversionConfig,
    TrainConfig,
    UNetAndTextTraining,
    UNetTraining,
)


class AutoencoderTraining(Section):
    """`stage: autoencoder`."""

    stage: Literal["autoencoder"]
    data: DataConfig
    run: RunConfig
    # Run or model folder of an autoencoder whose layers are taken over where they fit, or "embedded"; this one may have
    # more levels, on the side of the pictures, and more latent channels.
    start_from: TextPath | None = None
    # Train the decoder alone and leave the latents as `start_from` has them, for a U-Net that was trained on those.
    decoder_only: bool = False
    # Keys of `latentdiff.models.autoencoder.AutoencoderConfig`.
    model: dict[str, Any]
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: AutoencoderLoss = AutoencoderLoss()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together."""
        check_autoencoder(self.model, self.data.size)
        if self.data.buckets:
            raise ValueError("an autoencoder is trained on squares; data.buckets is for stage diffusion")
        if self.run.ema_snapshots:
            raise ValueError("run.ema_snapshots is for stage diffusion; set it to 0")
        if self.loss.latents and self.start_from is None:
            raise ValueError("loss.latents keeps latents near those of start_from; name an autoencoder there")
        if self.decoder_only and (self.start_from is None or self.loss.latents):
            raise ValueError(
                "decoder_only keeps the latents of start_from: name an autoencoder there, and set loss.latents to 0"
            )
        if self.loss.lpips and self.data.size < 16:
            raise ValueError(f"loss.lpips needs pictures of 16 pixels or more, got data.size {self.data.size}")
        check_evaluate(self.evaluate, OF_AUTOENCODERS, "held_out_psnr")
        if "lpips" in self.evaluate.metrics and self.loss.lpips_weights is None:
            raise ValueError("lpips needs loss.lpips_weights: `python -m latentdiff.training.losses.lpips FILE`")
        return self


class DiffusionTraining(Section):
    """`stage: diffusion`: text-to-image in the latent space of a trained autoencoder, or classes, or in pixels."""

    stage: Literal["diffusion"]
    task: TaskConfig = TextToImageTask()
    data: DataConfig
    run: RunConfig
    # Run or model folder whose autoencoder is used, or "embedded"; null for diffusion of the pixels themselves, or for
    # the autoencoder of `start_from`.
    autoencoder: TextPath | None = None
    # Of the pixels, where there is no autoencoder: 3 for colour, 1 for shades of grey.
    channels: Literal[1, 3] = 3
    # Folder with text_encoder/ and tokenizer/, or of OpenCLIP's layout; "embedded" takes those of the model that ships
    # with the package, "labels" makes each different caption a class, "none" trains without any condition.
    text_encoder: TextPath = "embedded"
    # Keys of `latentdiff.models.unet.UNetConfig`, without those that follow from latents and objective; with
    # `start_from` those that give its U-Net more layers or channels (`checks.GROWING`).
    model: dict[str, Any] = Field(default_factory=dict)
    # Keys of `latentdiff.diffusion.schedule.NoiseSchedule`.
    schedule: dict[str, Any] = Field(default_factory=dict)
    # A model that is trained further, with its own text encoder and schedule: a folder, a single file or "embedded".
    start_from: TextPath | None = None
    # kind: unet; lora, thin layers beside those of `start_from`; word, a new one; or unet_and_text.
    train: TrainConfig = UNetTraining()
    prior: PriorConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    # Instead of the objective: make a model of few calls of `start_from`.
    consistency: ConsistencyConfig | None = None
    samples: SamplesConfig = SamplesConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cache: TextPath | None = None

    @property
    def encodes_each_step(self) -> bool:
        """Whether text states change while training."""
        return isinstance(self.train, UNetAndTextTraining | TextualInversionConfig)

    @model_validator(mode="after")
    def _values(self) -> Self:
        """Refuse what cannot be used, whatever the rest is."""
        check_texts(self.samples.prompts, "samples.prompts", allow_empty=self.text_encoder == "none")
        if self.start_from is None:
            check_unet(self.model)
            check_schedule(self.schedule, "schedule")
        else:
            check_growth(self.model)
        check_evaluate(self.evaluate, {} if self.data.buckets else OF_TASKS[self.task.kind], "held_out/loss")
        return self

    @model_validator(mode="after")
    def _task_fits(self) -> Self:
        """Refuse what does not go together with a task."""
        if isinstance(self.task, TextToImageTask):
            return self
        others = {
            "prior": self.prior,
            "train.kind word": isinstance(self.train, TextualInversionConfig),
            "objective.self_conditioning": self.objective.self_conditioning,
            "data.buckets": self.data.buckets,
        }
        other = next((name for name, given in others.items() if given), None)
        if other is not None:
            raise ValueError(f"task {self.task.kind} does not go with {other}; leave one out")
        if self.start_from is None and self.autoencoder is None:
            raise ValueError(f"task {self.task.kind} needs latents; name an autoencoder, or a model to start_from")
        return self

    @model_validator(mode="after")
    def _what_is_trained(self) -> Self:
        """Refuse what does not go together with what is trained."""
        kind, whole = self.train.kind, {"run.compile": self.run.compile, "run.ema_snapshots": self.run.ema_snapshots}
        other = next((name for name, given in whole.items() if given), None)
        if not isinstance(self.train, UNetTraining) and other is not None:
            raise ValueError(f"train.kind {kind} does not go with {other}, which is for a whole U-Net; leave one out")
        if self.encodes_each_step and self.text_encoder in ("labels", "none"):
            raise ValueError(f"text_encoder: {self.text_encoder} has no words to train; name one with a vocabulary")
        if isinstance(self.train, TextualInversionConfig):
            if self.prior is not None:
                raise ValueError("train.kind word trains one word alone; leave prior out")
            if not any(self.train.word in prompt for prompt in self.samples.prompts):
                raise ValueError(f"samples.prompts: one at least has to use the word {self.train.word!r:.80}")
        if self.prior is not None and (self.data.buckets or self.run.batch_size % 2):
            wanted = "data.buckets false" if self.data.buckets else f"an even run.batch_size, got {self.run.batch_size}"
            raise ValueError(f"prior needs {wanted}, for half of each batch is of it")
        further = isinstance(self.train, LoraConfig | TextualInversionConfig)
        if isinstance(self.train, UNetTraining) and self.train.parts and self.start_from is None:
            raise ValueError("train.parts leaves the rest as start_from has it, which is missing; name a model there")
        if self.start_from is not None and further and self.model:
            raise ValueError(f"train.kind {kind} leaves the U-Net of start_from as it is; leave model out")
        if self.start_from is None and (further or self.prior is not None):
            what = f"train.kind {kind}" if further else "prior"
            raise ValueError(f"{what} is for a model that is there; name it as start_from")
        return self

    @model_validator(mode="after")
    def _what_is_distilled(self) -> Self:
        """Refuse what does not go together with consistency."""
        if self.consistency is None:
            return self
        if self.start_from is None:
            raise ValueError("consistency distils a model that is there; name it as start_from")
        plain = ObjectiveConfig(caption_dropout=self.objective.caption_dropout)
        others = {
            f"task {self.task.kind}": self.task.kind != "text_to_image",
            f"train.kind {self.train.kind}": self.train.kind not in ("unet", "lora"),
            "prior": self.prior is not None,
            "an objective besides caption_dropout": self.objective != plain,
            "samples.guidance_scale": self.samples.guidance_scale != SamplesConfig().guidance_scale,
            "evaluate.keep_best held_out/loss": self.evaluate.keep_best == "held_out/loss",
        }
        other = next((name for name, given in others.items() if given), None)
        if other is not None:
            raise ValueError(f"consistency does not go with {other}; leave one out")
        return self

    @model_validator(mode="after")
    def _one_source_of_the_components(self) -> Self:
        components: dict[str, Any] = {"text_encoder": "embedded", "schedule": {}}
        given = [name for name, default in components.items() if getattr(self, name) != default]
        if getattr(self.task, "low_res_schedule", {}):
            given.append("task.low_res_schedule")
        if self.start_from is None:
            missing = next((name for name in ("model", "schedule") if not getattr(self, name)), None)
            if missing is not None:
                raise ValueError(f"{missing} is missing; describe it, or name a model to start_from")
        elif given:
            raise ValueError(f"start_from brings its own {given[0]}; leave that out")
        return self


class ImageTextTraining(Section):
    """`stage: image_text`: a small model that says how well a picture and a text fit, beside a frozen text encoder."""

    stage: Literal["image_text"]
    data: DataConfig
    run: RunConfig
    # Folder with text_encoder/ and tokenizer/, or "embedded".
    text_encoder: TextPath = "embedded"
    # Metadata column with a short text of what a picture shows: held-out pictures are measured by finding theirs among
    # all. null: each picture's first caption.
    label_column: str | None = None
    # Weight of a second loss: to find the label of a picture among those of all pictures, many more than a batch has.
    label_weight: float = Field(0.0, ge=0)
    # How strongly views are turned, stretched, put in other light and covered in part, 0 to 1: what is seen of few
    # drawings is then not learnt by heart.
    distort: float = Field(0.0, ge=0, le=1)
    # Keys of `latentdiff.models.image_text.ImageTextConfig`.
    model: dict[str, Any] = Field(default_factory=dict)
    optimizer: OptimizerConfig = OptimizerConfig()
    cache: TextPath | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what does not go together."""
        check_image_text(self.model)
        if self.data.buckets or self.data.crop == "random":
            raise ValueError("an image-text model is trained on whole squares; leave data.buckets and data.crop out")
        if self.run.accumulation > 1 or self.run.batch_size < 2:
            raise ValueError(
                "a batch is contrasted with itself: it needs run.accumulation 1 and a run.batch_size of 2 or more, "
                f"got {self.run.accumulation} and {self.run.batch_size}"
            )
        if self.run.ema_snapshots:
            raise ValueError("run.ema_snapshots is for stage diffusion; set it to 0")
        return self


TrainingConfig = AutoencoderTraining | DiffusionTraining | ImageTextTraining
STAGES: dict[str, type[AutoencoderTraining] | type[DiffusionTraining] | type[ImageTextTraining]] = {
    "autoencoder": AutoencoderTraining,
    "diffusion": DiffusionTraining,
    "image_text": ImageTextTraining,
}
