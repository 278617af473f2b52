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
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from latentdiff import __version__
from latentdiff.errors import InputError, LatentDiffError, suggest

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline
    from latentdiff.result import Result

NO_SPACE = 4
INTERRUPTED = 130
NOT_REPLAYED = ("prompts", "seed", "variation_seed", "num_images", "strength")  # as they are, that is


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
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print("latentdiff: out of memory; draw fewer or smaller pictures, or use --dtype float16", file=sys.stderr)
        return NO_SPACE
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is memory running out; torch has a class for it on a GPU, but only a message on a CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "not enough memory" in str(error) or "can't allocate memory" in str(error)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest command where one was mistyped; no option is shortened."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

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

    inspect = command("inspect", _inspect, "Say what a model folder, safetensors file or drawn PNG is.")
    inspect.add_argument("path", nargs="?", help="folder or file; the embedded model by default")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    train = command("train", _train, "Train the stage that a YAML config describes.")
    train.add_argument("config", help="YAML file, see configs/; the name alone finds one that came with the package")
    train.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint that is whole")
    train.add_argument("--out", help="run folder, instead of the config's run.out")

    data = command("data", _data, "Build a captioned data set.")
    data.add_argument(
        "name",
        choices=["emoji", "digits"],
        metavar="NAME",
        help="emoji: six openly licensed styles, fetched by npm; digits: the 8x8 ones that come with scikit-learn",
    )
    data.add_argument("out", help="folder; a build that was broken off goes on where it stopped")
    data.add_argument("--size", type=int, help="side of the pictures in pixels (default 64; digits have 8)")

    evaluate = command("evaluate", _evaluate, "Measure how good a model is on captioned pictures.")
    evaluate.add_argument("model", help="model folder, or `embedded`")
    evaluate.add_argument("--data", required=True, help="folder of captioned pictures, or of splits with such")
    evaluate.add_argument("--metrics", default="nll", help="nll: bits per dimension (the only one so far)")
    evaluate.add_argument("--split", default="test", help="train, validation or test (default)")
    evaluate.add_argument("--images", type=int, default=32, help="how many pictures are measured (default 32)")
    _add_machine(evaluate)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument(
        "-o",
        "--out",
        help="PNG to write (several are fox.png, fox-2.png, ...) or folder; named by the prompt otherwise",
    )
    parser.add_argument("--model", help="model folder in diffusers' layout; the embedded model by default")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument("--steps", type=int, help="calls of the network")
    parser.add_argument("--guidance", type=float, help="how strictly to follow the prompt; 1 is not guided")
    parser.add_argument("--sampler", help="dpmpp_2m, ddim, euler_a, unipc, ...; a wrong name lists them all")
    parser.add_argument("--seed", type=int, help="of the first picture; picture i has seed + i (default 0)")
    parser.add_argument("-n", "--num-images", type=int, help="pictures of each prompt")
    parser.add_argument("--size", metavar="WxH", help="in pixels, multiples of 8")
    parser.add_argument("--image", help="PNG, JPEG or WebP to start from")
    parser.add_argument("--strength", type=float, help="above 0, up to 1: how much of --image is drawn anew")
    parser.add_argument("--mask", help="picture of the size of --image: what is white is drawn anew, the rest stays")
    parser.add_argument("--outpaint", metavar="left=N,top=N,...", help="pixels to draw around --image, multiples of 8")
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, mps; the fastest there is by default")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def _generate(options: argparse.Namespace) -> None:
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
    chosen |= {} if options.outpaint is None else {"outpaint": _sides(options.outpaint)}
    for name, says in {"strength": "how much", "mask": "which part", "outpaint": "how much around it"}.items():
        if getattr(options, name) is not None and options.image is None:
            raise InputError(f"--{name} says {says} of --image is drawn anew, got no --image; add it")
    # Everything that can be wrong without a model is found before one is loaded.
    settings = Settings(prompts=tuple(options.prompts), **chosen)
    paths = _output_paths(options.out, [settings.record(index)["prompt"] for index in range(settings.count)])
    started = time.perf_counter()
    pipe = _load(options.model, options.device, options.dtype)
    result = _draw(pipe, options.prompts, image=options.image, mask=options.mask, **chosen)
    for index, path in enumerate(paths):
        result.write(index, path)
    _report(options, result, dict(enumerate(paths)), seconds=round(time.perf_counter() - started, 3))


