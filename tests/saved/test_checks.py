"""Files that are damaged or contradict each other: one sentence, and never a half-loaded SAE."""

import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from safetensors.torch import load_file, save_file

from sae_lens_matryoshka import (
    MatryoshkaSAE,
    MatryoshkaTopKTrainingSAE,
    MatryoshkaTopKTrainingSAEConfig,
    hub,
)
from sae_lens_matryoshka.cli.command_line import main
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.saved_saes import find_saved_saes
from sae_lens_matryoshka.saelens_fields import tables
from tests.conftest import random_matryoshka_sae

WEIGHTS = "sae_weights.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved SAE as SAELens saves one."""
    random_matryoshka_sae([3, 8, 20]).at_level(-1).save_model(tmp_path / "sae")
    return tmp_path / "sae"


def _change_cfg(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        cfg = json.loads((folder / "cfg.json").read_text())
        cfg.update(fields)
        (folder / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))

    return change


def _change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return apply


def _write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def _keep(n_bytes: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:n_bytes])


def _declare_terabytes(folder: Path) -> None:
    """A config that asks for more than the file has, and no matrix whose shape says so."""
    _change_cfg(d_sae=2**40)(folder)
    _change_weights(lambda weights: [weights.pop(name) for name in list(weights) if name != "b_dec"])(folder)


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (_keep(0), "is truncated or damaged"),
    (_keep(5), "is truncated or damaged"),
    (_keep(100), "is truncated or damaged"),
    (_keep(-1), "is truncated or damaged"),
    (_write(WEIGHTS, b"\xff" * 64), "is truncated or damaged"),
    (_write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "is truncated or damaged"),
    (lambda folder: (folder / WEIGHTS).unlink(), "has no sae_weights.safetensors"),
    (_write("cfg.json", b'{"d_in": 6'), "cfg.json cannot be read"),
    (_write("cfg.json", b"\xff"), "cfg.json cannot be read"),
    (_write("cfg.json", b"[1]"), "cfg.json holds list"),
    (_change_cfg(d_in=7), r"W_dec has shape \[20, 6\], but d_in=7 and d_sae=20"),
    (_change_cfg(d_sae=10), r"W_dec has shape \[20, 6\], but d_in=6 and d_sae=10"),
    (_declare_terabytes, "holds 6 values, fewer than d_in=6 and d_sae=1099511627776 ask for"),
    (_change_cfg(d_sae=None), "d_sae=None must be a positive whole number"),
    (_change_cfg(d_in=-6), "d_in=-6 must be"),
    (_change_cfg(d_in="6"), "d_in='6' must be"),
    (_change_cfg(dtype="int8"), "dtype='int8' is none of"),
    (_change_cfg(dtype="bfloat16"), r"stored as torch.float32, but cfg.json says torch.bfloat16"),
    (_change_cfg(architecture="transformer"), "architecture='transformer' is none of"),
    (_change_cfg(architecture="matryoshka_batchtopk"), "is a training checkpoint"),
    (_change_cfg(architecture="gated"), "do not fit its config"),
    (_change_weights(lambda w: w.pop("b_enc")), r'do not fit its config: .*Missing key.*"b_enc"'),
    (_change_weights(lambda w: w.pop("threshold")), r'do not fit its config: .*Missing key.*"threshold"'),
    (_change_weights(lambda w: w.update(extra=torch.zeros(2))), r'do not fit its config: .*Unexpected key.*"extra"'),
    (_change_weights(lambda w: w.update(b_enc=torch.zeros(19))), r"b_enc has shape \[19\]"),
    (_change_weights(lambda w: w.update(W_enc=w["W_enc"].t().contiguous())), r"W_enc has shape \[20, 6\]"),
    (_change_weights(lambda w: w.update(W_enc=w["W_enc"].to(torch.int8))), "W_enc is stored as I8"),
    (_change_weights(lambda w: w.update(b_dec=w["b_dec"].double())), "b_dec is stored as torch.float64"),
    (_change_weights(lambda w: w["W_enc"].view(-1)[:2].fill_(torch.nan)), "W_enc of this SAE holds 2 values .* of 120"),
    (_change_weights(lambda w: w["b_dec"].view(-1)[:1].fill_(torch.inf)), "b_dec of this SAE holds 1 values"),
    (_change_weights(lambda w: w["threshold"][:3].fill_(torch.nan)), "threshold of this SAE holds 3 values"),
    (_change_weights(lambda w: w["threshold"][:3].fill_(-torch.inf)), "threshold of this SAE holds 3 values"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
@pytest.mark.parametrize("load", [MatryoshkaSAE.load_from_disk, hub.load])
def test_damaged_files_are_one_sentence(folder: Path, damage: Callable[[Path], Any], message: str, load: Any):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 1 << 20), position=st.integers(0, 1 << 20), value=st.integers(0, 255), truncate=st.booleans())
def test_any_truncation_or_change_of_the_header_is_an_error_or_no_change(
    folder: Path, cut: int, position: int, value: int, truncate: bool
):
    original = (folder / WEIGHTS).read_bytes()
    expected = MatryoshkaSAE.load_from_disk(folder)
    header_size = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    if truncate:
        damaged = damaged[: cut % len(original)]
    else:
        damaged[position % header_size] = value
    try:
        (folder / WEIGHTS).write_bytes(damaged)
        loaded = MatryoshkaSAE.load_from_disk(folder)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        # a changed byte can leave a header that means the same, or let tensors of one shape swap their places
        assert not truncate
        for name, parameter in loaded.named_parameters():
            assert parameter.shape == dict(expected.named_parameters())[name].shape
    finally:
        (folder / WEIGHTS).write_bytes(original)


