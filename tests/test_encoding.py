"""Tokenizers that put a token behind every text: none of it reaches a prompt or a context, wherever these are read."""

from pathlib import Path

import pytest
import tokenizers
import torch
from starlette.testclient import TestClient
from tiny import VOCABULARY, make_model, same_adapters
from tokenizers.models import WordLevel, WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gakernels import GenerativeAdapter, InputError
from gakernels.data.bad_records import BadRecords
from gakernels.data.chat import TokenLimits, encode_records
from gakernels.data.conversations import ContextRecord, Message
from gakernels.evaluation.answer_log import AnswerLog
from gakernels.evaluation.datasets import Dataset, EvaluationContext, Question
from gakernels.evaluation.prompts import Asker
from gakernels.evaluation.runner import Runner
from gakernels.evaluation.scenarios import docqa
from gakernels.generation import Sampling, generate
from gakernels.generation.decoder import Decoder
from gakernels.model.encoding import encode_text
from gakernels.server.server import assemble, create_app
from gakernels.server.settings import Settings

CONTEXT, MORE, PROMPT = "w7 w9 w30 w12", "w8 w31", "w5 w40"


def llama() -> PreTrainedTokenizerFast:
    """As Llama's with `add_eos_token`: `<s>` in front, `</s>` behind."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def bert() -> PreTrainedTokenizerFast:
    """As BERT's: `[CLS]` in front, `[SEP]` behind."""
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = tokenizers.Tokenizer(WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[UNK]"
    )


def only_closing() -> PreTrainedTokenizerFast:
    """As Qwen's embedding models: nothing in front, `</s>` behind."""
    tokenizer = llama()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


MAKERS = {"llama": (llama, [1]), "bert": (bert, [1]), "only_closing": (only_closing, [])}


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest) -> GenerativeAdapter:
    return make_model(tokenizer=MAKERS[request.param][0]())


@pytest.fixture
def opening(model: GenerativeAdapter, request: pytest.FixtureRequest) -> list[int]:
    return MAKERS[request.node.callspec.params["model"]][1]


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_a_text_gets_what_stands_in_front_alone(model: GenerativeAdapter, opening: list[int]) -> None:
    assert model.tokenizer(PROMPT)["input_ids"][-1] == 2  # as it comes
    assert encode_text(model.tokenizer, PROMPT) == opening + ids(PROMPT)
    assert encode_text(model.tokenizer, PROMPT, begins=False) == ids(PROMPT)
    assert encode_text(model.tokenizer, "") == opening


def test_what_a_text_says_itself_stays(model: GenerativeAdapter, opening: list[int]) -> None:
    first, last = model.tokenizer.convert_ids_to_tokens([1, 2])
    assert encode_text(model.tokenizer, f"{first} w5 {last}") == [*opening, 1, 5, 2]