def _output_paths(out: str | None, prompts: list[str]) -> list[Path]:
    """Return where each picture goes, all of them writable; names made from prompts never hit an existing file."""
    from latentdiff.images import check_writable, numbered
    from latentdiff.prompts import slug

    folder = Path(out or ".")
    if out is not None and not folder.is_dir():
        if folder.suffix.lower() != ".png":
            raise InputError(f"-o must name a PNG file or a folder, got {out!r}; try {folder.stem or 'picture'}.png")
        paths = list(islice(numbered(folder), len(prompts)))
    else:
        paths = []
        for prompt in prompts:
            names = numbered(folder / f"{slug(prompt)}.png")
            paths.append(next(path for path in names if path not in paths and not path.exists()))
    for path in paths:
        check_writable(path)
    return paths


def _replay(options: argparse.Namespace) -> None:
    from latentdiff.images import open_image, pixel_hash
    from latentdiff.result import read_record
    from latentdiff.settings import Settings, check_integer

    record = read_record(options.image)
    settings = Settings.from_record(record)
    remedy = "use the file as latentdiff wrote it"
    size = check_integer("batch_size", record.get("batch_size"), 1, 1024, remedy)
    counted = "variation_seed" if settings.variation_strength else "seed"  # what differs from image to image
    seeds = {"seed": settings.seed, "variation_seed": settings.variation_seed}
    row = check_integer("batch_index", record.get("batch_index"), 0, min(size, seeds[counted] + 1) - 1, remedy)
    seeds[counted] -= row
    initial = _initial_image(record, settings.strength, options.force)
    source = Path(options.image)
    (path,) = _output_paths(options.out or str(source.with_name(f"{source.stem}-replay.png")), [settings.prompts[0]])
    started = time.perf_counter()
    recorded = {key: str(record.get(key)) for key in ("model", "model_hash", "device", "dtype", "torch")}
    pipe = _load(**{key: getattr(options, key) or recorded[key] for key in ("model", "device", "dtype")})
    if pipe.parts.model_hash != recorded["model_hash"] and not options.force:
        raise InputError(
            f"{source} was made by model {recorded['model_hash'][:10]}, got {pipe.parts.model_hash[:10]}; "
            "pass that one as --model, or add --force"
        )
    _use_threads(record.get("threads"))
    # The batch it was drawn in had this many rows; what was in the others does not matter, how many does.
    result = _draw(
        pipe,
        settings.prompts,
        num_images=size,
        batch_size=size,
        **seeds,
        **initial,
        **{name: value for name, value in vars(settings).items() if name not in NOT_REPLAYED},
    )
    result.write(row, path)
    identical = pixel_hash(result.images[row]) == pixel_hash(open_image(source))
    if not identical:
        now = f"torch {result.settings['torch']} on {result.settings['device']}"
        then = f"torch {recorded['torch']} on {recorded['device']}"
        print(f"latentdiff: the pixels differ from {source}, which {then} drew; this is {now}", file=sys.stderr)
    _report(options, result, {row: path}, seconds=round(time.perf_counter() - started, 3), identical=identical)


def _initial_image(record: dict[str, Any], strength: float, force: bool) -> dict[str, Any]:
    """Return the arguments that replay what was drawn from pictures, if those are still what they were."""
    from latentdiff.images import open_image, pixel_hash

    if record.get("latents_given"):
        raise InputError(
            "the picture was drawn from latents that were passed in, which no file keeps; draw it in Python"
        )
    pictures = {name: record[name] for name in ("image", "mask") if record.get(name) is not None}
    for name, used in pictures.items():
        path = used.get("path") if isinstance(used, dict) else None
        if not isinstance(path, str):
            raise InputError("the picture was drawn from an image in memory, which no file keeps; draw it in Python")
        if pixel_hash(open_image(path)) != used.get("hash") and not force:
            raise InputError(f"{path} is no longer the {name} this one was made from; restore it, or add --force")
        pictures[name] = path
    return {**pictures, "strength": strength} if pictures else {}


def _use_threads(count: object) -> None:
    """Compute with as many threads as a picture was drawn with, where this machine has them: sums depend on it."""
    import torch

    if isinstance(count, int) and 1 <= count <= (os.cpu_count() or 1):
        torch.set_num_threads(count)


def _load(model: str | None, device: str | None, dtype: str | None) -> Pipeline:
    from latentdiff.pipeline import Pipeline

    return Pipeline.from_pretrained(model, device=device, dtype=dtype)


def _draw(pipe: Pipeline, prompts: Sequence[str], **settings: Any) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the result's notes say the same in one line
        result = pipe(prompts, progress=sys.stderr.isatty(), **settings)
    for note in result.notes:
        print(f"latentdiff: {note}", file=sys.stderr)
    return result


