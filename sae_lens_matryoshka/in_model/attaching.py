"""Using a trained SAE inside a model: attached by whatever name it records, one level at a time, levels scaled."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from sae_lens import SAE, HookedSAETransformer
from sae_lens.analysis.hooked_sae_transformer import get_deep_attr, set_deep_attr
from torch import Tensor, nn

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.in_model.hook_names import ModelWithSAEs, hook_name_in, transformer_lens_name
from sae_lens_matryoshka.levels import level_index
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE

AnySAE = TypeVar("AnySAE", bound=SAE[Any])

_shapes: "WeakKeyDictionary[nn.Module, dict[str, torch.Size]]" = WeakKeyDictionary()


def for_transformer_lens(sae: AnySAE, model: ModelWithSAEs | None = None) -> AnySAE:
    """An SAE under TransformerLens's name of its hook, so that SAELens attaches it wherever it was trained.

    The weights are shared with ``sae``; config, metadata and hooks are the new SAE's own. The model must compute what
    the SAE was trained on: a bridge and ``HookedSAETransformer.from_pretrained_no_processing`` have the activations of
    Hugging Face's model, ``HookedSAETransformer.from_pretrained``, which folds and centers weights, has others.

    Args:
        sae: The SAE. Its ``cfg.metadata.hook_name`` is a Hugging Face module, whose output is meant, or a hook of
            TransformerLens.
        model: A ``SAETransformerBridge`` or ``HookedSAETransformer``. With it, every module that the bridge has a hook
            for is found, under the name that ``model.hook_dict`` and caches go by, as ``blocks.2.hook_out``; the model
            is run on one token, once a hook, to see how wide it is. Without it, only blocks are found, as
            ``blocks.2.hook_resid_post``, where both kinds of model attach SAEs.

    Raises:
        UserError: If the SAE records no hook, the hook has no counterpart, or it is not ``d_in`` wide.
    """
    if sae.cfg.metadata.hook_name is None:
        raise UserError(
            "The SAE does not record its hook; set sae.cfg.metadata.hook_name, for instance to model.layers.2."
        )
    cfg = copy.deepcopy(sae.cfg)
    for field in ("hook_name", "hook_name_out"):  # a transcoder has both
        recorded = getattr(cfg.metadata, field)
        if recorded is not None:
            name = transformer_lens_name(recorded) if model is None else hook_name_in(model, recorded)
            setattr(cfg.metadata, field, name)
    if model is not None:
        _check_width(model, cfg.metadata.hook_name, sae)
    cfg.device = "meta"  # since the parameters made there are replaced
    renamed = type(sae)(cfg, use_error_term=sae.use_error_term)
    renamed.load_state_dict(sae.state_dict(keep_vars=True), assign=True)
    renamed.cfg.device = sae.cfg.device
    renamed.device, renamed.dtype = sae.device, sae.dtype
    return renamed.train(sae.training)


@contextmanager
def levels_in_model(
    model: ModelWithSAEs,
    sae: SAE[Any],
    level: int | None = None,
    scale_levels: Mapping[int, float] | None = None,
    use_error_term: bool | None = None,
) -> Iterator[SAE[Any]]:
    """A context in which a model runs with one level of an SAE attached, and latents of some levels scaled.

    ::

        with levels_in_model(model, sae, level=1): ...  # the reconstruction of level 1 in place of the activation
        with levels_in_model(model, sae, scale_levels={2: 0.0}, use_error_term=True): ...  # without what level 2 adds
        with levels_in_model(model, sae, scale_levels={0: 2.0}, use_error_term=True): ...  # with twice level 0

    Afterwards the model is as it was, also after an exception: its hooks, and an SAE that was attached at the same
    hook. SAEs at other hooks stay attached meanwhile. Contexts can be nested.

    Args:
        model: A ``SAETransformerBridge`` or ``HookedSAETransformer``.
        sae: A Matryoshka SAE, or an SAE that records its widths, under any name of its hook
            (:func:`for_transformer_lens`).
        level: Index of the level to attach; None attaches the full SAE.
        scale_levels: Factors by index of the level. A level's own latents are meant, those that it adds to the one
            before; 0 ablates them.
        use_error_term: Whether to add what the SAE, unscaled, does not reconstruct, so that the scaling alone changes
            the model; None takes ``sae.use_error_term``.

    Yields:
        The attached SAE, which shares its weights with ``sae``; of a level, the gradients are its own. Its latents, as
        scaled, are at the hook ``f"{attached.cfg.metadata.hook_name}.hook_sae_acts_post"``.

    Raises:
        UserError: If the hook has no counterpart or another width, or a factor is no finite number, or is for a level
            that is not attached, or the second for one level.
        IndexError: If there is no such level.
        ValueError: If the SAE records no widths.
    """
    levels = sae if isinstance(sae, MatryoshkaSAE) else MatryoshkaSAE.from_sae(sae)
    factors = _factors(levels.widths, level, scale_levels or {})
    attached = for_transformer_lens(levels if level is None else levels.at_level(level), model)
    if scale_levels:
        # permanent, so that it stays when the caller resets the model's own hooks
        attached.hook_sae_acts_post.add_hook(partial(_scaled, factors), is_permanent=True)
    with _attached_alone(model, attached, sae.use_error_term if use_error_term is None else use_error_term):
        yield attached


def _factors(widths: list[int], level: int | None, scale_levels: Mapping[int, float]) -> Float[Tensor, " width"]:
    last = len(widths) - 1 if level is None else level_index(level, widths)
    factors = torch.ones(widths[last])
    scaled: set[int] = set()
    for key, factor in scale_levels.items():
        index, field = level_index(key, widths), f"scale_levels={dict(scale_levels)}"
        if index in scaled:
            raise UserError(f"{field} has two factors for level {index}; give one.")
        if index > last:
            raise UserError(f"{field}: level {index} is not part of level={level}; leave it out.")
        if not math.isfinite(factor):
            raise UserError(f"{field}: {factor} is not a finite number; use 0 to ablate.")
        scaled.add(index)
        factors[widths[index - 1] if index > 0 else 0 : widths[index]] = factor
    return factors


def _scaled(factors: Tensor, tensor: Tensor, hook: Any) -> Tensor:
    return tensor * factors.to(tensor)


@contextmanager
def _attached_alone(model: ModelWithSAEs, sae: SAE[Any], use_error_term: bool) -> Iterator[None]:
    """Attach an SAE, and put what stood at its hook back.

    SAELens's own ``model.saes`` leaves a new hook point there, without the hooks and the conversion of the one before,
    and forgets an SAE that was attached under another name of the same hook.
    """
    name = sae.cfg.metadata.hook_name
    point = get_deep_attr(model, name)
    attached_before = {key: wrapper for key, wrapper in model._acts_to_saes.items() if wrapper is point}
    registry = {} if isinstance(model, HookedSAETransformer) else model._hook_registry
    registered_before = {key: hook for key, hook in registry.items() if _is_at(key, name)}
    try:
        model.add_sae(sae, use_error_term=use_error_term)
        if get_deep_attr(model, name) is point:
            raise UserError(f"A transcoder writes to {name}; take it off with model.reset_saes() first.")
        for key in attached_before.keys() - {name}:
            del model._acts_to_saes[key]
        yield
    finally:
        set_deep_attr(model, name, point)
        model._acts_to_saes.pop(name, None)
        model._acts_to_saes.update(attached_before)
        if isinstance(model, HookedSAETransformer):
            model.setup()
        else:
            for key in [key for key in registry if _is_at(key, name)]:
                del registry[key]
            registry.update(registered_before)


def _is_at(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.hook_sae_")


def _check_width(model: ModelWithSAEs, name: str, sae: SAE[Any]) -> None:
    shapes = _shapes.setdefault(model, {})
    if name not in shapes:
        shapes[name] = _shape_at(model, name)
    shape = shapes[name]
    per_head = sae.cfg.reshape_activations == "hook_z" and len(shape) == 4
    width = math.prod(shape[-2:]) if per_head else shape[-1]
    if width != sae.cfg.d_in:
        raise UserError(
            f"hook_name={sae.cfg.metadata.hook_name!r} is {width} wide in this model, the SAE's d_in={sae.cfg.d_in}; "
            "use the model that it was trained on."
        )


def _shape_at(model: ModelWithSAEs, name: str) -> torch.Size:
    """The shape of the activation at a hook for one token."""
    seen: list[torch.Size] = []
    handle = get_deep_attr(model, name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        handle.remove()
    if not seen:
        raise UserError(f"The model has a hook {name}, but does not run through it; name another of model.hook_dict.")
    return seen[0]