def test_a_tokenizer_without_special_tokens() -> None:
    backend = tokenizers.Tokenizer(WordLevel({"a": 3, "b": 4, "?": 0}, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    assert encode_text(PreTrainedTokenizerFast(tokenizer_object=backend), "b a") == [4, 3]


def test_contexts_and_prompts_of_the_library(model: GenerativeAdapter, opening: list[int]) -> None:
    whole = model.adapt([opening + ids(CONTEXT)])[0]
    assert same_adapters(model.adapt([CONTEXT])[0], whole)
    grown = model.stream().append(CONTEXT).append(MORE)
    assert grown.tokens_seen == len(opening) + 6
    assert same_adapters(grown.adapter(), model.stream().append(opening + ids(CONTEXT)).append(ids(MORE)).adapter())
    prompt = torch.tensor([opening + ids(PROMPT)])
    with model.adapted(whole):
        output = model.base.generate(input_ids=prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
        expected = model.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        assert model.generate(PROMPT, max_new_tokens=5, eos_token_id=None)[0] == expected.strip()


def test_the_server(model: GenerativeAdapter, opening: list[int], tmp_path: Path) -> None:
    settings = Settings(tmp_path, "tiny", cpu_mebibytes=64, disk_mebibytes=64, threads=1)
    with TestClient(create_app(assemble(model, settings))) as client:
        context = client.post("/v1/contexts", json={"text": CONTEXT}).json()
        assert context["tokens_seen"] == len(opening) + 4
        grown = client.post(f"/v1/contexts/{context['id']}/append", json={"text": MORE}).json()
        assert grown["tokens_seen"] == len(opening) + 6
        answers = [
            client.post("/v1/completions", json={"model": grown["id"], "prompt": prompt, "max_tokens": 4, "seed": 3})
            for prompt in (PROMPT, opening + ids(PROMPT))
        ]
    by_text, by_ids = (answer.json() for answer in answers)
    assert by_text["usage"]["prompt_tokens"] == len(opening) + 2
    assert by_text["choices"] == by_ids["choices"]


def test_many_prompts_in_one_batch(model: GenerativeAdapter, opening: list[int]) -> None:
    adapter = model.stream().append(CONTEXT).compact()
    by_text, by_ids = generate(model, [PROMPT, opening + ids(PROMPT)], [adapter] * 2, Sampling(4))
    assert by_text.prompt == by_ids.prompt
    assert by_text.tokens == by_ids.tokens


def test_the_evaluation(model: GenerativeAdapter, opening: list[int]) -> None:
    decoder, asker = Decoder(model), Asker(model.tokenizer)
    assert decoder.encode(CONTEXT) == opening + ids(CONTEXT)
    assert decoder.begin() == opening
    assert asker.question(PROMPT) == opening + ids(PROMPT)
    assert asker.answered(PROMPT, MORE) == (opening + ids(f"{PROMPT} {MORE}"), len(opening) + 2)


def test_the_contexts_that_a_generator_is_tuned_on(model: GenerativeAdapter, opening: list[int]) -> None:
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    record = ContextRecord(CONTEXT, ((Message("user", PROMPT), Message("assistant", MORE)),))
    (example,) = encode_records(
        [record], model.tokenizer, TokenLimits(50, 50), BadRecords(), BadRecords(), progress=False
    )
    assert example.context.tolist() == opening + ids(CONTEXT)
    assert example.conversations[0].tokens.tolist() == ids(f"{PROMPT} {MORE}")


def test_prompts_with_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    tokenizer = llama()
    tokenizer.add_tokens(["<image>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # is not known either, and pads all the same
    model = make_model(tokenizer=tokenizer)
    with model.adapted(model.adapt(CONTEXT)):
        both = model.generate([PROMPT, f"{PROMPT} {MORE}"], max_new_tokens=3)
        assert both == [model.generate(text, max_new_tokens=3)[0] for text in (PROMPT, f"{PROMPT} {MORE}")]
        with pytest.raises(InputError, match=r"prompt 2 has the token '<image>' \(64\), .* has 64 rows"):
            model.generate([PROMPT, "w5 <image>"])
    with pytest.raises(InputError, match=r"token ids must be between 0 and 63, but .*64 are there"):
        model.adapt("w5 <image>")
    question = Question("w5 <image>", ("w6",))
    scenario = docqa(Dataset((EvaluationContext(CONTEXT, (question,)),)), len, [1])
    runner = Runner(model, scenario, ["prompt"], AnswerLog(None, {}), progress=False)
    with pytest.raises(InputError, match=r"case 0, question 0, has the token '<image>' \(64\)"):
        runner.run()
    settings = Settings(tmp_path, "tiny", cpu_mebibytes=64, disk_mebibytes=64, threads=1)
    with TestClient(create_app(assemble(model, settings))) as client:
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "w5 <image>"})
        assert (answer.status_code, client.post("/v1/contexts", json={"text": "<image>"}).status_code) == (400, 400)
    assert "token ids must be between 0 and 63" in answer.json()["error"]["message"]
