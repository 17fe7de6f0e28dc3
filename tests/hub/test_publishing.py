"""Publishing through the real client: what lies in the repository afterwards, and that nothing else does."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from sae_lens import SAE, JumpReLUSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from safetensors.torch import load, load_file, save_file

from sae_lens_matryoshka import MatryoshkaSAE, MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, hub
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.own_files import MAX_BYTES
from sae_lens_matryoshka.training.run import train
from tests.conftest import random_matryoshka_sae
from tests.hub.conftest import png, save_trained_sae
from tests.hub.local_hub import LocalHub
from tests.tiny_runs import tiny_multi_run, tiny_run

ID = "blocks.2.hook_resid_post"
FILES = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json")


def _files(local_hub: LocalHub, repo_id: str = "owner/saes", revision: str = "main") -> dict[str, bytes]:
    return local_hub.repositories[repo_id].files(revision)


def test_a_push_lays_out_files_as_saelens_does_and_the_levels_come_back(local_hub: LocalHub, saved_sae: Path):
    push = hub.push_to_hub(saved_sae, "owner/saes")
    files = _files(local_hub)
    assert set(files) == {".gitattributes", "README.md", *(f"{ID}/{name}" for name in FILES)}
    assert files[f"{ID}/sae_weights.safetensors"] == (saved_sae / "sae_weights.safetensors").read_bytes()
    assert push.new_repository
    assert push.url == f"{local_hub.endpoint}/owner/saes/commit/{local_hub.repositories['owner/saes'].branches['main']}"
    assert local_hub.repositories["owner/saes"].messages == ["initial commit", f"Publish {ID}"]

    local = MatryoshkaSAE.load_from_disk(saved_sae)
    x = torch.randn(5, 6)
    published, _, log_sparsity = MatryoshkaSAE.from_pretrained_with_cfg_and_sparsity("owner/saes", ID)
    assert log_sparsity is not None
    assert log_sparsity.tolist() == [-2.0] * 20
    for sae in (published, hub.load("owner/saes", ID)):
        assert sae.widths == [3, 8, 20]
        for level in range(3):
            assert sae.encode(x, level).equal(local.encode(x, level))
    assert published.cfg.metadata.model_name == "tiny-model"


def test_saelens_without_the_plugin_loads_what_was_pushed(
    local_hub: LocalHub, saved_sae: Path, hub_environment: dict[str, str], tmp_path: Path
):
    hub.push_to_hub(saved_sae, "owner/saes", levels=True)
    x = torch.randn(5, 6)
    save_file({"x": x}, tmp_path / "x.safetensors")
    code = f"""
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
x = load_file({str(tmp_path / "x.safetensors")!r})["x"]
full = SAE.from_pretrained("owner/saes", {ID!r})
small = SAE.from_pretrained("owner/saes", {f"{ID}/level_1_width_8"!r})
save_file({{"full": full(x).detach(), "small": small(x).detach()}}, {str(tmp_path / "y.safetensors")!r})
assert not any(name.startswith("sae_lens_matryoshka") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=hub_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    local = MatryoshkaSAE.load_from_disk(saved_sae)
    loaded = load_file(tmp_path / "y.safetensors")
    torch.testing.assert_close(loaded["full"], local(x).detach())
    torch.testing.assert_close(loaded["small"], local.decode(local.encode(x, 1), 1).detach())


def test_pushing_again_commits_only_what_has_changed(local_hub: LocalHub, saved_sae: Path, tmp_path: Path):
    hub.push_to_hub(saved_sae, "owner/saes")
    before, uploads = _files(local_hub), local_hub.uploads
    assert not hub.push_to_hub(saved_sae, "owner/saes").changed
    assert len(local_hub.repositories["owner/saes"].commits) == 2
    save_trained_sae(saved_sae, tmp_path, seed=1)
    assert hub.push_to_hub(saved_sae, "owner/saes").changed
    changed = {path for path, content in _files(local_hub).items() if before[path] != content}
    assert changed == {f"{ID}/sae_weights.safetensors"}
    assert local_hub.uploads == uploads + 1


def test_several_saes_land_in_one_commit_under_their_folders_names(local_hub: LocalHub, tmp_path: Path):
    folder = tmp_path / "sweep"
    for seed, name in enumerate(["k_20", "layer_3/k_40"]):
        save_trained_sae(folder / name, tmp_path, seed)
        # SAELens writes the config of a run with several SAEs once, beside their folders
        (folder / name / "runner_cfg.json").rename(folder / "runner_cfg.json")
    push = hub.push_to_hub(folder, "owner/saes")
    assert push.sae_ids == ["k_20", "layer_3/k_40"]
    assert len(local_hub.repositories["owner/saes"].commits) == 2
    for name in push.sae_ids:
        assert json.loads(_files(local_hub)[f"{name}/runner_cfg.json"])["training_tokens"] == 400_000
        local = MatryoshkaSAE.load_from_disk(folder / name)
        assert MatryoshkaSAE.from_pretrained("owner/saes", name).W_dec.equal(local.W_dec)
        assert f"## {name}\n" in push.card
    with pytest.raises(UserError, match="holds 2 SAEs"):
        hub.push_to_hub(folder, "owner/saes", "one_id")


def test_levels_are_saes_of_their_own_and_the_last_is_not_sent_twice(
    local_hub: LocalHub, saved_sae: Path, tmp_path: Path
):
    local_hub.create("owner/saes", {f"{ID}/notes.txt": b"mine", "other/cfg.json": b"{}"})
    push = hub.push_to_hub(saved_sae, "owner/saes", levels=True)
    level_files = {path for path in _files(local_hub) if "level_" in path}
    assert level_files == {
        f"{ID}/level_{level}_width_{width}/{name}" for level, width in [(0, 3), (1, 8)] for name in FILES[:2]
    }
    assert push.levels_size == sum(len(_files(local_hub)[path]) for path in level_files)
    x = torch.randn(5, 6)
    local = MatryoshkaSAE.load_from_disk(saved_sae)
    small = SAE.from_pretrained("owner/saes", f"{ID}/level_1_width_8")
    assert type(small) is JumpReLUSAE
    assert small.encode(x).equal(local.encode(x, 1))

    cfg = json.loads((saved_sae / "cfg.json").read_text())
    cfg["metadata"]["training_architecture_details"]["matryoshka_widths"] = [5, 20]
    (saved_sae / "cfg.json").write_text(json.dumps(cfg))
    (saved_sae / "levels.csv").unlink()
    (saved_sae / "sparsity.safetensors").unlink()
    push = hub.push_to_hub(saved_sae, "owner/saes", levels=True)
    assert set(push.obsolete) == {*level_files, f"{ID}/sparsity.safetensors"}
    files = set(_files(local_hub))
    assert {path for path in files if "level_" in path} == {f"{ID}/level_0_width_5/{name}" for name in FILES[:2]}
    assert {f"{ID}/notes.txt", "other/cfg.json"} <= files


@pytest.mark.parametrize("exists", [True, False])
def test_a_dry_run_reads_and_shows_but_writes_nothing(local_hub: LocalHub, saved_sae: Path, exists: bool):
    if exists:
        local_hub.create("owner/saes", {"README.md": b"---\nlicense: mit\n---\nMine.\n"})
    before = sorted(path for path in saved_sae.rglob("*"))
    push = hub.push_to_hub(saved_sae, "owner/saes", levels=True, dry_run=True)
    assert local_hub.writes() == []
    assert set(local_hub.repositories) == ({"owner/saes"} if exists else set())
    assert push.url is None
    assert push.new_repository is not exists
    assert ("Mine." in push.card) is exists
    assert push.files[f"{ID}/level_0_width_3/sae_weights.safetensors"] > 0
    assert sorted(path for path in saved_sae.rglob("*")) == before


def test_a_dry_run_needs_neither_token_nor_hub(local_hub: LocalHub, saved_sae: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    local_hub.stop()
    push = hub.push_to_hub(saved_sae, "owner/saes", dry_run=True)
    assert "was not looked at: The Hub cannot be reached" in push.note
    assert "## blocks.2.hook_resid_post" in push.card


def test_a_new_repository_is_private_if_asked_for_and_a_public_one_is_refused(local_hub: LocalHub, saved_sae: Path):
    hub.push_to_hub(saved_sae, "owner/hidden", private=True)
    assert local_hub.repositories["owner/hidden"].private
    assert hub.load("owner/hidden", ID).widths == [3, 8, 20]
    hub.push_to_hub(saved_sae, "owner/open")
    assert not local_hub.repositories["owner/open"].private
    with pytest.raises(UserError, match="owner/open exists and is public"):
        hub.push_to_hub(saved_sae, "owner/open", "another", private=True)


def test_a_branch_is_made_and_the_main_one_left_alone(local_hub: LocalHub, saved_sae: Path, tmp_path: Path):
    hub.push_to_hub(saved_sae, "owner/saes")
    before = _files(local_hub)
    save_trained_sae(saved_sae, tmp_path, seed=1)
    push = hub.push_to_hub(saved_sae, "owner/saes", revision="v2")
    assert _files(local_hub) == before
    assert 'hub.load("owner/saes", "blocks.2.hook_resid_post", revision="v2")' in push.card
    local = MatryoshkaSAE.load_from_disk(saved_sae)
    assert hub.load("owner/saes", ID, revision="v2").W_enc.equal(local.W_enc)
    assert not hub.load("owner/saes", ID).W_enc.equal(local.W_enc)
    hub.push_to_hub(saved_sae, "owner/saes", "second", revision="v2")
    assert f"{ID}/cfg.json" in _files(local_hub, revision="v2")
    hub.push_to_hub(saved_sae, "owner/fresh", revision="v1")
    assert set(_files(local_hub, "owner/fresh")) == {".gitattributes"}


def test_no_local_path_account_or_token_leaves_this_machine(local_hub: LocalHub, saved_sae: Path, tmp_path: Path):
    results = tmp_path / "results"
    results.mkdir()
    rows = f"sae,level,width,evaluation,metric,value\n{saved_sae},0,3,core,ce,0.5\n"
    (results / "results.csv").write_text(rows)
    push = hub.push_to_hub(saved_sae, "owner/saes", levels=True, results=results)
    sent = b"\n".join([*local_hub.received, *local_hub.large_files.values(), *_files(local_hub).values()])
    assert b"tiny-model" in sent
    for secret in (str(tmp_path), str(tmp_path.parent), str(Path.home() / "cache"), "my-team", "hf_" + "a" * 30):
        assert secret.encode() not in sent, secret
    assert {replacement.field for replacement in push.replacements} == {
        "cfg.json: metadata.model_name",
        "cfg.json: metadata.model_from_pretrained_kwargs.cache_dir",
        "cfg.json: metadata.model_from_pretrained_kwargs.token",
        "runner_cfg.json: model_name",
        "runner_cfg.json: output_path",
        "runner_cfg.json: checkpoint_path",
        "runner_cfg.json: cached_activations_path",
        "runner_cfg.json: logger.wandb_entity",
        "runner_cfg.json: logger.run_name",
    }
    runner_cfg = json.loads(_files(local_hub)[f"{ID}/runner_cfg.json"])
    assert runner_cfg["output_path"] == "saved_sae"
    assert runner_cfg["logger"] == {"wandb_entity": None, "run_name": "from start.sh --fast"}


def test_our_own_architecture_is_published_in_saelens_words(local_hub: LocalHub, tmp_path: Path):
    sae = random_matryoshka_sae([3, 8, 20])
    sae.save_model(tmp_path / "matryoshka")
    hub.push_to_hub(tmp_path / "matryoshka", "owner/saes")
    assert json.loads(_files(local_hub)["matryoshka/cfg.json"])["architecture"] == "jumprelu"
    x = torch.randn(5, 6)
    plain = SAE.from_pretrained("owner/saes", "matryoshka")
    assert type(plain) is JumpReLUSAE
    assert plain.encode(x).equal(sae.encode(x))
    assert hub.load("owner/saes", "matryoshka").widths == [3, 8, 20]


@pytest.mark.parametrize(
    ("architecture", "saved_as", "options"),
    [
        ("matryoshka", "jumprelu", {"k": 3}),
        ("matryoshka_topk", "topk", {"k": 3}),
        ("matryoshka_jumprelu", "jumprelu", {"target_l0": 3.0}),
        ("matryoshka_standard", "standard", {}),
    ],
)
def test_every_variant_and_its_levels(
    local_hub: LocalHub, tmp_path: Path, architecture: str, saved_as: str, options: dict[str, Any]
):
    sae_class, cfg_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    training_sae = sae_class(cfg_class(**{"d_in": 6, "d_sae": 20, "matryoshka_widths": [3, 8, 20], **options}))
    with torch.no_grad():
        for name, parameter in training_sae.named_parameters():
            parameter.copy_(torch.randn_like(parameter).abs() if "threshold" in name else torch.randn_like(parameter))
    training_sae.save_inference_model(tmp_path / "saved")
    local = MatryoshkaSAE.from_sae(training_sae)
    x = torch.randn(9, 6)
    for folder in ("saved", "ours"):  # as training saves it, and in our own architecture
        hub.push_to_hub(tmp_path / folder, "owner/saes", levels=True)
        assert json.loads(_files(local_hub)[f"{folder}/cfg.json"])["architecture"] == saved_as
        published = hub.load("owner/saes", folder)
        for level, width in enumerate([3, 8, 20]):
            torch.testing.assert_close(published.encode(x, level), local.encode(x, level))
            level_id = folder if width == 20 else f"{folder}/level_{level}_width_{width}"
            alone = SAE.from_pretrained("owner/saes", level_id)
            assert type(alone).__module__.startswith("sae_lens.")
            torch.testing.assert_close(alone.encode(x), local.encode(x, level))
        local.save_model(tmp_path / "ours")


def test_an_sae_without_levels_is_published_too(local_hub: LocalHub, tmp_path: Path):
    plain = random_matryoshka_sae([8, 20]).at_level(-1)
    plain.cfg.metadata.matryoshka_widths = None
    plain.save_model(tmp_path / "plain")
    push = hub.push_to_hub(tmp_path / "plain", "owner/saes")
    assert "### Levels" not in push.card
    assert "sae_lens_matryoshka import" not in push.card
    with pytest.raises(UserError, match="does not record levels"):
        hub.push_to_hub(tmp_path / "plain", "owner/saes", levels=True)


@pytest.mark.parametrize(
    "sae_id",
    ["", "/etc", "../up", "a/../b", "a//b", "a/", ".", "a\\b", "C:\\a", "a b", "a\n", ".git/x", "ü", "~/a", "a?b"],
)
def test_impossible_ids_are_refused_before_the_hub_is_asked(local_hub: LocalHub, saved_sae: Path, sae_id: str):
    with pytest.raises(UserError, match="is not possible"):
        hub.push_to_hub(saved_sae, "owner/saes", sae_id)
    assert local_hub.requests == []


@pytest.mark.parametrize("repo_id", ["", "saes", "a/b/c", "owner/..", "owner/sa es", "/etc/passwd", "owner/saes.git"])
def test_impossible_repositories_are_refused_before_the_hub_is_asked(
    local_hub: LocalHub, saved_sae: Path, repo_id: str
):
    with pytest.raises(UserError, match=r"is not a repository name|must name its owner"):
        hub.push_to_hub(saved_sae, repo_id)
    assert local_hub.requests == []


def _nan(folder: Path) -> None:
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"][3, 1] = float("nan")
    save_file(weights, folder / "sae_weights.safetensors")


def _other_weights(folder: Path) -> None:
    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_dec"][3, 1] += 1
    save_file(weights, folder / "sae_weights.safetensors")


def _other_setting(folder: Path) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["apply_b_dec_to_input"] = not cfg["apply_b_dec_to_input"]
    (folder / "cfg.json").write_text(json.dumps(cfg))


def _truncated(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _training_checkpoint(folder: Path) -> None:
    MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[3, 20])).save_model(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_nan, "W_dec of this SAE holds 1 values that are NaN"),
        (_truncated, "sae_weights.safetensors is truncated or damaged"),
        (_training_checkpoint, "training checkpoint"),
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "has no sae_weights.safetensors"),
        (lambda folder: (folder / "cfg.json").unlink(), "is not a saved SAE"),
        (lambda folder: (folder / "cfg.json").write_text("{"), "cfg.json cannot be read"),
        (lambda folder: (folder / "cfg.json").write_bytes(b"\xff"), "cfg.json cannot be read"),
        (lambda folder: (folder / "runner_cfg.json").write_text("[]"), "runner_cfg.json holds list"),
        (lambda folder: (folder / "levels.csv").write_text("level,width\n0,4\n"), "has figures for levels"),
        (lambda folder: (folder / "levels.csv").write_text("a,b\n0,4\n"), "levels.csv has no column width"),
        (lambda folder: (folder / "levels.csv").write_text("width\n²\n"), "is not a table of levels: width='²'"),
        (lambda folder: (folder / "levels.csv").write_text("width,l0\n3,![](x)\n"), "is not a table of levels: l0="),
        (lambda folder: (folder / "levels.csv").write_text("width\n3\n8\n20\n"), "or does not say on which; measure"),
        (_other_weights, "levels.csv has figures that were measured on other weights"),
        (_other_setting, "levels.csv has figures that were measured on other weights"),
    ],
)
def test_what_cannot_be_loaded_is_not_published(local_hub: LocalHub, saved_sae: Path, damage, message: str):
    damage(saved_sae)
    with pytest.raises(UserError, match=message):
        hub.push_to_hub(saved_sae, "owner/saes")
    assert local_hub.requests == []


