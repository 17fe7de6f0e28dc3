"""How far a text's mean activation is from that of the text run alone, and how long a data set's texts take.

Run both ways: with the padding of the model's own tokenizer, to the context length and without a mask, as SAEBench's
functions give texts to a model, and as this plugin does.

    python benchmarks/texts_alone.py --model ~/.cache/real-models/gemma-3-270m --layer 9 \
        --text ../shared/real-models/probing/ag_news.jsonl
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sae_lens_matryoshka.bench.activation_source import ActivationSource, TextSpec
from sae_lens_matryoshka.bench.evaluated_saes import Hook
from sae_lens_matryoshka.bench.models import Model, load_model
from sae_lens_matryoshka.bench.texts_alone import text_tokens
from sae_lens_matryoshka.bench.upstream import activation_collection, contained, dataset_utils

CONTEXT_LENGTH, BATCH_SIZE = 128, 32
SHORT = ["Paris in the spring", "Stocks fell sharply on Monday morning"]


def _as_saebench(model: Model, texts: list[str], hook: Hook) -> Tensor:
    with contained():
        tokens = dataset_utils.tokenize_data_dictionary({"": texts}, model.tokenizer, CONTEXT_LENGTH, "cpu")  # type: ignore[arg-type]
        activations = activation_collection.get_all_llm_activations(
            tokens, model, BATCH_SIZE, hook.layer, hook.name, mask_bos_pad_eos_tokens=True  # type: ignore[arg-type]
        )  # fmt: skip
        return activation_collection.create_meaned_model_activations(activations)[""]


def _as_here(model: Model, texts: list[str], hook: Hook) -> Tensor:
    spec = TextSpec({"": texts}, {"": texts[:1]}, hook, CONTEXT_LENGTH, BATCH_SIZE)
    return ActivationSource(model).of_text(spec).train[""].means()


def _alone(model: Model, text: str, hook: Hook) -> Tensor:
    (tokens,) = text_tokens(model, [text], CONTEXT_LENGTH)
    cache = model.run_with_cache(tokens[None], names_filter=[hook.name], stop_at_layer=hook.layer + 1)[1]
    return cache[hook.name][0, 1:].mean(0)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--text", type=Path, required=True, help="JSONL with a column text")
    parser.add_argument("--texts", type=int, default=64, help="how many of them")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model = load_model(options.model, dtype=options.dtype)
    hook = Hook(f"blocks.{options.layer}.hook_resid_post", options.layer)
    texts = [*SHORT, *pd.read_json(options.text, lines=True)["text"].sample(options.texts, random_state=0)]
    ways: dict[str, Callable[[Model, list[str], Hook], Tensor]] = {"SAEBench's": _as_saebench, "ours": _as_here}
    means: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for way, run in ways.items():
        start = time.perf_counter()
        means[way] = run(model, texts, hook)
        seconds[way] = time.perf_counter() - start
    rows: list[dict[str, float]] = []
    for index, (text, tokens) in enumerate(zip(texts, text_tokens(model, texts, CONTEXT_LENGTH), strict=True)):
        alone = _alone(model, text, hook).float()
        errors = {way: ((mean[index].float() - alone).norm() / alone.norm()).item() for way, mean in means.items()}
        rows.append({"tokens": len(tokens), **errors})
    frame = pd.DataFrame(rows)
    frame["tokens"] = pd.cut(frame["tokens"], [0, 8, 16, 32, 64, 128])
    table = Table(
        "tokens",
        "texts",
        *(f"{way}: off by" for way in ways),
        title=f"{Path(options.model).name}, layer {options.layer}",
    )
    for bin_, group in frame.groupby("tokens", observed=True):
        table.add_row(str(bin_), str(len(group)), *(f"{group[way].mean():.2%}" for way in ways))
    Console(width=120).print(table)
    for way in ways:
        print(f"{way}: {len(texts)} texts in {seconds[way]:.1f} s")


if __name__ == "__main__":
    main()
