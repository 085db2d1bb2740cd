"""A training program as `accelerate launch` starts it, with what a test of it needs on a machine without GPUs.

    ACCELERATE_TORCH_DEVICE=cpu \\
        accelerate launch ... tests/launched.py [--as-if-gpus] [--die-at STEP] MODULE OPTIONS ...

--as-if-gpus: accelerate (1.15) leaves FSDP out where processes compute on CPUs, and trains with DDP without a word.
Told that these CPUs are GPUs, it does on them, over gloo, all that it does on GPUs.
--die-at: the second process kills itself as soon as it has logged this step.
"""

import argparse
import os
import runpy
import signal
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from modeling_rwkv import loss
from rwkv_finetune.trainer import RwkvTrainer

loss.FEWEST_POSITIONS = 1  # so that even a tiny batch has several chunks


def as_if_gpus() -> None:
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def die_at(step: int) -> None:
    log = RwkvTrainer.log

    def log_or_die(self, *args, **kwargs):
        log(self, *args, **kwargs)
        if self.state.global_step == step and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    RwkvTrainer.log = log_or_die


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--as-if-gpus", action="store_true")
    parser.add_argument("--die-at", type=int)
    parser.add_argument("module")
    args, options = parser.parse_known_args()
    if args.as_if_gpus:
        as_if_gpus()
    if args.die_at:
        die_at(args.die_at)
    sys.argv = [args.module, *options]
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)