def test_a_missing_folder_is_one_sentence(local_hub: LocalHub, tmp_path: Path):
    with pytest.raises(UserError, match="There is no folder"):
        hub.push_to_hub(tmp_path / "nowhere", "owner/saes")


def test_what_lies_behind_a_link_is_not_published(local_hub: LocalHub, saved_sae: Path, tmp_path: Path):
    private = save_trained_sae(tmp_path / "private", tmp_path)
    (private / "figure.png").write_bytes(png())
    (private / "results.csv").write_text("metric,value\nprivate,1\n")
    results = tmp_path / "results"
    results.mkdir()
    (results / "results.csv").write_text("metric,value\nm,1\n")
    names = [*FILES, "levels.csv"]
    for link, target in [
        *((saved_sae / name, private / name) for name in names),
        (results / "results.csv", private / "results.csv"),
        (results / "figure.png", private / "figure.png"),
        (results / "broken.png", private / "nothing"),
    ]:
        content = link.read_bytes() if link.exists() else None
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(UserError, match=rf"{link} is a link to what lies outside {link.parent}"):
            hub.push_to_hub(saved_sae, "owner/saes", results=results)
        link.unlink()
        if content is not None:
            link.write_bytes(content)
    assert local_hub.requests == []
    # a link that stays inside, and a folder that is itself a link, are fine
    (results / "figure.png").write_bytes(png())
    (results / "again.png").symlink_to("figure.png")
    (tmp_path / "link").symlink_to(saved_sae)
    assert hub.push_to_hub(tmp_path / "link", "owner/saes", results=results).changed
    # an SAE among several must lie there too
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "k_20").symlink_to(private)
    with pytest.raises(UserError, match=r"is not a saved SAE|is a link to what lies outside"):
        hub.push_to_hub(tmp_path / "sweep", "owner/saes")


