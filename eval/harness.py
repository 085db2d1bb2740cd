"""The model `rwkv` of lm-evaluation-harness: the numbers of its `hf`, from a fraction of the tokens.

    python -m rwkv_eval --model rwkv --model_args pretrained=MODEL,dtype=float32 --tasks hellaswag --batch_size 32

which is the harness's own command once this module is imported (it has no other way to learn of a model; in a program,
`import rwkv_eval.harness`). Arguments are those of `hf`, and `prefix_token`, `state` and `state_memory` of
:class:`RwkvLM`. Several processes share the requests under `accelerate launch -m rwkv_eval ...`.

An RNN has read a context when it has its state. So the requests become a tree of tokens, each run of which is read
once, and whatever follows goes on from a copy of its state: few-shot preambles, passages, questions and the words that
answers begin with are not read again for each of them. Of a text only its continuation has logits. Padding is never
computed, and a document of any length is one document.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

import modeling_rwkv  # noqa: F401  (makes the Auto classes load this project's RWKV)
from modeling_rwkv import RwkvForCausalLM
from rwkv_eval.prefix_tree import Run, Tokens, build
from rwkv_eval.tree_reader import Answers, TreeReader, answer

PREFIXES = ("nothing", "end-of-text", "newline")
LONGEST_RUN = 2048  # tokens of a text that are read at a time: longer ones in parts, the state carried
CPU_TOKENS = 2048  # of a forward pass: no faster with more on a CPU, and slower where they leave its caches

Request = tuple[tuple[str, str], list[int], list[int]]  # context and continuation, as texts and as ids
Text = tuple[Tokens, int]  # ids, the last n of which are scored


@register_model("rwkv")
class RwkvLM(HFLM):
    """An RWKV in the harness.

    Log-likelihoods are those of `hf`, in float32 to 1e-4 a request, whatever the batch size and the order. Only where
    the harness would cut do they differ: ``loglikelihood_rolling`` reads a document whole, however long. (Contexts are
    cut on the left as by `hf`, to ``max_length`` tokens, the model's context_length unless it is given.)

    Args:
        pretrained: folder, Hub id or model, as for `hf`; so are all that are not named here.
        device: a GPU if there is one, else the CPU.
        batch_size: of a forward pass, which has as many tokens as so many of the longest text. "auto" begins with
            ``max_batch_size``, and goes on with less whenever memory runs out. On a CPU no more than 2048.
        softmax_dtype: of log-likelihoods; by default float32, in float64 models float64.
        prefix_token: what stands before every text: "nothing", as the harness has it (an empty context is then the
            token that the tokenizer begins texts with, or ends them with, since something must be read before anything
            is predicted); "end-of-text", as in BlinkDL's evaluations; or "newline". A text that begins with it gets no
            second one. With a tokenizer that adds a token itself, "nothing" is that token.
        state: file of a state that every text begins with, as state tuning makes them.
        state_memory: bytes for states, of contexts and in a batch. With less, more is read twice.

    Raises:
        ValueError: an argument that cannot be used, by name; a model that is no RWKV.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        device: str | None = None,
        prefix_token: Literal["nothing", "end-of-text", "newline"] = "nothing",
        state: str | None = None,
        state_memory: int = 2**30,
        **kwargs: Any,
    ) -> None:
        if prefix_token not in PREFIXES:
            raise ValueError(f"prefix_token is {prefix_token!r}: choose one of {', '.join(PREFIXES)}")
        if int(state_memory) < 0:
            raise ValueError(f"state_memory is {state_memory}: give a number of bytes, such as {2**30}")
        chosen = prefix_token != "nothing"
        if chosen and (kwargs.get("prefix_token_id") is not None or kwargs.get("add_bos_token")):
            raise ValueError(f"prefix_token is {prefix_token}: leave out prefix_token_id and add_bos_token")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=device, **kwargs)
        if not isinstance(pretrained, str) and several_processes():
            self.accelerator = Accelerator()
        if hasattr(self, "accelerator"):  # HFLM shares the work among GPUs only, and none of a model that it is given
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.state_memory = int(state_memory)
        self.rwkv = self._rwkv()
        if state is not None:
            self.rwkv.set_initial_state(state)
        self.prefix = {"nothing": None, "end-of-text": self.tokenizer.eos_token, "newline": "\n"}[prefix_token]
        if chosen:
            ids = self.tokenizer.encode(self.prefix or "", add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(f"prefix_token is {prefix_token}, which is {len(ids)} tokens here: choose another")
            self.custom_prefix_token_id = ids[0]

    def _rwkv(self) -> RwkvForCausalLM:
        """The model itself, with the layers of an adapter in it."""
        model = self.model
        if hasattr(model, "get_base_model"):  # a PeftModel
            if model.active_peft_config.is_prompt_learning:
                raise ValueError("the adapter learned a prompt, which is no part of the model: use --model hf")
            model = model.get_base_model()
        if not isinstance(model, RwkvForCausalLM):
            raise ValueError(f"{self.pretrained} is a {type(model).__name__} and no RWKV: use --model hf")
        return model

    # -- tokens ------------------------------------------------------------------------------------

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, after the prefix unless without ``add_special_tokens``."""
        tokens = super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
        if self.prefix and add_special_tokens is not False and tokens[:1] != [self.prefix_token_id]:
            tokens = [self.prefix_token_id, *tokens]
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T) of texts, after their prefixes, and their mask."""
        if not self.prefix:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    # -- log-likelihoods ---------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether each of its tokens is the likeliest."""
        texts = [(self._cut(context, continuation), len(continuation)) for _, context, continuation in requests]
        results = {}
        for i, result in self._score(texts, "log-likelihoods", disable_tqdm):
            results[i] = result
            self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
        return [results[i] for i in range(len(requests))]

    def _cut(self, context: list[int], continuation: list[int]) -> Tokens:
        """Both, as many tokens as the harness gives a model, the last of which is only predicted."""
        if not continuation:
            text = self.tok_decode(context[-20:])
            raise ValueError(f"a continuation of {text!r} has no tokens of its own: see the task's target_delimiter")
        if len(continuation) > self.max_length:
            raise ValueError(f"a continuation has {len(continuation)} tokens: give max_length, now {self.max_length}")
        return np.array([*(context or [self.prefix_token_id]), *continuation][-self.max_length - 1 :])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each text after the prefix token, in one pass over all of it, without windows."""
        texts = {}
        for i, request in enumerate(requests):
            if tokens := super().tok_encode(request.args[0]):
                texts[i] = np.array([self.prefix_token_id, *tokens]), len(tokens)
        which, results = list(texts), dict.fromkeys(range(len(requests)), 0.0)
        for n, (result, _) in self._score(list(texts.values()), "rolling log-likelihoods", disable_tqdm):
            results[which[n]] = result
            self.cache_hook.add_partial("loglikelihood_rolling", requests[which[n]].args, result)
        return list(results.values())

    def _score(self, texts: Sequence[Text], desc: str, disable_tqdm: bool) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The number of each text and its log-likelihood, and whether all is the likeliest, as soon as it is known."""
        left = np.array([n for _, n in texts])
        total, greedy = np.zeros(len(texts)), np.ones(len(texts), np.bool_)
        for answers in self._answers(texts, desc, disable_tqdm):
            np.add.at(total, answers.who, answers.logprob)
            np.logical_and.at(greedy, answers.who, answers.greedy)
            np.subtract.at(left, answers.who, 1)
            for i in np.unique(answers.who[left[answers.who] == 0]):
                yield int(i), (float(total[i]), bool(greedy[i]))

    def _answers(self, texts: Sequence[Text], desc: str, disable_tqdm: bool) -> Iterator[Answers]:
        """Of each text every token that is asked about, as they are read; ``who`` is the number of the text."""
        if not texts:
            return
        root, longest = _tree(texts)
        rows = self.max_batch_size if self.batch_size == "auto" else self.batch_size
        capacity = rows * min(longest, LONGEST_RUN)
        if self.device.type == "cpu":
            capacity = min(capacity, CPU_TOKENS)
        reader = TreeReader(self.rwkv, root, capacity, self.state_memory, shrinks=self.batch_size == "auto")
        dtype = self.softmax_dtype or torch.promote_types(self.rwkv.dtype, torch.float32)
        quiet = disable_tqdm or self.rank != 0
        bar = tqdm(total=reader.left, desc=desc, unit="token", unit_scale=True, smoothing=0, disable=quiet)
        with bar, self._autocast():
            for runs, hidden in reader:
                yield answer(runs, hidden, self.rwkv.get_output_embeddings(), dtype)
                read = sum(map(len, runs))
                bar.total = bar.n + read + reader.left  # more, if a run was dissolved
                bar.update(read)

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    # -- generation --------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As `hf` does, equal requests once. "auto" begins as it does for log-likelihoods."""
        drawn = [bool(request.args[1].get("do_sample")) for request in requests]
        keys = [i if drawn[i] else json.dumps(request.args) for i, request in enumerate(requests)]
        once = dict(zip(keys, requests, strict=True))
        generate = partial(super().generate_until, list(once.values()), disable_tqdm)

        @find_executable_batch_size(starting_batch_size=self.max_batch_size)
        def attempt(batch_size: int) -> list[str]:
            self.batch_size_per_gpu = batch_size
            return generate()  # the longest first

        if self.batch_size != "auto":
            texts = generate()
        else:
            try:
                texts = attempt()
            finally:
                self.batch_size_per_gpu = "auto"  # type: ignore[assignment]
        written = dict(zip(once, texts, strict=True))
        return [written[key] for key in keys]


def several_processes() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _tree(texts: Sequence[Text]) -> tuple[Run, int]:
    """The tree of texts, each asked about its last n tokens, and the length of the longest."""
    unread = {tokens[:-1].tobytes(): tokens[:-1] for tokens, _ in texts}
    root, ends = build(list(unread.values()), LONGEST_RUN)
    end_of = dict(zip(unread, ends, strict=True))
    for who, (tokens, n) in enumerate(texts):
        end_of[tokens[:-1].tobytes()].ask(who, tokens[-n:])
    return root, max(map(len, unread.values()))
