"""Model folders with one thing changed; each change knows what the loader owes to the result."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from math import inf, nan
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.folder import DIFFERENCE
from latentdiff.errors import ModelLoadError, UnsafeModelError
from tests.checkpoints.header_mutations import MUTATIONS, archives, join, recoded, same, split
from tests.checkpoints.oracle import FLOATS, finite, rules, tensor
from tests.checkpoints.small_models import BASE, UNET, Weights

Verdict = Weights | type[ModelLoadError]  # what is loaded, or how it is refused

CONFIGS = {name: f"{name}/config.json" for name in ("unet", "vae", "text_encoder")}
CONFIGS["scheduler"] = "scheduler/scheduler_config.json"
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}

# Any other value of these keys makes a network of another shape, or one that cannot be.
SHAPED = {
    "unet": (*UNET, "in_channels", "out_channels", "mid_block_type", "time_cond_proj_dim", "num_class_embeds"),
    "vae": ("latent_channels", "block_out_channels", "down_block_types", "in_channels", "use_quant_conv"),
    "text_encoder": ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings", "labels"),
    "scheduler": ("num_train_timesteps", "beta_start", "beta_schedule", "prediction_type", "set_alpha_to_one"),
}
ODD: tuple[Any, ...] = (
    *(True, "", "1", "x" * 50_000, -1, 0.5, nan, inf, -inf, 10**30, 2**31, 2**63, -(10**400), [], {}, [0], [[1]]),
    *(
        [None],
        ["a"],
        [1] * 5000,
        {"a": 1},
        "../..",
        "\0",
        "a\nb",
        "\u202e",
        "os.system",
        [10**30],
        [nan],
        {"x": [[[]]]},
    ),
)
HARMLESS = {
    "unet": {"sample_size": [None, 4, [8, 8]], "norm_eps": [1e-3], "_x": ODD[:4], "center_input_sample": [False]},
    "vae": {"scaling_factor": [0.3], "_x": ODD[:4]},
    "text_encoder": {"_x": ODD[:4], "torch_dtype": ["float16"], "transformers_version": ["9"]},
    "scheduler": {"lambda_min_clipped": [-inf], "clip_sample_range": [2.0], "steps_offset": [1], "x": ["y"]},
}
HALVES = (".lora_down.weight", ".lora_up.weight")  # of factors in a difference
CODE = ({"auto_map": {"AutoModel": "evil.Model"}}, {"_target_": "os.system"}, {"custom_pipelines": {}})
OUTSIDE = (
    *("../../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "c:x.safetensors", 3, None, ["x"]),
    *("\0.safetensors", "..\\x.safetensors", "x.safetensors/", "./x.safetensors", "~/x.safetensors", "x.bin", "x.PKL"),
)


class Folder:
    """A copy of a model folder that may be changed, and what loading it should give.

    Args:
        root: of the copy; where it is a variant, its base is beside it.
        weights: of the model, in `dtype`.
        dtype: in which it is loaded.
        base: weights of the base in that dtype.
    """

    def __init__(self, root: Path, weights: Weights, dtype: torch.dtype, base: Weights) -> None:
        self.root, self.weights, self.dtype, self.base = root, dict(weights), dtype, base
        self.components = [name for name in STEMS if (root / name).is_dir()]
        self.configured = [name for name in CONFIGS if (root / CONFIGS[name]).exists()]
        self.differs = (root / "unet" / DIFFERENCE).exists()
        if self.differs:  # rounded after it is added to weights that are
            self.verdict("unet", self.file("unet").read_bytes())

    def file(self, component: str) -> Path:
        name = DIFFERENCE if component == "unet" and self.differs else f"{STEMS[component]}.safetensors"
        return self.root / component / name

    def verdict(self, component: str, content: bytes) -> Verdict:
        """Judge the content of a component's weight file."""
        prefix = f"{component}."
        wanted = {name.removeprefix(prefix): weight for name, weight in self.weights.items() if name.startswith(prefix)}
        found = rules(content)
        if found is not None and component == "unet" and self.differs:
            return self._merged(found, {name: tuple(weight.shape) for name, weight in wanted.items()})
        if found is None or found.keys() != wanted.keys():
            return ModelLoadError
        for name, (dtype, shape, raw) in found.items():
            if dtype not in FLOATS or shape != tuple(wanted[name].shape):
                return ModelLoadError
            self.weights[prefix + name] = tensor(dtype, shape, raw).to(self.dtype)
            if not finite(self.weights[prefix + name]):
                return ModelLoadError
        return self.weights

    def _merged(self, found: dict[str, Any], wanted: dict[str, tuple[int, ...]]) -> Verdict:
        """Judge a difference: what it has whole, factors to add to what both have, and nothing may be missing."""
        before = {name.removeprefix("unet."): held for name, held in self.base.items() if name.startswith("unet.")}
        before = {name: held for name, held in before.items() if wanted.get(name) == tuple(held.shape)}
        if any(dtype not in FLOATS for dtype, _, _ in found.values()):
            return ModelLoadError
        held = {name: tensor(*components) for name, components in found.items()}
        if not all(finite(one.float()) for one in held.values()):
            return ModelLoadError
        whole = {name: one.to(self.dtype) for name, one in held.items() if not name.endswith(HALVES)}
        if any(wanted.get(name) != tuple(one.shape) for name, one in whole.items()):
            return ModelLoadError
        if wanted.keys() - before.keys() - whole.keys():
            return ModelLoadError
        changed = {}
        for layer in {name.removesuffix(HALVES[0]).removesuffix(HALVES[1]) for name in held.keys() - whole.keys()}:
            name, pair = f"{layer}.weight", [held.get(layer + half) for half in HALVES]
            if name not in before or name in whole or len(wanted[name]) < 2 or pair[0] is None or pair[1] is None:
                return ModelLoadError
            down, up = (plain(tuple(half.shape)) for half in pair if half is not None)
            rows, *rest = plain(wanted[name])
            if not down or not down[0] or up != (rows, down[0]) or down[1:] != tuple(rest):
                return ModelLoadError
            product = pair[1].float().flatten(1) @ pair[0].float().flatten(1)
            changed[name] = (before[name].float() + product.view(wanted[name])).to(self.dtype)
        weights = {**before, **whole, **changed}
        if not all(map(finite, weights.values())):
            return ModelLoadError
        self.weights.update({f"unet.{name}": one for name, one in weights.items()})
        return self.weights

    def config(self, component: str) -> dict[str, Any]:
        """Return the configuration of a component."""
        content: dict[str, Any] = json.loads((self.root / CONFIGS[component]).read_text())
        return content

    def json_files(self) -> list[str]:
        """Return the names of the JSON files that the model needs."""
        return ["model_index.json", *(CONFIGS[name] for name in self.configured)]

    def rewrite(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a JSON file."""
        path = self.root / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))


def plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without axes of length one after the second."""
    return shape[:2] if set(shape[2:]) <= {1} else shape


def weights(rng: random.Random, folder: Folder) -> Verdict:
    """Damage a weight file as any safetensors file."""
    component = rng.choice(folder.components)
    path = folder.file(component)
    content = rng.choice(MUTATIONS)(rng, *deepcopy(split(path.read_bytes())))
    path.write_bytes(content)
    return folder.verdict(component, content)


def precision(rng: random.Random, folder: Folder) -> Verdict:
    """Write the tensors of a file in other precisions."""
    component = rng.choice(folder.components)
    path = folder.file(component)
    content = recoded(rng, path.read_bytes())
    path.write_bytes(content)
    return folder.verdict(component, content)


def config(rng: random.Random, folder: Folder) -> Verdict:
    """Give a key that decides the shape of a network, or how noise is added, an odd value."""
    component = rng.choice(folder.configured)
    tree = folder.config(component)
    key = rng.choice([key for key in (*SHAPED[component], "_class_name", "architectures") if key in tree])
    allowed = [tree[key]] if not isinstance(tree[key], bool) else [True, False]
    allowed += [[]] if (component, key) == ("vae", "down_block_types") else []  # filled in
    value = rng.choice(
        [value for value in ODD if not any(value == good and type(value) is type(good) for good in allowed)]
    )
    folder.rewrite(CONFIGS[component], lambda tree: {**tree, key: value})
    return ModelLoadError


def numbers(rng: random.Random, folder: Folder) -> Verdict:
    """Give any key, known or not, a number that no network can have, or one in too many brackets."""
    component = rng.choice(folder.components)
    tree = folder.config(component)
    value = rng.choice((nan, inf, -inf, 10**30, -(10**30), 1e300, deep(200), deep(450), deep(900)))
    key = rng.choice((*tree, "_x"))
    folder.rewrite(CONFIGS[component], lambda tree: {**tree, key: value})
    return ModelLoadError


def deep(levels: int) -> list[Any]:
    """Return a number that is not finite, in brackets."""
    value: list[Any] = [nan]
    for _ in range(levels):
        value = [value]
    return value


def harmless(rng: random.Random, folder: Folder) -> Verdict:
    """Change what decides nothing."""
    component = rng.choice(folder.configured)
    tree = folder.config(component)
    few = tree.get("_class_name") in ("PixelSpace", "LabelEncoder")  # which have hardly a key
    key = "_x" if few else rng.choice(list(HARMLESS[component]))
    items = list({**tree, key: rng.choice(HARMLESS[component][key])}.items())
    rng.shuffle(items)
    folder.rewrite(CONFIGS[component], lambda _: dict(items))
    (folder.root / "unet" / rng.choice(("x.bin", "y.pkl", "pytorch_model.bin"))).write_bytes(archives()["torch"])
    if rng.random() < 0.5:
        content = same(rng, *split(folder.file("unet").read_bytes()))
        folder.file("unet").write_bytes(content)
    return folder.weights


def code(rng: random.Random, folder: Folder) -> Verdict:
    """Name code to run, at any depth."""
    names = folder.json_files()
    names += ["tokenizer/tokenizer_config.json"] if (folder.root / "tokenizer").is_dir() else []
    value: Any = rng.choice(CODE)
    for _ in range(rng.choice((0, 1, 3, 50))):
        value = rng.choice(([value], {"_x": value}))
    value = value if isinstance(value, dict) else {"_x": value}
    folder.rewrite(rng.choice(names), lambda tree: {**tree, **value})
    return ModelLoadError


def unreadable(rng: random.Random, folder: Folder) -> Verdict:
    """Replace a JSON file by something else."""
    names = folder.json_files()
    contents = (
        *("", "[]", "null", "{", '{"a": 1,}', "\ufeff{}", '"a"', "{}{}", "# {}"),
        *("[" * 100_000, '{"a":' * 5000, "1" * 5000),
    )
    raw = rng.choice((*(text.encode() for text in contents), b"\xff\xfe{}", *archives().values()))
    (folder.root / rng.choice(names)).write_bytes(raw)
    return ModelLoadError


def index(rng: random.Random, folder: Folder) -> Verdict:
    """Name other classes in model_index.json."""
    tree = json.loads((folder.root / "model_index.json").read_text())
    key = rng.choice([key for key in tree if key in (*folder.components, "_class_name", "scheduler")])
    classes = (
        *("EvilModel", "os.system", "UNet2DConditionModel\n", "unet2dconditionmodel", "x" * 9999, ""),
        *(3, None, [], {}, nan),
    )
    value: Any = rng.choice(classes)
    if key == "scheduler":  # whose class its own configuration names
        value = rng.choice((3, [], ["diffusers", 7], ["diffusers"], {}, nan))
    elif key != "_class_name" and rng.random() < 0.8:
        value = rng.choice((["diffusers", value], [*tree[key], "x"], [tree[key]]))
    folder.rewrite("model_index.json", lambda tree: {**tree, key: value})
    return ModelLoadError


def shards(rng: random.Random, folder: Folder) -> Verdict:
    """Divide a weight file, with an index that is right or not."""
    component = rng.choice(folder.components)
    if folder.differs:  # which is one file
        return folder.weights
    path = folder.file(component)
    entries, data = split(path.read_bytes())
    path.unlink()
    variant = rng.choice(("", ".fp16"))
    files = [f"{STEMS[component]}{variant}-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    placed: dict[Any, Any] = {}
    for file, members in zip(files, (entries[::2], entries[1::2])):
        members = [(name, entry) for name, entry in members if name != "__metadata__"]
        raw = [data[slice(*entry["data_offsets"])] for _, entry in members]
        own, start = [], 0
        for (name, entry), part in zip(members, raw):
            own.append((name, {**entry, "data_offsets": [start, start + len(part)]}))
            start += len(part)
        if own:
            (path.parent / file).write_bytes(join(own, b"".join(raw)))
        placed |= {name: file for name, _ in own}
    tree: dict[str, Any] = {"metadata": {"total_size": len(data)}, "weight_map": placed}
    verdict = damaged_index(rng, path.parent, tree, folder)
    (path.parent / f"{STEMS[component]}.safetensors.index{variant}.json").write_text(json.dumps(tree))
    return verdict


def damaged_index(rng: random.Random, place: Path, tree: dict[str, Any], folder: Folder) -> Verdict:
    """Damage an index of shards in half of all cases."""
    placed = tree["weight_map"]
    name = rng.choice(list(placed))
    change = rng.randrange(12)
    if change == 0:
        placed[name] = rng.choice(OUTSIDE)
    elif change == 1:
        placed[rng.choice(("", "x", "\0", "conv_in.weightx", name + "\n"))] = placed[name]
    elif change == 2:
        del placed[name]
        return ModelLoadError
    elif change == 3:
        tree["weight_map"] = rng.choice((None, [], {}, "x", 3, [placed], {"x": placed}))
    elif change == 4:
        (place / placed[name]).unlink()
    elif change == 5:
        shard = place / placed[name]
        (folder.root.parent / "elsewhere.safetensors").write_bytes(shard.read_bytes())
        shard.unlink()
        shard.symlink_to(folder.root.parent / "elsewhere.safetensors")
    elif change == 6:
        tree["metadata"] = rng.choice(CODE)
    else:
        return folder.weights
    return ModelLoadError


def files(rng: random.Random, folder: Folder) -> Verdict:
    """Put a link, a pipe, a folder, nothing, or an archive where a file belongs."""
    names = folder.json_files()
    names += [str(folder.file(name).relative_to(folder.root)) for name in folder.components] * 2
    path = folder.root / rng.choice(names)
    away = folder.root.parent / "away"
    change = rng.randrange(10)
    if change == 9:
        inside = path.with_name(f"inside{path.suffix}")
        path.rename(inside)
        path.symlink_to(inside.name)
        return folder.weights
    if change == 8:
        shutil.move(path.parent, away)
        path.parent.symlink_to(away)
        return ModelLoadError if path.parent != folder.root else folder.weights
    content = path.read_bytes()
    path.unlink()
    if change == 0:
        away.write_bytes(content)
        path.symlink_to(away)
    elif change == 1:
        path.symlink_to(rng.choice((path.name, "/dev/zero", "/dev/stdin", "/proc/self/mem", "nowhere", "../../..")))
    elif change == 2:
        os.mkfifo(path)
    elif change == 3:
        path.mkdir()
    elif change == 4:
        path.write_bytes(b"")
    elif change == 5 and path.suffix == ".safetensors":
        path.write_bytes(archives()[rng.choice(list(archives()))])
        return UnsafeModelError
    elif change == 6 and path.suffix == ".safetensors":
        path.with_suffix(rng.choice((".bin", ".pt", ".ckpt", ".pkl"))).write_bytes(archives()["torch"])
        return UnsafeModelError
    elif change == 7:
        os.link(folder.root.parent / "outside.safetensors", path)
        if path.suffix == ".safetensors":
            return folder.verdict(path.parent.name, path.read_bytes())
    return ModelLoadError


def base(rng: random.Random, folder: Folder) -> Verdict:
    """Name another base, or damage it."""
    names = (
        *(name for name in OUTSIDE if not isinstance(name, str) or not name.startswith("x.")),
        "nowhere",
        "x" * 999,
    )
    change = rng.randrange(4)
    place = folder.root.with_name(BASE)
    if change == 0 or not place.is_dir() or place == folder.root:
        folder.rewrite("model_index.json", lambda tree: {**tree, "_base": rng.choice(names)})
    elif change == 1:
        (place / "model_index.json").write_text(rng.choice(("", "{}", "[]", '{"_base": "x"}')))
    elif change == 2:
        shutil.rmtree(place)
        place.symlink_to(f"../good/{BASE}")  # from which it was copied
    else:
        name = f"{rng.choice(('vae', 'text_encoder'))}/config.json"
        (place / name).unlink()
    return ModelLoadError


def vocabulary(rng: random.Random, folder: Folder) -> Verdict:
    """Damage a tokenizer, where there is one."""
    place = folder.root / "tokenizer"
    if not place.is_dir():
        return folder.weights
    name = "vocab.txt" if (place / "vocab.txt").exists() else "vocab.json"
    change = rng.randrange(5)
    if change == 0:
        (place / name).write_bytes(
            rng.choice((b"", b"\xff\xfe", b"[]", b"x\ny\n", b'{"a": "b"}', b'{"a": -1}', b"\0" * 99))
        )
    elif change == 1:
        (place / name).unlink()
    elif change == 2:
        value = rng.choice([value for value in ODD if value != []])
        folder.rewrite("tokenizer/tokenizer_config.json", lambda tree: {**tree, "model_max_length": value})
    elif change == 3:
        (place / "special_tokens_map.json").write_text('{"pad_token": "nowhere"}')
    else:
        moved = folder.root.parent / "words"
        (place / name).rename(moved)
        (place / name).symlink_to(moved)
    return ModelLoadError


CHANGES = (
    *(weights, weights, weights, precision, config, config, numbers, harmless),
    *(code, unreadable, index, shards, shards, files, vocabulary, base),
)
