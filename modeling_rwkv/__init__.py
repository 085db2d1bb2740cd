"""RWKV for the Hugging Face ecosystem. Importing this package makes the Auto classes of transformers use it."""

from pathlib import Path

import modeling_rwkv.remarks  # noqa: F401 - before transformers

# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPTNeoXTokenizer

from modeling_rwkv.cache import RwkvCache
from modeling_rwkv.configuration_rwkv import RwkvConfig
from modeling_rwkv.modeling_rwkv import RwkvForCausalLM, RwkvModel
from modeling_rwkv.sharing import share
from modeling_rwkv.static_cache import RwkvStaticCache
from modeling_rwkv.tokenization_rwkv import RwkvTokenizer

__all__ = [
    "RwkvCache",
    "RwkvConfig",
    "RwkvForCausalLM",
    "RwkvModel",
    "RwkvStaticCache",
    "RwkvTokenizer",
    "demo_model_path",
    "share",
]


def demo_model_path() -> Path:
    """The folder of the small RWKV-4 that comes with this package: load it like any checkpoint."""
    return Path(__file__).parent / "demo"


AutoConfig.register(RwkvConfig.model_type, RwkvConfig, exist_ok=True)
AutoModel.register(RwkvConfig, RwkvModel, exist_ok=True)
AutoModelForCausalLM.register(RwkvConfig, RwkvForCausalLM, exist_ok=True)
# RwkvTokenizer by its name; a folder that names none is a Pile model's, as transformers has it.
AutoTokenizer.register(RwkvConfig, GPTNeoXTokenizer, fast_tokenizer_class=RwkvTokenizer, exist_ok=True)
