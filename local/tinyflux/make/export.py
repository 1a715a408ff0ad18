"""Writes the folder in diffusers' FluxPipeline layout, weights in bfloat16. `python -m local.tinyflux.make.export final.pt model`

Needs text.pt, vae.pt and vocab.json beside it.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from local.tinyflux.codec import CHANNELS, GROUPS
from local.tinyflux.grid import LATENT_CHANNELS
from local.tinyflux.make.vocabulary import read_vocabulary
from local.tinyflux.schedules import TRAINED_SHIFT
from local.tinyflux.tokenizer import END, LONGEST_WORD, PAD, TEXT_TOKENS, UNKNOWN
from local.tinyflux.transformer import FluxConfig

Json = dict[str, Any]

DIFFUSERS_VERSION = "0.36.0"
SPECIAL_TOKENS = {"[PAD]": PAD, "[EOS]": END, "[UNK]": UNKNOWN}
VAE_CONFIG: Json = {
    "_diffusers_version": DIFFUSERS_VERSION,
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "block_out_channels": list(CHANNELS),
    "layers_per_block": 1,
    "norm_num_groups": GROUPS,
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "sample_size": 128,
    "force_upcast": False,
}
T5_CONFIG: Json = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "is_encoder_decoder": False,
    "tie_word_embeddings": True,
}
CLIP_CONFIG: Json = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": TEXT_TOKENS,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": PAD,
    "bos_token_id": END,
    "eos_token_id": END,
    "projection_dim": 64,
}
TOKENIZER_CONFIG: Json = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "[PAD]",
    "eos_token": "[EOS]",
    "unk_token": "[UNK]",
    "model_max_length": TEXT_TOKENS,
    "extra_ids": 0,
}
SCHEDULER_CONFIG: Json = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "num_train_timesteps": 1000,
    "shift": TRAINED_SHIFT,
    "use_dynamic_shifting": False,
}
MODEL_INDEX: Json = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def describe_tokenizer(vocabulary: dict[str, int]) -> Json:
    """The Tokenizer class in the format of the `tokenizers` library."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": "[a-z]+|[0-9]|[^a-z0-9]"}, "behavior": "Isolated", "invert": False}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    end = {"id": "[EOS]", "ids": [END], "tokens": ["[EOS]"]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for token, index in SPECIAL_TOKENS.items()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": kind} for kind in ("Lowercase", "NFKD", "StripAccents")]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, split]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"SpecialToken": {"id": "[EOS]", "type_id": 0}}],
            "pair": [first, second],
            "special_tokens": {"[EOS]": end},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": LONGEST_WORD,
            "vocab": vocabulary,
        },
    }


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: weight.to(torch.bfloat16).contiguous() for key, weight in state.items()}, path, {"format": "pt"})
    print(path, path.stat().st_size, "bytes")


def write_json(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), "utf-8")


def export(transformer_file: Path, target: Path, folder: Path) -> None:
    vocabulary, text = read_vocabulary(folder), torch.load(folder / "text.pt")
    words = {"vocab_size": len(vocabulary)}
    transformer = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": DIFFUSERS_VERSION, **asdict(FluxConfig())}
    write_weights(target / "transformer" / "diffusion_pytorch_model.safetensors", torch.load(transformer_file))
    write_json(target / "transformer" / "config.json", transformer)
    write_weights(target / "vae" / "diffusion_pytorch_model.safetensors", torch.load(folder / "vae.pt"))
    write_json(target / "vae" / "config.json", VAE_CONFIG)
    write_weights(target / "text_encoder_2" / "model.safetensors", text["t5"])
    write_json(target / "text_encoder_2" / "config.json", {**T5_CONFIG, **words})
    write_weights(target / "text_encoder" / "model.safetensors", text["clip"])
    write_json(target / "text_encoder" / "config.json", {**CLIP_CONFIG, **words})
    for name in ("tokenizer", "tokenizer_2"):
        write_json(target / name / "tokenizer.json", describe_tokenizer(vocabulary))
        write_json(target / name / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(target / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(target / "model_index.json", MODEL_INDEX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("transformer", type=Path, help="the state that train_flow wrote")
    parser.add_argument("target", type=Path)
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    export(arguments.transformer, arguments.target, arguments.folder)


if __name__ == "__main__":
    main()
