"""The recipes that come with the package: each is read and planned, without network and weights."""

from pathlib import Path

import pytest
from jinja2 import Template

from gakernels.cost.shapes import SHAPES
from gakernels.training.instruction.recipe import FinetuningRecipe
from gakernels.training.plan import plan_pretraining
from gakernels.training.pretraining_recipe import PretrainingRecipe
from gakernels.training.recipes import CONFIGS, load_recipe, recipe_file, recipe_text

PRETRAINING = sorted(path.stem for path in CONFIGS.glob("*-pretraining.yaml"))
FINETUNING = sorted(path.stem for path in CONFIGS.glob("*-finetuning.yaml"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan must not look at the hub")

    monkeypatch.setattr("gakernels.training.base_model.AutoConfig.from_pretrained", refuse)


def load(name: str) -> PretrainingRecipe:
    return load_recipe(PretrainingRecipe, Path(name))


def test_there_are_recipes() -> None:
    names = {"mistral-7b", "llama2-7b", "one-gpu", "cpu-small", "stories260K-books", "smollm2-135m"}
    assert {f"{name}-pretraining" for name in names} == set(PRETRAINING)
    assert {f"{name}-finetuning" for name in ("mistral-7b", "llama2-7b", "cpu-small", "smollm2-135m")} == set(
        FINETUNING
    )
    assert {path.stem for path in CONFIGS.iterdir()} == {*PRETRAINING, *FINETUNING}


@pytest.mark.parametrize("name", PRETRAINING)
def test_it_is_read_and_planned(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    plan = plan_pretraining(recipe, device="cpu" if name.startswith("cpu") else "cuda")
    assert plan.tokens == recipe.trainer.steps * recipe.windows.batch_size * recipe.segment_tokens
    assert plan.memory.total > 0
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    assert load_recipe(PretrainingRecipe, tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("name", "shape", "rate", "scale"),
    [("mistral-7b-pretraining", "mistral-7b", 5e-5, 1 / 16), ("llama2-7b-pretraining", "llama2-7b", 1e-4, 1 / 8)],
)
def test_the_papers_are_those_of_its_appendix(name: str, shape: str, rate: float, scale: float) -> None:
    recipe = load(name)
    trainer, generator = recipe.trainer, recipe.generator
    plan = plan_pretraining(recipe, processes=8)
    assert 0 <= plan.tokens - 10**9 < 8 * 8192
    assert (recipe.windows.batch_size, recipe.segment_tokens, generator.chunk_size) == (8, 8192, 1024)
    assert (trainer.learning_rate, trainer.weight_decay, trainer.warmup_steps) == (rate, 0.01, 100)
    assert trainer.schedule == "linear"
    assert (generator.state_size, generator.rank, generator.linears) == (1024, 128, ("o_proj",))
    assert generator.adapter_scale == scale
    assert plan.base_parameters == SHAPES[shape].parameters
    assert plan.generator_parameters == pytest.approx(500e6, rel=0.1)  # "approximately 500 million"
    assert (recipe.evaluation.contexts, recipe.context_chunks * generator.chunk_size) == (100, 1024)


@pytest.mark.parametrize("name", FINETUNING)
def test_a_tuning_is_read(name: str) -> None:
    assert load_recipe(FinetuningRecipe, Path(name)).start is not None


def test_smollm2_is_asked_in_few_tokens() -> None:
    template = Template(load_recipe(FinetuningRecipe, Path("smollm2-135m-finetuning")).data.chat_template)
    asked, said = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}
    assert template.render(messages=[asked], add_generation_prompt=True) == "Question: Who?\nAnswer:"
    assert template.render(messages=[asked, said]) == "Question: Who?\nAnswer: Ada<|im_end|>\n"


@pytest.mark.parametrize("name", ["mistral-7b-finetuning", "llama2-7b-finetuning"])
def test_the_papers_tuning_is_that_of_its_appendix(name: str) -> None:
    recipe = load_recipe(FinetuningRecipe, Path(name))
    assert recipe.start == name.replace("-finetuning", "-generator")
    assert (recipe.epochs, recipe.batches.batch_size) == (2, 32)
    assert (recipe.trainer.learning_rate, recipe.trainer.weight_decay) == (5e-5, 0.01)


def test_the_name_of_a_recipe_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = PRETRAINING[0]
    assert recipe_file(Path(name)) == recipe_file(Path(f"{name}.yaml")) == CONFIGS / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.yaml").write_text("")
    assert recipe_file(Path(f"{name}.yaml")).resolve() == tmp_path / f"{name}.yaml"  # the user's own comes first
