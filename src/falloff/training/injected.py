"""LoRA on a transformer: by diffusers, or where that can give it none, as Allegro's, by peft in the same layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor


def add(model: Any, config: Any, name: str) -> None:
    """A new LoRA of a ``LoraConfig``."""
    from peft import inject_adapter_in_model

    if hasattr(model, "add_adapter"):
        model.add_adapter(config, name)
    else:
        inject_adapter_in_model(config, model, name)


def load(model: Any, file: Path, prefix: str, name: str) -> None:
    """The LoRA of a file, of its entries below ``prefix``, by peft. Raises ``KeyError`` where there are none."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    state = {key.removeprefix(prefix): x for key, x in load_file(file).items() if key.startswith(prefix)}
    ranks = {key.partition(".lora_B")[0]: x.shape[1] for key, x in state.items() if ".lora_B." in key}
    if not ranks:
        raise KeyError(f"no layer of it is named {prefix}*.lora_B.weight")
    alphas = {path: float(rank) for path, rank in ranks.items()}
    add(model, LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas), name)
    set_peft_model_state_dict(model, _on(state, model), name)


def delete(model: Any, name: str) -> None:
    """One LoRA of several."""
    from diffusers.utils.peft_utils import delete_adapter_layers

    if hasattr(model, "delete_adapters"):
        model.delete_adapters(name)
    else:
        delete_adapter_layers(model, name)
        model.peft_config.pop(name, None)


def remove(model: Any) -> None:
    """All LoRA, so that the layers are the model's own again."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    if hasattr(model, "unload_lora"):
        model.unload_lora()
    else:
        recurse_remove_peft_layers(model)
        del model.peft_config


def _on(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return {key: x.to(model.device) for key, x in state.items()}
