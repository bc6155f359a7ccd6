"""Small dense models in Hugging Face's form: Mistral, Llama, tied Llama by transformers, InternLM2 by renaming a Llama.

transformers has no InternLM2. A Llama becomes one by its tensors' names and by q, k and v in one matrix, the inverse of
what InternLM's own `tools/convert2llama.py` does; so the Llama is the reference for what it computes.
"""

import json
from pathlib import Path
from typing import Any

import torch

from helpers.models import TINY, randomize, tensors_of

SIZES = {name: TINY[name] for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id")}
KINDS = ("mistral", "llama", "tied llama", "internlm2")
CODE = "configuration_internlm2.py"


def reference(kind: str, **overrides: Any) -> Any:
    """A random model of transformers' that computes what the kind does."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    sizes = SIZES | {"tie_word_embeddings": kind == "tied llama", "rms_norm_eps": 1e-5} | overrides
    torch.manual_seed(0)
    if kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**{"sliding_window": None} | sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**{"rope_theta": 5e5} | sizes))
    randomize(model, 0)
    return model.eval()


def tiny_dense(directory: Path, kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save `reference(kind)` in the kind's own form, with a file that belongs to it."""
    model = reference(kind, **overrides).to(dtype)
    model.save_pretrained(directory)
    if kind == "internlm2":
        _to_internlm2(directory, model.config)
    else:
        (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return Path(directory)


def _to_internlm2(directory: Path, llama: Any) -> None:
    """In the words of the published models' config.json: another order, no line's end, positions scaled when longer."""
    from safetensors.torch import save_file

    sizes = {name: getattr(llama, name) for name in SIZES}
    (directory / "config.json").write_text(json.dumps({
        "architectures": ["InternLM2ForCausalLM"], "bias": False, "hidden_act": "silu",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}, **sizes, "model_type": "internlm2",
        "rms_norm_eps": llama.rms_norm_eps, "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": llama.rope_parameters["rope_theta"], "tie_word_embeddings": False,
        "torch_dtype": str(llama.dtype).removeprefix("torch."), "attn_implementation": "eager"}, indent=4))
    (directory / CODE).write_text("# carried along, never run\n")
    tensors, found = tensors_of(directory), {}
    groups, rows = sizes["num_key_value_heads"], llama.head_dim
    names = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attention.wo",
             "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
    for name, tensor in tensors.items():
        if ".q_proj" in name:
            q, k, v = (tensors[name.replace("q_proj", one)].reshape(groups, -1, rows, sizes["hidden_size"])
                       for one in ("q_proj", "k_proj", "v_proj"))
            packed = torch.cat((q, k, v), dim=1).reshape(-1, sizes["hidden_size"])
            found[name.replace("self_attn.q_proj", "attention.wqkv")] = packed.contiguous()
        elif ".k_proj" not in name and ".v_proj" not in name:
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            found[name] = tensor
    save_file(found, directory / "model.safetensors", {"format": "pt"})
