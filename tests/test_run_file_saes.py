"""Several SAEs in a run file: what they share, what they are called, and changing one of them from the command line."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MultiSAETrainingRunnerConfig

from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.run_files.reading import read_run_file

SAE: dict[str, Any] = {"architecture": "matryoshka", "d_in": 8, "d_sae": 64, "k": 4, "matryoshka_widths": [8, 64]}
WITHOUT_K = {field: value for field, value in SAE.items() if field != "k"}
RUN: dict[str, Any] = {"model_name": "some/model", "dataset_path": "some/data", "n_batches_in_buffer": 64}
SYNTHETIC: dict[str, Any] = {"synthetic_model": {"num_features": 20, "hidden_dim": 8}}


def _file(folder: Path, **fields: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def _saes(run: dict[str, Any]) -> dict[str, Any]:
    """The configs of the SAEs of a run, by name."""
    configs = build_runner_configs(run)
    if isinstance(configs, dict):
        return {name: cfg.sae for name, cfg in configs.items()}
    return dict(configs.saes) if isinstance(configs, MultiSAETrainingRunnerConfig) else {"sae": configs.sae}


@pytest.mark.parametrize("form", ["mapping", "list"])
@pytest.mark.parametrize("kind", [{**RUN, "hook_names": "h"}, SYNTHETIC], ids=["language model", "synthetic"])
def test_a_shared_sae_and_settings_reach_every_entry_that_has_none_of_its_own(
    kind: dict[str, Any], form: str, tmp_path: Path
):
    entries: Any = {"early": {} if form == "list" else None, "late": {"k": 6, "level_weights": [1, 2]}}
    if form == "list":
        entries = [{"name": name, **own} for name, own in entries.items()]
    path = _file(tmp_path, **kind, sae=SAE, saes=entries)
    settings = ["sae.d_sae=128", "sae.matryoshka_widths=[16,128]", "saes.late.aux_loss_coefficient=0.5", "sae.k=5"]
    settings += ["saes.early.topk_threshold_lr=0.5"]
    saes = _saes(read_run_file(path, settings))
    assert {name: sae.k for name, sae in saes.items()} == {"early": 5, "late": 6}
    assert {name: sae.level_weights for name, sae in saes.items()} == {"early": None, "late": [1, 2]}
    assert {name: sae.aux_loss_coefficient for name, sae in saes.items()} == {"early": 1.0, "late": 0.5}
    assert {name: sae.topk_threshold_lr for name, sae in saes.items()} == {"early": 0.5, "late": 0.01}
    assert all((sae.d_sae, sae.matryoshka_widths) == (128, [16, 128]) for sae in saes.values())
    saes = _saes(read_run_file(path, [], unset=["saes.late.k", "saes.late.level_weights"]))
    assert {name: sae.k for name, sae in saes.items()} == {"early": 4, "late": 4}


def test_unnamed_entries_are_called_by_what_they_share_too(tmp_path: Path):
    path = _file(tmp_path, **SYNTHETIC, sae=WITHOUT_K, saes=[{"k": 2.5}, {"k": 3}])
    saes = _saes(read_run_file(path, ["saes.matryoshka_k2.5.d_sae=128", "saes.1.matryoshka_widths=[4,64]"]))
    assert {name: (sae.d_sae, sae.matryoshka_widths[0]) for name, sae in saes.items()} == {
        "matryoshka_k2.5": (128, 8),
        "matryoshka_k3": (64, 4),
    }


def test_shared_lists_are_not_one_list():
    shared = {**SAE, "architecture": "matryoshka_batchtopk", "matryoshka_widths": [8]}
    saes = _saes({**SYNTHETIC, "sae": shared, "saes": {"small": {}, "large": {"d_sae": 128}}})
    for sae in saes.values():
        MatryoshkaBatchTopKTrainingSAE(sae)  # which appends a missing full width
    assert [sae.matryoshka_widths for sae in saes.values()] == [[8, 64], [8, 128]]
    assert shared["matryoshka_widths"] == [8]


@pytest.mark.parametrize(
    ("fields", "settings", "unset", "message"),
    [
        ({"saes": {"early": SAE, "late": SAE}}, ["sae.k=9"], [], r"sae.k=9 is used by none of saes.*set saes.NAME.k"),
        ({"saes": {"early": SAE}}, ["saes.earyl.k=9"], [], "saes has no 'earyl'; it has early"),
        ({"saes": [{**SAE, "name": "a"}]}, ["saes.b.k=9"], [], r"an index from 0 to 0 or a name \(a\) in place of 'b'"),
        ({"sae": SAE}, [], ["sae.kk"], "--unset sae.kk: there is no such field to take out; there are .*d_sae"),
        ({"sae": SAE}, [], ["sea.k"], "--unset sea.k: there is no such field to take out; there are .*sae"),
        ({"sae": SAE}, [], ["sae.k.x"], "--unset sae.k.x reaches into sae.k, a plain value"),
    ],
)
def test_what_cannot_be_set_or_taken_out(
    fields: dict[str, Any], settings: list[str], unset: list[str], message: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        build_runner_configs(read_run_file(_file(tmp_path, **SYNTHETIC, **fields), settings, unset))


def test_a_field_of_another_architecture_is_taken_out_as_the_error_says(tmp_path: Path):
    fields = {**SYNTHETIC, "sae": SAE, "saes": {"early": {}, "late": {"use_matryoshka_aux_loss": True}}}
    path = _file(tmp_path, **fields)
    settings, unset = ["sae.architecture=matryoshka_jumprelu"], []
    for field in ("sae.k", "saes.late.use_matryoshka_aux_loss"):
        with pytest.raises(ConfigError, match=f"{field} is not a field of .* --unset {field} takes it out"):
            build_runner_configs(read_run_file(path, settings, unset))
        unset.append(field)
    assert {sae.architecture() for sae in _saes(read_run_file(path, settings, unset)).values()} == {
        "matryoshka_jumprelu"
    }


@pytest.mark.parametrize(
    "name",
    [
        "..", ".", ".hidden", "", " ", "a/b", "../b", "/etc", r"a\b", "C:", "a<b", 'a"b', "a|b", "a?b", "a*b", "a\nb",
        "a\x00b", "a\x7fb", "a\u202eb", "end.", "end ", " start", "nul", "COM1.x", "runner_cfg.json", "x" * 201,
        "\U0001f40d" * 51,
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["mapping", "list", "architecture", "k"])
def test_names_are_one_folder_on_every_system(name: str, form: str):
    saes: Any = {
        "mapping": {name: SAE},
        "list": [{**SAE, "name": name}],
        "architecture": [{**WITHOUT_K, "architecture": name}],
        "k": [{**SAE, "k": f"/{name}"}],
    }[form]
    with pytest.raises(ConfigError, match="in saes cannot be that of a folder, since it"):
        build_runner_configs({**SYNTHETIC, "saes": saes})


def test_names_given_from_python_are_text_or_whole_numbers():
    assert _saes({**SYNTHETIC, "saes": {1: SAE}}).keys() == {"1"}
    for saes, message in (
        ({True: SAE}, "The name True in saes must be text"),
        ({1: SAE, "1": SAE}, "Two entries of saes are called '1'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_runner_configs({**SYNTHETIC, "saes": saes})


@pytest.mark.parametrize(("first", "second"), [("Early", "early"), ("caf\u00e9", "cafe\u0301"), ("a", "a")])
def test_names_that_are_one_folder_on_some_system(first: str, second: str):
    with pytest.raises(ConfigError, match=r"are the same folder on some systems|Two entries of saes are called"):
        build_runner_configs({**SYNTHETIC, "saes": [{**SAE, "name": first}, {**SAE, "name": second}]})


def test_numbers_are_read_as_text(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(f"{yaml.safe_dump({**RUN, 'sae': SAE})}\nsaes: {{1: {{}}, 007: {{}}, on: {{}}}}\nhook_names: h")
    assert list(_saes(read_run_file(path, ["saes.1.d_sae=128"]))) == ["1", "007", "on"]
    in_python = _saes({**RUN, "saes": {1: SAE}, "hook_names": {1: "h"}})
    assert list(in_python) == ["1"]
    assert list(_saes({**SYNTHETIC, "saes": [{**SAE, "name": 7}]})) == ["7"]
    with pytest.raises(ConfigError, match="name=True in saes must be text; put it in quotes"):
        build_runner_configs({**SYNTHETIC, "saes": [{**SAE, "name": True}]})


def test_a_field_that_is_given_twice(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("sae: {k: 3}\nlr: 1e-3\nsae: {k: 4}\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: 'sae' is given twice .* line 3"):
        read_run_file(path)
    path.write_text("a: &a {k: 3, d_in: 8}\nsae: {<<: *a, k: 4}\n")  # merged is not given
    assert read_run_file(path)["sae"] == {"k": 4, "d_in": 8}