def test_figures_are_pictures_and_nothing_else(local_hub: LocalHub, saved_sae: Path, tmp_path: Path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "results.csv").write_text("metric,value\nm,1\n")
    figure = results / "figure.png"
    picture = png()
    assert b"/home/alice/notebook.ipynb" in picture
    figure.write_bytes(picture + b"my diary")
    hub.push_to_hub(saved_sae, "owner/saes", results=results)
    published = _files(local_hub)[f"{ID}/figures/figure.png"]
    assert b"alice" not in published
    assert b"diary" not in published
    assert (imread(io.BytesIO(published)) == imread(io.BytesIO(picture))).all()
    for content in (b"my diary", b"\x89PNG my diary", picture[:-20], picture[:8] + picture[33:], b""):
        figure.write_bytes(content)
        with pytest.raises(UserError, match=r"figure.png is not a PNG file"):
            hub.push_to_hub(saved_sae, "owner/saes", results=results)
    with figure.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match=r"figure.png has more than 20 MB"):
        hub.push_to_hub(saved_sae, "owner/saes", results=results)


def test_of_safetensors_only_the_tensors_are_published(local_hub: LocalHub, saved_sae: Path):
    weights = load_file(saved_sae / "sae_weights.safetensors")
    save_file(weights, saved_sae / "sae_weights.safetensors", {"format": "pt", "from": "/home/alice/run"})
    sparsity = load_file(saved_sae / "sparsity.safetensors")
    save_file(sparsity, saved_sae / "sparsity.safetensors", {"from": "/home/alice/run"})
    hub.push_to_hub(saved_sae, "owner/saes")
    assert b"alice" not in b"".join(_files(local_hub).values())
    published = load(_files(local_hub)[f"{ID}/sae_weights.safetensors"])
    assert published.keys() == weights.keys()
    assert all(published[name].equal(tensor) for name, tensor in weights.items())
    for wrong in ({"diary": torch.zeros(20)}, {**sparsity, "diary": torch.zeros(3)}, {"sparsity": torch.zeros(3)}):
        save_file(wrong, saved_sae / "sparsity.safetensors")
        with pytest.raises(UserError, match=r"sparsity.safetensors holds .* instead of one number a latent"):
            hub.push_to_hub(saved_sae, "owner/saes")
    save_file({**weights, "diary": torch.zeros(3)}, saved_sae / "sae_weights.safetensors")
    with pytest.raises(UserError, match="diary"):
        hub.push_to_hub(saved_sae, "owner/saes")


