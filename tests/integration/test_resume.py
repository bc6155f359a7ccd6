"""A run goes on anywhere: six steps at layout A, or three at A and three at B, are the same six steps.

Same means: every loss and every gradient norm within 1e-5 relative (fp32), and the same samples in every step. The
layouts sum in different orders, which moves the norms by about 1e-6 after six steps of twelve sequences each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from helpers import datasets
from helpers.models import tiny_hf_mixtral
from helpers.program import Outcome, pretrain

from megatron_mixtral.config import ParallelLayout
from megatron_mixtral.weights import convert, open_sink, open_source

SEQUENCE, BATCH, STEPS, SAVED = 32, 12, 6, 3
TOLERANCE = 1e-5
RECIPE = ["--seq-length", str(SEQUENCE), "--micro-batch-size", "1", "--global-batch-size", str(BATCH),
          "--lr", "3e-3", "--lr-decay-style", "cosine", "--min-lr", "1e-4", "--lr-warmup-iters", "2",
          "--weight-decay", "0.01", "--adam-beta2", "0.95", "--clip-grad", "1.0", "--moe-aux-loss-coeff", "0.01",
          "--eval-iters", "0", "--train-iters", str(STEPS)]
BUCKETS = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "5000"]


@dataclass(frozen=True)
class Layout:
    """A layout, its number of ranks and the flags that make it."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    dp: int = 1
    distributed_optimizer: bool = True
    ckpt_format: str = "torch_dist"
    more: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def flags(self) -> list[str]:
        words = ["--tensor-model-parallel-size", self.tp, "--pipeline-model-parallel-size", self.pp,
                 "--expert-model-parallel-size", self.ep, "--context-parallel-size", self.cp]
        if self.vpp > 1:
            words += ["--num-virtual-stages-per-pipeline-rank", self.vpp]
        if self.etp is not None:
            words += ["--expert-tensor-parallel-size", self.etp]
        if self.distributed_optimizer:
            words.append("--use-distributed-optimizer")
        return [*map(str, words), "--ckpt-format", self.ckpt_format, *self.more]


