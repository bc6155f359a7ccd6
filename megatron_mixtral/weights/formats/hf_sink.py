"""Writing Hugging Face directories: safetensors shards under the original names, their index, config.json, the settings
of generation where the source has none, and a model card that says where the weights come from.
"""

import hashlib
import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_mixtral import __version__
from megatron_mixtral.config import CONFIG_FILE, MixtralConfig, read_json
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights.dtypes import FLOATS
from megatron_mixtral.weights.files import file_layout, safetensors
from megatron_mixtral.weights.formats.directory import companions_of, iteration_of
from megatron_mixtral.weights.formats.hf_source import INDEX_FILE, SINGLE_FILE
from megatron_mixtral.weights.plan import hf_slices
from megatron_mixtral.weights.protocols import Output, TensorSource
from megatron_mixtral.weights.streaming import payload

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}

GENERATION = "generation_config.json"
INTEGRITY = "integrity.json"  # the sums of a run's checkpoint (training/checkpoints)

# Fields of config.json that say how to compute; the template's must equal the checkpoint's.
ARCHITECTURE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok",
                "rope_theta", "rms_norm_eps", "sliding_window", "tie_word_embeddings")


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" or "300MiB". Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([KMGT]B|[KMG]IB|B)", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return size


class HFSink:
    """A Hugging Face directory to be written at `target`.

    `template` is a directory whose config.json is kept (its dtype aside) and whose tokenizer and generation files go
    along; without one, config.json is made from the model's configuration.
    """

    def __init__(self, target: str | Path, *, template: str | Path | None = None, max_shard_size: str = "5GB",
                 replace: bool = False) -> None:
        self.target, self.replace, self.limit = Path(target), replace, parse_size(max_shard_size)
        self.template = None if template is None else Path(template)

    def plan(self, source: TensorSource, dtypes: dict[str, str]) -> Output:
        """Shards of at most `max_shard_size`, their index (for several) and config.json."""
        config_json, text = self._config_json(source.config, max(sorted(set(dtypes.values())), key=lambda kind:
                                                                 FLOATS[kind].itemsize))
        shards: list[list[file_layout.Payload]] = [[]]
        size = 0
        for tensor in hf_slices(source.config):
            one = payload(tensor, source, dtypes)
            if shards[-1] and size + one.size > self.limit:
                shards.append([])
                size = 0
            shards[-1].append(one)
            size += one.size
        names = [SINGLE_FILE] if len(shards) == 1 else [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        contents: dict[str, Any] = {}
        companions = () if self.template is None else tuple(companions_of(self.template))
        if not any(path.name == GENERATION for path in (*companions, *source.companions)):
            contents[GENERATION] = {"_from_model_config": True, **{
                name: config_json[name] for name in ("bos_token_id", "eos_token_id") if name in config_json}}
        if len(shards) > 1:
            weight_map = {one.name: name for name, shard in zip(names, shards, strict=True) for one in shard}
            contents[INDEX_FILE] = {"metadata": {"total_size": sum(one.size for shard in shards for one in shard)},
                                    "weight_map": dict(sorted(weight_map.items()))}
        return Output({name: safetensors.lay_out(shard) for name, shard in zip(names, shards, strict=True)},
                      {"README.md": model_card(source).encode(), "config.json": text.encode(), **{
                          name: (json.dumps(value, indent=2) + "\n").encode() for name, value in contents.items()}},
                      companions)

    def _config_json(self, config: MixtralConfig, dtype: str) -> tuple[dict[str, Any], str]:
        """Contents of config.json, and how they are written: the template's or the dense model's own text, unless the
        weights have another type than it says. Raises `ConfigError` where it describes another network.
        """
        text, where, said = config.dense_config, f"the dense_config of {CONFIG_FILE}", []
        if self.template is not None:
            path = self.template / "config.json"
            read_json(path)  # says what is wrong with it
            text, where, said = path.read_bytes().decode("utf-8"), str(path), ["torch_dtype"]
        if text is None:
            contents = config.to_hf_dict(dtype=dtype)
            return contents, json.dumps(contents, indent=2) + "\n"
        found = json.loads(text)
        other = MixtralConfig.from_hf_dict(found, where=where)
        for name in ARCHITECTURE:
            ours, theirs = getattr(config, name), getattr(other, name)
            if ours != theirs:
                raise ConfigError(f"{where}: {name} is {theirs}, but the checkpoint's is {ours}; the folder given is "
                                  "of another model")
        keys = [key for key in ("dtype", "torch_dtype") if key in found] or said
        contents = found | dict.fromkeys(keys, dtype)
        return contents, text if contents == found else json.dumps(contents, indent=2) + "\n"


def model_card(source: TensorSource) -> str:
    """README.md of an export, as the hub reads it: size, training data, layout, versions and hash of the checkpoint, as
    far as the source knows them. No path above the checkpoint's folder is in it.
    """
    config, args = source.config, getattr(source, "args", None)
    size, kind = f"{config.total_parameters / 1e6:.1f} M", config.model_type
    if kind == "mixtral":
        size += (f", {config.active_parameters / 1e6:.1f} M of them for a token; {config.num_local_experts} experts in "
                 f"each of {config.num_hidden_layers} layers")
    rows = {"parameters": size, "made from": str(Path(*source.where.parts[-2:]))}
    sums = source.where / INTEGRITY
    if sums.is_file():
        rows[f"sha256 of its {INTEGRITY}"] = hashlib.sha256(sums.read_bytes()).hexdigest()
    for name, what in (getattr(args, "data_identity", None) or {}).items():
        rows[f"data set {Path(name).name}"] = what
    said = {"consumed_train_samples": "samples seen", "seq_length": "sequence length",
            "global_batch_size": "global batch size", "lr": "learning rate", "seed": "seed"}
    if args is not None and (steps := iteration_of(source.where.name)) is not None:  # converted weights have none
        rows["steps"] = str(steps)
        rows |= {words: str(vars(args)[name]) for name, words in said.items() if name in vars(args)}
        sizes = [f"{axis} parallel {getattr(args, f'{axis}_model_parallel_size', 1)}"
                 for axis in ("tensor", "pipeline", "expert")]
        rows["layout"] = ", ".join([*sizes, f"{getattr(args, 'world_size', '?')} devices"])
    rows["versions"] = ", ".join([f"megatron_mixtral {__version__}", *map(_version, ("megatron-core", "torch"))])
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return ("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [" +
            ("mixtral, moe]\n---\n\n# Mixtral\n\n" if kind == "mixtral" else f"{kind}]\n---\n\n# {kind}\n\n") +
            "Exported by megatron_mixtral. Say here what it is for, what it cannot do, and its licence.\n\n"
            f"| | |\n|---|---|\n{table}\n"
            "```python\nfrom transformers import pipeline\n\n"
            "print(pipeline(\"text-generation\", \"THIS_FOLDER\")(\"Once upon a time\", max_new_tokens=20))\n```\n")


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # torch and the engine are not needed to convert
        return f"{package} not installed"
