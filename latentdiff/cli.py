"""The command line: `latentdiff generate "a red fox" -o fox.png`.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 2 bad usage or input, 3 a model file was
refused, 4 no space or I/O, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from latentdiff import __version__
from latentdiff.errors import InputError, LatentDiffError, suggest

if TYPE_CHECKING:
    from latentdiff.result import Result

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
        options.run(options)
        sys.stdout.flush()
    except LatentDiffError as error:
        print(f"latentdiff: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("latentdiff: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest command where one was mistyped."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise InputError(
                f"{action.metavar or action.dest} {value!r} is unknown{suggest(str(value), action.choices)}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="latentdiff", description="Latent text-to-image diffusion: make a model, draw with it.")
    parser.add_argument("--version", action="version", version=f"latentdiff {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    _add_generate(command("generate", _generate, "Draw pictures of one or more prompts."))

    replay = command("replay", _replay, "Draw a picture again from the settings in its PNG file.")
    replay.add_argument("image", help="PNG written by latentdiff")
    replay.add_argument("-o", "--out", help="file to write; IMAGE-replay.png by default")
    replay.add_argument("--model", help="model folder, where the recorded one is elsewhere now")
    replay.add_argument("--force", action="store_true", help="go on with another model or initial image than recorded")
    _add_machine(replay)

    plan = command("plan", _plan, "Print a sampler's table.")
    plan.add_argument("--sampler", default="dpmpp_2m")
    plan.add_argument("--steps", type=int, default=25)
    plan.add_argument("--model", help="model folder whose noise schedule is used; the embedded one by default")
    plan.add_argument("--json", action="store_true", help="print one JSON object")

    inspect = command("inspect", _inspect, "Say what a model folder or safetensors file is, without loading it.")
    inspect.add_argument("path", nargs="?", help="folder or file; the embedded model by default")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    train = command("train", _train, "Train the stage that a YAML config describes.")
    train.add_argument("config", help="see configs/")
    train.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint that is whole")
    train.add_argument("--out", help="run folder, instead of the config's run.out")

    data = command("data", _data, "Build a captioned data set.")
    data.add_argument(
        "name", choices=["emoji"], metavar="NAME", help="emoji: six openly licensed styles, fetched by npm"
    )
    data.add_argument("out", help="folder; a build that was broken off goes on where it stopped")
    data.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default 64)")
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("-o", "--out", help="PNG to write; several pictures are OUT.png, OUT-2.png, ...")
    parser.add_argument("--model", help="model folder in diffusers' layout; the embedded model by default")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument("--steps", type=int, help="calls of the network")
    parser.add_argument("--guidance", type=float, help="how strictly to follow the prompt; 1 is not guided")
    parser.add_argument("--sampler", help="ddpm, ddim, euler, euler_a or dpmpp_2m, optionally followed by _karras")
    parser.add_argument("--seed", type=int, help="of the first picture; picture i has seed + i (default 0)")
    parser.add_argument("-n", "--num-images", type=int, help="pictures of each prompt")
    parser.add_argument("--size", metavar="WxH", help="in pixels, multiples of 8")
    parser.add_argument("--image", help="PNG, JPEG or WebP to start from")
    parser.add_argument("--strength", type=float, help="above 0, up to 1: how much of --image is drawn anew")
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, mps; the fastest there is by default")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def _generate(options: argparse.Namespace) -> None:
    from latentdiff.images import check_writable, numbered
    from latentdiff.prompts import slug
    from latentdiff.settings import Settings

    chosen = {
        "negative_prompt": options.negative,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "sampler": options.sampler,
        "seed": options.seed,
        "num_images": options.num_images,
        "strength": options.strength,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    chosen["width"], chosen["height"] = _size(options.size)
    # Everything that can be wrong without a model is found before one is loaded.
    count = Settings(prompts=tuple(options.prompts), **chosen).count
    out = options.out or f"{slug(options.prompts[0])}.png"
    for file in numbered(out, count):
        check_writable(file)
    if options.strength is not None and options.image is None:
        raise InputError("--strength says how much of --image is drawn anew, got no --image; add it")
    _draw(options, options.prompts, out, image=options.image, **chosen)


def _replay(options: argparse.Namespace) -> None:
    from latentdiff.images import check_writable, open_image, pixel_hash, read_texts
    from latentdiff.result import METADATA_KEY
    from latentdiff.settings import Settings

    text = read_texts(options.image).get(METADATA_KEY)
    try:
        record = json.loads(text or "")
    except ValueError as error:
        raise InputError(f"{options.image} must hold latentdiff's settings, got none; use the file it wrote") from error
    settings = Settings.from_record(record if isinstance(record, dict) else {})
    source = Path(options.image)
    out = options.out or str(source.with_name(f"{source.stem}-replay.png"))
    check_writable(out)
    image = record.get("image")
    if image and pixel_hash(open_image(image)) != record.get("image_hash") and not options.force:
        raise InputError(f"{image} is no longer the picture this one was made from; restore it, or add --force")
    if options.model is None and record.get("model") != "embedded":
        options.model = record.get("model")
    keep = ("negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "guidance_interval")
    chosen = {name: getattr(settings, name) for name in (*keep, "sampler", "seed", "height", "width")}
    if image:
        chosen |= {"image": image, "strength": settings.strength}
    _draw(options, list(settings.prompts), out, expected_hash=None if options.force else record["model_hash"], **chosen)


def _draw(
    options: argparse.Namespace, prompts: list[str], out: str, *, expected_hash: str | None = None, **settings: Any
) -> None:
    """Load the model, draw, write the pictures and say which."""
    from latentdiff.pipeline import Pipeline

    started = time.perf_counter()
    pipe = Pipeline.from_pretrained(options.model, device=options.device, dtype=options.dtype)
    found = pipe.parts.model_hash
    if expected_hash is not None and found != expected_hash:
        raise InputError(
            f"the picture was made by model {expected_hash[:10]}, got {found[:10]}; pass that --model, or add --force"
        )
    result: Result = pipe(prompts, progress=sys.stderr.isatty(), **settings)
    files = [str(file) for file in result.save(out)]
    for note in result.notes:
        print(f"latentdiff: {note}", file=sys.stderr)
    if options.json:
        seconds = round(time.perf_counter() - started, 3)
        report = {"files": files, "seeds": result.seeds, "settings": result.settings, "seconds": seconds}
        print(json.dumps(report | {"token_counts": result.token_counts, "notes": result.notes}))
    else:
        print("\n".join(files))


def _plan(options: argparse.Namespace) -> None:
    from latentdiff.checkpoints import find_model, load_schedule
    from latentdiff.diffusion import make_plan

    folder, _ = find_model(options.model)
    plan = make_plan(load_schedule(folder), options.sampler, options.steps)
    if options.json:
        numbers = {"timesteps": plan.timesteps, "sigmas": plan.sigmas, "matrices": plan.matrices, "noise": plan.noise}
        print(json.dumps({name: value.tolist() for name, value in numbers.items()}))
        return
    slots = plan.noise.shape[1]
    print(
        f"{options.sampler}, {len(plan)} steps, {slots} slot{'s' * (slots > 1)}; initial noise x {plan.init_noise_sigma:.6g}"
    )
    print("  i  timestep       sigma  new slots as sums of the old ones and D = denoise(slot 0, sigma)")
    for i in range(len(plan)):
        rows = [_sum(plan.matrices[i, k].tolist(), float(plan.noise[i, k])) for k in range(slots)]
        print(f"{i:3d} {plan.timesteps[i]:9.2f} {plan.sigmas[i]:11.5g}  " + "   ".join(rows))


def _sum(weights: list[float], noise: float) -> str:
    names = [*(f"s{k}" for k in range(len(weights) - 1)), "D"]
    terms = [f"{weight:+.6g} {name}" for weight, name in zip(weights, names) if weight] or ["0"]
    return " ".join([*terms, *([f"{noise:+.6g} noise"] if noise else [])])


def _inspect(options: argparse.Namespace) -> None:
    from latentdiff.checkpoints import find_model
    from latentdiff.checkpoints.inspect import describe_file, describe_folder

    path = Path(options.path) if options.path else None
    described = describe_file(path) if path and path.is_file() else describe_folder(find_model(options.path)[0])
    if options.json:
        print(json.dumps(described))
        return
    for key, value in described.items():
        print(f"{key}: {value if not isinstance(value, dict) else json.dumps(value)}")


def _train(options: argparse.Namespace) -> None:
    from training import cli_train

    cli_train(options.config, options.overrides, options.resume, options.out)


def _data(options: argparse.Namespace) -> None:
    from training import cli_data_emoji

    cli_data_emoji(options.out, options.size)


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Return (width, height) of "64x48", or (None, None)."""
    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdecimal() or not height.isdecimal():
        raise InputError(f"--size must be WIDTHxHEIGHT in pixels, got {text!r}; try 64x64")
    return int(width), int(height)
