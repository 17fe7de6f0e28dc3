"""A local Hub for every test here, and the real client pointed at it, in this process and in others."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from matplotlib.figure import Figure
from safetensors.torch import save_file

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.saved.level_figures import LevelMetrics, write_level_figures
from tests.hub.local_hub import OWNER_TOKEN, LocalHub


@pytest.fixture
def local_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub with nothing in it; this process is logged in there as ``owner``."""
    hub = LocalHub()
    home = tmp_path_factory.mktemp("hf_home")
    # huggingface_hub reads the environment when it is imported, which has long happened
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    close_session()
    yield hub
    close_session()
    hub.stop()


@pytest.fixture
def hub_environment(local_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which another process uses the local Hub."""
    return {
        **os.environ,
        "HF_ENDPOINT": local_hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("other_hf_home")),
        "HF_TOKEN": OWNER_TOKEN,
        "no_proxy": "127.0.0.1,localhost",
    }


@pytest.fixture
def saved_sae(tmp_path: Path) -> Path:
    """A small trained SAE as a run leaves it, with local paths wherever SAELens records them."""
    return save_trained_sae(tmp_path / "runs" / "saved_sae", tmp_path)


def png() -> bytes:
    """A small picture as matplotlib saves it."""
    buffer = io.BytesIO()
    Figure(figsize=(1, 1), dpi=10).savefig(buffer, metadata={"Comment": "/home/alice/notebook.ipynb"})
    return buffer.getvalue()


def save_trained_sae(folder: Path, private_folder: Path, seed: int = 0) -> Path:
    """Save an SAE of levels 3, 8 and 20 with the files of a run."""
    torch.manual_seed(seed)
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[3, 8, 20]))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    sae.topk_threshold += 0.3
    metadata = sae.cfg.metadata
    metadata.model_name = str(private_folder / "models" / "tiny-model")
    metadata.dataset_path = "roneneldan/TinyStories"
    metadata.hook_name = "blocks.2.hook_resid_post"
    metadata.context_size = 256
    metadata.model_from_pretrained_kwargs = {"cache_dir": str(Path.home() / "cache"), "token": "hf_" + "a" * 30}
    metadata.local_paths = ["model_name", "model_from_pretrained_kwargs.cache_dir"]
    sae.save_inference_model(folder)
    save_file({"sparsity": torch.full((20,), -2.0)}, folder / "sparsity.safetensors")
    runner_cfg = {
        "model_name": metadata.model_name,
        "output_path": str(folder),
        "checkpoint_path": "checkpoints/me/abc",
        "cached_activations_path": str(private_folder / "cached"),
        "resume_from_checkpoint": None,
        "training_tokens": 400_000,
        "lr": 3e-4,
        "logger": {"wandb_entity": "my-team", "run_name": f"from {private_folder}/start.sh --fast"},
    }
    (folder / "runner_cfg.json").write_text(json.dumps(runner_cfg))
    write_level_figures(
        folder,
        [
            LevelMetrics(0, 3, l0=1.1, fvu=0.7, dead=0, dense=0, n_samples=100),
            LevelMetrics(1, 8, l0=2.0, fvu=0.5, dead=1, dense=0, n_samples=100),
            LevelMetrics(2, 20, l0=3.0, fvu=0.25, dead=5, dense=0, n_samples=100),
        ],
    )
    return folder
