"""Levels of a saved SAE: what they compute, how they are cut out, saved, loaded and used in SAELens."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    HookedSAETransformer,
    JumpReLUSAE,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig

from sae_lens_matryoshka import (
    MatryoshkaJumpReLUSAE,
    MatryoshkaJumpReLUSAEConfig,
    MatryoshkaJumpReLUTrainingSAEConfig,
    MatryoshkaSAE,
    MatryoshkaStandardTrainingSAEConfig,
    MatryoshkaTopKTrainingSAEConfig,
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
    hub,
)
from sae_lens_matryoshka.errors import UserError
from tests import processes
from tests.conftest import random_matryoshka_sae

NORMALIZATIONS = ["none", "layer_norm", "constant_norm_rescale"]


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6, unique=True).map(sorted),
    st.sampled_from(NORMALIZATIONS),
    st.booleans(),
    st.sampled_from([(5,), (2, 3)]),
)
def test_a_level_is_the_first_latents_of_the_whole(
    widths: list[int], normalize_activations: str, apply_b_dec_to_input: bool, batch_shape: tuple[int, ...]
):
    sae = random_matryoshka_sae(
        widths, normalize_activations=normalize_activations, apply_b_dec_to_input=apply_b_dec_to_input
    )
    x = _x(*batch_shape, 6)
    full = sae.encode(x)
    levels = sae.reconstruct_levels(x)
    assert levels.shape == (len(widths), *batch_shape, 6)
    for level, width in enumerate(widths):
        acts = sae.encode(x, level=level)
        torch.testing.assert_close(acts, full[..., :width])
        reconstruction = sae.decode(acts, level=level)
        torch.testing.assert_close(reconstruction, levels[level], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(reconstruction, sae.at_level(level)(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(levels[-1], sae(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize_activations", NORMALIZATIONS)
def test_the_full_level_is_saelens_jumprelu_sae(normalize_activations: str):
    ours = random_matryoshka_sae([3, 20], normalize_activations=normalize_activations)
    cfg = {key: value for key, value in ours.cfg.to_dict().items() if key != "matryoshka_widths"}
    theirs = JumpReLUSAE.from_dict({**cfg, "architecture": "jumprelu"})
    theirs.load_state_dict(ours.state_dict())
    x = _x(7, 6)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=0, atol=0)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_levels_by_index(matryoshka_sae: MatryoshkaJumpReLUSAE):
    assert matryoshka_sae.widths == [1, 3, 8, 20]
    assert matryoshka_sae.n_levels == 4
    assert matryoshka_sae.level_of([0, 1, 2, 19]).tolist() == [0, 1, 1, 3]
    x = _x(2, 6)
    torch.testing.assert_close(matryoshka_sae.encode(x, level=-2), matryoshka_sae.encode(x, level=2))
    for call in (lambda: matryoshka_sae.encode(x, level=4), lambda: matryoshka_sae.at_level(-5)):
        with pytest.raises(IndexError, match=r"0 \(width 1\), 1 \(width 3\), 2 \(width 8\), 3 \(width 20\)"):
            call()


def test_decoding_activations_of_another_level_is_an_error(matryoshka_sae: MatryoshkaJumpReLUSAE):
    acts = matryoshka_sae.encode(_x(2, 6))
    with pytest.raises(ValueError, match=r"20 latents, but level=1 has 3; .*feature_acts\[\.\.\., :3\]"):
        matryoshka_sae.decode(acts, level=1)


def test_hooks_fire_and_can_change_a_level(matryoshka_sae: MatryoshkaJumpReLUSAE):
    seen: dict[str, tuple[int, ...]] = {}

    def record(tensor: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = tuple(tensor.shape)

    names = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"]
    with matryoshka_sae.hooks(fwd_hooks=[(name, record) for name in names]):
        matryoshka_sae.decode(matryoshka_sae.encode(_x(2, 6), level=1), level=1)
    assert seen == {
        "hook_sae_input": (2, 6),
        "hook_sae_acts_pre": (2, 3),
        "hook_sae_acts_post": (2, 3),
        "hook_sae_recons": (2, 6),
    }
    with matryoshka_sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: torch.zeros_like(acts))]):
        assert (matryoshka_sae.encode(_x(2, 6), level=1) == 0).all()


def test_a_level_cut_out_shares_storage_and_says_where_it_is_from(matryoshka_sae: MatryoshkaJumpReLUSAE):
    matryoshka_sae.cfg.metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", l0=9.0, num_dead_features=2)
    level = matryoshka_sae.at_level(2)
    assert isinstance(level, JumpReLUSAE)
    assert not isinstance(level, MatryoshkaSAE)
    assert level.cfg.architecture() == "jumprelu"
    assert level.cfg.d_sae == 8
    assert level.cfg.device == "cpu"
    assert level.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert level.cfg.metadata.matryoshka_cut_from == {"level": 2, "d_sae": 20, "matryoshka_widths": [1, 3, 8, 20]}
    assert level.cfg.metadata.l0 is None
    assert matryoshka_sae.cfg.metadata.l0 == 9.0
    with torch.no_grad():
        for parameter in matryoshka_sae.parameters():
            parameter.mul_(2)
    assert level.W_enc.equal(matryoshka_sae.W_enc[:, :8])
    assert level.W_dec.equal(matryoshka_sae.W_dec[:8])
    assert level.threshold.equal(matryoshka_sae.threshold[:8])


def test_a_level_cut_out_is_saved_for_saelens_and_keeps_its_own_levels(
    matryoshka_sae: MatryoshkaJumpReLUSAE, tmp_path: Path
):
    level = matryoshka_sae.at_level(2)
    level.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is JumpReLUSAE
    torch.testing.assert_close(loaded(_x(4, 6)), level(_x(4, 6)))
    assert MatryoshkaSAE.load_from_disk(tmp_path).widths == [1, 3, 8]
    assert MatryoshkaSAE.from_sae(level).widths == [1, 3, 8]


def test_saving_a_matryoshka_sae_keeps_its_architecture(matryoshka_sae: MatryoshkaJumpReLUSAE, tmp_path: Path):
    matryoshka_sae.save_model(tmp_path)
    for loaded in (SAE.load_from_disk(tmp_path), MatryoshkaSAE.load_from_disk(tmp_path)):
        assert isinstance(loaded, MatryoshkaSAE)
        assert loaded.cfg.architecture() == "matryoshka"
        assert loaded.widths == [1, 3, 8, 20]
        torch.testing.assert_close(loaded(_x(4, 6)), matryoshka_sae(_x(4, 6)))


@pytest.mark.parametrize("plugin", [True, False])
@pytest.mark.parametrize("rescale_acts_by_decoder_norm", [True, False])
def test_a_trained_sae_is_a_plain_jumprelu_sae_that_gets_its_levels_back(
    plugin: bool, rescale_acts_by_decoder_norm: bool, tmp_path: Path
):
    options: dict[str, Any] = {
        "d_in": 6,
        "d_sae": 20,
        "k": 3,
        "matryoshka_widths": [3, 8, 20],
        "rescale_acts_by_decoder_norm": rescale_acts_by_decoder_norm,
    }
    torch.manual_seed(0)
    training_sae: TrainingSAE[Any] = (
        MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**options))
        if plugin
        else MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**options))
    )
    with torch.no_grad():
        training_sae.W_dec.normal_()
    training_sae.topk_threshold += 0.3
    training_sae.save_inference_model(tmp_path)
    plain = SAE.load_from_disk(tmp_path)
    assert type(plain) is JumpReLUSAE
    for sae in (
        MatryoshkaSAE.load_from_disk(tmp_path),
        MatryoshkaSAE.from_sae(plain),
        MatryoshkaSAE.from_sae(training_sae),
    ):
        assert sae.widths == [3, 8, 20]
        torch.testing.assert_close(sae(_x(9, 6)), plain(_x(9, 6)), rtol=0, atol=0)
    half = MatryoshkaSAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert half.W_enc.dtype == torch.bfloat16
    # converting must not have touched what it was converted from
    torch.testing.assert_close(MatryoshkaSAE.from_sae(training_sae)(_x(9, 6)), plain(_x(9, 6)), rtol=0, atol=0)


def test_a_trained_sae_loads_in_saelens_with_the_plugin_not_imported(tmp_path: Path):
    training_sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[3, 20]))
    training_sae.save_inference_model(tmp_path)
    x = _x(4, 6)
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import sys, torch
from sae_lens import SAE
x = torch.load({str(tmp_path / "x.pt")!r}, weights_only=True)
torch.save(SAE.load_from_disk({str(tmp_path)!r})(x).detach(), {str(tmp_path / "y.pt")!r})
assert not any(name.startswith("sae_lens_matryoshka") for name in sys.modules)
"""
    done = processes.run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    output = torch.load(tmp_path / "y.pt", weights_only=True)
    torch.testing.assert_close(output, MatryoshkaSAE.from_sae(training_sae)(x).detach())