MISTYPED: list[Any] = [None, "x", [1], {"a": 1}, -1, 1.5, True]


def _fields(cfg: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in cfg.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from _fields(value, (*above, name))


@pytest.mark.filterwarnings("ignore")
def test_any_field_of_a_config_with_another_type_is_one_sentence_or_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    training_sae = MatryoshkaTopKTrainingSAE(MatryoshkaTopKTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[5, 20]))
    training_sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    training_sae.save_inference_model(tmp_path)
    _fuzz(tmp_path, capsys)
    MatryoshkaSAE.from_sae(training_sae).save_model(tmp_path)
    _fuzz(tmp_path, capsys, [("matryoshka_widths",)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", tables().saved)
def test_the_name_of_another_architecture_is_one_sentence_or_loads(
    folder: Path, capsys: pytest.CaptureFixture[str], architecture: str
):
    _change_cfg(architecture=architecture)(folder)
    try:
        find_saved_saes(folder)
        problem = ""
    except UserError as error:
        problem = str(error)
    assert "\n" not in problem
    assert (architecture == "temporal") == ("it fails 'assert dimin % (bottleneck_factor * n_heads) == 0'" in problem)
    assert main(["inspect", str(folder)]) in (0, 1)
    assert capsys.readouterr().err.count("\n") <= 1


def _fuzz(folder: Path, capsys: pytest.CaptureFixture[str], fields: list[tuple[str, ...]] | None = None) -> None:
    original = json.loads((folder / "cfg.json").read_text())
    for (*above, name), value in itertools.product(fields or list(_fields(original)), MISTYPED):
        cfg = copy.deepcopy(original)
        functools.reduce(dict.__getitem__, above, cfg)[name] = value
        (folder / "cfg.json").write_text(json.dumps(cfg))
        for load in (hub.load, find_saved_saes):
            try:
                loaded = load(folder)
            except ValueError as error:
                assert "\n" not in str(error), (above, name, value)  # noqa: PT017
            else:
                if isinstance(loaded, MatryoshkaSAE):  # then it can be used
                    assert loaded.at_level(0)(torch.ones(3, 6)).shape == loaded(torch.ones(3, 6)).shape
        assert main(["inspect", str(folder)]) in (0, 1)
        assert capsys.readouterr().err.count("\n") <= 1, (above, name, value)


def test_weights_that_the_config_would_round_are_refused_and_others_load_as_in_saelens(folder: Path):
    plain = SAE.load_from_disk(folder)
    for dtype in (torch.float16, torch.bfloat16):
        plain.half() if dtype == torch.float16 else plain.bfloat16()
        plain.save_model(folder)  # SAELens's config still says float32
        loaded, theirs = MatryoshkaSAE.load_from_disk(folder), SAE.load_from_disk(folder)
        assert loaded.W_dec.dtype == torch.float32
        assert loaded.W_dec.equal(theirs.W_dec)
    plain.double().save_model(folder)
    with pytest.raises(UserError, match=r"stored as torch.float64, but cfg.json says torch.float32; .* passing dtype"):
        hub.load(folder)
    assert hub.load(folder, dtype="float64").W_dec.equal(plain.W_dec)


def test_a_threshold_that_saelens_has_kept_in_float32_is_cast_as_it_does(folder: Path):
    training_sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(6, 20, dtype="bfloat16"))
    training_sae.save_inference_model(folder)
    loaded, theirs = hub.load(folder, widths=[5, 20]), SAE.load_from_disk(folder)
    assert loaded.state_dict()["threshold"].dtype == torch.bfloat16
    assert loaded.state_dict()["threshold"].equal(theirs.state_dict()["threshold"])


def test_an_infinite_threshold_is_a_latent_that_never_fires(folder: Path):
    _change_weights(lambda w: w["threshold"][:3].fill_(torch.inf))(folder)
    assert (MatryoshkaSAE.load_from_disk(folder).encode(torch.randn(9, 6))[:, :3] == 0).all()


def test_another_data_type_may_be_asked_for(folder: Path):
    _change_cfg(dtype="bfloat16")(folder)
    assert MatryoshkaSAE.load_from_disk(folder, dtype="float64").W_enc.dtype == torch.float64
    assert hub.load(folder, dtype="float32").W_enc.dtype == torch.float32


def test_nan_in_memory_is_refused_too():
    plain = random_matryoshka_sae([3, 8]).at_level(-1)
    with torch.no_grad():
        plain.W_dec[0, 0] = torch.nan
    with pytest.raises(UserError, match="W_dec of this SAE holds 1 values"):
        MatryoshkaSAE.from_sae(plain)


def test_what_there_is_is_named_where_nothing_can_be_loaded(folder: Path):
    assert hub.load(folder.parent, "sae").widths == [3, 8, 20]
    with pytest.raises(UserError, match="holds several SAEs; say which one by its id: sae"):
        hub.load(folder.parent)
    with pytest.raises(UserError, match=r"There is no saved SAE at .*nowhere .* give its id too"):
        hub.load(folder / "nowhere")
