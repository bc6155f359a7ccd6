"""The commands on what runs wrote: each takes its arguments, returns an exit status and raises `MixtralError`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mixtral.command_line import Parser


def plot(argv: Sequence[str]) -> int:
    """Draw the pictures of runs and print where they are."""
    parser = Parser(description="Draw loss.png, throughput.png and expert_load.png of runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run, or its metrics file")
    parser.add_argument("--output-dir", type=Path, help="default: beside the first run's metrics")
    args = parser.parse_args(argv)
    first = args.runs[0]
    from megatron_mixtral.training.metrics import plots

    for path in plots.draw(args.runs, args.output_dir or (first if first.is_dir() else first.parent)):
        print(path)
    return 0


def watch(argv: Sequence[str]) -> int:
    """Show runs while they go on, in the terminal or on a page."""
    parser = Parser(
        description="Show runs while they go on: loss, throughput, memory, load of the experts, and what is wrong.",
        epilog="example: megatron-mixtral watch ./ckpt/run1 ./ckpt/run2 --page, then open http://127.0.0.1:8100; from "
               "another machine, ssh -L 8100:127.0.0.1:8100 HOST first")  # fmt: skip
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="folder of a run, or its metrics file")
    parser.add_argument("--page", action="store_true", help="serve a page instead of drawing in the terminal")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8100, help="port of the page (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print once and end; so also where there is no terminal")
    args = parser.parse_args(argv)
    from megatron_mixtral.training import metrics, watch

    names = metrics.throughput.names_of(args.runs)
    runs = [watch.WatchedRun(path, name) for path, name in zip(args.runs, names, strict=True)]
    if not args.page:
        watch.show(runs, None if args.once or not sys.stdout.isatty() else 2.0, sys.stdout.write)
        return 0
    with watch.serve(runs, args.host, args.port) as server:
        print(f"http://{args.host}:{server.server_address[1]}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


def calc(argv: Sequence[str]) -> int:
    """Print the average throughput of a run's steps."""
    from megatron_mixtral.training.metrics import throughput

    parser = Parser(description="Average the tokens per second and device of a run's steps.")
    parser.add_argument("log", type=Path, help="metrics.jsonl, the training program's output, or a log of XTuner")
    parser.add_argument("start", type=int, nargs="?", help=f"first step (default: after the first {throughput.EDGE})")
    parser.add_argument("end", type=int, nargs="?", help=f"last step (default: before the last {throughput.EDGE})")
    parser.add_argument("--target-loss", type=float, metavar="X", help="also say the first step at or below it")
    args = parser.parse_args(argv)
    steps = throughput.read(args.log)
    print(throughput.average(steps, args.start, args.end))
    if args.target_loss is not None:
        print(throughput.reached(steps, args.target_loss))
    return 0
