"""`gakernels push` and `pull` with a hub of folders behind the calls of huggingface_hub, whose signatures are kept."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import PeftConfig
from safetensors.torch import load_file
from tiny import make_base, make_config, same_adapters

from gakernels import Adapter, GenerativeAdapter
from gakernels.training.base_model import BaseConfig
from gakernels.training.perplexity import PerplexityReport, TaskPerplexity
from gakernels.training.pretraining_data import DataConfig, SourceConfig
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import recipe_text
from gakernels.training.trainer_config import TrainerConfig

BASE, NAME = "someone/small-base", "someone/thing"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the repositories; those that are private have a file that says so."""
    folder = tmp_path / "hub"

    def create_repo(repo_id: str, *, private: bool | None = None, exist_ok: bool = False, **_: Any) -> str:
        (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (folder / f"{repo_id}.private").write_text(str(private))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(*, repo_id: str, folder_path: Path, **_: Any) -> None:
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)

    def download(repo_id: str, **options: Any) -> str:
        if not (folder / repo_id).is_dir():
            raise OSError(f"404: no {repo_id} at {options['revision']}\nand more lines")
        return str(folder / repo_id)

    api = create_autospec(HfApi, instance=True)
    api.create_repo.side_effect, api.upload_folder.side_effect = create_repo, upload_folder
    monkeypatch.setattr("gakernels.model.hub.HfApi", lambda: api)
    monkeypatch.setattr(
        "gakernels.model.hub.snapshot_download", create_autospec(snapshot_download, side_effect=download)
    )
    return folder


def write_run(folder: Path) -> None:
    sources = {"web": SourceConfig("/home/me/secret/web"), "wiki": SourceConfig("hub:someone/wiki", weight=3.0)}
    recipe = PretrainingRecipe(
        model=BaseConfig("/home/me/secret/base"),
        data=DataConfig(sources=sources),
        trainer=TrainerConfig(steps=1234, learning_rate=3e-4, loss_weights=(("completion", 0.25),)),
        generator=make_config(chunk_size=16),
    )
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    perplexity = {"none": 12.5, "own": 2.25, "other": 11.0, "static_lora": 9.75}
    task = TaskPerplexity(perplexity, {}, 100)
    report = PerplexityReport(7, 32, True, task, replace(task, perplexity={"none": 20.0, "own": 18.125, "other": 19.0}))
    (folder / "report.json").write_text(json.dumps(report.to_dict()))


def test_a_generator_goes_to_the_hub_and_back(run: Callable[..., Any], files: Any, hub: Path, tmp_path: Path) -> None:
    source = tmp_path / "run"
    shutil.copytree(files.generator, source)
    write_run(source)
    (source / "checkpoints").mkdir()
    outcome = run("push", "--generator", source, "--to", NAME, "--base", BASE)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (
        f"README.md, generator.json, generator.safetensors uploaded:\nhttps://huggingface.co/{NAME}\n"
    )
    assert (hub / f"{NAME}.private").read_text() == "True"
    card = ModelCard.load(hub / NAME / "README.md")
    assert card.data.base_model == BASE
    assert card.data.library_name == "gakernels"
    for line in (
        "# thing",
        "| data | web, hub:someone/wiki |",
        "| steps | 1234 |",
        "| learning rate | 0.0003, linear |",
        "| loss weights | 0.25 completion |",
        "Perplexity on 7 held-out contexts:",
        "| read with | reconstruction | completion |",
        "| base model alone | 12.50 | 20.00 |",
        "| adapter of its own context | 2.25 | 18.12 |",
        "| static LoRA, same training | 9.75 |  |",
    ):
        assert line in card.text.splitlines()
    everything = b"".join(path.read_bytes() for path in (hub / NAME).iterdir())
    assert b"secret" not in everything
    assert str(files.base).encode() not in everything

    outcome = run("pull", "--from", NAME, "--output", tmp_path / "pulled")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"generator for the base model {BASE} written: {tmp_path / 'pulled'}\n"
    wanted = load_file(files.generator / "generator.safetensors")
    found = load_file(tmp_path / "pulled" / "generator.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    model = GenerativeAdapter.from_pretrained(tmp_path / "pulled", files.base)
    before = GenerativeAdapter.from_pretrained(files.generator)
    assert model.generator_fingerprint() == before.generator_fingerprint()


def test_an_adapter_goes_to_the_hub_and_back_and_is_a_peft_folder_there(
    run: Callable[..., Any], files: Any, adapter: Path, hub: Path, tmp_path: Path
) -> None:
    assert run("push", "--adapter", adapter, "--to", NAME, "--base", BASE, "--public").code == 0
    assert (hub / f"{NAME}.private").read_text() == "False"
    assert PeftConfig.from_pretrained(hub / NAME).base_model_name_or_path == BASE
    card = ModelCard.load(hub / NAME / "README.md")
    assert (card.data.base_model, card.data.library_name) == (BASE, "peft")
    own = Adapter.load(adapter)
    assert f"a context of {own.tokens_seen} tokens" in card.text
    assert run("pull", "--from", NAME, "--output", tmp_path / "pulled").code == 0
    found = Adapter.load(tmp_path / "pulled" / "adapter.safetensors")
    assert same_adapters(found, replace(own, base_name=BASE))


def test_a_card_of_the_folder_is_kept_and_a_base_of_the_hub_needs_no_option(
    run: Callable[..., Any], hub: Path, tmp_path: Path
) -> None:
    GenerativeAdapter(make_base(), make_config()).save_pretrained(tmp_path / "own", BASE)
    (tmp_path / "own" / "README.md").write_text("Mine.")
    assert run("push", "--generator", tmp_path / "own", "--to", NAME).code == 0
    assert (hub / NAME / "README.md").read_text() == "Mine."
    (tmp_path / "own" / "README.md").unlink()
    assert run("push", "--generator", tmp_path / "own", "--to", NAME).code == 0
    assert "| size | " in (hub / NAME / "README.md").read_text()


def test_what_cannot_be_sent_or_fetched_is_refused(
    refused: Callable[..., str], files: Any, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = ["push", "--generator", files.generator, "--to"]
    assert "--base must name the base model on the hub, but is not given" in refused(*sent, NAME)
    assert "--base must be a name on the hub, as owner/name, but it is base" in refused(*sent, NAME, "--base", "base")
    assert "--to must be a name on the hub, as owner/name, but it is a/b/c" in refused(*sent, "a/b/c")
    assert "404: no no/where at v1" in refused("pull", "--from", "no/where", "--output", tmp_path, "--revision", "v1")
    (hub / NAME).mkdir(parents=True)
    assert "but someone/thing has neither" in refused("pull", "--from", NAME, "--output", tmp_path / "pulled")
    (hub / NAME / "generator.safetensors").write_bytes((files.generator / "generator.safetensors").read_bytes()[:-8])
    assert "damaged" in refused("pull", "--from", NAME, "--output", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    api = create_autospec(HfApi, instance=True)
    api.create_repo.side_effect = OSError("401: log in first")
    monkeypatch.setattr("gakernels.model.hub.HfApi", lambda: api)
    assert f"the hub did not accept {NAME}: 401: log in first" in refused(*sent, NAME, "--base", BASE)
