"""What every training program does around its model and its data: options, folder, checkpoints, result.

arguments -> model and data -> claim the folder -> train from the newest checkpoint -> evaluate -> save
"""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME

from rwkv_finetune.arguments import Refusal
from rwkv_finetune.run_folder import COMPLETE, complete_checkpoints, sha256
from rwkv_finetune.trainer import RwkvTrainer

# Beginnings of the names of TrainingArguments with which a run may be continued otherwise than it was begun: logs,
# places, devices, workers and memory.
HARMLESS = (
    *("log_", "logging_", "report_to", "run_name", "project", "trackio_", "hub_", "push_to_hub", "disable_tqdm"),
    *("output_dir", "resume_from_checkpoint", "save_total_limit", "save_on_each_node", "debug", "do_", "skip_memory"),
    *("use_cpu", "local_rank", "ddp_", "fsdp", "deepspeed", "parallelism_config", "full_determinism"),
    *("dataloader_num", "dataloader_p", "dataloader_multi", "activation_checkpointing", "gradient_checkpointing"),
    *("torch_", "eval_accumulation_steps", "per_device_", "gradient_accumulation_steps"),  # see rows_per_step
)
FILES = ("train_file", "validation_file")
LOCAL = {*FILES, "model", "state", "tokenizer"}  # which may be paths
PATHS = {*FILES, "output_dir", "logging_dir", "resume_from_checkpoint"}
LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "max_grad_norm", "logit_penalty", "seed", "save_total_limit"), 0
    ),
}


@dataclass
class RunArguments(TrainingArguments):
    """TrainingArguments with the optimizer of the paper, and with what these programs rely on."""

    output_dir: str = field(metadata={"help": "folder to create, or to continue in"})
    adam_beta2: float = field(default=0.99, metadata={"help": "beta2 of Adam"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "cosine, linear, ..."})
    report_to: str = field(default="tensorboard", metadata={"help": "where curves go"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep, besides the best"})
    include_num_input_tokens_seen: str = field(default="non_padding", metadata={"help": "which tokens count as seen"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide a NaN loss"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay false: rows leak without position_ids"}
    )
    logit_penalty: float = field(
        default=0.0, metadata={"help": "weight of the penalty on each position's largest logit"}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it, bf16 is refused on a CPU
        super().__post_init__()


def prepare(args: RunArguments, smallest: Mapping[str, tuple[float, float]]) -> None:
    """Refuse what cannot work, such as an option below its least value, given as name: (value, least)."""
    args.dataloader_pin_memory &= torch.accelerator.is_available()
    for name, (value, least) in {**smallest, **{name: (getattr(args, name), LEAST[name]) for name in LEAST}}.items():
        if value is not None and not least <= value < math.inf:
            raise Refusal(f"{name} is {value}; it must be a number, and at least {least}")
    if args.seed >= 2**32:
        raise Refusal(f"seed is {args.seed}; it must be less than 2^32, as numpy has it")
    if args.max_steps != -1 and args.max_steps < 1:
        raise Refusal(f"max_steps is {args.max_steps}; it must be at least 1, or -1 for num_train_epochs to count")
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        raise Refusal(f"num_train_epochs is {args.num_train_epochs}; it must be more than 0")
    if args.fp16 and args.device.type == "cpu":
        raise Refusal("fp16 needs a GPU; on a CPU use bf16, or neither")
    if args.remove_unused_columns:
        raise Refusal("remove_unused_columns must be false: rows need their position_ids")
    if args.resume_from_checkpoint and not (Path(args.resume_from_checkpoint) / COMPLETE).exists():
        raise Refusal(
            f"resume_from_checkpoint: {args.resume_from_checkpoint} is no complete checkpoint; name a folder "
            f"checkpoint-* that holds a file {COMPLETE}"
        )
    _try_libraries(args)


def _try_libraries(args: RunArguments) -> None:
    """Refuse loggers and optimizers that are not there, or do not take their options."""
    try:
        for logger in get_reporting_integration_callbacks(args.report_to):
            logger()
    except (ValueError, RuntimeError, ImportError) as error:
        raise Refusal(f"report_to: {error}") from error
    try:
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer([nn.Parameter(torch.zeros(1))], **settings)
    except (ValueError, ImportError) as error:
        raise Refusal(f"optim {args.optim.value}: {error}") from error


def recipe(args: RunArguments, *groups: Any) -> dict[str, Any]:
    """Everything that decides the result, of these dataclasses: files by content, folders by their full names."""
    options = {key: value for group in groups for key, value in asdict(group).items()}
    for key in LOCAL & options.keys():
        path = Path(options[key] or "")
        if options[key] and path.exists():
            options[key] = f"sha256 {sha256(path)}" if path.is_file() else str(path.resolve())
    return {
        **options,
        **{key: value for key, value in args.to_dict().items() if not key.startswith(HARMLESS)},
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }


def load_tokenizer(name: str | Path, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer that can end a document and pad a row, with its end of text if need be.

    Raises:
        Refusal: there is none, it cannot end a text, or it has more tokens than `vocab_size`, that of a model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise Refusal(f"no tokenizer can be loaded from {name}; name a folder with tokenizer.json") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what AutoTokenizer makes of a config alone
        raise Refusal(f"there is no tokenizer in {name}; put its tokenizer.json there")
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise Refusal(
            f"the tokenizer in {name} has {len(tokenizer):,} tokens, the model {vocab_size:,}; give it its own"
        )
    if tokenizer.eos_token_id is None:
        raise Refusal(f"the tokenizer in {name} has no end-of-text token; give it one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_disk(model: nn.Module, args: RunArguments) -> None:
    """Refuse to train what cannot be saved: the checkpoints that are kept, the next one, and the result.

    A checkpoint has what is trained three times in float32, for the weights and the two averages of Adam.
    """
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    kept = (args.save_total_limit or 1) + 1 + bool(args.load_best_model_at_end)
    checkpoints = 0 if args.save_strategy == "no" else kept
    needed = 4 * trained * (3 * checkpoints + 1)
    free = shutil.disk_usage(args.output_dir).free
    if free < needed:
        raise Refusal(
            f"output_dir {args.output_dir} has {free / 1e9:.1f} GB free, but {checkpoints} checkpoints and the result "
            f"need about {needed / 1e9:.1f} GB; choose another disk, or a smaller save_total_limit"
        )


def train_to_the_end(trainer: RwkvTrainer, say: Callable[[str], None]) -> None:
    """Train to the end, from the checkpoint that was asked for, else from the newest complete one."""
    args = trainer.args
    checkpoints = [str(path) for path in complete_checkpoints(Path(args.output_dir))]
    start = args.resume_from_checkpoint or next(reversed(checkpoints), None)
    if not start:
        check_disk(trainer.model, args)
        trainer.train()
        return
    say(f"continuing from {start}")
    args.eval_on_start = False
    state = TrainerState.load_from_json(str(Path(start) / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=start)
        return
    trainer.state = state  # the Trainer would take one more step
    trainer.callback_handler.on_train_begin(args, state, trainer.control)  # where loggers learn of output_dir
    trainer._load_from_checkpoint(start)
    if args.load_best_model_at_end and state.best_model_checkpoint:
        trainer._load_best_model()


def printer(args: RunArguments) -> Callable[[str], None]:
    """`print`, in one of the processes."""
    return print if args.should_save else lambda text: None
