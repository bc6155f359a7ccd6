"""Two rooms that must agree: what the planner prints is what a training run resolves."""

import json
from pathlib import Path

from megatron_mixtral.config import AdapterConfig, preset
from megatron_mixtral.planning.report import flags
from megatron_mixtral.planning.search import Question, plan
from megatron_mixtral.planning.step_time import Machine
from megatron_mixtral.training.arguments import resolve
from megatron_mixtral.training.preflight import shape_of


def test_flags_of_the_plan_are_accepted_by_the_program() -> None:
    fitting, _ = plan(Question(preset("mixtral-8x7b"), Machine(64), 4096, 256))
    assert len(fitting) >= 40
    for one in fitting[:40]:
        argv = " ".join(["--model mixtral-8x7b", *flags(one.shape)]).split()
        assert shape_of(resolve(argv, {"WORLD_SIZE": "64"})) == one.shape


def test_so_are_those_of_a_run_that_trains_adapters(tmp_path: Path) -> None:
    model = preset("mixtral-8x7b")
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf_dict("bfloat16")))
    adapter = AdapterConfig.of(model, rank=64, quantized=True, base_name=str(tmp_path))
    fitting, _ = plan(Question(model, Machine(8), 2048, 64, (1, 8), adapter))
    assert len(fitting) >= 10
    for one in fitting[:10]:
        argv = " ".join(flags(one.shape)).replace("DIR", str(tmp_path)).split()
        assert shape_of(resolve(argv, {"WORLD_SIZE": "8"})) == one.shape
