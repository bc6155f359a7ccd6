"""Two rooms that must agree: what the planner prints is what a training run resolves."""

from megatron_mixtral.config import preset
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