def _report(options: argparse.Namespace, result: Result, written: dict[int, Path], **more: Any) -> None:
    """Say which images, by number, went where."""
    if options.json:
        pictures = {
            "files": [str(path) for path in written.values()],
            "prompts": [result.own[index]["prompt"] for index in written],
            "seeds": [result.seeds[index] for index in written],
            "token_counts": [result.token_counts[index] for index in written],
        }
        print(json.dumps({**pictures, "settings": result.settings, "notes": result.notes, **more}))
    else:
        print("\n".join(map(str, written.values())))


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
    counted = f"{len(plan)} steps, {slots} slot{'s' * (slots > 1)}"
    print(f"{options.sampler}, {counted}; initial noise x {plan.init_noise_sigma:.6g}")
    print("  i  timestep       sigma  new slots as sums of the old ones and D = denoise(slot 0, sigma)")
    for i in range(len(plan)):
        rows = [_sum(plan.matrices[i, k].tolist(), float(plan.noise[i, k])) for k in range(slots)]
        print(f"{i:3d} {plan.timesteps[i]:9.2f} {plan.sigmas[i]:11.5g}  " + "   ".join(rows))


def _sum(weights: list[float], noise: float) -> str:
    names = [*(f"s{k}" for k in range(len(weights) - 1)), "D"]
    terms = [f"{weight:+.6g} {name}" for weight, name in zip(weights, names) if weight] or ["0"]
    return " ".join([*terms, *([f"{noise:+.6g} noise"] if noise else [])])


def _inspect(options: argparse.Namespace) -> None:
    path = Path(options.path) if options.path else None
    if path and path.suffix.lower() == ".png":
        from latentdiff.result import read_record

        described = {"kind": "picture", **read_record(path)}
    else:
        from latentdiff.checkpoints import find_model
        from latentdiff.checkpoints.inspect import describe_file, describe_folder

        described = describe_file(path) if path and path.is_file() else describe_folder(find_model(options.path)[0])
    if options.json:
        print(json.dumps(described))
        return
    for key, value in described.items():
        print(f"{key}: {json.dumps(value) if isinstance(value, dict) else value}")


def _train(options: argparse.Namespace) -> None:
    import training

    packaged = Path(training.__file__).parent / "configs" / Path(options.config).name
    recipe = packaged if packaged.is_file() and not Path(options.config).exists() else options.config
    training.cli_train(str(recipe), options.overrides, options.resume, options.out)


def _data(options: argparse.Namespace) -> None:
    from training import cli_data_digits, cli_data_emoji

    if options.name == "emoji":
        cli_data_emoji(options.out, options.size or 64)
    elif options.size not in (None, 8):
        raise InputError(f"--size of the digits is 8, got {options.size}; leave it out")
    else:
        cli_data_digits(options.out)


def _evaluate(options: argparse.Namespace) -> None:
    from latentdiff.evaluate import METRICS
    from latentdiff.images import to_tensor
    from latentdiff.settings import check_integer

    wanted = options.metrics.split(",")
    for name in wanted:
        if name not in METRICS:
            raise InputError(f"metric {name!r} is unknown{suggest(name, METRICS)}")
    count = check_integer("--images", options.images, 1, 1_000_000, "try 32")
    pipe = _load(options.model, options.device, options.dtype)
    height, width = pipe.native_size
    if height != width:
        raise InputError(f"only models of square pictures can be measured, got {width}x{height}")
    from training.config import DataConfig
    from training.dataset import composite, load_images

    data = load_images(DataConfig(folder=options.data, size=height), options.split)
    images = to_tensor(composite(data.images[:count], (255, 255, 255))).to(pipe.device)
    captions = [row["captions"][0] for row in data.rows[:count]]
    figures = {name: METRICS[name](pipe.parts, images, captions, progress=sys.stderr.isatty()) for name in wanted}
    if options.json:
        print(json.dumps({"model": pipe.parts.name, "model_hash": pipe.parts.model_hash, **figures}))
        return
    for name, values in figures.items():
        print("\n".join(_lines(values, name)))


def _lines(tree: dict[str, Any], name: str) -> list[str]:
    """Return one line for each figure of a tree: its path, mean and standard error."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict) and "mean" in value:
            lines.append(f"{name}.{key}: {value['mean']:.4f} +- {value['standard_error']:.4f}")
        elif isinstance(value, dict):
            lines += _lines(value, f"{name}.{key}")
        else:
            lines.append(f"{name}.{key}: {value}")
    return lines


def _sides(text: str) -> dict[str, int]:
    """Return the pixels of each side of "left=16,top=8"."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(equals and value.strip().isdecimal() for _, equals, value in pairs):
        raise InputError(f"--outpaint must be sides with pixels, got {text!r}; try left=16,right=16")
    return {side.strip(): int(value) for side, _, value in pairs}


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Return (width, height) of "64x48", or (None, None)."""
    if text is None:
        return None, None
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdecimal() or not height.isdecimal():
        raise InputError(f"--size must be WIDTHxHEIGHT in pixels, got {text!r}; try 64x64")
    return int(width), int(height)
