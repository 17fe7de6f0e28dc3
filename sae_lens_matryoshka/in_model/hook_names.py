"""The names of one activation: a Hugging Face module's, TransformerLens's, and its bridge's own.

SAEs trained on ``AutoModelForCausalLM`` record the module whose output they read, as ``model.layers.2``.
TransformerLens calls that ``blocks.2.hook_resid_post``, an alias of ``blocks.2.hook_out`` on a ``TransformerBridge``.
"""

import re
from typing import TYPE_CHECKING, Union

from sae_lens import HookedSAETransformer
from sae_lens.analysis.hooked_sae_transformer import get_deep_attr

from sae_lens_matryoshka.errors import UserError

if TYPE_CHECKING:  # TransformerLens 2 has no bridge
    from sae_lens import SAETransformerBridge

ModelWithSAEs = Union[HookedSAETransformer, "SAETransformerBridge"]

_BLOCK = re.compile(r"(?!.*(?:encoder|vision|visual|audio))(?:\w+\.)*(?:layers|h|blocks)\.([0-9]{1,6})")
_RESIDUAL_STREAM = {"hook_in": "hook_resid_pre", "hook_out": "hook_resid_post"}


def block_output(name: str) -> str | None:
    """TransformerLens's name of what a block of a language model gives, or None if ``name`` is not that of a block.

    Blocks are Hugging Face modules such as ``model.layers.2``, ``transformer.h.2`` or ``gpt_neox.layers.2``.
    """
    block = _BLOCK.fullmatch(name)
    return f"blocks.{block[1]}.hook_resid_post" if block else None


def transformer_lens_name(name: str) -> str:
    """A name for ``name`` that TransformerLens's models share, told without a model.

    Args:
        name: The output of a block, as a Hugging Face module, or any name of a hook in TransformerLens.

    Raises:
        UserError: If the name depends on the model, as that of a module inside a block does.
    """
    if name.split(".")[-1].startswith("hook_"):
        return name
    shared = block_output(name)
    if shared is None:
        raise UserError(
            f"hook_name={name!r} is neither the output of a block nor a hook of TransformerLens, so only the model "
            "tells its hook; pass a SAETransformerBridge too, for_transformer_lens(sae, model)."
        )
    return shared


def hook_name_in(model: ModelWithSAEs, name: str) -> str:
    """The name by which the hooks of a model list an activation; caches and hooks go by it.

    Args:
        model: The model, with SAEs attached or without.
        name: A Hugging Face module or any of TransformerLens's names for the activation.

    Raises:
        UserError: If the model has no hook for it, or takes no SAEs.
    """
    if isinstance(model, HookedSAETransformer):
        found = _in_hooked_transformer(hooks_of(model), name)
    elif hasattr(model, "get_sae_hook_name"):
        found = _in_bridge(model, name)
    else:
        raise UserError(
            f"A {type(model).__name__} takes no SAEs; load the model with SAELens's "
            "SAETransformerBridge.boot_transformers or HookedSAETransformer.from_pretrained_no_processing."
        )
    if found is None:
        remedy = "name one of model.hook_dict in sae.cfg.metadata.hook_name"
        if isinstance(model, HookedSAETransformer):
            remedy += ", or load it as a SAETransformerBridge, which has hooks at Hugging Face's modules"
        raise UserError(f"This {type(model).__name__} has no hook for hook_name={name!r}; {remedy}.")
    return found


def hooks_of(model: ModelWithSAEs) -> list[str]:
    """The model's own hooks, those among them that an attached SAE stands at."""
    # of an attached SAE, SAELens lists the hooks inside, as blocks.2.hook_out.hook_sae_input
    return list(dict.fromkeys(name.partition(".hook_sae_")[0] for name in model.hook_dict))


def _in_hooked_transformer(hooks: list[str], name: str) -> str | None:
    block, _, last = name.rpartition(".")
    of_bridge = f"{block}.{_RESIDUAL_STREAM[last]}" if last in _RESIDUAL_STREAM else None
    return next((found for found in (name, of_bridge, block_output(name)) if found in hooks), None)


def _in_bridge(model: "SAETransformerBridge", name: str) -> str | None:
    hooks = hooks_of(model)
    found = _by_alias(model, hooks, name) or _by_module(model, hooks, name)
    if found is None and not _has_module(model, name):  # named as in another class of the same model
        shared = block_output(name)
        found = _by_alias(model, hooks, shared) if shared else None
    return found


def _by_alias(model: "SAETransformerBridge", hooks: list[str], name: str) -> str | None:
    # SAELens leaves aliases alone that have several targets, of which a model has one
    targets = model.hook_aliases.get(name)
    names = targets if isinstance(targets, list) else [model._resolve_hook_name(name)]
    return next((target for target in names if target in hooks), None)


def _by_module(model: "SAETransformerBridge", hooks: list[str], name: str) -> str | None:
    """The hook at a module's output: the bridge has put its own components in the places of the modules."""
    if not _has_module(model, name):
        return None
    module = model.original_model.get_submodule(name)
    outputs = (hook for hook in hooks if hook.endswith(".hook_out"))
    return next((hook for hook in outputs if get_deep_attr(model, hook.removesuffix(".hook_out")) is module), None)


def _has_module(model: "SAETransformerBridge", name: str) -> bool:
    try:
        model.original_model.get_submodule(name)
    except AttributeError:
        return False
    return True
