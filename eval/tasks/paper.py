"""A task of the harness that also says which of its numbers the paper averages."""

from collections.abc import Mapping
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask


class PaperTask(ConfigurableTask):
    """The task that `config` describes, with its metric `counted` once more as `paper_acc`.

    A group of the harness averages one metric by name, and the paper's average mixes three: accuracy, accuracy by
    likelihood per character, and exact match.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.counted = config["counted"]
        super().__init__(config={key: value for key, value in config.items() if key not in ("class", "counted")})
        self._aggregation_list["paper_acc"] = mean
        self._higher_is_better["paper_acc"] = True

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        metrics = super().process_results(doc, results)
        return metrics | {"paper_acc": metrics[self.counted]}
