"""`transformers.Trainer` with what training an RWKV needs, and nothing else changed.

- the paper's optimizer groups and its penalty on large logits (optimizer.py);
- evaluation that counts nats, tokens and bytes instead of averaging averages;
- checkpoints that are either complete or ignored, whenever the program is killed.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput

from rwkv_finetune.optimizer import largest_logit_penalty, parameter_groups
from rwkv_finetune.packing import IGNORED
from rwkv_finetune.run_folder import complete_checkpoints, mark_complete, remove_checkpoint


class RwkvTrainer(Trainer):
    """Trainer for packed rows: `input_ids`, `position_ids` and `labels`, each (B, T).

    Args:
        logit_penalty: weight of `largest_logit_penalty`; 0 switches it off. The penalty adds
            gradients, but not to the loss that is shown, so curves stay comparable.
        validation_bytes: UTF-8 bytes of the validation texts, for bits per byte.

    Metrics of an evaluation, all over the same validation rows:
        eval_loss: nats per predicted token (text and closing `<|endoftext|>`).
        eval_perplexity: exp(eval_loss).
        eval_bits_per_byte: nats of the text tokens alone / ln 2 / `validation_bytes`. Exact if
            every row's document started with `<|endoftext|>`, so that no text token is unscored.
    """

    def __init__(
        self,
        *args: Any,
        processing_class: PreTrainedTokenizerBase,
        logit_penalty: float = 0.0,
        validation_bytes: int = 0,
        **kwargs: Any,
    ):
        super().__init__(
            *args,
            processing_class=processing_class,
            compute_metrics=self._metrics,
            preprocess_logits_for_metrics=self._row_nats,
            **kwargs,
        )
        self.end_of_text = processing_class.eos_token_id
        self.logit_penalty = logit_penalty
        self.validation_bytes = validation_bytes
        self._started = time.monotonic()
        self._earlier_seconds: float | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:  # type: ignore[has-type]  # the Trainer does the same
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.learning_rate, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = {**inputs, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.logit_penalty and model.training:
            penalty = largest_logit_penalty(outputs["logits"], self.logit_penalty)
            penalty = penalty / self.current_gradient_accumulation_steps
            loss = loss + (penalty - penalty.detach())
        return (loss, outputs) if return_outputs else loss

    def _row_nats(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, T, V), (B, T) -> (B, 3) fp32: nats and number of all tokens, nats of text tokens."""
        rows = []
        for row, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
            nats = F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none")
            text = (target != IGNORED) & (target != self.end_of_text)
            rows.append(torch.stack([nats.sum(), (target != IGNORED).sum(), (nats * text).sum()]))
        return torch.stack(rows)

    def _metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        nats, tokens, text_nats = evaluation.predictions.astype("float64").sum(axis=0).tolist()
        metrics = {"nats_per_token": nats / tokens, "perplexity": math.exp(nats / tokens)}
        if self.validation_bytes:
            metrics["bits_per_byte"] = text_nats / math.log(2) / self.validation_bytes
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's mean over rows gives a short row the weight of a full one: replace it."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = output.metrics.pop(f"{prefix}_nats_per_token")
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds since the run began, earlier sessions included; stop on NaN."""
        if self._earlier_seconds is None:
            seconds = [entry.get("wall_seconds", 0.0) for entry in self.state.log_history]
            self._earlier_seconds = max(seconds, default=0.0)
        logs["wall_seconds"] = self._earlier_seconds + time.monotonic() - self._started
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"the training loss is {logs['loss']} at step {self.state.global_step}; "
                "lower the learning rate and start again in another output_dir"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write everything, then the mark that it is complete; only then remove older ones."""
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            best = self.state.best_model_checkpoint
            for old in complete_checkpoints(run_dir)[: -limit if limit else 0]:
                if best is None or old != Path(best):
                    remove_checkpoint(old)


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make every weight representable in `dtype`, so that saving in `dtype` changes nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
