"""The options of the application, as its configuration file has them."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentdiff.errors import InputError, suggest
from latentdiff.lora_tags import lora_files
from latentdiff.serve.http.guard import check_proxies, check_token
from latentdiff.serve.http.models import served_name

__all__ = ["Options"]

TOKEN = "LATENTDIFF_TOKEN"
EMBEDDED = "embedded"


class Options(BaseModel):
    """How models are served on a cluster.

    Attributes:
        models: folders, files or names, as `latentdiff serve --model` takes them, the same on all machines; "embedded"
            is the embedded one.
        replicas: how many there are, or the fewest.
        max_replicas: the most, where their number follows the jobs that wait; None for a fixed number.
        target: jobs of a replica at once, above which there are to be more.
        gpus, cores: of a replica; a share of a GPU too.
        threads: of torch in a replica; None for what it takes by itself.
        doors: processes that share requests out.
        batch, queue, lora_dir, filter, device, dtype, engine: see `latentdiff serve --help`.
        token: that requests must bring; None for that of the file or of LATENTDIFF_TOKEN.
        token_file: with the token.
        host: where Serve listens, which says whether a token is needed; its address is in its own configuration.
        proxies: before Serve, which are believed what they say of their clients.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = (EMBEDDED,)
    replicas: int = Field(1, ge=1, le=1024)
    max_replicas: int | None = Field(None, ge=1, le=1024)
    target: float = Field(8.0, gt=0)
    gpus: float = Field(0.0, ge=0, le=64)
    cores: float = Field(1.0, ge=0, le=1024)
    threads: int | None = Field(None, ge=1, le=1024)
    doors: int = Field(1, ge=1, le=64)
    batch: int = Field(8, ge=1, le=1024)
    queue: int | None = Field(None, ge=1)
    lora_dir: str | None = None
    filter: float | None = Field(None, ge=0, le=1)
    device: str | None = None
    dtype: str | None = None
    engine: str = "eager"
    token: str | None = Field(None, repr=False)
    token_file: str | None = None
    host: str = "127.0.0.1"
    proxies: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: object) -> Options:
        """Return the options of a configuration.

        Raises:
            InputError: one is not known or cannot be used.
        """
        try:
            options = cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            near = suggest(name, cls.model_fields) if first["type"] == "extra_forbidden" else ""
            raise InputError(f"option {name}: {first['msg']}{near}") from error
        if options.max_replicas is not None and options.max_replicas < options.replicas:
            raise InputError(f"max_replicas must be {options.replicas} or more, got {options.max_replicas}; raise it")
        names = [served_name(model) for model in options.given_models]
        if len(set(names)) < len(names):
            raise InputError(f"models must have names of their own, got {', '.join(names)}; rename a folder")
        if options.lora_folder is not None:
            lora_files(options.lora_folder)
        check_proxies(options.proxies)
        check_token(options.secret, options.host, options.proxies)
        return options

    @property
    def given_models(self) -> list[str | None]:
        """The models as `Pipeline.from_pretrained` takes them."""
        return [None if model == EMBEDDED else model for model in self.models]

    @property
    def lora_folder(self) -> Path | None:
        """The folder of LoRAs."""
        return None if self.lora_dir is None else Path(self.lora_dir)

    @property
    def secret(self) -> str | None:
        """The token of the options, or of its file, or else of the environment."""
        if self.token_file is not None:
            try:
                return Path(self.token_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"token_file {self.token_file} cannot be read ({error}); check the path") from error
        return self.token if self.token is not None else os.environ.get(TOKEN) or None
