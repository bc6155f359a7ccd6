"""The command `serve`."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from megatron_mixtral.command_line import Parser
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference import cli as inference
from megatron_mixtral.runtime import launch
from megatron_mixtral.server.settings import Settings, allowed


def serve(argv: Sequence[str]) -> int:
    """Serve a model until SIGTERM or Ctrl-C. Returns 0, or 1 on a rank that leaves it to another to say what is wrong.

    Raises `ConfigError` for a port that is in use, before the model is read.
    """
    args = _parser().parse_args(argv)
    if args.served_adapter_name is not None and not args.adapter:
        raise ConfigError("--served-adapter-name is of the model with adapters: give them (--adapter), or leave it out")
    settings = Settings(model=_name(args.served_model_name, args.load),
                        adapter=args.adapter and _name(args.served_adapter_name, args.adapter), host=args.host,
                        port=args.port, api_key=_key(args.api_key), max_queue=args.max_queue,
                        max_body=args.max_body, request_timeout=args.request_timeout)
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {' and '.join(missing)}: pip install 'megatron-mixtral[serve]'")
    from megatron_mixtral.server import process

    # Where this program starts its ranks, it becomes torchrun: the socket closes, and rank 0 opens it again.
    listener = process.open_socket(settings.host, settings.port) if launch.is_first_here() else None

    def work() -> None:
        generator = inference.open_generator(args, "serve", argv)
        process.serve(generator, inference.prompts_of(generator, args.prompt_template), settings, listener)

    return launch.as_rank(work)


def _name(given: str | None, folder: Path) -> str:
    """The name that was given, else the folder's, with - in the place of what no name may have."""
    return "".join(one if allowed(one) else "-" for one in folder.resolve().name) or "model" if given is None else given


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Serve a Mixtral: OpenAI's API (/v1) and a chat page (/), from any checkpoint in any layout.",
        allow_abbrev=False)
    inference.model_flags(parser)
    group, default = parser.add_argument_group("server"), Settings(model="model")
    group.add_argument("--host", default=default.host,
                       help=f"address to listen on ({default.host}: this machine alone; 0.0.0.0: any, with --api-key)")
    group.add_argument("--port", type=int, default=default.port, help=f"({default.port}; 0: any that is free)")
    group.add_argument("--api-key", metavar="KEY",
                       help="what clients have to send; @FILE reads it from a file, so that the list of processes does "
                            "not show it (default: none)")
    group.add_argument("--served-model-name", metavar="NAME", help="the model's name (default: that of --load)")
    group.add_argument("--served-adapter-name", metavar="NAME",
                       help="the name by which the model is asked for with its adapters (default: that of --adapter)")
    inference.template_flag(group, "of chats, one of training's (mixtral, chatml, ...); default: the model's own "
                                   "chat_template.jinja, else mixtral")
    group.add_argument("--max-queue", type=int, default=default.max_queue, metavar="N",
                       help=f"continuations that may wait for a slot ({default.max_queue})")
    group.add_argument("--max-body", type=int, default=default.max_body, metavar="BYTES",
                       help=f"longest body of a request ({default.max_body})")
    group.add_argument("--request-timeout", type=float, default=default.request_timeout, metavar="SECONDS",
                       help=f"for one answer ({default.request_timeout:g})")
    return parser


def _key(given: str | None) -> str | None:
    """The key itself. `ConfigError` for a file that cannot be read, and for an empty key, which would be none."""
    if given is None:
        return None
    key = given
    if given.startswith("@"):
        try:
            key = Path(given[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key {given} cannot be read: {error}") from error
    if not key:
        raise ConfigError("--api-key is empty: give a key, or leave the flag out")
    return key
