"""What a command line may not say: one check by the table of verdicts, one sentence a flag, before torch is imported.

`training/flags.py` asks `check` at the one parse of all words, so that a dry run is refused too. What depends on the
model is `check_model`; what depends on the device is `check_device`, after it is known and before a model is built.
"""

import ast
import importlib.util
from collections.abc import Mapping
from typing import Any

from megatron_mixtral.config import MixtralConfig, engine
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.training.engine_flags.table import Verdict, companions, flags, verdicts

# Package to import: what to install, or what a device is called.
PACKAGES = {
    "transformer_engine": "transformer-engine, which is not installed: install the extra [te] on a machine with a GPU",
    "apex": "NVIDIA's apex, which is not installed (it is built from source; PyPI's apex is another package)",
    "wandb": "wandb, which is not installed: pip install wandb",
    "tensorboard": "tensorboard, which is not installed: pip install tensorboard",
    "nvidia_resiliency_ext": "nvidia-resiliency-ext, which is not installed: pip install nvidia-resiliency-ext",
    "multistorageclient": "multi-storage-client, which is not installed: pip install multi-storage-client",
    "cuda": "a GPU, and this run is on the CPU",
}

# What a router does among several experts; a dense model has one, which gets every token.
OF_ROUTERS = ("--moe-aux-loss-coeff", "--moe-z-loss-coeff", "--moe-input-jitter-eps", "--moe-expert-capacity-factor",
              "--moe-pad-expert-input-to-capacity", "--moe-router-force-load-balancing", "--moe-router-force-biased")
ON_A_GPU = ("cuda", "transformer_engine")


def check(given: Mapping[str, Any]) -> None:
    """`ConfigError` for the first flag of a command line that is refused, also for what is missing here to serve it.

    `given` has the value of each flag that was named, by its name (`--optimizer`). A value that the engine takes anyway
    says nothing.
    """
    for name, value in given.items():
        for word in value if isinstance(value, list) else [value]:
            if (on_value := verdicts()[name].values.get(str(word))) is not None:
                _refuse(f"{name} {word}", on_value, "give another value")
        if not flags()[name].says_nothing(value):
            _refuse(_said(name, value), verdicts()[name], "drop the flag")
    for name, value, needs in companions():
        says = name in given and not flags()[name].says_nothing(given[name]) and value in (None, given[name])
        if says and not any(other in given for other in needs):
            raise ConfigError(f"{_said(name, given[name])} needs {' or '.join(needs)}: give both, or neither")


def _refuse(said: str, verdict: Verdict, cure: str) -> None:
    """`ConfigError` for what a flag says, if it is refused, or needs a package that is not there."""
    if verdict.kind == "refused":
        raise ConfigError(f"{said} {verdict.why}{'' if ': ' in verdict.why else ': ' + cure}")
    if verdict.package not in ("", "cuda") and importlib.util.find_spec(verdict.package) is None:
        raise ConfigError(f"{said} needs {PACKAGES[verdict.package]}; or {cure}")


def check_device(given: Mapping[str, Any], device: str) -> None:
    """`ConfigError` for a flag that has nothing to work on, on this device ("cpu" or "cuda")."""
    if device != "cpu":
        return
    for name, value in given.items():
        on_value = verdicts()[name].values.get(str(value))
        if on_value is not None and on_value.package in ON_A_GPU:
            raise ConfigError(f"{name} {value} needs {PACKAGES['cuda']}: give another value")
        verdict = verdicts()[name]
        if verdict.package in ON_A_GPU and verdict.unless not in given and not flags()[name].says_nothing(value):
            raise ConfigError(f"{_said(name, value)} needs {PACKAGES['cuda']}: drop the flag")


def check_model(given: Mapping[str, Any], config: MixtralConfig) -> None:
    """`ConfigError` for a flag of the architecture that contradicts the model, as `config.engine` has it, and for what
    only routers do where there is nothing to choose.
    """
    expected = engine.architecture_args(config)
    for name, value in given.items():
        acts = any(value) if isinstance(value, list) else value
        if config.dense_config is not None and name in OF_ROUTERS and acts:
            raise ConfigError(f"{_said(name, value)} is about a choice among experts, and a {config.model_type} is a "
                              "Mixtral of one: drop the flag")
        dest = flags()[name].dest
        if dest in expected and engine.differs(dest, _value(value), expected[dest]):
            raise engine.contradiction(dest, value, expected[dest])


def _said(name: str, value: Any) -> str:
    if flags()[name].const is not None or flags()[name].pair:
        return name
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _value(word: Any) -> Any:
    """What the engine makes of a word that it reads as Python: a window, a list of layers."""
    try:
        return ast.literal_eval(word) if isinstance(word, str) else word
    except (SyntaxError, ValueError):
        return word