def test_results_and_levels_stay_until_others_are_published(local_hub: LocalHub, saved_sae: Path, tmp_path: Path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "results.csv").write_text("metric,value,level,width\nfirst_metric,0.5,0,3\n")
    (results / "first.png").write_bytes(png())
    hub.push_to_hub(saved_sae, "owner/saes", results=results, levels=True)
    repository = local_hub.repositories["owner/saes"]
    by_hand = {f"{ID}/figures/by_hand.png": png(), f"{ID}/figures/notes.txt": b"mine"}
    repository.commit("main", {**repository.files(), **by_hand}, "by hand")

    before = _files(local_hub)
    push = hub.push_to_hub(saved_sae, "owner/saes")
    assert (push.obsolete, push.changed) == ([], False)
    assert _files(local_hub) == before
    assert f"| {ID}/level_0_width_3 |" in push.card

    # other weights: what was cut out of the old ones goes, what was measured on them stays and is called so
    save_trained_sae(saved_sae, tmp_path, seed=1)
    push = hub.push_to_hub(saved_sae, "owner/saes")
    assert push.obsolete == [f"{ID}/level_{name}/{file}" for name in ("0_width_3", "1_width_8") for file in FILES[:2]]
    assert push.card.count("These results are those of weights that were published here before.") == 1
    assert f"![first.png]({ID}/figures/first.png)" in push.card
    assert "first_metric" in push.card
    assert "level_0_width_3" not in push.card
    assert hub.push_to_hub(saved_sae, "owner/saes").card == push.card

    (results / "first.png").rename(results / "second.png")
    (results / "results.csv").write_text("metric,value\nsecond_metric,0.5\n")
    push = hub.push_to_hub(saved_sae, "owner/saes", results=results)
    assert push.obsolete == [f"{ID}/figures/first.png"]
    assert "first_metric" not in push.card
    assert "first.png" not in push.card
    assert "published here before" not in push.card
    assert by_hand.items() <= _files(local_hub).items()


