"""The command line: `latentdiff generate "a red fox" -o fox.png`.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 2 bad usage or input, 3 a model file was
refused, 4 no space or I/O, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from latentdiff import __version__, commands
from latentdiff.errors import InputError, LatentDiffError, suggest

NO_SPACE = 4
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
    verbs = parser.add_subparsers(metavar="command", required=True)
    for name, (run, add_options, text) in COMMANDS.items():
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        add_options(added)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument(
        "-o",
        "--out",
        help="PNG to write (several are fox.png, fox-2.png, ...) or folder; named by the prompt otherwise",
    )
    parser.add_argument(
        "--model", help="folder, single safetensors file, or owner/name on a hub; the embedded model by default"
    )
    _add_prediction_type(parser)
    _add_embedding(parser)
    _add_lora(parser)
    parser.add_argument("--negative", default="", metavar="TEXT", help="what to steer away from")
    parser.add_argument("--steps", type=int, help="calls of the network")
    parser.add_argument("--guidance", type=float, help="how strictly to follow the prompt; 1 is not guided")
    parser.add_argument("--sampler", help="euler_a, dpmpp_2m, ddim, unipc, ...; a wrong name lists them all")
    parser.add_argument("--seed", type=int, help="of the first picture; picture i has seed + i (default 0)")
    parser.add_argument("-n", "--num-images", type=int, help="pictures of each prompt")
    parser.add_argument("--size", metavar="WxH", help="in pixels, multiples of 8")
    parser.add_argument("--image", help="PNG, JPEG or WebP to start from")
    parser.add_argument("--strength", type=float, help="above 0, up to 1: how much of --image is drawn anew")
    parser.add_argument(
        "--mask",
        metavar="FILE|alpha|L,T,R,B",
        help="what of --image is drawn anew, while the rest stays: what is white in a picture of its size, what is "
        "transparent in it, or a box of its pixels",
    )
    parser.add_argument("--outpaint", metavar="left=N,top=N,...", help="pixels to draw around --image, multiples of 8")
    parser.add_argument("--feather", type=int, metavar="N", help="pixels over which what is drawn passes into the rest")
    parser.add_argument("--hires", type=float, metavar="X", help="1 to 4: draw, then again that many times as large")
    parser.add_argument(
        "--hires-strength", type=float, help="above 0, up to 1: how much is drawn anew then (default 0.5)"
    )
    parser.add_argument("--upscale", action="store_true", help="make each picture larger, with its prompt and seed")
    parser.add_argument(
        "--upscale-model", metavar="M", help="what --upscale does that with; embedded-upscale by default"
    )
    parser.add_argument("--attention", default="sdpa", help="sdpa (torch's own, default) or xformers (CUDA only)")
    parser.add_argument("--offload", action="store_true", help="keep networks in CPU memory while they do not run")
    _add_machine(parser)


def _add_upscale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="PNG, JPEG or WebP of any size; the result is transparent where it is")
    parser.add_argument("-o", "--out", help="PNG to write, or folder; IMAGE-x4.png beside IMAGE by default")
    parser.add_argument("--prompt", default="", metavar="T", help="what it shows; may help, and may be left out")
    parser.add_argument("--seed", type=int, help="of its noise (default 0)")
    parser.add_argument("--model", help="folder, or owner/name on a hub; embedded-upscale by default")
    _add_lora(parser)
    parser.add_argument("--scale", type=int, help="4 (default), or 2: the same, made smaller by half")
    parser.add_argument("--noise-level", type=int, metavar="N", help="0 to 350: how much is drawn anew (default 20)")
    parser.add_argument(
        "--correction",
        metavar="C",
        help="what of IMAGE the result must show: colour (default); full, all of it, if it is clean; or none",
    )
    parser.add_argument("--steps", type=int, help="calls of the network (default 5, enough for embedded-upscale)")
    parser.add_argument("--guidance", type=float, help="how strictly to follow --prompt; 1 (default) is not guided")
    _add_machine(parser)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="PNG written by latentdiff")
    parser.add_argument("-o", "--out", help="file to write; IMAGE-replay.png by default")
    parser.add_argument("--model", help="model folder, where the recorded one is elsewhere now")
    parser.add_argument("--force", action="store_true", help="go on with another model, LoRA or image than recorded")
    _add_machine(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampler", default="euler_a")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--model", help="model folder whose noise schedule is used; the embedded one by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", help="folder or file; the embedded model by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="model folder or safetensors file of a whole model")
    parser.add_argument("target", help="NAME.safetensors for one file of the original layout, else a new folder")
    _add_prediction_type(parser)
    _add_lora(parser)
    parser.add_argument(
        "--dtype", help="of the weights: float16 (default), bfloat16, float32, float8_e4m3fn or float8_e5m2"
    )
    parser.add_argument(
        "--variant-of",
        metavar="FOLDER",
        help="model beside TARGET, which TARGET then needs: only what differs from it is written",
    )
    parser.add_argument(
        "--rank", type=int, help="of the U-Net's difference from that of --variant-of; written whole by default"
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, see configs/; the name alone finds one that came with the package")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint that is whole")
    parser.add_argument("--out", help="run folder, instead of the config's run.out")
    parser.add_argument("--check", action="store_true", help="look at everything a run needs, print it, train nothing")


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder of pictures with a metadata.jsonl")
    parser.add_argument("--model", help="folder, safetensors file, or owner/name on a hub; the embedded one by default")
    parser.add_argument(
        "--task",
        choices=["text_to_image", "inpaint", "upscale"],
        metavar="TASK",
        help="text_to_image, inpaint (any text-to-image model learns it) or upscale; what --model does by default",
    )
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run that is in the folder")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA of this rank, not the whole U-Net")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        choices=["emoji", "fxemoji", "digits"],
        metavar="NAME",
        help="emoji: six openly licensed styles, fetched by npm; fxemoji: one more; digits: those of scikit-learn",
    )
    parser.add_argument("out", help="folder; a build that was broken off goes on where it stopped")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (default 64; digits have 8)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder, or `embedded`")
    parser.add_argument("--data", required=True, help="folder of captioned pictures, or of splits with such")
    parser.add_argument("--metrics", default="nll", help="nll: bits per dimension (the only one so far)")
    parser.add_argument("--split", default="test", help="train, validation or test (default)")
    parser.add_argument("--images", type=int, default=32, help="how many pictures are measured (default 32)")
    _add_machine(parser)


def _add_prediction_type(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prediction-type", help="epsilon or v_prediction, where the model's files do not say what it predicts"
    )


def _add_embedding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:WORD]",
        help="textual-inversion file, and the word for it in prompts (its own by default); may be given several times",
    )


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA file, and how much of it (default 1), or UNET,TEXT; may be given several times",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, mps; the fastest there is by default")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def _train(options: argparse.Namespace) -> None:
    from latentdiff import training

    packaged = Path(training.__file__).parent / "configs" / Path(options.config).name
    recipe = packaged if packaged.is_file() and not Path(options.config).exists() else options.config
    if options.check:
        training.cli_check(str(recipe), options.overrides, options.out)
    else:
        training.cli_train(str(recipe), options.overrides, options.resume, options.out)


def _finetune(options: argparse.Namespace) -> None:
    from latentdiff.training import cli_finetune

    cli_finetune(options.dataset, options.out, options.model, options.lora, options.task, options.resume)


def _data(options: argparse.Namespace) -> None:
    from latentdiff.training import cli_data_digits, cli_data_emoji

    if options.name != "digits":
        cli_data_emoji(options.out, options.size or 64, options.name)
    elif options.size not in (None, 8):
        raise InputError(f"--size of the digits is 8, got {options.size}; leave it out")
    else:
        cli_data_digits(options.out)


# What each command runs, adds to its parser, and says of itself.
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], Callable[[argparse.ArgumentParser], None], str]] = {
    "generate": (commands.generate, _add_generate, "Draw pictures of one or more prompts."),
    "upscale": (commands.upscale, _add_upscale, "Make a picture larger, by a model trained for it."),
    "replay": (commands.replay, _add_replay, "Draw a picture again from the settings in its PNG file."),
    "plan": (commands.plan, _add_plan, "Print a sampler's table."),
    "inspect": (commands.inspect, _add_inspect, "Say what a model folder, safetensors file or drawn PNG is."),
    "convert": (commands.convert, _add_convert, "Write a model in another layout."),
    "train": (_train, _add_train, "Train the stage that a YAML config describes."),
    "finetune": (_finetune, _add_finetune, "Fine-tune a model on captioned pictures, with settings chosen for both."),
    "data": (_data, _add_data, "Build a captioned data set."),
    "evaluate": (commands.evaluate, _add_evaluate, "Measure how good a model is on captioned pictures."),
}
