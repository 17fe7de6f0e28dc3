"""Time and memory of evaluating all five levels of an SAE, beside SAEBench's own run on the full SAE alone.

Both get the same model, texts and SAE: random decoder directions, the encoder tied to them, a threshold that fires 16
latents a token. Each run has a process of its own; importing and loading the model do not count. Memory is the peak
above what the process held before. SAEBench's data sets are replaced by snippets of TinyStories in five classes.

    python benchmarks/evaluate_levels.py --tinystories ../shared/tinystories
    python benchmarks/evaluate_levels.py --tinystories ../shared/tinystories --d-sae 16384 --repeats 1
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata
from train_step import _status_bytes, machine

from sae_lens_matryoshka import (
    MatryoshkaJumpReLUSAE,
    MatryoshkaJumpReLUSAEConfig,
    MatryoshkaSAE,
    calibrate_threshold,
    paper_widths,
)
from sae_lens_matryoshka.bench import (
    Absorption,
    ActivationSource,
    ConceptErasure,
    LabelledText,
    SparseProbing,
    levels,
    load_model,
    upstream,
)
from sae_lens_matryoshka.bench.evaluated_saes import Hook
from sae_lens_matryoshka.bench.word_prompts import WordPrompts

EVALUATIONS = ["sparse_probing", "tpp", "absorption"]
HOOK = Hook("blocks.2.hook_resid_post", 2)
DATA_SET = "LabHC/bias_in_bios_class_set1"  # SAEBench knows its five classes; the texts are ours
N_TRAIN, N_TEST = 1000, 400
CONTEXT_LENGTH = 128
RULES = {
    "0": r'"',
    "1": r"(?is)^(?=.*\b(she|her)\b)(?=.*\b(he|his|him)\b)",
    "2": r"(?i)\b(she|her)\b",
    "6": r"(?i)\b(he|his|him)\b",
    "9": r"",
}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tinystories", type=Path, required=True, help="folder with model/ and data/")
    parser.add_argument("--evaluations", nargs="+", default=EVALUATIONS, choices=EVALUATIONS)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, taking turns; the fastest counts")
    parser.add_argument("--measure", nargs=2, metavar=("WHO", "EVALUATION"), help="print one run's seconds and MB")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.measure:
        print(json.dumps(measure(options.measure[0], options.measure[1], options.tinystories, options.d_sae)))
        return
    print(f"{machine('cpu')}; d_sae {options.d_sae}\n")
    print("| evaluation | SAEBench, full SAE | five levels | ratio | SAEBench, peak MB | five levels | ratio |")
    print("|---|---|---|---|---|---|---|")
    for evaluation in options.evaluations:
        runs: dict[str, list[tuple[float, float]]] = {"saebench": [], "ours": []}
        for _ in range(options.repeats):
            for who, measured in runs.items():
                measured.append(measure_in_process(who, evaluation, options))
        (their_time, their_memory), (our_time, our_memory) = (
            (min(time for time, _ in measured), min(memory for _, memory in measured)) for measured in runs.values()
        )
        print(
            f"| {evaluation} | {their_time:.1f} s | {our_time:.1f} s | {our_time / their_time:.2f}x "
            f"| {their_memory:.0f} | {our_memory:.0f} | {our_memory / their_memory:.2f}x |",
            flush=True,
        )


def measure_in_process(who: str, evaluation: str, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds and peak MB of one run."""
    command = [sys.executable, __file__, "--tinystories", str(options.tinystories), "--d-sae", str(options.d_sae)]
    done = subprocess.run([*command, "--measure", who, evaluation], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds, megabytes = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, megabytes


def measure(who: str, evaluation: str, tinystories: Path, d_sae: int) -> tuple[float, float]:
    """Run an evaluation, ``ours`` on all levels or ``saebench`` on the full SAE."""
    model = load_model(tinystories / "model")
    texts = snippets(tinystories / "data" / "train.jsonl")
    sae = random_sae(model, texts, d_sae)
    with tempfile.TemporaryDirectory() as folder:
        run = ours if who == "ours" else saebench
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, start = _status_bytes("VmRSS"), time.perf_counter()
        run(evaluation, sae, model, texts, Path(folder))
        seconds = time.perf_counter() - start
    return seconds, (_status_bytes("VmHWM") - before) / 2**20


def ours(evaluation: str, sae: MatryoshkaSAE, model: Any, texts: dict[str, list[str]], folder: Path) -> None:
    """All levels, as a user evaluates them."""
    data = [LabelledText(DATA_SET, texts, {label: of_class[::-1] for label, of_class in texts.items()})]
    adapters = {
        "sparse_probing": lambda: SparseProbing(config(evaluation), data),
        "tpp": lambda: ConceptErasure(config(evaluation), data),
        "absorption": lambda: Absorption(config(evaluation)),
    }
    adapters[evaluation]().run(levels("random", sae), ActivationSource(model), folder)


def saebench(evaluation: str, sae: MatryoshkaSAE, model: Any, texts: dict[str, list[str]], folder: Path) -> None:
    """SAEBench's ``run_eval`` on the full SAE, with model and texts handed to it in place of downloads."""
    from sae_bench.evals.sparse_probing import main as sparse_probing_main

    main = {
        "sparse_probing": sparse_probing_main,
        "tpp": upstream.scr_and_tpp_main,
        "absorption": upstream.absorption_main,
    }[evaluation]
    settings = config(evaluation)
    given = WordPrompts(model, HOOK, settings.prompt_token_pos) if evaluation == "absorption" else model
    main.HookedTransformer.from_pretrained_no_processing = lambda *_, **__: given

    def by_class(_: str, n_train: int, n_test: int, __: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        train = {label: of_class[: n_train // 2] for label, of_class in texts.items()}
        return train, {label: of_class[::-1][: n_test // 2] for label, of_class in texts.items()}

    upstream.dataset_utils.get_multi_label_train_test_data = by_class
    full = [("random", sae.at_level(-1))]
    with upstream.contained():
        if evaluation == "absorption":
            for name in ("run_k_sparse_probing_experiment", "run_feature_absortion_experiment"):
                folders = {"probes_dir": folder / "probes", "experiment_dir": folder / name}
                if "absortion" in name:
                    folders["sparse_probing_experiment_dir"] = folder / "run_k_sparse_probing_experiment"
                setattr(main, name, functools.partial(getattr(main, name), **folders))
            os.chdir(folder)
            upstream.seed_everything(settings.random_seed)
            main.run_eval(settings, full, "cpu", str(folder))
        else:
            main.run_eval(settings, full, "cpu", str(folder), artifacts_path=str(folder / "artifacts"))


def config(evaluation: str) -> Any:
    """SAEBench's defaults with a quarter of the texts, and for absorption with thresholds for a small model."""
    sizes = {
        "dataset_names": [DATA_SET],
        "context_length": CONTEXT_LENGTH,
        "llm_batch_size": 64,
        "llm_dtype": "float32",
    }
    if evaluation == "sparse_probing":
        return upstream.SparseProbingEvalConfig(
            probe_train_set_size=N_TRAIN, probe_test_set_size=N_TEST, model_name="tinystories", **sizes
        )
    if evaluation == "tpp":
        return upstream.ScrAndTppEvalConfig(
            perform_scr=False, train_set_size=N_TRAIN, test_set_size=N_TEST, model_name="tinystories", **sizes
        )
    return upstream.AbsorptionEvalConfig(
        model_name="tinystories",
        prompt_template="{word}",
        prompt_token_pos=-1,
        min_GT_probe_f1=0.05,
        min_feats_for_eval=2,
    )


def random_sae(model: Any, texts: dict[str, list[str]], d_sae: int) -> MatryoshkaSAE:
    """An untrained SAE that fires 16 latents a token."""
    torch.manual_seed(0)
    sae = MatryoshkaJumpReLUSAE(
        MatryoshkaJumpReLUSAEConfig(model.cfg.d_model, d_sae, matryoshka_widths=paper_widths(d_sae))
    )
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn_like(sae.W_dec), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
        tokens = model.to_tokens(texts["0"][:64])[:, :48]
        _, cache = model.run_with_cache(tokens, names_filter=[HOOK.name])
    calibrate_threshold(sae, [cache[HOOK.name].flatten(0, 1)], target_l0=16)
    sae.cfg.metadata = SAEMetadata(hook_name=HOOK.name, model_name="tinystories", prepend_bos=True)
    return sae


def snippets(path: Path) -> dict[str, list[str]]:
    """Three sentences a text, by the first rule that fits."""
    by_class: dict[str, list[str]] = {label: [] for label in RULES}
    for line in path.read_text(encoding="utf-8").splitlines():
        sentences = re.split(r'(?<=[.!?"])\s+', json.loads(line)["text"].strip())
        for start in range(len(sentences) - 2):
            text = " ".join(sentences[start : start + 3])
            by_class[next(label for label, rule in RULES.items() if re.search(rule, text))].append(text)
    n = min(map(len, by_class.values()))
    return {label: of_class[:n] for label, of_class in by_class.items()}


if __name__ == "__main__":
    main()
