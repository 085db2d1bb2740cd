"""Bits per byte and perplexity of texts under an RWKV, as a measurement of Hugging Face's `evaluate`.

measurement = evaluate.load("eval/rwkv_perplexity")
measurement.compute(predictions=["Once upon a time ..."], model_id="RWKV/rwkv-4-169m-pile")
"""

from typing import Any

import datasets
import evaluate

from modeling_rwkv import generation
from rwkv_eval.perplexity import measure

INPUTS = """
Args:
    predictions (list of str): texts; each is read from its first token to its last, the state carried all along.
    model_id (str): folder or Hub id of an RWKV-4; by default the model in the box.
    window (int): read so many tokens at a time instead, as models with a window do.
    device (str), dtype (str): by default a GPU if there is one, and float32 on a CPU.

Returns:
    bits_per_byte and perplexity of all texts together, nats, tokens, bytes, and by_position: the mean loss in nats per
    token from half of a position on up to it.
"""


class RwkvPerplexity(evaluate.Measurement):
    """See rwkv_eval/perplexity.py, which measures."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description="Bits per byte and perplexity, the state carried through the whole of each text.",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model_id: str | None = None,
        window: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> dict[str, Any]:
        place = generation.find_device(device)
        model, tokenizer = generation.load(model_id, place, generation.find_dtype(dtype, place))
        return measure(model, tokenizer, predictions, window).to_dict()