def test_a_name_that_is_said_to_be_on_the_hub_must_be_there(local_hub: LocalHub, saved_sae: Path):
    cfg = json.loads((saved_sae / "cfg.json").read_text())
    cfg["metadata"] |= {"model_name": "someone/model", "dataset_path": "someone/text"}
    del cfg["metadata"]["local_paths"]
    (saved_sae / "cfg.json").write_text(json.dumps(cfg))
    push = hub.push_to_hub(saved_sae, "owner/saes", hub_names=["someone/text"])
    published = json.loads(_files(local_hub)[f"{ID}/cfg.json"])["metadata"]
    assert (published["model_name"], published["dataset_path"]) == ("model", "someone/text")
    assert "datasets: someone/text" in push.card
    assert "base_model" not in push.card
    with pytest.raises(UserError, match="No config to be published names 'someone/txt'"):
        hub.push_to_hub(saved_sae, "owner/saes", hub_names=["someone/txt"])


def test_metrics_that_paths_alone_tell_apart_are_not_mixed_up(saved_sae: Path, tmp_path: Path):
    (tmp_path / "results.csv").write_text("metric,value\n/home/alice/a/loss,1\n/home/alice/b/loss,2\n")
    with pytest.raises(UserError, match=r"two metrics in .* are called the same"):
        hub.push_to_hub(saved_sae, "owner/saes", results=tmp_path, dry_run=True)