TRAINING_CONFIGS = [
    MatryoshkaTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[5, 20]),
    MatryoshkaTopKTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[5, 20]),
    MatryoshkaStandardTrainingSAEConfig(6, 20, matryoshka_widths=[5, 20]),
    MatryoshkaJumpReLUTrainingSAEConfig(6, 20, matryoshka_widths=[5, 20]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", TRAINING_CONFIGS, ids=lambda config: config.architecture())
def test_what_is_saved_in_another_data_type_loads(config: TrainingSAEConfig, dtype: torch.dtype, tmp_path: Path):
    """However it came by it: the SAE, a level cut out before or after, the SAE in training, a module around it."""

    def cast(sae: Any, around: bool = False) -> Any:
        module: Any = torch.nn.Sequential(sae) if around else sae
        {torch.float64: module.double, torch.float16: module.half, torch.bfloat16: module.bfloat16}[dtype]()
        return sae

    def training_sae() -> TrainingSAE[Any]:
        torch.manual_seed(0)
        return get_sae_training_class(config.architecture())[0](copy.deepcopy(config))

    def matryoshka_sae() -> MatryoshkaSAE:
        return MatryoshkaSAE.from_sae(training_sae())

    for name, sae in {
        "training": cast(training_sae()),
        "whole": cast(matryoshka_sae()),
        "inside": cast(matryoshka_sae(), around=True),
        "from SAELens's": MatryoshkaSAE.from_sae(cast(MatryoshkaSAE.from_sae(training_sae()).at_level(-1))),
        "level": cast(matryoshka_sae()).at_level(0),
        "cast level": cast(matryoshka_sae().at_level(0)),
    }.items():
        assert sae.dtype == dtype, name
        sae.save_inference_model(tmp_path / name) if isinstance(sae, TrainingSAE) else sae.save_model(tmp_path / name)
        loaded = MatryoshkaSAE.load_from_disk(tmp_path / name)
        saved = MatryoshkaSAE.from_sae(sae) if isinstance(sae, TrainingSAE) else sae
        assert loaded.W_dec.dtype == dtype, name
        assert loaded.W_dec.equal(saved.W_dec), name
        assert loaded(_x(4, 6)).dtype == dtype, name


def test_widths_given_by_hand_and_widths_missing(matryoshka_sae: MatryoshkaJumpReLUSAE, tmp_path: Path):
    plain = JumpReLUSAE.from_dict(
        {**matryoshka_sae.at_level(-1).cfg.to_dict(), "metadata": {"sae_lens_version": "6.54.12"}}
    )
    plain.save_model(tmp_path)
    with pytest.raises(ValueError, match=r"jumprelu SAE does not record its level widths.*widths=\[\.\.\., 20\]"):
        MatryoshkaSAE.load_from_disk(tmp_path)
    assert MatryoshkaSAE.load_from_disk(tmp_path, widths=[5, 20]).widths == [5, 20]
    assert MatryoshkaSAE.from_sae(plain, widths=(5, 20)).widths == [5, 20]
    with pytest.raises(ValueError, match="21 is above d_sae=20"):
        MatryoshkaSAE.from_sae(plain, widths=[5, 21])


def test_widths_given_by_hand_must_be_those_that_are_recorded(matryoshka_sae: MatryoshkaJumpReLUSAE, tmp_path: Path):
    training_sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[1, 3, 8, 20]))
    training_sae.save_inference_model(tmp_path / "trained")  # they are recorded in another place for each of these
    matryoshka_sae.save_model(tmp_path / "saved")
    matryoshka_sae.at_level(-1).save_model(tmp_path / "level")
    loads = [partial(MatryoshkaSAE.from_sae, sae) for sae in (matryoshka_sae, training_sae)]
    for path in tmp_path.iterdir():
        loads += [partial(MatryoshkaSAE.load_from_disk, path), partial(hub.load, path)]
    for load in loads:
        assert load(widths=(1, 3, 8, 20)).widths == [1, 3, 8, 20]
        with pytest.warns(UserWarning, match="ends below d_sae=20"):
            assert load(widths=[1, 3, 8]).widths == [1, 3, 8, 20]
        for widths in ([8, 20], [1, 3, 8, 19, 20], [20]):
            with pytest.raises(UserError, match=r"widths=\[.*20\] contradict this SAE's own, \[1, 3, 8, 20\]"):
                load(widths=widths)


