"""RWKV-4 as the package modeling-rwkv has it, for programs that load this folder with trust_remote_code=True."""

try:
    from modeling_rwkv import RwkvConfig, RwkvForCausalLM, RwkvModel, RwkvTokenizer
except ModuleNotFoundError as error:
    if error.name != "modeling_rwkv":
        raise
    raise ImportError("this model is run by a package that is not installed: pip install modeling-rwkv") from error

__all__ = ["RwkvConfig", "RwkvForCausalLM", "RwkvModel", "RwkvTokenizer"]
