"""What each of several processes does in test_pretraining_processes.py."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # where the package is not installed

import torch
from torch.distributed.fsdp import FSDPModule

from gakernels.distributed import process_group
from gakernels.training.pretraining import make_model, pretrain
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import load_recipe


def run(folder: Path) -> None:
    """The recipe of the folder, with replicas and with shards."""
    torch.set_num_threads(1)
    with process_group("cpu") as ranks:
        for parallel in ("replicas", "shards"):
            recipe = load_recipe(PretrainingRecipe, folder / "recipe.yaml", [f"parallel={parallel}"])
            model = make_model(recipe, "cpu")
            report = pretrain(model, recipe, folder / parallel, progress=False, ranks=ranks)
            sharded = any(isinstance(module, FSDPModule) for module in model.modules())
            found = {"report": report.to_dict(), "sharded": sharded}
            (folder / f"{parallel}-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
