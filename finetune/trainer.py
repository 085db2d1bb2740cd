"""`transformers.Trainer` with what training an RWKV needs, and nothing else changed.

- the paper's optimizer groups and its penalty on large logits (optimizer.py);
- losses without logits, which would be most of the memory (`skip_logits`);
- evaluation that counts nats, tokens and bytes instead of averaging averages;
- speed and memory beside every loss, and an end at the first loss that is no number;
- checkpoints that are either complete or ignored, whenever the program is killed.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput

from rwkv_finetune.optimizer import largest_logit_penalty, parameter_groups
from rwkv_finetune.packing import IGNORED
from rwkv_finetune.run_folder import complete_checkpoints, mark_complete, remove_checkpoint
from rwkv_finetune.speed import Speedometer, operations_per_token, peak_flops, peak_memory


class RwkvTrainer(Trainer):
    """Trainer for rows of `input_ids` and `labels`, (B, T), with the `position_ids` or mask that keep them apart.

    Args:
        logit_penalty: weight of `largest_logit_penalty`; 0 switches it off. The penalty adds
            gradients, but not to the loss that is shown, so curves stay comparable.
        reading: arguments of the model's `forward` that decide how it reads rows for a loss, where nothing needs
            logits; default: `{"skip_logits": True}`.
        validation_bytes: UTF-8 bytes of the validation texts, for bits per byte.

    Metrics of an evaluation, all over the same validation rows:
        eval_loss: nats per predicted token (text or answer, and closing `<|endoftext|>`).
        eval_perplexity: exp(eval_loss).
        eval_bits_per_byte: nats of the text tokens alone / ln 2 / `validation_bytes`, if there are any. Exact if
            every row's document started with `<|endoftext|>`, so that no text token is unscored.

    Logged with every training loss, for the steps since the last one:
        tokens_per_second: of all processes, padding not counted, evaluation and saving left out.
        mfu: see speed.py; where the device's peak is known.
        peak_memory: GiB since the beginning, of this process.

    Raises:
        FloatingPointError: a loss that is no number: in which step, in which batch of it; a validation loss or, before
            a checkpoint counts, a weight that is none.
    """

    def __init__(
        self,
        *args: Any,
        processing_class: PreTrainedTokenizerBase,
        logit_penalty: float = 0.0,
        reading: dict[str, Any] | None = None,
        validation_bytes: int = 0,
        **kwargs: Any,
    ):
        super().__init__(
            *args,
            processing_class=processing_class,
            compute_metrics=self._metrics,
            **kwargs,
        )
        self.end_of_text = processing_class.eos_token_id
        self.logit_penalty = logit_penalty
        self.reading = {"skip_logits": True} if reading is None else reading
        self.validation_bytes = validation_bytes
        self._started = time.monotonic()
        self._earlier_seconds: float | None = None
        self._speedometer = Speedometer()
        self._operations = operations_per_token(self.model)
        self._first_step: int | None = None

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
        needs_logits = self.logit_penalty or self.label_smoother
        inputs = {**inputs, "use_cache": False, **({} if needs_logits else self.reading)}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.logit_penalty and model.training:
            penalty = largest_logit_penalty(outputs["logits"], self.logit_penalty)
            penalty = penalty / self.current_gradient_accumulation_steps
            loss = loss + (penalty - penalty.detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count the batches before the first loss that is no number, on the device: nothing waits for it."""
        self._speedometer.start()
        loss = super().training_step(*args, **kwargs)
        if self._first_step is None:
            self._first_step = self.state.global_step
            self._speedometer.tokens = self._initial_num_input_tokens_seen
            self._sound = torch.ones_like(loss, dtype=torch.bool)
            self._sound_batches = torch.zeros_like(loss, dtype=torch.long)
        self._sound = self._sound & loss.isfinite()
        self._sound_batches = self._sound_batches + self._sound
        return loss

    def _stop_on_nan(self) -> None:
        if self._first_step is None or self._sound:
            return
        steps, batch = divmod(int(self._sound_batches), self.args.gradient_accumulation_steps)
        raise FloatingPointError(
            f"the loss of step {self._first_step + steps + 1}, batch {batch + 1} of it, is not a number; "
            "lower the learning rate, look at the data of that batch, and start again in another output_dir"
        )

    def stop_on_broken_weights(self) -> None:
        """All processes call it, each looks at its part of the weights, and all stop together."""
        trained = (x for x in self.model.parameters() if x.requires_grad)
        parts = (x.to_local() if isinstance(x, DTensor) else getattr(x, "ds_tensor", x) for x in trained)
        sound = torch.stack([part.detach().isfinite().all() for part in parts]).all()
        if not self.accelerator.gather(sound.int()[None]).all():
            raise FloatingPointError(
                f"a weight is infinite or not a number after step {self.state.global_step}; lower the learning rate, "
                "and start again in another output_dir"
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The mean loss, and for each row (B, 3) fp32: nats and number of all tokens, nats of text tokens.

        Nats of text tokens need logits, and are 0 without `validation_bytes`.
        """
        inputs = self._prepare_inputs({**inputs, "use_cache": False})
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.validation_bytes:
                logits = model(**{name: x for name, x in inputs.items() if name != "labels"}).logits
                nats, text_nats = self._nats(logits, labels)
            else:
                rows = [
                    {k: x[i : i + 1] if torch.is_tensor(x) else x for k, x in inputs.items()}
                    for i in range(len(labels))
                ]
                losses = [model(**row, **self.reading, num_items_in_batch=1).loss for row in rows]
                nats, text_nats = torch.stack(losses).float(), labels.new_zeros(len(labels))
        tokens = (labels[:, 1:] != IGNORED).sum(1)
        return nats.sum() / tokens.sum(), torch.stack([nats, tokens, text_nats], dim=1), tokens

    def _nats(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, V), (B, T) -> (B,), (B,) fp32: nats of each row, and of its text alone."""
        nats, text_nats = [], []
        for row, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
            losses = F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none")
            nats.append(losses.sum())
            text_nats.append((losses * (target != self.end_of_text)).sum())
        return torch.stack(nats), torch.stack(text_nats)

    def _metrics(self, evaluation: EvalPrediction) -> dict[str, float]:
        nats, tokens, text_nats = evaluation.predictions.astype("float64").sum(axis=0).tolist()
        if not math.isfinite(nats):
            raise FloatingPointError(
                f"the validation loss after step {self.state.global_step} is not a finite number; lower the learning "
                "rate, look at the validation data, and start again in another output_dir"
            )
        perplexity = math.exp(nats / tokens) if nats / tokens < 700 else math.inf
        metrics = {"nats_per_token": nats / tokens, "perplexity": perplexity}
        if self.validation_bytes:
            metrics["bits_per_byte"] = text_nats / math.log(2) / self.validation_bytes
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's mean over rows gives a short row the weight of a full one: replace it."""
        self._stop_on_nan()
        self._speedometer.stop()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = output.metrics.pop(f"{prefix}_nats_per_token")
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add speed, memory, and the seconds since the run began, earlier sessions included; stop on NaN."""
        if self._earlier_seconds is None:
            seconds = [entry.get("wall_seconds", 0.0) for entry in self.state.log_history]
            self._earlier_seconds = max(seconds, default=0.0)
        logs["wall_seconds"] = self._earlier_seconds + time.monotonic() - self._started
        if "loss" in logs:
            logs |= self._speed()
        super().log(logs, start_time)
        self._stop_on_nan()

    def _speed(self) -> dict[str, float]:
        measured = {"peak_memory": peak_memory(self.args.device) / 2**30}
        if speed := self._speedometer.read(self.state.num_input_tokens_seen):
            measured["tokens_per_second"] = speed
            if peak := peak_flops(self.args.device):
                measured["mfu"] = speed * self._operations / peak / self.args.world_size
        return measured

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write everything, then the mark that it is complete; only then remove older ones."""
        self._stop_on_nan()
        self.stop_on_broken_weights()
        self._speedometer.stop()
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
