"""Other models out of a Mixtral, as sources: what any sink can write, streamed like every conversion.

`SelectedExperts` keeps some experts of every layer (8x7B to 4x7B).
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from megatron_mixtral.config import MixtralConfig
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.weights.protocols import Fragment, TensorSource
from megatron_mixtral.weights.rules import ROUTER, HFTensor, hf_tensors

LOADS = "expert_load"  # the key of a step's loads in JSON lines


class SelectedExperts(TensorSource):
    """The model with only the given experts of `source`, in that order, and the router's rows of these.

    The list is one for all layers, or one for each. Raises `ConfigError` for lists that cannot be.
    """

    def __init__(self, source: TensorSource, experts: Sequence[int] | Sequence[Sequence[int]]) -> None:
        old = source.config
        if old.dense_config is not None:
            raise ConfigError(f"{source.where} is a {old.model_type}, whose layers have one MLP and no experts to "
                              "select; upcycle makes a Mixtral of several out of it")
        each = experts if isinstance(experts[0], Sequence) else [experts] * old.num_hidden_layers
        self.experts = [list(layer) for layer in each]
        if len(self.experts) != old.num_hidden_layers:
            raise ConfigError(f"experts are listed for {len(self.experts)} layers, the model has "
                              f"{old.num_hidden_layers}")
        counts = {len(layer) for layer in self.experts}
        if len(counts) != 1:
            raise ConfigError(f"every layer must keep as many experts, found {sorted(counts)}")
        for number, layer in enumerate(self.experts):
            if len(set(layer)) != len(layer) or not all(0 <= expert < old.num_local_experts for expert in layer):
                raise ConfigError(f"layer {number}: experts {layer} must be different numbers from 0 to "
                                  f"{old.num_local_experts - 1}")
        # At least one must be left to choose: the configuration refuses fewer experts than a token meets.
        self.config = dataclasses.replace(old, num_local_experts=counts.pop())
        self._source, self.where, self.mapped = source, source.where, source.mapped
        self.left_behind, self.companions = source.left_behind, source.companions
        self._tensors = hf_tensors(old)

    def _original(self, tensor: HFTensor) -> HFTensor:
        expert = self.experts[tensor.layer][tensor.expert] if tensor.rule.per_expert else 0
        return self._tensors[tensor.rule.hf_names(tensor.layer, expert)[tensor.piece]]

    def check(self) -> None:
        self._source.check()

    def dtype(self, tensor: HFTensor) -> str:
        return self._source.dtype(self._original(tensor))

    def fragments(self, tensor: HFTensor) -> list[Fragment]:
        """The source's; of the router the rows of the experts that stay."""
        found = self._source.fragments(self._original(tensor))
        if tensor.rule is not ROUTER:
            return found
        rows = self.experts[tensor.layer]
        assert len(found) == 1, f"{tensor.name} is stored in {len(found)} parts; no layout cuts it"
        return [dataclasses.replace(found[0], length=len(rows), data=found[0].data[rows])]


def busiest(path: Path, keep: int, config: MixtralConfig) -> list[list[int]]:
    """The `keep` experts of each layer that were routed most tokens, in ascending order of their numbers.

    Equal loads go to the lower number. `path` as in `read_loads`. Raises `ConfigError`.
    """
    loads = read_loads(path)
    layers, experts = config.num_hidden_layers, config.num_local_experts
    if [len(layer) for layer in loads] != [experts] * layers:
        raise ConfigError(f"{path}: holds loads of {sorted({len(layer) for layer in loads})} experts for {len(loads)} "
                          f"layers, the model has {experts} experts in {layers} layers")
    if not 1 <= keep <= experts:
        raise ConfigError(f"--keep {keep}: expected 1 to {experts}, the model's number of experts")
    return [sorted(sorted(range(experts), key=lambda expert: (-layer[expert], expert))[:keep]) for layer in loads]


def read_loads(path: Path) -> list[list[float]]:
    """Tokens (or shares of them) by layer and expert.

    The file is a JSON list of one list for each layer, or JSON lines as a training run writes them: objects of which
    some have such a list as `expert_load`; these are added up. Of a step that a resumed run made again (`iteration`)
    the last one counts. Raises `ConfigError`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        try:
            values = [json.loads(text)]
        except ValueError:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
        tables = {}
        for number, value in enumerate(values):
            if not isinstance(value, dict):
                tables["line", number] = value
            elif LOADS in value:
                tables["step", value.get("iteration", ("line", number))] = value[LOADS]
        loads = [[[float(load) for load in layer] for layer in table] for table in tables.values()]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: expected a JSON list of one list of loads for each layer, or JSON lines with such "
                          f"lists as {LOADS!r}: {error}") from None
    shapes = {tuple(map(len, table)) for table in loads}
    if len(shapes) != 1 or not loads[0]:
        raise ConfigError(f"{path}: expected loads of the same layers and experts in every line, found "
                          f"{len(shapes)} different shapes" if loads else f"{path}: no line has {LOADS!r}")
    if not all(0 <= load < math.inf for table in loads for layer in table for load in layer):
        raise ConfigError(f"{path}: loads must be numbers of tokens or shares of them, not negative and finite")
    return [[sum(each) for each in zip(*layers, strict=True)] for layers in zip(*loads, strict=True)]
