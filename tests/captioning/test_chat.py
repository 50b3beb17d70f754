"""captioning/chat.py: captions for programs that speak OpenAI's form, asked by OpenAI's own client."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_app import Server, model_file, pictures, web

from captioning.chat import RequestError, picture_and_text
from captioning.pipeline import caption_batch
from dataset import prepare_picture
from model import ImageCaptionModel

openai = pytest.importorskip("openai", reason="openai is of requirements/dev.txt")
__all__ = ["model_file", "pictures", "web"]  # fixtures


@pytest.fixture(scope="module")
def server(model_file, tmp_path_factory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        server = Server(model_file, key="a secret")
        yield server
        server.page.close(verbose=False)


@pytest.fixture(scope="module")
def client(server) -> Any:
    return openai.OpenAI(base_url=f"{server.address}v1", api_key="a secret", max_retries=0)


def data_url(path: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def caption_of(model_file: str, path: str, **options: Any) -> list[str]:
    """What the server should answer; its model computes in fp32."""
    model = ImageCaptionModel.from_pretrained(model_file)
    pixels = prepare_picture(path, model.config)[None]
    options = {"num_beams": 3, "max_length": 32} | options
    return [caption.text for caption in caption_batch(model, pixels, "fp32", **options)[0]]


def asked(url: str, text: str | None = None, **options: Any) -> dict[str, Any]:
    """The fields of a request."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
    content += [{"type": "text", "text": text}] if text else []
    return {"model": "tiny", "messages": [{"role": "user", "content": content}]} | options


def test_a_caption_is_that_of_the_command_line(client, model_file, pictures):
    """Whatever instruction a program sends along, and whatever it says as the system."""
    (expected,) = caption_of(model_file, pictures[0])
    for text in (None, "Describe this picture in one sentence.", "What is this?", "Caption it:"):
        request = asked(data_url(pictures[0]), text)
        request["messages"].insert(0, {"role": "system", "content": "You are a captioner"})
        answer = client.chat.completions.create(**request)
        (choice,) = answer.choices
        assert choice.message.content == expected and choice.finish_reason == "stop"
    model = ImageCaptionModel.from_pretrained(model_file)
    tokens = len(model.tokenizer(expected)["input_ids"])
    assert answer.usage.completion_tokens == tokens and answer.usage.prompt_tokens == model.config.num_patches
    assert answer.model == "tiny" and [model.id for model in client.models.list()] == ["tiny"]


def test_options_are_the_models(client, model_file, pictures):
    """A text is the caption's beginning; n, max_tokens and temperature do what they do with generate."""
    url = data_url(pictures[1])
    begun = client.chat.completions.create(**asked(url, "there are", n=3, max_tokens=4))
    texts = caption_of(model_file, pictures[1], num_return_sequences=3, max_length=4, prefix="there are")
    assert [choice.message.content for choice in begun.choices] == texts and texts[0].startswith("there are")
    assert [choice.index for choice in begun.choices] == [0, 1, 2] and begun.choices[0].finish_reason == "length"
    drawn = client.chat.completions.create(**asked(url, n=5, temperature=2.0))
    assert len({choice.message.content for choice in drawn.choices}) > 1
    searched = client.chat.completions.create(**asked(url, temperature=0))
    assert (
        searched.choices[0].message.content == client.chat.completions.create(**asked(url)).choices[0].message.content
    )


def test_a_stream_of_one_piece(client, pictures):
    plain = client.chat.completions.create(**asked(data_url(pictures[2]), n=2))
    chunks = list(client.chat.completions.create(**asked(data_url(pictures[2]), n=2, stream=True)))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in plain.choices]
    assert [c.choices[0].finish_reason for c in chunks] == [None, "stop", None, "stop"]
    *_, last = client.chat.completions.create(
        **asked(data_url(pictures[2]), stream=True, stream_options={"include_usage": True})
    )
    assert not last.choices and last.usage.completion_tokens > 0


def test_sixteen_at_once_beside_the_page(client, server, model_file, pictures):
    expected = [caption_of(model_file, path)[0] for path in pictures]
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda i: client.chat.completions.create(**asked(data_url(pictures[i % 12]))), range(16))
        assert httpx.get(server.address).status_code == 200
        texts = [answer.choices[0].message.content for answer in answers]
    assert texts == [expected[i % 12] for i in range(16)]


REFUSED = {
    "another model": ({"model": "gpt-9"}, openai.NotFoundError, "only 'tiny'"),
    "no picture": ({"messages": [{"role": "user", "content": "hello"}]}, openai.BadRequestError, "0 pictures"),
    "n": ({"n": 9}, openai.BadRequestError, "n is 9"),
    "temperature": ({"temperature": 3}, openai.BadRequestError, "temperature is 3"),
    "a wrong type": ({"n": "2"}, openai.BadRequestError, "n has to be of type int"),
    "tokens": ({"max_tokens": -1}, openai.BadRequestError, "max_tokens is -1"),
    "a private address": ({"url": "http://127.0.0.1:9/a.png"}, openai.BadRequestError, "127.0.0.1"),
    "a file": ({"url": "file:///etc/passwd"}, openai.BadRequestError, "passwd"),
    "no base64": ({"url": "data:image/png;base64,%%"}, openai.BadRequestError, "not base64"),
    "no picture in it": ({"url": "data:image/png;base64,aGVsbG8="}, openai.BadRequestError, "the picture"),
    "a large one": ({"url": "data:image/png;base64," + "A" * (2 << 20)}, openai.APIStatusError, "larger than 1 MiB"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_an_error_of_theirs(client, pictures, what):
    changes, kind, words = REFUSED[what]
    changes = dict(changes)
    request = asked(changes.pop("url", data_url(pictures[0]))) | changes
    with pytest.raises(kind, match=words) as error:
        client.chat.completions.create(**request)
    assert "\n" not in error.value.body["message"]


def test_a_key_keeps_others_out(server, pictures):
    stranger = openai.OpenAI(base_url=f"{server.address}v1", api_key="a guess", max_retries=0)
    for ask in (stranger.models.list, lambda: stranger.chat.completions.create(**asked(data_url(pictures[0])))):
        with pytest.raises(openai.AuthenticationError, match="API key"):
            ask()
    url = f"{server.address}v1/chat/completions"
    assert httpx.post(url, content=b"{", headers={"authorization": "Bearer a secret"}).status_code == 400
    foreign = httpx.get(f"{server.address}v1/models", headers={"origin": "https://elsewhere.example"})
    assert foreign.status_code == 403 and "message" in foreign.json()["error"]
    assert httpx.get(f"{server.address}v1/files").status_code == 404


def test_of_a_conversation_the_last_text_and_its_one_picture_count():
    picture = {"type": "image_url", "image_url": "https://x/y.png"}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "two"},
    ]
    assert picture_and_text(messages) == ("https://x/y.png", "two")
    for broken in (
        None,
        [1],
        [{"content": [3]}],
        [{"content": [{"type": "image_url"}]}],
        [{"content": [picture, picture]}],
    ):
        with pytest.raises(RequestError):
            picture_and_text(broken)
