"""The least hardware for each model and use: by the planner itself, by plain arithmetic, as the documents have it."""

from pathlib import Path

import pytest

from megatron_mixtral.config import preset
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.planning import cli, least

ROOT = Path(__file__).resolve().parents[3]
MODELS = [preset(name) for name in least.MODELS.values()]


@pytest.fixture(scope="module")
def table():
    return least.least_hardware((24, 48, 80, 141))


def test_the_documents_have_the_planners_table(table):
    assert "\n".join(table) in (ROOT / "docs/parallelism.md").read_text("utf-8"), (
        "put what tools/plan_layout.py --least-hardware prints into docs/parallelism.md, and its column of 80 GB into "
        "README.md and README_zh.md")
    cells = {row.split("|")[1].strip(): row.split("|")[4].strip() for row in table[2:]}
    for page in ("README.md", "README_zh.md"):
        text = (ROOT / page).read_text("utf-8")
        for name in least.MODELS:
            assert f"| {name} | " + " | ".join(cells[f"{name}, {use}"] for use in least.USES) + " |" in text, page


def test_the_command_prints_it(capsys, table):
    with pytest.raises(SystemExit) as ended:
        cli.parser().parse_args(["--least-hardware", "80"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines() == ["|".join(("", row.split("|")[1], row.split("|")[4], ""))
                                                    if row[:4] != "|---" else "|---|---|" for row in table]
    with pytest.raises(ConfigError, match="must be positive"):
        cli.parser().parse_args(["--least-hardware", "-3"])


@pytest.mark.parametrize("config", MODELS)
def test_full_tuning_is_what_the_planner_says(config):
    """Fits so many devices, and not half as many, by the ranking that a user is shown."""
    count = least.least_devices(config, least.FULL, 80)
    name = next(known for known in least.MODELS.values() if preset(known) == config)
    flags = ["--model", name, "--global-batch-size", "256", "--micro-batch-size", "1", "--devices"]
    assert "layouts fit" in next(cli.lines([*flags, str(count)]))
    with pytest.raises(ConfigError, match="nothing fits"):
        list(cli.lines([*flags, str(count // 2)]))


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize(("use", "bytes_each"), [*zip(least.USES, (2 + 4 + 12, 2, 0.5, 2), strict=True)])
def test_no_cell_is_below_what_the_weights_alone_take(config, use, bytes_each):
    """Weights in bf16, with fp32 gradients and 12 bytes of the optimizer where all are trained; NF4 has half a byte."""
    for memory in (24, 48, 80, 141):
        count = least.least_devices(config, use, memory)
        assert count * memory * 1e9 > config.total_parameters * bytes_each
        assert count == 1 or count * memory * 1e9 / 2 < 3.2 * config.total_parameters * bytes_each


def test_more_devices_than_are_tried_are_said():
    assert least.least_devices(MODELS[-1], least.FULL, 8) is None
    assert "over 256" in least.least_hardware((8,))[-4]