def test_from_sae_shares_the_parameters_of_a_jumprelu_sae(matryoshka_sae: MatryoshkaJumpReLUSAE):
    plain = matryoshka_sae.at_level(-1)
    assert MatryoshkaSAE.from_sae(plain).W_enc is plain.W_enc


def test_saes_of_other_architectures_have_no_levels():
    with pytest.raises(TypeError, match="GatedSAE \\(architecture 'gated'\\)"):
        MatryoshkaSAE.from_sae(GatedSAE(GatedSAEConfig(4, 8)), widths=[8])


def test_a_config_without_widths_is_an_error():
    with pytest.raises(ValueError, match=r"matryoshka_widths=\[\] is empty"):
        MatryoshkaJumpReLUSAEConfig(4, 8)


def test_from_pretrained_uses_saelens_own_loader(matryoshka_sae: MatryoshkaJumpReLUSAE, tmp_path: Path):
    plain = matryoshka_sae.at_level(-1)
    asked: list[tuple[str, str]] = []

    def converter(repo_id: str, folder_name: str, device: str, force_download: bool, cfg_overrides: Any) -> Any:
        asked.append((repo_id, folder_name))
        return {**plain.cfg.to_dict(), **cfg_overrides}, dict(plain.state_dict()), torch.zeros(20)

    loaded = MatryoshkaSAE.from_pretrained("someone/saes", "layer_1", converter=converter)
    assert asked == [("someone/saes", "layer_1")]
    assert loaded.widths == [1, 3, 8, 20]
    torch.testing.assert_close(loaded(_x(4, 6)), matryoshka_sae(_x(4, 6)))
    with pytest.raises(UserError, match=r"widths=\[2, 20\] contradict this SAE's own, \[1, 3, 8, 20\]; leave them out"):
        MatryoshkaSAE.from_pretrained("someone/saes", "layer_1", converter=converter, widths=[2, 20])
    _, cfg_dict, log_sparsity = MatryoshkaSAE.from_pretrained_with_cfg_and_sparsity(
        "someone/saes", "layer_1", converter=converter
    )
    assert cfg_dict["d_sae"] == 20
    assert log_sparsity is not None


@pytest.mark.parametrize("level", [0, 2, None])
def test_a_transformer_takes_any_level(matryoshka_sae: MatryoshkaJumpReLUSAE, level: int | None):
    torch.manual_seed(0)
    model = HookedSAETransformer(
        HookedTransformerConfig(n_layers=1, d_model=6, n_ctx=8, d_head=3, d_vocab=11, act_fn="relu", n_heads=2)
    )
    matryoshka_sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    sae = matryoshka_sae if level is None else matryoshka_sae.at_level(level)
    tokens = torch.tensor([[1, 2, 3]])
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    _, plain_cache = model.run_with_cache(tokens)
    torch.testing.assert_close(
        cache["blocks.0.hook_resid_post.hook_sae_acts_post"], sae.encode(plain_cache["blocks.0.hook_resid_post"])
    )
