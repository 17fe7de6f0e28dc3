"""Train a Matryoshka SAE and a plain BatchTopK SAE on TinyStories and run every evaluation on both, level by level.

Everything is local and takes some ten minutes on two CPU cores:

    python examples/evaluate_tinystories.py --tinystories $TINYSTORIES --output runs/evaluate_tinystories

``get_tinystories.py`` makes the folder: a Hugging Face model in ``model/`` and stories in ``data/train.jsonl`` and
``data/validation.jsonl``.
Probes are trained on snippets of the former and tested on snippets of the latter. What a snippet is about is decided by
rule.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from sae_lens import SAE

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench import (
    Absorption,
    Cache,
    ConceptErasure,
    Core,
    Evaluation,
    LabelledText,
    MetaStructure,
    SparseProbing,
    evaluate,
    headline_table,
    levels,
)
from sae_lens_matryoshka.bench.upstream import (
    AbsorptionEvalConfig,
    CoreEvalConfig,
    MetaStructureEvalConfig,
    ScrAndTppEvalConfig,
    SparseProbingEvalConfig,
)
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.training.run import train

MODEL_NAME = "stories260K"
HOOK_NAME = "model.layers.2"
WIDTHS = [64, 192, 448, 960, 2048]
K = 16
CONTEXT_LENGTH = 64


def main() -> None:
    """Train what is not there yet, evaluate what is not evaluated yet, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tinystories", type=Path, required=True, help="folder with model/ and data/")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluate_tinystories"))
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training tokens of each SAE")
    options = parser.parse_args()
    saes = [
        evaluated
        for name in ("matryoshka", "batchtopk")
        for evaluated in levels(name, trained_sae(name, options.tinystories, options.output / name, options.tokens))
    ]
    report = evaluate(
        saes,
        options.tinystories / "model",
        options.output / "evaluations",
        evaluations(options.tinystories / "data"),
        cache=Cache(options.output / "cache"),
    )
    print(headline_table(report.results).to_markdown(index=False, floatfmt=".3f"))
    for sentence in [*report.failures.values(), *report.skipped]:
        print(sentence)


def trained_sae(architecture: str, tinystories: Path, output: Path, n_tokens: int) -> SAE:
    """The SAE in a folder, trained first if it is not there: equal width, k, tokens and seed for both architectures."""
    if not (output / "cfg.json").is_file():
        run = read_run_file(
            "tinystories",
            [
                f"model_name={tinystories / 'model'}",
                f"dataset_path={tinystories / 'data'}",
                f"hook_name={HOOK_NAME}",
                "streaming=false",
                f"training_tokens={n_tokens}",
                "lr=4e-3",
                "lr_warm_up_steps=0",
                f"lr_decay_steps={n_tokens // 2048 // 5}",
                "dead_feature_window=50",
                "checkpoint_path=null",
                "device=cpu",
            ],
        )
        run["sae"] = {"architecture": architecture, "d_in": 64, "d_sae": WIDTHS[-1], "k": K}
        if architecture == "matryoshka":
            run["sae"] |= {"matryoshka_widths": WIDTHS, "use_matryoshka_aux_loss": True}
        train(run, output)
    sae = SAE.load_from_disk(output)
    return MatryoshkaSAE.from_sae(sae) if architecture == "matryoshka" else sae


def evaluations(data: Path) -> list[Evaluation]:
    """Every evaluation, with SAEBench's configs fitted to a model of 260,000 parameters."""
    kind = LabelledText(
        "kind of snippet", snippets(data / "train.jsonl", kind_of), snippets(data / "validation.jsonl", kind_of)
    )
    pronoun = LabelledText(
        "pronoun", *(by_pronoun_and_speech(data / f"{split}.jsonl") for split in ("train", "validation"))
    )
    sizes = {"context_length": CONTEXT_LENGTH, "llm_batch_size": 64, "model_name": MODEL_NAME}
    erasure = {**sizes, "train_set_size": 2000, "test_set_size": 400, "n_values": [2, 5, 10, 20, 50]}
    return [
        SparseProbing(
            SparseProbingEvalConfig(
                dataset_names=[kind.name, pronoun.name], probe_train_set_size=2000, probe_test_set_size=400, **sizes
            ),
            [kind, pronoun],
        ),
        ConceptErasure(ScrAndTppEvalConfig(dataset_names=[kind.name], perform_scr=False, **erasure), [kind]),
        ConceptErasure(ScrAndTppEvalConfig(dataset_names=[pronoun.name], perform_scr=True, **erasure), [pronoun]),
        Absorption(
            # the word alone, so that its token is the last one; and fewer first letters than SAEBench asks of models of
            # 2 billion parameters (20 with F1 above 0.6)
            AbsorptionEvalConfig(
                model_name=MODEL_NAME,
                prompt_template="{word}",
                prompt_token_pos=-1,
                min_GT_probe_f1=0.1,
                min_feats_for_eval=5,
            )
        ),
        Core(
            CoreEvalConfig(
                model_name=MODEL_NAME,
                dataset=str(data / "validation.jsonl"),
                n_eval_reconstruction_batches=10,
                n_eval_sparsity_variance_batches=20,
                exclude_special_tokens_from_reconstruction=True,
            )
        ),
        MetaStructure(MetaStructureEvalConfig(autocast=False)),
    ]


def kind_of(text: str) -> str:
    """Somebody speaks; or else the snippet is about her, about him, or about neither."""
    if '"' in text:
        return "speech"
    return pronoun_of(text) or "neither"


def pronoun_of(text: str) -> str | None:
    """``she`` or ``he`` where only one of the two is there."""
    she = re.search(r"\b(she|her|hers)\b", text, re.IGNORECASE) is not None
    he = re.search(r"\b(he|him|his)\b", text, re.IGNORECASE) is not None
    return None if she == he else "she" if she else "he"


def snippets(path: Path, rule: Callable[[str], str | None]) -> dict[str, list[str]]:
    """Three sentences each from the stories in a file, by what a rule says of them."""
    by_class: dict[str, list[str]] = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for line in file:
            sentences = re.split(r'(?<=[.!?"])\s+', json.loads(line)["text"].strip())
            for start in range(0, len(sentences) - 2, 3):
                text = " ".join(sentences[start : start + 3])
                label = rule(text)
                if label is not None and text.strip():
                    by_class[label].append(text)
    return dict(sorted(by_class.items()))


def by_pronoun_and_speech(path: Path) -> dict[str, dict[str, list[str]]]:
    """She or he, and within each whether somebody speaks: the two labels that SCR needs."""
    return {
        pronoun: {
            speech: [text for text in texts if ('"' in text) == (speech == "speech")]
            for speech in ("narration", "speech")
        }
        for pronoun, texts in snippets(path, pronoun_of).items()
    }


if __name__ == "__main__":
    main()