ONE = Layout()
TP2, PP2, PP2_VPP2 = Layout(tp=2), Layout(pp=2), Layout(pp=2, vpp=2)
DP2, DP3 = Layout(dp=2, more=tuple(BUCKETS)), Layout(dp=3, more=tuple(BUCKETS))
EP2, EP4 = Layout(dp=2, ep=2), Layout(dp=4, ep=4)
ETP1, ETP2 = Layout(tp=2, dp=2, ep=2, etp=1), Layout(tp=2, dp=2, ep=2, etp=2)
THREE = Layout(tp=2, pp=2, ep=2, etp=1)
PAIRS = {
    "tp 1 -> 2": (ONE, TP2), "tp 2 -> 1": (TP2, ONE),
    "pp 1 -> 2": (ONE, PP2), "pp 2 -> 1": (PP2, ONE),
    "vpp on": (PP2, PP2_VPP2), "vpp off": (PP2_VPP2, PP2),
    "ep 1 -> 2": (DP2, EP2), "ep 2 -> 1": (EP2, DP2), "ep 2 -> 4": (EP2, EP4),
    "etp 1 -> 2": (ETP1, ETP2), "etp 2 -> 1": (ETP2, ETP1),
    "dp 1 -> 2": (ONE, DP2), "dp 2 -> 1": (DP2, ONE), "dp 2 -> 3": (DP2, DP3), "dp 3 -> 2": (DP3, DP2),
    "cp 2 -> 1": (Layout(cp=2), ONE), "cp 2 -> 4": (Layout(cp=2), Layout(cp=4)),
    "tp2 pp2 ep2 -> pp4": (THREE, Layout(pp=4)),
    "tp2 pp2 ep2 -> dp3": (THREE, DP3),
    "dp3 -> tp2 pp2 ep2": (DP3, THREE),
    "tp2 pp2 ep2 -> pp2 vpp2 dp2 ep2": (THREE, Layout(pp=2, vpp=2, dp=2, ep=2)),
}
Whole = Callable[[Layout], tuple[Outcome, Path]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def hf(folder: Path) -> Path:
    return tiny_hf_mixtral(folder / "hf")


@pytest.fixture(scope="module")
def data(folder: Path) -> list[str]:
    prefix = datasets.write_dataset(folder / "corpus_text_document", vocab_size=96)
    return ["--data-path", prefix, "--split", "969, 30, 1", "--data-cache-path", str(folder / "cache")]


@pytest.fixture(scope="module")
def whole(folder: Path, hf: Path, data: list[str]) -> Whole:
    """Six steps at a layout from Hugging Face weights, saved after the third on the way; made once for a layout."""
    made: dict[Layout, tuple[Outcome, Path]] = {}

    def run(layout: Layout) -> tuple[Outcome, Path]:
        if layout not in made:
            place = folder / f"whole{len(made)}"
            save = ["--save", str(place / "save"), "--save-interval", str(SAVED)]
            argv = [*layout.flags(), *RECIPE, *data, *save, "--hf-checkpoint", str(hf)]
            made[layout] = (ended_well(pretrain(layout.world, argv, place)), place / "save")
        return made[layout]

    return run


def ended_well(outcome: Outcome) -> Outcome:
    assert all(code == 0 for code in outcome.codes), outcome.logs[-1][-3000:]
    return outcome


def samples_of_steps(outcome: Outcome) -> list[list[int]]:
    """The samples of each step, sorted: those that each data-parallel rank read in it."""
    share = BATCH // len(outcome.read)
    steps = len(outcome.read[0]) // share
    return [sorted(index for read in outcome.read.values() for index in read[step * share:(step + 1) * share])
            for step in range(steps)]


def assert_goes_on(first: Outcome, second: Outcome) -> None:
    """`second` is the rest of `first`."""
    steps = range(SAVED + 1, STEPS + 1)
    assert sorted(second.steps) == list(steps)
    assert second.losses(*steps) == pytest.approx(first.losses(*steps), rel=TOLERANCE)
    assert second.norms(*steps) == pytest.approx(first.norms(*steps), rel=TOLERANCE)
    assert [second.steps[i]["learning_rate"] for i in steps] == [first.steps[i]["learning_rate"] for i in steps]
    assert samples_of_steps(second) == samples_of_steps(first)[SAVED:]


def resume(layout: Layout, save: Path, data: list[str], folder: Path) -> Outcome:
    argv = [*layout.flags(), *RECIPE, *data, "--load", str(save), "--ckpt-step", str(SAVED)]
    return ended_well(pretrain(layout.world, argv, folder))


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_resumes_on_another_layout(pair: str, whole: Whole, data: list[str], folder: Path) -> None:
    before, after = PAIRS[pair]
    first, save = whole(before)
    assert_goes_on(first, resume(after, save, data, folder / "second"))


WHOLE = {name: tuple(replace(layout, distributed_optimizer=False, more=()) for layout in PAIRS[name])
         for name in ("tp 1 -> 2", "pp 2 -> 1", "vpp on", "ep 1 -> 2", "ep 2 -> 4", "etp 2 -> 1", "dp 2 -> 1",
                      "tp2 pp2 ep2 -> pp4", "dp3 -> tp2 pp2 ep2")}


@pytest.mark.slow
@pytest.mark.parametrize("pair", WHOLE)
def test_resumes_on_another_layout_without_the_distributed_optimizer(pair: str, whole: Whole, data: list[str],
                                                                     folder: Path) -> None:
    before, after = WHOLE[pair]
    first, save = whole(before)
    assert_goes_on(first, resume(after, save, data, folder / "second"))


def test_fewer_expert_ranks_and_another_kind_of_optimizer(whole: Whole, data: list[str], folder: Path) -> None:
    before, after = (replace(layout, distributed_optimizer=False, more=()) for layout in PAIRS["ep 2 -> 1"])
    first, save = whole(before)
    assert_goes_on(first, resume(after, save, data, folder / "second"))
    other = replace(after, dp=1, distributed_optimizer=True)
    refused = pretrain(1, [*other.flags(), *RECIPE, *data, "--load", str(save)], folder / "refused")
    assert refused.codes == [1] and not refused.steps
    assert "saved without --use-distributed-optimizer, this run is with it" in refused.logs[0]


@pytest.mark.parametrize("name", ["DP2", pytest.param("THREE", marks=pytest.mark.slow)])
def test_rank_directories_of_a_run(name: str, whole: Whole, data: list[str], folder: Path) -> None:
    """Neither the last step nor weights in 16 bits: the engine alone takes another step's optimizer, and fails."""
    layout = replace({"DP2": DP2, "THREE": THREE}[name], ckpt_format="torch")
    first, save = whole(layout)
    assert_goes_on(first, resume(layout, save, data, folder / "second"))


def test_resumes_with_buckets_that_end_in_padding(whole: Whole, data: list[str], folder: Path) -> None:
    """The engine alone saves optimizer state that is wrong here (runtime/engine_fixes/bucket_padding.py)."""
    first, save = whole(DP3)
    assert_goes_on(first, resume(DP2, save, data, folder / "second"))


@pytest.mark.slow
def test_start_from_rank_directories_then_resume(whole: Whole, hf: Path, data: list[str], folder: Path) -> None:
    convert(open_source(hf), open_sink(folder / "ranks", "torch", ParallelLayout(tp=2, pp=2, ep=2, etp=1)))
    save = folder / "from_ranks" / "save"
    argv = [*THREE.flags(), *RECIPE, *data, "--pretrained-checkpoint", str(folder / "ranks"), "--load", str(save),
            "--save", str(save), "--save-interval", str(SAVED)]
    started = ended_well(pretrain(THREE.world, argv, folder / "from_ranks"))
    first, _ = whole(THREE)
    steps = range(1, STEPS + 1)
    assert started.losses(*steps) == first.losses(*steps), "rank directories and --hf-checkpoint are the same start"
    assert started.norms(*steps) == first.norms(*steps)
    assert_goes_on(first, resume(PP2, save, data, folder / "second"))
