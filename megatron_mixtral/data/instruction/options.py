"""What a run on instruction data is told."""

from dataclasses import dataclass

from megatron_mixtral.data.instruction.formats import HANDLERS
from megatron_mixtral.data.options import Options
from megatron_mixtral.errors import ConfigError
from megatron_mixtral.tokenizer import chat

HANDLER_NAMES = ("auto", *HANDLERS)
# The form in which ModelLink's handler writes a sample, plain text as it stands, and Mixtral's for all others.
DEFAULT_PROMPT_TYPES = {"GeneralInstructionHandler": "modellink", "pretrain": "raw"}


@dataclass(frozen=True)
class InstructionOptions(Options):
    """Dialogues to fine-tuning data: `handler` reads a record, `prompt_type` says how it is written (None: the usual
    one of the handler), `seq_length` drops longer samples and is the size of a pack (`pack`), in which each sample
    takes its length rounded up to `pad_to_multiple_of`: training with context parallelism pads it so.
    """

    handler: str = "auto"
    prompt_type: str | None = None
    seq_length: int | None = None
    pack: bool = False
    pad_to_multiple_of: int = 1

    @property
    def template_name(self) -> str:
        return self.prompt_type or DEFAULT_PROMPT_TYPES.get(self.handler, "mixtral")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.handler not in HANDLER_NAMES:
            raise ConfigError(f"--handler-name {self.handler} is not one of: none, {', '.join(HANDLER_NAMES)}.")
        if self.template_name not in chat.TEMPLATES:
            raise ConfigError(f"--prompt-type {self.prompt_type} is not one of: {', '.join(chat.TEMPLATES)}.")
        if self.pack and self.seq_length is None:
            raise ConfigError("--pack needs --seq-length, the length of a row in training.")
        if self.pad_to_multiple_of != 1 and not self.pack:
            raise ConfigError("--pad-to-multiple-of leaves room in packed rows: give --pack too, or drop it.")
        if self.pad_to_multiple_of < 1 or (self.seq_length or 0) % self.pad_to_multiple_of:
            raise ConfigError(f"--seq-length {self.seq_length} is not a multiple of --pad-to-multiple-of "
                              f"{self.pad_to_multiple_of}, which is 2 x --context-parallel-size of the training.")
        if self.seq_length is not None and self.seq_length < 1:
            raise ConfigError(f"--seq-length {self.seq_length} must be at least 1.")
