"""Loading published SAEs through the real client: other people's formats, damaged downloads, what is missing."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from sae_lens import (
    SAE,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKSAE,
    upload_saes_to_huggingface,
)
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import save

from sae_lens_matryoshka import MatryoshkaSAE, hub
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saes.loading import load_any
from tests.hub.local_hub import Fault, LocalHub
from tests.saved.test_dictionary_learning import fake_checkpoint

ID = "blocks.2.hook_resid_post"


def _bytes(checkpoint: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def test_what_saelens_has_trained_and_uploaded(local_hub: LocalHub, tmp_path: Path):
    training_sae = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[3, 8, 20])
    )
    training_sae.save_inference_model(tmp_path / "sae")
    local_hub.create("owner/theirs")
    upload_saes_to_huggingface({"layer_3": tmp_path / "sae"}, "owner/theirs", show_progress=False)
    sae = MatryoshkaSAE.from_pretrained("owner/theirs", "layer_3")
    assert sae.widths == [3, 8, 20]
    assert sae.W_enc.equal(SAE.from_pretrained("owner/theirs", "layer_3").W_enc)


def test_a_release_of_saelens_directory_without_recorded_widths(local_hub: LocalHub):
    cfg = {
        "architecture": "jumprelu", "d_in": 2, "d_sae": 32768, "dtype": "float32", "device": "cuda",
        "model_name": "gemma-2-2b", "hook_name": ID, "hook_layer": 2, "apply_b_dec_to_input": True,
        "normalize_activations": "none", "context_size": 1024, "sae_lens_training_version": "5.8.1",
    }  # fmt: skip
    weights = {
        "W_enc": torch.randn(2, 32768),
        "b_enc": torch.randn(32768),
        "W_dec": torch.randn(32768, 2),
        "b_dec": torch.randn(2),
        "threshold": torch.rand(32768),
    }
    files = {"standard/blocks.2.hook_resid_post/cfg.json": json.dumps(cfg).encode()}
    files["standard/blocks.2.hook_resid_post/sae_weights.safetensors"] = save(weights)
    local_hub.create("chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40", files)
    sae = MatryoshkaSAE.from_pretrained("gemma-2-2b-res-matryoshka-dc", ID)
    assert sae.widths == [128, 512, 2048, 8192, 32768]
    assert sae.W_dec.equal(weights["W_dec"])
    assert hub.load("gemma-2-2b-res-matryoshka-dc", ID, widths=[128, 512, 2048, 8192, 32768]).widths == sae.widths
    with pytest.raises(UserError, match=r"widths=\[5, 32768\] contradict this SAE's own, \[128, 512, "):
        hub.load("gemma-2-2b-res-matryoshka-dc", ID, widths=[5, 32768])


def test_a_gemma_scope_2_sae_takes_its_widths_by_hand(local_hub: LocalHub):
    weights = {
        "w_enc": torch.randn(4, 16), "w_dec": torch.randn(16, 4), "b_enc": torch.randn(16), "b_dec": torch.randn(4),
        "threshold": torch.rand(16),
    }  # fmt: skip
    path = "resid_post/layer_12_width_16k_l0_big/params.safetensors"
    local_hub.create("google/gemma-scope-2-270m-pt", {path: save(weights)})
    release = ("gemma-scope-2-270m-pt-res", "layer_12_width_16k_l0_big")
    with pytest.raises(ValueError, match=r"does not record its level widths.*widths=\[\.\.\., 16\]"):
        hub.load(*release)
    sae = hub.load(*release, widths=[4, 16])
    x = torch.randn(5, 4)
    assert sae.encode(x).equal(SAE.from_pretrained(*release).encode(x))
    assert sae.encode(x, 0).shape == (5, 4)
    with pytest.raises(UserError, match="revision='v2' is not possible"):
        hub.load(*release, revision="v2")


def test_saebenchs_matryoshka_saes_bring_their_widths(local_hub: LocalHub):
    folder = "MatryoshkaBatchTopK_gemma-2-2b__0108/resid_post_layer_12/trainer_0"
    trainer = {"dict_class": "MatryoshkaBatchTopKSAE", "activation_dim": 6, "dict_size": 20, "layer": 12}
    config = {"trainer": {**trainer, "lm_name": "google/gemma-2-2b"}, "buffer": {"ctx_len": 1024}}
    files = {f"{folder}/ae.pt": _bytes(fake_checkpoint()), f"{folder}/config.json": json.dumps(config).encode()}
    local_hub.create("adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108", files)
    release = ("saebench_gemma-2-2b_width-2pow12_date-0108", "blocks.12.hook_resid_post__trainer_0")
    sae = MatryoshkaSAE.from_pretrained(*release)
    assert sae.widths == [3, 8, 20]
    x = torch.randn(50, 6)
    torch.testing.assert_close(sae(x), SAE.from_pretrained(*release)(x))
    assert sae.cfg.metadata.neuronpedia_id == "gemma-2-2b/12-sae_bench-matryoshka-res-4k__trainer_0_step_final"
    by_repository = hub.load("adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108", folder)
    assert by_repository.W_enc.equal(sae.W_enc)


def test_other_saes_in_dictionary_learnings_format_load_as_in_saelens(local_hub: LocalHub):
    release = ("sae_bench_gemma-2-2b_topk_width-2pow12_date-1109", "blocks.12.hook_resid_post__trainer_0")
    folder = "gemma-2-2b_topk_width-2pow12_date-1109/resid_post_layer_12/trainer_0"
    trainer = {"dict_class": "AutoEncoderTopK", "activation_dim": 6, "dict_size": 20, "k": 3, "layer": 12}
    config = {"trainer": {**trainer, "lm_name": "google/gemma-2-2b"}, "buffer": {"ctx_len": 1024}}
    checkpoint = {
        "encoder.weight": torch.randn(20, 6), "encoder.bias": torch.randn(20), "decoder.weight": torch.randn(6, 20),
        "b_dec": torch.randn(6), "k": torch.tensor(3),
    }  # fmt: skip
    files = {f"{folder}/ae.pt": _bytes(checkpoint), f"{folder}/config.json": json.dumps(config).encode()}
    local_hub.create("canrager/saebench_gemma-2-2b_width-2pow12_date-1109", files)
    sae, x = load_any(*release), torch.randn(50, 6)
    assert type(sae) is TopKSAE
    assert sae(x).equal(SAE.from_pretrained(*release)(x))
    assert load_any(*release, widths=[5, 20])(x).equal(sae(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", SAE_CLASS_REGISTRY)
def test_any_architecture_that_saelens_has_loads(tmp_path: Path, architecture: str):
    sae_class, config_class = SAE_CLASS_REGISTRY[architecture]
    special: dict[str, Any] = {"d_out": 9, "k": 3, "matryoshka_widths": [5, 16], "n_heads": 2, "bottleneck_factor": 2}
    fields = {field.name for field in dataclasses.fields(config_class)}
    settings = {name: value for name, value in special.items() if name in fields}
    if "d_out" in fields:
        settings["apply_b_dec_to_input"] = False
    if architecture == "temporal":
        settings |= {"sae_diff_type": "relu", "normalize_activations": "none"}
    sae = sae_class(config_class(8, 16, **settings))
    sae.save_model(tmp_path)
    loaded, theirs, x = load_any(tmp_path), SAE.load_from_disk(tmp_path), torch.randn(2, 5, 8)
    assert isinstance(loaded, MatryoshkaSAE) == architecture.startswith("matryoshka")
    assert type(loaded) is type(theirs)
    assert loaded(x).equal(theirs(x))
    with torch.no_grad():
        sae.b_dec[0] = torch.nan
    sae.save_model(tmp_path)
    with pytest.raises(UserError, match="b_dec of this SAE holds 1 values that are NaN or infinite"):
        load_any(tmp_path)


def test_what_there_is_is_named_where_an_id_is_wrong(local_hub: LocalHub, saved_sae: Path):
    hub.push_to_hub(saved_sae, "owner/saes", levels=True)
    with pytest.raises(UserError, match=rf"owner/saes holds no SAE 'nothing'; it holds {ID}, {ID}/level_0_width_3"):
        hub.load("owner/saes", "nothing")
    with pytest.raises(UserError, match="There is no repository owner/nothing that you may see"):
        hub.load("owner/nothing", ID)
    with pytest.raises(UserError, match="owner/saes has no such revision"):
        hub.load("owner/saes", ID, revision="v9")
    with pytest.raises(ValueError, match="ID nothing not found in release gpt2-small-res-jb"):
        hub.load("gpt2-small-res-jb", "nothing")


def test_what_is_cached_is_loaded_without_the_hub(
    local_hub: LocalHub, saved_sae: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.push_to_hub(saved_sae, "owner/saes")
    hub.load("owner/saes", ID)
    local_hub.stop()
    assert hub.load("owner/saes", ID).widths == [3, 8, 20]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.load("owner/saes", ID).widths == [3, 8, 20]
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE|the local cache does not hold"):
        hub.load("owner/others", ID)


def test_no_hub_and_nothing_cached(local_hub: LocalHub):
    local_hub.stop()
    with pytest.raises(UserError, match="cannot be reached"):
        hub.load("owner/saes", ID)


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_the_hub_refuses_or_fails(local_hub: LocalHub, saved_sae: Path, status: int):
    hub.push_to_hub(saved_sae, "owner/saes")
    local_hub.faults = [Fault("GET /api/models|HEAD", status)]
    with pytest.raises(UserError) as error:
        hub.load("owner/saes", ID)
    assert "\n" not in str(error.value)


def test_a_changed_byte_in_the_cache_is_found_and_downloading_again_mends_it(local_hub: LocalHub, saved_sae: Path):
    hub.push_to_hub(saved_sae, "owner/saes")
    good = (
        hub.load("owner/saes", ID).state_dict()["threshold"].clone()
    )  # the SAE's own may be the file's pages in memory
    weights = next(Path(constants.HF_HUB_CACHE).rglob("sae_weights.safetensors")).resolve()
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # a number a little different: nothing but the hash can tell
    weights.write_bytes(content)
    with pytest.raises(UserError, match="is not the file that the Hub declares"):
        hub.load("owner/saes", ID)
    assert hub.load("owner/saes", ID, force_download=True).state_dict()["threshold"].equal(good)


def test_one_load_reads_one_commit(local_hub: LocalHub, saved_sae: Path):
    """A push between two downloads must not mix a config with another version's weights."""
    hub.push_to_hub(saved_sae, "owner/saes")
    hub.load("owner/saes", ID)
    resolved = [request for request in local_hub.requests if "/resolve/" in request]
    head = local_hub.repositories["owner/saes"].branches["main"]
    assert resolved
    assert all(f"/resolve/{head}/" in request for request in resolved)


def test_what_is_here_is_never_looked_for_on_the_hub(
    local_hub: LocalHub, saved_sae: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.push_to_hub(saved_sae, "owner/saes")
    folder = saved_sae.parent
    monkeypatch.chdir(folder)
    saved_sae.rename(folder / "kept")
    (folder / "owner" / "saes").mkdir(parents=True)
    local_hub.requests.clear()
    for source in ("owner/saes", folder / "owner" / "saes"):
        with pytest.raises(UserError, match=f"There is no saved SAE at .*owner/saes/{ID}"):
            hub.load(source, ID)
    with pytest.raises(UserError, match=r"There is no saved SAE at .*wrong_id; .* holds kept\."):
        hub.load(folder, "wrong_id")
    for options in ((None, True), ("v2", False)):
        with pytest.raises(UserError, match="is here, not on the Hub: leave out revision and force_download"):
            hub.load(folder, "kept", revision=options[0], force_download=options[1])
    assert hub.load(folder, "kept").widths == [3, 8, 20]
    assert local_hub.requests == []
