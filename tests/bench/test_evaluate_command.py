"""The command as a user meets it: local data, results, table, figures, reruns, mistakes."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter
from sae_bench.sae_bench_utils import graphing_utils
from sae_lens import GatedSAE, GatedSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka import MatryoshkaSAE, MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.bench import load_results, upstream
from sae_lens_matryoshka.bench.figures import plot_results
from sae_lens_matryoshka.bench.results import headline_table
from sae_lens_matryoshka.cli.command_line import main
from sae_lens_matryoshka.untrusted.csv_tables import read_csv
from tests.bench.fixtures import HOOK
from tests.saved.test_dictionary_learning import fake_checkpoint

QUICK = {
    "sparse_probing": {"probe_train_set_size": 40, "probe_test_set_size": 20, "context_length": 16, "k_values": "[1]"},
    "tpp": {"train_set_size": 40, "test_set_size": 20, "context_length": 16, "n_values": "[2, 20]", "probe_epochs": 1},
    "core": {
        "context_size": 32, "batch_size_prompts": 4, "n_eval_reconstruction_batches": 1,
        "n_eval_sparsity_variance_batches": 2,
    },
    "meta_structure": {"train_steps": 5, "autocast": "false"},
}  # fmt: skip


@pytest.fixture
def arguments(sae: MatryoshkaSAE, snippets: dict[str, list[str]], tinystories: Path, tmp_path: Path) -> list[str]:
    """A Matryoshka SAE, a plain one, and a file of labelled text."""
    sae.save_model(tmp_path / "matryoshka")
    plain = sae.at_level(1)
    plain.cfg.metadata.matryoshka_widths = None
    plain.save_model(tmp_path / "plain")
    rows = [{"text": text, "label": label} for label, texts in snippets.items() for text in texts]
    pd.DataFrame(rows).to_json(tmp_path / "kinds.jsonl", orient="records", lines=True)
    return [
        "evaluate",
        str(tmp_path / "matryoshka"),
        f"baseline={tmp_path / 'plain'}",
        *("--model", str(tinystories / "model")),
        *("--data", f"kinds={tmp_path / 'kinds.jsonl'}"),
        *("--text", str(tinystories / "data" / "validation.jsonl")),
        *("--output", str(tmp_path / "out")),
        *("--cache", str(tmp_path / "cache")),
    ]


def _evals(*names: str) -> list[str]:
    """Arguments that choose evaluations and make them quick."""
    settings = [f"{name}.{field}={value}" for name in names for field, value in QUICK[name].items()]
    return ["--evals", ",".join(names), *(part for setting in settings for part in ("--set", setting))]


def test_everything_from_the_command_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    evals = _evals(*QUICK)
    evals[1] = evals[1].replace(",", ", ")
    assert main([*arguments, *evals, "--levels", "-1,0", "--device", "auto"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"│ matryoshka +│ 2 +│ 128 +│ \d+\.\d +│ 0\.\d{3}", printed)
    assert re.search(r"│ baseline +│ +│ 48 +│ \d+\.\d +│ 0\.\d{3}", printed)
    assert "Cache in" in printed
    assert list(folder.iterdir()) == []

    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {
        "sparse_probing", "tpp", "core", "meta_structure", "results.csv", "metrics_by_width.png", "metrics_by_l0.png",
    }  # fmt: skip
    results = load_results(output)
    assert list(results.columns) == [
        "sae", "level", "width", "evaluation", "metric", "value", "standard_error", "l0", "weights",
    ]  # fmt: skip
    assert len(pd.read_csv(output / "results.csv")) == len(results)
    table = headline_table(results)
    assert table[["sae", "width"]].values.tolist() == [
        ["baseline", 48], ["baseline_random", 48], ["matryoshka", 16], ["matryoshka", 128],
        ["matryoshka_random", 16], ["matryoshka_random", 128], ["model channels", 64],
    ]  # fmt: skip
    assert table["TPP, 20 latents"].count() == 2  # no 20 latents in a level of 16, and not for baselines
    assert table["sparse probing, top 1 standardized"].count() == 7
    assert table["l0"].count() == 6
    errors = headline_table(results, "standard_error")
    assert errors["sparse probing, top 1"].between(0.01, 0.1).all()
    assert "After ±: the standard error" in printed
    assert "should not decide between SAEs (arXiv:2605.18229)" in printed
    l0 = table.set_index(["sae", "width"])["l0"]
    for sae, width in (("baseline", 48), ("matryoshka", 16), ("matryoshka", 128)):  # the same on the text of baselines
        assert l0[f"{sae}_random", width] == pytest.approx(l0[sae, width], rel=0.5)

    # SAEBench's schema, and SAEBench's own plots read the files
    paths = sorted(output.glob("tpp/*.json"))
    assert [path.name for path in paths] == [  # no baselines
        "baseline_custom_sae_eval_results.json",
        "matryoshka_level_0_eval_results.json",
        "matryoshka_level_2_eval_results.json",
    ]
    for path in paths:
        TypeAdapter(upstream.TppEvalOutput).validate_json(path.read_text())
    core = sorted(str(path) for path in output.glob("core/*.json") if "_random_" not in path.name)
    read = graphing_utils.get_eval_results(list(map(str, paths)))
    assert set(read) == set(graphing_utils.get_core_results(core))


def test_few_texts_are_said_and_never_mixed_with_all(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments += [
        "--evals",
        "sparse_probing",
        "--set",
        "sparse_probing.k_values=[1]",
        "--levels",
        "0",
        "--no-baselines",
    ]
    assert main([*arguments, "--limit-texts", "10"]) == 0
    capsys.readouterr()
    config = json.loads(next((tmp_path / "out" / "sparse_probing").glob("matryoshka*")).read_text())["eval_config"]
    assert (config["probe_train_set_size"], config["probe_test_set_size"]) == (20, 20)
    assert main(arguments) == 1
    assert "probe_train_set_size=20, now 4000" in capsys.readouterr().err
    limited = load_results(tmp_path / "out")
    assert main([*arguments, "--force"]) == 0  # from the same cache
    pd.testing.assert_series_equal(
        load_results(tmp_path / "out")["standard_error"].lt(limited["standard_error"]).tail(3),
        pd.Series([True] * 3), check_index=False, check_names=False,
    )  # fmt: skip
    assert {"model channels", "matryoshka"} <= set(limited["sae"])
    assert not limited["sae"].str.contains("random").any()


def test_channels_are_a_row_of_the_table_once_for_each_hook(arguments: list[str], tmp_path: Path):
    arguments += [*_evals("sparse_probing"), "--levels", "0", "--no-baselines"]
    assert main(arguments) == 0
    results = load_results(tmp_path / "out")
    channels = results[results["sae"] == "model channels"].set_index("metric")["value"]
    llm = results[(results["sae"] == "matryoshka") & results["metric"].str.startswith("llm_")]
    assert len(channels) == len(llm) == 3
    for metric, value in zip(llm["metric"], llm["value"], strict=True):
        assert channels[metric.replace("llm_", "sae_")] == value
    assert main([*arguments, "--hook", "blocks.1.hook_resid_post", "--force", "--output", str(tmp_path / "other")]) == 0
    for path in (tmp_path / "other" / "sparse_probing").iterdir():
        path.rename(tmp_path / "out" / "sparse_probing" / path.name.replace("_level", "2_level"))
    names = set(load_results(tmp_path / "out", warn=lambda _: None)["sae"])
    assert {"model channels of blocks.1.hook_resid_post", f"model channels of {HOOK}"} <= names


def test_a_rerun_keeps_what_is_finished(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments += [*_evals("meta_structure"), "--levels", "0"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "was not used: core was not among the evaluations" in printed
    assert "kinds.jsonl was not used: no evaluation has read it" in printed
    (path,) = (tmp_path / "out" / "meta_structure").glob("matryoshka*.json")
    first = path.read_text()
    assert main(arguments) == 0
    assert path.read_text() == first
    capsys.readouterr()

    changed = [*arguments, "--set", "meta_structure.random_seed=1"]
    assert main(changed) == 1
    assert "was made with random_seed=42, now 1" in capsys.readouterr().err
    assert path.read_text() == first
    with (tmp_path / "matryoshka" / "cfg.json").open("r+") as file:
        cfg = json.load(file)
        cfg["apply_b_dec_to_input"] = not cfg["apply_b_dec_to_input"]
        file.seek(0)
        json.dump(cfg, file)
        file.truncate()
    assert main(arguments) == 1
    assert "was made with other parameters of the SAE. Choose another output" in capsys.readouterr().err
    assert main([*changed, "--force"]) == 0
    assert json.loads(path.read_text())["eval_config"]["random_seed"] == 1


def test_names_are_text_in_table_csv_and_figures(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    name = "@[b]$_$"
    arguments[2] = f"{name}={tmp_path / 'plain'}"
    output = tmp_path / "out[" / "b]"
    assert main([*arguments, *_evals("meta_structure"), "--levels", "0", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert f"│ {name} " in printed
    assert f"are in {output}" in printed
    assert (output / "metrics_by_width.png").stat().st_size > 10_000
    assert set(load_results(output)["sae"]) == {name, "matryoshka"}
    assert set(pd.read_csv(output / "results.csv")["sae"]) == {f"'{name}", "matryoshka"}  # no formula
    assert {row["sae"] for row in read_csv(output / "results.csv")} == {name, "matryoshka"}


def test_a_result_of_somebody_elses_is_passed_over_if_its_types_are_wrong(tmp_path: Path):
    (tmp_path / "core").mkdir()
    good = {
        "sae_lens_release_id": "ours", "sae_lens_id": "level_0", "sae_cfg_dict": {"d_sae": 8},
        "eval_result_metrics": {"sparsity": {"l0": 2.0}},
    }  # fmt: skip
    changes = [
        {}, {"sae_lens_release_id": 5}, {"sae_cfg_dict": {"d_sae": "8"}}, {"sae_lens_id": None},
        {"eval_result_metrics": {"sparsity": {"l0": "2"}}}, {"eval_result_metrics": {"sparsity": {"l0": [2]}}},
    ]  # fmt: skip
    for index, change in enumerate(changes):
        (tmp_path / "core" / f"{index}_eval_results.json").write_text(json.dumps({**good, **change}))
    (tmp_path / "core" / "deep_eval_results.json").write_text("[" * 100_000)
    passed_over: list[str] = []
    results = load_results(tmp_path, passed_over.append)
    assert len(passed_over) == len(changes)
    assert results[["sae", "level", "width", "value"]].values.tolist() == [["ours", 0, 8, 2.0]]


def test_the_model_that_an_sae_records_is_not_looked_for_on_the_hub_if_it_was_a_folder(
    arguments: list[str], sae: MatryoshkaSAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sae.cfg.metadata.model_name, sae.cfg.metadata.local_paths = "models/gpt2", ["model_name"]
    sae.save_model(tmp_path / "matryoshka")
    at = arguments.index("--model")
    del arguments[at : at + 2]
    assert main(arguments) == 1
    assert "error: The SAE was trained on 'models/gpt2', a local model that is not here" in capsys.readouterr().err


def test_an_sae_that_is_not_in_a_folder_is_not_looked_for_on_the_hub(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # matryoshka, a folder here, could be somebody's release there
    assert main(["evaluate", "matryoshka:wrong_id", *arguments[3:]]) == 1
    assert "error: There is no saved SAE at matryoshka/wrong_id" in capsys.readouterr().err


def test_what_cannot_be_fetched_is_named_and_the_rest_is_done(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    at = arguments.index("--data")
    del arguments[at : at + 2]
    settings = ["--set", "tpp.dataset_names=[LabHC/bias_in_bios_class_set1]"]
    assert main([*arguments, *_evals("tpp", "meta_structure"), *settings, "--levels", "0"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: tpp failed: The data set 'LabHC/bias_in_bios_class_set1' cannot be fetched")
    assert set(load_results(tmp_path / "out")["evaluation"]) == {"meta_structure"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--evals", "tp"], "There is no evaluation 'tp'; choose from sparse_probing, tpp"),
        (["--evals", "core", "--set", "core.contxt_size=3"], "CoreEvalConfig; did you mean 'context_size'?"),
        (
            ["--evals", "core", "--set", "core.context_size=many"],
            "core.context_size='many': Input should be a valid integer",
        ),
        (["--evals", "core", "--set", "tpp.n_values=[1]"], "'tpp' is not among the evaluations to run (core)"),
        (["--evals", "core", "--set", "n_values=[1]"], "must be EVALUATION.FIELD=VALUE"),
        (["--levels", "first"], "--levels 'first' must be all, or whole numbers"),
        (["--levels", "7"], "matryoshka: level 7 is out of range"),
        (["--data", "kinds.csv"], "--data 'kinds.csv' must be NAME=FILE"),
        (["--data", "kinds=KINDS"], "Two files of --data have the same name, of kinds, kinds"),
        (["--evals", "core", "--set", "core.dataset=x"], "--set core.dataset=x name two texts for core; leave one out"),
        (["--evals", "core", "--limit-texts", "20"], "--limit-texts is for scr, sparse_probing,"),
        (["--evals", "tpp", "--limit-texts", "2"], "--limit-texts 2 are too few texts for a probe; give 10 or more"),
        (
            ["--evals", "core", "--absorption-max-words", "500"],
            "--absorption-max-words is for absorption, which is not",
        ),
        (["--evals", "absorption", "--absorption-max-words", "20"], "max_words=20 must be 130 or more"),
        (
            ["--data", "few=FEW"],
            "Class 'b' of data set 'few' has too few texts for a probe: 1 to train on and 1 to test",
        ),
        (["--evals", "core", "--text", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["--device", "cuda:7"], "--device='cuda:7' cannot be used on this machine"),
        (
            [".hidden=matryoshka"],
            "The name '.hidden' of .hidden=matryoshka cannot be that of result files, since it begins",
        ),
        (["--model", "nobody/nothing"], "The model 'nobody/nothing' cannot be loaded"),
        (["--evals", "meta_structure", "--hook", "somewhere"], "hook_name='somewhere' is not a hook of a block"),
    ],
)
def test_mistakes_are_one_sentence(
    changes: list[str], message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parts = [("a", "train"), ("a", "train"), ("a", "test"), ("b", "train"), ("b", "test")]
    rows = [{"text": "A text", "label": label, "split": split} for label, split in parts]
    pd.DataFrame(rows).to_json(tmp_path / "few.jsonl", orient="records", lines=True)
    for name in ("kinds", "few"):
        changes = [change.replace(name.upper(), str(tmp_path / f"{name}.jsonl")) for change in changes]
    is_sae = not changes[0].startswith("--")
    assert main([*arguments[:1], *changes, *arguments[1:]] if is_sae else [*arguments, *changes]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("out/*/*.json"))


def _with_sae(arguments: list[str], *saes: str) -> list[str]:
    return ["evaluate", *saes, *arguments[3:]]


def test_saes_without_recorded_widths_and_of_other_formats(arguments: list[str], tmp_path: Path):
    """A plain SAE of another architecture, the same file with and without levels, and dictionary_learning's."""
    gated = GatedSAE(GatedSAEConfig(64, 24, metadata=SAEMetadata(hook_name=HOOK)))
    gated.save_model(tmp_path / "gated=0")
    (tmp_path / "ae").mkdir()
    torch.save(fake_checkpoint(64, [8, 24]), tmp_path / "ae" / "ae.pt")
    saes = ["levels", "whole"]
    named = [*(f"{name}={tmp_path / 'plain'}" for name in saes), str(tmp_path / "gated=0"), str(tmp_path / "ae")]
    options = [*_evals("meta_structure"), "--widths", "levels=16,48", "--hook", HOOK]
    assert main([*_with_sae(arguments, *named), *options]) == 0
    results = load_results(tmp_path / "out")
    widths = results.drop_duplicates(["sae", "level"]).set_index("sae")["width"]
    assert widths.groupby(level=0).apply(list).to_dict() == {
        "ae": [8, 32], "gated=0": [24], "levels": [16, 48], "whole": [48],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("saes", "options", "message"),
    [
        (["matryoshka"], ["--widths", "16,128"], "widths=[16, 128] contradict this SAE's own, [16, 48, 128]"),
        (["plain"], ["--widths", "ten"], "--widths 'ten' must be whole numbers separated by commas"),
        (["plain"], ["--widths", "16,49"], "49 is above d_sae=48"),
        (["plain", "matryoshka"], ["--widths", "16,48"], "must be NAME=WIDTHS, NAME one of plain, matryoshka"),
        (["plain"], ["--widths", "other=16,48"], "must be NAME=WIDTHS, NAME one of plain"),
        (["gated"], ["--widths", "4,24"], "gated cannot be loaded: Levels can be given to SAEs of the architectures"),
        (["nan"], [], "W_dec of this SAE holds 1 values that are NaN or infinite"),
        (["nowhere"], [], "There is no saved SAE at"),
        (["checkpoint"], [], "is a training checkpoint, not a saved SAE"),
        (["nobody/nothing:x"], [], "nobody/nothing"),
    ],
)  # fmt: skip
def test_saes_that_cannot_be_used_are_one_sentence(
    saes: list[str], options: list[str], message: str, arguments: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sae_lens_matryoshka.bench.load_model", lambda *_: pytest.fail("the model was loaded"))
    gated = GatedSAE(GatedSAEConfig(64, 24))
    gated.save_model(tmp_path / "gated")
    with torch.no_grad():
        gated.W_dec[0, 0] = torch.nan
    gated.save_model(tmp_path / "nan")
    config = MatryoshkaTrainingSAEConfig(64, 24, k=3, matryoshka_widths=[5, 24])
    MatryoshkaTrainingSAE(config).save_model(tmp_path / "checkpoint")
    assert main([*_with_sae(arguments, *saes), *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("name", [".hidden", "..", "a/b", "con", "x" * 300])
def test_names_that_cannot_be_those_of_result_files_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", f"{name}=nowhere", "--evals", "meta_structure", "--output", str(tmp_path / "out")]) == 1
    assert "cannot be that of result files, since it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_figures_of_one_evaluation_without_l0(tmp_path: Path):
    rows = [
        {"sae": name, "level": level, "width": width, "evaluation": "absorption", "value": value, "l0": float("nan")}
        for name, level, width, value in (("a", 0, 8, 0.1), ("a", 1, 16, 0.2), ("b", None, 16, 0.3))
    ]
    results = pd.DataFrame(rows).assign(metric="mean_absorption_fraction_score").astype({"level": "Int64"})
    assert [path.name for path in plot_results(results, tmp_path)] == ["metrics_by_width.png"]
