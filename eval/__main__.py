"""The command of lm-evaluation-harness, with this project's model `rwkv`: see harness.py."""

from lm_eval.__main__ import cli_evaluate

import rwkv_eval.harness  # noqa: F401  (registers the model)

if __name__ == "__main__":
    cli_evaluate()
