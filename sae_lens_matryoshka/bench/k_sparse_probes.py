"""SAEBench's probes on mean activations, with latents chosen by its own rule and by standardized difference.

SAEBench takes the latents whose class means differ most in absolute terms, so latents with large activations are
preferred whatever the class, and on a model with a few huge channels it looks at nothing else. Divided by the pooled
standard deviation within classes, the difference says how well one latent tells the classes apart. Everything else is
the same for both rules: texts, draws, probe. The parts are SAEBench's functions, in the order of its
``probe_training.train_probe_on_activations``, so its numbers come out to the last bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lens_matryoshka.bench.standard_errors import Answers
from sae_lens_matryoshka.bench.upstream import probe_training

DENSE_PROBE: dict[str, Any] = {"batch_size": 250, "epochs": 100, "lr": 1e-2}
"""How SAEBench trains the probe on all channels or latents (``sparse_probing.main.run_eval_single_dataset``)."""

COLUMNS_A_BLOCK = 4096
"""How many latents are standardized at a time."""

ByClass = Mapping[str, Float[Tensor, "texts width"]]
"""Mean activations of the texts of each class."""


def dense_answers(train: ByClass, test: ByClass) -> dict[str, Answers]:
    """Probes on all channels or latents, a class each.

    Args:
        train: Texts to train probes on.
        test: Texts to test them on.
    """
    train_acts, test_acts = (torch.cat(list(split.values())) for split in (train, test))
    answers: dict[str, Answers] = {}
    with torch.enable_grad():
        for label in train:
            rows, labels = _drawn(train, label)
            test_rows, test_labels = _drawn(test, label)
            inputs = test_acts[test_rows]
            probe, accuracy = probe_training.train_probe_gpu(
                train_acts[rows], labels, inputs, test_labels, dim=inputs.shape[1], **DENSE_PROBE
            )
            with torch.no_grad():
                right = (probe(inputs) > 0) == test_labels.bool()
            answers[label] = Answers(float(accuracy), test_rows, right)
    return answers


def top_k_answers(
    train: ByClass, test: ByClass, ks: Sequence[int]
) -> dict[int, tuple[dict[str, Answers], dict[str, Answers]]]:
    """Probes on the k latents or channels that differ most, a class each: by SAEBench's rule, and standardized.

    Args:
        train: Texts to train probes on.
        test: Texts to test them on.
        ks: How many latents to take.
    """
    train_acts, test_acts = (torch.cat(list(split.values())) for split in (train, test))
    answers: dict[int, tuple[dict[str, Answers], dict[str, Answers]]] = {}
    for k in ks:
        by_rule: tuple[dict[str, Answers], dict[str, Answers]] = ({}, {})
        for label in train:
            rows, labels = _drawn(train, label)
            test_rows, test_labels = _drawn(test, label)
            inputs = train_acts[rows]
            left_out = probe_training.get_top_k_mean_diff_mask(inputs, labels, k)
            masks = (~left_out, top_k_standardized(inputs, labels, k))
            for mask, of_rule in zip(masks, by_rule, strict=True):
                test_inputs = test_acts[:, mask][test_rows]
                probe, accuracy = probe_training.train_sklearn_probe(inputs[:, mask], labels, test_inputs, test_labels)
                right = torch.from_numpy(probe.predict(test_inputs.float().cpu().numpy())) == test_labels.cpu()
                of_rule[label] = Answers(float(accuracy), test_rows, right)
        answers[k] = by_rule
    return answers


def top_k_standardized(
    acts: Float[Tensor, "texts width"], labels: Int[Tensor, " texts"], k: int
) -> Bool[Tensor, " width"]:
    """Which k columns have the largest difference of class means, divided by the pooled standard deviation.

    Columns that never vary come last; those that vary between classes only come first.

    Args:
        acts: Mean activations a text.
        labels: 1 for the class, 0 for the others.
        k: How many.
    """
    differences: list[Tensor] = []
    precise = torch.float32 if acts.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    for block in acts.split(COLUMNS_A_BLOCK, dim=1):
        positive, negative = block[labels == 1].to(precise), block[labels == 0].to(precise)
        squares = sum((part - part.mean(dim=0)).square().sum(dim=0) for part in (positive, negative))
        deviation = (squares / (len(block) - 2)).sqrt()  # type: ignore[operator]
        differences.append((positive.mean(dim=0) - negative.mean(dim=0)).abs() / deviation)
    standardized = torch.cat(differences).nan_to_num(nan=0.0, posinf=torch.inf)
    mask = torch.zeros_like(standardized, dtype=torch.bool)
    mask[standardized.argsort(descending=True)[:k]] = True
    return mask


def _drawn(texts: ByClass, label: str) -> tuple[Int[Tensor, " drawn"], Int[Tensor, " drawn"]]:
    """SAEBench's draw of as many other texts as the class has: rows of all texts, one class after the other; labels."""
    counts = [len(of_class) for of_class in texts.values()]
    numbered = torch.arange(sum(counts), device=texts[label].device)[:, None].split(counts)
    rows, labels = probe_training.prepare_probe_data(dict(zip(texts, numbered, strict=True)), label)
    return rows[:, 0], labels