@pytest.mark.parametrize("make_run", [tiny_run, tiny_multi_run])
def test_paths_that_a_run_was_trained_from_are_not_published_wherever_it_is_pushed_from(
    local_hub: LocalHub, tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_run
):
    (tmp_path / "models").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "models" / "acme-internal-7b").symlink_to(tinystories / "model")
    (tmp_path / "data" / "private_client").symlink_to(tinystories / "data")
    monkeypatch.chdir(tmp_path)
    names = {"model_name": "models/acme-internal-7b", "dataset_path": "data/private_client"}
    run = make_run(tinystories, None, training_tokens=10 * 128, n_checkpoints=0, **names)
    train(run, output="out", calibration_samples=200, measure_samples=200)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    push = hub.push_to_hub(tmp_path / "out", "owner/saes")
    sent = b"\n".join([*local_hub.received, *_files(local_hub).values()])
    assert b"acme-internal-7b" in sent
    assert b"models/acme" not in sent
    assert b"data/private" not in sent
    assert "base_model" not in push.card
    assert "datasets" not in push.card
    assert not any(replacement.guessed for replacement in push.replacements)
    published = SAE.from_pretrained("owner/saes", push.sae_ids[0]).cfg.metadata
    assert published.local_paths == ["model_name", "dataset_path"]
