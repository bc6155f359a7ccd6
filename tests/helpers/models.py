"""Small Hugging Face Mixtrals with every parameter random, norms included, so that a forgotten tensor shows."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}


def tiny_hf_mixtral(directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "5GB",
                    **overrides: Any) -> Path:
    """Save a tiny random MixtralForCausalLM with `transformers` and return its directory.

    `overrides` are fields of `transformers.MixtralConfig`; `TINY` has the defaults.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**(TINY | {"tie_word_embeddings": False} | overrides))).to(dtype)
    randomize(model, seed)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter: norms around 1 but away from it, matrices small enough to keep activations tame."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            value = 1 + 0.3 * noise if parameter.dim() == 1 else 0.1 * noise
            parameter.copy_(value)


def random_hf_directory(directory: Path, config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A Hugging Face directory of a `MixtralConfig` with random tensors, made without `transformers` (milliseconds)."""
    from safetensors.torch import save_file

    from megatron_mixtral.weights import hf_tensors

    generator = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True)
    save_file({name: torch.randn(tensor.shape, generator=generator).to(dtype)
               for name, tensor in hf_tensors(config).items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_hf_dict(str(dtype).removeprefix("torch."))))
    return directory


def nf4_rounded(hf: Path, directory: Path) -> Path:
    """The model of a directory with every linear rounded to 4 bits by bitsandbytes."""
    from bitsandbytes import functional
    from safetensors.torch import save_file

    tensors = tensors_of(hf)
    for name, tensor in tensors.items():
        if "_proj." in name or ".experts." in name:
            packed, state = functional.quantize_4bit(tensor, blocksize=64, compress_statistics=False, quant_type="nf4")
            tensors[name] = functional.dequantize_4bit(packed, state)
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    shutil.copy(hf / "config.json", directory)
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's safetensors files."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in found, f"{name} is in two files"
            found[name] = tensor
    return found


def assert_same_weights(directory: Path, other: Path) -> None:
    """Same names, types and bits in two Hugging Face directories."""
    ours, theirs = tensors_of(directory), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
